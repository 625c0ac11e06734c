//! Handoffs: what each fault at each step comes to.

use super::cases::{check, lacks, renewal};
use super::handing::Post;
use super::node::Engine;
use super::store::Content;
use super::world::{Fate, MS, SECOND, World};
use crate::election::rules::Rule;
use crate::election::{Choice, Command, Input, NotHanded, Shown};
use crate::lease::record::{Attempt, LeaseState};
use crate::peer::NodeId;

/// A cluster whose first node leads, and has just renewed its lease.
pub(super) fn begun(count: usize) -> World {
    let mut world = World::begun(count);
    renewal(&mut world);
    world.run(10 * MS);
    world
}

fn ask(world: &mut World, to: Option<usize>) {
    let to = to.map(|at| world.nodes[at].id());
    world.command(0, Command::Handoff { to });
}

/// Lets the first node hand the lease to the second one, up to some step.
fn hand_until(world: &mut World, step: impl FnMut(&World) -> bool) {
    ask(world, Some(1));
    assert!(world.until(SECOND, step), "{:?}", world.ended);
}

fn accepted(world: &World) -> bool {
    world.nodes[1].accepts > 0
}

fn sent(world: &World) -> bool {
    world.nodes[0].held && world.nodes[0].gate.is_zero()
}

/// All goes on for a while. Returns what went wrong.
pub(super) fn goes(mut world: World) -> Option<String> {
    world.run(14 * SECOND);
    world.violation
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
    HandoffCloses: the_epoch_is_closed_before_another_holder_is_written;
    HandoffUnknown: an_aborted_handoff_whose_swap_is_done_later_is_none;
    AcceptedOnly: a_copy_of_the_target_is_handed_nothing;
    CountFromAccept: a_target_that_was_stopped_after_it_accepted_has_nothing;
    CountFromAccept: a_target_that_reads_late_that_it_is_the_holder_has_nothing;
    ExactState: a_target_that_has_not_all_does_not_accept;
    FinalState: what_is_committed_after_the_offer_ends_the_handoff;
    FitTarget: a_node_that_drains_is_handed_nothing;
}

mod schedules {
    use super::*;

    pub(super) fn the_epoch_is_closed_before_another_holder_is_written() -> Option<String> {
        let mut world = begun(2);
        ask(&mut world, Some(1));
        goes(world)
    }

    pub(super) fn an_aborted_handoff_whose_swap_is_done_later_is_none() -> Option<String> {
        for there in [700 * MS, SECOND] {
            let mut world = begun(2);
            let epoch = world.nodes[0].disk.epochs.epoch();
            world.fates.entry(0).or_default().push_back(Fate::Silent { there });
            ask(&mut world, Some(1));
            world.run(SECOND);
            if world.violation.is_none() {
                assert_eq!((world.primary(), world.ended.len()), (Some(0), 1));
                assert!(world.nodes[0].disk.epochs.epoch().number() > epoch.number() + 1);
                assert!(world.write_acked().is_some(), "it does not go on");
            }
            if let Some(wrong) = goes(world) {
                return Some(wrong);
            }
        }
        None
    }

    pub(super) fn a_copy_of_the_target_is_handed_nothing() -> Option<String> {
        let mut world = begun(2);
        world.fork(1);
        ask(&mut world, Some(1));
        world.run(SECOND);
        world.violation
    }

    pub(super) fn a_target_that_was_stopped_after_it_accepted_has_nothing() -> Option<String> {
        let mut world = begun(3);
        let value = world.write_acked()?;
        world.run(120 * MS);
        hand_until(&mut world, accepted);
        world.stop(1, 10 * SECOND);
        world.run(9 * SECOND);
        assert!(world.primary().is_some_and(|at| at != 1), "{:?}", world.shown);
        world.run(SECOND + 500 * MS);
        world.violation.clone().or_else(|| lacks(&world, &[value])).or_else(|| goes(world))
    }

    pub(super) fn a_target_that_reads_late_that_it_is_the_holder_has_nothing() -> Option<String> {
        let mut world = begun(3);
        hand_until(&mut world, accepted);
        world.stop(1, 1950 * MS);
        // Its answer has been sent; it is not told.
        world.posts.push_back(Some(Post::Lost));
        world.until(1949 * MS, |_| false);
        assert_eq!(world.holder(), Some(1));
        goes(world)
    }

