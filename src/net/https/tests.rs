use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const LIMIT: Duration = Duration::from_secs(5);

fn client() -> HttpsClient {
    HttpsClient::new(ServerTls::default(), LIMIT)
}

async fn post(client: &HttpsClient, url: &str) -> Result<Bytes, HttpsError> {
    let request = Request::post(url).body(Full::from("body")).unwrap();
    let response = tokio::time::timeout(LIMIT, client.send(request)).await.expect("it ends")?;
    Ok(read_body(response.into_body(), 100).await.unwrap())
}

/// Reads a request whose body is `body`. None at the end of the connection.
async fn request(io: &mut (impl AsyncRead + Unpin)) -> Option<String> {
    let (mut read, mut buffer) = (Vec::new(), [0; 1024]);
    while !read.ends_with(b"\r\n\r\nbody") {
        match io.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(bytes) => read.extend_from_slice(&buffer[..bytes]),
        }
    }
    Some(String::from_utf8(read).unwrap())
}

/// A server that serves one connection after the other, and counts the requests that it reads.
async fn server<F>(
    serve: impl Fn(TcpStream, Arc<AtomicUsize>) -> F + Send + 'static,
) -> (String, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    tokio::spawn(async move {
        loop {
            let (io, _) = listener.accept().await.unwrap();
            serve(io, counted.clone()).await;
        }
    });
    (address.to_string(), requests)
}

#[tokio::test]
async fn a_server_that_is_not_there_was_sent_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let Err(HttpsError::NotSent(why)) = post(&client(), &format!("http://{address}/")).await else {
        panic!("nothing is there");
    };
    assert!(why.contains(&address.to_string()) && why.contains("refused"), "{why}");
    // It takes no connection: its queue is full of others.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let full = socket.listen(0).unwrap();
    let address = full.local_addr().unwrap();
    let mut others = Vec::new();
    while let Ok(connected) =
        tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(address)).await
    {
        others.push(connected.unwrap());
    }
    let quick = HttpsClient::new(ServerTls::default(), Duration::from_millis(200));
    let sent = post(&quick, &format!("http://{address}/")).await;
    assert!(matches!(&sent, Err(HttpsError::NotSent(_))), "{sent:?}");
}

#[tokio::test]
async fn a_request_that_was_read_may_have_been_carried_out() {
    let (address, requests) = server(|mut io, requests| async move {
        if request(&mut io).await.is_some() {
            requests.fetch_add(1, Ordering::SeqCst);
        }
    })
    .await;
    let client = client();
    for times in 1..=3 {
        let sent = post(&client, &format!("http://{address}/")).await;
        assert!(matches!(sent, Err(HttpsError::MaybeSent(_))), "{sent:?}");
        assert_eq!(requests.load(Ordering::SeqCst), times, "nothing is repeated");
    }
}

/// On a connection that was good before, too: this is what a client may repeat by mistake.
#[tokio::test]
async fn a_request_that_was_read_on_a_used_connection_is_not_repeated() {
    let (address, requests) = server(|mut io, requests| async move {
        while request(&mut io).await.is_some() {
            if requests.fetch_add(1, Ordering::SeqCst) % 2 == 1 {
                return;
            }
            io.write_all(ANSWER.as_bytes()).await.unwrap();
        }
    })
    .await;
    let (client, url) = (client(), format!("http://{address}/"));
    for round in 1..=3 {
        assert_eq!(post(&client, &url).await.unwrap(), "ok");
        let sent = post(&client, &url).await;
        assert!(matches!(sent, Err(HttpsError::MaybeSent(_))), "{sent:?}");
        assert_eq!(requests.load(Ordering::SeqCst), 2 * round);
    }
}

