//! What a replica needs, decided from what it says and what the log has.

use crate::checksum::PageKey;
use crate::context::is_near;
use crate::error::Result;
use crate::log::Lookup;
use crate::page::PageNo;
use crate::txid::{Epoch, EpochHistory, Place, Position};
use crate::wire::{self, Hello};

/// What to do for a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ReplicaPlan {
    /// Send the log's bytes from here on.
    Log { lsn: u64 },
    /// It has nothing, or nothing that could be gone on with: send a snapshot.
    Snapshot,
    /// Go on with a snapshot at page `from`, then send the log's bytes from `lsn` on.
    Resume { first: Position, from: PageNo, lsn: u64 },
    /// It left our history, at `from` or later: send the pages that it asks for, then the log's
    /// bytes from `lsn` on.
    Heal { from: Position, lsn: u64 },
    /// Send sums over all pages, then the pages that it asks for. They go over its state, or over
    /// what came of a snapshot that can't be gone on with. `diverged`: it may have what is not in
    /// our history.
    Compare { diverged: bool },
    /// The replica knows an epoch that ours does not exceed. A primary that is fixed opens one
    /// above it and decides again. One that leads by a lease has heard of it.
    Raise { above: u64 },
    /// The replica's newest epoch is none of ours, and too far above it to be exceeded.
    TooFar { theirs: Epoch, ours: Epoch },
}

impl ReplicaPlan {
    /// What the welcome says of it.
    pub(crate) fn announced(self) -> Option<wire::Plan> {
        match self {
            ReplicaPlan::Log { .. } => Some(wire::Plan::Log),
            ReplicaPlan::Snapshot => Some(wire::Plan::Snapshot),
            ReplicaPlan::Resume { .. } => Some(wire::Plan::Resume),
            ReplicaPlan::Heal { .. } => Some(wire::Plan::Heal),
            ReplicaPlan::Compare { .. } => Some(wire::Plan::Compare),
            ReplicaPlan::Raise { .. } | ReplicaPlan::TooFar { .. } => None,
        }
    }
}

/// Decides. `find` asks the log for the record after a transaction's number. `key` is what pages
/// are hashed with here: by another one the replica's states have other names.
///
/// # Errors
/// Those of `find`.
pub(crate) fn plan(
    history: &EpochHistory,
    tip: Position,
    mut find: impl FnMut(u64) -> Result<Lookup>,
    hello: &Hello,
    key: PageKey,
) -> Result<ReplicaPlan> {
    let (ours, theirs) = (history.epoch(), hello.history.epoch());
    // The same number on another branch: two primaries claimed it. A replica could not tell us from
    // the other.
    if theirs.number() >= ours.number() && theirs != ours {
        let above = theirs.number();
        return Ok(if is_near(above, ours.number()) {
            ReplicaPlan::Raise { above }
        } else {
            ReplicaPlan::TooFar { theirs, ours }
        });
    }
    if hello.keys.page != key {
        return Ok(match hello.position {
            Some(_) => ReplicaPlan::Compare { diverged: true },
            None => ReplicaPlan::Snapshot,
        });
    }
    let Some(position) = hello.position else {
        let Some((first, from)) = hello.resume else {
            // What an earlier comparison brought is of no one position.
            return Ok(if hello.suspect {
                ReplicaPlan::Compare { diverged: false }
            } else {
                ReplicaPlan::Snapshot
            });
        };
        return Ok(match stands(history, tip, &mut find, first)? {
            Fit::Continues { lsn } => ReplicaPlan::Resume { first, from, lsn },
            _ if from == PageNo::FIRST => ReplicaPlan::Snapshot,
            // The log does not reach back any more: a snapshot from page 1 on would end like this
            // again.
            _ => ReplicaPlan::Compare { diverged: false },
        });
    };
    let standing = stands(history, tip, &mut find, position)?;
    if hello.suspect {
        return Ok(ReplicaPlan::Compare { diverged: matches!(standing, Fit::Off) });
    }
    match standing {
        Fit::Continues { lsn } => Ok(ReplicaPlan::Log { lsn }),
        Fit::Behind => Ok(ReplicaPlan::Compare { diverged: false }),
        Fit::Off => {
            for mark in &hello.marks {
                if let Fit::Continues { lsn } = stands(history, tip, &mut find, *mark)? {
                    return Ok(ReplicaPlan::Heal { from: *mark, lsn });
                }
            }
            Ok(ReplicaPlan::Compare { diverged: true })
        }
    }
}