    pub(super) fn a_target_that_has_not_all_does_not_accept() -> Option<String> {
        let mut world = begun(2);
        (world.hasty, world.nodes[1].batch) = (true, 0);
        let value = world.write_acked()?;
        ask(&mut world, Some(1));
        world.run(SECOND);
        world.violation.clone().or_else(|| lacks(&world, &[value]))
    }

    pub(super) fn what_is_committed_after_the_offer_ends_the_handoff() -> Option<String> {
        let mut world = begun(2);
        // The renewal before it takes its time.
        world.fates.entry(0).or_default().push_back(Fate::Answered { there: 200 * MS, back: MS });
        world.run(480 * MS);
        hand_until(&mut world, accepted);
        world.run(50 * MS);
        let epoch = world.nodes[0].disk.epochs.epoch();
        world.nodes[0].disk.commit(epoch, 777);
        world.run(SECOND);
        world.violation.clone().or_else(|| lacks(&world, &[777]))
    }

    pub(super) fn a_node_that_drains_is_handed_nothing() -> Option<String> {
        let mut world = begun(2);
        world.nodes[1].draining = true;
        ask(&mut world, Some(1));
        world.run(SECOND);
        (world.primary() != Some(0)).then(|| "it leads, or none does".into())
    }
}

#[test]
fn the_lease_goes_to_the_replica_that_is_named_or_has_the_most() {
    for to in [Some(2), None] {
        let mut world = begun(3);
        // It lags, and so is not the best.
        world.nodes[1].batch = if to.is_none() { 0 } else { usize::MAX };
        let values: Vec<u64> = (0..3).map(|_| world.write_acked().unwrap()).collect();
        world.run(200 * MS);
        let before = world.now;
        ask(&mut world, to);
        assert!(world.until(SECOND, |world| world.primary() == Some(2)), "{:?}", world.ended);
        assert!(world.now - before < 60 * MS, "it takes long");
        assert_eq!(world.ended, [Ok(world.nodes[2].id())]);
        assert!(values.iter().all(|value| world.has(2, *value)));
        assert!(world.write_acked().is_some());
        world.nodes[1].batch = usize::MAX;
        world.run(4 * SECOND);
        assert_eq!((world.primary(), world.violation.clone()), (Some(2), None));
        assert_eq!(world.nodes[0].engine, Engine::Follows(Some(world.nodes[2].id())));
        assert_eq!((&world.shown[0], &world.shown[1]), (&Some(Shown::Replica), &Some(Shown::Replica)));
        // And back again.
        let first = Some(world.nodes[0].id());
        world.command(2, Command::Handoff { to: first });
        assert!(world.until(SECOND, |world| world.primary() == Some(0)), "{:?}", world.ended);
        assert!(world.write_acked().is_some());
    }
}

/// Each fault, on each of the two nodes, at each step, however the swap ends.
#[test]
fn whatever_fails_at_whatever_step_nothing_is_lost_and_a_node_leads() {
    let steps: [fn(&World) -> bool; 7] = [
        |_| true,
        |world| world.nodes[0].withholding.is_some(),
        |world| world.nodes[0].held,
        accepted,
        sent,
        |world| world.holder() == Some(1),
        |world| world.nodes[1].engine != Engine::Follows(Some(world.nodes[0].id())),
    ];
    let faults: [fn(&mut World, usize); 6] = [
        World::kill,
        |world, at| world.stop(at, 10 * SECOND),
        |world, at| world.stop(at, SECOND),
        |world, at| world.nodes[at].reaches_store = false,
        |world, _| world.cut.push((0, 1)),
        |world, at| world.command(at, Command::Leave),
    ];
    let slow = Fate::Answered { there: 20 * MS, back: 20 * MS };
    for fate in
        [slow, Fate::Silent { there: 5 * MS }, Fate::Silent { there: SECOND }, Fate::Lost, Fate::Repeated]
    {
        for (step, at) in (0..steps.len()).flat_map(|step| [(step, 0), (step, 1)]) {
            for (number, fault) in faults.iter().enumerate() {
                let what = format!("{fate:?}, step {step}, node {at}, fault {number}");
                let mut world = begun(3);
                let value = world.write_acked().unwrap();
                world.run(120 * MS);
                world.fates.entry(0).or_default().push_back(fate);
                ask(&mut world, Some(1));
                world.run(0);
                // Not every swap comes so far.
                world.until(SECOND, steps[step]);
                fault(&mut world, at);
                world.run(6 * SECOND);
                assert!(world.primary().is_some(), "{what}: no primary, {:?}", world.shown);
                world.cut.clear();
                world.nodes[at].reaches_store = true;
                if world.nodes[at].election.is_none() {
                    world.start(at);
                }
                world.run(8 * SECOND);
                assert_eq!(world.violation, None, "{what}");
                assert_eq!(lacks(&world, &[value]), None, "{what}");
                assert!(world.write_acked().is_some(), "{what}: {:?}", world.shown);
            }
        }
    }
}

