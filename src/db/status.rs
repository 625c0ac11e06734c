//! How the node stands: status and health.

use std::sync::atomic::Ordering;

use crate::context::NodeContext;
use crate::db::Db;
use crate::node::database::Database;
use crate::node::slot::Running;
use crate::report::Part;
use crate::status::{Health, Role, Status};

impl Db {
    /// How this node stands, for people and dashboards.
    pub fn status(&self) -> Status {
        self.inner.status()
    }

    /// Whether this node can do its work.
    ///
    /// `can_read` stays true for a grace time ([`Config::grace`](crate::Config::grace)) after the
    /// node lost its primary. A balancer that drops every replica while the primary is away would
    /// make the outage itself. A node that elects a primary, waits for one, or is about to become
    /// one reads on. `can_read` is false while reads fail for a reason outside of their statements,
    /// such as a disk, or a descriptor, that can't be had. Then this very call reads a little: a
    /// node without other reads recovers by that. `can_write` is false while there is no primary,
    /// and on one that has stopped or whose lease has ended.
    pub fn health(&self) -> Health {
        self.inner.health(&self.inner.status())
    }
}

impl Database {
    /// See [`Db::status`].
    pub(super) fn status(&self) -> Status {
        let node = &self.node;
        let roles = node.roles.borrow().clone();
        let running = self.slot.get().ok();
        let (wal, log) = running.as_ref().map(|running| (running.wal(), running.log())).unwrap_or_default();
        Status {
            node: node.me.node,
            incarnation: node.me.incarnation,
            key: node.channel.key(),
            database: node.database.clone(),
            role: roles.role,
            epoch: roles.epoch,
            position: node.applied.position(),
            primary: roles.primary,
            primary_key: match roles.role {
                Role::Primary => node.channel.key(),
                _ => roles.primary_key,
            },
            lag: node.lag(),
            replicas: self.replica_server.replicas(),
            wal_frames: wal.frames,
            backfilled_frames: wal.backfilled,
            log_start: log.as_ref().and_then(|log| log.start()),
            locks_lost: wal.locks_lost,
            heals: match &running {
                Some(Running::Replica(engine)) => engine.heals(),
                Some(Running::Primary(_)) | None => 0,
            },
            recovered: self.recovered,
            log_bytes: log.map_or(0, |log| log.bytes()),
            verification: self.verifier.last(),
            waits_for: roles.waits_for,
            decisions: self.elector.as_ref().map(|elector| elector.decisions()).unwrap_or_default(),
            problem: node.problem(),
            public_problems: node.public_problems(),
        }
    }

    /// Whether it was not closed, and replication has not failed.
    pub(super) fn is_live(&self) -> bool {
        !self.closed.load(Ordering::Acquire) && self.node.roles.borrow().role != Role::Stopped
    }

    /// See [`Db::health`]. It is that of a node with this status.
    pub(super) fn health(&self, status: &Status) -> Health {
        let mut reasons = Vec::new();
        let closed = self.closed.load(Ordering::Acquire);
        let live = !closed && status.role != Role::Stopped;
        if closed {
            reasons.push("shut down".to_string());
        }
        let draining = self.node.is_draining();
        if draining {
            reasons.push("draining".to_string());
        }
        // Where there are no other reads, only this one finds that they work again.
        if self.node.reads_may_work() {
            self.try_read();
        }
        let astray = self.node.astray();
        let state = self.readable().map_err(|e| reasons.extend((!astray).then(|| e.to_string()))).is_ok();
        let fresh = match (status.role, status.lag) {
            (Role::Replica, Some(lag)) => lag.stale <= self.grace,
            (Role::Replica, None) => self.opened.elapsed() <= self.grace,
            _ => true,
        };
        if !fresh {
            reasons.push(format!("nothing new from the primary for longer than {:?}", self.grace));
        }
        if live && status.primary.is_none() {
            reasons.push(why_without_primary(&self.node));
        }
        // The stream stands, but nothing comes: the primary may be gone. What was heard is among
        // the problems.
        let silent = status.role == Role::Replica && status.lag.is_some_and(|lag| !lag.connected);
        // What stops a replica stops no write: those are the primary's.
        let stopped = status.role == Role::Primary
            && [Part::Engine, Part::Room].iter().any(|part| self.node.has_problem(*part));
        let fenced = matches!(status.role, Role::Primary | Role::Fencing) && self.node.is_fenced();
        if live && fenced {
            reasons.push("the lease has ended, and no write is acknowledged".to_string());
        }
        reasons.extend(self.node.problem());
        Health {
            live,
            can_read: live && !draining && state && fresh && !self.node.has_problem(Part::Reads),
            can_write: live && !draining && status.primary.is_some() && !silent && !stopped && !fenced,
            reasons,
        }
    }
}

/// Says for which reason there is no primary.
fn why_without_primary(node: &NodeContext) -> String {
    let state = node.roles.borrow();
    match (state.role, state.waits_for) {
        (_, Some(reason)) => format!("there is no primary: {reason}"),
        (Role::Starting, _) => "it is not known yet who the primary is".to_string(),
        (Role::Electing, _) => "there is no primary: the nodes elect one".to_string(),
        (Role::Primary, _) => "this node hands the lease to another one".to_string(),
        (Role::Promoting, _) => "this node is about to become the primary".to_string(),
        _ => "the primary is not reachable".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use crate::context::RoleChange;
    use crate::db::{Config, Db};
    use crate::status::{Role, WaitReason};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_node_without_a_primary_reads_on_and_says_what_it_waits_for() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::new(dir.path().join("a.db")).grace(std::time::Duration::ZERO);
        let db = Db::open(config).await.unwrap();
        let node = db.inner.node.clone();
        assert!(db.health().can_read && db.health().can_write);
        let says = |word: &str| {
            let health = db.health();
            assert!(health.live && health.can_read && !health.can_write, "{health:?}");
            assert!(health.reasons.iter().any(|reason| reason.contains(word)), "{health:?}");
        };
        node.fence.close();
        says("the lease has ended");
        for (role, waits_for, word) in [
            (Role::Fencing, None, "the lease has ended"),
            (Role::Waiting, Some(WaitReason::Paused), "elections are paused"),
            (Role::Electing, None, "elect"),
            (Role::Promoting, None, "about to become"),
            (Role::Starting, None, "not known yet"),
        ] {
            node.change_role(RoleChange::Stands { role, waits_for });
            says(word);
        }
        db.shutdown().await;
    }
}
