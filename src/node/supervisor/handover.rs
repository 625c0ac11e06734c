//! A primary that lives hands its role to another node: it takes no new requests, then no writes,
//! and goes on where that comes to nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::context::RoleChange;
use crate::engine::PrimaryEngine;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::node::supervisor::demotion::{WRITE_LOCK, WRITER_CONNECTION};
use crate::node::supervisor::{Supervisor, Turns};
use crate::status::Role;
use crate::txid::Position;

/// Longest wait between two looks whether the change is to end.
const LOOK: Duration = Duration::from_millis(5);

impl Supervisor {
    /// The primary takes no new requests. What runs goes on, and writes.
    ///
    /// # Errors
    /// [`Error::NotPrimary`] on a replica, and on a primary whose fence has ended.
    pub(crate) async fn yields(&self) -> Result<()> {
        self.change(|turns, _| turns.yields()).await
    }

    /// Nothing is committed here from now on: writes are refused, or wait for the write lock where
    /// they are other connections'. Returns the state with all that was committed. It is in the
    /// log, on the disk, and on its way to the replicas that are connected: another node can go on
    /// from it. Reads and streams go on, and what was committed is acknowledged.
    ///
    /// Ends with [`Supervisor::release_hold`], [`Supervisor::renew`] or [`Supervisor::demote`].
    ///
    /// # Errors
    /// - [`Error::Timeout`] when a write, or another connection's transaction, takes longer than
    ///   `limit`. It says which.
    /// - [`Error::NotPrimary`] on a replica, and when the fence ends meanwhile.
    /// - [`Error::Io`] when the log can't be synced.
    ///
    /// Writes go on as before then, unless the fence has ended.
    pub(crate) async fn withhold(&self, limit: Duration) -> Result<Position> {
        self.change(move |turns, _| turns.withhold(limit)).await
    }

    /// The primary goes on in its epoch, and takes writes and requests again, whether they were
    /// withheld or not. It acknowledges none while its fence is closed, and does so again when that
    /// is set in time: no other change has to follow then.
    ///
    /// # Errors
    /// [`Error::NotPrimary`] on a replica, and on a primary that was fenced: that is renewed or
    /// demoted.
    pub(crate) async fn release_hold(&self) -> Result<()> {
        self.change(|turns, _| turns.release_hold()).await
    }
}

impl Turns {
    fn yields(&self) -> Result<()> {
        self.slot.primary()?;
        // The fence sets another role.
        let _edge = lock(&self.edge);
        self.expect_lead()?;
        self.node.change_role(RoleChange::Yields);
        Ok(())
    }

    fn withhold(&self, limit: Duration) -> Result<Position> {
        let engine = self.slot.primary()?;
        self.expect_lead()?;
        let end = Instant::now() + limit;
        self.writer.refuse();
        let held = self.hold(&engine, limit).and_then(|position| {
            // Each waits for the disk at most, and the hold has brought all to the disk.
            self.writer.await_answers(end.saturating_duration_since(Instant::now()));
            self.expect_lead().map(|()| position)
        });
        if held.is_err() {
            // Where it has stopped, it says so itself.
            let _ = engine.release();
            // A fence that ends now refuses after that.
            if self.expect_lead().is_ok() {
                self.writer.accept();
            }
        }
        held
    }

    /// Has no connection write, within the limit.
    fn hold(&self, engine: &Arc<PrimaryEngine>, limit: Duration) -> Result<Position> {
        let end = Instant::now() + limit;
        let late = |what: &str| Error::Timeout { what: what.into(), after: limit };
        // What waits for the WAL's length has the writer's connection.
        engine.ease()?;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if self.writer.await_idle(left.min(LOOK)) {
                break;
            }
            self.expect_lead()?;
            if left.is_zero() {
                return Err(late(WRITER_CONNECTION));
            }
        }
        self.may_go_on()?;
        engine.hold(end.saturating_duration_since(Instant::now())).map_err(|error| match error {
            Error::Timeout { .. } => late(WRITE_LOCK),
            error => error,
        })
    }

    fn release_hold(&self) -> Result<()> {
        let engine = self.slot.primary()?;
        self.expect_unfenced()?;
        // Without the edge: the fence waits for nothing.
        engine.release()?;
        let mut edge = lock(&self.edge);
        self.expect_unfenced()?;
        self.lead_on(&engine, &mut edge)
    }

    /// Fails unless this node is the primary, and was not fenced. Its fence may be closed for a
    /// moment: a peer named an epoch that is not later.
    fn expect_unfenced(&self) -> Result<()> {
        self.may_go_on()?;
        let role = self.node.roles.borrow().role;
        match role {
            Role::Primary => Ok(()),
            _ => Err(Error::NotPrimary { primary: None }),
        }
    }

    /// Fails unless this node is the primary, and its fence is open.
    fn expect_lead(&self) -> Result<()> {
        self.may_go_on()?;
        match self.node.leads() {
            true => Ok(()),
            false => Err(Error::NotPrimary { primary: None }),
        }
    }
}
