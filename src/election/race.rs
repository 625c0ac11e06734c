//! How far a candidate is on its way to the lease.

use std::time::Duration;

use super::{Instant, PeerAnswer};
use crate::peer::NodeId;
use crate::status::WaitReason;
use crate::txid::Position;

/// How long a node rests before it asks all others again.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// Who takes the first lease.
pub(super) enum First {
    Me,
    /// Another one, or it is not certain who.
    Other,
}

/// Why a node may take the lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Why {
    /// The holder's time is over, and this node has what it takes.
    Election,
    /// It held the lease last, and was started again.
    Restart,
    /// The record is this node's own.
    Own,
    /// An operator wants it.
    Unchecked,
    /// The cluster starts for the first time.
    First,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outlook {
    Wait(WaitReason),
    Go(Why),
}

/// How far a node is on its way to the lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Stride {
    #[default]
    Rest,
    Asking(Why),
    /// A better one has until then to be first.
    Ranks {
        until: Instant,
        first: Option<NodeId>,
        why: Why,
    },
    Preparing(Why),
    Prepared(Why),
    Taking,
}

#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Race {
    pub(super) phase: Stride,
    /// The stream is ended, and this is what is here.
    pub(super) ready: Option<Option<Position>>,
    pub(super) not_before: Instant,
    /// A peer has more than this last holder.
    pub(super) late: bool,
    /// When the peers' answers are not waited for any more. The driver's limit comes before that.
    pub(super) give_up: Instant,
    pub(super) answers: Vec<PeerAnswer>,
    pub(super) verdict: Option<Outlook>,
}

impl Race {
    /// The record has changed: all that was found out is old.
    pub(super) fn stop(&mut self) {
        *self = Race { not_before: self.not_before, ..Race::default() };
    }

    /// Whether the stream from the primary is ended for it.
    pub(super) fn holds_still(&self) -> bool {
        self.ready.is_some() || matches!(self.phase, Stride::Preparing(_) | Stride::Taking)
    }
}
