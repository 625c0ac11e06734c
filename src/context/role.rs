//! The node's role: one value, changed at one place.

use tokio::sync::watch;

use crate::peer::PeerKey;
use crate::status::{PeerInfo, Role, RoleState, WaitReason};
use crate::txid::Epoch;

/// What happens to a node's role.
#[derive(Clone, Debug)]
pub(crate) enum RoleChange {
    /// It is the primary, of this epoch.
    Leads { me: PeerInfo, epoch: Epoch },
    /// It hands its lease over: it leads, and takes no new requests. [`RoleChange::Leads`] takes
    /// that back.
    Yields,
    /// The primary's epoch was followed by another.
    Epoch(Epoch),
    /// It follows a primary, which has proved this key. None: it does not reach one.
    Follows { primary: Option<(PeerInfo, Option<PeerKey>)>, epoch: Epoch },
    /// It has no primary, and does this about it.
    Stands { role: Role, waits_for: Option<WaitReason> },
    /// Replication has stopped, or the node is closed.
    Stopped,
}

/// The role that a node has, for all who look at it. Only [`RoleValue::change`] writes it.
#[derive(Debug)]
pub(crate) struct RoleValue(watch::Sender<RoleState>);

impl RoleValue {
    pub(crate) fn new(role: Role) -> RoleValue {
        RoleValue(watch::Sender::new(RoleState {
            role,
            epoch: Epoch::new(0, 0),
            primary: None,
            primary_key: None,
            waits_for: None,
        }))
    }

    pub(crate) fn borrow(&self) -> watch::Ref<'_, RoleState> {
        self.0.borrow()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<RoleState> {
        self.0.subscribe()
    }

    #[cfg(test)]
    pub(crate) fn receiver_count(&self) -> usize {
        self.0.receiver_count()
    }

    #[cfg(test)]
    pub(crate) fn send_modify(&self, change: impl FnOnce(&mut RoleState)) {
        self.0.send_modify(change);
    }

    /// Changes the role. A role that has stopped stays so. Returns the new state, if it is another
    /// one.
    pub(super) fn change(&self, change: RoleChange) -> Option<RoleState> {
        let mut changed = None;
        self.0.send_if_modified(|now| {
            let next = next(now, change);
            let other = next != *now;
            if other {
                now.clone_from(&next);
                changed = Some(next);
            }
            other
        });
        changed
    }
}

fn next(now: &RoleState, change: RoleChange) -> RoleState {
    let state = |role, epoch, primary| RoleState { role, epoch, primary, primary_key: None, waits_for: None };
    match change {
        _ if now.role == Role::Stopped => now.clone(),
        RoleChange::Leads { me, epoch } => state(Role::Primary, epoch, Some(me)),
        RoleChange::Yields if now.role == Role::Primary => RoleState { primary: None, ..now.clone() },
        RoleChange::Yields => now.clone(),
        RoleChange::Epoch(epoch) => {
            RoleState { primary_key: now.primary_key, ..state(now.role, epoch, now.primary.clone()) }
        }
        // It looks for one, and says how.
        RoleChange::Follows { primary: None, epoch }
            if matches!(now.role, Role::Starting | Role::Electing | Role::Waiting | Role::Promoting) =>
        {
            RoleState { epoch, primary: None, primary_key: None, ..now.clone() }
        }
        RoleChange::Follows { primary, epoch } => {
            let (primary, primary_key) = primary.unzip();
            let primary_key = primary_key.flatten();
            RoleState { primary_key, ..state(Role::Replica, epoch, primary) }
        }
        // A node whose stream from the primary stands is a replica, whatever it would wait for: it
        // may be the store alone that it can't reach.
        RoleChange::Stands { role: Role::Replica | Role::Waiting, .. }
            if now.role == Role::Replica && now.primary.is_some() =>
        {
            now.clone()
        }
        RoleChange::Stands { role, waits_for } => RoleState { waits_for, ..state(role, now.epoch, None) },
        RoleChange::Stopped => state(Role::Stopped, now.epoch, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::{Incarnation, NodeId};
    use crate::status::Addresses;

    #[test]
    fn what_has_stopped_stays_so_and_nothing_else_does() {
        let me = PeerInfo {
            node: NodeId::random(),
            incarnation: Incarnation::random(),
            addresses: Addresses::default(),
        };
        let role = RoleValue::new(Role::Replica);
        let epoch = Epoch::new(1, 1);
        let key: Option<PeerKey> = Some("07".repeat(32).parse().unwrap());
        let follows = |primary: Option<PeerInfo>| RoleChange::Follows {
            primary: primary.map(|primary| (primary, key)),
            epoch,
        };
        assert_eq!(role.change(follows(Some(me.clone()))).unwrap().primary_key, key);
        assert!(role.change(follows(Some(me.clone()))).is_none(), "nothing new");
        let led = role.change(RoleChange::Leads { me: me.clone(), epoch }).unwrap();
        assert_eq!((led.role, led.primary), (Role::Primary, Some(me.clone())));
        let next = role.change(RoleChange::Epoch(Epoch::new(2, 2))).unwrap();
        assert_eq!((next.role, next.epoch.number(), next.primary), (Role::Primary, 2, Some(me.clone())));
        assert_eq!(next.primary_key, None, "it is its own primary");
        assert_eq!(role.change(follows(None)).unwrap().role, Role::Replica);
        let stands = |role| RoleChange::Stands { role, waits_for: None };
        assert!(role.change(stands(Role::Waiting)).is_some());
        assert_eq!(role.change(follows(None)), None, "it waits, and says for what");
        assert!(role.change(follows(Some(me.clone()))).is_some());
        assert_eq!(role.change(stands(Role::Waiting)), None, "it has a primary");
        assert_eq!(role.change(stands(Role::Replica)), None);
        assert_eq!(role.change(stands(Role::Electing)).unwrap().primary, None);
        assert_eq!(role.change(follows(Some(me.clone()))).unwrap().role, Role::Replica);
        let stopped = role.change(RoleChange::Stopped).unwrap();
        assert_eq!((stopped.role, stopped.primary), (Role::Stopped, None));
        assert!(role.change(RoleChange::Leads { me, epoch }).is_none());
        assert_eq!(role.borrow().role, Role::Stopped);
    }
}
