//! A stream's own rules, with the clock in our hands and no socket.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use http_body_util::channel::{Channel, Sender};

use crate::channel::Binding;
use crate::checksum::PageKey;
use crate::context::{EpochsHeard, LeaseContext, SyncedClock, ToDisk};
use crate::ends::comes;
use crate::engine::Piece;
use crate::handshake;
use crate::log::{Log, LogOptions, Lookup};
use crate::page::{PageNo, PageSize};
use crate::peer::Incarnation;
use crate::primary::acks::SILENCE_MAX;
use crate::primary::fake::KEYS;
use crate::primary::fake::{Fake, SECRET, at, history, node};
use crate::primary::*;
use crate::secret::Purpose;
use crate::status::{Event, Role};
use crate::txid::{Epoch, EpochHistory};
use crate::wire::{Ack, Decoder, Kind, Plan, Unit, Unpacker, Welcome};

/// A supply over a real log.
struct OverLog(Arc<Log>);

impl StreamSource for OverLog {
    fn page_size(&self) -> PageSize {
        PageSize::new(512).unwrap()
    }
    fn page_key(&self) -> PageKey {
        KEYS.page
    }
    fn read_piece(&self, _first: PageNo, _max_bytes: usize) -> Result<Piece> {
        Ok(Piece { position: self.0.tip().unwrap(), pages: 0, data: Bytes::new() })
    }
    fn raise_epoch(&self, _above: u64) -> Result<()> {
        Err(Error::ShutDown)
    }
    fn settle(&self) -> Result<()> {
        Ok(())
    }
    fn tip(&self) -> Option<Position> {
        self.0.tip()
    }
    fn end(&self) -> u64 {
        self.0.end()
    }
    fn find(&self, number: u64) -> Result<Lookup> {
        self.0.find(number)
    }
    fn read_memory(&self, lsn: u64, max: usize) -> Option<Bytes> {
        self.0.read_memory(lsn, max)
    }
    fn read_disk(&self, lsn: u64, max: usize) -> Result<Bytes> {
        self.0.read_disk(lsn, max)
    }
    fn step_over(&self, lsn: u64) -> u64 {
        self.0.step_over(lsn)
    }
    fn watch(&self) -> watch::Receiver<u64> {
        self.0.watch()
    }
    fn pin(&self, lsn: u64) -> Box<dyn LogPin> {
        Box::new(self.0.pin(lsn))
    }
}

/// A primary that serves one follower, and the follower's two ends.
struct Stream {
    node: Arc<NodeContext>,
    replica_server: Arc<ReplicaServer>,
    up: Sender<Bytes, io::Error>,
    down: StreamReceiver,
    decoder: Decoder,
    /// What comes after the welcome goes through it.
    unpacker: Option<Unpacker>,
    task: tokio::task::JoinHandle<()>,
}

/// What a member's proof is known by.
fn member() -> Proved {
    let keys = super::fake::keys(&SECRET);
    keys.proved(Purpose::Knock, &[], &keys.prove(Purpose::Knock, &[])).unwrap()
}

fn encoded(message: &Message<'_>) -> Bytes {
    let mut bytes = BytesMut::new();
    wire::encode(message, &mut bytes);
    bytes.freeze()
}

impl Stream {
    fn start(pages: u32) -> (Arc<NodeContext>, Arc<Fake>, Arc<ReplicaServer>) {
        let node = node(1, &SECRET, Role::Primary);
        let fake = Fake::new(node.clone(), pages);
        let replica_server = ReplicaServer::new(node.clone());
        replica_server.set(Some(fake.clone()));
        (node, fake, replica_server)
    }

    /// Joins; the follower has id 2.
    async fn join(
        primary: (Arc<NodeContext>, Arc<impl StreamSource>, Arc<ReplicaServer>),
        position: Option<Position>,
        history: EpochHistory,
        resume: Option<(Position, PageNo)>,
    ) -> Stream {
        primary.2.set(Some(primary.1.clone()));
        Stream::join_as(2, primary, position, history, resume).await
    }

    /// Joins a primary, which serves already, or from now on.
    async fn join_as(
        id: u128,
        (node, source, replica_server): (Arc<NodeContext>, Arc<impl StreamSource>, Arc<ReplicaServer>),
        position: Option<Position>,
        history: EpochHistory,
        resume: Option<(Position, PageNo)>,
    ) -> Stream {
        if !replica_server.serves() {
            replica_server.set(Some(source));
        }
        let follower = super::fake::node(id, &SECRET, Role::Replica);
        let knock = Knock {
            version: 3,
            cluster: "test".into(),
            database: "app".into(),
            node: follower.me.node,
            incarnation: follower.me.incarnation,
            nonce: [3; 32],
            binding: Binding::NONE,
        };
        let (proof, peer) = ([0; 32], follower.me.clone());
        let (suspect, marks) = (false, Vec::new());
        let mut hello = Hello {
            proof,
            keys: crate::wire::PeerKeys::of(KEYS, true),
            peer,
            position,
            history,
            resume,
            suspect,
            marks,
        };
        handshake::seal_hello(&mut hello, &knock, &[4; 32], &follower.keys);
        let (mut up, body) = Channel::new(4);
        let (sender, down) = queue();
        let place = replica_server.place(Rights::Member).unwrap();
        let peer = Peer { knock, nonce: [4; 32], proved: member(), place };
        let task = tokio::spawn(serve(replica_server.clone(), peer, Incoming::new(body), sender));
        up.send_data(encoded(&Message::Hello(hello))).await.unwrap();
        let (decoder, unpacker) = (Decoder::new(Some(KEYS.page)), None);
        Stream { node, replica_server, up, down, decoder, unpacker, task }
    }

