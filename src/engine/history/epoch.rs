//! A new epoch of the history.

use crate::engine::history::intake_error::IntakeError;
use crate::random;
use crate::txid::{Epoch, EpochStart, NUMBER_MAX, Position};

/// Adds an epoch with a number above `above` and all known ones. `above` is garbled when it leaves
/// no room for a higher one.
pub(in crate::engine) fn open_epoch(
    history: &mut crate::txid::EpochHistory,
    above: u64,
    position: Position,
) -> Result<(), IntakeError> {
    let branch = random::array()?;
    let above = history.epoch().number().max(above);
    let number = above
        .checked_add(1)
        .filter(|number| *number <= NUMBER_MAX)
        .ok_or_else(|| IntakeError::garbled("an epoch that leaves no room for a higher one"))?;
    history.push(EpochStart {
        epoch: Epoch::new(number, u64::from_le_bytes(branch)),
        first: position.number() + 1,
        before: position.checksum(),
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::txid::{EpochHistory, Txid};

    #[test]
    fn an_epoch_that_leaves_no_room_for_a_higher_one_is_refused_and_overflows_nothing() {
        let tip = Position::new(Txid::new(Epoch::new(1, 1), 4), Checksum::EMPTY);
        let opened = |above| {
            let mut history = EpochHistory::default();
            open_epoch(&mut history, above, tip).map(|()| history.epoch().number())
        };
        assert_eq!(opened(NUMBER_MAX - 1).unwrap(), NUMBER_MAX);
        for above in [NUMBER_MAX, NUMBER_MAX + 1, u64::MAX] {
            assert!(matches!(opened(above), Err(IntakeError::Garbled(_))), "{above}");
        }
    }
}
