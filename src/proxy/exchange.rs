//! What goes to the primary, and what comes back.

use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version};

use crate::proxy::BoxError;
use crate::proxy::body::MadeBody;
use crate::proxy::head::Head;
use crate::proxy::headers::{HOP, PRIMARY, strip_answer};
use crate::proxy::hop::Hint;
use crate::proxy::idle::IdleTimeoutBody;
use crate::proxy::on_line::OnLine;
use crate::proxy::primary_body::PrimaryBody;
use crate::proxy::shared::LayerShared;
use crate::proxy::shares::{Demand, Taken};

/// The request as the primary gets it; `as_proxy` see [`Head::headers`].
pub(super) fn request(
    head: &Head,
    as_proxy: bool,
    app: &str,
    hop: Option<&str>,
) -> Result<Request<()>, BoxError> {
    let mut request = Request::new(());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = join(app, &head.target)?;
    *request.version_mut() = Version::HTTP_11;
    let mut headers: HeaderMap = head.headers(as_proxy);
    if let Some(hop) = hop {
        headers.insert(HOP, HeaderValue::from_str(hop)?);
    }
    if !headers.contains_key(HOST)
        && let Some(authority) = request.uri().authority()
    {
        headers.insert(HOST, HeaderValue::from_str(authority.as_str())?);
    }
    *request.headers_mut() = headers;
    Ok(request)
}

/// An app's URL without its path.
pub(super) fn without_path(app: &str) -> &str {
    let host = app.find("://").map_or(0, |at| at + 3);
    app[host..].find('/').map_or(app, |path| &app[..host + path])
}

/// The app's URL followed by the request's path and query, byte for byte.
fn join(app: &str, target: &str) -> Result<Uri, BoxError> {
    let base: Uri = app.parse()?;
    let mut parts = base.into_parts();
    if parts.authority.is_none() {
        return Err("it names no host".into());
    }
    let prefix = parts.path_and_query.as_ref().map_or("", |p| p.path()).trim_end_matches('/');
    parts.path_and_query = Some(format!("{prefix}{target}").parse()?);
    Ok(Uri::from_parts(parts)?)
}

/// What a node that is not the primary says about it.
pub(super) fn hinted(response: &Response<PrimaryBody>, shared: &LayerShared, hop: &str) -> Option<Hint> {
    if response.status() != StatusCode::MISDIRECTED_REQUEST {
        return None;
    }
    Hint::verify(response.headers().get(PRIMARY)?, &shared.node.keys, hop)
}

/// The primary's response as the client gets it. Until its end it has a place among those that
/// last, or where none is free, the one that it had on its way.
pub(super) fn relay(
    shared: &LayerShared,
    head: &Head,
    mut response: Response<PrimaryBody>,
    place: Taken,
    on_line: Option<OnLine>,
) -> Response<MadeBody> {
    let place = shared.lasting.place(head.client.share, Demand::All).unwrap_or(place);
    let mut until_the_end = Some((place, on_line));
    if let Some(upgrade) = &head.upgrade {
        upgrade.join(&mut response, shared.node.stop.clone(), &mut until_the_end);
    }
    let (mut parts, body) = response.into_parts();
    strip_answer(&mut parts.headers);
    // What the client library notes about the connection is not for the app's other layers.
    parts.extensions = http::Extensions::new();
    let events =
        parts.headers.get(CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"text/event-stream"));
    let idle = (!events).then_some(shared.options.idle_timeout);
    let body = shared.responses.body(IdleTimeoutBody::new(body, idle), until_the_end);
    let body = MadeBody::Primary(body);
    let mut response = Response::from_parts(parts, body);
    if let Some(upgrade) = &head.upgrade {
        upgrade.answer(&mut response);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_is_joined_byte_for_byte() {
        let joined = |app, target| join(app, target).map(|u| u.to_string()).ok();
        let odd = "/a%2Fb/%e4//../x?q=%20+&z";
        assert_eq!(joined("http://h:1", odd), Some(format!("http://h:1{odd}")));
        assert_eq!(joined("http://h:1/", "/a"), Some("http://h:1/a".into()));
        assert_eq!(joined("http://[::1]:1/app/", "/a"), Some("http://[::1]:1/app/a".into()));
        assert_eq!(joined("", "/a"), None);
        assert_eq!(joined("/base", "/a"), None);
        assert_eq!(joined("http://", "/a"), None);
    }
}
