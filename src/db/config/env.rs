//! A configuration as the environment says it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use crate::channel::{Certificates, Plaintext};
use crate::db::config::Config;
use crate::engine::Durability;
use crate::error::{Error, Result};
use crate::lease::{Fixed, Lease};
use crate::secret::Secret;

/// What is wrong with a value, in words.
type Problem = String;
/// Takes one value over.
type Take = fn(&mut Config, &str) -> Result<(), Problem>;
/// The values that are set, by their names without the prefix.
type Values = BTreeMap<&'static str, String>;

/// Variables that say something together with others.
const TOGETHER: [&str; 7] = ["PATH", "LEASE", "REPLICA_OF", "TLS_CHAIN", "TLS_KEY", "TLS_ROOTS", "TLS_NAMES"];

/// What a listener's address is.
const AN_ADDRESS: &str = "an IP address and a port, such as 10.0.0.1:7000";
/// What is said when one of them is missing.
const TLS_TOGETHER: &str = "it is not set, and TLS_CHAIN, TLS_KEY, TLS_ROOTS and TLS_NAMES go together";

/// All others, and what each changes.
const ALONE: [(&str, Take); 35] = [
    ("DATABASE", |c, v| set(&mut c.database, Ok(Some(v.into())))),
    ("CLUSTER", |c, v| set(&mut c.cluster, Ok(v.into()))),
    ("SECRET", |c, v| set(&mut c.secrets, secrets(v))),
    ("SECRET_FILE", |c, v| set(&mut c.secret_file, Ok(Some(v.into())))),
    ("FOLLOWER_SECRET", |c, v| set(&mut c.follower_secrets, secrets(v))),
    ("LISTEN", |c, v| set(&mut c.listen, read(v, AN_ADDRESS).map(Some))),
    ("ADVERTISE", |c, v| set(&mut c.addresses.app, Ok(v.into()))),
    ("ADVERTISE_REPLICATION", |c, v| set(&mut c.addresses.replication, Ok(v.into()))),
    ("ADVERTISE_PUBLIC", |c, v| set(&mut c.addresses.public, Ok(Some(v.into())))),
    ("LABELS", |c, v| set(&mut c.addresses.labels, labels(v))),
    ("APP_ROOTS", |c, v| set(&mut c.app_roots, Ok(Some(v.into())))),
    ("PLAINTEXT", |c, v| set(&mut c.plaintext, plaintext(v).map(Some))),
    ("LEASE_TIME", |c, v| set(&mut c.lease_time, time(v).map(Some))),
    ("FAILOVER_LOSS", |c, v| set(&mut c.failover_loss, time(v))),
    ("DRAIN_LIMIT", |c, v| time(v).map(|limit| *c = c.clone().drain_limit(limit))),
    ("CANDIDATE", |c, v| set(&mut c.candidate, yes(v))),
    ("BOOTSTRAP", |c, v| set(&mut c.bootstrap, number(v).map(Some))),
    ("DURABILITY", |c, v| set(&mut c.durability, durability(v))),
    ("DATABASE_MODE", |c, v| set(&mut c.database_mode, octal(v).map(Some))),
    ("WAL_LIMIT", |c, v| set(&mut c.wal_limit_bytes, bytes(v))),
    ("LOG_BYTES", |c, v| set(&mut c.log_bytes, bytes(v))),
    ("LOG_AGE", |c, v| set(&mut c.log_age, time(v))),
    ("LOG_QUOTA", |c, v| set(&mut c.log_quota, bytes(v).map(Some))),
    ("LOST_QUOTA", |c, v| set(&mut c.lost_bytes, bytes(v))),
    ("READ_CONNECTIONS", |c, v| set(&mut c.read_connections, number(v))),
    ("READ_TIMEOUT", |c, v| set(&mut c.read_timeout, time(v))),
    ("WAIT_TIMEOUT", |c, v| set(&mut c.wait_timeout, time(v))),
    ("WRITE_QUEUE", |c, v| set(&mut c.write_queue, number(v))),
    ("GRACE", |c, v| set(&mut c.grace, time(v))),
    ("COMPRESSION", |c, v| set(&mut c.compression, yes(v))),
    ("VERIFY_EVERY", |c, v| set(&mut c.verify_every, time(v).map(Some))),
    ("VERIFY_LIMIT", |c, v| set(&mut c.verify_limit, bytes(v).and_then(not_zero).map(Some))),
    ("RECOVERY_TIMEOUT", |c, v| set(&mut c.recovery_timeout, time(v))),
    ("ALLOW_NETWORK_FILESYSTEM", |c, v| set(&mut c.allow_network_filesystem, yes(v))),
    ("ACCEPT_DAMAGED", |c, v| set(&mut c.accept_damaged, yes(v))),
];

