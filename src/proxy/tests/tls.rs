//! Forwarding to an application whose server has a certificate.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::ws::{Message as Sent, WebSocketUpgrade};
use axum::routing::any;
use futures_util::{SinkExt, StreamExt};
use http::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

use crate::context::NodeContext;
use crate::net::{Pem, ServerTls};
use crate::proxy::tests::world::*;
use crate::proxy::{ReplayLayer, Route, Upgrades};
use crate::session::Session;
use crate::status::Role;
use crate::token::Token;

/// An authority with its certificate.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
}

impl Authority {
    fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Authority { issuer: Issuer::new(params, key), certificate }
    }

    /// What its server begins a connection with, and what it speaks.
    fn server(&self, protocols: &[&str], change: impl FnOnce(&mut CertificateParams)) -> ServerConfig {
        self.server_that(protocols, change, false)
    }

    fn server_that(
        &self,
        protocols: &[&str],
        change: impl FnOnce(&mut CertificateParams),
        wants_certificates: bool,
    ) -> ServerConfig {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST))];
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let builder = if wants_certificates {
            let mut roots = RootCertStore::empty();
            roots.add(self.certificate.der().clone()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        let mut config = builder.with_single_cert(vec![certificate.der().clone()], key.into()).unwrap();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        config
    }

    fn tls(&self) -> ServerTls {
        ServerTls::new(Some(Pem { named: "roots.pem", bytes: self.certificate.pem().as_bytes() }), None)
            .unwrap()
    }
}

/// Listens, and does what the test says with each connection on which TLS stands.
async fn listen<F>(config: ServerConfig, act: impl Fn(TlsStream<TcpStream>) -> F + Send + 'static) -> String
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            match acceptor.accept(stream).into_fallible().await {
                Ok(stream) => drop(tokio::spawn(act(stream))),
                // The client does not like what it saw, or is told why it is refused.
                Err((_, mut stream)) => {
                    tokio::spawn(async move { tokio::io::copy(&mut stream, &mut tokio::io::sink()).await });
                }
            }
        }
    });
    url
}

async fn serve(config: ServerConfig, app: Router) -> String {
    listen(config, move |stream| {
        let app = TowerToHyperService::new(app.clone());
        async move {
            let builder = auto::Builder::new(TokioExecutor::new());
            let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), app).await;
        }
    })
    .await
}

