//! Where a request comes from: its client, and the key by which a client is counted.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use http::HeaderMap;
use http::request::Parts;

use crate::proxy::forwarded::{self, Forwarded};
use crate::proxy::headers::FORWARDED_FOR;
use crate::proxy::hop::{Came, ClientScheme};
use crate::proxy::proxies::{Proxies, take_told};
use crate::proxy::shared::Options;

/// Addresses of `X-Forwarded-For` that are looked at, from the last one on.
const ADDRESSES_MAX: usize = 32;
/// The bits of an IPv6 address that a provider mostly gives to one customer.
const IPV6_NETWORK_BITS: u32 = 64;

/// The client of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Client {
    /// The address of its connection to the node that took the request; with port 0 where only the
    /// IP address is known.
    pub(super) address: Option<SocketAddr>,
    /// What it is counted by. None where nothing is known.
    pub(super) share: Option<IpAddr>,
}

impl Client {
    pub(super) fn of(parts: &Parts, options: &Options) -> Client {
        let peer = peer(parts, options);
        // What only seems to come from a node may do so: then the peer is not the client.
        let is_client = |peer: &SocketAddr| !is_unproved(parts) || options.proxies.is_at(peer.ip());
        let share = share(peer.map(|peer| peer.ip()), &parts.headers, &options.proxies);
        Client { address: peer.filter(is_client), share }
    }
}

/// Who sent the request to this node, as the outermost layer found it; or to the node that took it,
/// where it came from another one by a hop that is proved.
pub(super) fn peer(parts: &Parts, options: &Options) -> Option<SocketAddr> {
    if let Some(forwarded) = parts.extensions.get::<Forwarded>() {
        return forwarded.client();
    }
    if let Some(came) = parts.extensions.get::<Came>() {
        return came.peer;
    }
    connected(parts, options)
}

/// The peer of the request's connection.
pub(super) fn connected(parts: &Parts, options: &Options) -> Option<SocketAddr> {
    let connected = forwarded::peer(parts);
    let Some(client_ip) = &options.client_ip else { return connected };
    let ip = client_ip(parts)?;
    connected.filter(|peer| peer.ip() == ip).or(Some(SocketAddr::new(ip, 0)))
}

/// What the client speaks, as far as requests say so.
pub(super) fn scheme(parts: &Parts) -> Option<ClientScheme> {
    match parts.extensions.get::<Forwarded>() {
        Some(forwarded) => forwarded.client_scheme(),
        // What another node speaks that sent the request here tells nothing of its client.
        None if is_unproved(parts) => None,
        None => parts.uri.scheme().and_then(ClientScheme::of),
    }
}

/// Takes out of a request that comes from outside what its peer can't know. Without effect on one
/// that came by a hop that is proved.
pub(super) fn clean(parts: &mut Parts, options: &Options) {
    if parts.extensions.get::<Forwarded>().is_some() {
        return;
    }
    let peer = peer(parts, options).map(|peer| peer.ip());
    if !options.proxies.believes(peer) {
        let told = take_told(&mut parts.headers);
        if let Some(came) = parts.extensions.get_mut::<Came>() {
            came.told.extend(told);
        }
    }
    // It may be from a follower, from the layer of another database, or from a node with another
    // secret. Then the peer is a node, with an address that an application may trust, and no
    // client.
    if is_unproved(parts) && !peer.is_some_and(|peer| options.proxies.is_at(peer)) {
        forwarded::forget(parts);
    }
}

/// The request has a hop that no layer so far could prove.
fn is_unproved(parts: &Parts) -> bool {
    parts.extensions.get::<Came>().is_some() && parts.extensions.get::<Forwarded>().is_none()
}

/// The peer, or the client that a proxy names: the last address of `X-Forwarded-For` that is no
/// proxy's.
fn share(peer: Option<IpAddr>, headers: &HeaderMap, proxies: &Proxies) -> Option<IpAddr> {
    let mut share = peer.map(|peer| peer.to_canonical());
    if proxies.believes(peer) {
        let values = headers.get_all(FORWARDED_FOR).iter().rev();
        // One that is no text ends the list like an address that is none.
        let listed = values.flat_map(|value| value.to_str().unwrap_or_default().rsplit(','));
        for address in listed.take(ADDRESSES_MAX).map_while(address) {
            share = Some(address);
            if !proxies.is_at(address) && Some(address) != peer {
                break;
            }
        }
    }
    share.map(network)
}

