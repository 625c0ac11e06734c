//! Which state a primary goes on from, where its files don't simply say it. `docs/design.md` has
//! the whole table.

use std::fmt;

use rusqlite::Connection;

use crate::engine::file::anchor::FileState;
use crate::engine::history::epoch::{draw_epoch, expect_newer, open_epoch};
use crate::engine::recover::Findings;
use crate::engine::recover::position::{LogSays, Wal};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::page::PageNo;
use crate::report::Condition;
use crate::txid::{Epoch, EpochHistory, EpochStart, Place, Position, Txid};

/// Why what SQLite reads may be no committed state.
#[derive(Debug)]
pub(in crate::engine) enum Doubt {
    /// It mixes states, or lacks some of what was committed.
    Mixed(&'static str),
    /// It may be one, or not.
    TwoReadings(&'static str),
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Doubt::Mixed(why) | Doubt::TwoReadings(why)) = self;
        f.write_str(why)
    }
}

const CUT: &str = "its WAL does not have what was on the disk there: it was cut off, or bytes in it changed, \
    so that the file with what is left of it mixes states";
const STRAY: &str = "its state directory is older than its WAL, or lacks the anchors, so that nothing says \
    which file the WAL goes with";
const ALTERED: &str = "its file is not as it was left, nor has all of what its WAL has. Either somebody was \
    killed while he copied the WAL back; or bytes were changed by other means than SQLite, or another file \
    was put in its place, and file and WAL together mix states";
const NEVER_KNOWN: &str = "it was opened when it was no state of its cluster, or was being made good, and \
    that did not come to its end. Either it is whole, or it was damaged before that, and mixes states";
const OTHER_KEY: &str = "its keys are gone, and so is the WAL whose frames were being copied into it. Either \
    somebody has copied all of that WAL: then `Config::accept_damaged` loses nothing; or the file mixes \
    states";
/// What an operator can do.
const CURE: &str = "restore it from a copy that a replica makes (`Db::snapshot_to`) or from a backup, with \
    its state directory moved away; or open it once with `Config::accept_damaged`, which takes what SQLite \
    reads, may mix states, and replaces what the replicas have";

impl Findings {
    /// Whether anything here speaks of a history.
    pub(in crate::engine) fn is_known(&self) -> bool {
        self.highest_epoch > 0 || self.base.log.tip().is_some()
    }

    /// Finds the committed state that a primary goes on from, and makes good from the log what its
    /// files lack. A state that has no name, and may become history, does not become `exact`.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the primary can prove no committed state, or when transactions that
    /// were on the disk here are in no file any more. The files are unchanged then.
    pub(in crate::engine) fn judge(mut self, unsynced: bool) -> Result<Findings> {
        let read = self.exact;
        self.name();
        if !self.exact && self.is_known() {
            if !read && let Some(doubt) = self.doubt()? {
                self = self.repair(&doubt)?;
            }
            if !self.exact {
                self = self.expect_whole()?;
            }
        }
        if !self.exact && !read && !self.is_known() && lock(&self.base.anchors).has_others() {
            self = self.judge_other()?;
        }
        if self.exact {
            self.reach(unsynced)?;
        }
        Ok(self)
    }

    /// The state directory is of another page key, so nothing there names what the files are. They
    /// may have been left in the middle of a copy all the same.
    fn judge_other(self) -> Result<Findings> {
        let torn =
            matches!(self.wal, Wal::Foreign | Wal::Gone) && lock(&self.base.anchors).copied_by_others();
        let found = if torn { self.repair(&Doubt::TwoReadings(OTHER_KEY))? } else { self };
        found.expect_whole()
    }

    /// A position counts only in a history that has it.
    fn name(&mut self) {
        let position = self.base.tip().position;
        if self.history.last().is_none() && self.exact && position.epoch().number() > 0 {
            // The epochs were lost with their file, and the log does not tell of them. Nothing
            // names what was before this state.
            let (first, before) = (position.number() + 1, position.checksum());
            self.history.push(EpochStart { epoch: position.epoch(), first, before });
        }
        self.exact &= self.has(position);
        if !self.exact || !self.chained {
            return;
        }
        // These are commits that the log contradicts. Or they are commits of another node's epoch
        // that the log does not have: that node has others under their numbers.
        let logged = self.base.log.tip().filter(|logged| self.has(*logged));
        let agreed = self.anchor.map(|anchor| anchor.position);
        match self.log_says {
            LogSays::Otherwise => {
                let agrees = |state: &Position| self.leads_on_from(*state).is_ok_and(|lsn| lsn.is_some());
                (self.exact, self.proved) = (false, agreed.filter(agrees));
            }
            LogSays::So if self.own || logged.is_some_and(|logged| logged.number() >= position.number()) => {}
            LogSays::So => (self.exact, self.proved) = (false, logged),
            LogSays::Nothing if self.own => {}
            LogSays::Nothing => self.exact = false,
        }
    }

