//! Clusters that go over to TLS and back, and to another secret, one node at a time, and lose no
//! write.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use replite::testing::lease::Memory;
use replite::{Addresses, Config, Db, Error, Plaintext, Role, Secret, lease};

use crate::relay::Relay;
use crate::support::*;
use crate::world::*;

/// Each of two nodes has TLS only, or also speaks in the clear.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_with_plaintext_and_without_follow_each_other_by_each_door() {
    for primary_clear in [false, true] {
        let change = |config: Config| match primary_clear {
            true => config.plaintext(Plaintext::AnyNetwork),
            false => config,
        };
        let world = World::with(change).await;
        for replica_clear in [false, true] {
            for (door, scheme) in [(Door::Own, "replite"), (Door::Own, "http"), (Door::Mounted, "http")] {
                let relay = world.relay(door).await;
                let url = match scheme {
                    "http" => Door::Mounted.url(relay.address),
                    _ => door.url(relay.address),
                };
                let name = format!("{replica_clear}-{door:?}-{scheme}.db");
                let mut config = replica(&world.dir.path().join(name), &url);
                if replica_clear {
                    config = config.plaintext(Plaintext::AnyNetwork);
                }
                let replica = Db::open(config).await.unwrap();
                world.level(&replica).await;
                replica.shutdown().await;
                assert_prefix(world.primary.path(), replica.path());
                // In the clear are those alone that both want so, and dial so.
                let clear = primary_clear && replica_clear && scheme == "http";
                let seen =
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| assert_nothing_seen(&relay)));
                assert_eq!(seen.is_err(), clear, "{primary_clear} {replica_clear} {door:?} {scheme}");
            }
        }
        world.end(Vec::new(), &[]).await;
    }
}

/// Three nodes with one lease, each behind a port of its own, and a client that writes all the time.
struct Rolling {
    dir: tempfile::TempDir,
    memory: Memory,
    ports: Vec<u16>,
    nodes: Vec<Option<Db>>,
}

const NODES: usize = 3;

impl Rolling {
    async fn start(change: impl Fn(Config) -> Config) -> Rolling {
        let memory = Memory::new().with_lease_time(Duration::from_secs(2));
        let ports = (0..NODES).map(|_| own_port()).collect();
        let mut rolling = Rolling { dir: tempfile::tempdir().unwrap(), memory, ports, nodes: Vec::new() };
        for node in 0..NODES {
            let db = Db::open(change(rolling.config(node))).await.unwrap();
            rolling.nodes.push(Some(db));
        }
        rolling.level().await;
        rolling
    }

    fn path(&self, node: usize) -> PathBuf {
        self.dir.path().join(format!("{node}.db"))
    }

    fn config(&self, node: usize) -> Config {
        let store: Arc<dyn lease::Store> = Arc::new(self.memory.clone());
        // One address for all that a node may speak, for as long as the change takes.
        let url = format!("http://127.0.0.1:{}/_replite", self.ports[node]);
        primary(&self.path(node), self.ports[node])
            .addresses(Addresses::default().replication(url))
            .lease(store)
            .bootstrap(NODES)
    }

    fn live(&self) -> Vec<Db> {
        self.nodes.iter().flatten().cloned().collect()
    }

    /// One leads, and the others follow.
    async fn level(&self) -> usize {
        let dbs = self.live();
        comes("a cluster", || {
            let primary = dbs.iter().find(|db| db.role() == Role::Primary);
            primary.is_some_and(|db| db.status().replicas.len() == dbs.len() - 1)
        })
        .await;
        let primary = dbs.iter().position(|db| db.role() == Role::Primary).unwrap();
        let newest = dbs[primary].position().unwrap().txid();
        for db in &dbs {
            within("the newest row", db.wait_for_timeout(newest, LIMIT)).await.unwrap();
        }
        primary
    }

    async fn restart(&mut self, node: usize, config: Config) {
        let db = self.nodes[node].take().unwrap();
        within("the end", db.shutdown()).await;
        drop(db);
        self.nodes[node] = Some(Db::open(config).await.unwrap());
        self.level().await;
    }

    /// All of these rows are on each node.
    async fn end(self, told: Vec<i64>) {
        assert!(!told.is_empty());
        let primary = self.level().await;
        // The client's last rows may be more than the primary says of itself.
        let last = insert(&self.live()[primary], "last", 0).await;
        for db in self.live() {
            within("the last row", db.wait_for_timeout(last, LIMIT)).await.unwrap();
        }
        let mut first = None;
        for db in self.live() {
            assert!(db.lost().await.unwrap().is_empty());
            let rows: Vec<i64> = db
                .read(|connection| {
                    let mut select = connection.prepare("SELECT n FROM t WHERE who = 'client'")?;
                    let rows = select.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
                    Ok::<_, Error>(rows)
                })
                .unwrap();
            assert!(told.iter().all(|n| rows.contains(n)), "a write that was told is lost");
            assert_eq!(rows, *first.get_or_insert(rows.clone()));
        }
        for node in self.live() {
            within("the end", node.shutdown()).await;
        }
        for node in 1..NODES {
            assert_same_pages(&self.path(0), &self.path(node));
        }
    }
}

