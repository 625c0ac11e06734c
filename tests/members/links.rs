//! Members that are far from each other, or whose connections are cut.

use std::time::{Duration, Instant};

use replite::{Addresses, Db, Role};

use crate::support::Wire;
use crate::world::*;

/// How long the connections are watched.
const WATCHED: Duration = Duration::from_secs(10);

/// Three nodes that reach each other by proxies only.
struct Far {
    world: World,
    wires: Vec<Wire>,
}

impl Far {
    async fn new(way: Duration) -> Far {
        let world = World::new(3);
        let mut wires = Vec::new();
        for port in &world.ports {
            wires.push(Wire::start(([127, 0, 0, 1], *port).into(), way).await);
        }
        Far { world, wires }
    }

    fn url(&self, node: usize) -> String {
        format!("replite://{}", self.wires[node].address)
    }

    async fn open_all(&self, time: Duration) -> Vec<Db> {
        let members = replite::lease::Members::new((0..3).map(|node| self.url(node)));
        let mut dbs = Vec::new();
        for node in 0..3 {
            let config = self
                .world
                .config(node)
                .addresses(Addresses::default().replication(self.url(node)))
                .lease(members.clone());
            dbs.push(Db::open(config.lease_time(time)).await.unwrap());
        }
        dbs
    }
}

/// How often another member began to lead the others, and the primary changed, in a while; and how
/// many writes failed meanwhile.
async fn watched(dbs: &[Db], time: Duration) -> (usize, usize, usize) {
    let (mut leaders, mut primaries) = (Vec::new(), Vec::new());
    let (mut failed, begun) = (0, Instant::now());
    while begun.elapsed() < time {
        let view = dbs[0].members().await.unwrap();
        if let Some(leader) = raft_leader(&view).filter(|leader| leaders.last() != Some(leader)) {
            leaders.push(leader);
        }
        match dbs.iter().position(|db| db.role() == Role::Primary) {
            Some(primary) => {
                failed += usize::from(write_on(&dbs[primary], 1).await.is_err());
                if primaries.last() != Some(&primary) {
                    primaries.push(primary);
                }
            }
            None => failed += 1,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (leaders.len().saturating_sub(1), primaries.len().saturating_sub(1), failed)
}

/// The round trip takes a twenty-fifth of the lease time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_are_far_from_each_other_keep_their_leader_and_their_primary() {
    let far = Far::new(TIME / 50).await;
    let dbs = far.open_all(TIME).await;
    write(&dbs, 0).await;
    let seen = watched(&dbs, WATCHED).await;
    eprintln!("other leaders, other primaries, failed writes: {seen:?}");
    assert_eq!((seen.1, seen.2), (0, 0));
    end(dbs).await;
}

/// A link that is cut again and again is dialled again, and costs no write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_cut_again_and_again_cost_no_lease() {
    let far = Far::new(Duration::ZERO).await;
    let dbs = far.open_all(TIME).await;
    write(&dbs, 0).await;
    let place = primary(&dbs).await;
    let cutting = async {
        loop {
            for wire in &far.wires {
                wire.cut();
                tokio::time::sleep(TIME / 4).await;
            }
        }
    };
    let seen = tokio::select! {
        seen = watched(&dbs, WATCHED / 2) => seen,
        () = cutting => unreachable!(),
    };
    eprintln!("other leaders, other primaries, failed writes: {seen:?}");
    assert_eq!((seen.1, seen.2), (0, 0));
    assert_eq!(dbs[place].role(), Role::Primary);
    end(dbs).await;
}