    async fn next(&mut self) -> Option<Unit> {
        loop {
            if let Some(unit) = self.decoder.next().unwrap() {
                if let Ok(Message::Welcome(Welcome { packed: true, .. })) = unit.decode() {
                    let mut unpacker = Unpacker::new().unwrap();
                    self.decoder.take_rest().for_each(|bytes| unpacker.push(bytes));
                    self.unpacker = Some(unpacker);
                }
                return Some(unit);
            }
            if let Some(bytes) = self.unpacker.as_mut().and_then(|unpacker| unpacker.next().unwrap()) {
                self.decoder.push(bytes);
                continue;
            }
            let bytes = std::future::poll_fn(|cx| self.down.poll_next(cx)).await?.ok()?;
            match &mut self.unpacker {
                Some(unpacker) => unpacker.push(bytes),
                None => self.decoder.push(bytes),
            }
        }
    }

    async fn plan(&mut self) -> Plan {
        let unit = self.next().await.unwrap();
        let Message::Welcome(welcome) = unit.decode().unwrap() else { panic!("{unit:?}") };
        let unit = self.next().await.unwrap();
        let Message::Epochs(history) = unit.decode().unwrap() else { panic!("{unit:?}") };
        assert_eq!(welcome.epoch, history.epoch());
        welcome.plan
    }

    /// The next unit that is no heartbeat.
    async fn kind(&mut self) -> Kind {
        loop {
            let kind = self.next().await.unwrap().kind;
            if kind != Kind::Heartbeat {
                return kind;
            }
        }
    }

    /// What the next heartbeat says.
    async fn beat(&mut self) -> (Position, Option<u64>) {
        loop {
            let unit = self.next().await.unwrap();
            if let Message::Heartbeat(beat) = unit.decode().unwrap() {
                return (beat.position, beat.lease_clock);
            }
        }
    }

    /// Everything up to the goodbye, which is the last.
    async fn goodbye(&mut self) -> String {
        while let Some(unit) = self.next().await {
            if let Message::Goodbye(goodbye) = unit.decode().unwrap() {
                assert!(self.next().await.is_none());
                return goodbye.reason;
            }
        }
        panic!("no goodbye");
    }
}

#[tokio::test(start_paused = true)]
async fn the_log_follows_from_memory_and_disk_with_heartbeats_between() {
    let primary = Stream::start(10);
    let fake = primary.1.clone();
    // More than one read holds, so that reads end within units.
    let records = 3000;
    for _ in 0..records {
        fake.commit(2);
    }
    fake.on_disk.store(fake.end(), Ordering::SeqCst);
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    for _ in 0..records {
        for kind in [Kind::TxnBegin, Kind::Page, Kind::Page, Kind::TxnEnd] {
            assert_eq!(stream.kind().await, kind);
        }
    }
    assert!(fake.disk_reads.load(Ordering::SeqCst) >= 2);
    let before = fake.disk_reads.load(Ordering::SeqCst);
    let unit = stream.next().await.unwrap();
    let Message::Heartbeat(beat) = unit.decode().unwrap() else { panic!("{unit:?}") };
    assert_eq!(beat.position, at(1, records));
    fake.commit(1);
    assert_eq!(stream.kind().await, Kind::TxnBegin);
    assert_eq!(fake.disk_reads.load(Ordering::SeqCst), before, "new records come from memory");
    assert_eq!(stream.kind().await, Kind::Page);
    assert_eq!(stream.kind().await, Kind::TxnEnd);
    fake.raise_epoch(1).unwrap();
    fake.commit(0);
    assert_eq!(stream.kind().await, Kind::Epochs, "before the first record of the epoch");
    assert_eq!(stream.kind().await, Kind::TxnBegin);
}

