//! The schedules that the rules are there for.

use std::time::Duration;

use super::node::Disk;
use super::store::Content;
use super::world::{Fate, MS, SECOND, World};
use crate::election::rules::{Rule, without};
use crate::election::{Command, Input, Shown};
use crate::lease::record::LeaseState;
use crate::status::WaitReason;
use crate::txid::Epoch;

/// Runs a schedule with the rule, and without.
pub(super) fn check(rule: Rule, schedule: fn() -> Option<String>) {
    assert_eq!(schedule(), None, "with {rule:?}");
    let wrong = without(Some(rule), schedule);
    assert!(wrong.is_some(), "nothing goes wrong without {rule:?}");
}

macro_rules! cases {
    ($($rule:ident: $schedule:ident;)*) => {
        $(#[test]
        fn $schedule() {
            check(Rule::$rule, schedules::$schedule);
        })*
    };
}

cases! {
    UnknownStays: a_shorter_lease_that_is_not_known_to_be_written_counts;
    ConflictIsUnknown: a_conflict_that_was_the_stores_second_try_is_no_failure;
    WholeRecord: a_version_that_is_used_again_hides_no_renewal;
    NoGap: a_store_that_went_back_while_a_node_did_not_look_proves_nothing;
    GoneBack: an_old_record_of_its_own_is_no_lease;
    GoneBack: a_store_that_went_back_before_a_node_began_is_not_believed;
    GoneBack: an_operators_word_does_not_believe_a_store_that_went_back;
    FenceBefore: clocks_may_run_a_tenth_too_fast_or_too_slow;
    CountFromSending: a_slow_answer_makes_no_lease_longer;
    CountFromSeeing: a_slow_read_makes_no_wait_shorter;
    WholeWait: the_whole_lease_time_is_waited_for;
    KnownTake: a_take_that_is_not_known_to_be_done_is_no_lease;
    EndedStays: an_epoch_that_ended_never_goes_on;
    HeardEnds: a_holder_that_hears_of_a_higher_epoch_stops_and_takes_a_higher_one;
    NoRecordIsUnknown: a_missing_record_is_no_first_start;
    ContentFirst: of_a_first_start_the_node_with_content_leads;
    SameBoot: a_volume_that_was_attached_elsewhere_is_not_the_last_holder;
    KnownRun: a_golden_image_is_not_the_last_holder;
    NewestEpoch: last_nights_volume_is_not_the_last_holder;
    Alone: a_second_process_on_one_directory_is_not_the_last_holder;
    NotBehind: a_last_holder_that_lost_its_end_waits_like_all;
    Vouched: a_state_without_a_primary_that_vouches_does_not_win;
    OwnBranch: a_higher_number_on_another_branch_does_not_win;
    LossBound: a_node_that_was_away_too_long_does_not_win;
    BetterFirst: the_most_advanced_node_wins;
    FinalOnly: a_lease_given_back_is_taken_at_once_only_with_all_of_it;
    Pause: a_paused_record_is_not_taken;
}

/// Some seconds in which the others may do what they should not. Returns what went wrong.
fn goes(mut world: World) -> Option<String> {
    world.run(6 * SECOND);
    world.violation
}

/// Tells a node that the record has changed, and runs until it has seen so.
fn look(world: &mut World, at: usize) {
    world.give(at, Input::Changed);
    world.run(5 * MS);
}

/// Runs until the register has another record.
pub(super) fn renewal(world: &mut World) {
    let place = world.register.place();
    assert!(world.until(3 * SECOND, |world| world.register.place() != place), "no renewal");
}

/// What is wrong if a node has not all of these.
pub(super) fn lacks(world: &World, values: &[u64]) -> Option<String> {
    let Some(primary) = world.primary() else { return Some("no primary".into()) };
    let missing: Vec<_> = values.iter().filter(|value| !world.has(primary, **value)).collect();
    (!missing.is_empty()).then(|| format!("node {primary} leads without {missing:?}"))
}

mod schedules {
    use super::*;

    pub(super) fn a_shorter_lease_that_is_not_known_to_be_written_counts() -> Option<String> {
        let mut world = World::begun(2);
        renewal(&mut world);
        world.run(10 * MS);
        world.nodes[0].election.as_mut()?.settings.lease_time = Duration::from_secs(1);
        world.fates.entry(0).or_default().push_back(Fate::Silent { there: MS });
        renewal(&mut world);
        // The holder reads what was there before, and then nothing more.
        world.late_reads.insert(0, 1);
        look(&mut world, 1);
        world.run(510 * MS);
        world.nodes[0].reaches_store = false;
        goes(world)
    }

