//! Followers, members and nodes that are shut out, over real channels; and a follower that speaks
//! the protocol and keeps to none of its rules.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rusqlite::Connection;
use tokio_util::task::TaskTracker;

use crate::channel::Channel;
use crate::command::{self, NoAnswer};
use crate::context::OperatorCommand;
use crate::db::{Config, Db};
use crate::ends::comes;
use crate::engine::Durability;
use crate::error::{Error, PeerProblem};
use crate::handshake::{self, Answer, Asker, COMMAND_PATH, Knock, Refusal, STREAM_PATH};
use crate::keys::DatabaseKeys;
use crate::lease::{self, Fixed};
use crate::net::{Endpoint, OpenResponse};
use crate::page::{PageNo, PageSize};
use crate::peer::{Incarnation, NodeId};
use crate::secret::{Keyring, Secret};
use crate::standing;
use crate::status::{Addresses, Event, PeerInfo, Role};
use crate::txid::{Epoch, EpochHistory, EpochStart, Position, Txid};
use crate::wire::{
    self, Accept, Ack, Decoder, Goodbye, Hello, Message, PageRun, PeerKeys, Plan, Sent, Unpacker, Welcome,
};

const LIMIT: Duration = Duration::from_secs(30);

fn members() -> Secret {
    Secret::fixed([7; 32])
}

fn followers() -> Secret {
    Secret::fixed([8; 32])
}

fn config(path: &Path) -> Config {
    Config::new(path).database("app").migrate(|conn: &mut Connection| {
        conn.execute_batch("CREATE TABLE IF NOT EXISTS t(a INTEGER PRIMARY KEY, b)")
    })
}

fn primary(path: &Path) -> Config {
    config(path).secret(members()).follower_secret(followers()).listen(([127, 0, 0, 1], 0).into())
}

fn to(db: &Db) -> Endpoint {
    Endpoint::parse(&db.node().addresses.replication).unwrap()
}

fn follows(path: &Path, primary: &Db) -> Config {
    config(path).lease(Fixed::replica_of(&primary.node().addresses.replication))
}

async fn write(db: &Db) -> Txid {
    let insert = |tx: &mut rusqlite::Transaction<'_>| {
        tx.execute("INSERT INTO t(b) VALUES (randomblob(100))", []).map_err(Error::from)
    };
    db.write(insert).await.unwrap().txid.unwrap()
}

/// A primary, a member that follows it, and a follower.
async fn three(dir: &Path) -> [Db; 3] {
    let one = Db::open(primary(&dir.join("a.db"))).await.unwrap();
    let two = Db::open(follows(&dir.join("b.db"), &one).secret(members())).await.unwrap();
    let three = Db::open(follows(&dir.join("c.db"), &one).follower_secret(followers())).await.unwrap();
    let txid = write(&one).await;
    for db in [&two, &three] {
        db.wait_for_timeout(txid, LIMIT).await.unwrap();
    }
    [one, two, three]
}

async fn shut(dbs: impl IntoIterator<Item = Db>) {
    for db in dbs {
        db.shutdown().await;
    }
}

/// The nodes that follow, those of members first.
fn connected(primary: &Db) -> (Vec<NodeId>, Vec<NodeId>) {
    let replicas = primary.status().replicas;
    let of = |follower| {
        let those = replicas.iter().filter(move |replica| replica.follower == follower);
        those.map(|replica| replica.peer.node).collect()
    };
    (of(false), of(true))
}

