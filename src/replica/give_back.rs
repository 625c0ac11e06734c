//! Giving a primary back what a power cut took from it.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::log::{Log, Lookup};
use crate::report::Condition;
use crate::txid::Position;

/// Bytes of the log that are read at once.
const READ_MAX_BYTES: usize = 256 * 1024;
/// Reads that wait to be sent.
const READS_AHEAD: usize = 2;

/// The log's records after a state, as they are now; none when the log does not have that state.
/// Ends early when the log can't be read.
pub(super) fn records(log: Arc<Log>, after: Position) -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(READS_AHEAD);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = read(&log, after, &sender) {
            Condition::GiveBackFailed { error: &error }.say();
        }
    });
    receiver
}

fn read(log: &Log, after: Position, to: &mpsc::Sender<Bytes>) -> Result<()> {
    let until = log.complete();
    let mut lsn = match log.find(after.number())? {
        Lookup::At { lsn, before } if before == after => lsn,
        found => {
            Condition::GiveBackApart { after, found: &found }.say();
            return Ok(());
        }
    };
    while lsn < until {
        let bytes = log.read_disk(lsn, READ_MAX_BYTES.min((until - lsn) as usize))?;
        if bytes.is_empty() {
            break;
        }
        lsn = log.step_over(lsn + bytes.len() as u64);
        to.blocking_send(bytes).map_err(|_| Error::ShutDown)?;
    }
    Ok(())
}