    pub(super) fn a_conflict_that_was_the_stores_second_try_is_no_failure() -> Option<String> {
        let mut world = World::begun(2);
        world.kill(0);
        world.fates.entry(1).or_default().push_back(Fate::Repeated);
        world.until(3 * SECOND, |world| world.primary() == Some(1));
        world.violation.clone().or_else(|| lacks(&world, &[]))
    }

    pub(super) fn a_version_that_is_used_again_hides_no_renewal() -> Option<String> {
        let mut world = World::begun(2);
        world.register.one_version = true;
        goes(world)
    }

    pub(super) fn a_store_that_went_back_while_a_node_did_not_look_proves_nothing() -> Option<String> {
        let mut world = World::begun(2);
        renewal(&mut world);
        look(&mut world, 1);
        let place = world.register.place();
        world.nodes[1].reaches_store = false;
        world.run(3 * SECOND);
        renewal(&mut world);
        world.run(2 * MS);
        world.register.go_back(place);
        world.nodes[1].reaches_store = true;
        goes(world)
    }

    pub(super) fn an_old_record_of_its_own_is_no_lease() -> Option<String> {
        let mut world = World::begun(2);
        renewal(&mut world);
        world.run(10 * MS);
        let place = world.register.place();
        world.stop(0, 4 * SECOND);
        assert!(world.until(4 * SECOND, |world| world.primary() == Some(1)), "no failover");
        world.run(4 * SECOND);
        renewal(&mut world);
        world.run(10 * MS);
        world.nodes[1].reaches_store = false;
        world.register.go_back(place);
        goes(world)
    }

    /// The holder renews later than the other node begins, which has read nothing newer.
    fn a_released_record_is_restored(change: impl FnOnce(&mut World)) -> Option<String> {
        let mut world = World::begun(2);
        // So that it is handed to no node.
        world.nodes[1].draining = true;
        world.command(0, Command::Leave);
        let is_released = |world: &World| {
            world.register.record().is_some_and(|record| matches!(record.state, LeaseState::Released(_)))
        };
        assert!(world.until(SECOND, is_released), "it is not given back");
        world.nodes[1].draining = false;
        let place = world.register.place();
        assert!(world.until(3 * SECOND, |world| world.primary() == Some(1)), "no failover");
        world.start(0);
        world.run(SECOND);
        assert_eq!(world.nodes[0].disk.heard, 2);
        world.kill(0);
        renewal(&mut world);
        world.run(10 * MS);
        world.register.go_back(place);
        world.start(0);
        change(&mut world);
        goes(world)
    }

    pub(super) fn a_store_that_went_back_before_a_node_began_is_not_believed() -> Option<String> {
        a_released_record_is_restored(|_| {})
    }

    pub(super) fn an_operators_word_does_not_believe_a_store_that_went_back() -> Option<String> {
        a_released_record_is_restored(|world| {
            world.command(0, Command::PromoteUnchecked);
        })
    }

    pub(super) fn clocks_may_run_a_tenth_too_fast_or_too_slow() -> Option<String> {
        drifts(100_000)
    }

    pub(super) fn a_slow_answer_makes_no_lease_longer() -> Option<String> {
        let mut world = World::begun(2);
        renewal(&mut world);
        world.run(10 * MS);
        world.fates.entry(0).or_default().push_back(Fate::Answered { there: MS, back: 450 * MS });
        renewal(&mut world);
        look(&mut world, 1);
        world.run(451 * MS);
        world.nodes[0].reaches_store = false;
        goes(world)
    }

    pub(super) fn a_slow_read_makes_no_wait_shorter() -> Option<String> {
        let mut world = World::begun(2);
        renewal(&mut world);
        // Fast, so that it is a matter of more than milliseconds.
        let shown = world.nodes[1].clock(world.now);
        world.nodes[1].rate = 1_100_000;
        let jump = world.nodes[1].clock(world.now) - shown;
        world.nodes[1].offset -= jump;
        world.run(70 * MS);
        world.slow_reads.insert(1, 440 * MS);
        look(&mut world, 1);
        renewal(&mut world);
        world.nodes[0].reaches_store = false;
        world.slow_reads.remove(&1);
        goes(world)
    }

    pub(super) fn the_whole_lease_time_is_waited_for() -> Option<String> {
        let mut world = World::begun(2);
        renewal(&mut world);
        world.run(10 * MS);
        world.nodes[0].reaches_store = false;
        goes(world)
    }