/// One of a list: an IP address, with a port or without.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let ip = text.parse().ok().or_else(|| text.parse().ok().map(|address: SocketAddr| address.ip()));
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    ip.or_else(bracketed).map(|ip: IpAddr| ip.to_canonical())
}

/// A client with one IPv6 address mostly has a whole network of them.
fn network(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << IPV6_NETWORK_BITS)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn share_of(peer: &str, lists: &[&'static str], proxies: &Proxies) -> Option<String> {
        let mut headers = HeaderMap::new();
        for list in lists {
            headers.append(FORWARDED_FOR, HeaderValue::from_bytes(list.as_bytes()).unwrap());
        }
        share(peer.parse().ok(), &headers, proxies).map(|share| share.to_string())
    }

    #[test]
    fn a_client_is_counted_by_the_last_address_that_is_no_proxys() {
        let two = Proxies::at(["10.0.0.0/24", "2001:db8:1::5"]).unwrap();
        let (unknown, none) = (Proxies::Unknown, Proxies::None);
        for (peer, lists, proxies, share) in [
            ("203.0.113.9", &[][..], &unknown, "203.0.113.9"),
            ("203.0.113.9", &["1.1.1.1"], &none, "203.0.113.9"),
            ("203.0.113.9", &["1.1.1.1"], &two, "203.0.113.9"),
            ("10.0.0.7", &["1.1.1.1, 2.2.2.2"], &unknown, "2.2.2.2"),
            ("10.0.0.7", &["1.1.1.1, 2.2.2.2"], &two, "2.2.2.2"),
            ("10.0.0.7", &["1.1.1.1", "2.2.2.2,10.0.0.9"], &two, "2.2.2.2"),
            ("10.0.0.7", &["1.1.1.1, 10.0.0.7"], &unknown, "1.1.1.1"),
            ("10.0.0.7", &["10.0.0.8, 10.0.0.9"], &two, "10.0.0.8"),
            ("10.0.0.7", &["1.1.1.1, unknown, 10.0.0.9"], &two, "10.0.0.9"),
            ("10.0.0.7", &["1.1.1.1, unknown"], &unknown, "10.0.0.7"),
            ("10.0.0.7", &["1.1.1.1", ""], &two, "10.0.0.7"),
            ("10.0.0.7", &["1.1.1.1", "é"], &unknown, "10.0.0.7"),
            ("10.0.0.7", &["1.1.1.1:4711"], &two, "1.1.1.1"),
            ("::ffff:10.0.0.7", &["::ffff:1.1.1.1"], &two, "1.1.1.1"),
            ("2001:db8:1::5", &["[2001:db8:7:8:9:a:b:c]:99"], &two, "2001:db8:7:8::"),
            ("2001:db8:1::5", &["[2001:db8:7:8::1]"], &two, "2001:db8:7:8::"),
            ("2001:db8:1:2:3:4:5:6", &["1.1.1.1"], &none, "2001:db8:1:2::"),
            ("", &["1.1.1.1"], &unknown, "1.1.1.1"),
        ] {
            assert_eq!(
                share_of(peer, lists, proxies).as_deref(),
                Some(share),
                "{peer} {lists:?} {proxies:?}"
            );
        }
        for proxies in [&two, &none] {
            assert_eq!(share_of("", &["1.1.1.1"], proxies), None);
        }
        assert_eq!(share_of("", &[], &unknown), None);
    }

    #[test]
    fn of_a_long_list_only_the_end_is_looked_at() {
        let proxies = Proxies::at(["10.0.0.0/8"]).unwrap();
        let list: &'static str = format!("1.1.1.1{}", ", 10.0.0.9".repeat(ADDRESSES_MAX)).leak();
        assert_eq!(share_of("10.0.0.7", &[list], &proxies).as_deref(), Some("10.0.0.9"));
    }
}
