//! What a configuration must be like, and what follows from it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::checksum::PageKey;
use crate::db::config::Config;
use crate::db::config::app::is_https;
use crate::db::config::peers::known_as;
use crate::engine::EngineOptions;
use crate::error::{Error, Result};
use crate::files::Paths;
use crate::lease::record::{LEASE_TIMES, STARTERS_MAX, URLS_MAX_BYTES};
use crate::lease::{LeaseKind, Store};
use crate::log::LogOptions;
use crate::net::Endpoint;
use crate::peer::{Incarnation, NodeId};
use crate::status::{Addresses, PeerInfo};
use crate::wire::peer_fits;

/// Longest name of a cluster or a database, in bytes: it travels in a header.
const NAME_MAX_BYTES: usize = 64;
/// Labels of a node, and the bytes of each key and value: they travel in every hello.
const LABELS_MAX: usize = 16;
const LABEL_MAX_BYTES: usize = 64;
/// The least that a log may take up: some segments.
const LOG_QUOTA_MIN_BYTES: u64 = 4 << 20;
/// The shortest WAL that is worth restarting, in bytes.
const WAL_LIMIT_MIN_BYTES: u64 = 64 * 1024;

/// How a node starts.
#[derive(Debug)]
pub(in crate::db) enum Start {
    /// As the fixed primary.
    Primary,
    /// As a replica of the fixed primary.
    Replica(Endpoint),
    /// As what the lease says, which counts so long.
    Lease(ConfiguredStore, Duration),
}

/// Where the lease's record is.
#[derive(Debug)]
pub(in crate::db) enum ConfiguredStore {
    Given(Arc<dyn Store>),
    /// At these members, each URL in its normal form.
    #[cfg(feature = "members")]
    Members(Vec<String>),
}

impl ConfiguredStore {
    fn lease_time(&self) -> Duration {
        match self {
            ConfiguredStore::Given(store) => store.lease_time(),
            #[cfg(feature = "members")]
            ConfiguredStore::Members(_) => crate::lease::LEASE_TIME_OF_MEMBERS,
        }
    }

    /// The least that its lease time can be.
    fn lease_time_min(&self) -> Duration {
        match self {
            ConfiguredStore::Given(_) => *LEASE_TIMES.start(),
            #[cfg(feature = "members")]
            ConfiguredStore::Members(_) => crate::lease::LEASE_TIME_MIN_OF_MEMBERS,
        }
    }
}

impl Config {
    pub(in crate::db) fn database_name(&self) -> Result<String> {
        let file = self.file()?;
        let name = match &self.database {
            Some(name) => name.clone(),
            None => file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default(),
        };
        check_name("database", &name).map_err(|error| match (error, &self.database) {
            (Error::Config(why), None) => Error::Config(format!(
                "{why}: it is the file's name without its extension, as long as `Config::database` gives no \
                 other"
            )),
            (error, _) => error,
        })?;
        Ok(name)
    }

    /// Checks everything that can be checked without touching a file. Returns how the node starts.
    pub(in crate::db) fn check(&self) -> Result<Start> {
        check_name("cluster", &self.cluster)?;
        self.database_name()?;
        self.check_numbers()?;
        self.check_addresses()?;
        self.check_channel()?;
        self.check_peers()?;
        self.check_lease()
    }

    fn check_lease(&self) -> Result<Start> {
        let store = match &self.lease.0 {
            LeaseKind::Fixed(fixed) => {
                let primary = fixed.primary_url().map(Endpoint::parse).transpose()?;
                return Ok(primary.map_or(Start::Primary, Start::Replica));
            }
            LeaseKind::Store(store) => ConfiguredStore::Given(store.clone()),
            #[cfg(feature = "members")]
            LeaseKind::Members(members) => ConfiguredStore::Members(members.list()?),
        };
        let time = self.lease_time.unwrap_or_else(|| store.lease_time());
        let (least, most) = (store.lease_time_min(), *LEASE_TIMES.end());
        if !(least..=most).contains(&time) {
            return Err(Error::Config(format!("lease_time is {time:?}; {least:?} to {most:?} are possible")));
        }
        if self.bootstrap.is_some_and(|nodes| !(1..=STARTERS_MAX).contains(&nodes)) {
            return Err(Error::Config(format!("bootstrap: 1 to {STARTERS_MAX} nodes are possible")));
        }
        let advertised = self.advertised(self.listen);
        let Addresses { replication, app, public, .. } = &advertised;
        let urls = replication.len() + app.len() + public.as_ref().map_or(0, String::len);
        if self.bootstrap.is_some() && urls > URLS_MAX_BYTES {
            return Err(Error::Config(format!(
                "bootstrap: a node has {urls} bytes of URLs; at most {URLS_MAX_BYTES} are possible"
            )));
        }
        if advertised.replication.is_empty() {
            return Err(Error::Config(
                "with a lease, other nodes have to reach this one: say how by `advertise` or `listen`".into(),
            ));
        }
        Ok(Start::Lease(store, time))
    }