    pub(super) fn a_take_that_is_not_known_to_be_done_is_no_lease() -> Option<String> {
        let mut world = World::begun(3);
        world.kill(0);
        world.kill(2);
        world.fates.entry(1).or_default().push_back(Fate::Lost);
        world.run(SECOND);
        world.start(2);
        world.run(1300 * MS);
        world.nodes[1].reaches_store = false;
        goes(world)
    }

    pub(super) fn an_epoch_that_ended_never_goes_on() -> Option<String> {
        let mut world = World::begun(2);
        renewal(&mut world);
        world.run(10 * MS);
        world.fates.entry(0).or_default().push_back(Fate::Silent { there: MS });
        renewal(&mut world);
        world.nodes[0].reaches_store = false;
        world.run(1150 * MS);
        world.nodes[0].reaches_store = true;
        goes(world)
    }

    pub(super) fn a_holder_that_hears_of_a_higher_epoch_stops_and_takes_a_higher_one() -> Option<String> {
        let mut world = World::begun(2);
        world.give(0, Input::Heard(9));
        world.run(0);
        if world.nodes[0].is_open(world.now) {
            return Some("it acknowledges".into());
        }
        if world.nodes[0].disk.heard != 9 {
            return Some("it is not kept".into());
        }
        world.run(SECOND);
        let epoch = world.nodes[0].disk.epochs.epoch().number();
        (world.primary() != Some(0) || epoch != 10).then(|| format!("epoch {epoch}"))
    }

    pub(super) fn a_missing_record_is_no_first_start() -> Option<String> {
        let mut world = World::new(3, 1);
        world.nodes.iter_mut().for_each(|node| node.settings.bootstrap = Some(2));
        world.cut.push((0, 1));
        world.cut.push((0, 2));
        // The others enter themselves, and are gone before they have anything.
        world.start(0);
        world.run(SECOND);
        world.start(1);
        world.cut.clear();
        assert!(world.until(5 * SECOND, |world| world.primary() == Some(0)), "no first start");
        world.kill(1);
        let value = world.write_acked();
        world.nodes[1].disk = Disk { bootstrapped: true, ..Disk::default() };
        world.nodes[2].disk = Disk { bootstrapped: true, ..Disk::default() };
        world.kill(0);
        world.register.put(Content::Empty);
        world.start(1);
        world.start(2);
        world.run(10 * SECOND);
        if world.shown[1] == Some(Shown::Waiting(WaitReason::NoRecord)) && world.primary().is_none() {
            return None;
        }
        Some(format!("{:?} leads without {value:?}", world.primary()))
    }

    pub(super) fn of_a_first_start_the_node_with_content_leads() -> Option<String> {
        let mut world = World::new(3, 1);
        world.nodes.iter_mut().for_each(|node| node.settings.bootstrap = Some(3));
        world.nodes[2].disk.content = true;
        world.start(0);
        world.start(1);
        world.run(3 * SECOND);
        world.start(2);
        world.until(5 * SECOND, |world| world.primary().is_some());
        (world.primary() != Some(2)).then(|| format!("{:?} leads", world.primary()))
    }

    /// A copy of the first node's directory begins while the first node leads.
    fn a_copy_begins(change: impl FnOnce(&mut World, usize)) -> Option<String> {
        let mut world = World::begun(2);
        world.write_acked()?;
        renewal(&mut world);
        let copy = world.fork(0);
        world.kill(copy);
        change(&mut world, copy);
        world.start(copy);
        goes(world)
    }

    pub(super) fn a_volume_that_was_attached_elsewhere_is_not_the_last_holder() -> Option<String> {
        a_copy_begins(|world, copy| world.nodes[copy].settings.me.boot = "elsewhere".into())
    }

    pub(super) fn a_golden_image_is_not_the_last_holder() -> Option<String> {
        a_copy_begins(|world, copy| world.nodes[copy].disk.incarnations.clear())
    }

    pub(super) fn a_second_process_on_one_directory_is_not_the_last_holder() -> Option<String> {
        a_copy_begins(|world, copy| world.nodes[copy].settings.alone = false)
    }

    pub(super) fn last_nights_volume_is_not_the_last_holder() -> Option<String> {
        let mut world = World::begun(2);
        let volume = world.nodes[0].disk.clone();
        world.nodes[0].reaches_store = false;
        world.run(1700 * MS);
        world.nodes[0].reaches_store = true;
        assert!(world.until(SECOND, |world| world.primary() == Some(0)), "it goes on with a new epoch");
        let value = world.write_acked()?;
        assert!(world.until(SECOND, |world| world.has(1, value)), "it is replicated");
        world.kill(0);
        world.nodes[0].disk = volume;
        world.cut.push((0, 1));
        world.start(0);
        world.run(4 * SECOND);
        lacks(&world, &[value])
    }

