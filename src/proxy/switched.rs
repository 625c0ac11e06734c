//! Requests for another protocol, such as WebSockets, on the private channel. There they are an
//! extended CONNECT of HTTP/2 (RFC 8441), and a GET that asks for an upgrade at both ends.
//!
//! In HTTP/2 each success switches. So a response that does not switch, and is a success all the
//! same, goes as a failure with its status in a header.

use http::header::{CONNECTION, CONTENT_LENGTH, UPGRADE};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::ext::Protocol;

use crate::proxy::connect::SendError;

/// The status of a response that did not switch.
const STATUS: HeaderName = HeaderName::from_static("replite-status");

/// Makes a GET that asks for an upgrade what goes on the channel.
///
/// # Errors
/// It has a body, which no such request has, or a protocol that is no name.
pub(super) fn ask<B>(request: &mut Request<B>) -> Result<(), SendError> {
    let headers = request.headers_mut();
    headers.remove(CONNECTION);
    let empty = headers.remove(CONTENT_LENGTH).is_none_or(|length| length == "0");
    let protocol = headers.remove(UPGRADE).filter(|_| empty);
    let protocol = protocol.as_ref().and_then(|name| name.to_str().ok()).ok_or(SendError::BadHost)?;
    let protocol = h2::ext::Protocol::from(protocol);
    *request.method_mut() = Method::CONNECT;
    request.extensions_mut().insert(protocol);
    Ok(())
}

/// Makes a request that came on the channel one that asks for an upgrade again, where it does.
pub(super) fn asked(parts: &mut Parts) -> bool {
    let Some(protocol) = parts.extensions.remove::<Protocol>() else { return false };
    let Ok(protocol) = HeaderValue::from_str(protocol.as_str()) else { return false };
    parts.method = Method::GET;
    parts.version = Version::HTTP_11;
    parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    parts.headers.insert(UPGRADE, protocol);
    true
}

/// Makes the response to such a request what goes on the channel.
pub(super) fn answer<B>(response: &mut Response<B>) {
    let status = response.status();
    response.headers_mut().remove(STATUS);
    if status == StatusCode::SWITCHING_PROTOCOLS {
        *response.status_mut() = StatusCode::OK;
    } else if status.is_success() {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response.headers_mut().insert(STATUS, status.as_u16().into());
    }
}

/// Makes it what it was.
pub(super) fn answered<B>(response: &mut Response<B>) {
    let said = response.headers_mut().remove(STATUS);
    if response.status() == StatusCode::OK {
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    } else if let Some(status) = said.and_then(|said| StatusCode::from_bytes(said.as_bytes()).ok()) {
        *response.status_mut() = status;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_and_its_response_come_out_as_they_went_in() {
        let mut request = Request::get("http://a/chat").body(()).unwrap();
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(UPGRADE, HeaderValue::from_static("websocket"));
        let before = request.headers().clone();
        request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        ask(&mut request).unwrap();
        assert_eq!(request.method(), Method::CONNECT);
        assert!(request.headers().is_empty());
        let (mut parts, ()) = request.into_parts();
        // As the server's library gives it.
        let protocol: h2::ext::Protocol = parts.extensions.remove().unwrap();
        parts.extensions.insert(Protocol::from(protocol.as_str()));
        assert!(asked(&mut parts));
        assert_eq!((parts.method, parts.headers), (Method::GET, before));
        for status in [101, 200, 204, 299, 302, 400, 404, 426, 500] {
            let mut response = Response::builder().status(status).body(()).unwrap();
            answer(&mut response);
            assert_eq!(response.status() == StatusCode::OK, status == 101, "{status}");
            answered(&mut response);
            assert_eq!(response.status().as_u16(), status);
            assert!(response.headers().is_empty());
        }
    }
}
