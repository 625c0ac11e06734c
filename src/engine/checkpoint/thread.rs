//! The thread that copies frames back into the database file, and on a replica syncs what was
//! applied.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::descriptors;
use crate::engine::checkpoint::backfill::{REST_MAX_FRAMES, backfill_some};
use crate::engine::file::term::Term;
use crate::engine::history::append_or_gap;
use crate::error::{Error, Result};
use crate::files::reserve;
use crate::lock::lock;
use crate::report::{Condition, Part};
use crate::sqlite::Handle;
use crate::threads;
use crate::txid::Position;
use crate::wal::frame_bytes;

/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(50);
/// Pause after a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a replica fsyncs what it applied.
const APPLIED_SYNC: Duration = Duration::from_millis(200);
/// How often the thread fsyncs the log when nothing else asks for it.
const LOG_SYNC: Duration = Duration::from_secs(1);
/// How often the thread looks for the reserve, and makes it again on a disk that was full.
const ROOM_LOOK: Duration = Duration::from_secs(1);
/// The fewest frames that are worth a backfill.
const FRAMES_MIN: u32 = 64;

pub(in crate::engine) struct Checkpointer {
    pub(in crate::engine) base: Arc<Term>,
    pub(in crate::engine) handle: Handle,
    /// On a replica, which holds the write lock for life.
    pub(in crate::engine) replica: Option<ReplicaSync>,
    pub(in crate::engine) log_synced: Instant,
    pub(in crate::engine) applied_synced: Instant,
}

pub(in crate::engine) struct ReplicaSync {
    pub(in crate::engine) synced: watch::Sender<Option<Position>>,
    /// Tells the apply thread that the WAL may be ready for a restart.
    pub(in crate::engine) ready: Box<dyn Fn() + Send>,
}

impl Checkpointer {
    pub(in crate::engine) fn spawn(self) -> Result<JoinHandle<()>> {
        threads::start("replite-ckpt", self, Checkpointer::run, |this, ended| {
            if let Err(error) = ended {
                this.base.fail(&error);
            }
        })
    }

    fn run(&mut self) -> Result<()> {
        let mut pause = Instant::now();
        let mut failing = false;
        let mut room = None;
        while self.base.check().is_ok() {
            if Instant::now() >= pause {
                self.keep_reserve(&mut room);
                match self.look() {
                    Ok(()) if failing => {
                        failing = false;
                        self.base.node.report(Condition::CheckpointWorks);
                    }
                    Ok(()) | Err(Error::ShutDown) => {}
                    // The node has reported it, for good.
                    Err(_) if self.base.sound().is_err() => {
                        if let (true, Some(replica)) = (self.base.lost(), &self.replica) {
                            (replica.ready)();
                        }
                    }
                    Err(error) => {
                        self.base.note_room(&error);
                        // The WAL grows meanwhile. Nothing is lost, and the thread makes the copy
                        // again from its begin.
                        if !failing {
                            self.base.node.report(Condition::CheckpointFails { error: &error });
                        }
                        failing = true;
                        pause = Instant::now() + PAUSE;
                    }
                }
            }
            std::thread::park_timeout(LOOK);
            // Descriptors that became free are the reserve's before a stranger has them.
            descriptors::refill();
        }
        Ok(())
    }

    /// Keeps a reserve for the day when the disk is full. Whether the thread can make one tells
    /// whether it is.
    fn keep_reserve(&self, last: &mut Option<Instant>) {
        let (node, directory) = (&self.base.node, self.base.options.paths.state_dir());
        if last.is_some_and(|last| last.elapsed() < ROOM_LOOK) || self.base.check().is_err() {
            return;
        }
        let first = last.replace(Instant::now()).is_none();
        // At first in any case: the code that opened us may have found no room.
        if !first && reserve::is_there(directory) && !node.has_problem(Part::Room) {
            return;
        }
        match reserve::make(directory) {
            Ok(()) => node.report(Condition::RoomFound),
            Err(error) if error.no_room() => node.no_room(error),
            Err(error) => tracing::debug!(%error, "no reserve can be made"),
        }
    }

    fn look(&mut self) -> Result<()> {
        self.base.check()?;
        self.base.expect_files()?;
        self.base.mend_locks(&mut self.handle)?;
        // For connections that are not the pool's, and after any that missed something.
        self.base.options.read_mark.follow();
        self.base.options.read_mark.join();
        let logged = self.sync_log();
        // The thread copies the WAL back all the same. A disk that fails the log would else make
        // the WAL grow for ever.
        let copied = self.copy_back();
        logged.and(copied)
    }

    fn sync_log(&mut self) -> Result<()> {
        if self.log_synced.elapsed() > LOG_SYNC && !*lock(&self.base.log_broken) {
            // Here, so no append ever has to do it.
            self.log_synced = Instant::now();
            append_or_gap::sync(&self.base)?;
        }
        if let Some(replica) = &self.replica {
            // What a primary vouches for: the replica acknowledges nothing else.
            let position = self.base.node.applied.position();
            let before = *replica.synced.borrow();
            if before != position && self.applied_synced.elapsed() >= APPLIED_SYNC {
                self.applied_synced = Instant::now();
                // The log first: no one would vouch for a record that the WAL has and the log
                // lacks.
                append_or_gap::sync(&self.base)?;
                self.base.sync_wal()?;
                replica.synced.send_if_modified(|now| {
                    // A sync that was asked for meanwhile came further than this one.
                    let mine = *now == before;
                    if mine {
                        *now = position;
                    }
                    mine
                });
            }
        }
        Ok(())
    }

    fn copy_back(&mut self) -> Result<()> {
        let frames = self.base.tip().frame;
        let limit = self.base.options.wal_limit_bytes / frame_bytes(self.base.page_size) as u64;
        let worth = ((limit / 4).min(u64::from(u32::MAX)) as u32).max(FRAMES_MIN);
        let behind = frames.saturating_sub(self.base.index.backfilled());
        let long = u64::from(frames) > limit;
        let due = if self.base.bound.squeezed() {
            // The thread that begins the WAL anew copies what is left then.
            behind > REST_MAX_FRAMES
        } else {
            behind > worth || (long && behind > FRAMES_MIN)
        };
        if due {
            backfill_some(&self.base, &mut self.handle, self.replica.is_some())?;
        }
        if (long || self.base.bound.asked().is_some())
            && let Some(replica) = &self.replica
        {
            (replica.ready)();
        }
        Ok(())
    }
}