    pub(super) fn a_last_holder_that_lost_its_end_waits_like_all() -> Option<String> {
        let mut world = World::begun(2);
        let end = world.nodes[0].disk.entries.len();
        let value = world.write_acked()?;
        world.run(SECOND);
        world.kill(0);
        world.nodes[0].disk.go_back(end);
        world.start(0);
        world.run(4 * SECOND);
        lacks(&world, &[value])
    }

    pub(super) fn a_state_without_a_primary_that_vouches_does_not_win() -> Option<String> {
        let mut world = World::begun(2);
        world.kill(0);
        world.nodes[1].disk.doubtful = true;
        world.run(6 * SECOND);
        world.primary().map(|at| format!("{at} leads"))
    }

    pub(super) fn a_higher_number_on_another_branch_does_not_win() -> Option<String> {
        let mut world = World::begun(2);
        world.kill(0);
        let mut other = Disk::default();
        other.open_epoch(Epoch::new(1, 77));
        (0..100).for_each(|value| other.commit(Epoch::new(1, 77), 1000 + value));
        world.nodes[1].disk = other;
        world.run(6 * SECOND);
        world.primary().map(|at| format!("{at} leads"))
    }

    pub(super) fn a_node_that_was_away_too_long_does_not_win() -> Option<String> {
        let mut world = World::begun(3);
        world.cut.push((0, 1));
        world.cut.push((0, 2));
        for _ in 0..20 {
            world.write_acked();
            world.run(200 * MS);
        }
        world.kill(0);
        world.nodes[2].disk = Disk::default();
        world.run(6 * SECOND);
        world.primary().map(|at| format!("{at} leads"))
    }

    pub(super) fn the_most_advanced_node_wins() -> Option<String> {
        let mut world = World::begun(3);
        world.nodes[1].batch = 0;
        world.nodes[1].rate = 1_050_000;
        let value = world.write_acked()?;
        world.run(600 * MS);
        world.kill(0);
        world.run(5 * SECOND);
        world.violation.clone().or_else(|| lacks(&world, &[value]))
    }

    pub(super) fn a_lease_given_back_is_taken_at_once_only_with_all_of_it() -> Option<String> {
        let mut world = World::begun(3);
        world.nodes[1].batch = 0;
        let value = world.write_acked()?;
        world.run(600 * MS);
        // The one that has it all is away for a moment.
        world.kill(2);
        world.command(0, Command::Leave);
        world.run(1500 * MS);
        assert!(world.nodes[0].left);
        world.start(2);
        world.run(5 * SECOND);
        world.violation.clone().or_else(|| lacks(&world, &[value]))
    }

    pub(super) fn a_paused_record_is_not_taken() -> Option<String> {
        let mut world = World::begun(2);
        let mut record = world.register.record()?.clone();
        record.paused = true;
        world.register.put(Content::Record(Box::new(record)));
        world.run(3 * SECOND);
        assert_eq!(world.primary(), Some(0), "the holder goes on");
        world.kill(0);
        world.run(5 * SECOND);
        world.primary().map(|at| format!("{at} leads"))
    }
}

/// The holder's clock is too slow, and another's too fast.
fn drifts(millionths: u64) -> Option<String> {
    let mut world = World::begun(2);
    for (at, rate) in [(0, 1_000_000 - millionths), (1, 1_000_000 + millionths)] {
        let shown = world.nodes[at].clock(world.now);
        world.nodes[at].rate = rate;
        let then = world.nodes[at].clock(world.now);
        world.nodes[at].offset = world.nodes[at].offset + shown - then;
    }
    world.run(SECOND);
    renewal(&mut world);
    look(&mut world, 1);
    world.nodes[0].reaches_store = false;
    goes(world)
}

#[test]
fn clocks_may_not_run_an_eighth_too_fast_and_too_slow() {
    assert_eq!(drifts(110_000), None);
    assert!(drifts(125_000).is_some());
}

#[test]
fn of_a_machine_that_was_copied_one_goes_on() {
    for same in [false, true] {
        let mut world = World::begun(2);
        world.same_random = same;
        world.run(3 * SECOND);
        assert_eq!(world.primary(), Some(0));
        renewal(&mut world);
        world.run(10 * MS);
        world.fork(0);
        // What both had at that moment is theirs for the rest of the lease.
        world.forgiven_until = world.now + 1600 * MS;
        world.run(1600 * MS);
        world.check_alone();
        let wrong = goes(world);
        assert_eq!(wrong.is_some(), same, "{wrong:?}");
    }
}
