//! Whether capture has all that readers see. A task that serves a request waits for it.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::engine::capture::handle::PrimaryEngine;
use crate::engine::file::progress::Patience;
use crate::engine::file::term::Term;
use crate::lock::lock;
use crate::txid::Txid;
use crate::wal::Salts;

/// When to look again at a header that somebody is in the middle of writing.
const HEADER_STEP: Duration = Duration::from_millis(1);
/// Between two looks how far capture is.
const CAPTURE_STEP: Duration = Duration::from_millis(1);

impl PrimaryEngine {
    /// None: all that readers see by now is captured, and the position has it.
    pub(crate) fn uncounted(&self) -> Option<Uncounted> {
        let until = end(&self.base);
        if until.is_some_and(|(salts, frame)| self.base.tip().has(salts, frame)) {
            return None;
        }
        self.waker.wake();
        let (base, moved) = (Arc::downgrade(&self.base), self.base.moved());
        Some(Uncounted { base, until, patience: None, moved })
    }

    /// The last commit that there is, where our own writer made it: its number is known before
    /// capture has it. All that others committed before has a lower one.
    pub(crate) fn last_of_ours(&self) -> Option<Txid> {
        let last = (*lock(&self.last))?;
        let is_last = end(&self.base) == Some((last.salts, last.frame));
        self.txid(last.number).filter(|_| is_last)
    }

    /// Waits until the log has what is committed by now, for at most `limit`. Blocks.
    pub(crate) fn await_capture(&self, limit: Duration) {
        let begun = Instant::now();
        let mut until = None;
        while begun.elapsed() < limit && self.base.sound().is_ok() && !self.base.stopping() {
            until = until.or_else(|| end(&self.base));
            if until.is_some_and(|(salts, frame)| self.base.tip().has(salts, frame)) {
                return;
            }
            self.waker.wake();
            std::thread::sleep(CAPTURE_STEP);
        }
    }
}

/// What is committed ends there. None while a process writes the header.
fn end(base: &Term) -> Option<(Salts, u32)> {
    base.index.header().map(|header| (header.salts, header.max_frame))
}

/// What readers saw when capture may not have had all of it. This keeps nothing open.
#[derive(Debug)]
pub(crate) struct Uncounted {
    base: Weak<Term>,
    until: Option<(Salts, u32)>,
    patience: Option<Patience>,
    /// Wakes when it is time to look again.
    pub(crate) moved: watch::Receiver<()>,
}

impl Uncounted {
    /// Whether the position has it by now. False: it never will, because replication has stopped,
    /// or capture does nothing any more; or the term has ended, at whose end capture takes in the
    /// rest. The end of the lease changes nothing: capture goes on.
    ///
    /// # Errors
    /// When to look again, unless `moved` wakes before.
    pub(crate) fn look(&mut self) -> Result<bool, Duration> {
        self.moved.mark_unchanged();
        let Some(base) = self.base.upgrade() else { return Ok(false) };
        self.until = self.until.or_else(|| end(&base));
        if self.until.is_some_and(|(salts, frame)| base.tip().has(salts, frame)) {
            return Ok(true);
        }
        if base.sound().is_err() {
            return Ok(false);
        }
        let now = Instant::now();
        let patience = self.patience.get_or_insert_with(|| Patience::new(&base.progress, now));
        match patience.left(&base.progress, now) {
            Ok(left) => Err(if self.until.is_some() { left } else { HEADER_STEP }),
            Err(_) => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::{Home, open_plain, settled, until};
    use crate::error::Error;

    /// Looks until it knows.
    fn looks(mut uncounted: Uncounted) -> std::thread::JoinHandle<bool> {
        std::thread::spawn(move || {
            loop {
                match uncounted.look() {
                    Ok(counted) => return counted,
                    Err(left) => std::thread::park_timeout(left),
                }
            }
        })
    }

    #[test]
    fn what_readers_see_is_waited_for_until_the_position_has_it() {
        let home = Home::new();
        open_plain(&home.path("p.db")).execute_batch("CREATE TABLE t(a)").unwrap();
        let engine = home.primary("p.db");
        let before = settled(&engine);
        assert!(engine.uncounted().is_none(), "it has all");
        for fails in [false, true] {
            engine.group_sync.hold(true);
            let foreign = open_plain(&home.path("p.db"));
            foreign.execute_batch("INSERT INTO t VALUES (1)").unwrap();
            let uncounted = engine.uncounted().unwrap();
            until("the fsync", || engine.base.progress.is_on_disk());
            let position = || engine.base.node.applied.position().unwrap().number();
            if fails {
                engine.fail(&Error::Disturbed("by intent".into()));
                assert!(!looks(uncounted).join().unwrap(), "it never will");
                assert_eq!(position(), before.number() + 1);
                engine.group_sync.hold(false);
                continue;
            }
            assert_eq!(position(), before.number());
            let waiting = looks(uncounted);
            // What comes later is not waited for.
            foreign.execute_batch("INSERT INTO t SELECT 2 WHERE 0").unwrap();
            engine.group_sync.hold(false);
            assert!(waiting.join().unwrap());
            assert_eq!(position(), before.number() + 1);
            assert!(engine.uncounted().is_none());
        }
    }

    #[test]
    fn a_header_in_the_making_is_looked_at_again_whether_the_lease_has_ended_or_not() {
        let home = Home::new();
        open_plain(&home.path("p.db")).execute_batch("CREATE TABLE t(a)").unwrap();
        let engine = home.primary("p.db");
        settled(&engine);
        let foreign = open_plain(&home.path("p.db"));
        foreign.execute_batch("BEGIN IMMEDIATE").unwrap();
        for fenced in [false, true] {
            engine.base.index.tear(0);
            let waiting = looks(engine.uncounted().unwrap());
            if fenced {
                let node = &engine.base.node;
                node.roles.send_modify(|state| state.role = crate::status::Role::Fencing);
            }
            engine.base.index.tear(0);
            assert!(waiting.join().unwrap());
        }
        foreign.execute_batch("ROLLBACK").unwrap();
    }
}
