//! Where the primary is; and holding a request while there is none, or it can't be reached.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::peer::Incarnation;
use crate::proxy::failure::Reason;
use crate::proxy::shared::LayerShared;
use crate::status::{Role, RoleState};
use crate::txid::Epoch;

/// Where the primary is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum RequestTarget {
    /// This node.
    Here,
    /// Another node's app.
    There {
        url: String,
        /// The newest epoch known when that was learnt.
        epoch: Epoch,
        /// The process that is the primary; none where the address is what another node said. One
        /// that starts again is another one.
        incarnation: Option<Incarnation>,
    },
}

/// Waits until there is a primary, at most until the instant. A target to avoid counts as none: it
/// has said that it is not the primary.
pub(super) async fn find(
    shared: &LayerShared,
    until: Instant,
    avoid: Option<&RequestTarget>,
) -> Result<(), Reason> {
    if look(shared, avoid).is_some() {
        return Ok(());
    }
    let _held = Held::enter(&shared.held, shared.options.held_max).ok_or(Reason::TooManyHeld)?;
    let mut roles = shared.node.roles.subscribe();
    let mut found = false;
    let seen = roles.wait_for(|state| {
        found = look_in(state, shared, avoid).is_some();
        found || state.role == Role::Stopped
    });
    tokio::select! {
        _ = tokio::time::timeout_at(until, seen) => {}
        // A request that is held was sent to no node: its client can safely try another one.
        () = shared.node.drain.cancelled() => {}
    }
    if found { Ok(()) } else { Err(Reason::NoPrimary) }
}

/// Waits before the next try of a primary that could not be reached: less when something else is
/// heard of it.
pub(super) async fn wait(shared: &LayerShared, until: Instant, pause: Duration) -> Result<(), Reason> {
    let _held = Held::enter(&shared.held, shared.options.held_max).ok_or(Reason::TooManyHeld)?;
    let mut roles = shared.node.roles.subscribe();
    tokio::select! {
        () = tokio::time::sleep_until(until.min(Instant::now() + pause)) => {}
        // The sender is the node's own.
        _ = roles.changed() => {}
        () = shared.node.drain.cancelled() => return Err(Reason::Unreachable),
    }
    if Instant::now() < until { Ok(()) } else { Err(Reason::Unreachable) }
}

/// The primary, as far as it is known.
pub(super) fn look(shared: &LayerShared, avoid: Option<&RequestTarget>) -> Option<RequestTarget> {
    look_in(&shared.node.roles.borrow(), shared, avoid)
}

fn look_in(state: &RoleState, shared: &LayerShared, avoid: Option<&RequestTarget>) -> Option<RequestTarget> {
    if state.role == Role::Primary {
        return Some(RequestTarget::Here);
    }
    let primary = state.primary.as_ref().filter(|p| p.node != shared.node.me.node)?;
    let (url, incarnation) = (primary.addresses.app.clone(), Some(primary.incarnation));
    let there = RequestTarget::There { url, epoch: state.epoch, incarnation };
    (avoid != Some(&there)).then_some(there)
}

/// A place among the requests that are held.
struct Held<'a>(&'a AtomicUsize);

impl<'a> Held<'a> {
    fn enter(held: &'a AtomicUsize, max: usize) -> Option<Held<'a>> {
        let entered = held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < max).then_some(n + 1));
        // Made only now: one that is dropped gives a place back.
        entered.is_ok().then(|| Held(held))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_refused_a_place_gives_none_back() {
        let held = AtomicUsize::new(0);
        let places: Vec<_> = (0..3).map(|_| Held::enter(&held, 2)).collect();
        assert_eq!(places.iter().flatten().count(), 2);
        assert_eq!(held.load(Ordering::Relaxed), 2, "the third took none");
        drop(places);
        assert_eq!(held.load(Ordering::Relaxed), 0);
        assert!(Held::enter(&held, 2).is_some());
    }
}
