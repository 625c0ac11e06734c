//! A request's head as it goes to the primary.

use std::net::IpAddr;

use http::header::{CONTENT_TYPE, COOKIE, HOST, TE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Version};

use crate::peer::NodeId;
use crate::proxy::dial::Protocol;
use crate::proxy::forwarded::Forwarded;
use crate::proxy::headers;
use crate::proxy::hop::{Came, ClientScheme};
use crate::proxy::origin::{self, Client};
use crate::proxy::shared::Options;
use crate::proxy::tunnel::Upgrade;

/// A request without its body, as it is sent to the primary.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) method: Method,
    /// Path and query, byte for byte.
    pub(super) target: String,
    pub(super) headers: HeaderMap,
    /// Set when the request asks for another protocol, which the primary is to speak.
    pub(super) upgrade: Option<Upgrade>,
    /// What the primary is spoken to in.
    pub(super) protocol: Protocol,
    /// Whether every server on its way reads it alike; else it is not sent on.
    pub(super) definite: bool,
    /// How often it was sent on before, by any node and layer.
    pub(super) came: u8,
    /// Who sent it to the first node.
    pub(super) client: Client,
    /// What the client speaks, where that is known.
    pub(super) scheme: Option<ClientScheme>,
    /// The node that took it from the client, where that is another one.
    pub(super) taken_by: Option<NodeId>,
    /// What is to be appended to `X-Forwarded-For`.
    peer: Option<IpAddr>,
}

impl Head {
    pub(super) fn of(parts: &Parts, options: &Options) -> Head {
        let peer = origin::peer(parts, options).filter(|_| options.client_ip.is_some());
        let mut head = Head {
            method: parts.method.clone(),
            target: target(parts, options),
            headers: parts.headers.clone(),
            upgrade: None,
            protocol: match options.http2 {
                true => Protocol::Http2,
                false if wants_trailers(parts) => Protocol::Http2IfSpoken,
                false => Protocol::Http1,
            },
            definite: is_definite(parts, options),
            came: parts.extensions.get::<Came>().map_or(0, Came::count),
            client: Client::of(parts, options),
            scheme: origin::scheme(parts),
            taken_by: parts.extensions.get::<Forwarded>().map(Forwarded::node),
            peer: peer.map(|peer| peer.ip()),
        };
        headers::strip_hop_by_hop(&mut head.headers);
        // HTTP/2 has the host in the URI. A client that says both is left to the app, which sees
        // the same on every node.
        if !head.headers.contains_key(HOST)
            && let Some(authority) = parts.uri.authority()
            && let Ok(host) = HeaderValue::from_str(authority.as_str())
        {
            head.headers.insert(HOST, host);
        }
        join_cookies(&mut head.headers);
        head
    }

    /// The headers as they are sent on. To an application's address go those of a proxy with them.
    /// The channel of the nodes does without: its hop tells all.
    pub(super) fn headers(&self, as_proxy: bool) -> HeaderMap {
        let mut headers = self.headers.clone();
        if as_proxy {
            headers::add_forwarded(&mut headers, self.peer, self.scheme);
        }
        headers
    }

    /// Whether it is a call of gRPC, which may be a stream of messages with pauses.
    pub(super) fn is_grpc(&self) -> bool {
        self.headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
    }

    /// The head of a request for another protocol.
    fn of_upgrade(parts: &Parts, options: &Options, protocol: &str) -> Head {
        let mut head = Head::of(parts, options);
        head.upgrade = Upgrade::of(parts, protocol);
        if let Some(upgrade) = &head.upgrade {
            head.method = upgrade.method(&head.method);
            // An upgrade is a matter of HTTP/1.1.
            head.protocol = Protocol::Http1;
            upgrade.ask(&mut head.headers);
        }
        head
    }

    /// The head of a client's request, whether or not it asks for another protocol.
    pub(super) fn of_client(parts: &Parts, options: &Options) -> Head {
        match headers::upgrade(parts, &options.protocols) {
            Some(protocol) => Head::of_upgrade(parts, options, protocol),
            None => Head::of(parts, options),
        }
    }
}

/// A client that asks for trailers in HTTP/2, as gRPC does, gets ones that no header announced, and
/// HTTP/1.1 has no place for those. A server that was asked in HTTP/2 mostly speaks it on the
/// primary, too.
fn wants_trailers(parts: &Parts) -> bool {
    parts.version == Version::HTTP_2 && parts.headers.contains_key(TE)
}

/// Whether a request names one resource at one host. Every server on its way then reads it alike.
fn is_definite(parts: &Parts, options: &Options) -> bool {
    parts.headers.get_all(HOST).iter().nth(1).is_none() && target(parts, options).starts_with('/')
}

/// Path and query as they came.
pub(super) fn target(parts: &Parts, options: &Options) -> String {
    let original = options.original_uri.as_ref().and_then(|uri| uri(parts));
    let uri = original.as_ref().unwrap_or(&parts.uri);
    // A URI with a host alone has no path in HTTP/2; in HTTP/1.1 that is the form of CONNECT.
    let none = if uri.scheme().is_some() { "/" } else { "" };
    uri.path_and_query().map_or(none, |target| target.as_str()).to_owned()
}

/// HTTP/2 clients may split cookies over several headers, which HTTP/1.1 has no place for.
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let all: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}
