//! An attacker between the nodes of an election: what they ask each other, a handoff, and an
//! operator's commands.

use std::sync::Arc;
use std::time::Duration;

use replite::operator::Operator;
use replite::testing::lease::Memory;
use replite::{Addresses, Config, Db, Error, Role, Txid, lease};

use crate::ending::{Ender, Inside};
use crate::relay::*;
use crate::support::*;
use crate::world::*;

const NODES: usize = 3;

/// Nodes that know each other by the addresses of relays alone.
struct Elected {
    dir: tempfile::TempDir,
    memory: Memory,
    ports: Vec<u16>,
    relays: Vec<Relay>,
    nodes: Vec<Db>,
    told: Vec<i64>,
    last: Option<Txid>,
}

impl Elected {
    async fn new() -> Elected {
        let memory = Memory::new().with_lease_time(Duration::from_secs(2));
        let (mut ports, mut relays) = (Vec::new(), Vec::new());
        for _ in 0..NODES {
            let port = own_port();
            relays.push(Relay::start(([127, 0, 0, 1], port).into()).await);
            ports.push(port);
        }
        let dir = tempfile::tempdir().unwrap();
        let mut elected =
            Elected { dir, memory, ports, relays, nodes: Vec::new(), told: Vec::new(), last: None };
        for node in 0..NODES {
            elected.nodes.push(Db::open(elected.config(node)).await.unwrap());
        }
        elected.level().await;
        elected
    }

    fn config(&self, node: usize) -> Config {
        let store: Arc<dyn lease::Store> = Arc::new(self.memory.clone());
        let url = Door::Own.url(self.relays[node].address);
        primary(&self.dir.path().join(format!("{node}.db")), self.ports[node])
            .addresses(Addresses::default().replication(url))
            .lease(store)
            .bootstrap(NODES)
    }

    /// One leads, the others follow, and all have all.
    async fn level(&self) -> usize {
        let primary = || self.nodes.iter().position(|db| db.role() == Role::Primary);
        comes("a cluster", || {
            primary().is_some_and(|led| self.nodes[led].status().replicas.len() == NODES - 1)
        })
        .await;
        let led = primary().unwrap();
        // What was taken last may be more than the primary says of itself.
        for txid in self.last.into_iter().chain(self.nodes[led].position().map(|at| at.txid())) {
            for db in &self.nodes {
                within("the newest row", db.wait_for_timeout(txid, LIMIT)).await.unwrap();
            }
        }
        led
    }