    /// Why the files, read as SQLite reads them, may be no state that was ever committed. Call
    /// before an anchor is written.
    pub(in crate::engine) fn doubt(&mut self) -> Result<Option<Doubt>> {
        if self.known.first().is_some_and(|anchor| anchor.position.epoch().number() == 0) {
            return Ok(Some(Doubt::Mixed(NEVER_KNOWN)));
        }
        Ok(match self.wal {
            Wal::Short => Some(Doubt::Mixed(CUT)),
            Wal::Stray => Some(Doubt::Mixed(STRAY)),
            // Where all of the WAL is in the file, there is one reading. The process that copied it
            // did not count what it committed before.
            Wal::Whole | Wal::Before => (!self.is_copied()?).then_some(Doubt::Mixed(ALTERED)),
            Wal::Foreign | Wal::Gone => self.damage()?,
        })
    }

    /// Finds a state that it can prove in files that, read as they are, are none.
    fn repair(mut self, doubt: &Doubt) -> Result<Findings> {
        let why = match doubt {
            Doubt::Mixed(why) => {
                if self.wal.is_ours()
                    && let Some(tip) = self.file_alone()?
                    && (self.is_older(tip.position) || self.leads_to_all(tip.position)?)
                {
                    self.drop_wal(why, tip)?;
                    return Ok(self);
                }
                self = self.mend(why)?;
                if self.exact {
                    return Ok(self);
                }
                why
            }
            Doubt::TwoReadings(why) => why,
        };
        if self.base.options.accept_damaged {
            self.base.node.report(Condition::DamageAccepted { path: self.base.path(), why });
            return Ok(self);
        }
        Err(self.damaged(format!("{why}{}; {CURE}", self.missing())))
    }

    /// Fails unless SQLite finds the state whole that is to become history.
    fn expect_whole(mut self) -> Result<Findings> {
        tracing::info!(
            path = %self.base.path().display(),
            "the position is unknown; `PRAGMA integrity_check` runs before the state becomes history"
        );
        let what = match integrity(self.handle.connection()) {
            Ok(None) => return Ok(self),
            Ok(Some(what)) => what,
            Err(error) => {
                // The schema may need functions, collations or modules that only the application's
                // connections have.
                self.base.node.report(Condition::IntegrityNotChecked { error: &error });
                return Ok(self);
            }
        };
        self = self.mend("SQLite finds it malformed")?;
        if self.exact {
            return Ok(self);
        }
        Err(self.damaged(format!(
            "its position is unknown, and `PRAGMA integrity_check` says: {what}{}; restore it from a replica \
             or a backup, with its state directory moved away",
            self.missing()
        )))
    }

