//! Header hygiene: what may come in from outside, and what may go from one hop to the next.

use std::net::IpAddr;

use http::Method;
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, SET_COOKIE, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::uri::Scheme;

/// A token, on requests and responses.
pub(crate) const TOKEN: HeaderName = HeaderName::from_static("replite-token");
/// What is known about a request that failed: `not-executed` or `unknown`.
pub(crate) const OUTCOME: HeaderName = HeaderName::from_static("replite-outcome");
/// The proof that a request comes from another node.
pub(super) const HOP: HeaderName = HeaderName::from_static("replite-hop");
/// In a 421: who the primary is.
pub(super) const PRIMARY: HeaderName = HeaderName::from_static("replite-primary");

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// What begins the name of each header that only nodes may send, but for [`TOKEN`].
const RESERVED: &str = "replite-";

/// Headers that are about one connection and never go on (RFC 9110, 7.6.1). `te` is looked at on its own.
const HOP_BY_HOP: [&str; 7] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "transfer-encoding",
    "upgrade",
];

/// Cookie headers that are searched for our cookie; browsers send one, HTTP/2 may split it.
const COOKIE_HEADERS_MAX: usize = 64;

/// Removes the headers that only nodes may send, so that no client can pretend to be one.
pub(super) fn strip_reserved(headers: &mut HeaderMap) {
    let reserved = |name: &HeaderName| name.as_str().starts_with(RESERVED) && *name != TOKEN;
    if !headers.keys().any(reserved) {
        return;
    }
    let names: Vec<HeaderName> = headers.keys().filter(|n| reserved(n)).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

/// Removes what is about the connection that the message came by.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(TRANSFER_ENCODING) {
        // Beside it a length counts for nothing; alone it would count, and be wrong.
        headers.remove(CONTENT_LENGTH);
    }
    let listed: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // A client must not be able to take these from the primary's sight.
        .filter(|name| *name != HOST && *name != TE)
        .collect();
    for name in listed {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    let trailers = headers.get_all(TE).iter().any(|te| lists(te, "trailers"));
    headers.remove(TE);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Whether a comma-separated header value lists the word.
fn lists(value: &HeaderValue, word: &str) -> bool {
    value.to_str().is_ok_and(|v| v.split(',').any(|item| item.trim().eq_ignore_ascii_case(word)))
}

/// Whether the request asks for another protocol, such as a WebSocket: a GET with an `Upgrade` header, or an extended CONNECT. With any
/// other method the header is an offer that need not be taken, and so is the one to go on in HTTP/2, which some
/// clients make with each first request.
pub(super) fn is_upgrade(parts: &Parts) -> bool {
    let other = |v: &HeaderValue| !v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"h2c");
    let by_header = parts.method == Method::GET
        && parts.headers.get_all(UPGRADE).iter().any(other)
        && parts.headers.get_all(CONNECTION).iter().any(|v| lists(v, "upgrade"));
    by_header || parts.extensions.get::<hyper::ext::Protocol>().is_some()
}

/// Whether the client speaks https, as far as this node or the proxies before it know.
pub(super) fn is_https(parts: &Parts) -> bool {
    if parts.uri.scheme() == Some(&Scheme::HTTPS) {
        return true;
    }
    // The first one is what the client spoke; later ones were appended on the way.
    let first = parts.headers.get(FORWARDED_PROTO).and_then(|v| v.to_str().ok());
    first.and_then(|v| v.split(',').next()).is_some_and(|v| v.trim().eq_ignore_ascii_case("https"))
}

