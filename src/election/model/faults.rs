//! What operators and users see when something fails: each ends well, and in time.

use std::time::Duration;

use super::node::Engine;
use super::store::Content;
use super::world::{Fate, MS, SECOND, World};
use crate::election::{Action, Command, ENTRIES_MOST, Election, Input, Note, Shown, Unread};
use crate::lease::Version;
use crate::lease::record::{KnownNode, LeaseState};
use crate::peer::NodeId;
use crate::status::{Addresses, PeerInfo, WaitReason};

/// Runs until a node leads, and says how long that took.
fn until_led(world: &mut World, most: u64) -> u64 {
    let begun = world.now;
    let led = world.until(most, |world| world.primary().is_some());
    assert_eq!(world.violation, None);
    assert!(led, "no primary: {:?}, {:?}", world.shown, world.register.content());
    world.now - begun
}

#[test]
fn a_killed_primary_costs_a_lease_time_and_its_restart_next_to_nothing() {
    for wait in 0..20 {
        let mut world = World::begun(3);
        world.run(wait * 37 * MS);
        world.kill(0);
        assert!(until_led(&mut world, 5 * SECOND) < 2400 * MS);
        let leader = world.primary().unwrap();
        assert!(world.write_acked().is_some());
        world.kill(leader);
        world.start(leader);
        assert!(until_led(&mut world, 5 * SECOND) < 400 * MS, "the last holder waited");
        assert_eq!(world.primary(), Some(leader));
    }
}

#[test]
fn a_store_that_is_away_for_minutes_costs_the_primary_and_comes_back_by_itself() {
    let mut world = World::begun(3);
    world.nodes.iter_mut().for_each(|node| node.reaches_store = false);
    world.run(1700 * MS);
    assert_eq!((world.primary(), &world.shown[0]), (None, &Some(Shown::Fencing)));
    // What others commit meanwhile is history of the epoch that comes.
    let between = world.write(0).expect("the database can be written to");
    world.run(180 * SECOND);
    assert_eq!(world.shown[1], Some(Shown::Waiting(WaitReason::StoreUnavailable)));
    assert_eq!(world.primary(), None);
    world.nodes.iter_mut().for_each(|node| node.reaches_store = true);
    assert!(until_led(&mut world, 5 * SECOND) < SECOND);
    assert_eq!(world.primary(), Some(0));
    assert!(world.has(0, between));
    assert_eq!(world.nodes[0].disk.epochs.epoch().number(), 2, "it is a new epoch");
}

#[test]
fn a_record_that_is_deleted_is_written_anew_by_the_living_holder_only() {
    let mut world = World::begun(3);
    let before = world.nodes[0].disk.epochs.epoch();
    world.register.put(Content::Empty);
    world.run(2 * SECOND);
    assert_eq!(world.primary(), Some(0));
    assert!(world.nodes[0].disk.epochs.epoch() > before, "with a new epoch");
    world.kill(0);
    world.register.put(Content::Empty);
    world.run(10 * SECOND);
    assert_eq!(world.primary(), None);
    assert_eq!(world.shown[1], Some(Shown::Waiting(WaitReason::NoRecord)));
    world.command(1, Command::PromoteUnchecked);
    assert!(until_led(&mut world, 5 * SECOND) < 2500 * MS);
}

#[test]
fn over_a_record_that_is_not_understood_only_an_operator_leads() {
    let mut world = World::begun(2);
    world.register.put(Content::Garbled);
    world.run(10 * SECOND);
    assert_eq!(world.primary(), None);
    assert_eq!(world.shown[0], Some(Shown::Waiting(WaitReason::RecordNotOurs)));
    world.command(1, Command::PromoteUnchecked);
    until_led(&mut world, 5 * SECOND);
    assert_eq!(world.primary(), Some(1));
    world.run(3 * SECOND);
    assert_eq!(world.shown[0], Some(Shown::Replica));
}

