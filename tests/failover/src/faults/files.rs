//! Somebody deletes or replaces a node's files while it is down.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;

use crate::clock::now;
use crate::faults::ways::alone;
use crate::faults::{Troubled, Whom, end, millis, ready, replica, whom};
use crate::member::Member;
use crate::store::StoreKind;
use crate::world::World;

/// Until a member that lost what it had votes again.
const VOTES_LIMIT: Duration = Duration::from_secs(20);

/// No other fault does something to a process or its files.
pub(super) async fn all_turns(world: &World) -> Vec<tokio::sync::MutexGuard<'_, ()>> {
    let mut turns = Vec::new();
    for member in &world.members {
        turns.push(member.turn.lock().await);
    }
    turns
}

fn destroyed(world: &World, member: &Member) {
    world.history().destroyed.push((member.name.clone(), now()));
}

fn copy(world: &World, from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    if !copied.as_ref().is_ok_and(|status| status.success()) {
        world.violation("harness", format!("{} can't be copied: {copied:?}", from.display()));
    }
}

fn remove(world: &World, dir: &Path) {
    if let Err(error) = std::fs::remove_dir_all(dir) {
        world.violation("harness", format!("{} can't be removed: {error}", dir.display()));
    }
}

/// What a node has of Raft, where the nodes themselves keep the lease's record.
fn of_raft(member: &Member) -> PathBuf {
    member.dir.join("app.db-replite/members")
}

/// Whether most nodes can lose no more of the record: each has a vote by now. Waits for that.
async fn all_vote(world: &World) -> bool {
    if world.setting.store() != Some(StoreKind::Members) {
        return true;
    }
    let votes = |member: &Arc<Member>| member.standing().is_some_and(|standing| standing.votes);
    let all = world.comes(VOTES_LIMIT, || world.members.iter().all(votes)).await;
    if !all {
        world.note("a member has no vote yet: no other one loses what it has");
    }
    all
}

/// A node loses what it has of Raft, and nothing else.
pub(super) async fn raft_gone(world: &Arc<World>, rng: &mut StdRng) {
    let (pause, killed) = (millis(rng, 0, 2500), rng.random_bool(0.5));
    let which = if rng.random() { Whom::Primary } else { Whom::Any };
    let _turns = all_turns(world).await;
    if !all_vote(world).await {
        return;
    }
    let member = whom(world, rng, which);
    world.note(format!("{} loses what it has of Raft, killed: {killed}, down for {pause:?}", member.name));
    let _troubled = Troubled::new(world, true);
    match killed {
        true => member.kill(),
        false => end(world, &member).await,
    }
    remove(world, &of_raft(&member));
    tokio::time::sleep(pause).await;
    world.start(&member);
}

/// A node loses its directory; and the others may be down when it returns.
pub(super) async fn emptied(world: &Arc<World>, rng: &mut StdRng, is_alone: bool) {
    let (wait, more) = (millis(rng, 0, 1500), millis(rng, 0, 2000));
    let leads = rng.random_bool(0.3);
    let _turns = all_turns(world).await;
    if !all_vote(world).await {
        return;
    }
    let member = if leads { whom(world, rng, Whom::Primary) } else { replica(world, rng) };
    world.note(format!("{} loses its directory, alone: {is_alone}", member.name));
    let _troubled = Troubled::new(world, true);
    member.kill();
    destroyed(world, &member);
    remove(world, &member.dir);
    if is_alone {
        let others = world.members.iter().filter(|other| other.index != member.index);
        others.for_each(|other| other.kill());
        world.start(&member);
        alone(world, member.index, "has nothing", true, more).await;
    } else {
        tokio::time::sleep(wait).await;
        world.start(&member);
    }
}

/// An old copy of a node's directory takes its place; and the others may be down when it returns.
pub(super) async fn old_copy(world: &Arc<World>, rng: &mut StdRng, is_alone: bool) {
    let (leads, more) = (rng.random_bool(0.4), millis(rng, 0, 2000));
    let _turns = all_turns(world).await;
    if !all_vote(world).await {
        return;
    }
    let member = if leads { whom(world, rng, Whom::Primary) } else { replica(world, rng) };
    let kept = world.home.join(format!("{}.old", member.name));
    let _troubled = Troubled::new(world, true);
    // A copy of files at rest.
    end(world, &member).await;
    if kept.exists() {
        remove(world, &kept);
    }
    copy(world, &member.dir, &kept);
    world.start(&member);
    ready(world, &member).await;
    let before = world.leader().and_then(|leader| leader.standing());
    let time = world.setting.loss_bound() + Duration::from_secs(2);
    world.note(format!("{} is copied, and goes on for {time:?}", member.name));
    tokio::time::sleep(time).await;
    let after = world.leader().and_then(|leader| leader.standing());
    let number = |standing: &Option<crate::node::Standing>| Some(standing.as_ref()?.position?.number());
    let old = matches!((number(&before), number(&after)), (Some(before), Some(after)) if after > before + 3);
    world.note(format!("the old copy of {} takes its place, alone: {is_alone}", member.name));
    member.kill();
    destroyed(world, &member);
    remove(world, &member.dir);
    copy(world, &kept, &member.dir);
    if of_raft(&member).exists() {
        // That is never restored.
        remove(world, &of_raft(&member));
    }
    if is_alone {
        let others = world.members.iter().filter(|other| other.index != member.index);
        others.for_each(|other| other.kill());
        world.start(&member);
        alone(world, member.index, "is an old copy", old, more).await;
    } else {
        world.start(&member);
    }
}

/// A second process is started on a copy of a node's directory, while that node runs.
pub(super) async fn twin(world: &Arc<World>, rng: &mut StdRng) {
    let (time, kill) = (millis(rng, 2000, 6000), rng.random_bool(0.3));
    let _turns = all_turns(world).await;
    let member = if rng.random() { whom(world, rng, Whom::Primary) } else { replica(world, rng) };
    let twin = &world.spare;
    if member.index == twin.index {
        return;
    }
    world.note(format!("a copy of {} runs as {} for {time:?}", member.name, twin.name));
    let _troubled = Troubled::new(world, true);
    remove(world, &twin.dir);
    copy(world, &member.dir, &twin.dir);
    world.start(twin);
    tokio::time::sleep(time).await;
    let id = |member: &Member| member.standing().map(|standing| standing.id);
    if id(twin).is_some() && id(twin) == id(&member) {
        world.violation("1 one primary", format!("{} and {} have one id", twin.name, member.name));
    }
    if kill {
        world.note(format!("kill {}", twin.name));
        twin.kill();
    } else {
        end(world, twin).await;
    }
    // What only it had is gone with it.
    destroyed(world, twin);
}
