//! The register as a key of etcd, reached by its JSON gateway.

mod gateway;
mod life;
mod messages;
mod settings;
mod value;
mod watch;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::gateway::{CallError, Gateway};
use self::life::Lives;
use self::messages::{EtcdHeader, KeyValue, RangeAnswer, TxnAnswer};
use self::settings::EtcdSettings;
use self::value::Value;
use super::record::RECORD_MAX_BYTES;
use super::store::{ReadError, Store, StoreFuture, Stored, SwapError, Version};
use crate::error::Result;

/// How long one member may take to show the record, where there is another one to ask.
const LOOK_LIMIT: Duration = Duration::from_millis(500);

/// A lease whose record is a key of etcd. Needs the feature `etcd`, and etcd 3.4 or later, with the
/// JSON gateway that it has unless it is told otherwise. All nodes name the same key, and no other
/// database uses it.
///
/// The first line of the key's value is the store's own. The record after it is JSON that an
/// operator can read: `etcdctl get --print-value-only replite/lease`.
///
/// Name all members: another one is asked where one does not answer. A read and a swap need the
/// majority of them. A member that is cut off from the others answers nothing, rather than an old
/// record for ever. While there is no majority, the store is unavailable.
///
/// etcd restored from a backup has old records again. A handle that lives on meanwhile takes these
/// for new ones. So does every handle where the backup was restored with another
/// `--initial-cluster-token`, which is the way to do it.
///
/// etcd's gateway knows no users by the common name of their certificate: give name and password
/// ([`Etcd::user`]), also with [`Etcd::client_certificate`]. Where etcd has users, it refuses a
/// certificate that has a common name. Over `http://` the password is sent as it is.
///
/// ```
/// use replite::{Config, lease};
///
/// # fn main() -> replite::Result<()> {
/// let members = ["http://10.0.0.1:2379", "http://10.0.0.2:2379", "http://10.0.0.3:2379"];
/// let etcd = lease::Etcd::new(members)?
///     .user("app", "its password")
///     .key("replite/app");
/// let config = Config::new("data/app.db").lease(etcd);
/// # drop(config);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Etcd {
    settings: EtcdSettings,
    shared: Arc<EtcdShared>,
}

/// What clones share.
#[derive(Default)]
struct EtcdShared {
    gateway: Gateway,
    lives: Lives,
}

/// What a member shows of the key.
struct KeyLook {
    header: EtcdHeader,
    life: u32,
    found: Option<FoundKey>,
}

struct FoundKey {
    at: KeyValue,
    stored: Stored,
}

/// Why there is no [`KeyLook`].
enum Unseen {
    /// Another member may show it.
    Here(String),
    /// It is the same at each of them.
    Everywhere(String),
}

impl Etcd {
    /// The members of etcd at these URLs: `http://host:port` or `https://host:port`; without a port
    /// it is 2379. Nothing is looked at yet. The key is `replite/lease` unless [`Etcd::key`] says
    /// it.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) when there is none, or more than 16, or one that is
    /// no such URL. It also comes for `https://` in a build without the feature `tls`.
    pub fn new<U: AsRef<str>>(urls: impl IntoIterator<Item = U>) -> Result<Etcd> {
        Ok(Etcd::of(EtcdSettings::new(urls)?))
    }

    /// The same from one URL, as command lines have it: `etcd://host:port,host:port/replite/app`.
    /// `etcds://` goes over TLS. What follows the first slash is the key.
    ///
    /// ```
    /// use replite::lease::Etcd;
    ///
    /// let etcd = Etcd::from_url("etcd://10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379/replite/app")?;
    /// # drop(etcd);
    /// # Ok::<(), replite::Error>(())
    /// ```
    ///
    /// # Errors
    /// As for [`Etcd::new`], and when there is no key.
    pub fn from_url(url: &str) -> Result<Etcd> {
        Ok(Etcd::of(EtcdSettings::from_url(url)?))
    }

    fn of(settings: EtcdSettings) -> Etcd {
        Etcd { settings, shared: Arc::default() }
    }

    /// The key that has the record; `replite/lease` without. Each database needs one of its own.
    pub fn key(mut self, key: impl Into<String>) -> Etcd {
        self.settings.key = key.into();
        Etcd::of(self.settings)
    }

    /// A user of etcd, and its password. It needs the permission `readwrite` for the key. Where
    /// etcd has no users it is not used.
    pub fn user(mut self, name: impl Into<String>, password: impl Into<String>) -> Etcd {
        self.settings.user = Some((name.into(), password.into()));
        Etcd::of(self.settings)
    }

