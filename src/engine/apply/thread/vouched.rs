//! Which state a primary vouches for: tokens and waits count nothing else.

use crate::engine::apply::thread::Apply;
use crate::engine::file::anchor::Anchor;
use crate::engine::history::append_or_gap::begin_anew;
use crate::error::Result;
use crate::report::Condition;
use crate::txid::Position;
use crate::wire::Plan;

impl Apply {
    /// A primary that goes on with its log has the very state that the hello named, and vouches for
    /// it.
    pub(super) fn welcome(&mut self, plan: Plan) -> Result<()> {
        let Some(live) = self.state.known() else { return Ok(()) };
        let position = live.position();
        if plan != Plan::Log {
            return Ok(());
        }
        self.node.set_late(false);
        if self.node.applied.position() != Some(position) {
            begin_anew(&live.base, position)?;
            self.node.report(Condition::StateVouched);
            self.node.applied.advance(position);
        }
        Ok(())
    }
}

/// The last state that a primary is known to vouch for, and that what is here went on from. It is
/// what the log led to.
///
/// A log that ends before the state may have led elsewhere. One example: the node died between its
/// log and its WAL, and somebody else wrote to the file after that. An anchor there says that the
/// file was in that state.
///
/// Nothing is known from a log that is empty, or that ends at another state which is as new.
pub(super) fn last_vouched(
    logged: Option<Position>,
    here: Position,
    anchored: &[Anchor],
) -> Option<Position> {
    let passed = |logged: &Position| {
        logged.number() < here.number() && anchored.iter().any(|anchor| anchor.position == *logged)
    };
    logged.filter(|logged| *logged == here || passed(logged))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::engine::file::anchor::FileState;
    use crate::engine::file::witnesses::Witnesses;
    use crate::txid::{Epoch, Txid};
    use crate::wal::{Salts, WalSum};

    fn at(number: u64, state: u128) -> Position {
        Position::new(Txid::new(Epoch::new(1, 1), number), Checksum::from_u128(state))
    }

    fn anchor(position: Position) -> Anchor {
        Anchor {
            generation: 1,
            salts: Salts::default(),
            frame: 1,
            sum: WalSum::default(),
            position,
            pages: 1,
            file: FileState::Backfilling(Witnesses::default()),
            ahead: false,
        }
    }

    #[test]
    fn what_the_log_led_to_counts_where_the_state_went_on_from_it() {
        let here = at(9, 9);
        let vouched = |logged, anchored: &[Position]| {
            let anchors: Vec<_> = anchored.iter().copied().map(anchor).collect();
            last_vouched(logged, here, &anchors)
        };
        assert_eq!(vouched(Some(here), &[]), Some(here), "the log led here");
        assert_eq!(vouched(Some(at(7, 7)), &[here, at(7, 7)]), Some(at(7, 7)), "strangers' commits since");
        assert_eq!(vouched(Some(at(7, 7)), &[at(5, 5)]), None, "the file may never have been in that state");
        assert_eq!(vouched(Some(at(7, 7)), &[at(7, 8)]), None, "it was in another one");
        assert_eq!(vouched(Some(at(9, 8)), &[at(9, 8)]), None, "another state under the same number");
        assert_eq!(vouched(Some(at(12, 12)), &[at(12, 12)]), None, "the file is older");
        assert_eq!(vouched(None, &[here]), None, "no log");
    }
}