impl Config {
    /// What the environment says: all that changes from one deployment to another. The rest stays
    /// in the code, such as [`Config::migrate`]. The methods of `Config` say what each means, and
    /// what counts where a variable is not set. One that is empty counts as not set.
    ///
    /// ```no_run
    /// # async fn example() -> replite::Result<()> {
    /// use replite::{Config, Db};
    ///
    /// let config = Config::from_env("REPLITE_")?
    ///     .migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"));
    /// let db = Db::open(config).await?;
    /// # db.shutdown().await;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// | after the prefix | value | method |
    /// |---|---|---|
    /// | `PATH`, the only one that has to be there | `data/app.db` | [`Config::new`] |
    /// | `DATABASE` | its name in the cluster | [`Config::database`] |
    /// | `CLUSTER` | a name | [`Config::cluster`] |
    /// | `SECRET` | a secret; several with commas, the newest first | [`Config::secrets`] |
    /// | `SECRET_FILE` | the path of a file with the secret | [`Config::secret_file`] |
    /// | `FOLLOWER_SECRET` | as for `SECRET` | [`Config::follower_secrets`] |
    /// | `LISTEN` | `10.0.0.1:7000` | [`Config::listen`] |
    /// | `ADVERTISE` | `http://10.0.0.1:8080` | [`Config::advertise`] |
    /// | `ADVERTISE_REPLICATION` | `replite://10.0.0.1:7000` | [`Addresses::replication`] |
    /// | `ADVERTISE_PUBLIC` | `https://one.example` | [`Addresses::public`] |
    /// | `LABELS` | `region=eu,zone=a` | [`Addresses::label`] |
    /// | `APP_ROOTS` | the path of a file | [`Config::app_roots`] |
    /// | `REPLICA_OF` | the URL of the fixed primary | [`Fixed::replica_of`] |
    /// | `LEASE` | `members:URL,URL,URL`, or another text of a [`Lease`] | [`Config::lease`] |
    /// | `LEASE_TIME` | a time | [`Config::lease_time`] |
    /// | `FAILOVER_LOSS` | a time | [`Config::failover_loss`] |
    /// | `DRAIN_LIMIT` | a time | [`Config::drain_limit`] |
    /// | `CANDIDATE` | `true`, `false` | [`Config::candidate`] |
    /// | `BOOTSTRAP` | a number | [`Config::bootstrap`] |
    /// | `DURABILITY` | `synced`, `unsynced` | [`Config::durability`] |
    /// | `DATABASE_MODE` | `640`, octal | [`Config::database_mode`] |
    /// | `WAL_LIMIT` | bytes | [`Config::wal_limit`] |
    /// | `LOG_BYTES` | bytes | [`Config::log_retention`] |
    /// | `LOG_AGE` | a time | [`Config::log_retention`] |
    /// | `LOG_QUOTA` | bytes | [`Config::log_quota`] |
    /// | `LOST_QUOTA` | bytes | [`Config::lost_quota`] |
    /// | `READ_CONNECTIONS` | a number | [`Config::read_connections`] |
    /// | `READ_TIMEOUT` | a time | [`Config::read_timeout`] |
    /// | `WAIT_TIMEOUT` | a time | [`Config::wait_timeout`] |
    /// | `WRITE_QUEUE` | a number | [`Config::write_queue`] |
    /// | `GRACE` | a time | [`Config::grace`] |
    /// | `COMPRESSION` | `true`, `false` | [`Config::compression`] |
    /// | `VERIFY_EVERY` | a time | [`Config::verify_every`] |
    /// | `VERIFY_LIMIT` | bytes, in a second | [`Config::verify_limit`] |
    /// | `RECOVERY_TIMEOUT` | a time | [`Config::recovery_timeout`] |
    /// | `TLS_CHAIN`, `TLS_KEY`, `TLS_ROOTS` | paths of files, all three | [`Config::tls`] |
    /// | `TLS_NAMES` | names with commas | [`Certificates::names`] |
    /// | `PLAINTEXT` | `loopback`, `any-network` | [`Config::plaintext`] |
    /// | `ALLOW_NETWORK_FILESYSTEM` | `true`, `false` | [`Config::allow_network_filesystem`] |
    /// | `ACCEPT_DAMAGED` | `true`, `false` | [`Config::accept_damaged`] |
    ///
    /// A time has a unit: `500ms`, `5s`, `10m`, `24h`, `7d`. Bytes may have one: `4096`, `64KiB`,
    /// `4MiB`, `1GiB`. Without `LEASE` and `REPLICA_OF` the node is the fixed primary.
    ///
    /// # Errors
    /// [`Error::Environment`] for a value that can't be read, and for a name that begins with the
    /// prefix and is none of these: it may be misspelt. An application that has variables of its
    /// own under that prefix takes another one. No error repeats a secret or the text of a lease.
    /// [`Error::Config`] for an empty prefix.
    ///
    /// [`Addresses::replication`]: crate::Addresses::replication
    /// [`Addresses::public`]: crate::Addresses::public
    /// [`Addresses::label`]: crate::Addresses::label
    pub fn from_env(prefix: &str) -> Result<Config> {
        from_variables(prefix, std::env::vars_os())
    }
}