#[test]
fn a_swap_of_which_nothing_is_known_is_settled_and_then_one_node_goes_on() {
    let ways = [
        (Fate::Silent { there: MS }, true),
        (Fate::Repeated, true),
        (Fate::Lost, false),
        (Fate::Refused, false),
    ];
    for (fate, done) in ways {
        let mut world = begun(2);
        world.fates.entry(0).or_default().push_back(fate);
        hand_until(&mut world, sent);
        let next = if done { 1 } else { 0 };
        assert!(world.until(900 * MS, |world| world.primary() == Some(next)), "{fate:?}: {:?}", world.shown);
        assert!(world.write_acked().is_some());
        let target = world.nodes[1].id();
        let outcome = if done { Ok(target) } else { Err(NotHanded::NotWritten(target)) };
        assert!(world.until(SECOND, |world| world.ended == [outcome.clone()]), "{fate:?}: {:?}", world.ended);
        assert!(world.nodes[next].disk.epochs.epoch().number() > 1, "it is a new epoch");
        assert_eq!(goes(world), None);
    }
}

#[test]
fn an_abort_before_the_swap_costs_no_epoch_and_says_why() {
    let faults: [fn(&mut World); 4] = [
        |world| world.nodes[0].withhold_fails = true,
        |world| world.kill(1),
        |world| world.posts.push_back(Some(Post::Lost)),
        // It is about to take the lease by itself, and declines.
        |world| world.command(1, Command::PromoteUnchecked),
    ];
    for (number, fault) in faults.into_iter().enumerate() {
        let mut world = begun(2);
        let epoch = world.nodes[0].disk.epochs.epoch();
        hand_until(&mut world, |world| world.nodes[0].withholding.is_some());
        fault(&mut world);
        assert!(world.until(2 * SECOND, |world| !world.ended.is_empty()), "{number}: it does not end");
        let to = world.nodes[1].id();
        assert!(
            matches!(&world.ended[..], [Err(NotHanded::Aborted { to: of, .. })] if *of == to),
            "{number}"
        );
        assert!(world.write_acked().is_some() && world.primary() == Some(0), "{number}");
        assert_eq!(world.nodes[0].disk.epochs.epoch(), epoch);
        world.run(SECOND);
        assert_eq!((world.primary(), world.violation), (Some(0), None));
    }
}

#[test]
fn a_target_that_is_not_told_reads_that_it_leads() {
    let mut world = begun(3);
    hand_until(&mut world, sent);
    world.posts.push_back(Some(Post::Lost));
    assert!(world.until(400 * MS, |world| world.primary() == Some(1)), "{:?}", world.shown);
    assert_eq!(goes(world), None);
}

#[test]
fn what_is_told_twice_or_of_no_offer_is_nothing() {
    let mut world = begun(2);
    hand_until(&mut world, sent);
    world.posts.push_back(Some(Post::Twice(3 * SECOND)));
    assert!(world.until(SECOND, |world| world.primary() == Some(1)));
    world.run(SECOND);
    // It names this process, and is of an offer that was never accepted, or that is old.
    let record = world.register.record().unwrap().clone();
    let (first, second) = (world.nodes[0].settings.me.clone(), world.nodes[1].settings.me.clone());
    let old = world.goes_on_from.len();
    assert_eq!(old, 1);
    for (at, me) in [(0, first), (1, second)] {
        let mut record = record.clone();
        record.attempt = Attempt(4711);
        if let LeaseState::Held(tenure) = &mut record.state {
            tenure.holder = me;
            tenure.epoch = crate::txid::Epoch::new(9, 9);
        }
        let version = crate::lease::Version::new("4711");
        world.give(at, Input::Handed { record: Box::new(record), version });
    }
    world.run(4 * SECOND);
    assert_eq!((world.primary(), world.violation), (Some(1), None));
    assert_eq!(world.nodes[1].disk.epochs.epoch(), world.leases[1].2, "it goes on in its epoch");
}

