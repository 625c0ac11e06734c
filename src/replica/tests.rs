//! A replica against peers of every kind, most of them wrong.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response};
use http_body_util::channel::{Channel, Sender};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::channel::Binding;
use crate::context::{EpochsHeard, HandoffWord, LeaseContext, SyncedClock, ToDisk};
use crate::ends::comes;
use crate::error::{Error, PeerProblem};
use crate::files::Paths;
use crate::handshake::{self, Answer, Knock, Refusal};
use crate::keys::DatabaseKeys;
use crate::net::{self, Listener, OpenResponse};
use crate::peer::Incarnation;
use crate::primary::fake::KEYS;
use crate::primary::fake::{Fake, SECRET, at, history, keys, leased, node, with_lease};
use crate::primary::{NotAccepted, ReplicaServer};
use crate::replica::reporter::what_ended;
use crate::replica::*;
use crate::report::{Condition, Part};
use crate::server::{Mount, ReplicationService};
use crate::status::{Event, Role};
use crate::txid::EpochHistory;
use crate::wire::{self, Goodbye, HandoffStage, Heartbeat, Kind, Message, Plan, TxnBegin, TxnEnd, Welcome};

/// Takes over positions and nothing else.
struct FakeFeed {
    node: Arc<NodeContext>,
    standing: Mutex<ReplicaStanding>,
    kinds: Mutex<Vec<Kind>>,
    /// Errors to give, one a call.
    fail: Mutex<VecDeque<Error>>,
    synced: watch::Sender<Option<Position>>,
    /// How often it was asked to sync at once.
    syncs: AtomicU64,
}

impl FakeFeed {
    fn new(node: &Arc<NodeContext>, epochs: EpochHistory, position: Option<Position>) -> Arc<FakeFeed> {
        node.applied.replace(epochs.clone(), position);
        let history = Arc::new(epochs);
        let standing = ReplicaStanding { position, history, resume: None, suspect: false, marks: Vec::new() };
        Arc::new(FakeFeed {
            node: node.clone(),
            standing: Mutex::new(standing),
            kinds: Mutex::default(),
            fail: Mutex::default(),
            synced: watch::Sender::new(position),
            syncs: AtomicU64::new(0),
        })
    }

    fn fed(&self) -> Vec<Kind> {
        self.kinds.lock().unwrap().clone()
    }
}

impl Feed for FakeFeed {
    async fn standing(&self) -> Result<(ReplicaStanding, mpsc::Receiver<Want>), StreamError> {
        Ok((self.standing.lock().unwrap().clone(), mpsc::channel(1).1))
    }

    async fn take_keys(&self, keys: DatabaseKeys) -> Result<(), StreamError> {
        self.node.database_keys.set(keys);
        Ok(())
    }

