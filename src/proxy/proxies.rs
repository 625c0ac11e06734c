//! Which proxies are in front of the application, and what is believed of the headers in which
//! proxies name the client.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use http::header::{Entry, HeaderMap, HeaderName};

use crate::parse::ParseError;

/// Which proxies there are between clients and this application
/// ([`ReplayLayer::proxies`](crate::ReplayLayer::proxies)).
///
/// A proxy says in `X-Forwarded-For`, `X-Forwarded-Proto` and other `X-Forwarded-*`, in `X-Real-IP`
/// or in `Forwarded` who the client is. A client that reaches the application without it can say
/// the same. So an application that reads these headers should say here who may set them.
///
/// ```
/// use replite::{Db, Proxies, ReplayLayer};
///
/// fn layer(db: &Db) -> Result<ReplayLayer, replite::ParseError> {
///     Ok(db.replay_layer().proxies(Proxies::at(["10.0.0.5", "192.168.7.0/24"])?))
/// }
/// # let _ = layer;
/// assert!(Proxies::at(["balancer.internal"]).is_err());
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Proxies {
    /// It was not said. These headers stay as they came, from proxies and from clients alike.
    ///
    /// Limits for each client go by the last address of `X-Forwarded-For`, if there is one. A
    /// client that reaches the application by itself can make that up.
    #[default]
    Unknown,
    /// There is none. The layer takes these headers out of what comes from outside, also for
    /// handlers that run here.
    None,
    /// Those at these addresses: [`Proxies::at`] makes it. From all others the layer takes these
    /// headers out.
    At(Networks),
}

/// Addresses and networks, for [`Proxies::at`].
///
/// ```
/// use replite::Proxies;
///
/// let proxies = Proxies::at(["10.0.0.5", "192.168.7.0/24"])?;
/// let Proxies::At(networks) = proxies else { panic!() };
/// assert_eq!(networks.to_string(), "10.0.0.5, 192.168.7.0/24");
/// # Ok::<_, replite::ParseError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Networks(Arc<[Subnet]>);

/// The addresses that begin with these bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Subnet {
    address: IpAddr,
    bits: u32,
}

impl Proxies {
    /// Proxies at these IP addresses, or anywhere in these networks (`10.0.0.0/8`). Who a peer is,
    /// the layer takes from axum's `ConnectInfo` (feature `axum`), or from
    /// [`ReplayLayer::client_ip`](crate::ReplayLayer::client_ip). Without either no peer counts as
    /// a proxy.
    ///
    /// # Errors
    /// [`ParseError`] for what is no IP address or network, such as a name, and for a network whose
    /// address has bits beyond its length (`10.0.0.5/8`).
    pub fn at<T: AsRef<str>>(proxies: impl IntoIterator<Item = T>) -> Result<Proxies, ParseError> {
        let networks = proxies.into_iter().map(|text| Subnet::read(text.as_ref()));
        Ok(Proxies::At(Networks(networks.collect::<Result<_, _>>()?)))
    }

    /// What becomes of the headers.
    pub(super) fn words(&self) -> String {
        match self {
            Proxies::Unknown => {
                "stay as they came: ReplayLayer::proxies was not told who may set them".into()
            }
            Proxies::None => "are taken out of each request: there is no proxy".into(),
            Proxies::At(networks) => format!("are taken out of each request but those of {networks}"),
        }
    }

    /// Whether a proxy is known to be there.
    pub(super) fn is_at(&self, ip: IpAddr) -> bool {
        let Proxies::At(Networks(networks)) = self else { return false };
        let ip = ip.to_canonical();
        networks.iter().any(|network| network.has(ip))
    }

    /// Whether what this peer says of a client is kept.
    pub(super) fn believes(&self, peer: Option<IpAddr>) -> bool {
        match self {
            Proxies::Unknown => true,
            Proxies::None => false,
            Proxies::At(_) => peer.is_some_and(|peer| self.is_at(peer)),
        }
    }
}

impl Subnet {
    fn read(text: &str) -> Result<Subnet, ParseError> {
        let network = match text.split_once('/') {
            None => text.parse().ok().map(Subnet::of),
            Some((address, bits)) => Subnet::of_bits(address, bits),
        };
        network.ok_or_else(|| ParseError::new("address or network", text))
    }

    fn of(address: IpAddr) -> Subnet {
        let address = address.to_canonical();
        Subnet { address, bits: if address.is_ipv4() { 32 } else { 128 } }
    }