    /// Whether the file has the newest image of each page that the WAL has.
    fn is_copied(&mut self) -> Result<bool> {
        let (base, tip) = (self.base.clone(), self.base.tip());
        let (mut image, mut there) = (vec![0; base.page_size.bytes()], vec![0; base.page_size.bytes()]);
        for frame in 1..=tip.frame {
            let page = base.index.page_of(frame);
            let Some(number) = PageNo::new(page).filter(|_| page <= tip.pages) else { continue };
            if base.index.lookup(page, frame, tip.frame) == Some(frame) {
                base.read_frame(frame, &mut image)?;
                self.handle.read(&mut there, number.offset(base.page_size))?;
                if image != there {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn damaged(&self, what: String) -> Error {
        Error::Damaged { path: self.base.path().to_path_buf(), what }
    }

    /// The last transaction of this history that was certainly here.
    pub(in crate::engine) fn last_known(&self) -> u64 {
        let anchors = self.known.iter().map(|anchor| anchor.position);
        let named = self.on_history(anchors.chain(self.base.log.tip())).unwrap_or(0);
        named.max(self.counted)
    }

    /// The last transaction that was certainly in the file itself.
    fn last_in_file(&self) -> Option<u64> {
        self.on_history(self.known.iter().filter_map(|anchor| match anchor.file {
            FileState::AtRest { position, .. } => Some(position),
            FileState::Backfilling(_) => None,
        }))
    }

    /// Whether the file itself was later than this state.
    fn is_older(&self, state: Position) -> bool {
        self.last_in_file().is_some_and(|last| state.number() < last)
    }

    /// The last transaction that the log leads to from a state.
    fn reached(&self, from: Position) -> Result<u64> {
        let leads = self.leads_on_from(from)?.is_some();
        let logged = self.base.log.tip().filter(|_| leads);
        Ok(logged.unwrap_or(from).number())
    }

    /// Whether the log leads from a state to all that was here.
    pub(in crate::engine) fn leads_to_all(&self, from: Position) -> Result<bool> {
        Ok(self.reached(from)? >= self.last_known())
    }

    fn on_history(&self, positions: impl Iterator<Item = Position>) -> Option<u64> {
        let ours = positions.filter(|p| self.history.place(p.txid()) == Place::OnHistory);
        ours.map(|p| p.number()).max()
    }

    /// Which transactions may be gone, in words.
    fn missing(&self) -> String {
        let (from, to) = (self.last_in_file().unwrap_or(0) + 1, self.last_known());
        let to = match self.base.log.start() {
            Some(start) if start.number() < from => {
                return "; its log has all transactions since, but does not go with what is in the file \
                        otherwise"
                    .into();
            }
            Some(start) if start.number() < to => start.number(),
            _ => to,
        };
        if from > to {
            return String::new();
        }
        format!("; of transactions {from} to {to} no file here has all pages any more")
    }

    /// A state was found that can be proved. Checks whether it is all that was here.
    fn reach(&mut self, unsynced: bool) -> Result<()> {
        let here = self.base.tip().position;
        let whole = self.wal == Wal::Whole && self.anchor == self.known.first().copied();
        if !whole && self.is_older(here) {
            // The file itself was later than this. No WAL was lost: an older file is in its place.
            let last = self.last_known();
            self.base.node.report(Condition::OlderDatabase { position: here, last });
            self.set_log_aside()?;
            self.history = self.history.up_to(here);
            return self.reset_log(here);
        }
        // A primary that syncs nothing asks its replicas for what a power cut took.
        if self.leads_to_all(here)? || self.base.options.accept_damaged || unsynced {
            return Ok(());
        }
        let (reached, last) = (self.reached(here)?, self.last_known());
        Err(self.damaged(format!(
            "its files lead to transaction {reached}, and no file here has transactions {} to {last} any \
             more, which were on its disk: its WAL is gone or was cut, and its log does not reach back; a \
             replica may have them: restore it from a copy that a replica makes (`Db::snapshot_to`), with \
             its state directory moved away; or open it once with `Config::accept_damaged`, which goes on \
             from transaction {reached} and replaces what the replicas have",
            reached + 1
        )))
    }

    /// The state that SQLite reads, which has no name, becomes a transaction of a new epoch, with a
    /// number that no node has used. The node keeps what the log has in `lost`. Only what was
    /// proved to be before this state counts as being in this history. So replicas keep what they
    /// have. Without an epoch that is given, the node draws one.
    pub(in crate::engine) fn become_history(&mut self, known: bool, epoch: Option<Epoch>) -> Result<()> {
        let newest = Epoch::new(self.highest_epoch, 0);
        let epoch = match epoch {
            Some(epoch) => expect_newer(epoch, newest).map(|()| epoch)?,
            None => draw_epoch(newest.number()).map_err(|error| error.of_files(self.base.path()))?,
        };
        let mut tip = self.base.tip();
        self.history = match self.proved {
            Some(proved) => self.history.up_to(proved),
            None => EpochHistory::default(),
        };
        let number = if known { self.highest + 1 } else { 0 };
        let (before, checksum) = match self.proved {
            Some(proved) => (proved.number(), proved.checksum()),
            None => (number.saturating_sub(1), tip.position.checksum()),
        };
        let before = Position::new(Txid::new(tip.position.epoch(), before), checksum);
        open_epoch(&mut self.history, epoch, before)?;
        tip.position = Position::new(Txid::new(self.history.epoch(), number), tip.position.checksum());
        if known {
            self.base.node.report(Condition::ForeignChange { position: tip.position });
        }
        // First: what the log has is off this history then, even if the move of the log never
        // happens.
        crate::engine::file::epochs::write_epochs(self.base.options.keyed(), &self.history, true)?;
        self.set_log_aside()?;
        self.base.leap(tip);
        Ok(())
    }
}

/// What SQLite finds wrong with the database.
pub(in crate::engine) fn integrity(connection: &Connection) -> Result<Option<String>, rusqlite::Error> {
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