    async fn feed(&self, units: Vec<Unit>) -> Result<(), StreamError> {
        if units.iter().any(|unit| unit.kind == Kind::Welcome) {
            return Ok(());
        }
        if let Some(error) = self.fail.lock().unwrap().pop_front() {
            return Err(error.into());
        }
        for unit in units {
            self.kinds.lock().unwrap().push(unit.kind);
            let mut standing = self.standing.lock().unwrap();
            match unit.decode().map_err(|e| Error::garbled("primary", e.to_string()))? {
                Message::Epochs(epochs) => {
                    standing.history = Arc::new(epochs.clone());
                    self.node.applied.replace(epochs, standing.position);
                }
                Message::TxnEnd(wire::TxnEnd { after: at, .. })
                | Message::SnapEnd(wire::SnapEnd { exact_at: at, .. }) => {
                    standing.position = Some(at);
                    self.node.applied.advance(at);
                    self.synced.send_replace(Some(at));
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn answer(&self, _want: wire::Want) -> Result<Bytes> {
        Err(Error::NoState("pages are nothing to it".into()))
    }

    fn log(&self) -> Option<Arc<Log>> {
        None
    }

    fn taken(&self) -> u64 {
        self.kinds.lock().unwrap().len() as u64
    }

    async fn sync(&self) -> Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        self.synced.send_replace(self.node.applied.position());
        Ok(())
    }

    fn synced(&self) -> watch::Receiver<Option<Position>> {
        self.synced.subscribe()
    }
}

/// One try of a replica with this history against a peer on loopback.
struct Try {
    node: Arc<NodeContext>,
    feed: Arc<FakeFeed>,
    tracker: TaskTracker,
}

impl Try {
    fn new() -> Try {
        Try::of(node(2, &SECRET, Role::Replica))
    }

    fn of(node: Arc<NodeContext>) -> Try {
        let feed = FakeFeed::new(&node, history(&[(1, 1), (3, 1)]), Some(at(1, 0)));
        Try { node, feed, tracker: TaskTracker::new() }
    }

    fn knock(&self) -> Knock {
        Knock {
            version: 3,
            cluster: self.node.cluster.clone(),
            database: self.node.database.clone(),
            node: self.node.me.node,
            incarnation: self.node.me.incarnation,
            nonce: [3; 32],
            binding: Binding::NONE,
        }
    }

    /// How the try ended.
    async fn against(&self, primary: &Endpoint) -> PeerProblem {
        let lagging = Lagging::new();
        let mut session = PrimaryConnection::new(&self.node, &*self.feed, primary, &self.tracker, &lagging);
        let mut reporter = Reporter::new(self.node.clone(), primary.clone());
        let error = session.run(&mut reporter).await;
        drop(session);
        self.tracker.close();
        self.tracker.wait().await;
        let StreamError::Failed(Error::Peer { problem, .. }) = error else { panic!("{error:?}") };
        problem
    }
}

fn endpoint(listener: &TcpListener) -> Endpoint {
    Endpoint::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap()
}

type Reply = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

fn reply(status: u16, content_type: Option<&str>, body: &'static str) -> Reply {
    let body = Full::new(Bytes::from_static(body.as_bytes())).map_err(|e| match e {}).boxed_unsync();
    let mut response = Response::builder().status(status);
    if let Some(content_type) = content_type {
        response = response.header("content-type", content_type);
    }
    response.body(body).unwrap()
}

async fn serve_h2<I, R>(io: I, respond: R)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    R: Fn(HeaderMap) -> Reply + Clone + Send + 'static,
{
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let respond = respond.clone();
        async move {
            let (head, body) = request.into_parts();
            // Held until the test is over: the peer must see no end that we did not mean.
            tokio::spawn(async move {
                let _ = body.collect().await;
            });
            Ok::<_, Infallible>(respond(head.headers))
        }
    });
    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let _ = builder.serve_connection(TokioIo::new(io), service).await;
}

/// Answers each connection's request by a function of its head.
async fn answering(respond: impl Fn(HeaderMap) -> Reply + Clone + Send + 'static) -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = endpoint(&listener);
    tokio::spawn(async move {
        while let Ok((io, _)) = listener.accept().await {
            tokio::spawn(serve_h2(io, respond.clone()));
        }
    });
    to
}

/// A proper answer whose body is sent by the caller.
fn streaming(headers: &HeaderMap) -> (Reply, Sender<Bytes, std::io::Error>) {
    let knock = Knock::read(headers, &keys(&SECRET), Binding::NONE).unwrap().0;
    let primary = node(1, &SECRET, Role::Primary);
    let answer = Answer { node: primary.me.node, incarnation: primary.me.incarnation, nonce: [8; 32] };
    let (sender, body) = Channel::new(16);
    let mut response = Response::new(body.boxed_unsync());
    *response.headers_mut() = answer.headers(&knock, &keys(&SECRET)).unwrap();
    (response, sender)
}

/// A node that may lead by a lease, with its numbers in the state directory of these paths.
fn with_files(paths: &Paths) -> Try {
    let lease = crate::files::lease::open(paths, Duration::from_secs(10)).unwrap();
    Try::of(with_lease(2, &SECRET, Role::Replica, lease))
}

/// A primary that says these bytes and then ends the stream.
async fn saying(bytes: Bytes) -> Endpoint {
    answering(move |headers| {
        let (response, mut sender) = streaming(&headers);
        sender.try_send(http_body::Frame::data(bytes.clone())).unwrap();
        response
    })
    .await
}

fn encoded(messages: &[Message<'_>]) -> Bytes {
    let mut bytes = BytesMut::new();
    for message in messages {
        wire::encode(message, &mut bytes);
    }
    bytes.freeze()
}

fn welcome(epoch: u64) -> Message<'static> {
    let peer = node(1, &SECRET, Role::Primary).me.clone();
    let epoch = Epoch::new(epoch, epoch);
    let page_size = crate::page::PageSize::new(512).unwrap();
    Message::Welcome(Welcome {
        peer,
        epoch,
        plan: Plan::Log,
        position: at(1, 1),
        page_size,
        keys: crate::wire::PeerKeys::of(KEYS, true),
        packed: false,
    })
}

fn transaction() -> [Message<'static>; 2] {
    let page_size = crate::page::PageSize::new(512).unwrap();
    [
        Message::TxnBegin(TxnBegin { before: at(1, 0), epoch: Epoch::new(3, 3), page_size }),
        Message::TxnEnd(TxnEnd { after: at(3, 1), pages: 1, changed: 0, unix_micros: 0 }),
    ]
}

#[tokio::test]
async fn what_is_no_replite_is_told_by_what_it_said() {
    for (status, content_type, body) in [
        (200, Some("text/html"), "<html>welcome to nginx"),
        (401, Some("text/plain"), "who are you"),
        (302, None, ""),
        (404, Some("text/html"), "<html>not here"),
    ] {
        let to = answering(move |_| reply(status, content_type, body)).await;
        let problem = Try::new().against(&to).await;
        let PeerProblem::NotReplite { status: s, content_type: c, begins } = problem else {
            panic!("{problem:?}")
        };
        assert_eq!((s, &*c, &*begins), (status, content_type.unwrap_or(""), body));
    }
}

#[tokio::test]
async fn a_bare_404_and_a_false_proof_mean_another_secret() {
    let to = answering(|_| reply(404, None, "")).await;
    assert!(matches!(Try::new().against(&to).await, PeerProblem::NotFound));
    // An answer to another knock, as somebody would send who recorded one.
    let to = answering(|headers| {
        let mut knock = Knock::read(&headers, &keys(&SECRET), Binding::NONE).unwrap().0;
        knock.nonce = [0; 32];
        let answer = Answer { node: knock.node, incarnation: knock.incarnation, nonce: [8; 32] };
        let mut response = reply(200, None, "");
        *response.headers_mut() = answer.headers(&knock, &keys(&SECRET)).unwrap();
        response
    })
    .await;
    assert!(matches!(Try::new().against(&to).await, PeerProblem::Secret));
}

#[tokio::test]
async fn refusals_are_typed() {
    let to = answering(|_| {
        let mut response = reply(409, None, "");
        *response.headers_mut() = Refusal::Cluster("blue".into()).headers();
        response
    })
    .await;
    assert!(matches!(Try::new().against(&to).await, PeerProblem::Cluster(name) if name == "blue"));
}

#[tokio::test]
async fn peers_without_http2_are_recognised() {
    // hyper without HTTP/2: it hangs up on our preface.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = endpoint(&listener);
    tokio::spawn(async move {
        while let Ok((io, _)) = listener.accept().await {
            tokio::spawn(async move {
                let service =
                    hyper::service::service_fn(|_| async { Ok::<_, Infallible>(reply(200, None, "")) });
                let builder = hyper::server::conn::http1::Builder::new();
                let _ = builder.serve_connection(TokioIo::new(io), service).await;
            });
        }
    });
    assert!(matches!(Try::new().against(&to).await, PeerProblem::NotHttp2));
    // Others answer in HTTP/1.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = endpoint(&listener);
    tokio::spawn(async move {
        while let Ok((mut io, _)) = listener.accept().await {
            let _ = io.read(&mut [0; 64]).await;
            let _ = io.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await;
        }
    });
    assert!(matches!(Try::new().against(&to).await, PeerProblem::NotHttp2));
}

/// The connection was cut before the server said a word, and the server has both languages.
#[tokio::test]
async fn a_link_that_is_cut_is_no_peer_without_http2_nor_one_with_another_secret() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = endpoint(&listener);
    tokio::spawn(async move {
        let (mut io, _) = listener.accept().await.unwrap();
        let _ = io.read(&mut [0; 16]).await;
        drop(io);
        while let Ok((io, _)) = listener.accept().await {
            tokio::spawn(async move {
                let service =
                    hyper::service::service_fn(|_| async { Ok::<_, Infallible>(reply(200, None, "")) });
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(TokioIo::new(io), service).await;
            });
        }
    });
    let problem = Try::new().against(&to).await;
    assert!(matches!(problem, PeerProblem::Connection(_)), "{problem}");
    // It broke after the head of a 404, of which a whole one would be empty.
    let to = answering(|_| {
        let (sender, body) = Channel::<Bytes, std::io::Error>::new(1);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            sender.abort(std::io::ErrorKind::ConnectionReset.into());
        });
        let mut response = Response::new(body.boxed_unsync());
        *response.status_mut() = http::StatusCode::NOT_FOUND;
        response
    })
    .await;
    let problem = Try::new().against(&to).await;
    assert_eq!(problem.to_string(), "connection failed: it broke within an answer");
}