    fn check_numbers(&self) -> Result<()> {
        let bounds = [
            ("read_connections", self.read_connections, 1, 1024),
            ("write_queue", self.write_queue, 1, 1 << 20),
            ("statement_cache", self.statement_cache, 0, 4096),
        ];
        for (what, value, least, most) in bounds {
            if !(least..=most).contains(&value) {
                return Err(Error::Config(format!("{what} is {value}; {least} to {most} are possible")));
            }
        }
        if self.verify_every.is_some_and(|period| period.is_zero()) {
            return Err(Error::Config("verify_every needs a period that is not zero".into()));
        }
        if self.wal_limit_bytes < WAL_LIMIT_MIN_BYTES {
            return Err(Error::Config(format!("wal_limit is below {WAL_LIMIT_MIN_BYTES} bytes")));
        }
        if let Some(quota) = self.log_quota
            && quota < self.log_bytes.max(LOG_QUOTA_MIN_BYTES)
        {
            return Err(Error::Config(format!(
                "log_quota is {quota} bytes: less than the log is to retain, or than {LOG_QUOTA_MIN_BYTES}"
            )));
        }
        if let Some(mode) = self.database_mode
            && (mode & !0o666 != 0 || mode & 0o600 != 0o600)
        {
            return Err(Error::Config(format!("database_mode is {mode:o}: 600 to 666 are possible, octal")));
        }
        Ok(())
    }

    fn check_addresses(&self) -> Result<()> {
        let labels = &self.addresses.labels;
        if labels.len() > LABELS_MAX
            || labels.iter().any(|(k, v)| k.len() > LABEL_MAX_BYTES || v.len() > LABEL_MAX_BYTES)
        {
            return Err(Error::Config(format!(
                "at most {LABELS_MAX} labels of at most {LABEL_MAX_BYTES} bytes are possible"
            )));
        }
        if !self.addresses.are_plain() {
            return Err(Error::Config("addresses and labels can't have control characters".into()));
        }
        let told = PeerInfo {
            node: NodeId::NIL,
            incarnation: Incarnation::NIL,
            addresses: self.advertised(self.listen),
        };
        if !peer_fits(&told) {
            return Err(Error::Config("addresses and labels are too long to be told to other nodes".into()));
        }
        let replication = &self.addresses.replication;
        if !replication.is_empty() {
            Endpoint::parse(replication)?;
        }
        self.check_app()?;
        if let Some(public) = &self.addresses.public {
            let uri: http::Uri =
                public.parse().map_err(|_| Error::Config(format!("{public:?} is not a URL")))?;
            if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.query().is_some() {
                return Err(Error::Config(format!("{public:?} is not a URL of a host that clients reach")));
            }
        }
        Ok(())
    }

    /// The addresses to advertise, the missing ones filled in.
    pub(in crate::db) fn advertised(&self, listening: Option<SocketAddr>) -> Addresses {
        let mut addresses = self.addresses.clone();
        addresses.app = addresses.app.trim_end_matches('/').to_string();
        if addresses.replication.is_empty() {
            addresses.replication = match listening {
                Some(address) => {
                    let known = known_as(address, &addresses.app);
                    match self.plaintext {
                        None => format!("replite://{known}"),
                        Some(_) => format!("http://{known}/_replite"),
                    }
                }
                None if addresses.app.is_empty() || is_https(&addresses.app) => String::new(),
                None => format!("{}/_replite", addresses.app),
            };
        }
        addresses
    }

