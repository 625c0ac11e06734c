//! What this instance's role was, and when it changed.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use replite::{Db, Event, Role, RoleState};
use serde::Serialize;
use tokio::sync::watch;

/// Changes that are kept.
const CHANGES_MAX: usize = 20;

/// What holds from a moment on.
#[derive(Clone, PartialEq, Serialize)]
pub(crate) struct Change {
    /// Milliseconds since 1970.
    at_ms: u64,
    pub(crate) role: Role,
    epoch: u64,
    /// The URL of the primary.
    primary: Option<String>,
    /// Why this instance does not become the primary, where there is none.
    waits_for: Option<String>,
}

impl Change {
    fn to(state: &RoleState) -> Change {
        Change {
            at_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64),
            role: state.role,
            epoch: state.epoch.number(),
            primary: state.primary.as_ref().map(|primary| primary.addresses.app.clone()),
            waits_for: state.waits_for.as_ref().map(ToString::to_string),
        }
    }

    /// Whether it is a change by itself. Without a primary only the role is: reasons, and epochs on
    /// the way to one, may change often.
    fn is_other(&self, than: &Change) -> bool {
        let epoch = |change: &Change| change.primary.as_ref().map(|_| change.epoch);
        (self.role, &self.primary, epoch(self)) != (than.role, &than.primary, epoch(than))
    }
}

/// The last changes, the oldest first. They are noted until the database is closed.
pub(crate) fn watch(db: &Db) -> watch::Receiver<VecDeque<Change>> {
    // Before the look at what holds now: between the two nothing is missed.
    let mut events = db.events();
    let roles = db.roles();
    let (sender, receiver) = watch::channel(VecDeque::from([Change::to(&roles.borrow())]));
    tokio::spawn(async move {
        // Events and no watch: that would leave out a role that lasts for a moment.
        while let Some(event) = events.next().await {
            let change = match event {
                Event::Role { state, .. } => Change::to(&state),
                Event::Missed { .. } => Change::to(&roles.borrow()),
                _ => continue,
            };
            sender.send_modify(|changes| note(changes, change));
        }
    });
    receiver
}

fn note(changes: &mut VecDeque<Change>, change: Change) {
    match changes.back_mut() {
        Some(last) if !change.is_other(last) => *last = Change { at_ms: last.at_ms, ..change },
        _ => changes.push_back(change),
    }
    if changes.len() > CHANGES_MAX {
        changes.pop_front();
    }
}
