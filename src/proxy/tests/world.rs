//! Nodes without a database, servers around them, and a client.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::channel::{Channel, Sender};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::checksum::Checksum;
use crate::context::{EpochsHeard, LeaseContext, NodeContext, RoleChange, SyncedClock, ToDisk};
pub(super) use crate::ends::comes;
use crate::fence::boot_time;
use crate::keys::DatabaseKeys;
use crate::peer::{Incarnation, NodeId};
use crate::proxy::ReplayLayer;
use crate::proxy::hop::Hop;
use crate::secret::{Keyring, Secret};
use crate::status::{Addresses, PeerInfo, Role, RoleState};
use crate::txid::{Epoch, EpochHistory, EpochStart, Position, Txid};

pub(super) fn peer(id: u128, app: &str) -> PeerInfo {
    let addresses = Addresses { app: app.into(), ..Addresses::default() };
    PeerInfo { node: NodeId::from_u128(id), incarnation: Incarnation::NIL, addresses }
}

pub(super) fn epoch(number: u64) -> Epoch {
    Epoch::new(number, number)
}

pub(super) fn txid(number: u64) -> Txid {
    Txid::new(epoch(1), number)
}

pub(super) fn at(number: u64) -> Position {
    Position::new(txid(number), Checksum::EMPTY)
}

/// A node at transaction 10 of epoch 1.
pub(super) fn node(id: u128, role: Role) -> Arc<NodeContext> {
    node_of(peer(id, ""), role)
}

pub(super) fn node_of(me: PeerInfo, role: Role) -> Arc<NodeContext> {
    with_lease(me, role, LeaseContext::fixed())
}

/// The same of one that may lead by a lease.
pub(super) fn leased(me: PeerInfo, role: Role) -> Arc<NodeContext> {
    let synced = SyncedClock::new(None, Duration::from_secs(10), ToDisk::nowhere());
    with_lease(me, role, LeaseContext::leased(synced, EpochsHeard::new(0, ToDisk::nowhere())))
}

fn with_lease(me: PeerInfo, role: Role, lease: LeaseContext) -> Arc<NodeContext> {
    with_keys(me, role, lease, Keyring::new(&[Secret::fixed([7; 32])]).unwrap())
}

/// The same as [`node`] for another database.
pub(super) fn node_in(database: &str, id: u128, role: Role) -> Arc<NodeContext> {
    let keys = Keyring::new(&[Secret::fixed([7; 32])]).unwrap();
    of_database(database, peer(id, ""), role, LeaseContext::fixed(), keys)
}

/// A follower, which has no secret of the others.
pub(super) fn follower(id: u128) -> Arc<NodeContext> {
    let keys = Keyring::with_followers(&[], &[Secret::fixed([8; 32])]).unwrap();
    with_keys(peer(id, ""), Role::Replica, LeaseContext::fixed(), keys)
}

fn with_keys(me: PeerInfo, role: Role, lease: LeaseContext, keys: Keyring) -> Arc<NodeContext> {
    of_database("app", me, role, lease, keys)
}

fn of_database(
    database: &str,
    me: PeerInfo,
    role: Role,
    lease: LeaseContext,
    keys: Keyring,
) -> Arc<NodeContext> {
    let (keys, name) = ((keys, crate::channel::Channel::open()), database.into());
    let node = NodeContext::new(me, "c".into(), name, keys, role, lease, DatabaseKeys::fixed(7));
    let mut history = EpochHistory::default();
    history.push(EpochStart { epoch: epoch(1), first: 1, before: Checksum::EMPTY });
    node.applied.replace(history, Some(at(10)));
    if role == Role::Primary {
        node.change_role(RoleChange::Leads { me: node.me.clone(), epoch: epoch(1) });
    }
    node
}

/// Tells a node who the primary is.
pub(super) fn follow(node: &NodeContext, number: u64, primary: Option<PeerInfo>) {
    node.roles.send_modify(|state| {
        *state = RoleState {
            role: Role::Replica,
            epoch: epoch(number),
            primary,
            primary_key: None,
            waits_for: None,
        }
    });
}

/// A hop of another node, which knows nothing of the client.
pub(super) fn hop_of(from: u128, number: u64) -> Hop {
    let (client, scheme, taken_by) = (None, None, None);
    Hop { count: 1, from: NodeId::from_u128(from), epoch: epoch(number), client, scheme, taken_by }
}

/// A replica that goes by a lease.
pub(super) fn elector(id: u128) -> Arc<NodeContext> {
    elector_as(peer(id, ""))
}

pub(super) fn elector_as(me: PeerInfo) -> Arc<NodeContext> {
    let node = leased(me, Role::Replica);
    node.lease.set_time(Duration::from_secs(2));
    node.roles.send_modify(|state| state.epoch = epoch(1));
    node
}

/// Makes it the primary of an epoch, as the election does.
pub(super) fn lead(node: &NodeContext, number: u64) {
    let mut history = (*node.applied.history()).clone();
    let position = node.applied.position().unwrap();
    if number > history.epoch().number() {
        let start =
            EpochStart { epoch: epoch(number), first: position.number() + 1, before: Checksum::EMPTY };
        history.push(start);
    }
    node.applied.lead(history, position);
    node.fence.set(boot_time() + LONG);
    node.change_role(RoleChange::Leads { me: node.me.clone(), epoch: epoch(number) });
}

