//! The log over the files. The node applies again what the log has beyond them, and puts aside what
//! does not belong to them.

use crate::engine::history::wal_appender::WalAppender;
use crate::engine::recover::Findings;
use crate::error::Result;
use crate::files::{self, reserve, sync_directory};
use crate::log::{Log, Lookup};
use crate::report::Condition;
use crate::status::unix_millis;
use crate::txid::{EpochHistory, Position};
use crate::wire::RecordPart;

impl Findings {
    /// From which address the log goes on from a state, if it does.
    pub(in crate::engine) fn leads_on_from(&self, state: Position) -> Result<Option<u64>> {
        match self.base.log.find(state.number())? {
            Lookup::At { lsn, before } if before == state => Ok(Some(lsn)),
            _ => Ok(None),
        }
    }

    /// Applies the records that the log has beyond the WAL: an administrator deleted the WAL, or a
    /// power cut took its tail. Puts records aside that do not follow.
    pub(in crate::engine) fn redo(self) -> Result<Findings> {
        let tip = self.base.tip();
        let Some(logged) = self.base.log.tip() else {
            // A replica's log begins where a primary vouches for a state, not before.
            if self.primary {
                self.reset_log(tip.position)?;
            }
            return Ok(self);
        };
        if logged == tip.position {
            return Ok(self);
        }
        let number = tip.position.number();
        if logged.number() > number
            && let Some(lsn) = self.leads_on_from(tip.position)?
        {
            self.base.node.report(Condition::LogRedone { from: tip.position, to: logged });
            let mut appender = WalAppender::new(self.base.clone(), self.handle)?;
            apply_log(&mut appender, &self.base.log, lsn, &self.history)?;
            self.base.sync_wal()?;
            return Ok(Findings { handle: appender.handle, ..self });
        }
        if logged.number() < number && !self.primary {
            // Another process wrote to a replica's file, or a power cut took the log's tail. The
            // log ends before the state, which says that no primary vouches for that state.
            return Ok(self);
        }
        if logged.number() >= number {
            self.set_log_aside()?;
        }
        // A replica's log goes on to say what its primary vouched for last. If the log began at
        // this state, it would vouch for this state. That would cover what another process wrote
        // here after the node died between its log and its WAL.
        let vouched = if self.primary { tip.position } else { logged };
        self.reset_log(vouched)?;
        Ok(self)
    }

    /// Begins the log anew. Without room for that, the first record does.
    pub(in crate::engine) fn reset_log(&self, at: Position) -> Result<()> {
        let Err(error) = reserve::with(self.base.options.paths.state_dir(), || self.base.log.reset(at))
        else {
            return Ok(());
        };
        self.base.note_room(&error);
        if error.no_room() { Ok(()) } else { Err(error) }
    }

    /// Keeps a log that does not lead on from this database's state, if it has any record. The log
    /// has no position then.
    pub(in crate::engine) fn set_log_aside(&self) -> Result<()> {
        let log = &self.base.log;
        if log.start() == log.tip() {
            return Ok(());
        }
        let (from, to) = (log.start(), log.tip());
        let lost = self.base.options.paths.lost();
        let kept = lost.join(format!("log-{}", unix_millis()));
        files::make_directory(&kept)?;
        // The directory's name is durable before the node moves anything there.
        sync_directory(&lost)?;
        sync_directory(self.base.options.paths.state_dir())?;
        log.move_to(&kept)?;
        self.base.node.report(Condition::LogKept { kept: &kept, from, to });
        Ok(())
    }
}

/// Applies the log's records from an LSN to its end.
fn apply_log(appender: &mut WalAppender, log: &Log, lsn: u64, history: &EpochHistory) -> Result<()> {
    let mut at = lsn;
    log.records(lsn, log.complete(), |unit, message| {
        for part in message.parts() {
            let taken = match part {
                RecordPart::Begin(begin) => appender.begin(begin, history),
                RecordPart::Change(change) => appender.change(&change),
                RecordPart::End(end) => appender.end(end).and_then(|()| Ok(appender.publish()?)),
            };
            taken.map_err(|error| error.of_log(log, at))?;
        }
        at += unit.raw.len() as u64;
        Ok(())
    })
}
