//! Commands, most of them from those who may give none.

use std::sync::Mutex;

use http::{HeaderMap, Request};
use http_body_util::BodyExt;
use http_body_util::channel::{Channel, Sender};
use tower::ServiceExt;

use crate::channel::{Binding, Channel as Private};
use crate::command::*;
use crate::handshake::{Answer, Knock, Nonce, STANDING_PATH};
use crate::lock::lock;
use crate::net::Listener;
use crate::peer::Incarnation;
use crate::primary::ReplicaServer;
use crate::primary::fake::{SECRET, at, history, keys, leased, node};
use crate::server::{Mount, ReplicationService};
use crate::status::{Event, WaitReason};

const HANDOFF: OperatorCommand = OperatorCommand::Handoff { to: None };
const LIMIT: Duration = Duration::from_secs(20);

type Carried = Arc<Mutex<Vec<OperatorCommand>>>;

/// A node that notes what it is to carry out.
struct Commanded {
    node: Arc<NodeContext>,
    service: ReplicationService,
    tracker: TaskTracker,
    carried: Carried,
}

fn commanded(node: Arc<NodeContext>) -> Commanded {
    let carried = Carried::default();
    let (noted, me) = (carried.clone(), node.me.node);
    node.lease.commands.open(move |command| {
        lock(&noted).push(command);
        Box::pin(async move { Ok(me) })
    });
    let tracker = TaskTracker::new();
    let replica_server = ReplicaServer::new(node.clone());
    let service = ReplicationService::new(node.clone(), replica_server, tracker.clone(), Mount::Own);
    Commanded { node, service, tracker, carried }
}

fn asker(secret: &[u8]) -> Asker {
    Asker {
        keys: keys(secret),
        cluster: "test".into(),
        database: "app".into(),
        node: NodeId::from_u128(77),
        incarnation: Incarnation::from_u128(78),
        channel: Private::open(),
    }
}

impl Commanded {
    async fn listen(&self) -> Endpoint {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let to = Endpoint::parse(&format!("http://{}", listener.address())).unwrap();
        let service = self.service.clone();
        self.tracker.spawn(listener.serve(
            self.node.channel.clone(),
            move |inside| service.on(inside),
            self.tracker.clone(),
            self.node.stop.clone(),
        ));
        to
    }

    async fn given(&self, asker: &Asker, command: OperatorCommand) -> Result<CommandAnswer, NoAnswer> {
        let to = self.listen().await;
        let given = give(asker, (&to, None), ("me", command), LIMIT, &TaskTracker::new()).await;
        given.map(|(_, answer)| answer)
    }

    async fn end(self) {
        self.node.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(LIMIT, self.tracker.wait()).await.expect("a task stays");
    }
}

