//! Upgraded connections, such as WebSockets, that go through this node to the primary.

use http::header::{CONNECTION, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use hyper::ext::Protocol;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::net::ByteStream;
use crate::proxy::BoxError;
use crate::proxy::primary_body::{PrimaryBody, PrimaryEnd};

const SEC_WEBSOCKET_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const SEC_WEBSOCKET_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");

/// A request for another protocol.
#[derive(Clone, Debug)]
pub(super) struct Upgrade {
    /// The client's end.
    client: OnUpgrade,
    protocol: HeaderValue,
    /// Asked for by an extended CONNECT of HTTP/2 (RFC 8441), and not by an `Upgrade` header.
    extended: bool,
}

impl Upgrade {
    /// The upgrade to this protocol that a request asks for; none where the server can't do it.
    pub(super) fn of(parts: &Parts, protocol: &str) -> Option<Upgrade> {
        let client = parts.extensions.get::<OnUpgrade>()?.clone();
        let protocol = HeaderValue::from_str(protocol).ok()?;
        Some(Upgrade { client, protocol, extended: parts.extensions.get::<Protocol>().is_some() })
    }

    /// The method by which the primary is asked: over HTTP/1.1 an extended CONNECT is a GET.
    pub(super) fn method(&self, method: &Method) -> Method {
        if self.extended { Method::GET } else { method.clone() }
    }

    /// Sets on the request to the primary what was taken from it as being about one connection.
    pub(super) fn ask(&self, headers: &mut HeaderMap) {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, self.protocol.clone());
        if self.extended && self.protocol == "websocket" {
            headers.insert(SEC_WEBSOCKET_KEY, key());
        }
    }

    /// Joins the two connections, if the primary switched, for as long as both stand and the node
    /// runs. The response's head is made one for the client.
    ///
    /// `until_the_end` is what has to last as long; it is taken then.
    pub(super) fn join<K: Send + 'static>(
        &self,
        response: &mut Response<PrimaryBody>,
        stop: CancellationToken,
        until_the_end: &mut Option<K>,
    ) {
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return;
        }
        let client = self.client.clone();
        let Some(primary) = PrimaryBody::switch(response) else { return };
        let kept = until_the_end.take();
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            let _until_the_end = kept;
            if let Err(error) = carry(client, primary).await {
                tracing::debug!(%error, "a tunnel to the primary broke");
            }
        }));
    }

    /// Sets on the client's response what was taken from it as being about one connection.
    pub(super) fn answer<B>(&self, response: &mut Response<B>) {
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return;
        }
        if self.extended {
            *response.status_mut() = StatusCode::OK;
            response.headers_mut().remove(SEC_WEBSOCKET_ACCEPT);
        } else {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
            response.headers_mut().insert(UPGRADE, self.protocol.clone());
        }
    }
}

async fn carry(client: OnUpgrade, primary: PrimaryEnd) -> Result<(), BoxError> {
    let mut primary: Box<dyn ByteStream> = match primary {
        PrimaryEnd::Network(primary) => Box::new(TokioIo::new(primary.await?)),
        PrimaryEnd::Channel(primary) => Box::new(primary),
    };
    let mut client = TokioIo::new(client.await?);
    tokio::io::copy_bidirectional(&mut client, &mut primary).await?;
    Ok(())
}

/// A WebSocket key: the base64 form of 16 bytes. HTTP/2 has none, HTTP/1.1 wants one. Hexadecimal
/// digits are base64 digits, too, and `w` ends with the four zero bits that the last digit needs.
fn key() -> HeaderValue {
    let digits = Uuid::new_v4().simple().to_string();
    HeaderValue::try_from(format!("{}w==", &digits[..21])).unwrap_or(HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_canonical_base64_of_sixteen_bytes() {
        let key = key();
        let (digits, padding) = key.to_str().unwrap().split_at(22);
        assert_eq!(padding, "==");
        assert!(digits.ends_with('w') && digits.bytes().all(|b| b.is_ascii_alphanumeric()));
    }
}
