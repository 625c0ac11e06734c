//! Under which names a browser may ask, and what each answer tells it.
//!
//! A page elsewhere can give its own name the address of this instance, and then read all that is
//! here as if it were its own. The `Host` of its requests is still that name.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{self, HOST, HeaderName};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use replite::Forwarded;

use crate::api::Failure;

/// Scripts and styles are files of ours, so that none can come with a note. No other page has this
/// one in a frame, where its buttons could be pressed unseen.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

const HEADERS: [(HeaderName, &str); 3] = [
    (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
];

/// A balancer asks these by whatever name.
const PROBES: [&str; 3] = ["/livez", "/readyz", "/healthz"];

/// What an instance is called, by itself and by the others: what they forward has the name that the
/// client used.
pub(crate) struct Names(Vec<String>);

impl Names {
    pub(crate) fn new(listen: SocketAddr, peers: &[String], hosts: &[String]) -> Names {
        let own = [listen.to_string(), format!("localhost:{}", listen.port())];
        let peers = peers.iter().map(|url| url.split_once("://").map_or(&**url, |(_, host)| host));
        let names = own.iter().map(String::as_str).chain(peers).chain(hosts.iter().map(String::as_str));
        Names(names.map(|name| plain(name.trim_end_matches('/'))).collect())
    }

    fn has(&self, name: &[u8]) -> bool {
        std::str::from_utf8(name).is_ok_and(|name| self.0.contains(&plain(name)))
    }

    /// Whether a request is for us by each name that it gives: HTTP/2 has it in the target.
    fn are_in(&self, request: &Request) -> bool {
        let hosts = request.headers().get_all(HOST).iter().map(HeaderValue::as_bytes);
        let mut names =
            request.uri().authority().map(|name| name.as_str().as_bytes()).into_iter().chain(hosts);
        let first = names.next();
        first.is_some_and(|name| self.has(name)) && names.all(|name| self.has(name))
    }
}

/// As names are compared: browsers leave the usual port out.
fn plain(name: &str) -> String {
    name.strip_suffix(":80").unwrap_or(name).to_ascii_lowercase()
}

/// Refuses requests under other names. It goes around the replay layer: no instance forwards them.
pub(crate) async fn guard(State(names): State<Arc<Names>>, request: Request, next: Next) -> Response {
    // The instance that took a request from its client has looked at the name already. What comes by
    // its address, and not on the private channel, has to have a name of `--peers`.
    let looked_at = request.extensions().get::<Forwarded>().is_some();
    let ours = looked_at || PROBES.contains(&request.uri().path()) || names.are_in(&request);
    let mut response = match ours {
        true => next.run(request).await,
        // Not 421: by that instances tell each other that they are no primary.
        false => Failure::Refused(StatusCode::BAD_REQUEST, "no name of this instance".into()).into_response(),
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