fn from_variables(prefix: &str, all: impl Iterator<Item = (OsString, OsString)>) -> Result<Config> {
    if prefix.is_empty() {
        return Err(Error::Config("`Config::from_env` needs a prefix, such as REPLITE_".into()));
    }
    let bad = |name: &str| {
        let variable = format!("{prefix}{name}");
        move |problem: Problem| Error::Environment { variable, problem }
    };
    let mut values = Values::new();
    for (variable, value) in all {
        let Some(name) = variable.to_str().and_then(|variable| variable.strip_prefix(prefix)) else {
            continue;
        };
        let known =
            known(name).ok_or_else(|| bad(name)(format!("there is no such setting; {}", all_known())))?;
        let value = value.into_string().map_err(|_| bad(name)("it is no text in UTF-8".into()))?;
        if !value.trim().is_empty() {
            values.insert(known, value.trim().to_owned());
        }
    }
    let path = values.get("PATH");
    let path = path.ok_or_else(|| bad("PATH")("it is not set: give the path of the database file".into()))?;
    let mut config = Config::new(path);
    for (name, take) in ALONE {
        if let Some(value) = values.get(name) {
            take(&mut config, value).map_err(bad(name))?;
        }
    }
    config.lease = match (values.get("LEASE"), values.get("REPLICA_OF")) {
        (Some(_), Some(_)) => {
            return Err(bad("LEASE")("it can't be set beside REPLICA_OF: one of them".into()));
        }
        (Some(text), None) => text.parse::<Lease>().map_err(words).map_err(bad("LEASE"))?,
        (None, Some(url)) => Fixed::replica_of(url).into(),
        (None, None) => Fixed::primary().into(),
    };
    config.certificates = certificates(&values).map_err(|(name, problem)| bad(name)(problem))?;
    Ok(config)
}

fn known(name: &str) -> Option<&'static str> {
    names().find(|known| *known == name)
}

fn names() -> impl Iterator<Item = &'static str> {
    TOGETHER.into_iter().chain(ALONE.into_iter().map(|(name, _)| name))
}

fn all_known() -> String {
    let mut names: Vec<&str> = names().collect();
    names.sort_unstable();
    format!("these are known after the prefix: {}", names.join(", "))
}

fn certificates(values: &Values) -> Result<Option<Certificates>, (&'static str, Problem)> {
    const FILES: [&str; 3] = ["TLS_CHAIN", "TLS_KEY", "TLS_ROOTS"];
    let names = values.get("TLS_NAMES");
    if names.is_none() && FILES.iter().all(|name| !values.contains_key(name)) {
        return Ok(None);
    }
    let file = |name| values.get(name).ok_or_else(|| (name, TLS_TOGETHER.into()));
    let [chain, key, roots] = FILES.map(file);
    let names = names.map(|names| names.split(',').map(str::trim)).into_iter().flatten();
    Ok(Some(Certificates::new(chain?, key?, roots?).names(names)))
}

// ---- how values are read

fn set<T>(place: &mut T, value: Result<T, Problem>) -> Result<(), Problem> {
    *place = value?;
    Ok(())
}

/// What an error says of a value, without saying once more that it is of the configuration.
fn words(error: Error) -> Problem {
    match error {
        Error::Config(why) => why,
        other => other.to_string(),
    }
}

fn no(value: &str, right: impl Display) -> Problem {
    let shown: String = value.chars().take(64).collect();
    format!("{shown:?} is not {right}")
}

fn read<T: FromStr>(value: &str, right: &str) -> Result<T, Problem> {
    value.parse().map_err(|_| no(value, right))
}

fn number(value: &str) -> Result<usize, Problem> {
    read(value, "a whole number")
}

fn not_zero<T, N: TryFrom<T>>(value: T) -> Result<N, Problem> {
    N::try_from(value).map_err(|_| "it can't be zero".into())
}

