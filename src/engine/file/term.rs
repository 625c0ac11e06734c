//! What a role's time on an open database owns: whether it is to end, and why it failed.
//!
//! The open database stays when its role changes. The term goes, and with it the threads that hold
//! it.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::engine::file::database::{OpenDatabase, Tip};
use crate::engine::file::progress::Patience;
use crate::error::{Cause, Error, Result};
use crate::lock::lock;
use crate::wal::Salts;

/// One role's time on an open database.
#[derive(Debug)]
pub(in crate::engine) struct Term {
    database: Arc<OpenDatabase>,
    ends: AtomicBool,
    failed: Mutex<Option<Cause>>,
}

/// The database of the term.
impl Deref for Term {
    type Target = OpenDatabase;

    fn deref(&self) -> &OpenDatabase {
        &self.database
    }
}

impl Term {
    pub(in crate::engine) fn new(database: Arc<OpenDatabase>) -> Arc<Term> {
        Arc::new(Term { database, ends: AtomicBool::new(false), failed: Mutex::new(None) })
    }

    /// The open database, which outlives the term.
    pub(in crate::engine) fn database(&self) -> &Arc<OpenDatabase> {
        &self.database
    }

    /// The term's threads end.
    pub(in crate::engine) fn end(&self) {
        self.ends.store(true, Ordering::Release);
    }

    pub(in crate::engine) fn stopping(&self) -> bool {
        self.ends.load(Ordering::Acquire)
    }

    /// Fails when the term has ended, and says why.
    pub(in crate::engine) fn check(&self) -> Result<()> {
        self.sound()?;
        if self.stopping() { Err(Error::ShutDown) } else { Ok(()) }
    }

    /// Fails when the term has ended by a failure.
    pub(in crate::engine) fn sound(&self) -> Result<()> {
        self.database.intact()?;
        lock(&self.failed).as_ref().map_or(Ok(()), |why| Err(Error::Stopped(why.clone())))
    }

    /// Whether it has failed, also when it is to end.
    pub(in crate::engine) fn failed(&self) -> bool {
        self.sound().is_err()
    }

    /// Stops replication of this database for good, loudly.
    pub(in crate::engine) fn fail(&self, error: &Error) {
        if matches!(error, Error::ShutDown) {
            return;
        }
        {
            let mut failed = lock(&self.failed);
            if failed.is_some() || self.database.intact().is_err() {
                return; // The first failure is the cause of the others.
            }
            *failed = Some(error.cause());
        }
        self.database.wake();
        self.node.fail(error);
    }

    /// Waits until the tip has reached the frame, or the WAL was restarted (then it had).
    pub(in crate::engine) fn wait_tip(&self, salts: Salts, frame: u32) -> Result<Tip> {
        self.wait_captured(|tip| tip.has(salts, frame).then_some(*tip))
    }

    /// Waits until capture has done something, for as long as it does anything.
    pub(in crate::engine) fn wait_captured<T>(&self, done: impl Fn(&Tip) -> Option<T>) -> Result<T> {
        let mut patience = Patience::new(&self.progress, Instant::now());
        self.database.wait_moved(|tip| {
            self.check()?;
            match done(tip) {
                Some(found) => Ok(Ok(found)),
                None => Ok(Err(patience.left(&self.progress, Instant::now())?)),
            }
        })
    }
}
