//! Where the primary is; and holding a request while there is none, or it can't be reached.

use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use crate::context::HeldRequest;
use crate::peer::{Incarnation, NodeId};
use crate::proxy::failure::Reason;
use crate::proxy::shared::{HOLD_BEYOND_LEASE, LayerShared};
use crate::proxy::shares::{Demand, Taken};
use crate::status::{Addresses, PeerInfo, Role, RoleState};
use crate::txid::Epoch;

/// How often a node whose lease has ended looks whether it was renewed after all: no change of the
/// role says so.
const RENEWED_LOOK: Duration = Duration::from_millis(20);

/// How long a primary that was followed by another one may still take to answer.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Where the primary is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum RequestTarget {
    /// This node.
    Here,
    /// Another node's app.
    There {
        url: String,
        /// Its replication endpoint.
        replication: String,
        /// The newest epoch known when that was learnt.
        epoch: Epoch,
        /// Which run of which node that is; none when the address is what another node said.
        run: Option<(NodeId, Incarnation)>,
    },
}

impl RequestTarget {
    /// Whether this is known of an epoch that is not older than that of the other.
    pub(super) fn is_as_new_as(&self, other: &RequestTarget) -> bool {
        match (self, other) {
            (RequestTarget::There { epoch, .. }, RequestTarget::There { epoch: other, .. }) => {
                epoch.number() >= other.number()
            }
            (RequestTarget::Here, _) => true,
            (_, RequestTarget::Here) => false,
        }
    }

    /// Whether another node, or another run of that one, is the primary since.
    fn is_over(&self, state: &RoleState) -> bool {
        let RequestTarget::There { url, epoch, run, .. } = self else { return false };
        state.epoch.number() > epoch.number()
            && state.primary.as_ref().is_some_and(|primary| match run {
                Some(run) => (primary.node, primary.incarnation) != *run,
                None => primary.addresses.app != *url,
            })
    }
}

/// For how long a request waits for a primary.
pub(super) struct HoldLimit {
    until: Instant,
    /// It was noted that the node drains.
    drains: bool,
    /// Of whose share it takes a place.
    client: Option<IpAddr>,
}

impl HoldLimit {
    pub(super) fn new(shared: &LayerShared, client: Option<IpAddr>) -> HoldLimit {
        HoldLimit { until: Instant::now() + shared.hold_timeout(), drains: false, client }
    }

    /// A place among the requests that are held.
    fn enter(&self, shared: &LayerShared) -> Result<(Taken, HeldRequest), Reason> {
        let place = shared.held.place(self.client, Demand::All).ok_or(Reason::TooManyHeld)?;
        Ok((place, shared.node.hold()))
    }

    pub(super) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Returns when there is something new to know of how long it lasts, and notes it.
    ///
    /// The server of a node that drains waits for what is held, so that has not as long. Another
    /// node that can take the lease, or was just handed it, does so within moments. Else the
    /// request ends: it was sent to no node, and its client can safely try another one.
    async fn shortened(&mut self, shared: &LayerShared) {
        if self.drains {
            shared.node.stop.cancelled().await;
        } else {
            shared.node.drain.cancelled().await;
            self.drains = true;
        }
        let left = if shared.node.has_prospect() { HOLD_BEYOND_LEASE } else { Duration::ZERO };
        self.until = self.until.min(Instant::now() + left);
    }
}

/// Waits until there is a primary that takes requests, or the limit is over.
pub(super) async fn find(shared: &LayerShared, hold: &mut HoldLimit) -> Result<(), Reason> {
    if look(shared).is_some() {
        return Ok(());
    }
    let _held = hold.enter(shared)?;
    let mut roles = shared.node.roles.subscribe();
    loop {
        let (stopped, fenced) = {
            let state = roles.borrow_and_update();
            if look_in(&state, shared).is_some() {
                return Ok(());
            }
            // One that yields to another node changes its role before it takes requests again.
            (state.role == Role::Stopped, state.role == Role::Primary && state.primary.is_some())
        };
        if stopped || hold.is_over() {
            return Err(Reason::NoPrimary);
        }
        let until = hold.until;
        let again = if fenced { until.min(Instant::now() + RENEWED_LOOK) } else { until };
        tokio::select! {
            // The sender is the node's own.
            _ = roles.changed() => {}
            () = tokio::time::sleep_until(again) => {}
            () = hold.shortened(shared) => {}
        }
    }
}

/// Waits before the next try of a node that could not be reached, or that does not lead: less when
/// something else is heard of the primary. Returns whether there is time for one.
pub(super) async fn wait(
    shared: &LayerShared,
    hold: &mut HoldLimit,
    pause: Duration,
) -> Result<bool, Reason> {
    let _held = hold.enter(shared)?;
    let mut roles = shared.node.roles.subscribe();
    tokio::select! {
        () = tokio::time::sleep_until(hold.until.min(Instant::now() + pause)) => {}
        // The sender is the node's own.
        _ = roles.changed() => {}
        () = hold.shortened(shared) => {}
    }
    Ok(!hold.is_over())
}

/// Returns when another primary has followed the one that is being asked, which has had some time
/// to answer since, and is not known to live. Until a connection stands it is certain that the
/// request was not begun: that is not cut short.
pub(super) async fn superseded(shared: &LayerShared, asked: &RequestTarget) {
    let mut roles = shared.node.roles.subscribe();
    let is_over = async {
        // The sender is the node's own.
        drop(roles.wait_for(|state| asked.is_over(state)).await);
    };
    tokio::join!(is_over, tokio::time::sleep(shared.dialer.connect));
    tokio::time::sleep(LAST_WORD).await;
    if let RequestTarget::There { run: Some(run), .. } = asked
        && shared.node.has_handed(*run)
    {
        // It lives, and is about to say what became of the request.
        std::future::pending::<()>().await;
    }
}

/// The primary, as far as it is known.
pub(super) fn look(shared: &LayerShared) -> Option<RequestTarget> {
    look_in(&shared.node.roles.borrow(), shared)
}

fn look_in(state: &RoleState, shared: &LayerShared) -> Option<RequestTarget> {
    // One whose lease has ended leads no more, though its role has not changed yet. One that hands
    // its lease over knows of no primary.
    if state.role == Role::Primary && state.primary.is_some() && shared.node.fence.is_open() {
        return Some(RequestTarget::Here);
    }
    let primary = other_primary(state, shared)?;
    let run = Some((primary.node, primary.incarnation));
    let Addresses { app: url, replication, .. } = primary.addresses.clone();
    Some(RequestTarget::There { url, replication, epoch: state.epoch, run })
}

/// The primary, if that is another node.
pub(super) fn other_primary<'a>(state: &'a RoleState, shared: &LayerShared) -> Option<&'a PeerInfo> {
    state.primary.as_ref().filter(|primary| primary.node != shared.node.me.node)
}