/// A primary with this app and server, and a replica before it.
async fn pair(
    server: ServerConfig,
    app: Router,
    options: impl FnOnce(ReplayLayer) -> ReplayLayer,
) -> (Server, Arc<NodeContext>) {
    let url = serve(server, app.layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    replica_of(&url, options).await
}

/// An app that commits and says what it got.
fn committing() -> Router {
    Router::new().fallback(|request: Request<Body>| async move {
        Session::current().unwrap().observe_txid(txid(12));
        format!("{:?} {}", request.version(), mirror(request).await)
    })
}

fn post(server: &Server) -> Request<TestBody> {
    Request::post(format!("{}/notes?x=1", server.url())).body(full("hello")).unwrap()
}

#[tokio::test]
async fn a_request_arrives_at_the_primary_over_https_and_its_token_counts() {
    let authority = Authority::new();
    for (http2, version) in [(false, "HTTP/1.1"), (true, "HTTP/2.0")] {
        let server = authority.server(&["h2", "http/1.1"], |_| {});
        let (replica, node) = pair(server, committing(), |l| l.with_tls(authority.tls()).http2(http2)).await;
        for _ in 0..2 {
            let response = send(post(&replica)).await;
            assert_eq!(response.status(), 200);
            let token = response.headers()["replite-token"].to_str().unwrap();
            assert_eq!(Token::verify(&node, token), Some(txid(12)));
            // Its client speaks http to the replica, and would not send a secure cookie back.
            let cookie = response.headers()["set-cookie"].to_str().unwrap();
            assert!(!cookie.contains("Secure"), "{cookie}");
            let got = text(response).await;
            assert!(got.starts_with(&format!("{version} POST ")) && got.ends_with("hello"), "{got}");
            assert!(got.contains("/notes?x=1\n") && !got.contains("x-forwarded-proto"), "{got}");
        }
        let mut request = post(&replica);
        request.headers_mut().insert("x-forwarded-proto", "https".parse().unwrap());
        let response = send(request).await;
        assert!(response.headers()["set-cookie"].to_str().unwrap().ends_with("; Secure"));
        assert!(text(response).await.contains("x-forwarded-proto: https\n"));
    }
}

#[tokio::test]
async fn a_server_that_does_not_prove_its_name_gets_no_request() {
    let (authority, other) = (Authority::new(), Authority::new());
    let ran = Arc::new(AtomicUsize::new(0));
    let counted = ran.clone();
    let app = Router::new().fallback(move || async move {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let expired = |params: &mut CertificateParams| params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let misnamed = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![SanType::DnsName("other.example".try_into().unwrap())];
    };
    let protocols = ["h2", "http/1.1"];
    for http2 in [false, true] {
        let options = |tls: ServerTls| move |l: ReplayLayer| l.with_tls(tls).http2(http2).hold_timeout(SHORT);
        for (server, tls, why) in [
            (other.server(&protocols, |_| {}), authority.tls(), "an unknown authority"),
            (authority.server(&protocols, |_| {}), ServerTls::default(), "one that the system does not know"),
            (authority.server(&protocols, expired), authority.tls(), "it is expired"),
            (authority.server(&protocols, misnamed), authority.tls(), "another name"),
        ] {
            let (replica, _node) = pair(server, app.clone(), options(tls)).await;
            let response = send(post(&replica)).await;
            is(&response, 503, "not-executed");
            assert!(text(response).await.contains("can't be reached"), "{why}");
        }
        // Nor does one that speaks no TLS: the request does not go there in the clear.
        let plain = Server::start(app.clone()).await;
        let url = plain.url().replace("http://", "https://");
        let (replica, _node) = replica_of(&url, options(authority.tls())).await;
        is(&send(post(&replica)).await, 503, "not-executed");
    }
    assert_eq!(ran.load(Ordering::Relaxed), 0);
}

/// By TLS 1.3 the client takes the handshake for done before the server has refused it.
#[tokio::test]
async fn a_server_that_wants_a_certificate_of_the_node_has_begun_nothing() {
    let authority = Authority::new();
    for http2 in [false, true] {
        let server = authority.server_that(&["h2", "http/1.1"], |_| {}, true);
        let options = |l: ReplayLayer| l.with_tls(authority.tls()).http2(http2).hold_timeout(SHORT);
        let (replica, _node) = pair(server, committing(), options).await;
        is(&send(post(&replica)).await, 503, "not-executed");
    }
}

#[tokio::test]
async fn what_the_server_chose_is_spoken() {
    let authority = Authority::new();
    let options = |http2| {
        let tls = authority.tls();
        move |l: ReplayLayer| l.with_tls(tls).http2(http2).hold_timeout(SHORT)
    };
    for (protocols, http2, works) in [
        (&["http/1.1"][..], false, true),
        (&[], false, true),
        (&["h2"], true, true),
        // A server that does not choose HTTP/2 gets none, though this one would understand it.
        (&["http/1.1"], true, false),
        (&[], true, false),
        (&["h2"], false, false),
    ] {
        let server = authority.server(protocols, |_| {});
        let (replica, _node) = pair(server, committing(), options(http2)).await;
        let response = send(post(&replica)).await;
        if works {
            assert_eq!(response.status(), 200, "{protocols:?} {http2}");
        } else {
            is(&response, 503, "not-executed");
        }
    }
}

/// What is on the path can cut the line, and not make a part pass for the whole.
#[tokio::test]
async fn a_connection_that_is_cut_within_tls_is_no_end() {
    let authority = Authority::new();
    let cut = |words: &'static str, says_goodbye: bool| {
        let server = authority.server(&["http/1.1"], |_| {});
        listen(server, move |mut stream| async move {
            let mut head = Vec::new();
            while !head.ends_with(b"hello") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(words.as_bytes()).await.unwrap();
            stream.flush().await.unwrap();
            if says_goodbye {
                stream.shutdown().await.unwrap();
            }
        })
    };
    let options = |l: ReplayLayer| l.with_tls(authority.tls());
    for says_goodbye in [false, true] {
        let (replica, _node) = replica_of(&cut("", says_goodbye).await, options).await;
        is(&send(post(&replica)).await, 504, "unknown");
    }
    let begun = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\na part";
    let (replica, _node) = replica_of(&cut(begun, true).await, options).await;
    assert_eq!(text(send(post(&replica)).await).await, "a part", "it was all");
    let (replica, _node) = replica_of(&cut(begun, false).await, options).await;
    let body = http_body_util::BodyExt::collect(send(post(&replica)).await.into_body());
    assert!(tokio::time::timeout(LONG, body).await.unwrap().is_err(), "more may have been to come");
}

#[tokio::test]
async fn a_socket_is_carried_over_https() {
    let authority = Authority::new();
    let handler = any(|upgrade: WebSocketUpgrade| async move {
        upgrade.on_upgrade(|mut socket| async move {
            while let Some(Ok(Sent::Text(text))) = socket.recv().await {
                socket.send(Sent::Text(format!("primary:{text}").into())).await.unwrap();
            }
        })
    });
    let app = Router::new().route("/ws", handler);
    let server = authority.server(&["h2", "http/1.1"], |_| {});
    let options = |l: ReplayLayer| l.with_tls(authority.tls()).upgrades(Upgrades::Primary).http2(true);
    let (replica, _node) = pair(server, app, options).await;
    let (mut socket, _) = connect_async(format!("ws://{}/ws", replica.address)).await.unwrap();
    for text in ["a", &"long ".repeat(50_000)] {
        socket.send(Message::text(text)).await.unwrap();
        let told = tokio::time::timeout(LONG, socket.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(told.into_text().unwrap().as_str(), format!("primary:{text}"));
    }
}

#[tokio::test]
async fn a_read_that_asks_the_primary_does_so_over_https() {
    let authority = Authority::new();
    let server = authority.server(&["h2", "http/1.1"], |_| {});
    let options = |l: ReplayLayer| l.with_tls(authority.tls()).route_prefix("/report", Route::Primary);
    let (replica, _node) = pair(server, committing(), options).await;
    let get = Request::get(format!("{}/report", replica.url())).body(full("")).unwrap();
    assert!(text(send(get).await).await.contains("GET /report"));
}