/// It has no primary, and does this about it.
pub(super) fn stand(node: &NodeContext, role: Role) {
    node.change_role(RoleChange::Stands { role, waits_for: None });
}

/// It is about to hand its lease over. [`lead`] takes it back.
pub(super) fn yields(node: &NodeContext) {
    node.change_role(RoleChange::Yields);
}

/// An app server that is told where it listens before its node is made.
pub(super) struct Unstarted(std::net::TcpListener);

impl Unstarted {
    pub(super) fn new() -> Unstarted {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Unstarted(listener)
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.0.local_addr().unwrap())
    }

    pub(super) fn start(self, app: Router) -> Server {
        Server::on(TcpListener::from_std(self.0).unwrap(), app)
    }
}

/// Its lease ends.
pub(super) fn fence(node: &NodeContext) {
    node.fence.close();
    stand(node, Role::Fencing);
}

pub(super) async fn held(node: &NodeContext) {
    comes("a request that is held", || node.roles.receiver_count() > 0).await;
}

pub(super) struct Server {
    pub(super) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    pub(super) async fn start(app: Router) -> Server {
        Server::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), app)
    }

    fn on(listener: TcpListener, app: Router) -> Server {
        let address = listener.local_addr().unwrap();
        let app = app.into_make_service_with_connect_info::<SocketAddr>();
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Server { address, task }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A primary with this app, and a replica in front of it with another.
pub(super) struct Pair {
    pub(super) primary: Server,
    pub(super) primary_node: Arc<NodeContext>,
    pub(super) replica: Server,
    pub(super) replica_node: Arc<NodeContext>,
}

impl Pair {
    pub(super) async fn new(
        primary_app: Router,
        replica_app: Router,
        options: impl FnOnce(ReplayLayer) -> ReplayLayer,
    ) -> Pair {
        let primary_node = node(1, Role::Primary);
        let primary = Server::start(primary_app.layer(ReplayLayer::new(primary_node.clone()))).await;
        let replica_node = node(2, Role::Replica);
        follow(&replica_node, 1, Some(peer(1, &primary.url())));
        let layer = options(ReplayLayer::new(replica_node.clone()));
        let replica = Server::start(replica_app.layer(layer)).await;
        Pair { primary, primary_node, replica, replica_node }
    }

    pub(super) fn get(&self, path: &str) -> http::request::Builder {
        Request::get(format!("{}{path}", self.replica.url()))
    }

    pub(super) fn post(&self, path: &str) -> http::request::Builder {
        Request::post(format!("{}{path}", self.replica.url()))
    }
}

/// A replica that follows what listens at the address, with an app that answers `here`.
pub(super) async fn replica_of(
    url: &str,
    options: impl FnOnce(ReplayLayer) -> ReplayLayer,
) -> (Server, Arc<NodeContext>) {
    let node = node(2, Role::Replica);
    follow(&node, 1, (!url.is_empty()).then(|| peer(1, url)));
    let app = Router::new().fallback(|| async { "here" });
    (Server::start(app.layer(options(ReplayLayer::new(node.clone())))).await, node)
}

pub(super) type TestBody = UnsyncBoxBody<Bytes, Infallible>;

pub(super) fn full(data: impl Into<Bytes>) -> TestBody {
    Full::new(data.into()).boxed_unsync()
}

/// A body that the test sends piece by piece.
pub(super) fn piecewise() -> (Sender<Bytes, Infallible>, TestBody) {
    let (sender, body) = Channel::new(4);
    (sender, body.boxed_unsync())
}

pub(super) async fn push(sender: &mut Sender<Bytes, Infallible>, data: &'static str) {
    sender.send(Frame::data(Bytes::from_static(data.as_bytes()))).await.unwrap();
}

/// One request over a connection of its own.
pub(super) async fn send(request: Request<TestBody>) -> Response<Incoming> {
    let client: Client<HttpConnector, TestBody> = Client::builder(TokioExecutor::new()).build_http();
    tokio::time::timeout(LONG, client.request(request)).await.unwrap().unwrap()
}

pub(super) async fn text<B: http_body::Body<Error: std::fmt::Debug>>(response: Response<B>) -> String {
    let bytes = tokio::time::timeout(LONG, response.into_body().collect()).await.unwrap().unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub(super) async fn next<B>(body: &mut B) -> Option<Bytes>
where
    B: http_body::Body<Data = Bytes, Error: std::fmt::Debug> + Unpin,
{
    tokio::time::timeout(LONG, body.frame()).await.unwrap().map(|f| f.unwrap().into_data().unwrap())
}

#[track_caller]
pub(super) fn is<B>(response: &Response<B>, status: u16, outcome: &str) {
    assert_eq!(response.status().as_u16(), status);
    assert_eq!(response.headers()["replite-outcome"], outcome);
    assert_eq!(response.headers().contains_key("retry-after"), status == 503);
}

/// An app that says what it got: method, URI, headers, body.
pub(super) async fn mirror(request: Request<Body>) -> String {
    let (parts, body) = request.into_parts();
    let mut text = format!("{} {}\n", parts.method, parts.uri);
    for (name, value) in &parts.headers {
        text.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
    }
    let body = body.collect().await.unwrap();
    text.push('\n');
    text.push_str(&String::from_utf8_lossy(&body.to_bytes()));
    text
}

/// Longer than anything here takes; a test that gets there has failed.
pub(super) const LONG: Duration = Duration::from_secs(20);
/// A limit that is meant to pass.
pub(super) const SHORT: Duration = Duration::from_millis(60);
