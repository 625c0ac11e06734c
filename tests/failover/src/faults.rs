//! What goes wrong in a round: which faults there are, and which a round has.

mod files;
mod handoff;
mod processes;
mod store;
mod ways;

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use replite_stores::s3::Fault;

use crate::clock::now;
use crate::faults::handoff::Amid;
use crate::history::OrderlyEnd;
use crate::member::Member;
use crate::store::StoreKind;
use crate::world::{Setting, World};

/// How long an orderly end may take.
const END_LIMIT: Duration = Duration::from_secs(25);
/// How long a node may take until it can be read after its start.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// Where a fault makes sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Where {
    /// Also without a lease.
    Everywhere,
    Lease,
    /// With the record somewhere else than on the nodes.
    Outside,
    Only(StoreKind),
}

use Where::{Everywhere, Lease, Only, Outside};

/// Every fault: its name, how often it is chosen, and where it makes sense.
pub const FAULTS: &[(&str, u32, Where)] = &[
    ("kill_primary", 16, Everywhere),
    ("kill_any", 8, Everywhere),
    ("kill_often", 5, Everywhere),
    ("kill_all", 6, Everywhere),
    ("term_primary", 8, Everywhere),
    ("term_any", 4, Everywhere),
    ("term_all", 4, Everywhere),
    ("rolling", 4, Everywhere),
    ("stop_primary", 12, Everywhere),
    ("stop_any", 5, Everywhere),
    ("cut_primary", 8, Everywhere),
    ("cut_and_kill", 6, Lease),
    ("cut_pair", 6, Everywhere),
    ("one_way", 5, Everywhere),
    ("late", 5, Everywhere),
    ("no_store_primary", 10, Outside),
    ("no_store_any", 5, Outside),
    ("no_store_all", 5, Outside),
    ("record_gone", 4, Only(StoreKind::Directory)),
    ("record_garbled", 4, Only(StoreKind::Directory)),
    ("hook_fails", 5, Lease),
    ("emptied", 5, Everywhere),
    ("emptied_alone", 5, Lease),
    ("old_copy", 4, Everywhere),
    ("old_copy_alone", 5, Lease),
    ("behind_alone", 6, Lease),
    ("twin", 3, Lease),
    ("clock_jump", 4, Everywhere),
    ("handoff", 10, Lease),
    ("handoff_killed_target", 6, Lease),
    ("handoff_killed_holder", 6, Lease),
    ("handoff_stopped_target", 6, Lease),
    ("handoff_cut", 6, Lease),
    ("paused_killed", 5, Lease),
    ("etcd_leader_killed", 24, Only(StoreKind::Etcd)),
    ("etcd_down", 10, Only(StoreKind::Etcd)),
    ("s3_errors", 14, Only(StoreKind::Objects)),
    ("s3_silent", 10, Only(StoreKind::Objects)),
    ("s3_answers_lost", 10, Only(StoreKind::Objects)),
    ("raft_gone", 20, Only(StoreKind::Members)),
];

/// What an operator does to nodes that work: no request fails but on a node that ends.
pub const ORDERLY: &[&str] = &["handoff", "rolling", "term_primary", "term_any"];

/// A fault of a round.
#[derive(Clone, Debug)]
pub struct Step {
    pub fault: &'static str,
    /// After the one before, or its begin where both overlap.
    pub pause: Duration,
    /// The next one does not wait for its end.
    pub overlaps: bool,
    pub seed: u64,
}

/// Draws the faults of a round.
pub fn plan(rng: &mut StdRng, setting: &Setting, names: &[String]) -> Vec<Step> {
    let store = setting.store();
    let usable: Vec<_> = FAULTS
        .iter()
        .filter(|(_, _, place)| match place {
            Everywhere => true,
            Lease => store.is_some(),
            Outside => store.is_some_and(|store| store != StoreKind::Members),
            Only(of) => store == Some(*of),
        })
        .collect();
    let chosen = |rng: &mut StdRng| {
        let fits =
            |fault: &&&(&str, u32, Where)| names.is_empty() || names.iter().any(|name| name == fault.0);
        let usable: Vec<_> = usable.iter().filter(fits).collect();
        usable.choose_weighted(rng, |fault| fault.1).ok().map(|fault| fault.0)
    };
    let count = rng.random_range(2..=4);
    let mut steps = Vec::new();
    for _ in 0..count {
        let Some(fault) = chosen(rng) else { break };
        steps.push(Step {
            fault,
            pause: Duration::from_millis(rng.random_range(200..2000)),
            overlaps: rng.random_bool(0.25),
            seed: rng.random(),
        });
    }
    steps
}

/// Does all of a plan.
pub async fn perform(world: &Arc<World>, steps: &[Step]) {
    let mut under_way = tokio::task::JoinSet::new();
    for step in steps {
        tokio::time::sleep(step.pause).await;
        let (world, begun) = (world.clone(), step.clone());
        if step.overlaps {
            under_way.spawn(async move { one(&world, &begun).await });
        } else {
            one(&world, &begun).await;
        }
    }
    while under_way.join_next().await.is_some() {}
}

