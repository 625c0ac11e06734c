//! Members come and go while a client writes; others follow without a vote.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use replite::{Db, Error, Role, Secret};

use crate::support::{LIMIT, within};
use crate::world::*;

/// A client that writes on the primary all the time; what it does not get done on one, it does on
/// the next.
struct Client {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Vec<i64>>,
}

impl Client {
    fn start(dbs: &[Db]) -> Client {
        let (dbs, stop) = (dbs.to_vec(), Arc::<AtomicBool>::default());
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (mut value, mut written) = (0, Vec::new());
            while !stopped.load(Ordering::SeqCst) {
                value += 1;
                for db in &dbs {
                    match write_on(db, value).await {
                        Ok(_) => {
                            written.push(value);
                            break;
                        }
                        Err(Error::NotPrimary { .. } | Error::ShutDown | Error::OutcomeUnknown { .. }) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
                tokio::time::sleep(LOOK / 2).await;
            }
            written
        });
        Client { stop, task }
    }

    /// What was acknowledged.
    async fn end(self) -> Vec<i64> {
        self.stop.store(true, Ordering::SeqCst);
        within("the client's end", self.task).await.unwrap()
    }
}

/// A node that is none of the members at first.
async fn open_more(world: &World, node: usize, named: impl IntoIterator<Item = usize>) -> Db {
    Db::open(world.config(node).lease(world.members_of(named))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_become_five_and_three_again_under_writes() {
    let world = World::with_more(3, 2);
    let mut dbs = world.open_all().await;
    write(&dbs, 0).await;
    for node in [3, 4] {
        dbs.push(open_more(&world, node, 0..5).await);
    }
    let client = Client::start(&dbs);
    for (node, voters) in [(3, 4), (4, 5)] {
        // Any of them takes it.
        within("a new member", dbs[node - 2].add_member(&world.url(node))).await.unwrap();
        members_are(&dbs[0], "one more voter", |view| all_vote(view, voters)).await;
        within("a state", dbs[node].ready()).await.unwrap();
    }
    // Twice is as once.
    dbs[0].add_member(&world.url(4)).await.unwrap();
    let unknown = dbs[0].remove_member("replite://127.0.0.1:1").await.unwrap_err();
    assert!(unknown.to_string().contains("is no member"), "{unknown}");
    let view = members_are(&dbs[0], "a leader", |view| raft_leader(view).is_some()).await;
    let leader = raft_leader(&view).unwrap();
    within("the leader's going", dbs[4].remove_member(&leader)).await.unwrap();
    let view = members_are(&dbs[0], "four voters", |view| {
        let voters = view.members.iter().filter(|member| member.votes).count();
        voters == 4 && view.agree && raft_leader(view).is_some_and(|now| now != leader)
    });
    let view = view.await;
    assert!(view.members.iter().all(|member| !member.votes || member.url != leader), "{view}");
    let primary_at = primary(&dbs).await;
    // It may have been the primary's member as well.
    let next = if world.url(primary_at) == leader { (primary_at + 1) % 5 } else { primary_at };
    let asked = (0..5).find(|node| *node != next && world.url(*node) != leader).unwrap();
    within("the primary's going", dbs[asked].remove_member(&world.url(next))).await.unwrap();
    members_are(&dbs[asked], "three voters", |view| {
        view.members.iter().filter(|member| member.votes).count() == 3 && view.agree
    })
    .await;
    let written = client.end().await;
    // Those that left are replicas which may lead, as all others: they see who leads, and take the
    // lease, though no leader of the members says anything to them.
    for next in 0..5 {
        let (mut place, mut tries) = (primary(&dbs).await, 0);
        while next != place {
            let handed = within("a handoff", dbs[place].handoff(Some(dbs[next].node_id()))).await;
            match handed {
                Ok(_) => comes("it leads", || dbs[next].role() == Role::Primary).await,
                // The lease ended meanwhile, on a machine that has other work: anyone may have it.
                Err(error) => assert!(tries < 3, "{error}"),
            }
            (place, tries) = (primary(&dbs).await, tries + 1);
        }
        let txid = within("a write", write_on(&dbs[next], -1)).await.unwrap();
        all_have(&dbs, txid).await;
    }
    let there = values(&dbs[0]);
    assert!(written.iter().all(|value| there.contains(value)), "{} of {}", there.len(), written.len());
    assert!(written.len() > 20, "{}", written.len());
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_beside_the_list_follows_and_leads_without_a_vote() {
    let world = World::with_more(3, 1);
    let mut dbs = world.open_all().await;
    let more = open_more(&world, 3, 0..3).await;
    let txid = write(&dbs, 1).await;
    within("the transaction", more.wait_for_timeout(txid, LIMIT)).await.unwrap();
    let view = members_are(&more, "three voters", |view| all_vote(view, 3)).await;
    assert_eq!(view.members.len(), 3, "{view}");
    let place = primary(&dbs).await;
    within("a handoff", dbs[place].handoff(Some(more.node_id()))).await.unwrap();
    comes("it leads", || more.role() == Role::Primary).await;
    write_on(&more, 2).await.unwrap();
    // Renewed more than once.
    tokio::time::sleep(TIME * 2).await;
    let txid = write_on(&more, 3).await.unwrap();
    all_have(&dbs, txid).await;
    let refused = dbs[0].add_member(&world.url(3)).await.unwrap_err();
    assert!(refused.to_string().contains("does not name it as a member"), "{refused}");
    end([more]).await;
    write(&dbs, 4).await;
    end([dbs.remove(0)]).await;
    write(&dbs, 5).await;
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_reads_the_record_and_can_change_nothing() {
    let world = World::with_more(3, 1);
    let followers = Secret::new("w8Qm3nXs5vBz1kTyJ7cRfLp0HdGaUeIo9qWjZ4tYbNg").unwrap();
    let mut dbs = Vec::new();
    for node in 0..3 {
        dbs.push(Db::open(world.config(node).follower_secret(followers.clone())).await.unwrap());
    }
    let mut config = world.config(3).secrets([]).follower_secret(followers).candidate(false);
    config = config.lease(world.members());
    let follower = Db::open(config).await.unwrap();
    let txid = write(&dbs, 1).await;
    within("the transaction", follower.wait_for_timeout(txid, LIMIT)).await.unwrap();
    let refused = follower.remove_member(&world.url(0)).await.unwrap_err();
    assert!(refused.to_string().contains("may only read"), "{refused}");
    let gone = dbs.remove(primary(&dbs).await);
    end([gone]).await;
    let txid = write(&dbs, 2).await;
    within("the next primary's", follower.wait_for_timeout(txid, LIMIT)).await.unwrap();
    assert_eq!(values(&follower), [1, 2]);
    end([follower]).await;
    end(dbs).await;
}