#[tokio::test]
async fn what_a_peer_says_is_shown_in_one_line() {
    let reason = "bye\n2026-01-01 ERROR\u{1b}[2J forged".to_string();
    let bye = encoded(&[welcome(3), Message::Goodbye(Goodbye { reason })]);
    let problem = Try::new().against(&saying(bye).await).await.to_string();
    assert_eq!(problem, r"it ended the stream: bye\n2026-01-01 ERROR\u{1b}[2J forged");
    let to = answering(|_| reply(500, Some("text/plain"), "oh\nno\u{1b}[2J")).await;
    let problem = Try::new().against(&to).await.to_string();
    assert!(problem.ends_with(r#"begins "oh\nno\u{1b}[2J""#), "{problem}");
    let to = answering(|_| {
        let mut response = reply(503, None, "");
        let word = http::HeaderValue::from_bytes("later\u{9b}x".as_bytes()).unwrap();
        response.headers_mut().insert("replite-refused", word);
        response
    })
    .await;
    assert_eq!(Try::new().against(&to).await.to_string(), r"it refused: later\u{9b}x");
}

fn disk_full() -> Error {
    Error::io("write", "the log")(std::io::Error::other("disk full"))
}

#[test]
fn a_failure_of_this_node_is_not_told_as_the_primary_s() {
    let peer = StreamError::from(Error::peer("a", PeerProblem::NotPrimary));
    assert_eq!(what_ended(&peer), "can't follow the primary; trying again");
    assert_eq!(what_ended(&StreamError::HealPaused { pause: Duration::ZERO }), "the next heal waits");
    let full = StreamError::from(disk_full());
    assert!(what_ended(&full).starts_with("what comes from the primary can't be taken in here"));
}

#[tokio::test]
async fn nobody_and_those_who_hang_up_are_connection_problems() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = endpoint(&listener);
    drop(listener);
    assert!(matches!(Try::new().against(&to).await, PeerProblem::Connection(_)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = endpoint(&listener);
    tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    assert!(matches!(Try::new().against(&to).await, PeerProblem::Connection(_)));
}

#[tokio::test]
async fn a_superseded_primary_is_never_applied() {
    for bytes in [
        encoded(&[welcome(1), Message::Epochs(history(&[(1, 1)])), transaction()[0].clone()]),
        encoded(&[welcome(3), Message::Epochs(history(&[(1, 1)])), transaction()[0].clone()]),
    ] {
        let run = Try::new();
        let problem = run.against(&saying(bytes).await).await;
        assert!(matches!(problem, PeerProblem::OldEpoch { .. }), "{problem:?}");
        assert_eq!(run.feed.fed(), []);
    }
}

/// What the node heard of elsewhere counts like its own history, also after a restart.
#[tokio::test]
async fn a_primary_of_an_epoch_below_one_that_was_heard_of_is_never_applied() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::fresh(dir.path());
    with_files(&paths).node.lease.heard.note(5).unwrap();
    for epoch in [3, 4] {
        let bytes = encoded(&[welcome(epoch), transaction()[0].clone(), transaction()[1].clone()]);
        let run = with_files(&paths);
        let problem = run.against(&saying(bytes).await).await;
        assert!(matches!(problem, PeerProblem::OldEpoch { .. }), "{problem:?}");
        assert!(problem.to_string().contains("number 5"), "{problem}");
        assert_eq!(run.feed.fed(), []);
        assert_eq!(run.node.roles.borrow().primary, None, "it is followed for no moment");
    }
    let run = with_files(&paths);
    let bytes = encoded(&[welcome(5), transaction()[0].clone(), transaction()[1].clone()]);
    assert!(matches!(run.against(&saying(bytes).await).await, PeerProblem::Connection(_)));
    assert_eq!(run.feed.fed(), [Kind::TxnBegin, Kind::TxnEnd]);
    // Who is primary is fixed: no number that was heard of counts.
    let fixed = Try::new();
    fixed.node.lease.heard.note(9).unwrap();
    assert!(matches!(fixed.against(&saying(encoded(&[welcome(3)])).await).await, PeerProblem::Connection(_)));
}

/// The stream of a primary ends when the node hears of a later one by other ways.
#[tokio::test]
async fn a_stream_ends_when_a_later_epoch_is_heard_of() {
    let senders = Arc::new(Mutex::new(Vec::new()));
    let kept = senders.clone();
    let to = answering(move |headers| {
        let (response, mut sender) = streaming(&headers);
        let epochs = Message::Epochs(history(&[(1, 1), (3, 1)]));
        sender.try_send(http_body::Frame::data(encoded(&[welcome(3), epochs]))).unwrap();
        kept.lock().unwrap().push(sender);
        response
    })
    .await;
    let run = Try::of(leased(2, &SECRET, Role::Replica));
    let hears = async {
        run.node.roles.subscribe().wait_for(|state| state.primary.is_some()).await.unwrap();
        let node = run.node.clone();
        // The stream's own epoch, which it was told of already, ends nothing.
        assert!(!node.hear_aside(3));
        assert!(node.hear_aside(6));
        comes("it is on the disk", || node.lease.heard.number() == 6).await;
        std::future::pending::<()>().await
    };
    let problem = tokio::select! {
        problem = run.against(&to) => problem,
        () = hears => unreachable!(),
    };
    assert!(matches!(problem, PeerProblem::OldEpoch { .. }), "{problem:?}");
    // A renewed epoch of the primary that is followed does not end it.
    let run = Try::of(leased(2, &SECRET, Role::Replica));
    let goes_on = async {
        run.node.roles.subscribe().wait_for(|state| state.primary.is_some()).await.unwrap();
        let mut sender = senders.lock().unwrap().pop().unwrap();
        let renewed = Message::Epochs(history(&[(1, 1), (3, 1), (8, 1)]));
        sender.send_data(encoded(&[renewed])).await.unwrap();
        run.node.roles.subscribe().wait_for(|state| state.epoch.number() == 8).await.unwrap();
        assert_eq!(run.node.lease.heard.number(), 8);
        sender.send_data(encoded(&transaction())).await.unwrap();
        reaches(&run.node, at(3, 1)).await;
    };
    tokio::select! {
        problem = run.against(&to) => panic!("{problem:?}"),
        () = goes_on => {}
    }
}

/// A welcome names a later epoch, and the process dies while that is put on the disk, and so before
/// it does anything of it, or just after.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_killed_between_hearing_and_acting_has_heard() {
    const DIRECTORY: &str = "REPLITE_TEST_HEARD";
    const NAME: &str = "replica::tests::a_process_that_is_killed_between_hearing_and_acting_has_heard";
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return dies(std::path::Path::new(&directory)).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::fresh(dir.path());
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", NAME]).env(DIRECTORY, dir.path()).stdout(std::process::Stdio::null());
    let ended = tokio::task::block_in_place(|| child.status().unwrap());
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended), Some(9), "{ended}");
    let acted = dir.path().join("acted");
    assert!(!acted.exists(), "{}", std::fs::read_to_string(&acted).unwrap());
    let run = with_files(&paths);
    assert_eq!(run.node.lease.heard.number(), 7);
    let problem = run.against(&saying(encoded(&[welcome(6)])).await).await;
    assert!(matches!(problem, PeerProblem::OldEpoch { .. }), "{problem:?}");
}