/// Writes to the node that leads, again and again, and remembers what it was told of.
struct Client {
    nodes: tokio::sync::watch::Sender<Vec<Db>>,
    stop: Arc<AtomicBool>,
    told: Arc<AtomicI64>,
    task: tokio::task::JoinHandle<Vec<i64>>,
}

impl Client {
    fn start(nodes: Vec<Db>) -> Client {
        let nodes = tokio::sync::watch::Sender::new(nodes);
        let (stop, told) = (Arc::<AtomicBool>::default(), Arc::<AtomicI64>::default());
        let (watched, stopped, count) = (nodes.subscribe(), stop.clone(), told.clone());
        let task = tokio::spawn(async move {
            let mut rows = Vec::new();
            for n in 0.. {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let all = watched.borrow().clone();
                for db in all.iter().filter(|db| db.role() == Role::Primary) {
                    let insert = move |tx: &mut replite::rusqlite::Transaction<'_>| {
                        Ok::<_, Error>(tx.execute("INSERT INTO t(who, n) VALUES ('client', ?1)", [n])?)
                    };
                    if db.write(insert).await.is_ok() {
                        rows.push(n);
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            rows
        });
        Client { nodes, stop, told, task }
    }

    /// The nodes are now these, and the client writes to them.
    async fn goes_on(&self, nodes: Vec<Db>) {
        self.nodes.send_replace(nodes);
        let told = self.told.load(Ordering::SeqCst);
        comes("some writes", || self.told.load(Ordering::SeqCst) > told + 5).await;
    }

    async fn end(self) -> Vec<i64> {
        self.stop.store(true, Ordering::SeqCst);
        drop(self.nodes);
        self.task.await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_goes_over_to_tls_and_back_one_node_at_a_time() {
    let clear = |config: Config| config.plaintext(Plaintext::AnyNetwork);
    let mut rolling = Rolling::start(clear).await;
    let client = Client::start(rolling.live());
    for node in 0..NODES {
        let config = rolling.config(node);
        rolling.restart(node, config).await;
        client.goes_on(rolling.live()).await;
    }
    for node in (0..NODES).rev() {
        let config = clear(rolling.config(node));
        rolling.restart(node, config).await;
        client.goes_on(rolling.live()).await;
    }
    let told = client.end().await;
    rolling.end(told).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clusters_secret_is_changed_one_node_at_a_time() {
    let (old, new) = (secret(), Secret::generate().unwrap());
    let mut rolling = Rolling::start(|config| config).await;
    let client = Client::start(rolling.live());
    // While all runs.
    for secrets in [[&old, &new], [&new, &old]] {
        for db in rolling.live() {
            db.rotate_secrets(&secrets.map(Clone::clone)).unwrap();
            client.goes_on(rolling.live()).await;
            rolling.level().await;
        }
    }
    for db in rolling.live() {
        db.rotate_secrets(std::slice::from_ref(&new)).unwrap();
        client.goes_on(rolling.live()).await;
    }
    rolling.level().await;
    // And back, by starts.
    for secrets in [vec![new.clone(), old.clone()], vec![old.clone(), new.clone()], vec![old.clone()]] {
        for node in 0..NODES {
            let config = rolling.config(node).secrets(secrets.clone());
            rolling.restart(node, config).await;
            client.goes_on(rolling.live()).await;
        }
    }
    let told = client.end().await;
    rolling.end(told).await;
}

/// A node that has TLS is not talked out of it by one that says that the other side has none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_talks_a_node_out_of_tls() {
    let world = World::with(|config| config.plaintext(Plaintext::AnyNetwork)).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    for word in ["plaintext", "tls", "http2"] {
        // A server in the relay's place that refuses each request with that word.
        let relay = Relay::start(address).await;
        let url = Door::Mounted.url(relay.address);
        let victim = Db::open(replica(&world.dir.path().join(format!("{word}.db")), &url)).await.unwrap();
        let mut served = 0;
        while served < 4 {
            let (io, _) = within("a try", listener.accept()).await.unwrap();
            let Ok(mut connection) = h2::server::handshake(io).await else { continue };
            let Some(Ok((request, mut respond))) = connection.accept().await else { continue };
            assert!(request.uri().path().ends_with("/v1/tunnel"), "{request:?}");
            assert!(!request.headers().contains_key("replite-cluster"), "it knocks in the clear");
            let mut response = http::Response::new(());
            *response.status_mut() = http::StatusCode::UPGRADE_REQUIRED;
            response.headers_mut().insert("replite-refused", word.parse().unwrap());
            respond.send_response(response, true).unwrap();
            std::future::poll_fn(|cx| connection.poll_closed(cx)).await.ok();
            served += 1;
        }
        says(&victim, "that it has no line").await;
        // The true one is dialled in TLS by the same URL.
        relay.lead_to(world.at(Door::Mounted));
        relay.cut();
        world.level(&victim).await;
        assert_nothing_seen(&relay);
        victim.shutdown().await;
    }
    world.end(Vec::new(), &[]).await;
}
