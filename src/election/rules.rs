//! The rules that keep two nodes from leading, by name. Tests take one out, and see what happens.

/// A rule of the election that some schedule needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rule {
    /// A swap without an answer may be done at any later time.
    UnknownStays,
    /// A conflict may be the answer to the store's own second try.
    ConflictIsUnknown,
    /// A record is unchanged only if all of it is.
    WholeRecord,
    /// A record is unchanged only if it was seen so all the time.
    NoGap,
    /// A record that is older than one that was there before is no proof of anything.
    GoneBack,
    /// A holder stops before others may begin.
    FenceBefore,
    /// A holder counts from before it sent.
    CountFromSending,
    /// Others count from after they saw.
    CountFromSeeing,
    /// Others wait for the whole lease time.
    WholeWait,
    /// A node does not lead before it knows that it has the lease.
    KnownTake,
    /// An epoch that was ended stays so.
    EndedStays,
    /// A holder that hears of a higher epoch acknowledges nothing more.
    HeardEnds,
    /// A missing record is no first start.
    NoRecordIsUnknown,
    /// A database with content comes before empty ones.
    ContentFirst,
    /// The last holder is on the machine's same run.
    SameBoot,
    /// The last holder's run is one that this directory knows.
    KnownRun,
    /// The last holder's epoch is the newest here.
    NewestEpoch,
    /// No other process has the last holder's directory.
    Alone,
    /// The last holder lacks nothing that it, or a peer, is known to have had.
    NotBehind,
    /// Only a state that a primary vouches for counts.
    Vouched,
    /// A number says nothing of a state on another branch.
    OwnBranch,
    /// A node that lacks too much does not take over.
    LossBound,
    /// A better node has the time to be first.
    BetterFirst,
    /// A lease that was given back is taken at once only with all that there was.
    FinalOnly,
    /// An operator's pause holds.
    Pause,
    /// A holder's epoch is closed before it asks for the next holder to be written.
    HandoffCloses,
    /// Whether another node is the holder is not known before it was read, or is overwritten.
    HandoffUnknown,
    /// A record is this node's only by an offer that it accepted.
    AcceptedOnly,
    /// Its time counts from before it said that it accepts.
    CountFromAccept,
    /// Who is to lead has exactly the last holder's last state.
    ExactState,
    /// Nothing was committed after the state that the next holder has.
    FinalState,
    /// A node that drains, is unwell or no candidate is handed nothing.
    FitTarget,
}

/// Whether a rule holds.
#[cfg(not(test))]
pub(super) const fn rule(rule: Rule) -> bool {
    use Rule::{BetterFirst, FinalOnly, LossBound, NotBehind, OwnBranch, Vouched};
    let eligible = matches!(rule, Vouched | OwnBranch | LossBound | NotBehind | FinalOnly | BetterFirst);
    !(cfg!(replite_no_eligibility) && eligible)
}

#[cfg(test)]
pub(super) use off::{rule, without};

#[cfg(test)]
mod off {
    use std::cell::Cell;

    use super::Rule;

    thread_local! {
        static OFF: Cell<Option<Rule>> = const { Cell::new(None) };
    }

    pub(in crate::election) fn rule(rule: Rule) -> bool {
        OFF.get() != Some(rule)
    }

    /// Does something while a rule does not hold on this thread.
    pub(in crate::election) fn without<T>(rule: Option<Rule>, what: impl FnOnce() -> T) -> T {
        struct Back;
        impl Drop for Back {
            fn drop(&mut self) {
                OFF.set(None);
            }
        }
        OFF.set(rule);
        let _back = Back;
        what()
    }
}