fn yes(value: &str) -> Result<bool, Problem> {
    read(value, "`true` or `false`")
}

fn octal(value: &str) -> Result<u32, Problem> {
    let digits = value.strip_prefix("0o").unwrap_or(value);
    u32::from_str_radix(digits, 8).map_err(|_| no(value, "a mode in octal digits, such as 640"))
}

fn durability(value: &str) -> Result<Durability, Problem> {
    match value {
        "synced" => Ok(Durability::Synced),
        "unsynced" => Ok(Durability::Unsynced),
        _ => Err(no(value, "`synced` or `unsynced`")),
    }
}

fn plaintext(value: &str) -> Result<Plaintext, Problem> {
    match value {
        "loopback" => Ok(Plaintext::Loopback),
        "any-network" => Ok(Plaintext::AnyNetwork),
        _ => Err(no(value, "`loopback` or `any-network`")),
    }
}

/// The text of a secret is not shown.
fn secrets(value: &str) -> Result<Vec<Secret>, Problem> {
    value.split(',').map(|text| Secret::new(text.trim()).map_err(words)).collect()
}

fn labels(value: &str) -> Result<BTreeMap<String, String>, Problem> {
    let pairs = value.split(',').map(|pair| pair.split_once('='));
    let owned = pairs.map(|pair| pair.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())));
    owned.collect::<Option<_>>().ok_or_else(|| no(value, "a list like region=eu,zone=a"))
}

