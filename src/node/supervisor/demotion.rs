//! A primary becomes a replica.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{NotTurned, Opened, PrimaryEngine};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::node::slot::Running;
use crate::node::supervisor::{BesideEngine, Turns, wait_for};
use crate::report::Condition;
use crate::status::Role;
use crate::txid::Position;

/// Between two looks whether the writer's connection is back.
const WRITER_STEP: Duration = Duration::from_millis(1);
/// How long capture tries for the write lock before it is asked again.
const WRITE_STEP: Duration = Duration::from_millis(200);
/// Between two tries of what the disk refuses.
const DISK_STEP: Duration = Duration::from_millis(100);
/// After which the application is told what the change waits for.
const TOLD_AFTER: Duration = Duration::from_secs(1);
/// How long capture has, after the fence, for what was committed.
const CAPTURE_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 20 } else { 1 });
/// How long the streams have for what is still to be sent.
const STREAMS_LIMIT: Duration = Duration::from_secs(1);
/// The same where the lease was handed over. The next primary has all then, and what another
/// replica lacks it gets there.
const STREAMS_AFTER_HANDOFF: Duration = Duration::from_millis(100);

/// What a change may wait for.
pub(super) const WRITER_CONNECTION: &str = "the writer connection, which the application has";
pub(super) const WRITE_LOCK: &str = "the write lock, which another connection has";

/// Says once what a change waits for, if it does for long.
struct HeldUp<'a> {
    turns: &'a Turns,
    begun: Instant,
    told: bool,
}

impl HeldUp<'_> {
    fn waits_for(&mut self, what: &str) {
        if !self.told && self.begun.elapsed() >= TOLD_AFTER {
            self.told = true;
            let database = self.turns.options.paths.database();
            self.turns.node.report_aside(Condition::DemotionWaits { database, what });
        }
    }
}

impl Drop for HeldUp<'_> {
    fn drop(&mut self) {
        if self.told {
            self.turns.node.report_aside(Condition::DemotionGoesOn);
        }
    }
}

impl Turns {
    pub(super) fn demote(&self, standing: &mut BesideEngine) -> Result<Option<Position>> {
        let engine = match self.slot.get()? {
            Running::Primary(engine) => engine,
            Running::Replica(engine) => {
                self.follow(standing, None)?;
                return engine.vouched();
            }
        };
        // Requests wait for the next primary from now on.
        self.stands(Role::Fencing);
        self.take_leave(standing);
        let left = self.leave(&engine).and_then(|opened| {
            let position = opened.position();
            self.back(opened).map(|()| position)
        });
        match left {
            Ok(position) => {
                self.stands(Role::Replica);
                Ok(Some(position))
            }
            Err(error) => {
                self.replica_server.set(None);
                Err(self.stopped(error))
            }
        }
    }

    /// Ends the primary's role. The writer is closed first, and WRITE is taken as soon as it is
    /// free. Then the streams have sent what they are to send, or have had the time.
    pub(super) fn leave(&self, engine: &Arc<PrimaryEngine>) -> Result<Opened> {
        let mut held_up = HeldUp { turns: self, begun: Instant::now(), told: false };
        let limit = if self.replica_server.has_handed() { STREAMS_AFTER_HANDOFF } else { STREAMS_LIMIT };
        self.writer.refuse();
        self.end_streams_if_late(engine);
        while !self.writer.try_close() {
            self.end_streams_if_late(engine);
            self.may_go_on()?;
            held_up.waits_for(WRITER_CONNECTION);
            std::thread::sleep(WRITER_STEP);
        }
        let opened = loop {
            match engine.stop(WRITE_STEP) {
                Err(Error::Timeout { .. }) => {}
                left => break left?,
            }
            self.end_streams_if_late(engine);
            self.may_go_on()?;
            held_up.waits_for(WRITE_LOCK);
        };
        drop(held_up);
        if lock(&self.edge).take().is_some_and(|fenced_at| opened.position().number() > fenced_at) {
            self.node.set_late(true);
        }
        self.end_streams(engine);
        // One that takes nothing does not hold up the others.
        let _ = wait_for(async { tokio::time::timeout(limit, self.replica_server.deserted()).await })?;
        self.replica_server.set(None);
        Ok(opened)
    }

    /// Once the fence has ended nothing more goes to replicas, and what runs is interrupted. Before
    /// that the log gets what is committed: part of it may be acknowledged, and is nowhere else.
    fn end_streams_if_late(&self, engine: &PrimaryEngine) {
        if self.node.fence.is_open() {
            return;
        }
        self.writer.interrupt();
        if engine.last().is_none() {
            lock(&self.edge).get_or_insert(self.number());
            engine.await_capture(CAPTURE_LIMIT);
            self.end_streams(engine);
        }
    }

    fn end_streams(&self, engine: &PrimaryEngine) {
        engine.end_streams();
        self.replica_server.leave();
    }

    /// Goes on as a replica, as soon as the disk allows.
    pub(super) fn back(&self, mut opened: Opened) -> Result<()> {
        let replica = loop {
            match opened.into_replica() {
                Ok(replica) => break replica,
                Err(NotTurned { error: error @ Error::Io { .. }, opened: Some(again) }) => {
                    self.may_go_on()?;
                    self.node.report(Condition::TurnRetried { error: &error });
                    if error.no_room() {
                        self.node.no_room(&error);
                    }
                    std::thread::sleep(DISK_STEP);
                    opened = *again;
                }
                Err(NotTurned { error, .. }) => return Err(error),
            }
        };
        self.node.report(Condition::DemotionGoesOn);
        self.run(Running::Replica(Arc::new(replica)))
    }
}