/// Hears of epoch 7, and is killed as soon as that is on the disk.
#[cfg(unix)]
async fn dies(directory: &std::path::Path) {
    let paths = Paths::new(directory.join("fresh.db"));
    let kept = crate::files::lease::open(&paths, Duration::from_secs(10)).unwrap();
    let run: Arc<std::sync::OnceLock<(Arc<NodeContext>, Arc<FakeFeed>)>> = Arc::default();
    let (of, acted) = (run.clone(), directory.join("acted"));
    let keep = ToDisk::new(move |number| {
        let (node, feed) = of.get().expect("it is set");
        let state = node.roles.borrow().clone();
        let told = node.lease.heard.number();
        if state.primary.is_some() || state.epoch.number() > 3 || !feed.fed().is_empty() || told != 0 {
            std::fs::write(&acted, format!("{state:?} {told}")).unwrap();
        }
        assert!(kept.heard.note(number)?);
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        loop {
            std::thread::park();
        }
    });
    let synced = SyncedClock::new(None, Duration::from_secs(10), ToDisk::nowhere());
    let lease = LeaseContext::leased(synced, EpochsHeard::new(0, keep));
    let replica = Try::of(with_lease(2, &SECRET, Role::Replica, lease));
    run.set((replica.node.clone(), replica.feed.clone())).unwrap_or_else(|_| unreachable!());
    let bytes = encoded(&[welcome(7), transaction()[0].clone(), transaction()[1].clone()]);
    replica.against(&saying(bytes).await).await;
}

/// After the node follows another primary, what the one before still sends is nothing to it.
#[tokio::test]
async fn nothing_of_a_primary_is_applied_once_another_is_followed() {
    let senders = Arc::new(Mutex::new(Vec::new()));
    let kept = senders.clone();
    let before = answering(move |headers| {
        let (response, mut sender) = streaming(&headers);
        let epochs = Message::Epochs(history(&[(1, 1), (3, 1)]));
        sender.try_send(http_body::Frame::data(encoded(&[welcome(3), epochs]))).unwrap();
        kept.lock().unwrap().push(sender);
        response
    })
    .await;
    let replica = leased(2, &SECRET, Role::Replica);
    let feed = FakeFeed::new(&replica, history(&[(1, 1), (3, 1)]), Some(at(1, 0)));
    let tracker = TaskTracker::new();
    let ends = replica.stop.child_token();
    let following = spawn(replica.clone(), feed.clone(), before, ends.clone(), &tracker);
    replica.roles.subscribe().wait_for(|state| state.primary.is_some()).await.unwrap();
    ends.cancel();
    following.await.unwrap();
    feed.kinds.lock().unwrap().clear();
    // It is late, and does not know.
    let mut late = senders.lock().unwrap().pop().unwrap();
    let late = tokio::spawn(async move { while late.send_data(encoded(&transaction())).await.is_ok() {} });
    let next = Primary::start(&SECRET).await;
    let mut epochs = history(&[(1, 1), (3, 1)]);
    epochs.push(crate::txid::EpochStart { epoch: Epoch::new(4, 4), first: 1, before: at(1, 0).checksum() });
    next.node.applied.replace(epochs, Some(at(1, 0)));
    spawn(replica.clone(), feed.clone(), next.to.clone(), replica.stop.child_token(), &tracker);
    next.fake.commit(0);
    reaches(&replica, at(4, 1)).await;
    // Its connection was closed, and not only left unread.
    tokio::time::timeout(Duration::from_secs(20), late).await.expect("it sends for ever").unwrap();
    let transactions = feed.fed().iter().filter(|kind| **kind == Kind::TxnEnd).count();
    assert_eq!(transactions, 1, "{:?}", feed.fed());
    assert_eq!(replica.lease.heard.number(), 4);
    stop(&replica, &tracker).await;
    stop(&next.node, &next.tracker).await;
}

/// A node is told of the next primary before that serves.
#[test]
fn only_a_node_that_may_be_about_to_lead_is_asked_again_before_long() {
    let early = |problem| is_early(&Error::peer("a", problem).into());
    let refused = |refusal: Refusal| Refusal::read(&refusal.headers(), "app").unwrap();
    assert!(early(refused(Refusal::NotPrimary(None))) && early(refused(Refusal::Stopping)));
    for other in [Refusal::Busy, Refusal::DuplicateNode(None), Refusal::Version, Refusal::Path] {
        assert!(!early(refused(other.clone())), "{other:?}");
    }
    assert!(!early(PeerProblem::Connection("refused".into())));
    assert!(!is_early(&disk_full().into()));
}