/// A record goes out from the log before the position says so. A replica that has it then must not
/// be taken for one with a history of its own.
#[tokio::test]
async fn a_replica_that_has_more_than_the_position_says_goes_on_with_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let keep_age = Duration::from_secs(3600);
    let options = LogOptions {
        page_key: KEYS.page,
        segment_bytes: 1 << 20,
        keep_bytes: 1 << 20,
        keep_age,
        quota_bytes: 1 << 20,
        tail_bytes: 0,
    };
    let log = Log::open(dir.path(), options).unwrap();
    log.reset(at(1, 0)).unwrap();
    let mut record = BytesMut::new();
    let page_size = PageSize::new(512).unwrap();
    let begin = wire::TxnBegin { before: at(1, 0), epoch: Epoch::new(1, 1), page_size };
    wire::encode(&Message::TxnBegin(begin), &mut record);
    let end = wire::TxnEnd { after: at(1, 1), pages: 1, changed: 0, unix_micros: 0 };
    wire::encode(&Message::TxnEnd(end), &mut record);
    log.append(record.freeze(), Some(at(1, 1))).unwrap();
    let (node, _, replica_server) = Stream::start(1);
    assert_eq!(node.applied.position(), Some(at(1, 0)));
    let primary = (node, Arc::new(OverLog(log)), replica_server);
    let mut stream = Stream::join(primary, Some(at(1, 1)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
}

fn real_log() -> LogOptions {
    LogOptions {
        page_key: KEYS.page,
        segment_bytes: 20_000,
        keep_bytes: 1 << 30,
        keep_age: Duration::from_secs(3600),
        quota_bytes: 1 << 30,
        tail_bytes: 10_000,
    }
}

#[tokio::test]
async fn a_real_log_is_followed_from_disk_over_segments_and_over_what_was_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), real_log()).unwrap();
    log.reset(at(1, 0)).unwrap();
    let record = |number: u64| {
        let epoch = Epoch::new(1, 1);
        let page_size = PageSize::new(512).unwrap();
        let begin = wire::TxnBegin { before: at(1, number - 1), epoch, page_size };
        let end = wire::TxnEnd { after: at(1, number), pages: 1, changed: 0, unix_micros: 0 };
        [encoded(&Message::TxnBegin(begin)), encoded(&Message::TxnEnd(end))]
    };
    for number in 1..=1000 {
        log.append(record(number).concat().into(), Some(at(1, number))).unwrap();
    }
    let node = super::fake::node(1, &SECRET, Role::Primary);
    node.applied.replace(history(&[(1, 1)]), Some(at(1, 1000)));
    let replica_server = ReplicaServer::new(node.clone());
    let primary = (node, Arc::new(OverLog(log.clone())), replica_server);
    let mut stream = Stream::join(primary, Some(at(1, 3)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    let mut number = 3;
    while number < 1001 {
        let unit = stream.next().await.unwrap();
        match unit.decode().unwrap() {
            Message::TxnBegin(begin) => assert_eq!(begin.before, at(1, number)),
            Message::TxnEnd(end) => number = end.after.number(),
            Message::Heartbeat(_) => {}
            other => panic!("{other:?}"),
        }
        if number == 1000 {
            // The stream stands at the end, or comes to it, and the next record is begun twice.
            // Whichever part of the first try it sent, it must not send the second one after it.
            number = 1001;
            log.append(record(1001)[0].clone(), None).unwrap();
            log.abort().unwrap();
            log.append(record(1001).concat().into(), Some(at(1, 1001))).unwrap();
        }
    }
    let mut begun = 0;
    loop {
        let Some(unit) = stream.next().await else { panic!("ended without a word") };
        match unit.decode().unwrap() {
            Message::TxnBegin(begin) => {
                assert_eq!(begin.before, at(1, 1000));
                begun += 1;
            }
            Message::TxnEnd(end) => {
                assert_eq!((end.after, begun), (at(1, 1001), 1));
                break;
            }
            Message::Goodbye(goodbye) => {
                assert_eq!((&*goodbye.reason, begun), (stream::FELL_BEHIND, 1));
                break;
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn small_transactions_go_on_from_each_other_and_become_those_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), real_log()).unwrap();
    log.reset(at(1, 0)).unwrap();
    let (page_size, number) = (PageSize::new(512).unwrap(), PageNo::FIRST);
    let (mut before, mut units) = (at(1, 0), Vec::new());
    for n in 1..=5_u8 {
        let page = [n; 512];
        let (hash, mut changes) = (KEYS.page.hash(number, &page), BytesMut::new());
        let image = wire::Image::Whole(&page);
        wire::encode_change(&wire::PageChange { number, hash, replaced: None, image }, &mut changes);
        let txid = crate::txid::Txid::new(before.epoch(), before.number() + 1);
        let after = Position::new(txid, before.checksum().with(hash));
        let begin = wire::TxnBegin { before, epoch: before.epoch(), page_size };
        let end = wire::TxnEnd { after, pages: 1, changed: 1, unix_micros: 7 };
        let changes = wire::Changes::of(&changes);
        units.push(encoded(&Message::Txn(wire::CompactTxn { begin, end, changes })));
        log.append(units[usize::from(n) - 1].clone(), Some(after)).unwrap();
        before = after;
    }
    let node = super::fake::node(1, &SECRET, Role::Primary);
    node.applied.replace(history(&[(1, 1)]), Some(before));
    let replica_server = ReplicaServer::new(node.clone());
    let primary = (node, Arc::new(OverLog(log)), replica_server);
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    let (mut completer, mut kinds, mut came) = (wire::Completer::default(), Vec::new(), Vec::new());
    while came.len() < units.len() {
        let unit = stream.next().await.unwrap();
        if matches!(unit.kind, Kind::Txn | Kind::Next) {
            kinds.push(unit.kind);
            came.push(completer.complete(unit).raw);
        }
    }
    assert_eq!(kinds, [Kind::Txn, Kind::Next, Kind::Next, Kind::Next, Kind::Next]);
    assert_eq!(came, units);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_followed_by_the_records_after_its_first_piece() {
    let primary = Stream::start(6000);
    let fake = primary.1.clone();
    fake.commit(1);
    let mut stream = Stream::join(primary, None, EpochHistory::default(), None).await;
    assert_eq!(stream.plan().await, Plan::Snapshot);
    let unit = stream.next().await.unwrap();
    let Message::SnapBegin(begin) = unit.decode().unwrap() else { panic!("{unit:?}") };
    assert_eq!((begin.first, begin.from), (at(1, 1), PageNo::FIRST));
    fake.commit(3);
    let mut pages = 0;
    let exact_at = loop {
        let unit = stream.next().await.unwrap();
        match unit.decode().unwrap() {
            Message::SnapPiece { run, .. } => {
                assert_eq!(run.first().get(), pages + 1);
                pages += run.count();
            }
            Message::SnapEnd(end) => break end.exact_at,
            Message::Heartbeat(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(pages, 6000);
    assert!(exact_at.number() >= 1);
    let unit = stream.next().await.unwrap();
    let Message::TxnBegin(begin) = unit.decode().unwrap() else { panic!("{unit:?}") };
    assert_eq!(begin.before, at(1, 1), "the log goes on from the first piece");
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_resumed_and_an_empty_database_has_an_empty_one() {
    let primary = Stream::start(2000);
    primary.1.commit(1);
    primary.1.commit(1);
    let from = PageNo::new(1990).unwrap();
    let mut stream = Stream::join(primary, None, history(&[(1, 1)]), Some((at(1, 1), from))).await;
    assert_eq!(stream.plan().await, Plan::Resume);
    let unit = stream.next().await.unwrap();
    let Message::SnapBegin(begin) = unit.decode().unwrap() else { panic!("{unit:?}") };
    assert_eq!((begin.first, begin.from), (at(1, 1), from));
    for kind in [Kind::SnapPiece, Kind::SnapEnd, Kind::TxnBegin] {
        assert_eq!(stream.kind().await, kind);
    }
    let mut stream = Stream::join(Stream::start(0), None, EpochHistory::default(), None).await;
    assert_eq!(stream.plan().await, Plan::Snapshot);
    assert_eq!(stream.kind().await, Kind::SnapBegin);
    assert_eq!(stream.kind().await, Kind::SnapEnd);
}

#[tokio::test(start_paused = true)]
async fn a_replica_from_a_newer_epoch_raises_ours_before_its_plan() {
    let primary = Stream::start(1);
    primary.1.commit(1);
    let mut stream = Stream::join(primary, Some(at(1, 1)), history(&[(1, 1), (7, 2)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    assert_eq!(stream.node.applied.history().epoch().number(), 8);
}

/// What came to the disk: a number, and whether the fence was open then.
type Written = mpsc::UnboundedReceiver<(u64, bool)>;

/// A primary by a lease, in epoch 1, whose numbers go to a disk of the test's.
fn by_lease() -> (Arc<NodeContext>, Arc<Fake>, Arc<ReplicaServer>, Written) {
    let (writes, written) = mpsc::unbounded_channel();
    let fence = Arc::new(std::sync::OnceLock::<std::sync::Weak<NodeContext>>::new());
    let of = fence.clone();
    let keep = ToDisk::new(move |number| {
        let node = of.get().and_then(std::sync::Weak::upgrade);
        let _ = writes.send((number, node.is_some_and(|node| node.fence.is_open())));
        Ok(())
    });
    let synced = SyncedClock::new(None, Duration::from_secs(10), ToDisk::nowhere());
    let lease = LeaseContext::leased(synced, EpochsHeard::new(0, keep));
    let node = super::fake::with_lease(1, &SECRET, Role::Primary, lease);
    fence.set(Arc::downgrade(&node)).unwrap();
    let fake = Fake::new(node.clone(), 1);
    node.fence.set(crate::fence::boot_time() + Duration::from_secs(60));
    (node.clone(), fake, ReplicaServer::new(node), written)
}

/// A primary outbid the one that was elected after it, and both went on.
#[tokio::test(start_paused = true)]
async fn a_primary_by_a_lease_outbids_no_one_and_acknowledges_nothing_more() {
    // A later epoch, and ours claimed by another.
    for (theirs, heard) in [(Epoch::new(7, 7), 7), (Epoch::new(1, 9), 2)] {
        let (node, fake, replica_server, mut written) = by_lease();
        fake.commit(1);
        let told = node.lease.heard.watch();
        let honest = (node.clone(), fake.clone(), replica_server.clone());
        let mut honest = Stream::join_as(3, honest, Some(at(1, 0)), history(&[(1, 1)]), None).await;
        assert_eq!(honest.plan().await, Plan::Log);
        assert!(node.fence.is_open());
        let mut knows = history(&[(1, 1)]);
        if theirs.number() == 1 {
            knows = EpochHistory::default();
        }
        knows.push(crate::txid::EpochStart { epoch: theirs, first: 2, before: at(1, 1).checksum() });
        let mut stream =
            Stream::join((node.clone(), fake.clone(), replica_server.clone()), Some(at(1, 1)), knows, None)
                .await;
        let said = stream.goodbye().await;
        assert!(said.contains(&format!("number {}", theirs.number())), "{said}");
        assert!(said.contains("acknowledges nothing"), "{said}");
        assert_eq!(node.applied.history().epoch(), Epoch::new(1, 1), "it opens no epoch of its own");
        assert!(!node.fence.is_open());
        assert_eq!(written.recv().await, Some((heard, false)), "closed before the disk was waited for");
        assert!(told.has_changed().unwrap(), "the driver is told");
        assert!(node.is_superseded());

        // A renewal that was under way opens it no more, and the next epoch does.
        let until = crate::fence::boot_time() + Duration::from_secs(60);
        node.acknowledge_until(Epoch::new(1, 1), until);
        assert!(!node.fence.is_open());
        // What the other replica says of this epoch counts for nothing.
        let ack = Ack { applied: Some(at(1, 1)), synced: Some(at(1, 1)), clock: 0 };
        honest.up.send_data(encoded(&Message::Ack(ack))).await.unwrap();
        fake.commit(1);
        while honest.kind().await != Kind::TxnEnd {}
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(replica_server.replicas()[0].applied, None);

        fake.raise_epoch(heard).unwrap();
        node.acknowledge_until(Epoch::new(heard + 1, heard + 1), until);
        assert!(node.fence.is_open() && !node.is_superseded());
        honest.up.send_data(encoded(&Message::Ack(ack))).await.unwrap();
        comes("an acknowledgement", || replica_server.replicas()[0].applied.is_some()).await;
    }
}

/// One hello that lies must not bring the numbers to their end, nor close the fence.
#[tokio::test(start_paused = true)]
async fn a_primary_by_a_lease_does_not_hear_of_epochs_from_nowhere() {
    for number in [2 + (1 << 32), 1 << 62, crate::txid::NUMBER_MAX] {
        let (node, fake, replica_server, mut written) = by_lease();
        let primary = (node.clone(), fake, replica_server);
        let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1), (number, 1)]), None).await;
        assert!(stream.goodbye().await.contains("too far above"));
        assert!(!node.hear_aside(number), "nor from a request");
        assert!(node.fence.is_open() && written.try_recv().is_err() && node.lease.heard.number() == 0);
    }
}

#[tokio::test(start_paused = true)]
async fn an_epoch_that_finds_no_disk_closes_the_fence_and_is_said() {
    let full = || Error::io("write", "heard")(io::Error::other("disk full"));
    let synced = SyncedClock::new(None, Duration::from_secs(10), ToDisk::nowhere());
    let lease = LeaseContext::leased(synced, EpochsHeard::new(0, ToDisk::new(move |_| Err(full()))));
    let node = super::fake::with_lease(1, &SECRET, Role::Primary, lease);
    let primary = (node.clone(), Fake::new(node.clone(), 1), ReplicaServer::new(node.clone()));
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1), (7, 1)]), None).await;
    assert!(stream.goodbye().await.contains("disk full"));
    assert!(!node.fence.is_open());
    assert_eq!(node.lease.heard.number(), 0, "it is not heard");
}

/// A heartbeat has the clock of the epoch that the replica was told, and of no other.
#[tokio::test(start_paused = true)]
async fn a_heartbeat_has_the_lease_clock_of_the_epoch_that_was_told() {
    let (node, fake, replica_server, _written) = by_lease();
    let taken = crate::fence::boot_time().saturating_sub(Duration::from_secs(5));
    let primary = (node.clone(), fake.clone(), replica_server);
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    assert_eq!(stream.beat().await, (at(1, 0), None), "it took no epoch by a lease");
    node.lease.clock.take(Epoch::new(1, 1), taken);
    fake.commit(0);
    let (position, clock) = stream.beat().await;
    assert_eq!(position, at(1, 1));
    assert!((5_000_000..100_000_000).contains(&clock.unwrap()), "{clock:?}");
    node.lease.clock.take(Epoch::new(2, 2), taken);
    assert_eq!(stream.beat().await, (at(1, 1), None), "the replica does not know of that epoch");
    fake.raise_epoch(1).unwrap();
    fake.commit(0);
    assert!(stream.beat().await.1.is_some());
    node.lease.clock.clear();
    assert_eq!(stream.beat().await.1, None);
}

#[tokio::test(start_paused = true)]
async fn a_replica_from_nowhere_is_refused_and_told_what_to_do() {
    for number in [2 + (1 << 32), 1 << 62, crate::txid::NUMBER_MAX] {
        let primary = Stream::start(1);
        let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1), (number, 1)]), None).await;
        let said = stream.goodbye().await;
        assert!(said.contains(&Epoch::new(number, number).to_string()), "{said}");
        assert!(said.contains("too far above") && said.contains("filled anew"), "{said}");
        assert!(said.len() <= 1024, "it is not cut");
        assert_eq!(stream.node.applied.history().epoch().number(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_replica_costs_no_memory_and_is_told_when_its_records_are_gone() {
    let primary = Stream::start(1);
    let fake = primary.1.clone();
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    for _ in 0..300 {
        fake.commit(60);
    }
    // No replica reads: the stream's task stops at its bound, well before the log's end.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    let at_most = 4 * 1024 * 1024;
    assert!(fake.end() > at_most * 2);
    fake.on_disk.store(fake.end(), Ordering::SeqCst);
    fake.dropped.store(fake.end(), Ordering::SeqCst);
    let reason = stream.goodbye().await;
    assert_eq!(reason, "fell behind the log");
    stream.task.await.unwrap();
    assert!(stream.replica_server.replicas().is_empty());
}

#[tokio::test(start_paused = true)]
async fn acknowledgements_are_shown_and_their_absence_ends_the_stream() {
    let mut stream = Stream::join(Stream::start(1), Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    let mut events = stream.node.events();
    for _ in 0..3 {
        tokio::time::sleep(SILENCE_MAX - Duration::from_secs(1)).await;
        let ack = Ack { applied: Some(at(1, 9)), synced: Some(at(1, 8)), clock: 0 };
        stream.up.send_data(encoded(&Message::Ack(ack))).await.unwrap();
    }
    comes("an acknowledgement", || stream.replica_server.replicas()[0].applied.is_some()).await;
    assert_eq!(stream.replica_server.replicas()[0].synced, Some(at(1, 8)));
    assert_eq!(stream.goodbye().await, format!("nothing was heard from this replica for {SILENCE_MAX:?}"));
    let event = events.recv().await.unwrap();
    assert!(matches!(event, Event::ReplicaLeft { replica, .. } if replica.node.as_u128() == 2));
}

/// On a slow link one unit takes its time.
#[tokio::test(start_paused = true)]
async fn any_part_of_a_unit_is_a_sign_of_life() {
    let mut stream = Stream::join(Stream::start(1), Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    let ack = encoded(&Message::Ack(Ack { applied: Some(at(1, 9)), synced: None, clock: 7 }));
    for part in ack.chunks(ack.len() / 4) {
        tokio::time::sleep(SILENCE_MAX - Duration::from_secs(1)).await;
        stream.up.send_data(Bytes::copy_from_slice(part)).await.unwrap();
    }
    comes("an acknowledgement", || stream.replica_server.replicas()[0].applied.is_some()).await;
    let other = Incarnation::from_u128(77);
    let second = Knock { incarnation: other, ..knock_of(2) };
    assert!(stream.replica_server.conflict(&second, Rights::Member).is_some(), "it is alive");
}

fn knock_of(id: u128) -> Knock {
    let follower = super::fake::node(id, &SECRET, Role::Replica);
    Knock {
        version: 3,
        cluster: "test".into(),
        database: "app".into(),
        node: follower.me.node,
        incarnation: follower.me.incarnation,
        nonce: [3; 32],
        binding: Binding::NONE,
    }
}

#[tokio::test(start_paused = true)]
async fn garbage_from_a_replica_ends_its_stream_with_a_reason() {
    let ack = encoded(&Message::Ack(Ack { applied: Some(at(1, 1)), synced: None, clock: 0 }));
    let mut flipped = ack.to_vec();
    flipped[30] ^= 1;
    let mut huge = ack.to_vec();
    huge[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let beat = wire::Heartbeat { position: at(1, 1), clock: 0, lease_clock: None };
    let wrong = encoded(&Message::Heartbeat(beat)).to_vec();
    for (bytes, word) in [(flipped, "hash"), (huge, "limit"), (wrong, "Heartbeat")] {
        let mut stream = Stream::join(Stream::start(1), Some(at(1, 0)), history(&[(1, 1)]), None).await;
        assert_eq!(stream.plan().await, Plan::Log);
        stream.up.send_data(bytes.into()).await.unwrap();
        let reason = stream.goodbye().await;
        assert!(reason.contains("bad bytes") && reason.contains(word), "{reason}");
    }
    let mut stream = Stream::join(Stream::start(1), Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    stream.up.send_data(ack.slice(..ack.len() - 1)).await.unwrap();
    drop(stream.up);
    stream.task.await.unwrap();
    assert!(stream.replica_server.replicas().is_empty(), "half a unit and an end");
}

#[tokio::test(start_paused = true)]
async fn a_peer_without_a_good_hello_gets_not_one_byte() {
    let other = super::fake::node(2, &[9; 32], Role::Replica);
    for garbage in [None, Some(Bytes::from_static(&[0xff; 64])), Some(Bytes::new())] {
        let (_, _, replica_server) = Stream::start(1);
        let knock = Knock {
            version: 3,
            cluster: "test".into(),
            database: "app".into(),
            node: other.me.node,
            incarnation: other.me.incarnation,
            nonce: [3; 32],
            binding: Binding::NONE,
        };
        let (peer, history) = (other.me.clone(), EpochHistory::default());
        let (suspect, marks) = (false, Vec::new());
        let mut hello = Hello {
            proof: [0; 32],
            keys: crate::wire::PeerKeys::of(KEYS, true),
            peer,
            position: None,
            history,
            resume: None,
            suspect,
            marks,
        };
        // The nonce of an exchange that was recorded, and another secret.
        handshake::seal_hello(&mut hello, &knock, &[5; 32], &replica_server.node.keys);
        let sealed = encoded(&Message::Hello(hello));
        let (mut up, body) = Channel::<_, io::Error>::new(4);
        let (sender, mut down) = queue();
        let place = replica_server.place(Rights::Member).unwrap();
        let peer = Peer { knock, nonce: [4; 32], proved: member(), place };
        let task = tokio::spawn(serve(replica_server.clone(), peer, Incoming::new(body), sender));
        up.send_data(garbage.unwrap_or(sealed)).await.unwrap();
        // With nothing sent, the wait for a hello ends by itself; `up` stays open.
        task.await.unwrap();
        let said = std::future::poll_fn(|cx| down.poll_next(cx)).await;
        assert!(matches!(said, Some(Err(_))), "{said:?}");
        assert_eq!(replica_server.handshakes.available_permits(), HANDSHAKES_MAX);
    }
}

#[tokio::test(start_paused = true)]
async fn the_node_s_stop_ends_streams_with_a_word() {
    let mut stream = Stream::join(Stream::start(1), Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    stream.node.stop.cancel();
    assert_eq!(stream.goodbye().await, "shutting down");
    stream.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_node_that_drains_sends_what_is_committed_and_ends_its_streams() {
    let primary = Stream::start(1);
    let (node, fake, replica_server) = (primary.0.clone(), primary.1.clone(), primary.2.clone());
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    fake.late.store(2, Ordering::SeqCst);
    node.drain.cancel();
    assert_eq!(stream.kind().await, Kind::Drain);
    let begun = tokio::time::Instant::now();
    // What a request of this replica commits, before all of them are answered.
    fake.commit(1);
    for answered in [false, true, true] {
        if answered {
            let _ = stream.up.try_send(http_body::Frame::data(encoded(&Message::Drain)));
        }
        for kind in [Kind::TxnBegin, Kind::Page, Kind::TxnEnd] {
            assert_eq!(stream.kind().await, kind);
        }
    }
    assert_eq!(stream.goodbye().await, "shutting down");
    replica_server.deserted().await;
    assert!(begun.elapsed() < LAST_REQUESTS_TIMEOUT, "nothing more was waited for");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_drains_does_not_wait_long_for_the_requests_of_a_replica() {
    let primary = Stream::start(1);
    let (node, fake) = (primary.0.clone(), primary.1.clone());
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    fake.late.store(1, Ordering::SeqCst);
    node.drain.cancel();
    let begun = tokio::time::Instant::now();
    let mut kinds = Vec::new();
    while kinds.last() != Some(&Kind::Goodbye) {
        kinds.push(stream.kind().await);
    }
    assert_eq!(kinds, [Kind::Drain, Kind::TxnBegin, Kind::Page, Kind::TxnEnd, Kind::Goodbye]);
    assert_eq!(begun.elapsed().as_secs(), LAST_REQUESTS_TIMEOUT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_takes_nothing_does_not_hold_up_a_node_that_drains() {
    let primary = Stream::start(1);
    let (node, fake, replica_server) = (primary.0.clone(), primary.1.clone(), primary.2.clone());
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    for _ in 0..300 {
        fake.commit(60);
    }
    let begun = tokio::time::Instant::now();
    node.drain.cancel();
    replica_server.deserted().await;
    assert!(begun.elapsed() <= LAST_RECORDS_TIMEOUT + GOODBYE_TIMEOUT, "{:?}", begun.elapsed());
    stream.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn places_for_handshakes_are_bounded() {
    let (_, _, replica_server) = Stream::start(1);
    let places: Vec<_> = (0..HANDSHAKES_MAX).map(|_| replica_server.place(Rights::Member).unwrap()).collect();
    assert!(replica_server.place(Rights::Member).is_none());
    drop(places);
    let places: Vec<_> = std::iter::from_fn(|| replica_server.place(Rights::Follower)).collect();
    assert_eq!(places.len(), HANDSHAKES_MAX / 2, "followers leave room for members");
    assert!(replica_server.place(Rights::Member).is_some());
    drop(places);
    let places: Vec<_> = std::iter::from_fn(|| replica_server.stream_place(Rights::Follower)).collect();
    assert_eq!(places.len(), FOLLOWERS_MAX);
    assert!(replica_server.place(Rights::Follower).is_none());
    assert!(replica_server.stream_place(Rights::Member).is_some());
}

#[tokio::test(start_paused = true)]
async fn comparisons_take_turns_and_who_waits_hears_from_the_primary() {
    let primary = Stream::start(5);
    primary.1.commit(1);
    primary.1.dropped.store(1, Ordering::SeqCst);
    let turns = primary.2.comparisons.clone().acquire_many_owned(COMPARISONS_MAX as u32).await.unwrap();
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Compare);
    for _ in 0..3 {
        assert_eq!(stream.next().await.unwrap().kind, Kind::Heartbeat);
    }
    drop(turns);
    for kind in [Kind::HealBegin, Kind::Sums, Kind::Sent] {
        assert_eq!(stream.kind().await, kind);
    }
    assert_eq!(
        stream.replica_server.comparisons.available_permits(),
        COMPARISONS_MAX,
        "the turn is given back"
    );
}

type OfferTask = tokio::task::JoinHandle<Result<String, NotAccepted>>;

/// What came of an offer.
async fn ended(offer: OfferTask) -> Result<String, NotAccepted> {
    tokio::time::timeout(Duration::from_secs(60), offer).await.expect("an end").unwrap()
}

/// A stream that is at the end of the log, with an offer on its way to it.
async fn offered() -> (Stream, OfferTask) {
    let primary = Stream::start(10);
    let fake = primary.1.clone();
    let mut stream = Stream::join(primary, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(stream.plan().await, Plan::Log);
    fake.commit(1);
    stream.until_followed().await;
    let to = stream.replica_server.replicas().remove(0).peer;
    let server = stream.replica_server.clone();
    let offer = tokio::spawn(async move { server.offer(&to, 7, at(1, 1)).await });
    (stream, offer)
}

impl Stream {
    /// Until a lease can be offered on it.
    async fn until_followed(&mut self) {
        while self.kind().await != Kind::TxnEnd {}
    }

    async fn offer(&mut self) -> wire::LeaseOffer {
        loop {
            let unit = self.next().await.unwrap();
            if let Message::Offer(offer) = unit.decode().unwrap() {
                return offer;
            }
        }
    }

    async fn stage(&mut self) -> HandoffStage {
        loop {
            let unit = self.next().await.unwrap();
            if let Message::Handoff(stage) = unit.decode().unwrap() {
                return stage;
            }
        }
    }

    async fn answer(&mut self, attempt: u128, answer: Result<String, String>) {
        let accept = encoded(&Message::Accept(wire::Accept { attempt, answer }));
        self.up.send_data(accept).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_offer_goes_out_at_the_end_of_the_log_and_its_answer_comes_back() {
    let (mut stream, offer) = offered().await;
    assert_eq!(stream.offer().await, wire::LeaseOffer { attempt: 7, position: at(1, 1) });
    stream.answer(7, Ok("boot".into())).await;
    assert_eq!(ended(offer).await, Ok("boot".into()));

    let (mut stream, offer) = offered().await;
    stream.offer().await;
    stream.answer(7, Err("it drains".into())).await;
    assert_eq!(ended(offer).await, Err(NotAccepted::Declined("it drains".into())));
    // The word of the swap, and of the end, come before the goodbye.
    let to = stream.replica_server.replicas().remove(0).peer;
    stream.replica_server.handed(&to, 7, "v2", b"{}");
    stream.replica_server.handed(&to, 7, &"v".repeat(2000), b"{}");
    stream.replica_server.tell_handoff(HandoffStage::Done);
    let mut said = Vec::new();
    while said.len() < 2 {
        let unit = stream.next().await.unwrap();
        match unit.decode().unwrap() {
            Message::Handed(handed) => {
                assert_eq!(handed, Handed { attempt: 7, version: "v2", record: b"{}" });
                said.push(Kind::Handed);
            }
            Message::Handoff(HandoffStage::Done) => said.push(Kind::Handoff),
            Message::Heartbeat(_) => {}
            other => panic!("{other:?}"),
        }
    }
    stream.replica_server.set(None);
    assert_eq!(stream.goodbye().await, NOT_PRIMARY);
}

#[tokio::test(start_paused = true)]
async fn an_offer_ends_with_its_stream_and_an_answer_to_none_ends_the_stream() {
    let (mut stream, offer) = offered().await;
    stream.offer().await;
    // The same process dials again: which of the two answers is not known.
    let source = Fake::new(stream.node.clone(), 10);
    let again = (stream.node.clone(), source, stream.replica_server.clone());
    let _again = Stream::join_as(2, again, Some(at(1, 0)), history(&[(1, 1)]), None).await;
    assert_eq!(ended(offer).await, Err(NotAccepted::Gone));

    let (mut stream, offer) = offered().await;
    stream.offer().await;
    drop(stream.up);
    assert_eq!(ended(offer).await, Err(NotAccepted::Gone));

    let (mut stream, offer) = offered().await;
    stream.offer().await;
    let lied = tokio::time::Instant::now();
    stream.answer(8, Ok(String::new())).await;
    assert_eq!(ended(offer).await, Err(NotAccepted::Gone));
    stream.task.await.unwrap();
    assert!(stream.replica_server.replicas().is_empty(), "it lies, and is served no more");
    assert!(lied.elapsed() < SILENCE_MAX, "not for its silence");
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_offered_to_no_other_process_and_with_no_other_state() {
    let (mut stream, offer) = offered().await;
    stream.offer().await;
    let to = stream.replica_server.replicas().remove(0).peer;
    let other = PeerInfo { incarnation: Incarnation::from_u128(9), ..to.clone() };
    assert_eq!(stream.replica_server.offer(&other, 8, at(1, 1)).await, Err(NotAccepted::Gone));
    assert_eq!(stream.replica_server.offer(&to, 8, at(1, 2)).await, Err(NotAccepted::Gone));
    stream.answer(7, Ok(String::new())).await;
    assert_eq!(ended(offer).await, Ok(String::new()));
    // A caller that gives up leaves an answer to come, which is no lie. There is an end to that.
    for attempt in 10..14 {
        let given_up = stream.replica_server.offer(&to, attempt, at(1, 1));
        assert!(tokio::time::timeout(Duration::from_secs(1), given_up).await.is_err());
    }
    assert_eq!(stream.replica_server.offer(&to, 14, at(1, 1)).await, Err(NotAccepted::Busy));
    stream.answer(10, Ok(String::new())).await;
    let late = stream.replica_server.clone();
    let offer = tokio::spawn(async move { late.offer(&to, 15, at(1, 1)).await });
    while stream.offer().await.attempt != 15 {}
    stream.answer(15, Ok("late".into())).await;
    assert_eq!(ended(offer).await, Ok("late".into()));
}

#[tokio::test(start_paused = true)]
async fn replicas_hear_how_far_a_handoff_is_also_those_that_come_later() {
    let (node, fake, server) = Stream::start(10);
    let primary = || (node.clone(), fake.clone(), server.clone());
    let join = |id| Stream::join_as(id, primary(), Some(at(1, 0)), history(&[(1, 1)]), None);
    let mut stream = join(2).await;
    assert_eq!(stream.plan().await, Plan::Log);
    server.tell_handoff(HandoffStage::Begins);
    assert!(!server.has_handed(), "what the replicas lack they get here");
    assert_eq!(stream.stage().await, HandoffStage::Begins);
    let mut late = join(3).await;
    assert_eq!(late.stage().await, HandoffStage::Begins);
    server.tell_handoff(HandoffStage::GoesOn);
    assert_eq!((stream.stage().await, late.stage().await), (HandoffStage::GoesOn, HandoffStage::GoesOn));
    server.tell_handoff(HandoffStage::Begins);
    assert_eq!(stream.stage().await, HandoffStage::Begins);
    // It leads anew, with what it has then.
    server.set(Some(Fake::new(node.clone(), 10)));
    server.tell_handoff(HandoffStage::Done);
    assert!(server.has_handed());
    let mut next = join(4).await;
    assert_eq!(next.stage().await, HandoffStage::Done);
}