#[test]
fn an_operators_word_counts_while_a_primary_stops_leading() {
    let stages: [fn(&World) -> bool; 3] = [
        |world| world.shown[0] == Some(Shown::Fencing),
        |world| matches!(world.nodes[0].engine, Engine::Demoting(_)),
        |world| matches!(world.nodes[0].engine, Engine::Follows(_)),
    ];
    for stage in stages {
        let mut world = World::begun(2);
        world.register.put(Content::Garbled);
        assert!(world.until(5 * SECOND, stage), "the primary does not stop");
        world.command(0, Command::PromoteUnchecked);
        until_led(&mut world, 5 * SECOND);
        assert_eq!(world.primary(), Some(0));
    }
    // A primary that serves leads already: it does not take the lease once more later.
    let mut world = World::begun(2);
    world.command(0, Command::PromoteUnchecked);
    world.run(SECOND);
    world.register.put(Content::Garbled);
    world.run(10 * SECOND);
    assert_eq!(world.primary(), None);
}

#[test]
fn an_operator_does_not_take_it_from_a_living_primary() {
    let mut world = World::begun(2);
    world.command(1, Command::PromoteUnchecked);
    world.run(6 * SECOND);
    assert_eq!(world.primary(), Some(0));
    let holder = world.nodes[0].id();
    assert_eq!(world.notes, [Note::NotTaken { holder }]);
    assert_eq!(world.violation, None);
}

#[test]
fn a_failed_promotion_gives_the_lease_to_another_node() {
    let mut world = World::begun(3);
    world.nodes[1].fails = true;
    world.kill(0);
    let took = until_led(&mut world, 5 * SECOND);
    assert_eq!(world.primary(), Some(2));
    assert!(took < 3 * SECOND, "{took}");
    world.run(3 * SECOND);
    assert_eq!((world.primary(), &world.shown[1]), (Some(2), &Some(Shown::Replica)));
}

#[test]
fn a_primary_that_cannot_go_on_with_a_new_epoch_gives_the_lease_back() {
    let mut world = World::begun(2);
    let value = world.write_acked().unwrap();
    world.run(200 * MS);
    world.nodes[0].fails = true;
    world.register.put(Content::Empty);
    assert!(world.until(3 * SECOND, |world| world.primary() == Some(1)), "the other one does not lead");
    assert!(world.has(1, value) && world.violation.is_none());
}

#[test]
fn a_promotion_that_fails_everywhere_is_tried_again_and_again() {
    let mut world = World::begun(2);
    world.kill(0);
    world.nodes[1].fails = true;
    world.run(20 * SECOND);
    let tries = world.leases.len();
    assert!((3..10).contains(&tries), "{tries}");
    world.nodes[1].fails = false;
    until_led(&mut world, 40 * SECOND);
}

#[test]
fn a_promotion_that_hangs_keeps_the_lease_and_no_other_node_leads() {
    let mut world = World::begun(2);
    world.kill(0);
    world.nodes[1].promotes_in = 30 * SECOND;
    world.run(20 * SECOND);
    assert_eq!((world.holder(), &world.shown[1]), (Some(1), &Some(Shown::Promoting)));
    // It is gone before it served: all that there was is still what the record asks for.
    world.kill(1);
    world.start(0);
    until_led(&mut world, 5 * SECOND);
    assert_eq!(world.primary(), Some(0));
}

#[test]
fn a_primary_that_cannot_commit_gives_the_lease_back() {
    let mut world = World::begun(2);
    world.nodes[0].healthy = false;
    world.run(3 * SECOND);
    assert_eq!(world.primary(), Some(1));
    assert_eq!(world.violation, None);
}

#[test]
fn a_node_that_ends_gives_the_lease_back_and_loses_nothing() {
    let mut world = World::begun(2);
    let value = world.write_acked().unwrap();
    world.run(200 * MS);
    world.command(0, Command::Leave);
    assert!(world.until(SECOND, |world| world.nodes[0].left), "it has left");
    assert!(until_led(&mut world, 5 * SECOND) < SECOND, "no lease time is waited for");
    assert!(world.has(1, value));
}

#[test]
fn a_node_ends_without_a_store_too() {
    for silent in [false, true] {
        let mut world = World::begun(2);
        world.nodes[0].reaches_store = silent;
        world.fates.entry(0).or_default().extend([Fate::Lost; 20]);
        world.command(0, Command::Leave);
        assert!(world.until(5 * SECOND, |world| world.nodes[0].left), "it has left");
    }
    let mut world = World::begun(2);
    world.command(1, Command::Leave);
    assert!(world.until(SECOND, |world| world.nodes[1].left), "it has left");
    assert_eq!(world.primary(), Some(0));
}

