//! The lease's store fails, or what it holds.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use replite_stores::s3::{Fault, Rule};

use crate::faults::{Troubled, Whom, millis, whom};
use crate::member::Member;
use crate::store::Store;
use crate::world::World;

/// One node, or all, can't reach the store.
pub(super) async fn away(world: &Arc<World>, rng: &mut StdRng, which: Option<Whom>) {
    let time = world.setting.lease_time().mul_f64(rng.random_range(0.2..4.0));
    let members = match which {
        Some(which) => vec![whom(world, rng, which)],
        None => world.members.clone(),
    };
    let names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
    world.note(format!("no store for {names:?} for {time:?}"));
    let _troubled = Troubled::new(world, true);
    set(world, &members, false);
    tokio::time::sleep(time).await;
    set(world, &members, true);
    world.note(format!("the store is there for {names:?}"));
}

pub(super) fn set(world: &World, members: &[Arc<Member>], there: bool) {
    for member in members {
        if world.store.set_way(member.index, there) {
            continue;
        }
        if let Err(error) = member.store(there) {
            world.violation("harness", format!("the store of {}: {error}", member.name));
        }
    }
}

/// Somebody deletes the record, or writes into it, while its holder lives.
pub(super) async fn record(world: &Arc<World>, rng: &mut StdRng, garble: bool) {
    let (after, until) = (millis(rng, 0, 2000), rng.random_range(0.0..3.0));
    let mut turns = Vec::new();
    for member in &world.members {
        turns.push(member.turn.lock().await);
    }
    // The one that can write it anew has to live.
    let led = world.comes(Duration::from_secs(20), || world.leader().is_some()).await;
    if !led || !world.wires.well() {
        world.note("no record is touched: the cluster is not well");
        return;
    }
    let _troubled = Troubled::new(world, true);
    let mut files = files(world);
    files.sort();
    if garble {
        files.drain(..files.len().saturating_sub(1));
    }
    world
        .note(format!("{} the record: {files:?}", if garble { "garbage in place of" } else { "no more is" }));
    let remove = |file: &PathBuf| match std::fs::remove_file(file) {
        // Nodes remove old ones.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done,
    };
    let touch = |file: &PathBuf| {
        if garble { std::fs::write(file, "{\"format\": 1, \"holder\": ") } else { remove(file) }
    };
    for failed in files.iter().map(touch).filter_map(Result::err) {
        world.violation("harness", format!("the record: {failed}"));
    }
    if garble {
        // An operator does what the nodes ask for.
        tokio::time::sleep(world.setting.lease_time().mul_f64(until)).await;
        world.note("the garbage is removed");
        files.iter().for_each(|file| drop(remove(file)));
    }
    tokio::time::sleep(world.setting.lease_time() + after).await;
    let led = world.comes(Duration::from_secs(20), || world.leader().is_some()).await;
    if !led {
        world.violation("6 a primary", "none 20 s after the record was touched, though all nodes live");
        world.ask_why().await;
    }
}

/// The records in the store at the moment. What has a further name is not published yet.
fn files(world: &World) -> Vec<PathBuf> {
    let all = std::fs::read_dir(world.home.join("store/lease"));
    let all = all.into_iter().flatten().flatten().map(|entry| entry.path());
    all.filter(|path| path.is_file() && path.extension().is_none()).collect()
}

/// An answer of the S3 server that did nothing.
pub(super) fn answers(status: u16) -> Fault {
    Fault::Answer { status, code: "InternalError".into() }
}

/// The S3 server does something wrong for up to ten seconds, with all requests or with each third.
pub(super) async fn s3(world: &Arc<World>, rng: &mut StdRng, fault: Fault) {
    let Store::Objects(server, _) = &world.store else { return };
    let (time, puts) = (millis(rng, 500, 10_000), rng.random_bool(0.4));
    let _troubled = Troubled::new(world, true);
    world.note(format!("S3: {fault:?} for {time:?}, puts only: {puts}"));
    let rule = if puts { Rule::puts(fault) } else { Rule::all(fault) };
    let server = server.lock().await;
    if let Err(error) = server.fault(rule.lasting(time)).await {
        world.violation("harness", format!("the S3 server: {error}"));
    }
    tokio::time::sleep(time).await;
    if let Err(error) = server.calm().await {
        world.violation("harness", format!("the S3 server: {error}"));
    }
    world.note("S3 works");
}

/// The leader of etcd's members is killed, or all of them, and started again.
pub(super) async fn etcd_killed(world: &Arc<World>, rng: &mut StdRng, all: bool) {
    let Store::Etcd(cluster, _) = &world.store else { return };
    let time = millis(rng, 200, 6000);
    let _troubled = Troubled::new(world, true);
    let mut cluster = cluster.lock().await;
    let members = match cluster.leader().await {
        _ if all => (0..3).collect(),
        Ok(leader) => vec![leader],
        Err(error) => {
            world.note(format!("etcd has no leader to kill: {error}"));
            return;
        }
    };
    world.note(format!("etcd: members {members:?} are killed for {time:?}"));
    for member in &members {
        if let Err(error) = cluster.kill(*member).await {
            world.violation("harness", format!("etcd: {error}"));
        }
    }
    tokio::time::sleep(time).await;
    for member in &members {
        if let Err(error) = cluster.restart(*member) {
            world.violation("harness", format!("etcd: {error}"));
        }
    }
    for member in members {
        if let Err(error) = cluster.healthy(member).await {
            world.violation("harness", format!("etcd: {error}"));
        }
    }
    world.note("etcd works");
}
