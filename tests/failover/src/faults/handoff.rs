//! The lease goes from a node that lives to another one, and something fails meanwhile. And
//! elections are paused.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use replite::lease;
use replite::operator::{LeaseStands, Operator, RecordView};

use crate::clock::{now, seconds};
use crate::faults::files::all_turns;
use crate::faults::{Troubled, Whom, millis, replica, whom};
use crate::history::{OrderlyEnd, Paused};
use crate::member::Member;
use crate::node::{CLUSTER, Handed};
use crate::request::send;
use crate::wires::Trouble;
use crate::world::World;

/// So long after a handoff was asked for something fails, at the latest; and where the machine has
/// much else to do, so that it lasts longer.
const INSTANT_MAX_MICROS: u64 = 60_000;
const LATE_MAX_MICROS: u64 = 200_000;
/// Requests that run have five seconds, and a promotion may fail and be tried again.
const HANDOFF_LIMIT: Duration = Duration::from_secs(30);
/// Until there is a primary that can hand over.
const LED_LIMIT: Duration = Duration::from_secs(20);

/// What fails in the midst of a handoff.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Amid {
    TargetKilled,
    HolderKilled,
    TargetStopped,
    Cut,
}

/// Nothing fails: the primary is asked, now and then by two at once.
pub(super) async fn handoff(world: &Arc<World>, rng: &mut StdRng) {
    let (named, other) = (rng.random::<bool>(), rng.random_bool(0.2).then(|| millis(rng, 0, 30)));
    let holder = whom(world, rng, Whom::Primary);
    let _turn = holder.turn.lock().await;
    let target = named.then(|| replica(world, rng)).filter(|target| target.index != holder.index);
    let second = async {
        let Some(pause) = other else { return };
        tokio::time::sleep(pause).await;
        ask(world, &holder, None).await;
    };
    tokio::join!(ask(world, &holder, target.as_deref()), second);
}

/// Asks a node for its lease, for another one or for the best.
async fn ask(world: &World, holder: &Member, target: Option<&Member>) {
    let id = |member: &Member| member.standing().map(|standing| standing.id);
    let to = target.and_then(id);
    let path = to.as_ref().map_or("/handoff".to_string(), |id| format!("/handoff?to={id}"));
    let whose = id(holder);
    let begin = now();
    let answer = send(holder.listen, Method::POST, &path, &[], Vec::new(), HANDOFF_LIMIT).await;
    let end = now();
    let named = target.map_or("the best", |target| &target.name);
    let (handed, told) = match &answer {
        Ok(answer) if answer.status == 200 => match answer.json::<Handed>() {
            Ok(Handed { node, app }) => (whose.is_some_and(|id| id != node), format!("{app} leads")),
            Err(error) => (false, error.to_string()),
        },
        Ok(answer) => (false, format!("{} {}", answer.status, answer.text())),
        Err(failed) => (false, format!("{failed:?}")),
    };
    let took = seconds(begin, end) * 1000.0;
    world.note(format!("handoff of {} to {named}, asked {took:.0} ms ago: {told}", holder.name));
    let mut history = world.history();
    history.handoffs += 1;
    if handed {
        history.handed += 1;
        history.orderly.push(OrderlyEnd { node: holder.name.clone(), begin, end });
    }
}

/// The node that leads, and one that follows.
async fn pair(world: &World, rng: &mut StdRng) -> Option<(Arc<Member>, Arc<Member>)> {
    let role = |member: &Member| member.standing().map(|standing| standing.role).unwrap_or_default();
    let found = || {
        let holder = world.leader().filter(|holder| holder.index < world.members.len())?;
        let follow = world.members.iter().filter(|m| m.index != holder.index && role(m) == "replica");
        let follow: Vec<_> = follow.cloned().collect();
        (!follow.is_empty()).then_some((holder, follow))
    };
    world.comes(LED_LIMIT, || found().is_some()).await;
    let (holder, follow) = found()?;
    Some((holder, follow.choose(rng)?.clone()))
}

