//! Header hygiene: what may come in from outside, and what may go from one hop to the next.

use std::net::IpAddr;

use http::Method;
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, SET_COOKIE, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use hyper::ext::Protocol;

use crate::proxy::hop::ClientScheme;

/// A token, on requests and responses.
pub(crate) const TOKEN: HeaderName = HeaderName::from_static("replite-token");
/// What is known about a request that failed: `not-executed` or `unknown`.
pub(crate) const OUTCOME: HeaderName = HeaderName::from_static("replite-outcome");
/// On responses: the request's token, if its transaction was lost with its branch.
pub(super) const LOST: HeaderName = HeaderName::from_static("replite-lost");
/// The proof that a request comes from another node.
pub(super) const HOP: HeaderName = HeaderName::from_static("replite-hop");
/// In a 421: who the primary is.
pub(super) const PRIMARY: HeaderName = HeaderName::from_static("replite-primary");

pub(super) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// What begins the name of each header that only nodes may send, but for [`TOKEN`].
const RESERVED: &str = "replite-";

/// Headers that are about one connection and never go on (RFC 9110, 7.6.1). `te` is looked at on
/// its own.
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "transfer-encoding",
    "upgrade",
];

/// Cookie headers that are searched for our cookie; browsers send one, HTTP/2 may split it.
const COOKIE_HEADERS_MAX: usize = 64;
/// Cookies of our name, and tokens in headers, that are looked at. A sibling domain may have set
/// some of the cookies; those with the longest path come first.
const TOKENS_MAX: usize = 8;

/// Removes the headers that only nodes may send: no client can pretend to be one.
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
///
/// What `Connection` lists beyond these stays, against RFC 9110: a client must not be able to take
/// a cookie, or what a proxy says of it, from the primary's sight.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(TRANSFER_ENCODING) {
        // Beside it a length counts for nothing; alone it would count, and be wrong.
        headers.remove(CONTENT_LENGTH);
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

/// Which of these protocols the request asks for, such as `websocket`: a GET with an `Upgrade`
/// header, or an extended CONNECT.
///
/// With any other method, and for any other protocol, the header is an offer that need not be taken
/// (RFC 9110, 7.8). Some clients offer with each first request to go on in HTTP/2.
pub(super) fn upgrade<'a>(parts: &'a Parts, protocols: &[String]) -> Option<&'a str> {
    let known = |asked: &&str| {
        let name = asked.split('/').next().unwrap_or_default();
        protocols.iter().any(|protocol| protocol.eq_ignore_ascii_case(name))
    };
    if let Some(protocol) = parts.extensions.get::<Protocol>() {
        return Some(protocol.as_str()).filter(known);
    }
    let asks =
        parts.method == Method::GET && parts.headers.get_all(CONNECTION).iter().any(|v| lists(v, "upgrade"));
    let offers = parts.headers.get_all(UPGRADE).iter().filter_map(|v| v.to_str().ok());
    offers.flat_map(|v| v.split(',')).map(str::trim).filter(|_| asks).find(known)
}

/// Whether the client speaks https, as far as a node or the proxies before it know. `scheme` is
/// that of the request as the client sent it.
pub(super) fn is_https(headers: &HeaderMap, scheme: Option<ClientScheme>) -> bool {
    if scheme == Some(ClientScheme::Https) {
        return true;
    }
    // The first one is what the client spoke; later ones were appended on the way.
    let first = headers.get(FORWARDED_PROTO).and_then(|v| v.to_str().ok());
    first.and_then(|v| v.split(',').next()).is_some_and(|v| v.trim().eq_ignore_ascii_case("https"))
}

/// Adds what the primary's app should know of the client that this node heard.
pub(super) fn add_forwarded(headers: &mut HeaderMap, client: Option<IpAddr>, scheme: Option<ClientScheme>) {
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
    {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static(scheme.as_str()));
    }
    if let Some(host) = headers.get(HOST).cloned()
        && !headers.contains_key(FORWARDED_HOST)
    {
        headers.insert(FORWARDED_HOST, host);
    }
}

/// The values of the first cookies of this name.
pub(super) fn cookies<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(COOKIE).iter().take(COOKIE_HEADERS_MAX);
    values
        // Others' cookies may have bytes that are no text.
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b';'))
        .filter_map(|pair| std::str::from_utf8(pair.trim_ascii()).ok())
        .filter_map(move |pair| pair.strip_prefix(name)?.strip_prefix('='))
        .map(|value| value.trim_matches('"'))
        .take(TOKENS_MAX)
}

/// The first tokens in the headers: one for each database, and each in a header of its own or after
/// a comma.
pub(super) fn tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(TOKEN).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).take(TOKENS_MAX)
}