async fn one(world: &Arc<World>, step: &Step) {
    let mut rng = StdRng::seed_from_u64(step.seed);
    let rng = &mut rng;
    match step.fault {
        "kill_primary" => processes::kill(world, rng, Whom::Primary).await,
        "kill_any" => processes::kill(world, rng, Whom::Any).await,
        "kill_often" => processes::kill_often(world, rng).await,
        "kill_all" => processes::all_down(world, rng, false).await,
        "term_primary" => processes::term(world, rng, Whom::Primary).await,
        "term_any" => processes::term(world, rng, Whom::Any).await,
        "term_all" => processes::all_down(world, rng, true).await,
        "rolling" => processes::rolling(world, rng).await,
        "stop_primary" => processes::stop(world, rng, Whom::Primary).await,
        "stop_any" => processes::stop(world, rng, Whom::Any).await,
        "clock_jump" => processes::clock_jump(world, rng).await,
        "hook_fails" => processes::hook_fails(world, rng).await,
        "handoff" => handoff::handoff(world, rng).await,
        "handoff_killed_target" => handoff::amid(world, rng, Amid::TargetKilled).await,
        "handoff_killed_holder" => handoff::amid(world, rng, Amid::HolderKilled).await,
        "handoff_stopped_target" => handoff::amid(world, rng, Amid::TargetStopped).await,
        "handoff_cut" => handoff::amid(world, rng, Amid::Cut).await,
        "paused_killed" => handoff::paused_killed(world, rng).await,
        "cut_primary" => ways::cut_primary(world, rng).await,
        "cut_and_kill" => ways::cut_and_kill(world, rng).await,
        "cut_pair" => ways::cut_pair(world, rng).await,
        "one_way" => ways::one_way(world, rng).await,
        "late" => ways::late(world, rng).await,
        "behind_alone" => ways::behind_alone(world, rng).await,
        "no_store_primary" => store::away(world, rng, Some(Whom::Primary)).await,
        "no_store_any" => store::away(world, rng, Some(Whom::Any)).await,
        "no_store_all" => store::away(world, rng, None).await,
        "etcd_leader_killed" => store::etcd_killed(world, rng, false).await,
        "etcd_down" => store::etcd_killed(world, rng, true).await,
        "s3_errors" => store::s3(world, rng, store::answers(500)).await,
        "s3_silent" => store::s3(world, rng, Fault::Hang).await,
        "s3_answers_lost" => store::s3(world, rng, Fault::LoseAnswer).await,
        "raft_gone" => files::raft_gone(world, rng).await,
        "record_gone" => store::record(world, rng, false).await,
        "record_garbled" => store::record(world, rng, true).await,
        "emptied" => files::emptied(world, rng, false).await,
        "emptied_alone" => files::emptied(world, rng, true).await,
        "old_copy" => files::old_copy(world, rng, false).await,
        "old_copy_alone" => files::old_copy(world, rng, true).await,
        "twin" => files::twin(world, rng).await,
        other => world.violation("harness", format!("no such fault: {other}")),
    }
}

#[derive(Clone, Copy)]
enum Whom {
    Primary,
    Any,
}

/// The node that a fault is for.
fn whom(world: &World, rng: &mut StdRng, whom: Whom) -> Arc<Member> {
    let any = world.members[rng.random_range(0..world.members.len())].clone();
    match whom {
        Whom::Any => any,
        Whom::Primary => world.leader().unwrap_or(any),
    }
}

/// A node that does not lead.
fn replica(world: &World, rng: &mut StdRng) -> Arc<Member> {
    let leader = world.leader().map_or(usize::MAX, |leader| leader.index);
    let all: Vec<_> = world.members.iter().filter(|member| member.index != leader).collect();
    all.choose(rng).map_or_else(|| world.members[0].clone(), |member| (*member).clone())
}

fn millis(rng: &mut StdRng, from: u64, to: u64) -> Duration {
    Duration::from_millis(rng.random_range(from..to))
}

/// Stores work again, and all ways to them.
pub fn heal(world: &World) {
    for member in &world.members {
        store::set(world, std::slice::from_ref(member), true);
    }
}

/// Something is wrong from now on, until this is dropped: what ends meanwhile may cost something.
struct Troubled<'a> {
    world: &'a World,
    since: u64,
    /// Replicas may lack something because of it.
    lossy: bool,
}

impl<'a> Troubled<'a> {
    fn new(world: &'a World, lossy: bool) -> Troubled<'a> {
        world.is_troubled(true);
        Troubled { world, since: now(), lossy }
    }
}

impl Drop for Troubled<'_> {
    fn drop(&mut self) {
        self.world.is_troubled(false);
        let mut history = self.world.history();
        history.troubled.push((self.since, now()));
        if self.lossy {
            // They catch up meanwhile.
            history.lossy.push((self.since, now() + 5_000_000));
        }
    }
}

/// Waits until a node can be read.
async fn ready(world: &World, member: &Member) -> bool {
    world.comes(READY_LIMIT, || member.standing().is_some_and(|s| s.position.is_some())).await
}

/// Ends a node in good order.
async fn end(world: &World, member: &Member) {
    let begin = now();
    match member.end(END_LIMIT).await {
        Some(status) if status.success() => {
            let (node, end) = (member.name.clone(), now());
            world.history().orderly.push(OrderlyEnd { node, begin, end });
            world.note(format!("{} ended in good order within {} ms", member.name, (end - begin) / 1000));
        }
        Some(status) => world.violation("alive", format!("{} ended with {status}", member.name)),
        None => {
            let words = member.last_words(6);
            world.violation("alive", format!("{} did not end in {END_LIMIT:?}\n    {words}", member.name));
        }
    }
}
