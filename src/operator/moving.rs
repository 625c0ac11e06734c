//! The way of a lease to another store.
//!
//! In this order, so that at no time two stores have a record by which a node leads:
//!
//! 1. The record is watched for a lease time: no holder renews it.
//! 2. A copy is written into the other store, paused, so that no node elects itself by it yet.
//! 3. The old record is replaced, over the version that was watched, by a mark: held, in a later
//!    epoch and from no known state, by a node that does not exist, and paused. Whatever a node
//!    that is started with the old store knows, its record is another's and older. Nor does a
//!    resume help: without a state that the epoch goes on from, no node may take it by itself.
//! 4. The copy is let go on.
//!
//! A stop after 2 leaves the lease in the old store; the next try finds the copy, and goes on. A
//! stop after 3 leaves it paused in the new one.

use std::time::Duration;

use super::problem::OperatorError;
use super::register::{InRegister, InWords, MOVED_TO, Register, moved_to, tenure};
use crate::lease::Version;
use crate::lease::record::{Attempt, Holder, LeaseState, Record, Tenure};
use crate::peer::{Incarnation, NodeId};
use crate::random;
use crate::status::{Addresses, is_plain};
use crate::txid::{Epoch, NUMBER_MAX};

/// Characters of the other store's name that are kept.
const NAME_MAX_CHARS: usize = 200;

pub(super) async fn move_record(from: &Register, to: &Register, named: &str) -> Result<(), OperatorError> {
    let (record, version) = from.record().await?;
    let Some(last) = tenure(&record).cloned() else { return Err(OperatorError::NoHolder) };
    let mark = mark(&record, &last, named)?;
    let free = free(to, &record).await?;
    if let LeaseState::Held(_) = record.state {
        // The fence of a holder that lives is over by then.
        watch(from, &version, record.lease_time, last.holder.node).await?;
    }
    if let Free::Over(before) = &free {
        let copy = Record { paused: true, ..(*record).clone() };
        to.swap(before.as_ref(), &copy).await?.ok_or(OperatorError::Contended { tries: 1 })?;
    }
    let marked = from.swap(Some(&version), &mark).await?.ok_or(OperatorError::MovedUnder)?;
    if let Free::Copied = free {
        // A paused record looks like its own copy.
        refuse_same(from, to, &record, (&mark, &marked)).await?;
    }
    if record.paused {
        return Ok(());
    }
    to.set_paused(false).await
}

/// What may be replaced in the other store.
enum Free {
    Over(Option<Version>),
    /// This very record is there, from a try before.
    Copied,
}

async fn free(to: &Register, record: &Record) -> Result<Free, OperatorError> {
    let found = to.look().await?;
    match &found {
        InRegister::Nothing => return Ok(Free::Over(None)),
        InRegister::Record(there, _) if there.attempt == record.attempt && there.paused => {
            return Ok(Free::Copied);
        }
        // The lease was here before, and comes back.
        InRegister::Record(there, version) if moved_to(there).is_some() => {
            return Ok(Free::Over(Some(version.clone())));
        }
        InRegister::Record(..) | InRegister::Bad(..) => {}
    }
    let here = tenure(record).map_or("nothing".into(), |tenure| {
        format!("a lease of node {} in epoch {}", tenure.holder.node, tenure.epoch.number())
    });
    Err(OperatorError::Occupied { here, there: InWords(&found).to_string() })
}

/// Where the two stores are one, the mark has replaced the only record: that is put back.
async fn refuse_same(
    from: &Register,
    to: &Register,
    record: &Record,
    (mark, marked): (&Record, &Version),
) -> Result<(), OperatorError> {
    match to.look().await? {
        InRegister::Record(there, _) if there.attempt == mark.attempt => {}
        _ => return Ok(()),
    }
    from.swap(Some(marked), record).await?.ok_or(OperatorError::MovedUnder)?;
    Err(OperatorError::Invalid("both stores are the same one: nothing is to be moved".into()))
}

async fn watch(
    from: &Register,
    version: &Version,
    lease_time: Duration,
    holder: NodeId,
) -> Result<(), OperatorError> {
    match from.is_replaced(version, lease_time).await {
        Some(false) => Ok(()),
        Some(true) => Err(OperatorError::Renewed { holder }),
        None => Err(OperatorError::Store("it could not be watched for a lease time".into())),
    }
}

/// What stays in the old store.
fn mark(record: &Record, last: &Tenure, named: &str) -> Result<Record, OperatorError> {
    let invalid = |error: crate::error::Error| OperatorError::Invalid(error.to_string());
    let number = last.epoch.number().checked_add(1).filter(|number| *number <= NUMBER_MAX);
    let number = number.ok_or_else(|| OperatorError::Invalid("there is no higher epoch".into()))?;
    let branch = u64::from_le_bytes(random::array().map_err(invalid)?);
    let name = named.chars().filter(|c| is_plain(*c)).take(NAME_MAX_CHARS).collect::<String>();
    let holder = Holder {
        node: NodeId::NIL,
        incarnation: Incarnation::NIL,
        boot: String::new(),
        addresses: Addresses::default().label(MOVED_TO, name),
    };
    let tenure = Tenure {
        holder,
        epoch: Epoch::new(number, branch),
        began: None,
        lease_clock: Duration::ZERO,
        position: None,
    };
    Ok(Record {
        attempt: Attempt(u128::from_be_bytes(random::array().map_err(invalid)?)),
        state: LeaseState::Held(tenure),
        paused: true,
        nodes: Vec::new(),
        ..record.clone()
    })
}
