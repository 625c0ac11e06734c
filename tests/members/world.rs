//! Some nodes at known addresses, with a directory each.

use std::path::{Path, PathBuf};
use std::time::Duration;

use replite::operator::{MembersView, Operator};
use replite::{Config, Db, Error, Role, Txid, Witness, lease};

use crate::support::{LIMIT, own_port, secret, within};

/// The lease time of all of them.
pub(crate) const TIME: Duration = Duration::from_secs(2);
/// Between two looks at something that nothing announces.
pub(crate) const LOOK: Duration = Duration::from_millis(10);

/// Where a node is, which others keep the record, and what else it has.
pub(crate) fn config(path: &Path, port: u16, members: lease::Members) -> Config {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    Config::new(path)
        .database("app")
        .secret(secret())
        .listen(([127, 0, 0, 1], port).into())
        .lease(members)
        .lease_time(TIME)
        .migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v)"))
}

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) ports: Vec<u16>,
    /// So many of them are members from the beginning.
    pub(crate) listed: usize,
}

impl World {
    /// All are members.
    pub(crate) fn new(nodes: usize) -> World {
        World::with_more(nodes, 0)
    }

    pub(crate) fn with_more(listed: usize, more: usize) -> World {
        let ports = (0..listed + more).map(|_| own_port()).collect();
        World { dir: tempfile::tempdir().unwrap(), ports, listed }
    }

    pub(crate) fn url(&self, node: usize) -> String {
        format!("replite://127.0.0.1:{}", self.ports[node])
    }

    pub(crate) fn path(&self, node: usize) -> PathBuf {
        self.dir.path().join(node.to_string()).join("app.db")
    }

    /// Where a node keeps what is not the database.
    pub(crate) fn state_directory(&self, node: usize) -> PathBuf {
        self.dir.path().join(node.to_string()).join("app.db-replite")
    }

    /// Where it keeps what the members agreed on.
    pub(crate) fn members_directory(&self, node: usize) -> PathBuf {
        self.state_directory(node).join("members")
    }

    /// The configured list of these nodes.
    pub(crate) fn members_of(&self, nodes: impl IntoIterator<Item = usize>) -> lease::Members {
        lease::Members::new(nodes.into_iter().map(|node| self.url(node)))
    }

    pub(crate) fn members(&self) -> lease::Members {
        self.members_of(0..self.listed)
    }

    pub(crate) fn config(&self, node: usize) -> Config {
        config(&self.path(node), self.ports[node], self.members())
    }

    pub(crate) async fn open(&self, node: usize) -> Db {
        Db::open(self.config(node)).await.unwrap()
    }

    pub(crate) async fn witness(&self, node: usize) -> Witness {
        Witness::start(self.config(node)).await.unwrap()
    }

    /// The members, once they have a state.
    pub(crate) async fn open_all(&self) -> Vec<Db> {
        let mut dbs = Vec::new();
        for node in 0..self.listed {
            dbs.push(self.open(node).await);
        }
        for db in &dbs {
            within("a state", db.ready()).await.unwrap();
        }
        dbs
    }

    pub(crate) fn operator(&self) -> Operator {
        let operator = Operator::new(self.members(), "default", "app").secret(secret());
        (0..self.ports.len()).fold(operator, |operator, node| operator.node(self.url(node)))
    }
}

pub(crate) async fn comes(what: &str, mut done: impl FnMut() -> bool) {
    within(what, async {
        while !done() {
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
}

/// Asks this node for the members until they are as they should be.
pub(crate) async fn members_are(db: &Db, what: &str, done: impl Fn(&MembersView) -> bool) -> MembersView {
    let end = std::time::Instant::now() + LIMIT;
    loop {
        let view = db.members().await.unwrap();
        if done(&view) {
            return view;
        }
        assert!(std::time::Instant::now() < end, "timed out: {what}\n{view}");
        tokio::time::sleep(LOOK).await;
    }
}

/// So many vote, all of them answer, and they agree.
pub(crate) fn all_vote(view: &MembersView, voters: usize) -> bool {
    let voting = view.members.iter().filter(|member| member.votes && member.problem.is_none()).count();
    view.agree && voting == voters && view.members.iter().filter(|member| member.votes).count() == voters
}

/// The URL of the member that leads the others.
pub(crate) fn raft_leader(view: &MembersView) -> Option<String> {
    view.members.iter().find(|member| member.leads).map(|member| member.url.clone())
}

pub(crate) fn id_at(view: &MembersView, url: &str) -> Option<String> {
    view.members.iter().find(|member| member.url == url)?.id.clone()
}

/// Which of them is the primary, once one is.
pub(crate) async fn primary(dbs: &[Db]) -> usize {
    comes("a primary", || dbs.iter().any(|db| db.role() == Role::Primary)).await;
    dbs.iter().position(|db| db.role() == Role::Primary).unwrap()
}

/// A write on one node.
pub(crate) async fn write_on(db: &Db, value: i64) -> Result<Txid, Error> {
    let insert = move |tx: &mut replite::rusqlite::Transaction<'_>| {
        Ok::<_, Error>(tx.execute("INSERT INTO t(v) VALUES (?1)", [value])?)
    };
    Ok(db.write(insert).await?.txid.unwrap())
}

/// A write on the one that is the primary.
pub(crate) async fn write(dbs: &[Db], value: i64) -> Txid {
    within("a write", async {
        loop {
            for db in dbs {
                match write_on(db, value).await {
                    Ok(txid) => return txid,
                    Err(Error::NotPrimary { .. } | Error::ShutDown) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    })
    .await
}

pub(crate) async fn all_have(dbs: &[Db], txid: Txid) {
    for db in dbs {
        within("the transaction", db.wait_for_timeout(txid, LIMIT)).await.unwrap();
    }
}

pub(crate) fn values(db: &Db) -> Vec<i64> {
    db.read(|conn| {
        let mut select = conn.prepare("SELECT v FROM t ORDER BY id")?;
        let rows = select.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        Ok::<_, Error>(rows)
    })
    .unwrap()
}

/// All that a node has to say of what is wrong.
pub(crate) fn words(db: &Db) -> String {
    let status = db.status();
    format!("{:?} {:?} {}", status.waits_for, status.problem, db.health().reasons.join("; "))
}

pub(crate) async fn end(dbs: impl IntoIterator<Item = Db>) {
    for db in dbs {
        within("the end", db.shutdown()).await;
    }
}
