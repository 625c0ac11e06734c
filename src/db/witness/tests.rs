//! Three witnesses: members as they are, with nothing else beside them.

mod strangers;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpSocket;

use crate::channel::Channel;
use crate::db::Config;
use crate::db::witness::Witness;
use crate::handshake::Asker;
use crate::lease::{Members, Store};
use crate::members::{Ask, MemberAnswer, MembersFromOutside};
use crate::peer::{Incarnation, NodeId};
use crate::secret::{Keyring, Secret};
use crate::testing::lease::conformance;

/// The longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at what nothing announces.
const LOOK: Duration = Duration::from_millis(10);

struct World {
    dir: tempfile::TempDir,
    /// Each is bound, so that no other listener takes the port.
    ports: Vec<TcpSocket>,
}

impl World {
    fn new(members: usize) -> World {
        let port = |_| {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket
        };
        World { dir: tempfile::tempdir().unwrap(), ports: (0..members).map(port).collect() }
    }

    fn urls(&self) -> Vec<String> {
        let url = |socket: &TcpSocket| format!("replite://{}", socket.local_addr().unwrap());
        self.ports.iter().map(url).collect()
    }

    async fn start(&self, member: usize) -> Witness {
        let directory = self.dir.path().join(member.to_string());
        std::fs::create_dir_all(&directory).unwrap();
        let config = Config::new(directory.join("app.db"))
            .listen(self.ports[member].local_addr().unwrap())
            .secret(Secret::fixed([7; 32]))
            .follower_secret(Secret::fixed([8; 32]))
            .lease(Members::new(self.urls()))
            .lease_time(Duration::from_secs(2));
        Witness::start(config).await.unwrap()
    }

    /// All of them, once they have begun by an operator's word: they have no database.
    async fn start_all(&self) -> Vec<Witness> {
        let mut witnesses = Vec::new();
        for member in 0..self.ports.len() {
            witnesses.push(self.start(member).await);
        }
        within("the beginning", async {
            while !matches!(member(&witnesses[0]).answer(Ask::Begin).await, MemberAnswer::Changed) {
                tokio::time::sleep(LOOK).await;
            }
        })
        .await;
        agree(&witnesses[0]).await;
        witnesses
    }

    fn outside(&self) -> MembersFromOutside {
        MembersFromOutside::new(asker(member_keys()), self.urls())
    }
}

fn member_keys() -> Keyring {
    Keyring::new(&[Secret::fixed([7; 32])]).unwrap()
}

fn asker(keys: Keyring) -> Asker {
    Asker {
        keys,
        cluster: "default".into(),
        database: "app".into(),
        node: NodeId::random(),
        incarnation: Incarnation::random(),
        channel: Channel::ephemeral(None).unwrap(),
    }
}

fn member(witness: &Witness) -> Arc<crate::members::MemberNode> {
    witness.0.door.get().unwrap().clone()
}

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("timed out: {what}"))
}

/// Returns which one leads, once all have a vote and know a leader.
async fn agree(witness: &Witness) -> usize {
    within("a leader", async {
        loop {
            let view = witness.members().await.unwrap();
            let leads = view.members.iter().position(|member| member.leads);
            if let Some(leads) =
                leads.filter(|_| view.agree && view.members.iter().all(|one| one.problem.is_none()))
            {
                return leads;
            }
            tokio::time::sleep(LOOK).await;
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_a_store_that_keeps_its_contract() {
    let world = World::new(3);
    let witnesses = world.start_all().await;
    let next = std::sync::atomic::AtomicUsize::new(0);
    // Through the leader, through those that do not lead, and from outside.
    let make = || -> Arc<dyn Store> {
        match next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 4 {
            3 => Arc::new(world.outside()),
            own => member(&witnesses[own]),
        }
    };
    within("the contract", conformance(make)).await.unwrap();
    for witness in witnesses {
        witness.shutdown().await;
    }
}

/// The one that leads ends and starts again, all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_while_leaders_end() {
    let world = World::new(3);
    let mut witnesses = world.start_all().await;
    let urls = world.urls();
    let restarting = async {
        for changes in 0.. {
            let leads = within("a leader", async {
                loop {
                    let view = witnesses[changes % 3].members().await.unwrap();
                    if let Some(leads) = view.members.iter().find(|member| member.leads) {
                        return urls.iter().position(|url| *url == leads.url).unwrap();
                    }
                    tokio::time::sleep(LOOK).await;
                }
            })
            .await;
            witnesses[leads].shutdown().await;
            witnesses[leads] = world.start(leads).await;
            eprintln!("restart {}", changes + 1);
            // Work gets done between two of them.
            agree(&witnesses[leads]).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    let outside = || -> Arc<dyn Store> { Arc::new(world.outside()) };
    tokio::select! {
        checked = conformance(outside) => checked.unwrap(),
        () = restarting => unreachable!(),
    }
}
