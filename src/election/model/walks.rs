//! Schedules by chance.

use std::collections::HashMap;
use std::time::Instant;

use super::node::{Disk, Time};
use super::store::Content;
use super::world::{Chaos, LEASE, MS, Rng, SECOND, World};
use crate::election::rules::{Rule, without};
use crate::election::{Command, Input};
use crate::lease::record::Record;

/// How many schedules are tried; `REPLITE_MODEL_WALKS` says another number.
const WALKS: u64 = 150;
/// The true time that each takes until all is well again.
const TROUBLE: Time = 14 * SECOND;

/// What a schedule came to.
#[derive(Debug, Default)]
struct Walk {
    wrong: Option<String>,
    acked: usize,
    epochs: usize,
    handed: usize,
    kept: usize,
}

/// Faults that make no node eligible, or that an operator has to end.
#[derive(Default)]
struct Given {
    /// No node may be able to lead by the rules.
    stuck: bool,
    /// A disk went back: what was acknowledged may be on no other.
    disks_lost: bool,
}

fn drift(world: &mut World) {
    for at in 0..world.nodes.len() {
        world.nodes[at].rate = 900_000 + world.rng.below(200_001);
        world.nodes[at].promotes_in = (5 + world.rng.below(200)) * MS;
        world.nodes[at].withholds_in = (1 + world.rng.below(400)) * MS;
        world.nodes[at].batch = if world.rng.percent(70) { usize::MAX } else { 1 };
    }
}

fn chaos(rng: &mut Rng) -> Chaos {
    let mut some = |most: u64| if rng.percent(50) { rng.below(most) } else { 0 };
    Chaos {
        silent: some(15),
        lost: some(15),
        repeated: some(15),
        refused: some(15),
        stale: some(25),
        slow: some(15),
        fails: some(15),
        messages: some(25),
    }
}

fn edit(world: &mut World, change: impl FnOnce(&mut Record)) {
    if let Content::Record(record) = world.register.content() {
        let mut record = record.clone();
        change(&mut record);
        world.register.put(Content::Record(record));
    }
}

/// One more thing goes wrong, or right again.
fn trouble(world: &mut World, given: &mut Given) {
    let at = world.rng.below(world.nodes.len() as u64) as usize;
    let runs = world.nodes[at].election.is_some();
    let leads = world.primary() == Some(at);
    match world.rng.below(108) {
        0..20 if runs => world.kill(at),
        0..35 if !runs => start(world, at),
        20..32 if runs => {
            let time = world.rng.below(4000) * MS;
            world.stop(at, time);
        }
        32..50 => world.nodes[at].reaches_store ^= true,
        50..65 => {
            let other = world.rng.below(world.nodes.len() as u64) as usize;
            let link = (at.min(other), at.max(other));
            match world.cut.iter().position(|cut| *cut == link) {
                Some(known) => drop(world.cut.remove(known)),
                None if at != other => world.cut.push(link),
                None => {}
            }
        }
        65..68 => world.nodes[at].draining ^= true,
        68..73 => world.nodes[at].healthy ^= true,
        73..76 if runs => world.command(at, Command::Leave),
        76..79 => edit(world, |record| record.paused ^= true),
        79..82 if runs && leads => {
            let number = world.nodes[at].disk.epochs.epoch().number() + 1 + world.rng.below(3);
            world.give(at, Input::Heard(number));
        }
        82..84 => {
            world.register.put(Content::Empty);
            given.stuck = true;
        }
        84..86 => {
            world.register.put(Content::Garbled);
            given.stuck = true;
        }
        86..88 if !runs => {
            // Last night's volume, or a new one.
            let to = world.rng.below(world.nodes[at].disk.entries.len() as u64 + 1) as usize;
            given.disks_lost = true;
            given.stuck = true;
            let disk = &mut world.nodes[at].disk;
            if to == 0 {
                *disk = Disk::default();
            } else {
                disk.go_back(to);
            }
        }
        88..90 if runs => world.command(at, Command::PromoteUnchecked),
        90..94 => world.nodes[at].fails ^= true,
        100.. => {
            let to = world.nodes[at].id();
            let to = if world.rng.percent(50) { Some(to) } else { None };
            if let Some(primary) = world.primary() {
                world.command(primary, Command::Handoff { to });
            }
        }
        _ => {
            let most = if world.rng.percent(50) { usize::MAX } else { 0 };
            world.nodes[at].batch = most;
        }
    }
}

fn start(world: &mut World, at: usize) {
    if world.rng.percent(30) {
        let boot = format!("boot {}", world.rng.next());
        world.nodes[at].settings.me.boot = boot;
    }
    world.start(at);
}

/// All that is wrong ends.
fn mend(world: &mut World) {
    world.chaos = Chaos::default();
    world.cut.clear();
    edit(world, |record| record.paused = false);
    for at in 0..world.nodes.len() {
        let node = &mut world.nodes[at];
        (node.reaches_store, node.healthy, node.draining, node.fails) = (true, true, false, false);
        node.batch = usize::MAX;
        if node.election.is_none() {
            world.start(at);
        }
    }
}

fn writes(world: &mut World) {
    for at in 0..world.nodes.len() {
        if world.rng.percent(60) {
            world.write(at);
        }
    }
}