#[test]
fn a_node_ends_at_once_that_takes_the_first_lease_meanwhile() {
    let mut world = World::new(1, 1);
    world.nodes[0].settings.bootstrap = Some(1);
    world.fates.entry(0).or_default().extend([Fate::Answered { there: 50 * MS, back: 50 * MS }; 2]);
    world.start(0);
    let takes = |world: &World| world.nodes[0].election.as_ref().is_some_and(|of| of.swaps.may_take());
    assert!(world.until(5 * SECOND, takes), "it takes no lease");
    world.command(0, Command::Leave);
    assert!(world.until(200 * MS, |world| world.nodes[0].left), "it has not left");
}

#[test]
fn a_stopped_primary_acknowledges_nothing_when_it_goes_on() {
    let mut world = World::begun(3);
    world.write(0);
    world.stop(0, 10 * SECOND);
    world.run(5 * SECOND);
    assert_eq!(world.primary(), Some(1));
    world.run(10 * SECOND);
    assert_eq!((world.primary(), &world.shown[0]), (Some(1), &Some(Shown::Replica)));
    assert_eq!(world.violation, None);
}

#[test]
fn all_may_be_down_and_start_in_any_order() {
    for first in 0..3 {
        let mut world = World::begun(3);
        let value = world.write_acked().unwrap();
        world.run(SECOND);
        (0..3).for_each(|at| world.kill(at));
        world.run(60 * SECOND);
        for at in 0..3 {
            world.start((first + at) % 3);
            world.run(700 * MS);
        }
        until_led(&mut world, 5 * SECOND);
        assert!(world.has(world.primary().unwrap(), value));
    }
}

#[test]
fn a_node_that_is_no_candidate_and_one_that_drains_never_lead() {
    let mut world = World::begun(2);
    world.kill(0);
    world.nodes[1].draining = true;
    world.run(6 * SECOND);
    assert_eq!(world.shown[1], Some(Shown::Waiting(WaitReason::Draining)));
    world.kill(1);
    world.nodes[1].draining = false;
    world.nodes[1].settings.candidate = false;
    world.start(1);
    world.run(6 * SECOND);
    assert_eq!(world.shown[1], Some(Shown::Waiting(WaitReason::NotCandidate)));
    assert_eq!(world.primary(), None);
}

#[test]
fn two_processes_with_one_id_are_told_and_do_not_take_it_from_each_other() {
    let mut world = World::begun(2);
    let copy = world.fork(0);
    world.kill(copy);
    world.nodes[copy].settings.me.boot = "elsewhere".into();
    world.start(copy);
    world.run(6 * SECOND);
    let incarnation = world.nodes[0].settings.me.incarnation;
    assert_eq!(world.notes, [Note::SameNode { incarnation }]);
    assert_eq!(world.nodes[copy].engine, Engine::Follows(None), "it does not follow itself");
    assert!(world.primary() == Some(0) && world.violation.is_none());
}

#[test]
fn two_databases_with_content_begin_no_cluster() {
    let mut world = World::new(3, 1);
    world.nodes.iter_mut().for_each(|node| node.settings.bootstrap = Some(3));
    (world.nodes[0].disk.content, world.nodes[2].disk.content) = (true, true);
    world.start_all();
    world.run(10 * SECOND);
    assert_eq!(world.primary(), None);
    let nodes = vec![world.nodes[0].id(), world.nodes[2].id()];
    assert!(world.notes.contains(&Note::SeveralWithContent(nodes)), "{:?}", world.notes);
    assert_eq!(world.shown[0], Some(Shown::Waiting(WaitReason::SeveralDatabases)));
}

#[test]
fn a_node_with_a_state_of_the_cluster_stops_a_first_start() {
    let mut world = World::begun(3);
    world.register.put(Content::Empty);
    (0..3).for_each(|at| world.kill(at));
    // Two nodes were replaced by new ones.
    (world.nodes[1].disk, world.nodes[2].disk) = Default::default();
    world.start_all();
    world.run(10 * SECOND);
    assert_eq!(world.primary(), None);
    let node = world.nodes[0].id();
    assert!(world.notes.contains(&Note::NoFirstStart(node)), "{:?}", world.notes);
}

