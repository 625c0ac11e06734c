//! Processes die, stand still, and end in good order; and what runs in them fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};

use crate::faults::{Troubled, Whom, end, millis, ready, whom};
use crate::world::World;

/// SIGKILL; a process manager starts it anew after a while.
pub(super) async fn kill(world: &Arc<World>, rng: &mut StdRng, which: Whom) {
    let (pause, at_once) = (millis(rng, 0, 4000), rng.random_bool(0.3));
    let member = whom(world, rng, which);
    let _turn = member.turn.lock().await;
    let pause = if at_once { Duration::ZERO } else { pause };
    world.note(format!("kill {}, down for {pause:?}", member.name));
    let _troubled = Troubled::new(world, matches!(which, Whom::Any));
    member.kill();
    tokio::time::sleep(pause).await;
    world.start(&member);
}

/// The node that leads is killed again and again, as soon as there is one.
pub(super) async fn kill_often(world: &Arc<World>, rng: &mut StdRng) {
    let _troubled = Troubled::new(world, true);
    for _ in 0..rng.random_range(2..6) {
        let (wait, pause) = (millis(rng, 0, 3000), millis(rng, 0, 1500));
        let member = whom(world, rng, Whom::Primary);
        let _turn = member.turn.lock().await;
        world.note(format!("kill {} of several, down for {pause:?}", member.name));
        member.kill();
        tokio::time::sleep(pause).await;
        world.start(&member);
        tokio::time::sleep(wait).await;
    }
}

/// All nodes are down at once, and start in any order.
pub(super) async fn all_down(world: &Arc<World>, rng: &mut StdRng, orderly: bool) {
    let mut order: Vec<usize> = (0..world.members.len()).collect();
    order.shuffle(rng);
    let pauses: Vec<Duration> = order.iter().map(|_| millis(rng, 0, 1500)).collect();
    let down = if rng.random() { Duration::ZERO } else { millis(rng, 0, 6000) };
    let mut turns = Vec::new();
    for member in &world.members {
        turns.push(member.turn.lock().await);
    }
    world.note(format!(
        "all down, orderly: {orderly}, for {down:?}, then in the order {order:?} with {pauses:?}"
    ));
    let troubled = Troubled::new(world, true);
    if orderly {
        // One after the other, so that each can give its lease to what is left; or all at once.
        if rng.random() {
            for member in &world.members {
                end(world, member).await;
            }
        } else {
            let mut ends = tokio::task::JoinSet::new();
            for member in world.members.clone() {
                let world = world.clone();
                ends.spawn(async move { end(&world, &member).await });
            }
            while ends.join_next().await.is_some() {}
        }
    } else {
        world.members.iter().for_each(|member| member.kill());
    }
    tokio::time::sleep(down).await;
    for (index, pause) in order.into_iter().zip(pauses) {
        world.start(&world.members[index]);
        tokio::time::sleep(pause).await;
    }
    drop(troubled);
}

/// SIGTERM, as a deployment sends it, and a start.
pub(super) async fn term(world: &Arc<World>, rng: &mut StdRng, which: Whom) {
    let pause = if rng.random() { Duration::ZERO } else { millis(rng, 0, 3000) };
    let member = whom(world, rng, which);
    let _turn = member.turn.lock().await;
    world.note(format!("end {}, down for {pause:?}", member.name));
    end(world, &member).await;
    tokio::time::sleep(pause).await;
    world.start(&member);
}

/// Each node in turn is ended, started, and waited for.
pub(super) async fn rolling(world: &Arc<World>, rng: &mut StdRng) {
    let mut order: Vec<usize> = (0..world.members.len()).collect();
    order.shuffle(rng);
    for index in order {
        let member = &world.members[index];
        let _turn = member.turn.lock().await;
        world.note(format!("rolling: end {}", member.name));
        end(world, member).await;
        world.start(member);
        ready(world, member).await;
    }
}

/// SIGSTOP, mostly for longer than the lease, and SIGCONT.
pub(super) async fn stop(world: &Arc<World>, rng: &mut StdRng, which: Whom) {
    let lease = world.setting.lease_time().max(Duration::from_millis(500));
    let pause = lease.mul_f64(rng.random_range(0.3..3.0));
    let member = whom(world, rng, which);
    let _turn = member.turn.lock().await;
    world.note(format!("stop {} for {pause:?}", member.name));
    let _troubled = Troubled::new(world, true);
    member.stop();
    tokio::time::sleep(pause).await;
    world.note(format!("{} goes on", member.name));
    member.go_on();
    // What it does right then is of interest, without a further fault.
    tokio::time::sleep(Duration::from_millis(300)).await;
}

/// The library that lies about the wall clock, if the system has it.
fn liar() -> Option<PathBuf> {
    let known = [
        "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
        "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    ];
    known.into_iter().map(PathBuf::from).find(|path| path.exists())
}

/// A node's wall clock jumps, again and again.
pub(super) async fn clock_jump(world: &Arc<World>, rng: &mut StdRng) {
    let Some(liar) = liar() else {
        world.note("no clock jump: libfaketime is not here");
        return;
    };
    let jumps = ["+400d", "-400d", "+1h", "-1h", "-10y", "+0"];
    let member = whom(world, rng, Whom::Any);
    let _turn = member.turn.lock().await;
    let file = world.home.join(format!("{}.clock", member.name));
    let jump = |rng: &mut StdRng| {
        let by = jumps.choose(rng).copied().unwrap_or("+0");
        world.note(format!("the wall clock of {} is off by {by}", member.name));
        // Without it the clock is right.
        let _ = std::fs::write(&file, by);
    };
    jump(rng);
    let variable = |name: &str, value: &str| (name.to_string(), value.to_string());
    member.variables(vec![
        variable("LD_PRELOAD", &liar.display().to_string()),
        variable("FAKETIME_TIMESTAMP_FILE", &file.display().to_string()),
        variable("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        variable("FAKETIME_NO_CACHE", "1"),
        variable("NO_FAKE_STAT", "1"),
    ]);
    let _troubled = Troubled::new(world, true);
    member.kill();
    world.start(&member);
    for _ in 0..4 {
        tokio::time::sleep(millis(rng, 300, 1500)).await;
        jump(rng);
    }
    // From its next start on it is right again.
    member.variables(Vec::new());
    let _ = std::fs::write(&file, "+0");
}

/// The application's hook fails or hangs at a promotion, on some nodes, for a while.
pub(super) async fn hook_fails(world: &Arc<World>, rng: &mut StdRng) {
    let _troubled = Troubled::new(world, true);
    let mut chosen: Vec<&_> = world.members.iter().collect();
    chosen.shuffle(rng);
    chosen.truncate(rng.random_range(1..=world.members.len()));
    let hook = |name: &str| world.home.join(format!("{name}.hook"));
    for member in &chosen {
        let how = if rng.random() { "fail" } else { "hang" };
        world.note(format!("the hook of {} will {how}", member.name));
        if let Err(error) = std::fs::write(hook(&member.name), how) {
            world.violation("harness", error.to_string());
        }
    }
    kill(world, rng, Whom::Primary).await;
    tokio::time::sleep(millis(rng, 500, 4000)).await;
    for member in &chosen {
        // Gone already is as good.
        let _ = std::fs::remove_file(hook(&member.name));
    }
    world.note("hooks work again");
}
