//! Where the lease's record is kept in a round, and each node's own way there.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use replite_stores::etcd::EtcdCluster;
use replite_stores::s3::{BUCKET, S3Server};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Members of etcd's cluster.
const ETCD_MEMBERS: usize = 3;

/// What keeps the record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreKind {
    /// A directory.
    Directory,
    /// The nodes themselves.
    Members,
    /// Three members of etcd.
    Etcd,
    /// An S3 server.
    Objects,
}

impl StoreKind {
    pub const ALL: [(&str, StoreKind); 4] = [
        ("directory", StoreKind::Directory),
        ("members", StoreKind::Members),
        ("etcd", StoreKind::Etcd),
        ("objects", StoreKind::Objects),
    ];

    /// How much more lease time it needs than a directory.
    #[must_use]
    pub fn slower(self) -> Duration {
        Duration::from_millis(match self {
            StoreKind::Directory | StoreKind::Objects => 0,
            StoreKind::Etcd => 500,
            // Two seconds at least.
            StoreKind::Members => 1000,
        })
    }

    /// # Errors
    /// There is none of this name.
    pub fn named(name: &str) -> Result<StoreKind, String> {
        let found = StoreKind::ALL.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind);
        found.ok_or_else(|| format!("there is no store {name}: directory, members, etcd, objects"))
    }
}

/// The processes that keep the record, and the ways of nodes to them.
#[derive(Debug)]
pub enum Store {
    /// Files, or the nodes.
    Here,
    Etcd(tokio::sync::Mutex<EtcdCluster>, Gates),
    Objects(tokio::sync::Mutex<S3Server>, Gates),
}

impl Store {
    /// Starts what is needed. None: it is not installed here.
    ///
    /// # Errors
    /// The system's.
    pub async fn start(kind: StoreKind, binary: &Path) -> io::Result<Option<Store>> {
        Ok(Some(match kind {
            StoreKind::Directory | StoreKind::Members => Store::Here,
            StoreKind::Etcd => match EtcdCluster::start(ETCD_MEMBERS).await? {
                Some(cluster) => Store::Etcd(cluster.into(), Gates::default()),
                None => return Ok(None),
            },
            StoreKind::Objects => {
                let server = S3Server::start(&binary.with_file_name("s3-server")).await?;
                Store::Objects(server.into(), Gates::default())
            }
        }))
    }

    /// What a node's command line says of the record, by a way of its own, and its environment.
    ///
    /// # Errors
    /// The system's.
    pub async fn of_node(&self, node: usize) -> io::Result<(String, Vec<(String, String)>)> {
        Ok(match self {
            Store::Here => (String::new(), Vec::new()),
            Store::Etcd(cluster, gates) => {
                let mut ways = Vec::new();
                for url in cluster.lock().await.urls() {
                    ways.push(gates.before(node, address(&url)?).await?.to_string());
                }
                (format!("etcd://{}/failover", ways.join(",")), Vec::new())
            }
            Store::Objects(server, gates) => {
                let server = server.lock().await;
                let way = gates.before(node, address(&server.endpoint())?).await?;
                let here = server.endpoint();
                let options = server.options().into_iter().map(|(name, value)| {
                    let value = if value == here { format!("http://{way}") } else { value };
                    (name.to_uppercase(), value)
                });
                (format!("s3://{BUCKET}/failover"), options.collect())
            }
        })
    }

    /// Opens or closes a node's way. Whether there is one that can be closed.
    pub fn set_way(&self, node: usize, open: bool) -> bool {
        match self {
            Store::Here => false,
            Store::Etcd(_, gates) | Store::Objects(_, gates) => {
                gates.set(node, open);
                true
            }
        }
    }
}

fn address(url: &str) -> io::Result<SocketAddr> {
    let bare = url.rsplit("//").next().unwrap_or(url).trim_end_matches('/');
    bare.parse().map_err(|_| io::Error::other(format!("{url} is no address")))
}

/// TCP proxies that can be shut.
#[derive(Debug, Default)]
pub struct Gates(Mutex<Vec<Gate>>);

#[derive(Clone, Debug)]
struct Gate {
    node: usize,
    open: Arc<AtomicBool>,
    shut: watch::Sender<u64>,
}

impl Gates {
    /// A way of this node to that address, until the runtime ends.
    async fn before(&self, node: usize, to: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let gate = Gate { node, open: Arc::new(AtomicBool::new(true)), shut: watch::Sender::new(0) };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(gate.clone());
        let here = listener.local_addr()?;
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                if gate.open.load(Ordering::Acquire) {
                    tokio::spawn(pass(near, to, gate.shut.subscribe()));
                }
            }
        });
        Ok(here)
    }

    fn set(&self, node: usize, open: bool) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for gate in all.iter().filter(|gate| gate.node == node) {
            gate.open.store(open, Ordering::Release);
            gate.shut.send_modify(|number| *number += u64::from(!open));
        }
    }
}

async fn pass(mut near: TcpStream, to: SocketAddr, mut shut: watch::Receiver<u64>) {
    let Ok(mut far) = TcpStream::connect(to).await else { return };
    // Small pieces go at once.
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    tokio::select! {
        _ = copy_bidirectional(&mut near, &mut far) => {}
        _ = shut.changed() => {}
    }
}