#[test]
fn many_nodes_start_a_cluster_and_entries_of_others_that_are_gone_are_not_in_the_way() {
    // With these the answers come only with the limit, which is no shorter than the lease time.
    for gone in [0, 3] {
        let mut world = World::new(12 + gone, 1);
        world.nodes.iter_mut().for_each(|node| node.settings.bootstrap = Some(12));
        (12..12 + gone).for_each(|at| world.start(at));
        world.run(2 * SECOND);
        (12..12 + gone).for_each(|at| world.kill(at));
        (0..12).for_each(|at| world.start(at));
        until_led(&mut world, 10 * SECOND);
    }
}

#[test]
fn reads_that_take_long_do_not_keep_a_cluster_from_its_first_primary() {
    for slow in (260..=480).step_by(20) {
        let mut world = World::new(4, 1);
        world.nodes.iter_mut().for_each(|node| node.settings.bootstrap = Some(3));
        // One that is gone: the answers of the others come with the limit. Meanwhile each read is
        // late.
        world.start(3);
        world.run(2 * SECOND);
        world.kill(3);
        (0..3).for_each(|at| {
            world.slow_reads.insert(at, slow * MS);
            world.start(at);
        });
        assert!(until_led(&mut world, 60 * SECOND) < 10 * SECOND, "{slow} ms");
    }
}

#[test]
fn a_store_that_is_away_for_long_ends_what_was_prepared() {
    let mut world = World::begun(3);
    (0..3).for_each(|at| world.kill(at));
    // Not the last holder.
    (1..3).for_each(|at| world.start(at));
    world.run(1900 * MS);
    world.nodes.iter_mut().for_each(|node| node.reaches_store = false);
    world.run(30 * SECOND);
    let waits = Some(Shown::Waiting(WaitReason::StoreUnavailable));
    assert!(world.shown[1..].iter().all(|shown| *shown == waits), "{:?}", world.shown);
    world.nodes.iter_mut().for_each(|node| node.reaches_store = true);
    assert!(until_led(&mut world, 60 * SECOND) < 10 * SECOND);
}

#[test]
fn reads_that_take_long_do_not_keep_the_last_holder_from_its_lease() {
    let mut world = World::begun(3);
    (0..3).for_each(|at| world.kill(at));
    world.slow_reads.insert(0, 400 * MS);
    world.start(0);
    assert!(until_led(&mut world, 60 * SECOND) < 3 * SECOND);
}

#[test]
fn a_first_start_has_room_for_new_nodes_where_all_entries_are_of_others() {
    let mut world = World::new(3, 1);
    world.nodes.iter_mut().for_each(|node| node.settings.bootstrap = Some(3));
    world.start(0);
    world.run(SECOND);
    let mut record = world.register.record().unwrap().clone();
    let mut gone = record.nodes.remove(0);
    for at in 0..ENTRIES_MOST as u128 {
        gone.peer.node = NodeId::from_u128(1000 + at);
        record.nodes.push(gone.clone());
    }
    world.kill(0);
    world.register.put(Content::Record(Box::new(record)));
    world.start_all();
    until_led(&mut world, 40 * SECOND);
}

#[test]
fn an_entry_whose_labels_have_no_room_is_one_all_the_same() {
    let mut world = World::new(1, 1);
    world.nodes[0].settings.bootstrap = Some(2);
    let addresses = Addresses::new("http://a:1").label("zone", "1");
    world.nodes[0].settings.me.addresses = addresses;
    world.start(0);
    world.run(SECOND);
    let mut record = world.register.record().unwrap().clone();
    record.nodes[0].peer.addresses.labels.clear();
    world.register.put(Content::Record(Box::new(record)));
    let place = world.register.place();
    world.run(5 * SECOND);
    assert_eq!(world.register.place(), place, "it enters itself again and again");
}