/// How a position stands to our history and log.
enum Fit {
    /// It is ours, and the log goes on from it.
    Continues { lsn: u64 },
    /// Nothing says that it is not ours, but the log does not reach back to it.
    Behind,
    /// It is not a state of our history.
    Off,
}

fn stands(
    history: &EpochHistory,
    tip: Position,
    find: &mut impl FnMut(u64) -> Result<Lookup>,
    position: Position,
) -> Result<Fit> {
    let off = history.place(position.txid()) != Place::OnHistory
        || position.number() > tip.number()
        || (position.number() == tip.number() && position != tip);
    if off {
        return Ok(Fit::Off);
    }
    Ok(match find(position.number())? {
        Lookup::At { lsn, before } if before == position => Fit::Continues { lsn },
        Lookup::At { .. } => Fit::Off,
        Lookup::TooOld | Lookup::NotYet => Fit::Behind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::context::{RAISE_STEP_MAX, RAISED_MAX};
    use crate::keys::DatabaseKeys;
    use crate::peer::{Incarnation, NodeId};
    use crate::primary::fake::KEYS;
    use crate::status::{Addresses, PeerInfo};
    use crate::txid::{EpochStart, NUMBER_MAX, Txid};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const OLD: Epoch = Epoch::new(1, 10);
    const NOW: Epoch = Epoch::new(3, 30);

    fn history(epochs: &[(Epoch, u64)]) -> EpochHistory {
        let mut history = EpochHistory::default();
        for &(epoch, first) in epochs {
            history.push(EpochStart { epoch, first, before: Checksum::EMPTY });
        }
        history
    }

    fn ours() -> EpochHistory {
        history(&[(OLD, 1), (NOW, 50)])
    }

    /// The state after a transaction; its checksum is made from its number.
    fn at(epoch: Epoch, number: u64) -> Position {
        Position::new(Txid::new(epoch, number), Checksum::from_u128(u128::from(number) * 7))
    }

    fn other(position: Position) -> Position {
        Position::new(position.txid(), Checksum::from_u128(1))
    }

    /// A log from 20 to the tip, 100; each record is ten bytes long.
    fn find(number: u64) -> Result<Lookup> {
        Ok(match number {
            0..20 => Lookup::TooOld,
            20..=100 => {
                Lookup::At { lsn: number * 10, before: at(if number < 50 { OLD } else { NOW }, number) }
            }
            _ => Lookup::NotYet,
        })
    }

    fn hello(position: Option<Position>, history: EpochHistory) -> Hello {
        let peer =
            PeerInfo { node: NodeId::NIL, incarnation: Incarnation::NIL, addresses: Addresses::default() };
        let (proof, marks) = ([0; 32], Vec::new());
        Hello {
            proof,
            keys: crate::wire::PeerKeys::of(KEYS, true),
            peer,
            position,
            history,
            resume: None,
            suspect: false,
            marks,
        }
    }

    fn answer(hello: &Hello) -> ReplicaPlan {
        plan(&ours(), at(NOW, 100), find, hello, KEYS.page).unwrap()
    }

    fn decide(position: Option<Position>, h: EpochHistory) -> ReplicaPlan {
        answer(&hello(position, h))
    }

    #[test]
    fn the_log_continues_what_is_in_it_and_matches() {
        let log = |lsn| ReplicaPlan::Log { lsn };
        assert_eq!(decide(Some(at(NOW, 100)), ours()), log(1000), "at the tip");
        assert_eq!(decide(Some(at(NOW, 70)), ours()), log(700));
        assert_eq!(decide(Some(at(OLD, 20)), ours()), log(200), "its oldest state");
        assert_eq!(decide(Some(at(OLD, 49)), history(&[(OLD, 1)])), log(490), "misses an epoch");
    }

    #[test]
    fn the_empty_gets_a_snapshot_and_the_late_compares() {
        assert_eq!(decide(None, EpochHistory::default()), ReplicaPlan::Snapshot);
        let compare = ReplicaPlan::Compare { diverged: false };
        assert_eq!(decide(Some(at(OLD, 19)), ours()), compare, "behind the log");
        assert_eq!(decide(Some(at(OLD, 0)), ours()), compare, "before the first transaction");
        let suspect = Hello { suspect: true, ..hello(Some(at(NOW, 100)), ours()) };
        assert_eq!(answer(&suspect), compare, "its pages may be wrong");
        let suspect = Hello { suspect: true, ..hello(Some(at(NOW, 101)), ours()) };
        assert_eq!(answer(&suspect), ReplicaPlan::Compare { diverged: true });
    }

    #[test]
    fn what_another_key_names_is_unknown_and_its_epochs_are_exceeded_all_the_same() {
        let keys = crate::wire::PeerKeys::of(DatabaseKeys::fixed(9), true);
        let other = |position, history| Hello { keys, marks: vec![at(OLD, 30)], ..hello(position, history) };
        let compare = ReplicaPlan::Compare { diverged: true };
        assert_eq!(answer(&other(Some(at(NOW, 100)), ours())), compare, "the name of our tip");
        assert_eq!(answer(&other(Some(at(OLD, 10)), ours())), compare);
        let page = PageNo::new(500).unwrap();
        let begun = Hello { resume: Some((at(OLD, 30), page)), suspect: true, ..other(None, ours()) };
        assert_eq!(answer(&begun), ReplicaPlan::Snapshot);
        let theirs = history(&[(OLD, 1), (Epoch::new(4, 1), 60)]);
        assert_eq!(answer(&other(Some(at(OLD, 30)), theirs)), ReplicaPlan::Raise { above: 4 });
    }

    #[test]
    fn what_is_not_in_our_history_has_diverged() {
        let diverged = ReplicaPlan::Compare { diverged: true };
        assert_eq!(decide(Some(other(at(NOW, 100))), ours()), diverged, "tip, other checksum");
        assert_eq!(decide(Some(other(at(NOW, 70))), ours()), diverged, "within, other checksum");
        assert_eq!(decide(Some(at(NOW, 101)), ours()), diverged, "ahead of us");
        assert_eq!(decide(Some(at(OLD, 50)), ours()), diverged, "past the end of its epoch");
        let branch = Epoch::new(2, 99);
        let theirs = history(&[(OLD, 1), (branch, 50)]);
        assert_eq!(decide(Some(at(branch, 60)), theirs), diverged, "another branch");
    }

    #[test]
    fn the_fork_is_the_newest_mark_that_the_log_has() {
        let branch = Epoch::new(2, 99);
        let off = |marks: &[Position]| {
            let theirs = history(&[(OLD, 1), (branch, 50)]);
            answer(&Hello { marks: marks.to_vec(), ..hello(Some(at(branch, 60)), theirs) })
        };
        let heal = |n| ReplicaPlan::Heal { from: at(OLD, n), lsn: n * 10 };
        assert_eq!(off(&[at(branch, 59), at(branch, 58), at(OLD, 45), at(OLD, 30)]), heal(45));
        assert_eq!(off(&[at(branch, 52), other(at(OLD, 44)), at(OLD, 28)]), heal(28), "a mark that lies");
        let diverged = ReplicaPlan::Compare { diverged: true };
        assert_eq!(off(&[at(branch, 59), at(OLD, 19)]), diverged, "behind the log");
        assert_eq!(off(&[]), diverged);
    }

    #[test]
    fn a_higher_or_doubly_claimed_epoch_is_exceeded_first() {
        for number in [4, NOW.number() + RAISE_STEP_MAX] {
            let theirs = history(&[(OLD, 1), (Epoch::new(number, 1), 60)]);
            assert_eq!(decide(Some(at(OLD, 30)), theirs), ReplicaPlan::Raise { above: number });
        }
        let twin = history(&[(OLD, 1), (Epoch::new(3, 31), 60)]);
        assert_eq!(decide(None, twin), ReplicaPlan::Raise { above: 3 });
        for number in [NOW.number() + RAISE_STEP_MAX + 1, 1 << 62, NUMBER_MAX] {
            let theirs = Epoch::new(number, 1);
            let too_far = ReplicaPlan::TooFar { theirs, ours: NOW };
            assert_eq!(decide(None, history(&[(theirs, 60)])), too_far);
            assert_eq!(decide(Some(at(NOW, 70)), history(&[(OLD, 1), (theirs, 60)])), too_far);
        }
    }

    /// One hello that named a high epoch raised the primary's so far that no node that followed it
    /// was believed any more.
    #[test]
    fn no_sequence_of_hellos_makes_a_follower_unacceptable() {
        for seed in 0..8 {
            let mut rng = StdRng::seed_from_u64(seed);
            let first = match seed % 4 {
                0 => 1,
                1 => RAISED_MAX - rng.random_range(0..RAISE_STEP_MAX * 3),
                2 => RAISED_MAX + rng.random_range(0..3),
                _ => NUMBER_MAX - rng.random_range(1..9000),
            };
            let first = Epoch::new(first, rng.random());
            let mut ours = history(&[(first, 1)]);
            let mut tip = at(first, 0);
            let mut states = vec![tip];
            // One that writes nothing keeps the name of its state, however many epochs are opened
            // above it.
            let idle = seed >= 4;
            // What followers know that heard of us at one time or another, and where they stand.
            let mut followers = vec![(ours.clone(), tip)];
            for round in 0..EpochHistory::MAX * 2 {
                let step = [0, 1, 7, RAISE_STEP_MAX, RAISE_STEP_MAX + 1, 1 << 62, NUMBER_MAX];
                let claim = ours.epoch().number().saturating_add(step[rng.random_range(0..step.len())]);
                // From a unit: what is above the limit does not come so far.
                let claim = Epoch::new(claim.min(NUMBER_MAX), rng.random());
                let lie = hello(None, history(&[(claim, 1)]));
                let find = |number: u64| {
                    let before = states.get(number as usize);
                    Ok(before.map_or(Lookup::NotYet, |&before| Lookup::At { lsn: number, before }))
                };
                match plan(&ours, tip, find, &lie, KEYS.page).unwrap() {
                    ReplicaPlan::Raise { above } => {
                        assert!(above <= RAISED_MAX && above - ours.epoch().number() <= RAISE_STEP_MAX);
                        let epoch = Epoch::new(above + 1, rng.random());
                        ours.push(EpochStart { epoch, first: tip.number() + 1, before: tip.checksum() });
                    }
                    ReplicaPlan::TooFar { .. } => {}
                    other => panic!("{other:?}"),
                }
                for (known, position) in followers.iter().skip(round % 8).step_by(8) {
                    let hello = hello(Some(*position), known.clone());
                    let found = plan(&ours, tip, find, &hello, KEYS.page).unwrap();
                    assert_eq!(found, ReplicaPlan::Log { lsn: position.number() }, "seed {seed}");
                }
                if !idle && rng.random_range(0..300) == 0 {
                    tip = at(ours.epoch(), tip.number() + 1);
                    states.push(tip);
                }
                if rng.random_range(0..200) == 0 {
                    followers.push((ours.clone(), tip));
                }
            }
            // A start of the primary has always a number.
            assert!(ours.epoch().number() < NUMBER_MAX);
        }
    }

    #[test]
    fn a_snapshot_is_resumed_while_the_log_has_its_first_position() {
        let page = PageNo::new(500).unwrap();
        let resume = |p| answer(&Hello { resume: Some((p, page)), ..hello(None, ours()) });
        assert_eq!(resume(at(OLD, 30)), ReplicaPlan::Resume { first: at(OLD, 30), from: page, lsn: 300 });
        let compare = ReplicaPlan::Compare { diverged: false };
        assert_eq!(resume(at(OLD, 19)), compare, "the log dropped it");
        assert_eq!(resume(other(at(OLD, 30))), compare, "of another history");
        let nothing = Hello { resume: Some((at(OLD, 19), PageNo::FIRST)), ..hello(None, ours()) };
        assert_eq!(answer(&nothing), ReplicaPlan::Snapshot, "no page came");
        assert_eq!(
            answer(&Hello { suspect: true, ..hello(None, ours()) }),
            compare,
            "what a comparison brought"
        );
        let live = Hello { resume: Some((at(OLD, 30), page)), ..hello(Some(at(NOW, 70)), ours()) };
        assert_eq!(answer(&live), ReplicaPlan::Log { lsn: 700 }, "the log needs no snapshot");
    }
}