fn walk(seed: u64) -> Walk {
    let mut world = World::new(3, seed);
    let count = 3 + world.rng.below(3) as usize;
    world = World::new(count, seed);
    world.nodes.iter_mut().for_each(|node| node.settings.bootstrap = Some(count));
    drift(&mut world);
    world.start_all();
    world.until(20 * SECOND, |world| world.primary().is_some());
    if world.primary().is_none() {
        return Walk { wrong: Some("no first start".into()), ..Walk::default() };
    }
    world.chaos = chaos(&mut world.rng);
    let mut given = Given::default();
    let (end, pace) = (world.now + TROUBLE, 300 + world.rng.below(1500));
    while world.now < end && world.violation.is_none() {
        let next = world.rng.below(pace) * MS;
        let until = world.now + next;
        while world.now < until {
            let step = world.rng.below(200) * MS;
            world.run(step);
            writes(&mut world);
        }
        trouble(&mut world, &mut given);
    }
    mend(&mut world);
    let wrong = world.violation.take().or_else(|| ends_well(&mut world, &given));
    let handed = world.ended.iter().filter(|ended| ended.is_ok()).count();
    let kept = world.ended.len() - handed;
    Walk { wrong, acked: world.acked.len(), epochs: world.leases.len(), handed, kept }
}

/// Whether a primary is there in time once all is well, and nothing that was promised is nowhere.
fn ends_well(world: &mut World, given: &Given) -> Option<String> {
    let stops = world.nodes.iter().filter_map(|node| node.stopped_until).max().unwrap_or(0);
    let rest = stops.saturating_sub(world.now);
    world.run(rest + 3 * SECOND);
    // What was told to end while it was stopped has ended now.
    for at in 0..world.nodes.len() {
        if world.nodes[at].election.is_none() {
            world.start(at);
        }
    }
    let back_off = (0..world.nodes.len()).map(|at| world.back_off(at)).max().unwrap_or(0);
    let lease = LEASE.as_micros() as Time;
    let most = lease * 5 / 4 * 2 + 6 * SECOND + back_off;
    // One whose record is gone leads until its time is over.
    let there = |world: &World| world.primary().is_some() && world.register.record().is_some();
    if !world.until(most, there) {
        if world.violation.is_some() {
            return world.violation.take();
        }
        if !given.stuck {
            return Some(format!("no primary: {:?}, {:?}", world.shown, world.register.content()));
        }
        let best = (0..world.nodes.len()).max_by_key(|at| {
            let disk = &world.nodes[*at].disk;
            (disk.epochs.epoch().number(), disk.entries.len())
        })?;
        world.command(best, Command::PromoteUnchecked);
        if !world.until(most, there) {
            let content = world.register.content();
            return Some(format!("an operator's word did not help: {:?}, {content:?}", world.shown));
        }
    }
    world.write_acked();
    world.run(4 * SECOND);
    world.violation.take().or_else(|| nothing_is_nowhere(world, given))
}

/// Each acknowledged write is in the history, or in what was lost, and that within the bound.
fn nothing_is_nowhere(world: &World, given: &Given) -> Option<String> {
    let Some(primary) = world.primary() else { return Some("the primary is gone".into()) };
    let here: HashMap<u64, ()> =
        world.nodes[primary].disk.entries.iter().map(|entry| (entry.value, ())).collect();
    for acked in &world.acked {
        if here.contains_key(&acked.value) {
            continue;
        }
        if !given.disks_lost && !world.was_lost(acked.value) {
            return Some(format!("{acked:?} is nowhere"));
        }
        let last = world.last_ack.get(&acked.epoch).copied().unwrap_or(0);
        let bound = (2 * SECOND + LEASE.as_micros() as Time) * 5 / 4;
        if !given.stuck && !world.unchecked && last - acked.at > bound {
            return Some(format!("{acked:?} is lost, beyond the bound: the last was at {last}"));
        }
    }
    None
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn walks_keep_the_invariants() {
    if let Some(seed) = number("REPLITE_MODEL_SEED") {
        assert_eq!(walk(seed).wrong, None);
        return;
    }
    let (begun, walks) = (Instant::now(), number("REPLITE_MODEL_WALKS").unwrap_or(WALKS));
    let (mut acked, mut epochs, mut handed, mut kept) = (0, 0, 0, 0);
    let mut wrong = Vec::new();
    for seed in 0..walks {
        let walk = walk(seed);
        (acked, epochs) = (acked + walk.acked, epochs + walk.epochs);
        (handed, kept) = (handed + walk.handed, kept + walk.kept);
        wrong.extend(walk.wrong.map(|what| format!("REPLITE_MODEL_SEED={seed}: {what}")));
        if wrong.len() == 5 {
            break;
        }
    }
    println!("{walks} schedules in {:?}, {acked} acknowledged, {epochs} epochs", begun.elapsed());
    println!("{handed} handoffs, and {kept} that came to nothing");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(acked > walks as usize && epochs > walks as usize, "nothing happens in the walks");
    assert!(handed * 4 > walks as usize && kept * 4 > walks as usize, "few handoffs in the walks");
}

/// The rules that a walk comes upon by itself. For each it begins near a seed that shows it.
#[test]
fn walks_find_what_is_wrong_without_a_rule() {
    let rules = [
        (Rule::WholeWait, 0),
        (Rule::KnownTake, 350),
        (Rule::LossBound, 700),
        (Rule::EndedStays, 100),
        (Rule::HandoffCloses, 0),
        (Rule::HandoffUnknown, 0),
    ];
    for (rule, first) in rules {
        let found = without(Some(rule), || (first..first + 1000).find(|seed| walk(*seed).wrong.is_some()));
        assert!(found.is_some(), "no walk goes wrong without {rule:?}");
    }
}