/// The next event that counts.
async fn event(events: &mut crate::db::Events, is: impl Fn(&Event) -> bool) -> Event {
    let next = async {
        loop {
            let event = events.next().await.unwrap();
            if is(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(LIMIT, next).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_is_served_knows_who_leads_and_never_does() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two, three] = three(dir.path()).await;
    let (of_one, of_three) = (one.status(), three.status());
    assert!(of_one.key.is_some() && of_one.primary_key == of_one.key);
    for status in [&two.status(), &of_three] {
        assert_eq!((status.role, status.primary_key), (Role::Replica, of_one.key));
        assert_eq!(status.primary.as_ref().map(|primary| primary.node), Some(one.node_id()));
    }
    assert_eq!(connected(&one), (vec![two.node_id()], vec![three.node_id()]));
    for replica in &of_one.replicas {
        let of = if replica.follower { &of_three } else { &two.status() };
        assert_eq!(replica.key, of.key);
    }
    assert_ne!(of_three.key, of_one.key);
    assert!(matches!(three.promote().await, Err(Error::Config(_))));
    assert!(matches!(three.promote_unchecked().await, Err(Error::Config(_))));
    assert!(matches!(three.rotate_secrets(&[members()]), Err(Error::Config(_))));
    let txid = write(&one).await;
    let token = two.token(txid).unwrap();
    assert_eq!((three.token(txid), three.verify_token(token.as_str())), (None, None));
    assert_eq!(one.verify_token(token.as_str()), Some(txid));
    shut([three, two, one]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_secret_is_replaced_without_a_stream_of_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two, three] = three(dir.path()).await;
    let mut events = one.events();
    one.rotate_follower_secrets(&[]).unwrap();
    let left = event(&mut events, |event| matches!(event, Event::ReplicaLeft { .. })).await;
    let Event::ReplicaLeft { replica, key } = left else { panic!() };
    assert_eq!((replica.node, key), (three.node_id(), three.status().key));
    comes("the follower says why", || three.status().problem.is_some()).await;
    comes("it is gone", || connected(&one) == (vec![two.node_id()], vec![])).await;
    // The follower has one secret at a time, and the member answers by it.
    let next = Secret::fixed([9; 32]);
    one.rotate_follower_secrets(&[next.clone(), followers()]).unwrap();
    let txid = write(&one).await;
    three.wait_for_timeout(txid, LIMIT).await.unwrap();
    three.rotate_follower_secrets(std::slice::from_ref(&next)).unwrap();
    one.rotate_follower_secrets(std::slice::from_ref(&next)).unwrap();
    let txid = write(&one).await;
    three.wait_for_timeout(txid, LIMIT).await.unwrap();
    comes("all are there", || connected(&one) == (vec![two.node_id()], vec![three.node_id()])).await;
    // And members' secrets without the followers' streams.
    let mut events = one.events();
    one.rotate_secrets(&[Secret::fixed([1; 32])]).unwrap();
    let left = event(&mut events, |event| matches!(event, Event::ReplicaLeft { .. })).await;
    assert!(matches!(left, Event::ReplicaLeft { replica, .. } if replica.node == two.node_id()));
    comes("it is gone", || connected(&one) == (vec![], vec![three.node_id()])).await;
    shut([three, two, one]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_shut_out_is_cut_off_at_once_and_either_side_may() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two, three] = three(dir.path()).await;
    let key = |db: &Db| db.status().key.unwrap();
    let mut events = one.events();
    one.shut_out([key(&two)]).unwrap();
    let left = event(&mut events, |event| matches!(event, Event::ReplicaLeft { .. })).await;
    assert!(matches!(left, Event::ReplicaLeft { replica, .. } if replica.node == two.node_id()));
    let txid = write(&one).await;
    three.wait_for_timeout(txid, LIMIT).await.unwrap();
    comes("it is gone", || connected(&one) == (vec![], vec![three.node_id()])).await;
    let asked = standing::ask(&two.inner.node, one.node(), &two.inner.tracker).await;
    assert!(matches!(asked, Err(Error::Peer { problem: PeerProblem::Connection(_), .. })), "{asked:?}");
    // Another set takes the place of this one.
    one.shut_out([key(&three)]).unwrap();
    comes("they change places", || connected(&one) == (vec![two.node_id()], vec![])).await;
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    // A replica that follows one no more.
    two.shut_out([key(&one)]).unwrap();
    comes("it says why", || two.status().problem.is_some_and(|problem| problem.contains("shut out"))).await;
    comes("it leaves", || connected(&one) == (vec![], vec![])).await;
    let asked = standing::ask(&two.inner.node, one.node(), &two.inner.tracker).await;
    let Err(Error::Peer { problem, .. }) = asked else { panic!("{asked:?}") };
    assert!(matches!(problem, PeerProblem::ShutOut(shut) if shut == key(&one)), "{problem}");
    for db in [&one, &two] {
        db.shut_out([]).unwrap();
    }
    comes("all are back", || connected(&one) == (vec![two.node_id()], vec![three.node_id()])).await;
    // The set is bounded, and nothing changes when it can't be taken.
    let many = (0..=1024_u32).map(|n| format!("{n:064x}").parse().unwrap());
    assert!(matches!(one.shut_out(many), Err(Error::Config(_))));
    assert!(matches!(one.shut_out([key(&two), key(&one)]), Err(Error::Config(_))));
    assert_eq!(connected(&one), (vec![two.node_id()], vec![three.node_id()]));
    shut([three, two, one]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_starts_with_those_that_are_shut_out() {
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(primary(&dir.path().join("a.db"))).await.unwrap();
    let key = one.status().key.unwrap();
    let two = follows(&dir.path().join("b.db"), &one).secret(members()).shut_out([key]);
    let two = Db::open(two).await.unwrap();
    comes("it says why", || two.status().problem.is_some_and(|problem| problem.contains("shut out"))).await;
    assert!(one.status().replicas.is_empty() && two.position().is_none());
    let many = (0..=1024_u32).map(|n| format!("{n:064x}").parse().unwrap());
    let refused = Db::open(config(&dir.path().join("c.db")).shut_out(many)).await;
    assert!(matches!(refused, Err(Error::Config(_))));
    shut([two, one]).await;
}

/// A follower, or a member, that says what it likes.
struct Hostile {
    asker: Asker,
    me: PeerInfo,
    tracker: TaskTracker,
    /// What it says to know of the database's keys.
    keys: PeerKeys,
}

/// A stream of one.
struct HostileStream {
    opened: OpenResponse,
    decoder: Decoder,
    /// What comes after the welcome goes through it.
    unpacker: Option<Unpacker>,
}

impl Hostile {
    fn with(keys: Keyring) -> Hostile {
        let (node, incarnation) = (NodeId::random(), Incarnation::random());
        let (cluster, database) = ("default".into(), "app".into());
        let channel = Channel::ephemeral(None).unwrap();
        let me = PeerInfo { node, incarnation, addresses: Addresses::default() };
        let asker = Asker { keys, cluster, database, node, incarnation, channel };
        let keys = PeerKeys::of(DatabaseKeys::fixed(9), true);
        Hostile { asker, me, tracker: TaskTracker::new(), keys }
    }

    fn follower() -> Hostile {
        Hostile::with(Keyring::with_followers(&[], &[followers()]).unwrap())
    }

    fn member() -> Hostile {
        Hostile::with(Keyring::new(&[members()]).unwrap())
    }

    /// One that has the keys of this node's database.
    fn knowing(self, db: &Db) -> Hostile {
        Hostile { keys: PeerKeys::of(db.inner.node.database_keys.get(), true), ..self }
    }

    /// Knocks, and is answered or refused.
    async fn knock(&self, to: &Endpoint, path: &str) -> Result<(Knock, Answer, OpenResponse), PeerProblem> {
        let (knock, opened) = self.asker.knock(to, path, &self.tracker).await?;
        let read = handshake::read_head((opened.status, &opened.headers), &knock, &self.asker.keys);
        let (answer, _) = read.map_err(|problem| problem.unwrap_or(PeerProblem::NotFound))?;
        Ok((knock, answer, opened))
    }

    /// Says hello, with this history and at this position of it.
    async fn hello(
        &self,
        to: &Endpoint,
        history: &EpochHistory,
        position: Option<Position>,
    ) -> Result<HostileStream, PeerProblem> {
        let (knock, answer, mut opened) = self.knock(to, STREAM_PATH).await?;
        let mut hello = Hello {
            proof: [0; 32],
            keys: self.keys,
            peer: self.me.clone(),
            position,
            history: history.clone(),
            resume: None,
            suspect: false,
            marks: Vec::new(),
        };
        handshake::seal_hello(&mut hello, &knock, &answer.nonce, &self.asker.keys);
        opened.request.send_data(encoded(&Message::Hello(hello))).await.unwrap();
        Ok(HostileStream { opened, decoder: Decoder::default(), unpacker: None })
    }
}

fn encoded(message: &Message<'_>) -> Bytes {
    let mut bytes = BytesMut::new();
    wire::encode(message, &mut bytes);
    bytes.freeze()
}

/// How a primary's stream ended: its last word, if it said one.
type Ended = Option<String>;

impl HostileStream {
    async fn say(&mut self, message: &Message<'_>) {
        // The primary may have hung up.
        let _ = self.opened.request.send_data(encoded(message)).await;
    }

    /// The first unit that gives something; none at the end.
    async fn next<T>(&mut self, mut of: impl FnMut(&Message<'_>) -> Option<T>) -> Option<T> {
        let next = async {
            loop {
                while let Some(unit) = self.decoder.next().unwrap() {
                    let message = unit.decode().unwrap();
                    if matches!(message, Message::Welcome(Welcome { packed: true, .. })) {
                        let mut unpacker = Unpacker::new().unwrap();
                        self.decoder.take_rest().for_each(|bytes| unpacker.push(bytes));
                        self.unpacker = Some(unpacker);
                    }
                    if let Some(found) = of(&message) {
                        return Some(found);
                    }
                }
                if let Some(bytes) = self.unpacker.as_mut().and_then(|unpacker| unpacker.next().unwrap()) {
                    self.decoder.push(bytes);
                    continue;
                }
                let bytes = self.opened.body.next().await?.ok()?;
                match &mut self.unpacker {
                    Some(unpacker) => unpacker.push(bytes),
                    None => self.decoder.push(bytes),
                }
            }
        };
        tokio::time::timeout(LIMIT, next).await.expect("the primary goes on")
    }

    async fn plan(&mut self) -> Option<Plan> {
        self.next(|message| match message {
            Message::Welcome(welcome) => Some(welcome.plan),
            _ => None,
        })
        .await
    }

    async fn end(&mut self) -> Ended {
        self.next(|message| match message {
            Message::Goodbye(Goodbye { reason }) => Some(reason.clone()),
            _ => None,
        })
        .await
    }
}

/// The history of a primary with one more epoch, so far above its newest.
fn claimed(db: &Db, above: u64) -> EpochHistory {
    let mut history = (*db.inner.node.applied.history()).clone();
    let position = db.position().unwrap();
    let epoch = Epoch::new(history.epoch().number() + above, 77);
    history.push(EpochStart { epoch, first: position.number() + 1, before: position.checksum() });
    history
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_follower_raises_no_epoch_of_a_fixed_primary() {
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(primary(&dir.path().join("a.db"))).await.unwrap();
    let txid = write(&one).await;
    one.wait_for_timeout(txid, LIMIT).await.unwrap();
    let before = one.status().epoch;
    for above in [1, 2, 1 << 20, 1 << 40] {
        let hostile = Hostile::follower().knowing(&one);
        let mut stream = hostile.hello(&to(&one), &claimed(&one, above), one.position()).await.unwrap();
        let said = stream.end().await.expect("a reason");
        assert!(said.contains("epoch"), "{said}");
        assert_eq!(one.status().epoch, before, "{above} above");
    }
    // The same branch number once more, as if another primary had claimed it.
    let mut history = EpochHistory::default();
    let epoch = Epoch::new(before.number(), 99);
    history.push(EpochStart { epoch, first: 1, before: crate::checksum::Checksum::EMPTY });
    let mut stream = Hostile::follower().knowing(&one).hello(&to(&one), &history, None).await.unwrap();
    assert!(stream.end().await.is_some());
    assert_eq!(one.status().epoch, before);
    // A member's word counts.
    let mut stream =
        Hostile::member().knowing(&one).hello(&to(&one), &claimed(&one, 2), one.position()).await.unwrap();
    assert!(stream.plan().await.is_some());
    assert!(one.status().epoch.number() > before.number() + 2);
    drop(stream);
    shut([one]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_follower_moves_no_lease() {
    let dir = tempfile::tempdir().unwrap();
    let store = || lease::Directory::new(dir.path().join("lease"));
    let time = Duration::from_secs(5);
    let one = primary(&dir.path().join("a.db")).lease(store()).lease_time(time).bootstrap(1);
    let one = Db::open(one).await.unwrap();
    comes("it leads", || one.health().can_write).await;
    let three = config(&dir.path().join("c.db")).follower_secret(followers()).lease(store());
    let three = three.listen(([127, 0, 0, 1], 0).into()).bootstrap(1);
    let three = Db::open(three).await.unwrap();
    let txid = write(&one).await;
    three.wait_for_timeout(txid, LIMIT).await.unwrap();
    let (before, heard) = (one.status().epoch, one.inner.node.lease.heard.number());
    for above in [1, 1 << 20, 1 << 40] {
        let hostile = Hostile::follower().knowing(&one);
        let mut stream = hostile.hello(&to(&one), &claimed(&one, above), one.position()).await.unwrap();
        assert!(stream.end().await.is_some());
    }
    // One that behaves until it follows the log, and then acknowledges what there is not.
    let hostile = Hostile::follower().knowing(&one);
    let history = (*one.inner.node.applied.history()).clone();
    let mut stream = hostile.hello(&to(&one), &history, one.position()).await.unwrap();
    assert_eq!(stream.plan().await, Some(Plan::Log));
    let far = Some(Position::new(Txid::new(Epoch::new(99, 9), 9999), one.position().unwrap().checksum()));
    stream.say(&Message::Ack(Ack { applied: far, synced: far, clock: 1 })).await;
    comes("it is heard", || one.status().replicas.iter().any(|replica| replica.synced == far)).await;
    assert_eq!(one.inner.node.lease.heard.number(), heard);
    assert!(one.inner.node.fence.is_open() && one.status().epoch == before);
    // It is offered nothing, whatever it says to have.
    let refused = one.inner.replica_server.offer(&hostile.me, 1, one.position().unwrap()).await;
    assert!(refused.is_err(), "{refused:?}");
    for to in [Some(hostile.me.node), Some(three.node_id()), None] {
        assert!(matches!(one.handoff(to).await, Err(Error::HandoffFailed(_))), "{to:?}");
    }
    // The record names no follower, and no peer is asked that is one.
    let store: &dyn lease::Store = &store();
    let read = store.read().await.unwrap();
    let text = String::from_utf8_lossy(&read.as_ref().unwrap().record).into_owned();
    assert!(text.contains(&one.node_id().to_string()), "{text}");
    for follower in [three.node_id(), hostile.me.node] {
        assert!(!text.contains(&follower.to_string()), "{text}");
    }
    // Its word is no member's: what it says of itself is not heard at all.
    let told = standing::ask(&one.inner.node, three.node(), &one.inner.tracker).await;
    assert!(told.is_err(), "{told:?}");
    // It may ask how a member stands.
    let told = standing::ask(&three.inner.node, one.node(), &three.inner.tracker).await.unwrap();
    assert_eq!(told.peer.node, one.node_id());
    assert!(!three.status().replicas.iter().any(|_| true) && three.role() == Role::Replica);
    drop(stream);
    shut([three, one]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_follower_is_asked_for_no_page_and_its_answers_end_its_stream() {
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(primary(&dir.path().join("a.db"))).await.unwrap();
    let txid = write(&one).await;
    one.wait_for_timeout(txid, LIMIT).await.unwrap();
    let (position, history) = (one.position().unwrap(), (*one.inner.node.applied.history()).clone());
    let (size, key) = (PageSize::new(4096).unwrap(), one.inner.node.database_keys.get().page);
    let run = PageRun::hashed(PageNo::FIRST, &[0; 4096], size, &key);
    let unasked = [
        Message::SnapPiece { position, run },
        Message::Sent(Sent { position, pages: 1 }),
        Message::Accept(Accept { attempt: 1, answer: Ok("boot".into()) }),
    ];
    for message in &unasked {
        let hostile = Hostile::follower().knowing(&one);
        let mut stream = hostile.hello(&to(&one), &history, Some(position)).await.unwrap();
        assert_eq!(stream.plan().await, Some(Plan::Log));
        comes("it is there", || connected(&one).1 == [hostile.me.node]).await;
        assert!(one.inner.replica_server.channels().is_empty(), "there is none to ask");
        stream.say(message).await;
        stream.end().await;
        comes("it is sent away", || connected(&one).1.is_empty()).await;
    }
    let member = Hostile::member().knowing(&one);
    let mut stream = member.hello(&to(&one), &history, Some(position)).await.unwrap();
    assert_eq!(stream.plan().await, Some(Plan::Log));
    assert_eq!(one.inner.replica_server.channels().len(), 1, "a member is asked");
    assert!(one.verify().await.unwrap().holds());
    drop(stream);
    shut([one]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_follower_gives_no_command_and_takes_no_members_place() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two, three] = three(dir.path()).await;
    let hostile = Hostile::follower().knowing(&one);
    let at = to(&one);
    for command in [OperatorCommand::Describe, OperatorCommand::PromoteUnchecked] {
        let given = command::give(&hostile.asker, (&at, None), ("me", command), LIMIT, &hostile.tracker);
        let Err(NoAnswer { sent: false, problem }) = given.await else { panic!("it is answered") };
        assert!(matches!(problem, PeerProblem::MembersOnly), "{problem}");
    }
    let (_, opened) = hostile.asker.knock(&to(&one), COMMAND_PATH, &hostile.tracker).await.unwrap();
    assert_eq!(opened.status, Refusal::Follower.status());
    // One that says to be that very run of the member.
    let history = (*one.inner.node.applied.history()).clone();
    let mut hostile = Hostile::follower().knowing(&one);
    (hostile.me, hostile.asker.node) = (two.node().clone(), two.node_id());
    hostile.asker.incarnation = two.node().incarnation;
    let refused = hostile.hello(&to(&one), &history, one.position()).await.map(drop).unwrap_err();
    let key = two.status().key;
    assert!(
        matches!(refused, PeerProblem::DuplicateNode(there) if there == key && key.is_some()),
        "{refused}"
    );
    let (members, _) = connected(&one);
    assert_eq!(members, [two.node_id()]);
    // Another member's key under this id is told, too.
    let mut member = Hostile::member().knowing(&one);
    (member.me, member.asker.node) = (two.node().clone(), two.node_id());
    member.asker.incarnation = two.node().incarnation;
    let refused = member.hello(&to(&one), &history, one.position()).await.map(drop).unwrap_err();
    assert!(matches!(refused, PeerProblem::DuplicateNode(there) if there == key), "{refused}");
    shut([three, two, one]).await;
}

/// Copies a database and all beside it, as they are on the disk.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &target);
        } else if !target.to_string_lossy().ends_with("-shm") {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

/// A primary that may have lost what came last takes it from members only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_follower_gives_nothing_back() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, lost) = (dir.path().join("whole"), dir.path().join("lost"));
    std::fs::create_dir(&whole).unwrap();
    let unsynced = |path: &Path| primary(path).durability(Durability::Unsynced).wal_limit(1 << 30);
    let one = Db::open(unsynced(&whole.join("app.db"))).await.unwrap();
    let txid = write(&one).await;
    one.wait_for_timeout(txid, LIMIT).await.unwrap();
    let (position, history) = (one.position().unwrap(), (*one.inner.node.applied.history()).clone());
    copy(&whole, &lost);
    let keys = PeerKeys::of(one.inner.node.database_keys.get(), true);
    shut([one]).await;
    std::fs::write(lost.join("app.db-replite/unsynced"), "another boot").unwrap();
    let more = Position::new(Txid::new(position.epoch(), position.number() + 5), position.checksum());
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (hostile, asked) in
        [(Hostile { keys, ..Hostile::member() }, true), (Hostile { keys, ..Hostile::follower() }, false)]
    {
        let (files, address): (_, SocketAddr) = (dir.path().join(format!("{asked}")), free());
        copy(&lost, &files);
        let config = unsynced(&files.join("app.db")).listen(address).recovery_timeout(Duration::from_secs(2));
        let opening = tokio::spawn(Db::open(config));
        let to = Endpoint::parse(&format!("replite://{address}")).unwrap();
        let mut stream = loop {
            match hostile.hello(&to, &history, Some(more)).await {
                Ok(stream) => break stream,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        let plan = stream.plan().await;
        assert_eq!(plan == Some(Plan::Recover), asked, "{plan:?}");
        drop(stream);
        let db = opening.await.unwrap().unwrap();
        assert_eq!(db.status().recovered, 0);
        shut([db]).await;
    }
}