    /// A file with the certificates, as PEM, that vouch for etcd's. Those of the system count if it
    /// is not given.
    ///
    /// The file is read with the first call, and again after a member could not be reached. What is
    /// wrong with it, the calls say. The same goes for [`Etcd::client_certificate`].
    pub fn roots(mut self, path: impl Into<PathBuf>) -> Etcd {
        self.settings.roots = Some(path.into());
        Etcd::of(self.settings)
    }

    /// Two files, as PEM: the certificates that are shown to etcd, the node's own first, and the
    /// key of that.
    pub fn client_certificate(mut self, chain: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Etcd {
        self.settings.certificate = Some([chain.into(), key.into()]);
        Etcd::of(self.settings)
    }

    /// What the member shows. It asks the majority first: an old record of a member that is cut off
    /// would be taken for the record for ever.
    async fn look(&self, member: usize) -> Result<KeyLook, Unseen> {
        let (settings, key) = (&self.settings, &self.settings.key);
        let before = self.shared.lives.now();
        let answer = self.shared.gateway.call(settings, member, "kv/range", &messages::range(key)).await;
        let answer = answer.map_err(|error| Unseen::Here(error.into_words()))?;
        let here = |why: String| Unseen::Here(format!("{}: {why}", settings.members[member]));
        let RangeAnswer { header, mut kvs } = messages::read(&answer).map_err(here)?;
        let life = self.shared.lives.note(before, &header);
        let Some(at) = kvs.pop() else { return Ok(KeyLook { header, life, found: None }) };
        let value = Value::decode(&at.value).ok_or_else(|| {
            Unseen::Everywhere(format!("etcd's key {key:?} has a value that replite did not write"))
        })?;
        let stored = Stored::new(value.record.to_vec(), version(&header, life, &at));
        Ok(KeyLook { header, life, found: Some(FoundKey { at, stored }) })
    }

    /// The same; a member that is not the last to be asked has only so long.
    async fn look_in_time(&self, member: usize, last: bool) -> Result<KeyLook, Unseen> {
        if last {
            return self.look(member).await;
        }
        let late = |_| {
            let member = &self.settings.members[member];
            Err(Unseen::Here(format!("{member}: no answer within {LOOK_LIMIT:?}")))
        };
        tokio::time::timeout(LOOK_LIMIT, self.look(member)).await.unwrap_or_else(late)
    }

    async fn read_now(&self) -> Result<Option<Stored>, ReadError> {
        let (mut problems, mut order) = (Vec::new(), self.shared.gateway.order(&self.settings).peekable());
        while let Some(member) = order.next() {
            let asked = self.shared.gateway.ask(&self.settings, member);
            match self.look_in_time(member, order.peek().is_none()).await {
                Ok(look) => {
                    asked.answered();
                    return Ok(look.found.map(|found| found.stored));
                }
                Err(Unseen::Here(why)) => problems.push(why),
                Err(Unseen::Everywhere(why)) => return Err(ReadError::new(why)),
            }
        }
        Err(ReadError::new(problems.join("; ")))
    }

    /// Looks, and then sends the swap to the same member. The look gives the value that the
    /// transaction compares, and which cluster this is. And it shows, by what may be repeated at
    /// another member, that this one works.
    async fn swap_now(&self, expected: Option<&Version>, record: &[u8]) -> Result<Version, SwapError> {
        let unavailable = SwapError::Unavailable;
        if record.len() > RECORD_MAX_BYTES {
            return Err(unavailable(format!("a record of {} bytes is too long", record.len())));
        }
        let (mut problems, mut order) = (Vec::new(), self.shared.gateway.order(&self.settings).peekable());
        while let Some(member) = order.next() {
            let asked = self.shared.gateway.ask(&self.settings, member);
            let look = match self.look_in_time(member, order.peek().is_none()).await {
                Ok(look) => look,
                Err(Unseen::Here(why)) => {
                    problems.push(why);
                    continue;
                }
                Err(Unseen::Everywhere(why)) => return Err(unavailable(why)),
            };
            if look.found.as_ref().map(|found| &found.stored.version) != expected {
                asked.answered();
                return Err(SwapError::Conflict);
            }
            let over = look.found.as_ref().map(|found| &found.at);
            let value = Value::encode(over, record).map_err(|error| unavailable(error.to_string()))?;
            match self.swap_at(member, &look, &value).await {
                Err(NotSwapped::NotSent(why)) => problems.push(why),
                Err(NotSwapped::For(error)) => {
                    // After a connection that broke another member is asked.
                    if !matches!(error, SwapError::Unknown(_)) {
                        asked.answered();
                    }
                    return Err(error);
                }
                Ok(version) => {
                    asked.answered();
                    return Ok(version);
                }
            }
        }
        Err(unavailable(problems.join("; ")))
    }

    async fn swap_at(&self, member: usize, look: &KeyLook, value: &[u8]) -> Result<Version, NotSwapped> {
        let settings = &self.settings;
        let unknown =
            |why: String| NotSwapped::For(SwapError::Unknown(format!("{}: {why}", settings.members[member])));
        let before = self.shared.lives.now();
        let over = look.found.as_ref().map(|found| &found.at);
        let request = messages::txn(&settings.key, over, value);
        let answer = match self.shared.gateway.call(settings, member, "kv/txn", &request).await {
            Ok(answer) => answer,
            Err(CallError::NotSent(why)) => return Err(NotSwapped::NotSent(why)),
            Err(CallError::Refused(why)) => return Err(NotSwapped::For(SwapError::Unavailable(why))),
            Err(CallError::Unknown(why)) => return Err(NotSwapped::For(SwapError::Unknown(why))),
            Err(CallError::NoRoom(why)) => return self.settle(member, look, value, why).await,
        };
        let txn: TxnAnswer = messages::read(&answer).map_err(unknown)?;
        let life = self.shared.lives.note(before, &txn.header);
        if txn.header.cluster_id != look.header.cluster_id || life != look.life {
            return Err(unknown("another etcd answered than before".into()));
        }
        let (header, ours) = (&txn.header, |at: &KeyValue| at.value == value);
        if txn.succeeded {
            let mod_revision = txn.put_revision().ok_or_else(|| unknown("it gives no revision".into()))?;
            return Ok(version(header, life, &KeyValue { mod_revision, value: value.to_vec() }));
        }
        // Something on the way may have sent it twice: then the first one was done.
        match txn.found() {
            Some(at) if ours(at) => Ok(version(header, life, at)),
            // It has taken the place that ours was to take: only one can.
            Some(at) if Value::decode(&at.value).is_some_and(|there| there.replaced(over)) => {
                Err(NotSwapped::For(SwapError::Conflict))
            }
            // Others may have gone on from ours.
            _ => Err(unknown("another record is there, and others have written since the look".into())),
        }
    }

    /// etcd said that it has no room. It says so before a swap and, at the limit, also after one
    /// that was done. A look tells, since nothing is under way any more.
    async fn settle(
        &self,
        member: usize,
        before: &KeyLook,
        value: &[u8],
        why: String,
    ) -> Result<Version, NotSwapped> {
        let Ok(look) = self.look(member).await else { return Err(NotSwapped::For(SwapError::Unknown(why))) };
        let stored = |look: &KeyLook| look.found.as_ref().map(|found| found.stored.version.clone());
        match (&look.found, stored(&look)) {
            (Some(found), Some(version)) if found.at.value == value => Ok(version),
            (_, now) if now == stored(before) => Err(NotSwapped::For(SwapError::Unavailable(why))),
            _ => Err(NotSwapped::For(SwapError::Unknown(why))),
        }
    }
}

/// Why a member has not swapped.
enum NotSwapped {
    /// Another one may.
    NotSent(String),
    /// This is the answer.
    For(SwapError),
}

/// The revision is never used again by one cluster, and the value never by another: it has random
/// bits. A cluster that was restored from a backup has both again. It should have another id; where
/// it does not, it is another life of the cluster to those that have seen it go back.
fn version(header: &EtcdHeader, life: u32, at: &KeyValue) -> Version {
    let hash = crate::hex::hex(&blake3::hash(&at.value).as_bytes()[..16]);
    let version = format!("{:x}-{}-{hash}", header.cluster_id, at.mod_revision);
    Version::new(if life == 0 { version } else { format!("{version}-{life}") })
}

impl Store for Etcd {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        Box::pin(self.read_now())
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        Box::pin(self.swap_now(expected, record))
    }

    /// Watches the key.
    fn changed(&self) -> StoreFuture<'_, ()> {
        Box::pin(watch::changed(&self.settings, &self.shared.gateway, &self.shared.lives))
    }

    /// Five seconds.
    fn lease_time(&self) -> Duration {
        Duration::from_secs(5)
    }
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EtcdSettings { members, key, user, .. } = &self.settings;
        let user = user.as_ref().map(|(name, _)| name);
        let members: Vec<String> = members.iter().map(ToString::to_string).collect();
        let mut shown = f.debug_struct("Etcd");
        shown.field("members", &members).field("key", key).field("user", &user).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