    fn of_bits(address: &str, bits: &str) -> Option<Subnet> {
        let whole = Subnet::of(address.parse().ok()?);
        let digits = !bits.is_empty() && bits.bytes().all(|byte| byte.is_ascii_digit());
        let bits = bits.parse().ok().filter(|bits| digits && *bits <= whole.bits)?;
        let network = Subnet { bits, ..whole };
        // An IPv4 address in the form of an IPv6 one has another length.
        let same = address.parse() == Ok(whole.address);
        (same && network.beyond(network.address) == 0).then_some(network)
    }

    fn has(&self, ip: IpAddr) -> bool {
        let common = match (self.address, ip) {
            (IpAddr::V4(own), IpAddr::V4(ip)) => (own.to_bits() ^ ip.to_bits()).leading_zeros(),
            (IpAddr::V6(own), IpAddr::V6(ip)) => (own.to_bits() ^ ip.to_bits()).leading_zeros(),
            _ => return false,
        };
        common >= self.bits
    }

    /// The bits of an address that are not the network's.
    fn beyond(&self, ip: IpAddr) -> u128 {
        match ip {
            IpAddr::V4(ip) => u128::from(ip.to_bits().checked_shl(self.bits).unwrap_or(0)),
            IpAddr::V6(ip) => ip.to_bits().checked_shl(self.bits).unwrap_or(0),
        }
    }
}

/// Takes out what only a proxy may say of a client.
pub(super) fn take_told(headers: &mut HeaderMap) -> HeaderMap {
    let told = |name: &HeaderName| {
        name.as_str().starts_with("x-forwarded-") || matches!(name.as_str(), "x-real-ip" | "forwarded")
    };
    let names: Vec<HeaderName> = headers.keys().filter(|name| told(name)).cloned().collect();
    let mut taken = HeaderMap::new();
    for name in names {
        if let Entry::Occupied(entry) = headers.entry(name) {
            let (name, values) = entry.remove_entry_mult();
            for value in values {
                taken.append(&name, value);
            }
        }
    }
    taken
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = Subnet::of(self.address).bits == self.bits;
        if whole { self.address.fmt(f) } else { write!(f, "{}/{}", self.address, self.bits) }
    }
}

impl fmt::Display for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, network) in self.0.iter().enumerate() {
            write!(f, "{}{network}", if n == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_has_what_begins_with_its_bits() {
        let proxies =
            Proxies::at(["10.1.0.0/16", "192.0.2.7", "2001:db8::/33", "::ffff:198.51.100.1"]).unwrap();
        for known in [
            "10.1.0.0",
            "10.1.255.255",
            "::ffff:10.1.2.3",
            "192.0.2.7",
            "2001:db8:7fff::1",
            "198.51.100.1",
            "::ffff:198.51.100.1",
        ] {
            assert!(proxies.is_at(ip(known)), "{known}");
        }
        for other in ["10.2.0.0", "10.0.255.255", "192.0.2.6", "2001:db8:8000::", "::10.1.0.0", "::1"] {
            assert!(!proxies.is_at(ip(other)), "{other}");
        }
        for (all, has, not) in [("0.0.0.0/0", "8.8.8.8", "::1"), ("::/0", "2001:db8::1", "8.8.8.8")] {
            let all = Proxies::at([all]).unwrap();
            assert!(all.is_at(ip(has)) && !all.is_at(ip(not)));
        }
        let Proxies::At(networks) = proxies else { panic!() };
        assert_eq!(networks.to_string(), "10.1.0.0/16, 192.0.2.7, 2001:db8::/33, 198.51.100.1");
        assert_eq!(Proxies::at::<&str>([]).unwrap(), Proxies::At(Networks([].into())));
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in [
            "",
            "proxy",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0.0/-1",
            "10.0.0.0/99999999999",
            "10.0.0.5/8",
            "10.0.0.0/8/8",
            "10.0.0.5:80",
            "2001:db8::1/64",
            "::/129",
            "::ffff:10.0.0.0/104",
            "/8",
        ] {
            let refused = Proxies::at(["10.0.0.1", text]).unwrap_err();
            assert_eq!((refused.what(), refused.text()), ("address or network", text));
        }
    }

    #[test]
    fn who_is_believed_is_as_it_was_said() {
        let at = Proxies::at(["10.0.0.5"]).unwrap();
        let (proxy, other) = (Some(ip("10.0.0.5")), Some(ip("10.0.0.6")));
        for (proxies, of_proxy, of_other, of_unknown) in [
            (Proxies::Unknown, true, true, true),
            (Proxies::None, false, false, false),
            (at, true, false, false),
        ] {
            let believed = [proxy, other, None].map(|peer| proxies.believes(peer));
            assert_eq!(believed, [of_proxy, of_other, of_unknown], "{proxies:?}");
        }
    }
}