fn refusal(answer: Result<CommandAnswer, NoAnswer>) -> String {
    match answer {
        Ok(CommandAnswer::Refused { why }) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_command_is_carried_out_and_told_with_who_gave_it() {
    let commanded = commanded(leased(2, &SECRET, Role::Replica));
    let mut events = commanded.node.events();
    for command in [HANDOFF, OperatorCommand::PromoteUnchecked] {
        let done = commanded.given(&asker(&SECRET), command).await.unwrap();
        assert_eq!(done, CommandAnswer::Done { holder: commanded.node.me.node });
        let Ok(Event::OperatorAsks { by, what }) = events.try_recv() else { panic!("it was not told") };
        assert_eq!((by, what), ("me".to_string(), command.to_string()));
    }
    assert_eq!(*lock(&commanded.carried), [HANDOFF, OperatorCommand::PromoteUnchecked]);
    commanded.end().await;
}

#[tokio::test]
async fn each_node_says_how_it_stands_and_why_it_is_not_fit() {
    let commanded = commanded(leased(2, &SECRET, Role::Replica));
    let node = &commanded.node;
    node.applied.replace(history(&[(1, 1), (3, 2)]), Some(at(3, 7)));
    let behind = WaitReason::Behind { by: Duration::from_secs(20) };
    node.lease.set_fitness(Fitness {
        why_not: Some(behind),
        paused: Some(true),
        has_state: true,
        ..Fitness::default()
    });
    let asks = asker(&SECRET);
    let described = async || match commanded.given(&asks, OperatorCommand::Describe).await.unwrap() {
        CommandAnswer::Described(described) => described,
        other => panic!("{other:?}"),
    };
    let said = described().await;
    assert_eq!((said.role, said.position, said.heard), (Role::Replica, Some(at(3, 7)), 3));
    assert_eq!((said.fit, said.why_not), (false, Some(behind.to_string())));
    assert_eq!((said.paused, said.draining, said.peer.node), (Some(true), false, node.me.node));
    node.lease.set_fitness(Fitness { fit: true, ..Fitness::default() });
    assert!(described().await.fit);
    node.drain.cancel();
    let said = described().await;
    assert_eq!((said.fit, said.draining), (false, true));
    assert!(lock(&commanded.carried).is_empty(), "it only asks");
    commanded.end().await;

    // Also one whose primary is fixed, and one without a secret.
    let fixed = self::commanded(self::node(4, &SECRET, Role::Primary));
    let said = fixed.given(&asker(&SECRET), OperatorCommand::Describe).await.unwrap();
    assert!(matches!(said, CommandAnswer::Described(said) if said.role == Role::Primary && !said.fit));
    fixed.end().await;
}

#[tokio::test]
async fn nodes_that_can_not_obey_say_why() {
    let fixed = commanded(node(2, &SECRET, Role::Primary));
    assert!(refusal(fixed.given(&asker(&SECRET), HANDOFF).await).contains("fixed by configuration"));
    let open = commanded(leased(2, &[], Role::Replica));
    assert!(refusal(open.given(&asker(&[]), HANDOFF).await).contains("no secret"));
    let moved = commanded(leased(2, &SECRET, Role::Replica));
    moved.node.lease.set_fitness(Fitness { moved: true, ..Fitness::default() });
    let word = OperatorCommand::PromoteUnchecked;
    assert!(refusal(moved.given(&asker(&SECRET), word).await).contains("moved"));
    for commanded in [fixed, open, moved] {
        assert!(lock(&commanded.carried).is_empty());
        commanded.end().await;
    }
}

#[tokio::test]
async fn strangers_and_those_who_mean_another_node_are_told_apart() {
    let commanded = commanded(leased(2, &SECRET, Role::Replica));
    let to = commanded.listen().await;
    let (tracker, by) = (TaskTracker::new(), ("me", HANDOFF));
    let stranger = give(&asker(&[7; 32]), (&to, None), by, LIMIT, &tracker).await.unwrap_err();
    assert!(matches!(stranger, NoAnswer { sent: false, problem: PeerProblem::NotFound }), "{stranger:?}");
    let other = Asker { database: "other".into(), ..asker(&SECRET) };
    let other = give(&other, (&to, None), by, LIMIT, &tracker).await.unwrap_err();
    assert!(matches!(other, NoAnswer { sent: false, problem: PeerProblem::Database(_) }), "{other:?}");
    let meant = Some(NodeId::from_u128(3));
    let another = give(&asker(&SECRET), (&to, meant), by, LIMIT, &tracker).await.unwrap_err();
    assert!(matches!(another, NoAnswer { sent: false, problem: PeerProblem::AnotherNode(_) }), "{another:?}");
    assert!(lock(&commanded.carried).is_empty());
    commanded.end().await;
}

type Body = Channel<Bytes, std::io::Error>;

fn request(knock: &Knock, path: &str) -> (Sender<Bytes, std::io::Error>, Request<Body>) {
    let (sender, body) = Channel::new(4);
    let mut request = Request::new(body);
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = format!("/_replite{path}").parse().unwrap();
    *request.version_mut() = http::Version::HTTP_2;
    *request.headers_mut() = knock.headers(&keys(&SECRET)).unwrap();
    (sender, request)
}

fn nonce_of(headers: &HeaderMap, knock: &Knock) -> Nonce {
    Answer::read(headers, knock, &keys(&SECRET)).unwrap().unwrap().0.nonce
}

fn json() -> Vec<u8> {
    serde_json::to_vec(&GivenCommand { by: "me".into(), command: HANDOFF }).unwrap()
}

fn whole(knock: &Knock, nonce: &Nonce, json: &[u8]) -> Vec<u8> {
    [&handshake::prove_command(knock, nonce, json, &keys(&SECRET))[..], json].concat()
}

/// A fresh one: in the clear each holds once.
fn fresh() -> Knock {
    Knock::by(&asker(&SECRET), Binding::NONE).unwrap()
}

/// What comes of bodies that are made of the knock and the node's nonce. None: it breaks off.
async fn sent(
    service: &ReplicationService,
    path: &str,
    make: impl Fn(&Knock, &Nonce) -> Vec<u8>,
) -> Option<Bytes> {
    let knock = &fresh();
    let (mut sender, request) = request(knock, path);
    let response = service.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let nonce = nonce_of(response.headers(), knock);
    // Too much may not be taken.
    let _ = sender.send_data(make(knock, &nonce).into()).await;
    drop(sender);
    response.into_body().collect().await.ok().map(|body| body.to_bytes())
}

#[tokio::test(start_paused = true)]
async fn what_is_recorded_reflected_changed_cut_or_too_long_commands_nothing() {
    let commanded = commanded(leased(2, &SECRET, Role::Replica));
    let service = &commanded.service;
    let nothing = async |what: &str, make: &dyn Fn(&Knock, &Nonce) -> Vec<u8>| {
        assert_eq!(sent(service, COMMAND_PATH, make).await, None, "{what}: it breaks off");
        assert!(lock(&commanded.carried).is_empty(), "{what}");
    };
    nothing("nothing", &|_, _| Vec::new()).await;
    nothing("a recorded command", &|knock, _| whole(knock, &[0; 32], &json())).await;
    let before = fresh();
    nothing("one of another knock", &|_, nonce| whole(&before, nonce, &json())).await;
    nothing("a question how it stands", &|knock, nonce| {
        handshake::question(knock, nonce, &keys(&SECRET)).to_vec()
    })
    .await;
    nothing("a question's proof before a command", &|knock, nonce| {
        [handshake::question(knock, nonce, &keys(&SECRET)).to_vec(), json()].concat()
    })
    .await;
    nothing("an answer's proof", &|knock, nonce| {
        let proof = handshake::prove_command_answer(knock, nonce, &json(), &keys(&SECRET));
        [proof.to_vec(), json()].concat()
    })
    .await;
    nothing("another secret", &|knock, nonce| {
        [handshake::prove_command(knock, nonce, &json(), &keys(&[7; 32])).to_vec(), json()].concat()
    })
    .await;
    nothing("another command", &|knock, nonce| {
        let mut changed = whole(knock, nonce, &json());
        *changed.last_mut().unwrap() ^= 1;
        changed
    })
    .await;
    nothing("half of it", &|knock, nonce| whole(knock, nonce, &json())[..40].to_vec()).await;
    nothing("too much", &|_, _| vec![0; 1 << 20]).await;
    nothing("a long one that is proved", &|knock, nonce| {
        whole(knock, nonce, &[json(), vec![b' '; COMMAND_MAX_BYTES]].concat())
    })
    .await;
    // One that never sends it is not waited for.
    let (_sender, slow) = request(&fresh(), COMMAND_PATH);
    let response = service.clone().oneshot(slow).await.unwrap();
    assert!(response.into_body().collect().await.is_err());
    // Nor does a command pass for a question.
    let question = sent(service, STANDING_PATH, |knock, nonce| whole(knock, nonce, &json())).await;
    assert_eq!(question, None);
    let question = sent(service, STANDING_PATH, |knock, nonce| whole(knock, nonce, &[])).await;
    assert_eq!(question, None);
    // What is proved and makes no sense has an answer.
    let odd = b"{\"by\":1}";
    let said = sent(service, COMMAND_PATH, |knock, nonce| whole(knock, nonce, odd)).await.unwrap();
    assert!(String::from_utf8_lossy(&said).contains("does not know this command"));
    assert!(lock(&commanded.carried).is_empty());
    // And the whole one is carried out.
    let said = sent(service, COMMAND_PATH, |knock, nonce| whole(knock, nonce, &json())).await.unwrap();
    assert!(String::from_utf8_lossy(&said).contains("done"), "{said:?}");
    assert_eq!(*lock(&commanded.carried), [HANDOFF]);
    commanded.end().await;
}

#[tokio::test]
async fn a_command_runs_to_its_end_when_the_operator_is_gone_and_few_run_at_one_time() {
    let node = leased(2, &SECRET, Role::Replica);
    let (go, waits) = tokio::sync::watch::channel(false);
    let ended = Arc::new(Mutex::new(0));
    let (counts, me) = (ended.clone(), node.me.node);
    node.lease.commands.open(move |_| {
        let (mut waits, counts) = (waits.clone(), counts.clone());
        Box::pin(async move {
            let _ = waits.wait_for(|go| *go).await;
            *lock(&counts) += 1;
            Ok(me)
        })
    });
    let commanded = commanded(node);
    let (to, mut events) = (commanded.listen().await, commanded.node.events());
    let (asks, tracker) = (asker(&SECRET), TaskTracker::new());
    let mut given = tokio::task::JoinSet::new();
    for _ in 0..COMMANDS_MAX {
        let (asks, to, tracker) = (asks.clone(), to.clone(), tracker.clone());
        given.spawn(async move { give(&asks, (&to, None), ("me", HANDOFF), LIMIT, &tracker).await.is_ok() });
        tokio::time::timeout(LIMIT, events.recv()).await.unwrap().unwrap();
    }
    let more = give(&asks, (&to, None), ("me", HANDOFF), LIMIT, &tracker).await;
    assert!(refusal(more.map(|(_, answer)| answer)).contains("other commands"));
    // It says how it stands all the same.
    let said = give(&asks, (&to, None), ("me", OperatorCommand::Describe), LIMIT, &tracker).await;
    assert!(matches!(said, Ok((_, CommandAnswer::Described(_)))));
    given.shutdown().await;
    go.send_replace(true);
    tokio::time::timeout(LIMIT, async {
        while *lock(&ended) < COMMANDS_MAX {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("all of them end");
    commanded.end().await;
}

#[tokio::test]
async fn the_end_of_the_node_ends_a_command() {
    let node = leased(2, &SECRET, Role::Replica);
    node.lease.commands.open(|_| Box::pin(std::future::pending()));
    let commanded = commanded(node);
    let (to, asks) = (commanded.listen().await, asker(&SECRET));
    let tracker = TaskTracker::new();
    let mut events = commanded.node.events();
    let given = give(&asks, (&to, None), ("me", HANDOFF), LIMIT, &tracker);
    let ends = async {
        events.recv().await.unwrap();
        commanded.end().await;
    };
    let (given, ()) = tokio::join!(given, ends);
    match given {
        Ok((_, CommandAnswer::Refused { why })) => assert!(why.contains("shut down")),
        Err(NoAnswer { sent: true, .. }) => {}
        other => panic!("{other:?}"),
    }
}

/// What a node says to an operator, and what an operator says of itself, stands in logs and on
/// terminals.
#[test]
fn words_of_others_are_shown_in_one_bounded_line() {
    let evil = format!("a\nb\u{1b}[2J{}", "x".repeat(5000));
    let Ok(CommandAnswer::Refused { why }) = plain(refused(evil.clone())) else { panic!() };
    assert!(!why.contains('\n') && !why.contains('\u{1b}') && why.len() < 1100, "{why}");
    let mut described = describe(&leased(2, &SECRET, Role::Replica));
    described.problem = Some(evil.clone());
    match plain(CommandAnswer::Described(Box::new(described.clone()))) {
        Ok(CommandAnswer::Described(said)) => assert!(!said.problem.unwrap().contains('\n')),
        other => panic!("{other:?}"),
    }
    described.peer.addresses.app = evil;
    assert!(plain(CommandAnswer::Described(Box::new(described.clone()))).is_err());
    let json = encoded(CommandAnswer::Described(Box::new(Description {
        problem: Some("x".repeat(1000)),
        peer: crate::status::PeerInfo {
            addresses: Addresses::default().label("a", "y".repeat(20_000)),
            ..described.peer.clone()
        },
        ..described
    })));
    assert!(json.len() <= ANSWER_MAX_BYTES, "{}", json.len());
}