#[tokio::test]
async fn a_connection_that_was_closed_meanwhile_is_opened_anew() {
    let (ended, mut both_closed) = tokio::sync::mpsc::unbounded_channel();
    let (address, requests) = server(move |mut io, requests| {
        let ended = ended.clone();
        async move {
            if request(&mut io).await.is_some() {
                requests.fetch_add(1, Ordering::SeqCst);
                io.write_all(ANSWER.as_bytes()).await.unwrap();
                io.shutdown().await.unwrap();
                assert_eq!(request(&mut io).await, None);
                ended.send(()).unwrap();
            }
        }
    })
    .await;
    let (client, url) = (client(), format!("http://{address}/"));
    for _ in 0..5 {
        assert_eq!(post(&client, &url).await.unwrap(), "ok");
        // The client has closed it, too: the next request does not meet the close.
        both_closed.recv().await.unwrap();
    }
    assert_eq!(requests.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn a_connection_serves_many_requests_and_redirects_are_not_followed() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let (address, requests) = server(move |mut io, requests| {
        let counted = counted.clone();
        async move {
            counted.fetch_add(1, Ordering::SeqCst);
            while let Some(read) = request(&mut io).await {
                assert!(read.starts_with("POST /a?b HTTP/1.1\r\n"), "{read}");
                assert!(read.contains("\r\nhost: 127.0.0.1:"), "{read}");
                requests.fetch_add(1, Ordering::SeqCst);
                let to = "HTTP/1.1 307 Elsewhere\r\nlocation: /elsewhere\r\ncontent-length: 2\r\n\r\nok";
                io.write_all(to.as_bytes()).await.unwrap();
            }
        }
    })
    .await;
    let (client, url) = (client(), format!("http://{address}/a?b"));
    for _ in 0..10 {
        assert_eq!(post(&client, &url).await.unwrap(), "ok");
    }
    assert_eq!((requests.load(Ordering::SeqCst), connections.load(Ordering::SeqCst)), (10, 1));
}

#[tokio::test]
async fn a_body_has_a_bound() {
    let (address, _) = server(|mut io, _| async move {
        let _ = request(&mut io).await;
        // Without a length, and without an end.
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        let _ = io.write_all(head.as_bytes()).await;
        while io.write_all(b"4\r\nmore\r\n").await.is_ok() {}
    })
    .await;
    let request = Request::post(format!("http://{address}/")).body(Full::from("body")).unwrap();
    let response = client().send(request).await.unwrap();
    let why = read_body(response.into_body(), 1000).await.unwrap_err();
    assert!(why.contains("longer than 1000 bytes"), "{why}");
    // It is closed within the body.
    let (address, _) = server(|mut io, _| async move {
        let _ = super::tests::request(&mut io).await;
        let _ = io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc").await;
    })
    .await;
    let request = Request::post(format!("http://{address}/")).body(Full::from("body")).unwrap();
    let response = client().send(request).await.unwrap();
    let why = read_body(response.into_body(), 1000).await.unwrap_err();
    assert!(why.contains("broke off"), "{why}");
}

#[cfg(not(feature = "tls"))]
#[tokio::test]
async fn a_build_without_tls_sends_nothing_by_https() {
    let (address, requests) = server(|mut io, requests| async move {
        if request(&mut io).await.is_some() {
            requests.fetch_add(1, Ordering::SeqCst);
        }
    })
    .await;
    let sent = post(&client(), &format!("https://{address}/")).await;
    assert!(matches!(&sent, Err(HttpsError::NotSent(why)) if why.contains("feature `tls`")), "{sent:?}");
    assert_eq!(requests.load(Ordering::SeqCst), 0);
}

#[cfg(feature = "tls")]
mod tls {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::server::WebPkiClientVerifier;
    use rustls::{RootCertStore, ServerConfig};
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::error::Error;
    use crate::net::server_tls::Pem;

    struct Authority(CertifiedIssuer<'static, KeyPair>);

    impl Authority {
        fn new() -> Authority {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
        }

        /// A certificate for this name, and its key.
        fn issue(&self, name: &str) -> [String; 2] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            [params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem()]
        }

        /// Serves HTTP over TLS, to clients of `clients` alone, if it is given.
        async fn server(&self, name: &str, clients: Option<&Authority>) -> (String, Arc<AtomicUsize>) {
            let [chain, key] = self.issue(name);
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let builder = ServerConfig::builder_with_provider(provider.clone());
            let builder = builder.with_safe_default_protocol_versions().unwrap();
            let builder = match clients {
                None => builder.with_no_client_auth(),
                Some(authority) => {
                    let mut roots = RootCertStore::empty();
                    roots.add(authority.0.der().clone()).unwrap();
                    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                    builder.with_client_cert_verifier(verifier.build().unwrap())
                }
            };
            let chain = vec![CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            let acceptor = TlsAcceptor::from(Arc::new(builder.with_single_cert(chain, key).unwrap()));
            server(move |io, requests| {
                let acceptor = acceptor.clone();
                async move {
                    let Ok(mut io) = acceptor.accept(io).await else { return };
                    while request(&mut io).await.is_some() {
                        requests.fetch_add(1, Ordering::SeqCst);
                        io.write_all(ANSWER.as_bytes()).await.unwrap();
                        io.flush().await.unwrap();
                    }
                }
            })
            .await
        }

        fn tls(&self, identity: Option<&[String; 2]>) -> ServerTls {
            let roots = self.0.pem();
            let pem = |named, bytes: &'static str| Pem { named, bytes: bytes.as_bytes() };
            let identity = identity.map(|[chain, key]| {
                [pem("chain.pem", chain.clone().leak()), pem("key.pem", key.clone().leak())]
            });
            ServerTls::new(Some(Pem { named: "roots.pem", bytes: roots.as_bytes() }), identity).unwrap()
        }
    }

    #[tokio::test]
    async fn a_server_proves_its_name_and_a_client_its_own() {
        let (ours, theirs) = (Authority::new(), Authority::new());
        let identity = theirs.issue("client");
        let (open, _) = ours.server("127.0.0.1", None).await;
        let (named, unasked) = ours.server("another", None).await;
        let (closed, requests) = ours.server("127.0.0.1", Some(&theirs)).await;
        let post = async |tls: ServerTls, address: &str| {
            post(&HttpsClient::new(tls, LIMIT), &format!("https://{address}/")).await
        };
        let not_sent = |sent: Result<Bytes, HttpsError>| match sent {
            Err(HttpsError::NotSent(why)) => why,
            sent => panic!("{sent:?}"),
        };
        assert_eq!(post(ours.tls(None), &open).await.unwrap(), "ok");
        assert_eq!(post(ours.tls(Some(&identity)), &closed).await.unwrap(), "ok");
        assert_eq!(requests.load(Ordering::SeqCst), 1);
        not_sent(post(theirs.tls(None), &open).await);
        not_sent(post(ours.tls(None), &named).await);
        // By TLS 1.3 the request is sent by then. The server has not read it.
        let why = not_sent(post(ours.tls(None), &closed).await);
        assert!(why.contains("CertificateRequired"), "{why}");
        assert_eq!((requests.load(Ordering::SeqCst), unasked.load(Ordering::SeqCst)), (1, 0));
    }

    #[test]
    fn files_that_are_no_certificates_are_named() {
        let authority = Authority::new();
        let ([chain, key], [_, other]) = (authority.issue("a"), authority.issue("a"));
        let pem = |named: &'static str, text: &'static str| Pem { named, bytes: text.as_bytes() };
        let (chain, key, other) = (&*chain.leak(), &*key.leak(), &*other.leak());
        let refused = |roots, identity, words: &str| {
            let error = ServerTls::new(roots, identity).map(drop).unwrap_err();
            assert!(matches!(&error, Error::Config(why) if why.contains(words)), "{error}");
            assert!(!error.to_string().contains("BEGIN"), "{error}");
        };
        refused(Some(pem("roots.pem", "")), None, "roots.pem: there is no certificate");
        refused(Some(pem("roots.pem", &chain[..60])), None, "roots.pem");
        refused(None, Some([pem("chain.pem", key), pem("key.pem", key)]), "chain.pem");
        refused(None, Some([pem("chain.pem", chain), pem("key.pem", chain)]), "key.pem");
        refused(
            None,
            Some([pem("chain.pem", chain), pem("key.pem", other)]),
            "key of the certificate in chain",
        );
        ServerTls::new(None, Some([pem("chain.pem", chain), pem("key.pem", key)])).unwrap();
    }
}