/// Removes from an answer what only nodes are told, and what is about the connection that it came
/// by. The primary's application may list more headers of that kind.
pub(super) fn strip_answer(headers: &mut HeaderMap) {
    strip_listed(headers);
    strip_hop_by_hop(headers);
    headers.remove(HOP);
    headers.remove(PRIMARY);
}

/// Removes from an answer what it lists as being about the connection.
pub(super) fn strip_listed(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in listed {
        headers.remove(name);
    }
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
    let _ = (upgrade(&parts, &["websocket".into()]), is_https(&parts.headers, None));
    let _ = (cookies(&parts.headers, "replite").count(), tokens(&parts.headers).count());
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
            ("http2-settings", "AA"),
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
        assert_eq!(h, map(&[("x-mine", "1"), ("host", "h"), ("te", "trailers"), ("trailer", "x-sum")]));
    }

    #[test]
    fn a_client_takes_nothing_else_from_sight_and_an_application_does() {
        let kept = [("cookie", "a=1"), ("x-real-ip", "1.1.1.1"), ("authorization", "x"), ("host", "h")];
        let mut h = map(&kept);
        h.append(CONNECTION, HeaderValue::from_static("close, Cookie, x-real-ip"));
        h.append(CONNECTION, HeaderValue::from_static("authorization, host"));
        let mut answer = h.clone();
        strip_hop_by_hop(&mut h);
        assert_eq!(h, map(&kept));
        strip_answer(&mut answer);
        assert!(answer.is_empty(), "{answer:?}");
    }

    #[test]
    fn forwarded_headers_are_appended_and_never_guessed() {
        let mut h = map(&[("host", "a.example"), ("x-forwarded-for", "1.1.1.1")]);
        add_forwarded(&mut h, Some("10.0.0.9".parse().unwrap()), None);
        assert_eq!(h["x-forwarded-for"], "1.1.1.1, 10.0.0.9");
        assert_eq!(h["x-forwarded-host"], "a.example");
        assert!(!h.contains_key("x-forwarded-proto"));
        add_forwarded(&mut h, None, Some(ClientScheme::Https));
        assert_eq!(h["x-forwarded-proto"], "https");
    }

    #[test]
    fn cookies_of_a_name_are_found_among_others() {
        let h = map(&[("cookie", "a=1; replite_ab=yes; replite_a=no"), ("cookie", "z=\"q\"; replite_ab=2")]);
        let all = |name: &'static str| cookies(&h, name).collect::<Vec<_>>();
        assert_eq!(all("replite_ab"), ["yes", "2"]);
        assert_eq!(all("replite_a"), ["no"]);
        assert_eq!(all("z"), ["q"]);
        assert!(all("replite").is_empty());
        let mut foreign = HeaderMap::new();
        foreign.insert(COOKIE, HeaderValue::from_bytes(b"x=\xe9; a=1; y=\xff").unwrap());
        assert_eq!(cookies(&foreign, "a").collect::<Vec<_>>(), ["1"]);
        let many = map(&[("cookie", "a=1; a=2; a=3; a=4; a=5"), ("cookie", "a=6; a=7; a=8; a=9")]);
        assert_eq!(cookies(&many, "a").last(), Some("8"));
        let h = map(&[("replite-token", "a, b"), ("replite-token", "c")]);
        assert_eq!(tokens(&h).collect::<Vec<_>>(), ["a", "b", "c"]);
    }

    #[test]
    fn only_known_protocols_are_upgrades() {
        let known = ["websocket".to_string(), "mine".to_string()];
        let ask = |method: Method, connection: &'static str, offers: &[&'static str]| {
            let mut request = http::Request::new(());
            *request.method_mut() = method;
            *request.headers_mut() = map(&[("connection", connection)]);
            for offer in offers {
                request.headers_mut().append(UPGRADE, HeaderValue::from_static(offer));
            }
            upgrade(&request.into_parts().0, &known).map(str::to_string)
        };
        assert_eq!(ask(Method::GET, "keep-alive, Upgrade", &["WebSocket"]).as_deref(), Some("WebSocket"));
        assert_eq!(ask(Method::GET, "upgrade", &["h2c", "x, mine/2"]).as_deref(), Some("mine/2"));
        for offers in [&["anything"][..], &["h2c"], &["websockets"], &["x/websocket"], &[""], &[]] {
            assert_eq!(ask(Method::GET, "upgrade", offers), None, "{offers:?}");
        }
        assert_eq!(ask(Method::POST, "upgrade", &["websocket"]), None);
        assert_eq!(ask(Method::GET, "close", &["websocket"]), None);
        let mut request = http::Request::new(());
        request.extensions_mut().insert(Protocol::from_static("websocket"));
        assert!(upgrade(&request.into_parts().0, &known).is_some());
    }
}