    pub(in crate::db) fn engine_options(&self, paths: Paths, page_key: PageKey) -> EngineOptions {
        let quota_bytes = self.log_quota.unwrap_or(self.log_bytes.saturating_mul(4)).max(LOG_QUOTA_MIN_BYTES);
        let segment_bytes = (self.log_bytes / 8).clamp(1 << 20, 64 << 20);
        EngineOptions {
            paths,
            durability: self.durability,
            wal_limit_bytes: self.wal_limit_bytes,
            log: LogOptions {
                page_key,
                segment_bytes,
                keep_bytes: self.log_bytes,
                keep_age: self.log_age,
                quota_bytes,
                tail_bytes: 8 << 20,
            },
            lost_bytes: self.lost_bytes,
            poll_max: Duration::from_millis(20),
            accept_damaged: self.accept_damaged,
            database_mode: self.database_mode,
            read_mark: Arc::default(),
        }
    }
}

fn check_name(what: &str, name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > NAME_MAX_BYTES || !name.chars().all(plain) {
        return Err(Error::Config(format!(
            "the {what}'s name {name:?} is not 1 to {NAME_MAX_BYTES} letters, digits, '-', '_' or '.'"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::Plaintext;
    use crate::lease::Fixed;
    use crate::secret::Secret;

    fn refused(config: Config) -> bool {
        matches!(config.check(), Err(Error::Config(_)))
    }

    #[test]
    fn contradictions_are_refused_before_anything_is_touched() {
        assert!(matches!(Config::new("a.db").check(), Ok(Start::Primary)));
        assert!(refused(Config::new("a.db").cluster("")));
        assert!(refused(Config::new("a.db").database("two words")));
        assert!(refused(Config::new("a.db").database("x".repeat(65))));
        assert!(refused(Config::new("a.db").read_connections(0)));
        assert!(refused(Config::new("a.db").wal_limit(1)));
        for mode in [0o400, 0o66, 0o700, 0o1600] {
            assert!(refused(Config::new("a.db").database_mode(mode)), "{mode:o}");
        }
        assert!(Config::new("a.db").database_mode(0o640).check().is_ok());
        assert!(refused(Config::new("a.db").verify_every(Duration::ZERO)));
        assert!(Config::new("a.db").lease(Fixed::replica_of("ftp://x")).check().is_err());
        let replica = Config::new("a.db").lease(Fixed::replica_of("http://x:1"));
        assert!(matches!(replica.plaintext(Plaintext::Loopback).check(), Ok(Start::Replica(_))));
        assert!(refused(Config::new("a.db").advertise("replite://a:1")));
        for public in ["", "a.example", "ftp://a", "https://a/?q", "https://a b"] {
            let addresses = Addresses { public: Some(public.into()), ..Addresses::default() };
            assert!(refused(Config::new("a.db").addresses(addresses)), "{public:?}");
        }
    }

    #[test]
    fn as_many_nodes_start_a_cluster_as_its_record_has_room_for() {
        let config = |nodes, urls: usize| {
            let addresses = Addresses::new("http://a:1").replication("http://a:2/_replite");
            let rest = urls - addresses.app.len() - addresses.replication.len();
            let public = format!("http://{:a<1$}", "", rest - "http://".len());
            let store = crate::lease::Directory::new("lease");
            let config = Config::new("a.db").lease(store).plaintext(Plaintext::AnyNetwork);
            config.secret(Secret::fixed([7; 32])).bootstrap(nodes).addresses(addresses.public(public))
        };
        assert!(config(STARTERS_MAX, URLS_MAX_BYTES).check().is_ok());
        assert!(refused(config(STARTERS_MAX + 1, 100)));
        assert!(refused(config(0, 100)));
        assert!(refused(config(1, URLS_MAX_BYTES + 1)));
    }

    #[test]
    fn a_secret_never_shows() {
        let config = Config::new("a.db").secret(Secret::fixed([7; 32]));
        assert!(!format!("{config:?}").contains("horse"));
    }

    #[test]
    fn the_replication_address_follows_from_the_others() {
        let config = Config::new("a.db").advertise("http://10.0.0.1:80/");
        assert_eq!(config.advertised(None).replication, "http://10.0.0.1:80/_replite");
        let own = config.advertised(Some("127.0.0.1:9".parse().unwrap()));
        assert_eq!(
            (own.app.as_str(), own.replication.as_str()),
            ("http://10.0.0.1:80", "replite://127.0.0.1:9")
        );
        let clear = config.plaintext(Plaintext::Loopback).advertised(Some("127.0.0.1:9".parse().unwrap()));
        assert_eq!(clear.replication, "http://127.0.0.1:9/_replite");
    }
}
