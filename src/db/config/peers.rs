//! Refuses a node that could never replicate with another one, whatever comes later.

use std::net::{IpAddr, SocketAddr};

use crate::channel::Plaintext;
use crate::db::config::Config;
use crate::error::{Error, Result};
use crate::lease::LeaseKind;
use crate::net::Endpoint;

/// What is said of an address like 0.0.0.0.
const NO_DESTINATION: &str = "this address is for listening on all that a machine has, and leads to none";

impl Config {
    /// Checks how this node and others would reach each other. Each URL of them has been read.
    pub(super) fn check_peers(&self) -> Result<()> {
        let addresses = &self.addresses;
        for url in [Some(&addresses.app), Some(&addresses.replication), addresses.public.as_ref()] {
            if let Some(url) = url.filter(|url| host_of(url).is_some_and(|host| is_any(&host))) {
                return Err(Error::Config(format!(
                    "{url:?}: {NO_DESTINATION}: give the address that other nodes have for this one"
                )));
            }
        }
        match &self.lease.0 {
            LeaseKind::Fixed(fixed) => {
                if let Some(url) = fixed.primary_url() {
                    return self.check_primary(&Endpoint::parse(url)?);
                }
            }
            LeaseKind::Store(_) => {}
            #[cfg(feature = "members")]
            LeaseKind::Members(members) => self.check_members(&members.list()?)?,
        }
        let told = self.advertised(self.listen).replication;
        let Some(host) = host_of(&told) else { return Ok(()) };
        self.check_reach(&told, &host)?;
        if !self.has_secret() && self.listen.is_none() {
            return Err(Error::Config(
                "an endpoint that the application mounts lets no node in without a secret: give all nodes \
                 the same `Config::secret`, or this one a listener of its own by `Config::listen`"
                    .into(),
            ));
        }
        if is_any(&host) {
            return Err(Error::Config(
                "`listen` is on all addresses, and other nodes have to know one of them: give this node's by \
                 `Config::advertise`, whose host counts for `listen`, too, or by `Addresses::replication`"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Checks a fixed primary, which this node is to follow.
    fn check_primary(&self, primary: &Endpoint) -> Result<()> {
        if is_any(&primary.host) {
            return Err(Error::Config(format!(
                "the primary's URL {primary}: {NO_DESTINATION}: give the primary's own address"
            )));
        }
        let own = Endpoint::parse(&self.advertised(self.listen).replication).ok();
        if own.as_ref() == Some(primary) || self.listen.is_some_and(|own| is_here(own, primary)) {
            return Err(Error::Config(format!(
                "the primary's URL {primary} is this node's own: give that of another node, or leave \
                 `replica_of` out on the primary"
            )));
        }
        self.check_reach(&primary.to_string(), &primary.host)
    }

    /// Without a secret nodes speak over loopback addresses only. A name may lead to one.
    fn check_reach(&self, url: &str, host: &str) -> Result<()> {
        let is_remote = host.parse().is_ok_and(|ip: IpAddr| !ip.to_canonical().is_loopback());
        if is_remote && !self.has_secret() && self.plaintext == Some(Plaintext::Loopback) {
            return Err(Error::Config(format!(
                "{url:?} is the address of a network, and without a secret `Plaintext::Loopback` does not go \
                 there: give all nodes the same `Config::secret`"
            )));
        }
        Ok(())
    }

    /// Checks those that keep the record of the lease.
    #[cfg(feature = "members")]
    fn check_members(&self, list: &[String]) -> Result<()> {
        let hosts: Vec<String> = list.iter().filter_map(|url| host_of(url)).collect();
        if hosts.iter().any(|host| is_any(host)) {
            return Err(Error::Config(format!(
                "the members {}: {NO_DESTINATION}: give each member's own address",
                list.join(", ")
            )));
        }
        let of_own = host_of(&self.advertised(self.listen).replication);
        let (mut here, mut elsewhere) = (false, false);
        for host in hosts.iter().chain(&of_own).filter(|host| !is_any(host)) {
            if is_loopback(host) {
                here = true;
            } else {
                elsewhere = true;
            }
        }
        if here && elsewhere {
            let own = of_own.unwrap_or_default();
            return Err(Error::Config(format!(
                "the members {} and this node at {own}: a loopback address is reached on its own machine \
                 only: give all by addresses that all reach, or all by loopback ones",
                list.join(", ")
            )));
        }
        Ok(())
    }
}

/// The address that others know a listener by: where it is on all addresses, that has the host of
/// the application's URL.
pub(super) fn known_as(listening: SocketAddr, app: &str) -> String {
    let host = host_of(app).filter(|host| !is_any(host) && listening.ip().is_unspecified());
    match host {
        Some(host) if host.contains(':') => format!("[{host}]:{}", listening.port()),
        Some(host) => format!("{host}:{}", listening.port()),
        None => listening.to_string(),
    }
}

/// The host of a URL, without the brackets of an IPv6 address.
fn host_of(url: &str) -> Option<String> {
    let uri: http::Uri = url.trim().parse().ok()?;
    let host = uri.host()?;
    Some(host.trim_start_matches('[').trim_end_matches(']').to_owned())
}

fn is_any(host: &str) -> bool {
    host.parse().is_ok_and(|ip: IpAddr| ip.to_canonical().is_unspecified())
}

fn is_loopback(host: &str) -> bool {
    match host.parse::<IpAddr>() {
        Ok(ip) => ip.to_canonical().is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

/// Whether the listener itself is at that endpoint.
fn is_here(listener: SocketAddr, endpoint: &Endpoint) -> bool {
    let ip = listener.ip().to_canonical();
    let same = endpoint.host.parse().is_ok_and(|host: IpAddr| host.to_canonical() == ip);
    listener.port() == endpoint.port && (same || ip.is_unspecified() && is_loopback(&endpoint.host))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Fixed;
    use crate::secret::Secret;
    use crate::status::Addresses;

    fn config() -> Config {
        Config::new("a.db").secret(Secret::fixed([7; 32])).plaintext(Plaintext::AnyNetwork)
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[track_caller]
    fn refused(config: Config, why: &str) {
        match config.check() {
            Err(Error::Config(said)) => assert!(said.contains(why), "{said}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_address_that_leads_nowhere_is_told_to_no_one() {
        for any in ["http://0.0.0.0:8080", "http://[::]:8080"] {
            refused(config().advertise(any), "for listening");
            refused(config().lease(Fixed::replica_of(any)), "the primary's own address");
            let replication = Addresses::new("http://a:1").replication(any);
            refused(config().addresses(replication), "for listening");
        }
        for any in ["0.0.0.0:7000", "[::]:7000"] {
            refused(config().listen(at(any)), "by `Config::advertise`");
            let advertised = config().listen(at(any)).advertise("http://10.0.0.1:8080");
            assert!(advertised.check().is_ok());
            let advertised = Config { plaintext: None, ..advertised };
            let known = advertised.advertised(Some(at(any)));
            assert_eq!(known.replication, "replite://10.0.0.1:7000");
            // No node has to reach a replica of a fixed primary.
            let replica = config().lease(Fixed::replica_of("http://10.0.0.1:8080"));
            assert!(replica.listen(at(any)).check().is_ok());
        }
        let six = config().advertise("https://[2001:db8::1]:8443").advertised(Some(at("[::]:7000")));
        assert_eq!(six.replication, "http://[2001:db8::1]:7000/_replite");
        let own = config().advertise("http://10.0.0.1:8080").advertised(Some(at("10.0.0.2:7000")));
        assert_eq!(own.replication, "http://10.0.0.2:7000/_replite");
    }

    #[test]
    fn no_node_follows_itself() {
        let follows = |url: &str| config().lease(Fixed::replica_of(url));
        let own = "is this node's own";
        refused(follows("http://10.0.0.1:8080/").advertise("http://10.0.0.1:8080"), own);
        for listener in ["127.0.0.1:7000", "0.0.0.0:7000"] {
            refused(follows("http://127.0.0.1:7000").listen(at(listener)), own);
        }
        refused(follows("http://10.0.0.1:7000").listen(at("10.0.0.1:7000")), own);
        assert!(follows("http://127.0.0.1:7001").listen(at("127.0.0.1:7000")).check().is_ok());
        assert!(follows("http://10.0.0.1:7000").listen(at("10.0.0.2:7000")).check().is_ok());
    }

    #[test]
    fn another_machine_needs_a_secret() {
        let follows =
            |url: &str| Config::new("a.db").plaintext(Plaintext::Loopback).lease(Fixed::replica_of(url));
        for there in ["http://10.0.0.1:7000", "http://[2001:db8::1]:7000"] {
            refused(follows(there), "the same `Config::secret`");
        }
        for here in ["http://127.0.0.1:7000", "http://[::1]:7000", "http://localhost:7000"] {
            assert!(follows(here).check().is_ok(), "{here}");
        }
    }

    #[test]
    fn a_node_that_others_are_to_reach_has_a_secret() {
        let without = Config::new("a.db").advertise("http://10.0.0.1:8080");
        refused(without.clone(), "need a secret");
        // On one machine a listener of the node's own does without.
        let here = Config::new("a.db").plaintext(Plaintext::Loopback).advertise("http://127.0.0.1:8080");
        refused(here.clone(), "a listener of its own");
        assert!(here.listen(at("127.0.0.1:7000")).check().is_ok());
        assert!(without.secret(Secret::fixed([7; 32])).plaintext(Plaintext::AnyNetwork).check().is_ok());
    }

    #[cfg(feature = "members")]
    #[test]
    fn members_are_all_on_one_machine_or_all_reached_from_others() {
        use crate::lease::Members;
        let of = |urls: [&str; 3], own: &str| {
            let addresses = Addresses::default().replication(own);
            config().lease(Members::new(urls)).addresses(addresses)
        };
        let here = ["http://127.0.0.1:1", "http://localhost:2", "http://[::1]:3"];
        let there = ["http://10.0.0.1:1", "http://db-2.internal:1", "http://10.0.0.3:1"];
        let mixed = ["http://10.0.0.1:1", "http://127.0.0.1:1", "http://10.0.0.3:1"];
        assert!(of(here, "http://127.0.0.1:1").check().is_ok());
        assert!(of(there, "http://10.0.0.1:1").check().is_ok());
        refused(of(mixed, "http://10.0.0.1:1"), "loopback");
        refused(of(there, "http://127.0.0.1:1"), "loopback");
        refused(of(here, "http://10.0.0.1:1"), "loopback");
        let any = ["http://0.0.0.0:1", "http://10.0.0.2:1", "http://10.0.0.3:1"];
        refused(of(any, "http://10.0.0.1:1"), "each member's own address");
        let listens = config().lease(Members::new(there)).listen(at("0.0.0.0:1"));
        refused(listens.clone(), "by `Config::advertise`");
        assert!(listens.advertise("http://10.0.0.1:8080").check().is_ok());
    }
}