const TIMES: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("m", 60 * 1000), ("h", 3_600 * 1000), ("d", 24 * 3_600 * 1000)];
const SIZES: [(&str, u64); 5] =
    [("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

fn time(value: &str) -> Result<Duration, Problem> {
    let millis = measured(value, &TIMES);
    millis
        .map(Duration::from_millis)
        .ok_or_else(|| no(value, "a whole number with ms, s, m, h or d, such as 5s"))
}

fn bytes(value: &str) -> Result<u64, Problem> {
    measured(value, &SIZES)
        .ok_or_else(|| no(value, "a whole number of bytes, or one with KiB, MiB, GiB or TiB, such as 64MiB"))
}

/// A whole number with a unit after it.
fn measured(value: &str, units: &[(&str, u64)]) -> Option<u64> {
    let end = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let (digits, unit) = value.split_at(end);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    digits.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Config> {
        let path = [("APP_PATH", "data/app.db")];
        let all = path.iter().chain(variables).map(|(name, value)| (name.into(), value.into()));
        from_variables("APP_", all)
    }

    #[track_caller]
    fn refused(variables: &[(&str, &str)]) -> (String, String) {
        match of(variables) {
            Err(Error::Environment { variable, problem }) => (variable, problem),
            other => panic!("{other:?}"),
        }
    }

    const SECRET: &str = "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c";

    #[test]
    fn all_that_a_deployment_changes_is_read() {
        let config = of(&[
            ("OTHER_DATABASE", "not ours"),
            ("APP_DATABASE", "notes"),
            ("APP_CLUSTER", " blue\n"),
            ("APP_SECRET", SECRET),
            ("APP_LISTEN", "[::1]:7000"),
            ("APP_ADVERTISE", "http://10.0.0.1:8080"),
            ("APP_ADVERTISE_PUBLIC", "https://one.example"),
            ("APP_LABELS", "region=eu, zone=a"),
            ("APP_DURABILITY", "unsynced"),
            ("APP_DATABASE_MODE", "0640"),
            ("APP_WAL_LIMIT", "64MiB"),
            ("APP_LOG_BYTES", "2 GiB"),
            ("APP_LOG_AGE", "7d"),
            ("APP_VERIFY_LIMIT", "4096"),
            ("APP_WAIT_TIMEOUT", "500ms"),
            ("APP_CANDIDATE", "false"),
            ("APP_COMPRESSION", "false"),
            ("APP_GRACE", ""),
        ])
        .unwrap();
        let plain = Config::new("data/app.db");
        assert_eq!(config.path, plain.path);
        assert_eq!((config.database.as_deref(), config.cluster.as_str()), (Some("notes"), "blue"));
        let secrets: Vec<String> = config.secrets.iter().map(Secret::to_text).collect();
        assert_eq!(secrets, [SECRET]);
        assert_eq!(config.listen, Some("[::1]:7000".parse().unwrap()));
        assert_eq!(config.addresses.app, "http://10.0.0.1:8080");
        assert_eq!(config.addresses.public.as_deref(), Some("https://one.example"));
        assert_eq!(config.addresses.labels.get("zone").map(String::as_str), Some("a"));
        assert_eq!((config.durability, config.database_mode), (Durability::Unsynced, Some(0o640)));
        assert_eq!((config.wal_limit_bytes, config.log_bytes), (64 << 20, 2 << 30));
        assert_eq!(
            (config.log_age, config.wait_timeout),
            (Duration::from_secs(7 * 86_400), Duration::from_millis(500))
        );
        assert_eq!(config.verify_limit.unwrap().get(), 4096);
        assert!(!config.candidate && !config.compression && plain.compression);
        assert_eq!(config.grace, plain.grace, "an empty one counts as not set");
        assert!(format!("{:?}", config.lease).contains("None"), "the fixed primary");
    }

    #[test]
    fn who_leads_is_a_url_or_a_lease() {
        let of_url = of(&[("APP_REPLICA_OF", "replite://10.0.0.1:7000")]).unwrap();
        assert!(format!("{:?}", of_url.lease).contains("replite://10.0.0.1:7000"));
        let of_text = of(&[("APP_LEASE", "directory:/var/lib/lease"), ("APP_LEASE_TIME", "5s")]).unwrap();
        assert!(format!("{:?}", of_text.lease).contains("/var/lib/lease"));
        assert_eq!(of_text.lease_time, Some(Duration::from_secs(5)));
        let (variable, problem) = refused(&[("APP_LEASE", "a"), ("APP_REPLICA_OF", "replite://a:1")]);
        assert_eq!(variable, "APP_LEASE");
        assert!(problem.contains("REPLICA_OF"), "{problem}");
    }

    #[test]
    fn what_can_not_be_read_is_refused_by_its_name() {
        for (name, value, right) in [
            ("APP_LISTEN", "localhost:7000", "10.0.0.1:7000"),
            ("APP_WAL_LIMIT", "4M", "MiB"),
            ("APP_WAL_LIMIT", "99999999999TiB", "MiB"),
            ("APP_WAL_LIMIT", "-1", "MiB"),
            ("APP_GRACE", "60", "such as 5s"),
            ("APP_GRACE", "s", "such as 5s"),
            ("APP_CANDIDATE", "yes", "`true` or `false`"),
            ("APP_BOOTSTRAP", "three", "a whole number"),
            ("APP_VERIFY_LIMIT", "0", "zero"),
            ("APP_DATABASE_MODE", "rw", "octal"),
            ("APP_DURABILITY", "full", "`synced` or `unsynced`"),
            ("APP_PLAINTEXT", "true", "`loopback` or `any-network`"),
            ("APP_LABELS", "eu", "region=eu"),
            ("APP_TLS_NAMES", "a", "go together"),
            // One letter too many.
            ("APP_WAL_LIMITS", "4MiB", "WAL_LIMIT, WRITE_QUEUE"),
        ] {
            let (variable, problem) = refused(&[(name, value)]);
            assert!(problem.contains(right), "{name}: {problem}");
            let missing = name == "APP_TLS_NAMES" && variable == "APP_TLS_CHAIN";
            assert!(variable == name || missing, "{variable}");
        }
        let nothing = from_variables("APP_", std::iter::empty());
        let said = nothing.unwrap_err().to_string();
        assert_eq!(
            said,
            "the environment variable APP_PATH: it is not set: give the path of the database file"
        );
        assert!(matches!(from_variables("", std::iter::empty()), Err(Error::Config(_))));
    }

    #[test]
    fn a_secret_is_not_repeated() {
        for (name, value) in [("APP_SECRET", "hunter2"), ("APP_LEASE", "redis://app:hunter2@h/0")] {
            let (variable, problem) = refused(&[(name, value)]);
            assert!(variable == name && !problem.contains("hunter2"), "{problem}");
        }
        let two = of(&[("APP_FOLLOWER_SECRET", &format!("{SECRET}, {}", SECRET.replace("tK2v", "uK2v")))]);
        assert_eq!(two.unwrap().follower_secrets.len(), 2);
    }

    #[test]
    fn the_table_has_all_variables_and_no_other() {
        let rows = include_str!("env.rs").lines().filter_map(|line| line.trim().strip_prefix("/// | `"));
        let named = rows.flat_map(|row| {
            let (cell, _) = row.split_once(" |").unwrap();
            let names =
                cell.split(['`', ',', ' ']).filter(|name| name.starts_with(|c: char| c.is_ascii_uppercase()));
            names.map(str::to_owned).collect::<Vec<_>>()
        });
        let mut named: Vec<String> = named.collect();
        let mut all: Vec<&str> = names().collect();
        named.sort_unstable();
        all.sort_unstable();
        assert_eq!(named, all);
    }
}
