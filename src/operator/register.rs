//! The record of the lease, as an operator reads and changes it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::lease::record::{LeaseState, Record, RecordError, Tenure};
use crate::lease::{Store, SwapError, Version};
use crate::operator::problem::OperatorError;
use crate::peer::NodeId;

/// The longest that one call of a store may take.
const STORE_LIMIT: Duration = Duration::from_secs(5);
/// How often a change is tried while others write, and for how long.
const TRIES: u32 = 10;
const TRIES_LIMIT: Duration = Duration::from_secs(10);
/// The label that says where a record was moved to.
pub(super) const MOVED_TO: &str = "moved-to";

/// What is in the register.
#[derive(Debug)]
pub(super) enum InRegister {
    Nothing,
    /// A record that can't be used, and why.
    Bad(RecordError, Version),
    Record(Box<Record>, Version),
}

/// The register of one database's lease.
#[derive(Clone, Debug)]
pub(super) struct Register {
    pub(super) store: Arc<dyn Store>,
    pub(super) cluster: String,
    pub(super) database: String,
}

impl Register {
    pub(super) async fn look(&self) -> Result<InRegister, OperatorError> {
        let read = timeout(STORE_LIMIT, self.store.read()).await;
        let read = read.map_err(|_| OperatorError::Store(format!("no answer within {STORE_LIMIT:?}")))?;
        let Some(stored) = read.map_err(|error| OperatorError::Store(error.to_string()))? else {
            return Ok(InRegister::Nothing);
        };
        Ok(match Record::decode(&stored.record, &self.cluster, &self.database) {
            Ok(record) => InRegister::Record(Box::new(record), stored.version),
            Err(error) => InRegister::Bad(error, stored.version),
        })
    }

    /// A record that can be used, and is still this store's.
    pub(super) async fn record(&self) -> Result<(Box<Record>, Version), OperatorError> {
        match self.look().await? {
            InRegister::Nothing => Err(OperatorError::NoRecord),
            InRegister::Bad(error, _) => Err(OperatorError::Unusable(error.to_string())),
            InRegister::Record(record, version) => match moved_to(&record) {
                Some(to) => Err(OperatorError::Moved { to }),
                None => Ok((record, version)),
            },
        }
    }

    /// Replaces the record of this version. None: another one is there.
    pub(super) async fn swap(
        &self,
        expected: Option<&Version>,
        record: &Record,
    ) -> Result<Option<Version>, OperatorError> {
        let bytes = record.encode();
        match timeout(STORE_LIMIT, self.store.swap(expected, &bytes)).await {
            Ok(Ok(version)) => Ok(Some(version)),
            Ok(Err(SwapError::Conflict)) => Ok(None),
            Ok(Err(SwapError::Unavailable(why))) => Err(OperatorError::Store(why)),
            Ok(Err(SwapError::Unknown(why))) => Err(OperatorError::Unknown(why)),
            Err(_) => Err(OperatorError::Unknown(format!("no answer within {STORE_LIMIT:?}"))),
        }
    }

    /// Changes whether elections are paused, and nothing else. The holder's attempt stays in the
    /// record, so that it knows it for its own and carries the change on.
    pub(super) async fn set_paused(&self, paused: bool) -> Result<(), OperatorError> {
        let (begun, mut unknown) = (Instant::now(), None);
        for _ in 0..TRIES {
            let (mut record, version) = self.record().await?;
            if record.paused == paused {
                return Ok(());
            }
            record.paused = paused;
            match self.swap(Some(&version), &record).await {
                Ok(Some(_)) => return Ok(()),
                Ok(None) => {}
                // The next look tells.
                Err(OperatorError::Unknown(why)) => unknown = Some(why),
                Err(error) => return Err(error),
            }
            if begun.elapsed() > TRIES_LIMIT {
                break;
            }
        }
        Err(unknown.map_or(OperatorError::Contended { tries: TRIES }, OperatorError::Unknown))
    }

    /// Whether the record of this version is replaced within that time. None: the store does not
    /// say.
    pub(super) async fn is_replaced(&self, version: &Version, within: Duration) -> Option<bool> {
        let (begun, pause) = (Instant::now(), (within / 8).min(Duration::from_secs(1)));
        loop {
            tokio::time::sleep(pause).await;
            let now = match self.look().await.ok()? {
                InRegister::Nothing => return Some(true),
                InRegister::Bad(_, now) | InRegister::Record(_, now) => now,
            };
            if now != *version {
                return Some(true);
            }
            if begun.elapsed() >= within {
                return Some(false);
            }
        }
    }
}

/// The tenure that a record tells of.
pub(super) fn tenure(record: &Record) -> Option<&Tenure> {
    match &record.state {
        LeaseState::Gathering => None,
        LeaseState::Held(tenure) | LeaseState::Released(tenure) => Some(tenure),
    }
}

/// Where the lease of this record went, if it was moved to another store.
pub(super) fn moved_to(record: &Record) -> Option<String> {
    let holder = &tenure(record)?.holder;
    let to = || holder.addresses.labels.get(MOVED_TO).cloned().unwrap_or_else(|| "another store".into());
    (holder.node == NodeId::NIL).then(to)
}

/// A record in a few words.
pub(super) struct InWords<'a>(pub(super) &'a InRegister);

impl fmt::Display for InWords<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = match self.0 {
            InRegister::Nothing => return f.write_str("nothing"),
            InRegister::Bad(error, _) => return write!(f, "what can't be used ({error})"),
            InRegister::Record(record, _) => record,
        };
        let Some(tenure) = tenure(record) else { return f.write_str("a record of nodes that gather") };
        match moved_to(record) {
            Some(to) => write!(f, "the mark of a lease that was moved to {to}"),
            None => {
                write!(f, "a lease of node {} in epoch {}", tenure.holder.node, tenure.epoch.number())
            }
        }
    }
}
