//! What clients did and saw, and what was seen of the nodes meanwhile.

use std::fmt;

use replite::{Epoch, Position, Txid};

use crate::clock::Micros;

/// What is known of a write.
#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    /// Under way.
    Pending,
    Acknowledged(Acknowledged),
    /// The client was told that nothing was done.
    NotExecuted(String),
    Unknown(String),
}

/// What a node said of a write that it acknowledged.
#[derive(Clone, PartialEq, Debug)]
pub struct Acknowledged {
    pub txid: Txid,
    /// The node's name, and its run.
    pub node: String,
    pub run: String,
    /// Between these two it decided to acknowledge.
    pub began: Micros,
    pub acked: Micros,
}

/// A write.
#[derive(Clone, Debug)]
pub struct Write {
    pub client: String,
    pub op: u64,
    /// The name of the node that was asked.
    pub asked: String,
    pub begin: Micros,
    pub end: Micros,
    /// The node that was asked ended or started meanwhile, or was not there.
    pub away: bool,
    pub outcome: Outcome,
}

impl Write {
    #[must_use]
    pub fn acknowledged(&self) -> Option<&Acknowledged> {
        match &self.outcome {
            Outcome::Acknowledged(acknowledged) => Some(acknowledged),
            _ => None,
        }
    }

    #[must_use]
    pub fn row(&self) -> (String, u64) {
        (self.client.clone(), self.op)
    }
}

/// A read.
#[derive(Clone, Debug)]
pub struct Read {
    pub client: String,
    pub asked: String,
    pub begin: Micros,
    pub end: Micros,
    /// As for a write.
    pub away: bool,
    /// None where no answer came.
    pub status: Option<u16>,
    /// It carried a token, for which it may have to wait.
    pub session: bool,
    pub text: String,
}

/// A node as it said of itself at an instant.
#[derive(Clone, Debug)]
pub struct Look {
    pub begin: Micros,
    pub end: Micros,
    pub node: String,
    pub role: String,
    pub epoch: Epoch,
    pub position: Option<Position>,
}

/// An end of a node or of its lease that should cost nothing: it was asked for.
#[derive(Clone, Debug)]
pub struct OrderlyEnd {
    pub node: String,
    pub begin: Micros,
    pub end: Micros,
}

/// Elections were paused, and this node held the lease and died.
#[derive(Clone, Debug)]
pub struct Paused {
    pub holder: String,
    pub begin: Micros,
    pub end: Micros,
}

/// The whole.
#[derive(Default, Debug)]
pub struct History {
    pub writes: Vec<Write>,
    pub reads: Vec<Read>,
    pub looks: Vec<Look>,
    pub orderly: Vec<OrderlyEnd>,
    pub paused: Vec<Paused>,
    /// Handoffs that were asked for, and those that came to their end.
    pub handoffs: u64,
    pub handed: u64,
    /// Nodes whose files were destroyed, and when: what only they had is gone.
    pub destroyed: Vec<(String, Micros)>,
    /// Anything was wrong: from then on, until then.
    pub troubled: Vec<(Micros, Micros)>,
    /// The same where replicas may lack what the primary had.
    pub lossy: Vec<(Micros, Micros)>,
    /// Tokens that a client was told are lost.
    pub told_lost: u64,
}

/// A rule that does not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    pub rule: &'static str,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.what)
    }
}

impl Write {
    /// One line, with times since an instant.
    #[must_use]
    pub fn told(&self, since: Micros) -> String {
        let at = |time: Micros| crate::clock::seconds(since, time);
        let outcome = match &self.outcome {
            Outcome::Acknowledged(a) => format!(
                "acknowledged {} by {} ({}) between {:.3} and {:.3}",
                a.txid,
                a.node,
                &a.run[..a.run.len().min(8)],
                at(a.began),
                at(a.acked)
            ),
            other => format!("{other:?}"),
        };
        format!(
            "{} {} asked of {} at {:.3}..{:.3}: {outcome}",
            self.client,
            self.op,
            self.asked,
            at(self.begin),
            at(self.end)
        )
    }
}
