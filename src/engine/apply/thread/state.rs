//! What is at the database's path, and how it becomes this replica's state.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::mpsc;

use crate::engine::apply::inbox::{ApplyCommand, ApplyShared};
use crate::engine::apply::thread::Apply;
use crate::engine::apply::thread::stage::{Remedy, Served, State, Suspect};
use crate::engine::apply::thread::vouched::last_vouched;
use crate::engine::checkpoint::thread::{Checkpointer, ReplicaSync};
use crate::engine::file::database::OpenDatabase;
use crate::engine::file::doubt;
use crate::engine::file::reader::{reader, share_reads};
use crate::engine::file::term::Term;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming;
use crate::engine::recover::{self, Findings};
use crate::error::{Error, Result, Unsupported};
use crate::files;
use crate::lock::lock;
use crate::page::PageSize;
use crate::report::Condition;
use crate::sqlite::{Handle, park};
use crate::txid::{Place, Position};

/// How often the thread turns a database to WAL, where SQLite can't and gives no reason.
const TURNS: u32 = 8;

impl Apply {
    /// Opens what is at the path. Where there is nothing, an empty database of this page size
    /// claims the path.
    pub(super) fn open_path(&mut self, size: Option<PageSize>) -> Result<()> {
        if !self.options.paths.database().exists() {
            let mode = self.options.database_mode.unwrap_or(files::PRIVATE);
            park([files::create_database(self.options.paths.database(), mode)?]);
            files::sync_name(self.options.paths.database())?;
        }
        let mut opened = recover::open(self.options.clone(), self.node.clone(), false);
        if matches!(opened, Err(Error::Unsupported { reason: Unsupported::NotWal(_), .. })) {
            self.turn_to_wal(size)?;
            opened = recover::open(self.options.clone(), self.node.clone(), false);
        }
        let mut opened = match opened {
            Ok(opened) => opened,
            Err(Error::Damaged { what, .. }) => {
                self.state = State::Closed;
                self.say_damaged(&what);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if opened.exact && opened.base.tip().position.epoch().number() > 0 {
            self.go_live(opened)
        } else if is_empty(&opened)? {
            self.cut_unused(&mut opened)?;
            self.state = State::Empty(self.begin(opened, false)?);
            Ok(())
        } else {
            let why = match opened.doubt()? {
                _ if self.rekeyed => "the names of its states went with another page key".into(),
                Some(why) => format!("it is damaged: {why}"),
                None => "it is no state of the cluster".into(),
            };
            let live = self.begin(opened, false)?;
            // What the file has of the WAL is not known either.
            live.base.index.set_backfilled(0);
            self.state = State::Unknown(live, Remedy::Heal);
            self.say_unread(&format!("{why}; what differs from the primary's is kept when it is replaced"));
            Ok(())
        }
    }

    /// Cuts what a snapshot left in an empty database's file, where none goes on from it. A writer
    /// that had no WAL there would take the file's length for the database's.
    fn cut_unused(&self, opened: &mut Findings) -> Result<()> {
        let (paths, key) = (&self.options.paths, self.options.page_key());
        if incoming::in_place(paths) && incoming::page_size(paths, key).is_some() {
            return Ok(());
        }
        let (base, page) = (opened.base.clone(), u64::from(opened.base.page_size.get()));
        // A mark that the node set after the page is less than another page.
        if opened.handle.size()? >= 2 * page {
            base.writing(|| opened.handle.truncate(page))?;
        }
        Ok(())
    }

    /// Turns to WAL an empty file, which gets this page size, or a database in rollback mode.
    fn turn_to_wal(&self, size: Option<PageSize>) -> Result<()> {
        let handle = Handle::open(self.options.paths.database(), false)?;
        let connection = handle.connection();
        if let Some(size) = size {
            connection.pragma_update(None, "page_size", size.get())?;
        }
        for _ in 0..TURNS {
            if handle.turn_to_wal()? == "wal" {
                break;
            }
            // SQLite does not say why. A write that changes nothing does, where the disk is full.
            let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
            connection.pragma_update(None, "user_version", version)?;
        }
        Ok(())
    }

    fn say_damaged(&self, why: &str) {
        self.say_unread(&format!("it is damaged: {why}; it is kept aside when a snapshot replaces it"));
    }

    fn say_unread(&self, why: &str) {
        let text = format!("the database here is not read from: {why}");
        self.node.report(Condition::StateNotRead { path: self.options.paths.database(), text: &text });
    }

    /// Begins to own what was opened.
    fn begin(&mut self, mut opened: Findings, redo: bool) -> Result<WalAppender> {
        opened.begin_if_empty()?;
        let mut opened = if redo { opened.redo()? } else { opened };
        recover::anchor(&opened.base, &mut opened.handle)?;
        self.history = opened.history;
        self.own(opened.base, opened.handle)
    }

    /// Makes what is open this replica's.
    pub(super) fn own(&mut self, database: Arc<OpenDatabase>, handle: Handle) -> Result<WalAppender> {
        database.when_lost(|database, error| {
            // The thread opens what is there, and the primary leads it to its state.
            let text = error.cause().to_string();
            database.node.report(Condition::FilesReplaced { database: database.path(), text: &text });
        });
        WalAppender::new(database, handle)
    }

    fn go_live(&mut self, opened: Findings) -> Result<()> {
        // Where the epochs were lost, or are older than the log, its records lead nowhere. The
        // primary sends them again.
        let logged = opened.base.log.tip();
        let redo = logged.is_none_or(|logged| opened.history.place(logged.txid()) == Place::OnHistory);
        let anchored = opened.known.clone();
        let live = self.begin(opened, redo)?;
        let position = live.position();
        let vouched = last_vouched(logged, position, &anchored);
        // A node that died while its primary led it back may have the epochs of the one history and
        // the state of the other.
        let vouched = vouched.filter(|state| self.history.place(state.txid()) == Place::OnHistory);
        if vouched != Some(position) {
            self.node.report(Condition::StateNotVouched { position, vouched });
        }
        // Pages of a snapshot that became the state before the node died. A snapshot with pages of
        // another size stays: it is to replace what is here.
        if incoming::progress(&self.options.paths, self.options.page_key())
            .is_some_and(|begun| begun.page_size == live.base.page_size)
        {
            incoming::discard(&self.options.paths)?;
        }
        self.state = State::Known(Served::new(live, Remedy::Heal));
        if let Some(found) = doubt::text(&self.options.paths) {
            self.node.report(Condition::PagesDoubted { found: &found });
            self.suspect(Suspect::Pages);
        }
        self.serve(vouched)
    }

    /// Serves what is open, which is a state of the cluster from now on if it was not before.
    /// Connections read from it, and its WAL is copied back. A primary vouches for the state
    /// `vouched`.
    pub(super) fn serve(&mut self, vouched: Option<Position>) -> Result<()> {
        self.state.become_known();
        let State::Known(served) = &mut self.state else { return Ok(()) };
        if served.checkpointer.is_none() {
            let term = served.term.clone();
            // Without that thread nothing would ever be copied back, nor read.
            let checkpointer = checkpointer(&term, &self.shared, self.commands.clone());
            served.checkpointer = Some(checkpointer.inspect_err(|error| term.fail(error))?);
            share_reads(&term);
            *lock(&self.shared.term) = Some(term.clone());
            tracing::info!(position = %term.tip().position, "the replica's state is open");
        }
        // Both change at one moment to those who look. A thread that has waited for a transaction
        // can read it, and a thread that may read has a position.
        self.shared.readable.send_modify(|readable| {
            self.node.applied.replace(self.history.clone(), vouched);
            *readable = true;
        });
        Ok(())
    }
}

/// Starts the thread that copies back what is applied, and syncs it.
fn checkpointer(
    term: &Arc<Term>,
    shared: &ApplyShared,
    commands: mpsc::WeakSender<ApplyCommand>,
) -> Result<JoinHandle<()>> {
    let ready = move || {
        if let Some(commands) = commands.upgrade() {
            // When the queue is full, the thread looks by itself after the next batch.
            let _ = commands.try_send(ApplyCommand::Restart);
        }
    };
    let replica = ReplicaSync { synced: shared.synced.clone(), ready: Box::new(ready) };
    let checkpointer = Checkpointer {
        base: term.clone(),
        handle: reader(term)?,
        replica: Some(replica),
        log_synced: Instant::now(),
        applied_synced: Instant::now(),
    };
    checkpointer.spawn()
}

/// Whether there is nothing that could be lost: one page, and no table in it.
fn is_empty(opened: &Findings) -> Result<bool> {
    let tables =
        || opened.handle.connection().query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0));
    Ok(opened.base.tip().pages <= 1 && tables().map(|tables: i64| tables == 0)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::engine::tests::{Home, assert_same, catch_up, open_plain, standing, until};
    use crate::report::Part;

    #[test]
    fn a_snapshot_replaces_what_could_not_be_opened_and_the_replica_goes_on_from_it() {
        let home = Home::new();
        let primary = home.primary("p.db");
        let writer = open_plain(&home.path("p.db"));
        writer.execute_batch("CREATE TABLE t(a); INSERT INTO t VALUES (1)").unwrap();
        let replica = home.follower("r.db");
        catch_up(&primary, &replica);
        let node = lock(&replica.shared.term).as_ref().unwrap().node.clone();
        for end in ["", "-wal", "-shm"] {
            fs::remove_file(home.path(&format!("r.db{end}"))).unwrap();
        }
        fs::write(home.path("r.db"), "no database at all".repeat(1000)).unwrap();
        until("the look", || standing(&replica).0.position.is_none());
        let problem = node.problem_of(Part::Engine).unwrap();
        assert!(problem.contains("can't be opened"), "{problem}");
        for n in 0..3 {
            writer.execute("INSERT INTO t VALUES (?1)", [n]).unwrap();
            catch_up(&primary, &replica);
        }
        assert_eq!(node.problem_of(Part::Engine), None);
        assert_same(&home.path("p.db"), &home.path("r.db"));
    }
}
