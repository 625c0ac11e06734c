//! A database whose position is unknown: whether it may become history.

use std::collections::BTreeMap;

use rusqlite::Connection;

use crate::checksum::PageHash;
use crate::engine::anchor::FileState;
use crate::engine::base::lock;
use crate::engine::open::Opened;
use crate::error::{Error, Result};
use crate::log::Found;
use crate::txid::Position;
use crate::wire::Message;

/// Pages that are compared with the log, to tell who copied last.
const PAGES_MAX: usize = 10_000;

/// Why a database is damaged whose newest anchor says that the file alone is no state, and whose WAL is not there any more.
const WAL_GONE: &str =
    "its WAL is gone, whose frames were being copied into it, so that the file alone is no committed state";
/// What an operator can do about that.
const CURE: &str = "restore it from a copy that a replica makes (`Db::snapshot_to`) or from a backup, with its directory of side \
    files moved away; or open it with `Config::accept_damaged`, which may lose commits and mix states, and replaces what the replicas have";

impl Opened {
    /// Whether the file, whose position is unknown, may hold pages of several states, and why: then it is none, and must not be read.
    /// Asked before an anchor is written.
    pub(super) fn damage(&mut self) -> Option<&'static str> {
        let tip = self.base.tip();
        let newest = lock(&self.base.anchors).newest_first().first().copied()?;
        let wal_there = newest.salts == tip.salts && newest.frame <= tip.frame;
        if newest.file != FileState::Backfilling || wal_there {
            return None;
        }
        let copied = self.copied_by_others(newest.position).unwrap_or_else(|error| {
            tracing::warn!(%error, "the log can't tell whether the WAL was copied back in full");
            false
        });
        if copied {
            tracing::warn!(path = %self.base.path().display(), "somebody else has copied the WAL back in full, and deleted it");
            return None;
        }
        Some(WAL_GONE)
    }

    /// Whether somebody copied more frames than we were about to: then it was a checkpoint of SQLite's, of all of them, such as the last
    /// connection to close makes. What the log has behind the state that we copied to was never ours to copy: its pages are in the file, but for
    /// those that somebody changed since, or they are not.
    fn copied_by_others(&mut self, ours: Position) -> Result<bool> {
        let log = self.base.log.clone();
        let Found::At { lsn, before } = log.find(ours.number())? else { return Ok(false) };
        let mut behind = BTreeMap::new();
        if before == ours {
            log.records(lsn, log.complete(), |unit| {
                let message = unit.decode().map_err(|e| Error::garbled("the log", e.to_string()))?;
                if let Message::Page { number, hash, .. } = message
                    && (behind.len() < PAGES_MAX || behind.contains_key(&number))
                {
                    behind.insert(number, hash);
                }
                Ok(())
            })?;
        }
        let tip = self.base.tip();
        let mut page = vec![0; self.base.page_size.bytes()];
        let (mut there, all) = (0, behind.len());
        for (number, hash) in behind {
            if number.get() <= tip.pages {
                self.base.read_page(&mut self.handle, number, tip.frame, &mut page)?;
                there += usize::from(PageHash::of(number, &page) == hash);
            }
        }
        Ok(there > 0 && there * 2 >= all)
    }

    /// Lets a state that somebody else made become history of a primary, if SQLite finds it whole.
    pub(super) fn admit(&mut self) -> Result<()> {
        let why = self.damage();
        let path = self.base.path();
        let damaged = |what| Error::Damaged { path: path.clone(), what };
        if let Some(why) = why {
            if !self.base.options.accept_damaged {
                return Err(damaged(format!("{why}; {CURE}")));
            }
            tracing::error!(path = %path.display(), why, "the configuration accepts this state; commits may be lost");
        }
        tracing::info!(path = %path.display(), "the position is unknown; `PRAGMA integrity_check` runs before the state becomes history");
        match integrity(self.handle.connection()) {
            Ok(None) => Ok(()),
            Ok(Some(what)) => Err(damaged(format!(
                "its position is unknown, and `PRAGMA integrity_check` says: {what}; restore it from a replica or a backup"
            ))),
            Err(error) => {
                // The schema may need functions, collations or modules that only the application's connections have.
                tracing::warn!(%error, "the state becomes history without `PRAGMA integrity_check`, which could not run");
                Ok(())
            }
        }
    }
}

/// What SQLite finds wrong with the database.
fn integrity(connection: &Connection) -> Result<Option<String>, rusqlite::Error> {
    // Rows that break a CHECK are the application's affair, and its functions are not there.
    connection.pragma_update(None, "ignore_check_constraints", true)?;
    let found = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get::<_, String>(0));
    connection.pragma_update(None, "ignore_check_constraints", false)?;
    match found {
        Ok(text) if text == "ok" => Ok(None),
        Ok(text) => Ok(Some(text)),
        Err(error) if corrupt(&error) => Ok(Some(error.to_string())),
        Err(error) => Err(error),
    }
}

fn corrupt(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}
