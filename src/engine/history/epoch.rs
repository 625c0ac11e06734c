//! A new epoch of the history.

use crate::engine::history::intake_error::IntakeError;
use crate::error::{Error, PeerProblem, Result};
use crate::random;
use crate::txid::{Epoch, EpochHistory, EpochStart, NUMBER_MAX, Position};

/// An epoch with the number above this one, on a branch of its own. `above` is garbled when it
/// leaves no room for a higher one.
pub(crate) fn draw_epoch(above: u64) -> Result<Epoch, IntakeError> {
    let number = above
        .checked_add(1)
        .filter(|number| *number <= NUMBER_MAX)
        .ok_or_else(|| IntakeError::garbled("an epoch that leaves no room for a higher one"))?;
    Ok(Epoch::new(number, u64::from_le_bytes(random::array()?)))
}

/// Adds this epoch, which begins after the state at `position`.
///
/// # Errors
/// [`Error::Peer`] when its number is not above all that the history has.
pub(in crate::engine) fn open_epoch(
    history: &mut EpochHistory,
    epoch: Epoch,
    position: Position,
) -> Result<()> {
    expect_newer(epoch, history.epoch())?;
    history.push(EpochStart { epoch, first: position.number() + 1, before: position.checksum() });
    Ok(())
}

/// Fails unless an epoch may follow the newest one that is known.
pub(in crate::engine) fn expect_newer(epoch: Epoch, newest: Epoch) -> Result<()> {
    if epoch.number() > newest.number() && epoch.number() <= NUMBER_MAX {
        return Ok(());
    }
    let problem = PeerProblem::OldEpoch { theirs: epoch.to_string(), ours: newest.to_string() };
    Err(Error::peer("the lease", problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::txid::Txid;

    #[test]
    fn an_epoch_that_leaves_no_room_for_a_higher_one_is_refused_and_overflows_nothing() {
        assert_eq!(draw_epoch(NUMBER_MAX - 1).unwrap().number(), NUMBER_MAX);
        for above in [NUMBER_MAX, NUMBER_MAX + 1, u64::MAX] {
            assert!(matches!(draw_epoch(above), Err(IntakeError::Garbled(_))), "{above}");
        }
    }

    #[test]
    fn an_epoch_that_is_not_newer_is_no_part_of_a_history() {
        let tip = Position::new(Txid::new(Epoch::new(1, 1), 4), Checksum::EMPTY);
        let mut history = EpochHistory::default();
        open_epoch(&mut history, Epoch::new(3, 1), tip).unwrap();
        for epoch in [Epoch::new(3, 1), Epoch::new(3, 2), Epoch::new(2, 1), Epoch::new(NUMBER_MAX + 1, 1)] {
            assert!(open_epoch(&mut history, epoch, tip).is_err(), "{epoch}");
        }
        assert_eq!(history.epoch(), Epoch::new(3, 1));
    }
}