/// The replica keeps how far the primary was on its clock when it had what is here.
#[tokio::test]
async fn the_lease_clock_of_a_primary_comes_to_the_replica_s_disk() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::fresh(dir.path());
    let lease = crate::files::lease::open(&paths, Duration::from_secs(10)).unwrap();
    let replica = with_lease(2, &SECRET, Role::Replica, lease);
    let primary = Primary::start(&SECRET).await;
    let taken = crate::fence::boot_time().saturating_sub(Duration::from_secs(3));
    primary.node.lease.clock.take(Epoch::new(1, 1), taken);
    primary.fake.commit(1);
    let feed = FakeFeed::new(&replica, EpochHistory::default(), None);
    let tracker = TaskTracker::new();
    spawn(replica.clone(), feed, primary.to.clone(), replica.stop.child_token(), &tracker);
    let kept = || crate::files::lease::open(&paths, Duration::from_secs(10)).unwrap().synced.get();
    comes("the pair", || kept().is_some_and(|pair| pair.position == at(1, 1))).await;
    let pair = kept().unwrap();
    assert_eq!(pair.epoch, Epoch::new(1, 1));
    assert!(pair.clock >= Duration::from_secs(3), "{pair:?}");
    assert!(replica.lease.synced.get().unwrap().clock >= pair.clock);
    assert_eq!(kept().map(|pair| pair.position), Some(at(1, 1)), "after a restart, too");
    stop(&replica, &tracker).await;
    stop(&primary.node, &primary.tracker).await;
}