    /// Writes where it is taken, and remembers what was.
    async fn write(&mut self, n: i64) -> bool {
        let mut taken = false;
        for db in self.nodes.clone() {
            let insert = move |tx: &mut replite::rusqlite::Transaction<'_>| {
                Ok::<_, Error>(tx.execute("INSERT INTO t(who, n) VALUES (?1, ?2)", (ROW, n))?)
            };
            if db.role() == Role::Primary
                && let Ok(commit) = db.write(insert).await
            {
                self.told.push(n);
                self.last = commit.txid;
                taken = true;
            }
        }
        taken
    }

    /// The same, until it is taken.
    async fn write_surely(&mut self, n: i64) {
        within("a write", async {
            while !self.write(n).await {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    async fn restart(&mut self, node: usize) {
        within("the end", self.nodes[node].shutdown()).await;
        self.nodes[node] = Db::open(self.config(node)).await.unwrap();
    }

    async fn end(self) {
        self.level().await;
        for db in &self.nodes {
            assert!(db.lost().await.unwrap().is_empty(), "something was led astray");
        }
        let paths: Vec<_> = self.nodes.iter().map(|db| db.path().to_owned()).collect();
        for db in self.nodes {
            within("the end", db.shutdown()).await;
        }
        for path in &paths {
            assert_same_pages(&paths[0], path);
        }
        let connection = plain(&paths[0]);
        let mut select = connection.prepare("SELECT n FROM t ORDER BY n").unwrap();
        let rows: Vec<i64> =
            select.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
        assert!(self.told.iter().all(|n| rows.contains(n)), "a write that was told is lost");
        assert_no_mark(self.dir.path());
        self.relays.iter().for_each(assert_nothing_seen);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_election_under_attack_loses_no_write_and_makes_one_primary_when_it_ends() {
    let mut elected = Elected::new().await;
    let attacks = ["redirect", "rewrite", "cut", "freeze"];
    for (n, attack) in attacks.into_iter().enumerate() {
        let led = elected.level().await;
        elected.write_surely(n as i64 * 10).await;
        for node in 0..NODES {
            let relay = &elected.relays[node];
            match attack {
                "redirect" => relay.lead_to(([127, 0, 0, 1], elected.ports[(node + 1) % NODES]).into()),
                "rewrite" => relay.fault(Some(Fault { way: Way::Down, at: 700, deed: Deed::Overwrite })),
                "cut" => relay.fault(Some(Fault { way: Way::Up, at: 300, deed: Deed::Reset })),
                _ => relay.flow(Flow::Free, Flow::Stopped),
            }
            relay.cut();
        }
        // Those that follow say that they have lost it.
        for node in (0..NODES).filter(|node| *node != led) {
            let db = &elected.nodes[node];
            comes("that there is no line", || {
                let status = db.status();
                status.problem.is_some() || status.lag.is_none_or(|lag| !lag.connected)
            })
            .await;
        }
        elected.write(n as i64 * 10 + 1).await;
        elected.restart(led).await;
        elected.write(n as i64 * 10 + 2).await;
        for (node, relay) in elected.relays.iter().enumerate() {
            relay.lead_to(([127, 0, 0, 1], elected.ports[node]).into());
            relay.fault(None);
            relay.flow(Flow::Free, Flow::Free);
            relay.cut();
        }
        elected.level().await;
        elected.write_surely(n as i64 * 10 + 3).await;
    }
    elected.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handoff_under_attack_comes_about_or_does_not_and_one_node_leads() {
    let mut elected = Elected::new().await;
    for (n, attack) in ["freeze", "rewrite", "cut", "redirect"].into_iter().enumerate() {
        let led = elected.level().await;
        elected.write_surely(n as i64).await;
        let relay = &elected.relays[led];
        // What comes next from the replica whose stream is the oldest.
        let at = relay.passed().iter().map(|passed| passed.up.len()).max().unwrap_or_default() + 30;
        match attack {
            "freeze" => relay.flow(Flow::Stopped, Flow::Stopped),
            "rewrite" => relay.fault(Some(Fault { way: Way::Up, at, deed: Deed::Flip(1) })),
            "cut" => relay.fault(Some(Fault { way: Way::Up, at, deed: Deed::Finish })),
            _ => {
                relay.lead_to(([127, 0, 0, 1], elected.ports[(led + 1) % NODES]).into());
                relay.cut();
            }
        }
        let to = elected.nodes[(led + 1) % NODES].node_id();
        let handed = within("a handoff", elected.nodes[led].handoff(Some(to))).await;
        println!("{attack}: {handed:?}");
        // On a slow machine an election may have been first.
        let leads = elected.nodes[led].role() == Role::Primary;
        assert!(!leads || handed.is_err(), "{attack}: it said {handed:?}, and leads on");
        let relay = &elected.relays[led];
        relay.flow(Flow::Free, Flow::Free);
        relay.fault(None);
        relay.lead_to(([127, 0, 0, 1], elected.ports[led]).into());
        relay.cut();
        elected.level().await;
        elected.write_surely(100 + n as i64).await;
    }
    elected.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_command_that_is_relayed_changes_nothing() {
    let elected = Elected::new().await;
    let led = elected.level().await;
    for inside in [Inside::Pass, Inside::Answer] {
        let at = ([127, 0, 0, 1], elected.ports[led]).into();
        let ender = Ender::start(Door::Own, at, inside).await;
        elected.relays.iter().for_each(|relay| relay.lead_to(ender.address));
        let store: Arc<dyn lease::Store> = Arc::new(elected.memory.clone());
        let operator = Operator::new(store, "default", "app").secret(secret());
        let to = elected.nodes[(led + 1) % NODES].node_id();
        let refused = within("an answer", operator.handoff(Some(to))).await;
        assert!(refused.is_err(), "{refused:?}");
        let view = within("a view", operator.show()).await;
        assert!(view.nodes.iter().all(|node| node.answer.is_none()), "{view:?}");
        let seen = ender.seen.lock().unwrap();
        assert!(!seen.heads.is_empty(), "nothing passed: {refused:?}");
        assert!(seen.body.is_empty(), "a node said something");
        assert!(seen.answers.iter().all(|status| *status == 404), "{:?}", seen.answers);
    }
    for (node, relay) in elected.relays.iter().enumerate() {
        relay.lead_to(([127, 0, 0, 1], elected.ports[node]).into());
    }
    assert_eq!(elected.level().await, led, "nothing was handed over");
    elected.end().await;
}