/// One of the two nodes dies or stands still, or they are cut off, at any instant of a handoff.
pub(super) async fn amid(world: &Arc<World>, rng: &mut StdRng, what: Amid) {
    let latest = if rng.random_bool(0.6) { INSTANT_MAX_MICROS } else { LATE_MAX_MICROS };
    let instant = Duration::from_micros(rng.random_range(0..latest));
    let (down, cut_for) = (millis(rng, 0, 4000), millis(rng, 500, 8000));
    let stopped = world.setting.lease_time().mul_f64(rng.random_range(1.1..2.5));
    let trouble = if rng.random() { Trouble::Cut } else { Trouble::Silent };
    let _turns = all_turns(world).await;
    let Some((holder, target)) = pair(world, rng).await else {
        world.note("no handoff: no two nodes could have one");
        return;
    };
    world.note(format!("handoff of {} to {}, and {what:?} {instant:?} later", holder.name, target.name));
    let _troubled = Troubled::new(world, what != Amid::HolderKilled);
    let fails = async {
        tokio::time::sleep(instant).await;
        match what {
            Amid::TargetKilled | Amid::HolderKilled => {
                let member = if what == Amid::TargetKilled { &target } else { &holder };
                member.kill();
                tokio::time::sleep(down).await;
                world.start(member);
            }
            Amid::TargetStopped => {
                target.stop();
                tokio::time::sleep(stopped).await;
                world.note(format!("{} goes on", target.name));
                target.go_on();
            }
            Amid::Cut => {
                let ways = [(holder.index, target.index), (target.index, holder.index)];
                world.wires.set(ways, Some(trouble));
                tokio::time::sleep(cut_for).await;
                world.wires.set(ways, None);
            }
        }
    };
    tokio::join!(ask(world, &holder, Some(&target)), fails);
    // What it does right then is of interest, without a further fault.
    tokio::time::sleep(Duration::from_millis(300)).await;
}

/// The primary dies while elections are paused. It may come back and go on; no other leads before
/// an operator says so.
pub(super) async fn paused_killed(world: &Arc<World>, rng: &mut StdRng) {
    let (returns, down, more) = (rng.random_bool(0.4), millis(rng, 0, 3000), millis(rng, 0, 2000));
    let _turns = all_turns(world).await;
    if pair(world, rng).await.is_none() || !world.wires.well() {
        world.note("no pause: the cluster is not well");
        return;
    }
    let store = lease::Directory::new(world.home.join("store/lease"));
    let operator = Operator::new(store, CLUSTER, "app");
    if let Err(error) = operator.pause().await {
        world.violation("8 paused", format!("elections can't be paused: {error}"));
        return;
    }
    if let Some(holder) = holder(world, &operator).await {
        let _troubled = Troubled::new(world, false);
        let begin = now();
        world.note(format!("paused; kill {} for {down:?}, and it returns: {returns}", holder.name));
        holder.kill();
        tokio::time::sleep(down).await;
        if returns {
            world.start(&holder);
        }
        tokio::time::sleep(world.setting.lease_time() * 2 + Duration::from_secs(2) + more).await;
        let leads = world.leader().map(|leader| leader.name.clone());
        world.note(format!("paused until now; {leads:?} leads"));
        world.history().paused.push(Paused { holder: holder.name.clone(), begin, end: now() });
        resume(world, &operator).await;
        leads_again(world).await;
        world.start(&holder);
    } else {
        resume(world, &operator).await;
    }
}

/// The node that holds the lease, by its record, which is paused.
async fn holder(world: &World, operator: &Operator) -> Option<Arc<Member>> {
    let RecordView::Lease(lease) = operator.show().await.record else {
        world.violation("8 paused", "there is no record of the lease");
        return None;
    };
    if !lease.paused {
        world.violation("8 paused", "the record says nothing of the pause");
    }
    let holder = lease.holder.filter(|_| lease.state == LeaseStands::Held)?.node.to_string();
    let is = |member: &&Arc<Member>| member.standing().is_some_and(|standing| standing.id == holder);
    world.members.iter().find(is).cloned()
}

async fn resume(world: &World, operator: &Operator) {
    match operator.resume().await {
        Ok(()) => world.note("elections go on"),
        Err(error) => world.violation("8 paused", format!("elections can't be resumed: {error}")),
    }
}

async fn leads_again(world: &World) {
    let limit = world.setting.lease_time() * 2 + Duration::from_secs(10);
    // Another fault may take longer than that.
    if !world.comes(limit, || world.leader().is_some()).await && world.troubles() == 1 {
        world.violation("6 a primary", format!("none within {limit:?} after elections were resumed"));
        world.ask_why().await;
    }
}