#[test]
fn a_lease_that_ends_while_commits_are_withheld_is_handed_to_no_node() {
    let ends: [fn(&mut World); 2] =
        [|world| world.nodes[0].reaches_store = false, |world| world.give(0, Input::Heard(9))];
    for end in ends {
        let mut world = begun(3);
        world.nodes[0].settings.withhold_limit = 20 * super::world::LEASE;
        if let Some(election) = &mut world.nodes[0].election {
            election.settings.withhold_limit = 20 * super::world::LEASE;
        }
        world.nodes[0].withholds_in = 3 * SECOND;
        hand_until(&mut world, |world| world.nodes[0].withholding.is_some());
        end(&mut world);
        assert!(world.until(2 * SECOND, |world| !world.ended.is_empty()), "it does not end");
        assert_eq!(world.ended, [Err(NotHanded::Ended)]);
        world.run(10 * SECOND);
        assert!(world.goes_on_from.is_empty(), "a handoff was written");
        assert!(world.write_acked().is_some(), "{:?}", world.shown);
        assert_eq!(world.violation, None);
    }
}

#[test]
fn the_lease_is_renewed_while_commits_are_withheld() {
    let mut world = begun(2);
    world.nodes[0].withholds_in = 2500 * MS;
    let place = world.register.place();
    hand_until(&mut world, |world| world.nodes[0].withholding.is_some());
    assert!(world.until(4 * SECOND, |world| world.primary() == Some(1)), "{:?}", world.ended);
    assert!(world.register.place() >= place + 5, "it was not renewed");
    assert_eq!(goes(world), None);
    // A driver that never ends is not waited for.
    let mut world = begun(2);
    world.nodes[0].withholds_in = 60 * SECOND;
    hand_until(&mut world, |world| world.nodes[0].withholding.is_some());
    assert!(world.until(4 * SECOND, |world| !world.ended.is_empty()), "it is waited for");
    assert!(world.write_acked().is_some());
}

#[test]
fn while_elections_are_paused_a_handoff_a_restart_and_an_operator_work() {
    let mut world = begun(3);
    let mut record = world.register.record().unwrap().clone();
    record.paused = true;
    world.register.put(Content::Record(Box::new(record)));
    world.run(SECOND);
    ask(&mut world, Some(1));
    assert!(world.until(SECOND, |world| world.primary() == Some(1)), "{:?}", world.ended);
    world.run(3 * SECOND);
    assert!(world.register.record().is_some_and(|record| record.paused), "the pause is over");
    world.kill(1);
    world.start(1);
    assert!(world.until(SECOND, |world| world.primary() == Some(1)), "it does not take its own lease");
    world.run(SECOND);
    world.kill(1);
    world.run(6 * SECOND);
    assert_eq!(world.primary(), None);
    world.command(2, Command::PromoteUnchecked);
    assert!(world.until(5 * SECOND, |world| world.primary() == Some(2)), "{:?}", world.shown);
    assert!(world.register.record().is_some_and(|record| record.paused) && world.violation.is_none());
}

#[test]
fn a_node_that_ends_hands_the_lease_over_and_else_gives_it_back() {
    // The step at which it is told to end, as part of a handoff or not; what goes wrong.
    let wrongs: [fn(&mut World); 6] = [
        |_| {},
        |world| world.nodes[1].draining = true,
        |world| world.nodes[0].withhold_fails = true,
        |world| world.fates.entry(0).or_default().push_back(Fate::Refused),
        |world| world.fates.entry(0).or_default().push_back(Fate::Lost),
        |world| world.fates.entry(0).or_default().push_back(Fate::Silent { there: 5 * MS }),
    ];
    for (number, wrong) in wrongs.into_iter().enumerate() {
        for during in [false, true] {
            let mut world = begun(2);
            let value = world.write_acked().unwrap();
            world.run(120 * MS);
            wrong(&mut world);
            if during {
                ask(&mut world, None);
                world.run(6 * MS);
            }
            world.command(0, Command::Leave);
            let most = if matches!(number, 4 | 5) { 1800 * MS } else { 900 * MS };
            assert!(world.until(most, |world| world.nodes[0].left), "{number}, {during}: it has not left");
            world.nodes[1].draining = false;
            assert!(world.until(700 * MS, |world| world.primary() == Some(1)), "{number}: {:?}", world.shown);
            assert!(world.has(1, value) && world.write_acked().is_some());
            assert_eq!(goes(world), None);
        }
    }
    let mut world = begun(1);
    world.command(0, Command::Leave);
    assert!(world.until(300 * MS, |world| world.nodes[0].left), "it has not left");
    assert!(matches!(world.register.record().unwrap().state, LeaseState::Released(_)));
}

