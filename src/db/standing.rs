//! How the node stands: status and health.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::db::{Db, Side};
use crate::status::{Health, Role, Status};

impl Db {
    /// How this node stands, for people and dashboards.
    pub fn status(&self) -> Status {
        let inner = &self.inner;
        let node = &inner.node;
        let roles = node.roles.borrow().clone();
        let (wal, log) = match &inner.side {
            Side::Primary { engine, .. } => match engine.get() {
                Ok(engine) => (engine.wal(), Some(engine.log().clone())),
                Err(_) => Default::default(),
            },
            Side::Replica { follower, .. } => (follower.wal(), follower.log()),
        };
        Status {
            node: node.me.node,
            incarnation: node.me.incarnation,
            database: node.database.clone(),
            role: roles.role,
            epoch: roles.epoch,
            position: node.applied.position(),
            primary: roles.primary,
            lag: *node.lag.lock().unwrap_or_else(PoisonError::into_inner),
            replicas: inner.source.replicas(),
            wal_frames: wal.frames,
            backfilled_frames: wal.backfilled,
            log_start: log.as_ref().and_then(|log| log.start()),
            locks_lost: wal.locks_lost,
            heals: match &inner.side {
                Side::Primary { .. } => 0,
                Side::Replica { follower, .. } => follower.heals(),
            },
            recovered: inner.recovered,
            log_bytes: log.map_or(0, |log| log.bytes()),
            verification: inner.verifier.last(),
            problem: node.problem(),
        }
    }

    /// Whether this node can do its work.
    ///
    /// `can_read` stays true for a grace time ([`Config::grace`](crate::Config::grace)) after the primary was lost: a balancer that
    /// drops every replica while the primary is away would make the outage itself.
    pub fn health(&self) -> Health {
        let inner = &self.inner;
        let status = self.status();
        let mut reasons = Vec::new();
        let closed = inner.closed.load(Ordering::Acquire);
        let live = !closed && status.role != Role::Stopped;
        if closed {
            reasons.push("shut down".to_string());
        }
        let draining = inner.node.drain.is_cancelled();
        if draining {
            reasons.push("draining".to_string());
        }
        let state = inner.readable().map_err(|e| reasons.push(e.to_string())).is_ok();
        let fresh = match (status.role, status.lag) {
            (Role::Replica, Some(lag)) => u128::from(lag.millis) <= inner.grace.as_millis(),
            (Role::Replica, None) => inner.opened.elapsed() <= inner.grace,
            _ => true,
        };
        if !fresh {
            reasons.push(format!("nothing new from the primary for longer than {:?}", inner.grace));
        }
        if live && status.primary.is_none() {
            reasons.push("the primary is not reachable".to_string());
        }
        reasons.extend(status.problem.clone());
        Health {
            live,
            can_read: live && !draining && state && fresh,
            can_write: live && !draining && status.primary.is_some(),
            reasons,
        }
    }
}