/// Adds what the primary's app should know of the client that this node heard.
pub(super) fn add_forwarded(headers: &mut HeaderMap, client: Option<IpAddr>, scheme: Option<&Scheme>) {
    if let Some(ip) = client {
        let before = headers.get_all(FORWARDED_FOR).iter().filter_map(|v| v.to_str().ok());
        let mut list = before.collect::<Vec<_>>().join(", ");
        if !list.is_empty() {
            list.push_str(", ");
        }
        list.push_str(&ip.to_string());
        if let Ok(value) = HeaderValue::try_from(list) {
            headers.insert(FORWARDED_FOR, value);
        }
    }
    // A guess would be worse than nothing: an app that redirects http to https would loop.
    if let Some(scheme) = scheme
        && !headers.contains_key(FORWARDED_PROTO)
        && let Ok(value) = HeaderValue::from_str(scheme.as_str())
    {
        headers.insert(FORWARDED_PROTO, value);
    }
    if let Some(host) = headers.get(HOST).cloned()
        && !headers.contains_key(FORWARDED_HOST)
    {
        headers.insert(FORWARDED_HOST, host);
    }
}

/// The value of the first cookie of this name.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let values = headers.get_all(COOKIE).iter().take(COOKIE_HEADERS_MAX);
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .find_map(|pair| pair.trim_start().strip_prefix(name)?.strip_prefix('='))
        .map(|value| value.trim_end().trim_matches('"'))
}

/// Removes from an answer what only nodes are told.
pub(super) fn strip_answer(headers: &mut HeaderMap) {
    strip_hop_by_hop(headers);
    headers.remove(HOP);
    headers.remove(PRIMARY);
}

/// Adds a cookie beside those that the app sets.
pub(super) fn add_cookie(headers: &mut HeaderMap, cookie: HeaderValue) {
    headers.append(SET_COOKIE, cookie);
}

/// All that reads a client's headers.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_headers(headers: HeaderMap) {
    let mut request = http::Request::new(());
    *request.headers_mut() = headers;
    let (mut parts, ()) = request.into_parts();
    let _ = (is_upgrade(&parts), is_https(&parts), cookie(&parts.headers, "replite"));
    add_forwarded(&mut parts.headers, Some(IpAddr::from([10, 0, 0, 1])), None);
    strip_reserved(&mut parts.headers);
    strip_hop_by_hop(&mut parts.headers);
    strip_answer(&mut parts.headers);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn only_the_token_comes_in_from_outside() {
        let mut h =
            map(&[("replite-hop", "x"), ("replite-token", "t"), ("Replite-Outcome", "y"), ("a", "b")]);
        strip_reserved(&mut h);
        assert_eq!(h, map(&[("replite-token", "t"), ("a", "b")]));
    }

    #[test]
    fn what_is_about_one_connection_stays_there() {
        let mut h = map(&[
            ("connection", "close, X-Mine"),
            ("connection", "host, upgrade"),
            ("x-mine", "1"),
            ("host", "h"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "7"),
            ("keep-alive", "timeout=5"),
            ("upgrade", "websocket"),
            ("proxy-authorization", "x"),
            ("trailer", "x-sum"),
        ]);
        strip_hop_by_hop(&mut h);
        assert_eq!(h, map(&[("host", "h"), ("te", "trailers"), ("trailer", "x-sum")]));
    }

    #[test]
    fn forwarded_headers_are_appended_and_never_guessed() {
        let mut h = map(&[("host", "a.example"), ("x-forwarded-for", "1.1.1.1")]);
        add_forwarded(&mut h, Some("10.0.0.9".parse().unwrap()), None);
        assert_eq!(h["x-forwarded-for"], "1.1.1.1, 10.0.0.9");
        assert_eq!(h["x-forwarded-host"], "a.example");
        assert!(!h.contains_key("x-forwarded-proto"));
        add_forwarded(&mut h, None, Some(&Scheme::HTTPS));
        assert_eq!(h["x-forwarded-proto"], "https");
    }

    #[test]
    fn one_cookie_is_found_among_others() {
        let h = map(&[("cookie", "a=1; replite_ab=yes; replite_a=no"), ("cookie", "z=\"q\"")]);
        assert_eq!(cookie(&h, "replite_ab"), Some("yes"));
        assert_eq!(cookie(&h, "replite_a"), Some("no"));
        assert_eq!(cookie(&h, "z"), Some("q"));
        assert_eq!(cookie(&h, "replite"), None);
    }
}