#[test]
fn a_target_that_ends_gives_back_what_it_is_handed() {
    let mut world = begun(3);
    hand_until(&mut world, accepted);
    world.command(1, Command::Leave);
    assert!(world.until(SECOND, |world| world.nodes[1].left), "it has not left");
    assert!(world.until(SECOND, |world| world.primary().is_some()), "the lease time is waited for");
    assert_eq!(goes(world), None);
}

#[test]
fn a_command_joins_the_handoff_that_is_under_way_or_is_refused() {
    let mut world = begun(3);
    let [first, second, third] = [0, 1, 2].map(|at| world.nodes[at].id());
    world.command(1, Command::Handoff { to: None });
    world.command(0, Command::Handoff { to: Some(first) });
    world.run(MS);
    assert_eq!((world.refused.pop(), world.ended.pop()), (Some(NotHanded::NotPrimary), Some(Ok(first))));
    let stranger = NodeId::from_u128(99);
    world.command(0, Command::Handoff { to: Some(stranger) });
    world.run(MS);
    assert_eq!(world.ended.pop(), Some(Err(NotHanded::NotConnected(stranger))));
    world.nodes[2].settings.candidate = false;
    world.nodes[2].election.as_mut().unwrap().settings.candidate = false;
    ask(&mut world, Some(2));
    assert!(world.until(SECOND, |world| !world.ended.is_empty()));
    assert_eq!(world.ended.pop(), Some(Err(NotHanded::NotFit(third))));
    world.nodes[0].withholds_in = 200 * MS;
    hand_until(&mut world, |world| world.nodes[0].withholding.is_some());
    ask(&mut world, None);
    ask(&mut world, Some(1));
    ask(&mut world, Some(2));
    // It leads already.
    world.command(0, Command::PromoteUnchecked);
    world.run(MS);
    assert_eq!((&world.refused[..], world.ended.len()), (&[NotHanded::UnderWay][..], 0));
    assert!(world.until(SECOND, |world| world.primary() == Some(1)), "{:?}", world.ended);
    assert_eq!(world.ended, [Ok(second)]);
    world.run(4 * SECOND);
    assert_eq!((world.primary(), world.violation), (Some(1), None));
}

#[test]
fn an_operator_can_see_how_a_handoff_went() {
    let mut world = begun(2);
    ask(&mut world, Some(1));
    assert!(world.until(SECOND, |world| world.primary() == Some(1)));
    let decided = |at: usize| -> Vec<Choice> {
        let election = world.nodes[at].election.as_ref().unwrap();
        let all = election.decisions().map(|decided| decided.what.clone());
        all.filter(|what| !matches!(what, Choice::Shows(_))).collect()
    };
    let (target, epoch) = (world.nodes[1].id(), world.nodes[1].disk.epochs.epoch());
    let old = world.leases[0].2;
    let holders = [
        Choice::SeeksTarget,
        Choice::Offers(target),
        Choice::Fences(old),
        Choice::HandsOver(target, epoch),
        Choice::Handed(target),
    ];
    assert!(decided(0).windows(5).any(|five| five == holders), "{:?}", decided(0));
    assert!(
        decided(1).windows(2).any(|two| two == [Choice::Accepts, Choice::Took(epoch)]),
        "{:?}",
        decided(1)
    );
    let offers = world.nodes[0].election.as_ref().unwrap().decisions();
    let answers = offers.filter(|decided| decided.what == Choice::Offers(target)).map(|of| of.answers.len());
    assert_eq!(answers.collect::<Vec<_>>(), [1]);
    for what in decided(0).into_iter().chain(decided(1)) {
        assert!(!what.to_string().is_empty());
    }
}
