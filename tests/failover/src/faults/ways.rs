//! The network between the nodes fails.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;

use crate::faults::{Troubled, Whom, millis, replica, whom};
use crate::wires::Trouble;
use crate::world::World;

type Ways = Vec<(usize, usize)>;

/// Both ways between a node and each other one.
fn all_of(world: &World, node: usize) -> Ways {
    let others = (0..world.members.len()).filter(|other| *other != node);
    others.flat_map(|other| [(node, other), (other, node)]).collect()
}

fn trouble(rng: &mut StdRng) -> Trouble {
    if rng.random() { Trouble::Cut } else { Trouble::Silent }
}

async fn lasts(world: &World, what: String, ways: Ways, trouble: Trouble, time: Duration) {
    world.note(format!("{what}: {trouble:?} for {time:?}"));
    let _troubled = Troubled::new(world, true);
    world.wires.set(ways.iter().copied(), Some(trouble));
    tokio::time::sleep(time).await;
    world.wires.set(ways, None);
    world.note(format!("{what}: well again"));
}

pub(super) async fn cut_primary(world: &Arc<World>, rng: &mut StdRng) {
    let (trouble, time) = (trouble(rng), millis(rng, 500, 8000));
    let member = whom(world, rng, Whom::Primary);
    let what = format!("{} from all", member.name);
    lasts(world, what, all_of(world, member.index), trouble, time).await;
}

/// The primary is cut off, goes on for a while because its store is there, and dies.
pub(super) async fn cut_and_kill(world: &Arc<World>, rng: &mut StdRng) {
    let (trouble, time, down) = (trouble(rng), millis(rng, 300, 6000), millis(rng, 0, 6000));
    let member = whom(world, rng, Whom::Primary);
    let _turn = member.turn.lock().await;
    world.note(format!("{} from all, {trouble:?}; killed {time:?} later, for {down:?}", member.name));
    let _troubled = Troubled::new(world, true);
    world.wires.set(all_of(world, member.index), Some(trouble));
    tokio::time::sleep(time).await;
    member.kill();
    world.wires.set(all_of(world, member.index), None);
    tokio::time::sleep(down).await;
    world.start(&member);
}

pub(super) async fn cut_pair(world: &Arc<World>, rng: &mut StdRng) {
    let (trouble, time) = (trouble(rng), millis(rng, 500, 8000));
    let (one, two) = (whom(world, rng, Whom::Any), replica(world, rng));
    let what = format!("between {} and {}", one.name, two.name);
    lasts(world, what, vec![(one.index, two.index), (two.index, one.index)], trouble, time).await;
}

pub(super) async fn one_way(world: &Arc<World>, rng: &mut StdRng) {
    let (outward, time) = (rng.random::<bool>(), millis(rng, 500, 8000));
    let which = if rng.random() { Whom::Primary } else { Whom::Any };
    let member = whom(world, rng, which);
    let ways = all_of(world, member.index);
    let ways = ways.into_iter().filter(|(from, _)| (*from == member.index) == outward).collect();
    let what = format!("{} {}", if outward { "out of" } else { "into" }, member.name);
    lasts(world, what, ways, Trouble::Silent, time).await;
}

pub(super) async fn late(world: &Arc<World>, rng: &mut StdRng) {
    let (by, time) = (millis(rng, 5, 400), millis(rng, 1000, 6000));
    let ways = (0..world.members.len()).flat_map(|node| all_of(world, node)).collect();
    lasts(world, "all ways".into(), ways, Trouble::Late(by), time).await;
}

/// A replica gets nothing for longer than may be lost, and then all others die: it must wait.
pub(super) async fn behind_alone(world: &Arc<World>, rng: &mut StdRng) {
    let (trouble, down) = (trouble(rng), millis(rng, 0, 3000));
    let member = replica(world, rng);
    let mut turns = Vec::new();
    for member in &world.members {
        turns.push(member.turn.lock().await);
    }
    let Some(leader) = world.leader().filter(|leader| leader.index != member.index) else { return };
    let before = leader.standing().and_then(|standing| standing.position);
    let time = world.setting.loss_bound() + Duration::from_secs(2);
    world.note(format!("{} gets nothing for {time:?}", member.name));
    let _troubled = Troubled::new(world, true);
    world.wires.set(all_of(world, member.index), Some(trouble));
    tokio::time::sleep(time).await;
    let standing = leader.standing();
    // There is something that it lacks only if the other one led, and wrote, all the time.
    let led = standing.as_ref().is_some_and(|now| {
        let same = before.is_some_and(|before| before.epoch() == now.epoch);
        now.role == "primary" && same && now.position.map(|at| at.number()) > before.map(|at| at.number() + 3)
    });
    alone(world, member.index, "is behind by more than may be lost", led, down).await;
    world.wires.set(all_of(world, member.index), None);
}

/// All but one node are down for longer than the lease.
pub(super) async fn alone(world: &World, left: usize, why: &str, barred: bool, more: Duration) {
    let member = &world.members[left];
    world.note(format!("only {} is left, which {why} ({barred})", member.name));
    let others = || world.members.iter().filter(|other| other.index != left);
    others().for_each(|other| other.kill());
    if barred {
        member.bar(Some(why));
    }
    let time = world.setting.lease_time() * 2 + Duration::from_secs(2) + more;
    tokio::time::sleep(time).await;
    let waits = member.standing().map(|standing| (standing.role, standing.waits_for));
    world.note(format!("{} said meanwhile: {waits:?}", member.name));
    member.bar(None);
    others().for_each(|other| world.start(other));
}
