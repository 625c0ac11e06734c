//! What was said of the election, and decided lately.

use std::collections::VecDeque;

use super::{Choice, Decided, Instant, Note, PeerAnswer, Shown};
use crate::status::PeerInfo;

/// How many decisions are kept.
const DECISIONS: usize = 100;

/// What was said.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Said {
    pub(super) shown: Option<Shown>,
    /// Which node is followed; none where that is not said, or does not hold any more.
    pub(super) followed: Option<Option<PeerInfo>>,
    pub(super) note: Option<Note>,
    pub(super) decisions: VecDeque<Decided>,
}

impl Said {
    pub(super) fn decided(&mut self, at: Instant, what: Choice, answers: Vec<PeerAnswer>) {
        if self.decisions.len() == DECISIONS {
            self.decisions.pop_front();
        }
        self.decisions.push_back(Decided { at, what, answers });
    }

    /// The stream was ended: the node is told anew which one to follow.
    pub(super) fn follows_none(&mut self) {
        self.followed = None;
    }
}