#[tokio::test]
async fn garbage_from_a_primary_is_typed_and_what_came_before_it_is_kept() {
    let good = encoded(&transaction());
    let beat = encoded(&[Message::Heartbeat(Heartbeat { position: at(3, 1), clock: 0, lease_clock: None })]);
    let mut flipped = beat.to_vec();
    flipped[40] ^= 0x10;
    let mut huge = beat.to_vec();
    huge[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut unknown = beat.to_vec();
    unknown[4] = 200;
    let ack = encoded(&[Message::Ack(wire::Ack { applied: None, synced: None, clock: 0 })]).to_vec();
    for (bad, word) in [(flipped, "hash"), (huge, "limit"), (unknown, "unknown"), (ack, "unexpected Ack")] {
        let bytes = [encoded(&[welcome(3)]), good.clone(), bad.into()].concat();
        let run = Try::new();
        let problem = run.against(&saying(bytes.into()).await).await;
        assert!(matches!(&problem, PeerProblem::Garbled(w) if w.contains(word)), "{problem:?}");
        assert_eq!(run.feed.fed(), [Kind::TxnBegin, Kind::TxnEnd]);
    }
    let cut = [encoded(&[welcome(3)]), good.slice(..good.len() - 1)].concat();
    let run = Try::new();
    let problem = run.against(&saying(cut.into()).await).await;
    assert!(matches!(problem, PeerProblem::Connection(_)), "{problem:?}");
    assert_eq!(run.feed.fed(), [Kind::TxnBegin]);
    for bytes in [beat, Bytes::from_static(&[0; 100])] {
        let problem = Try::new().against(&saying(bytes).await).await;
        assert!(matches!(problem, PeerProblem::Garbled(_)), "in place of a welcome: {problem:?}");
    }
    let bye = encoded(&[welcome(3), Message::Goodbye(Goodbye { reason: "because".into() })]);
    let problem = Try::new().against(&saying(bye).await).await;
    assert!(matches!(problem, PeerProblem::Goodbye(why) if why == "because"));
}

#[tokio::test(start_paused = true)]
async fn a_silent_primary_is_given_up() {
    let run = Try::new();
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let kept = Arc::new(Mutex::new(Vec::new()));
    let senders = kept.clone();
    tokio::spawn(serve_h2(theirs, move |headers| {
        let (response, mut sender) = streaming(&headers);
        sender.try_send(http_body::Frame::data(encoded(&[welcome(3)]))).unwrap();
        senders.lock().unwrap().push(sender);
        response
    }));
    let to = Endpoint::parse("http://primary:1").unwrap();
    let knock = run.knock();
    let headers = knock.headers(&keys(&SECRET)).unwrap();
    let opened = net::open_on(ours, &to, handshake::STREAM_PATH, headers, &run.tracker).await.unwrap();
    let lagging = Lagging::new();
    let mut session = PrimaryConnection::new(&run.node, &*run.feed, &to, &run.tracker, &lagging);
    let mut reporter = Reporter::new(run.node.clone(), to.clone());
    let began = tokio::time::Instant::now();
    let error = session.stream(opened, knock, &mut reporter).await.unwrap_err();
    let StreamError::Failed(Error::Peer { problem, .. }) = &error else { panic!("{error}") };
    assert!(matches!(problem, PeerProblem::Silent(_)), "{error}");
    assert_eq!(began.elapsed().as_secs(), 10);
    assert!(!session.was_fruitful());
}

#[tokio::test]
async fn a_primary_that_takes_back_what_it_lost_is_none_that_takes_requests() {
    for (plan, takes) in [(Plan::Recover, false), (Plan::Log, true)] {
        let Message::Welcome(welcome) = welcome(3) else { unreachable!() };
        let bye = Goodbye { reason: "because".into() };
        let bytes = encoded(&[Message::Welcome(Welcome { plan, ..welcome }), Message::Goodbye(bye)]);
        let run = Try::new();
        assert!(matches!(run.against(&saying(bytes).await).await, PeerProblem::Goodbye(_)));
        assert_eq!(run.node.roles.borrow().primary.is_some(), takes, "{plan:?}");
    }
}

/// A connection whose other end sends what the test says.
async fn answered(run: &Try) -> (OpenResponse, Knock, Endpoint, Sender<Bytes, std::io::Error>) {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (senders, mut sender) = mpsc::unbounded_channel();
    tokio::spawn(serve_h2(theirs, move |headers| {
        let (response, sender) = streaming(&headers);
        senders.send(sender).unwrap();
        response
    }));
    let to = Endpoint::parse("http://primary:1").unwrap();
    let knock = run.knock();
    let headers = knock.headers(&keys(&SECRET)).unwrap();
    let opened = net::open_on(ours, &to, handshake::STREAM_PATH, headers, &run.tracker).await.unwrap();
    let sender = sender.recv().await.unwrap();
    (opened, knock, to, sender)
}

/// A primary, or what is before it, says again and again that there is nothing new. That counts
/// only as far as it answers what this node said.
#[tokio::test(start_paused = true)]
async fn a_heartbeat_that_answers_nothing_is_no_news_of_the_lag() {
    let run = Try::new();
    let (opened, knock, to, mut sender) = answered(&run).await;
    let lagging = Lagging::new();
    let mut session = PrimaryConnection::new(&run.node, &*run.feed, &to, &run.tracker, &lagging);
    let dialled = tokio::time::Instant::now();
    let mut reporter = Reporter::new(run.node.clone(), to.clone());
    let says = async {
        let beat = |clock| {
            encoded(&[Message::Heartbeat(Heartbeat { position: at(3, 1), clock, lease_clock: None })])
        };
        let transactions = || {
            lagging.publish(&run.node);
            run.node.lag().unwrap().transactions
        };
        sender.send_data(encoded(&[welcome(3)])).await.unwrap();
        for second in 0..8 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let ahead = (dialled.elapsed() + Duration::from_secs(1)).as_micros() as u64;
            for clock in [0, 1, ahead, u64::MAX] {
                sender.send_data(beat(clock)).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert_eq!(transactions().is_some(), second < 4, "{second}");
        }
        let clock = (dialled.elapsed() - Duration::from_secs(2)).as_micros() as u64;
        sender.send_data(beat(clock)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(transactions().is_some(), "that was said two seconds ago, at the earliest");
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert!(transactions().is_none(), "its age counts from then");
    };
    tokio::select! {
        ended = session.stream(opened, knock, &mut reporter) => panic!("{ended:?}"),
        () = says => {}
    }
}

/// A heartbeat alone is no success: what the primary has beyond this node may be what can't come.
#[tokio::test(start_paused = true)]
async fn a_problem_lasts_until_something_is_taken_in() {
    let run = Try::new();
    let (opened, knock, to, mut sender) = answered(&run).await;
    let lagging = Lagging::new();
    let mut session = PrimaryConnection::new(&run.node, &*run.feed, &to, &run.tracker, &lagging);
    let problem = "nothing was heard for 10s";
    run.node.report(Condition::NotFollowing { primary: &to, problem, what: "silent", new: false });
    let mut reporter = Reporter::new(run.node.clone(), to.clone());
    let problem = || run.node.problem_of(Part::Stream);
    let says = async {
        let beat = |number| {
            encoded(&[Message::Heartbeat(Heartbeat { position: at(3, number), clock: 0, lease_clock: None })])
        };
        sender.send_data(encoded(&[welcome(3)])).await.unwrap();
        for _ in 0..3 {
            sender.send_data(beat(1)).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(problem().is_some(), "nothing was taken in yet");
        }
        sender.send_data(encoded(&transaction())).await.unwrap();
        sender.send_data(beat(1)).await.unwrap();
        while problem().is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        ended = session.stream(opened, knock, &mut reporter) => panic!("{ended:?}"),
        said = tokio::time::timeout(Duration::from_secs(60), says) => said.expect("the problem is over"),
    }
}

/// A real primary on loopback.
struct Primary {
    node: Arc<NodeContext>,
    fake: Arc<Fake>,
    replica_server: Arc<ReplicaServer>,
    tracker: TaskTracker,
    to: Endpoint,
}

impl Primary {
    async fn start(secret: &[u8]) -> Primary {
        let node = node(1, secret, Role::Primary);
        let fake = Fake::new(node.clone(), 3000);
        let replica_server = ReplicaServer::new(node.clone());
        replica_server.set(Some(fake.clone()));
        let tracker = TaskTracker::new();
        let service =
            ReplicationService::new(node.clone(), replica_server.clone(), tracker.clone(), Mount::Own);
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let to = Endpoint::parse(&format!("http://{}", listener.address())).unwrap();
        let (channel, stop) = (node.channel.clone(), node.stop.clone());
        tracker.spawn(listener.serve(channel, move |inside| service.on(inside), tracker.clone(), stop));
        Primary { node, fake, replica_server, tracker, to }
    }
}

async fn reaches(node: &NodeContext, position: Position) {
    let mut watch = node.applied.watch();
    watch.wait_for(|at| *at == Some(position)).await.unwrap();
}

async fn stop(node: &NodeContext, tracker: &TaskTracker) {
    node.stop.cancel();
    tracker.close();
    tokio::time::timeout(Duration::from_secs(5), tracker.wait()).await.expect("a task stays");
}

#[tokio::test]
async fn a_replica_is_filled_follows_is_seen_and_comes_back() {
    let primary = Primary::start(&SECRET).await;
    for _ in 0..5 {
        primary.fake.commit(2);
    }
    let replica = node(2, &SECRET, Role::Replica);
    let feed = FakeFeed::new(&replica, EpochHistory::default(), None);
    let tracker = TaskTracker::new();
    spawn(replica.clone(), feed.clone(), primary.to.clone(), replica.stop.child_token(), &tracker);
    reaches(&replica, at(1, 5)).await;
    let kinds = feed.fed();
    assert_eq!(kinds[..2], [Kind::Epochs, Kind::SnapBegin]);
    assert_eq!(kinds[kinds.len() - 1], Kind::SnapEnd);
    let state = replica.roles.borrow().clone();
    assert_eq!((state.role, state.epoch), (Role::Replica, Epoch::new(1, 1)));
    assert_eq!(state.primary.unwrap().node, primary.node.me.node);

    primary.fake.commit(2);
    reaches(&replica, at(1, 6)).await;
    primary.fake.commit(2000);
    reaches(&replica, at(1, 7)).await;
    // Acknowledged by itself, within a second.
    comes("the acknowledgement", || {
        primary.replica_server.replicas().first().and_then(|r| r.synced) == Some(at(1, 7))
    })
    .await;
    comes("a replica that is level", || {
        replica.lag().is_some_and(|lag| lag.connected && lag.transactions == Some(0))
    })
    .await;

    // Its next standing is where it was: only the log comes.
    feed.kinds.lock().unwrap().clear();
    feed.fail.lock().unwrap().push_back(disk_full());
    let mut events = replica.events();
    primary.fake.commit(1);
    reaches(&replica, at(1, 8)).await;
    assert!(!feed.fed().contains(&Kind::SnapBegin));
    let mut said = Vec::new();
    while let Ok(event) = events.try_recv() {
        said.push(format!("{event:?}"));
    }
    assert!(said.iter().any(|e| e.contains("Disconnected") && e.contains("disk full")), "{said:?}");
    assert!(said.iter().any(|e| e.starts_with("Connected")), "{said:?}");

    stop(&replica, &tracker).await;
    comes("the replica leaves", || primary.replica_server.replicas().is_empty()).await;
    stop(&primary.node, &primary.tracker).await;
}

#[tokio::test]
async fn a_primary_that_drains_gets_no_more_requests_and_waits_for_those_on_their_way() {
    let primary = Primary::start(&SECRET).await;
    primary.fake.commit(1);
    let replica = node(2, &SECRET, Role::Replica);
    let feed = FakeFeed::new(&replica, EpochHistory::default(), None);
    let tracker = TaskTracker::new();
    spawn(replica.clone(), feed, primary.to.clone(), replica.stop.child_token(), &tracker);
    reaches(&replica, at(1, 1)).await;
    let mut roles = replica.roles.subscribe();
    roles.wait_for(|state| state.primary.is_some()).await.unwrap();
    let request = replica.forward();
    primary.node.drain.cancel();
    roles.wait_for(|state| state.primary.is_none()).await.unwrap();
    // What the request commits comes here before the stream ends.
    primary.fake.commit(1);
    tokio::time::timeout(Duration::from_secs(20), reaches(&replica, at(1, 2))).await.expect("its commit");
    assert_eq!(primary.replica_server.replicas().len(), 1);
    drop(request);
    primary.replica_server.deserted().await;
    reaches(&replica, at(1, 2)).await;
    assert!(replica.roles.borrow().primary.is_none());
    stop(&replica, &tracker).await;
    stop(&primary.node, &primary.tracker).await;
}

/// A hello that named the epoch 2^62 had the primary go there, and from then on refuse everybody
/// who had heard of that.
#[tokio::test]
async fn an_absurd_hello_is_refused_and_honest_replicas_go_on() {
    let primary = Primary::start(&SECRET).await;
    let far = history(&[(1, 1), (1 << 62, 1)]);
    let node_of = |id| node(id, &SECRET, Role::Replica);
    let liar = node_of(9);
    let liar =
        Try { feed: FakeFeed::new(&liar, far, Some(at(1, 0))), node: liar, tracker: TaskTracker::new() };
    let honest = node_of(2);
    let feed = FakeFeed::new(&honest, EpochHistory::default(), None);
    let tracker = TaskTracker::new();
    spawn(honest.clone(), feed.clone(), primary.to.clone(), honest.stop.child_token(), &tracker);
    reaches(&honest, at(1, 0)).await;
    let mut events = honest.events();
    for number in 1..=3 {
        let end = tokio::time::timeout(Duration::from_secs(10), liar.against(&primary.to)).await;
        match end.expect("it is served") {
            PeerProblem::Goodbye(said) => assert!(said.contains("too far above"), "{said}"),
            other => panic!("{other:?}"),
        }
        // It comes back with all that it was told.
        feed.fail.lock().unwrap().push_back(disk_full());
        primary.fake.commit(1);
        reaches(&honest, at(1, number)).await;
    }
    while let Ok(event) = events.try_recv() {
        if let Event::Disconnected { why, .. } = event {
            assert!(why.contains("disk full"), "{why}");
        }
    }
    assert_eq!(primary.node.applied.history().epoch().number(), 1);
    stop(&honest, &tracker).await;
    stop(&primary.node, &primary.tracker).await;
}

#[tokio::test]
async fn a_replica_waits_for_its_primary_and_says_a_problem_once() {
    let primary = Primary::start(&[7; 32]).await;
    let replica = node(2, &SECRET, Role::Replica);
    let feed = FakeFeed::new(&replica, EpochHistory::default(), None);
    let tracker = TaskTracker::new();
    let mut events = replica.events();
    spawn(replica.clone(), feed.clone(), primary.to.clone(), replica.stop.child_token(), &tracker);
    comes("a problem", || replica.problem().is_some()).await;
    assert!(replica.problem().unwrap().contains("secret"));
    let (old, new) = (crate::secret::Secret::fixed([7; 32]), crate::secret::Secret::fixed(SECRET));
    primary.node.keys.rotate(&[new, old]).unwrap();
    let position = primary.node.applied.position().unwrap();
    reaches(&replica, position).await;
    comes("no problem", || replica.problem().is_none()).await;
    assert!(!std::iter::from_fn(|| events.try_recv().ok()).any(|e| matches!(e, Event::Disconnected { .. })));

    // The primary stops: the stream ends with a word, and the role says that it is away.
    stop(&primary.node, &primary.tracker).await;
    replica.roles.subscribe().wait_for(|s| s.primary.is_none()).await.unwrap();
    comes("a problem", || replica.problem().is_some()).await;
    stop(&replica, &tracker).await;
}

#[tokio::test]
async fn two_processes_with_one_id_do_not_push_each_other_out() {
    let primary = Primary::start(&SECRET).await;
    let replica = node(2, &SECRET, Role::Replica);
    let feed = FakeFeed::new(&replica, EpochHistory::default(), None);
    let tracker = TaskTracker::new();
    spawn(replica.clone(), feed, primary.to.clone(), replica.stop.child_token(), &tracker);
    comes("the replica", || !primary.replica_server.replicas().is_empty()).await;
    let copied = Try::new();
    let mut me = copied.node.me.clone();
    me.incarnation = Incarnation::from_u128(77);
    let node = NodeContext::new(
        me,
        "test".into(),
        "app".into(),
        (keys(&SECRET), crate::channel::Channel::open()),
        Role::Replica,
        LeaseContext::fixed(),
        KEYS,
    );
    let copied = Try { node, ..copied };
    assert!(matches!(copied.against(&primary.to).await, PeerProblem::DuplicateNode(_)));
    assert_eq!(primary.replica_server.replicas().len(), 1);
    stop(&replica, &tracker).await;
    stop(&primary.node, &primary.tracker).await;
}

#[tokio::test]
async fn the_listener_outlives_strangers_and_garbage() {
    let primary = Primary::start(&SECRET).await;
    let address = (primary.to.host.clone(), primary.to.port);
    for bytes in [
        &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"",
    ] {
        let mut io = tokio::net::TcpStream::connect(address.clone()).await.unwrap();
        io.write_all(bytes).await.unwrap();
        io.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = io.read_to_end(&mut answer).await;
        if bytes.starts_with(b"GET") {
            assert!(answer.starts_with(b"HTTP/1.1 404"), "{}", String::from_utf8_lossy(&answer));
        }
    }
    let run = Try::new();
    let token = CancellationToken::new();
    let joined = async {
        comes("the replica", || !primary.replica_server.replicas().is_empty()).await;
        token.cancel();
    };
    tokio::select! {
        problem = run.against(&primary.to) => panic!("{problem:?}"),
        () = joined => {}
    }
    stop(&primary.node, &primary.tracker).await;
}

#[tokio::test]
async fn the_mounted_endpoint_of_an_axum_server_serves() {
    let primary = node(1, &SECRET, Role::Primary);
    let replica_server = ReplicaServer::new(primary.clone());
    replica_server.set(Some(Fake::new(primary.clone(), 10)));
    let streams = TaskTracker::new();
    let service = ReplicationService::new(primary.clone(), replica_server, streams.clone(), Mount::Mounted);
    let app = axum::Router::new().nest_service("/_replite", service);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = endpoint(&listener);
    let stopped = primary.stop.clone();
    let server = tokio::spawn(async move {
        axum::serve(listener, app).with_graceful_shutdown(stopped.cancelled_owned()).await
    });
    let replica = node(2, &SECRET, Role::Replica);
    let feed = FakeFeed::new(&replica, EpochHistory::default(), None);
    let tracker = TaskTracker::new();
    spawn(replica.clone(), feed, to, replica.stop.child_token(), &tracker);
    reaches(&replica, at(1, 0)).await;
    // A graceful shutdown is not held up by the stream.
    stop(&primary, &streams).await;
    server.await.unwrap().unwrap();
    stop(&replica, &tracker).await;
}

/// A replica that may lead by a lease, of a primary that runs.
async fn to_be_offered() -> (Primary, Arc<NodeContext>, Arc<FakeFeed>, TaskTracker) {
    let primary = Primary::start(&SECRET).await;
    primary.fake.commit(1);
    let replica = leased(2, &SECRET, Role::Replica);
    let feed = FakeFeed::new(&replica, EpochHistory::default(), None);
    let tracker = TaskTracker::new();
    spawn(replica.clone(), feed.clone(), primary.to.clone(), replica.stop.child_token(), &tracker);
    reaches(&replica, at(1, 1)).await;
    // The log comes after the snapshot.
    primary.fake.commit(1);
    reaches(&replica, at(1, 2)).await;
    (primary, replica, feed, tracker)
}

/// What the replica's election hears next.
async fn word(words: &mut mpsc::Receiver<HandoffWord>) -> HandoffWord {
    tokio::time::timeout(Duration::from_secs(20), words.recv()).await.expect("a word").unwrap()
}

#[tokio::test]
async fn an_offer_waits_for_the_disk_and_is_answered_by_the_election() {
    let (primary, replica, feed, tracker) = to_be_offered().await;
    let mut words = replica.lease.offers.take().unwrap();
    assert!(replica.lease.offers.take().is_none());
    // As between two of the regular fsyncs.
    feed.synced.send_replace(Some(at(1, 1)));
    let answers = [Ok("boot"), Err("it drains")];
    for (attempt, answer) in answers.into_iter().enumerate() {
        let (server, to) = (primary.replica_server.clone(), replica.me.clone());
        let offer = tokio::spawn(async move { server.offer(&to, attempt as u128, at(1, 2)).await });
        let HandoffWord::Offered { attempt: of, position, answer: reply } = word(&mut words).await else {
            panic!("an offer")
        };
        assert_eq!((of, position), (attempt as u128, at(1, 2)));
        assert_eq!(*feed.synced.borrow(), Some(at(1, 2)), "it is on the disk by then");
        reply.send(answer.map(str::to_owned).map_err(str::to_owned)).unwrap();
        let told = offer.await.unwrap();
        let expected = answer.map(str::to_owned).map_err(|why| NotAccepted::Declined(why.into()));
        assert_eq!(told, expected);
    }
    assert_eq!(feed.syncs.load(Ordering::SeqCst), 1, "it was there already");
    primary.replica_server.handed(&replica.me, 1, "v7", b"the record");
    let HandoffWord::Handed { attempt, record, version } = word(&mut words).await else { panic!("a record") };
    assert_eq!((attempt, &record[..], &*version), (1, &b"the record"[..], "v7"));
    // Where no election takes it, the node declines.
    drop(words);
    let declined = primary.replica_server.offer(&replica.me, 3, at(1, 2)).await.unwrap_err();
    assert!(matches!(declined, NotAccepted::Declined(_)), "{declined:?}");
    stop(&replica, &tracker).await;
    stop(&primary.node, &primary.tracker).await;
}

#[tokio::test]
async fn a_node_with_a_fixed_primary_or_another_state_declines_an_offer() {
    let (primary, replica, feed, tracker) = to_be_offered().await;
    let _words = replica.lease.offers.take().unwrap();
    // What it has left the history, or is not vouched for.
    replica.applied.replace(history(&[(1, 1)]), Some(at(1, 9)));
    let declined = primary.replica_server.offer(&replica.me, 1, at(1, 2)).await.unwrap_err();
    assert!(matches!(&declined, NotAccepted::Declined(why) if why.contains("state")), "{declined:?}");
    assert_eq!(feed.syncs.load(Ordering::SeqCst), 0);
    stop(&replica, &tracker).await;

    let fixed = node(3, &SECRET, Role::Replica);
    let feed = FakeFeed::new(&fixed, history(&[(1, 1)]), Some(at(1, 2)));
    let tracker = TaskTracker::new();
    spawn(fixed.clone(), feed, primary.to.clone(), fixed.stop.child_token(), &tracker);
    primary.fake.commit(1);
    reaches(&fixed, at(1, 3)).await;
    let declined = primary.replica_server.offer(&fixed.me, 2, at(1, 3)).await.unwrap_err();
    assert!(matches!(&declined, NotAccepted::Declined(why) if why.contains("fixed")), "{declined:?}");
    stop(&fixed, &tracker).await;
    stop(&primary.node, &primary.tracker).await;
}

#[tokio::test]
async fn requests_are_held_while_the_primary_hands_over_and_the_record_is_read_when_it_has() {
    let (primary, replica, _feed, tracker) = to_be_offered().await;
    let known = async |yes| {
        let mut roles = replica.roles.subscribe();
        let known = roles.wait_for(|state| state.primary.is_some() == yes);
        drop(tokio::time::timeout(Duration::from_secs(20), known).await.expect("what it knows").unwrap());
    };
    for _ in 0..2 {
        known(true).await;
        primary.replica_server.tell_handoff(HandoffStage::Begins);
        known(false).await;
        // Neither a heartbeat nor an epoch takes that back.
        primary.fake.commit(1);
        let position = primary.node.applied.position().unwrap();
        reaches(&replica, position).await;
        assert!(replica.roles.borrow().primary.is_none());
        primary.replica_server.tell_handoff(HandoffStage::GoesOn);
    }
    known(true).await;
    primary.replica_server.tell_handoff(HandoffStage::Done);
    let hinted = async || {
        let hint = replica.lease.offers.hinted();
        tokio::time::timeout(Duration::from_secs(20), hint).await.expect("a hint");
    };
    hinted().await;
    known(false).await;
    // The goodbye says the same.
    primary.replica_server.set(None);
    hinted().await;
    stop(&replica, &tracker).await;
    stop(&primary.node, &primary.tracker).await;
}