#[test]
fn a_first_holder_that_is_gone_before_it_led_begins_once_more() {
    for opened in [false, true] {
        let mut world = World::new(3, 1);
        world.nodes.iter_mut().for_each(|node| {
            (node.settings.bootstrap, node.promotes_in) = (Some(3), SECOND);
        });
        world.start_all();
        assert!(world.until(5 * SECOND, |world| world.holder().is_some()), "no holder");
        let holder = world.holder().unwrap();
        world.run(if opened { 100 * MS } else { 0 });
        world.kill(holder);
        world.run(5 * SECOND);
        assert_eq!(world.primary(), None);
        world.start(holder);
        until_led(&mut world, 8 * SECOND);
        assert_eq!(world.primary(), Some(holder));
    }
}

#[test]
fn a_store_that_went_back_is_told_and_the_living_holder_writes_it_anew() {
    let mut world = World::begun(2);
    let place = world.register.place();
    world.run(3 * SECOND);
    world.register.go_back(place);
    world.run(3 * SECOND);
    assert_eq!(world.primary(), Some(0));
    assert_eq!(world.nodes[0].disk.epochs.epoch().number(), 2);
    assert!(matches!(world.notes[..], [Note::StoreWentBack(_), ..]), "{:?}", world.notes);
    assert_eq!(world.violation, None);
}

#[test]
fn a_store_that_shows_an_old_record_for_long_does_not_end_the_stream() {
    let mut world = World::begun(2);
    world.late_reads.insert(1, 1);
    world.run(2 * SECOND);
    let value = world.write_acked().unwrap();
    world.run(SECOND);
    assert!(world.primary() == Some(0) && world.has(1, value));
}

#[test]
fn a_holder_that_hears_of_its_own_epoch_is_given_the_lease_once_more() {
    let world = World::begun(2);
    for (heard, given) in [(0, true), (1, true), (2, false)] {
        let mut election = world.nodes[0].election.clone().unwrap();
        let (facts, now) = (world.nodes[0].facts([1, 2, 3, 4, 5, 6]), world.nodes[0].clock(world.now));
        let actions = election.decide(Input::Heard(heard), &facts, now);
        let lease = actions.iter().any(|action| matches!(action, Action::Lease { .. }));
        assert_eq!(lease, given, "{heard}: {actions:?}");
    }
}

#[test]
fn the_best_known_nodes_of_a_record_are_asked() {
    let mut world = World::begun(2);
    world.kill(0);
    let mut record = world.register.record().unwrap().clone();
    let known = record.nodes[0].clone();
    let ids = [7, 30, 4, 29, 3, 28, 9, 20, 6, 5, 8, 21].map(NodeId::from_u128);
    record.nodes = ids
        .map(|node| KnownNode {
            peer: PeerInfo { node, ..known.peer.clone() },
            has_state: true,
            has_content: true,
        })
        .to_vec();
    world.register.put(Content::Record(Box::new(record)));
    world.run(SECOND);
    let asked = world.nodes[1].election.as_ref().unwrap().known_peers(8);
    assert_eq!(asked.iter().map(|peer| peer.node).collect::<Vec<_>>(), ids[..8]);
}

#[test]
fn a_higher_epoch_is_kept_before_anything_is_done_about_it() {
    let mut world = World::begun(2);
    world.run(SECOND);
    let mut record = world.register.record().unwrap().clone();
    if let LeaseState::Held(tenure) = &mut record.state {
        tenure.epoch = crate::txid::Epoch::new(7, 7);
    }
    let mut election = Election::new(world.nodes[1].settings.clone());
    let facts = world.nodes[1].facts([1, 2, 3, 4, 5, 6]);
    let now = Duration::from_secs(5);
    assert!(election.decide(Input::Tick, &facts, now).contains(&Action::Read));
    let outcome = Ok(Some((record, Version::new("9"))));
    let actions = election.decide(Input::Read { begun: now, outcome }, &facts, now);
    assert_eq!(actions[0], Action::Hear(7));
    assert!(matches!(actions[1], Action::Follow(Some(_))), "{actions:?}");
    // Said once.
    let actions = election.decide(Input::Tick, &facts, now);
    assert!(matches!(actions[..], [Action::Wake(_)]), "{actions:?}");
    let outcome = Err(Unread::NotOurs { version: Version::new("10"), why: "garbled".into() });
    let actions = election.decide(Input::Read { begun: now, outcome }, &facts, now);
    assert!(actions.contains(&Action::Show(Shown::Waiting(WaitReason::RecordNotOurs))), "{actions:?}");
    assert!(election.decisions().count() >= 3);
}
