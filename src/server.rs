//! The replication endpoint as a tower service.

mod body;
mod forwards;
#[cfg(test)]
mod tests;
mod tunnels;

use std::convert::Infallible;
use std::fmt;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Buf;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tower::Service;

use crate::channel::{Binding, Plaintext};
use crate::command::{self, COMMANDS_MAX};
use crate::context::NodeContext;
use crate::handshake::{
    self, Answer, COMMAND_PATH, Knock, MEMBERS_PATH, Nonce, Refusal, STANDING_PATH, STREAM_PATH, Stranger,
    TUNNEL_PATH, TunnelKnock,
};
use crate::members::MembersDoor;
#[cfg(feature = "members")]
use crate::members::PLACES_MAX;
use crate::net::{self, Answering, DoorGuest, DoorPlace, Guarded, Incoming, Pipe};
use crate::primary::{self, Peer, ReplicaServer, StreamSender};
use crate::proxy::AppDoor;
use crate::report::Condition;
use crate::secret::{Proved, Rights};
use crate::standing::{self, ASKING_MAX, AskingPeer};
use crate::status::Role;
use crate::threads::{aside, caught_task};

pub use body::ReplicationBody;
use forwards::{ConnectionService, Forwards};
use tunnels::Tunnels;

/// Through which door requests come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mount {
    /// The node's own listener; without a secret it is bound to a loopback address.
    Own,
    /// The application's server. Behind a reverse proxy every peer is a loopback one, so without a
    /// secret it serves no peer.
    Mounted,
}

/// Serves the replication stream to this database's replicas, answers the cluster's nodes that ask
/// how this one stands, and takes an operator's commands ([`operator`](crate::operator)). Mount it
/// in the application's server, such as by axum's `nest_service("/_replite", db.service())`; the
/// server must speak HTTP/2.
///
/// A peer that does not prove the cluster's secret gets an empty 404 for every path and method. All
/// else is said in TLS of the nodes' own, inside the bodies of one request and its response. So the
/// server may speak plain HTTP: other nodes dial it by an `http://` URL. A proxy between can't read
/// what they say. It has to pass both bodies on as they come, in HTTP/2.
///
/// ```
/// use axum::Router;
/// use replite::Db;
///
/// fn app(db: &Db, routes: Router) -> Router {
///     routes
///         .layer(db.replay_layer())
///         .nest_service("/_replite", db.service()) // after the layers, which leave it alone
/// }
/// # let _ = app;
/// ```
#[derive(Clone)]
pub struct ReplicationService {
    shared: Arc<ServerShared>,
    /// The private channel that requests come in; `None`: as the HTTP server has them.
    inside: Option<Binding>,
    /// That of the channel, if it is inside of a request, and of the connection around it.
    places: Vec<DoorPlace>,
    #[cfg_attr(not(feature = "members"), allow(dead_code, reason = "there are no members to ask"))]
    members: MembersDoor,
    /// Where the application's service is.
    app: AppDoor,
    /// Whether the connection is one for its requests; none where that can't be.
    forwards: Option<Arc<Forwards>>,
}

struct ServerShared {
    node: Arc<NodeContext>,
    replica_server: Arc<ReplicaServer>,
    tracker: TaskTracker,
    mount: Mount,
    warned: AtomicBool,
    /// Places for peers that ask how this node stands.
    asking: Arc<Semaphore>,
    /// Places for commands of operators.
    commanding: Arc<Semaphore>,
    tunnels: Arc<Tunnels>,
}

impl ReplicationService {
    /// A service for one door. Streams run as tasks of the tracker.
    pub(crate) fn new(
        node: Arc<NodeContext>,
        replica_server: Arc<ReplicaServer>,
        tracker: TaskTracker,
        mount: Mount,
    ) -> ReplicationService {
        let shared = ServerShared {
            node,
            replica_server,
            tracker,
            mount,
            warned: AtomicBool::new(false),
            asking: Arc::new(Semaphore::new(ASKING_MAX)),
            commanding: Arc::new(Semaphore::new(COMMANDS_MAX)),
            tunnels: Tunnels::new(),
        };
        ReplicationService {
            shared: Arc::new(shared),
            inside: None,
            places: Vec::new(),
            members: MembersDoor::default(),
            app: AppDoor::default(),
            forwards: None,
        }
    }

    /// The same, which also has those in that ask the members.
    pub(crate) fn with_members(self, members: MembersDoor) -> ReplicationService {
        ReplicationService { members, ..self }
    }

    /// The same, by which other nodes' requests get to the application, once its service was given.
    pub(crate) fn with_app(self, app: AppDoor) -> ReplicationService {
        ReplicationService { app, ..self }
    }

    /// What is served on a connection.
    pub(crate) fn on(&self, inside: Option<Binding>) -> ConnectionService {
        self.inside_of(inside, Vec::new())
    }

    fn inside_of(&self, inside: Option<Binding>, places: Vec<DoorPlace>) -> ConnectionService {
        let forwards = Arc::<Forwards>::default();
        let endpoint =
            ReplicationService { inside, places, forwards: Some(forwards.clone()), ..self.clone() };
        ConnectionService::new(endpoint, forwards)
    }

    fn answer<B>(&self, request: Request<B>) -> Response<ReplicationBody>
    where
        B: Body + Send + 'static,
    {
        let ServerShared { node, mount, .. } = &*self.shared;
        if node.keys.is_open() && *mount == Mount::Mounted {
            if !self.shared.warned.swap(true, Ordering::Relaxed) {
                node.report(Condition::EndpointWithoutSecret);
            }
            return not_found();
        }
        let answered = if self.inside.is_none() && request.uri().path().ends_with(TUNNEL_PATH) {
            let head = TunnelKnock::read(request.headers(), &node.keys);
            // One that was recorded is no head.
            let head = head.and_then(|head| self.shared.tunnels.used().first(head.nonce()).map(|()| head));
            head.map(|head| self.tunnel(request, &head))
        } else {
            let knock = Knock::read(request.headers(), &node.keys, self.inside.unwrap_or(Binding::NONE));
            // Nor is one that was recorded in the clear a knock.
            let knock = knock.and_then(|knock| match self.inside {
                Some(_) => Ok(knock),
                None => self.shared.tunnels.knocks().first(&knock.0.nonce).map(|()| knock),
            });
            knock.map(|(knock, proved)| self.admitted(request, knock, proved))
        };
        match answered {
            Ok(Ok(response)) => response,
            Ok(Err(refusal)) => {
                tracing::debug!(?refusal, "refused a peer");
                let mut response = Response::new(ReplicationBody::empty());
                *response.status_mut() = refusal.status();
                *response.headers_mut() = refusal.headers();
                response
            }
            Err(stranger) => {
                // What this node says to its operator, the stranger does not see.
                if let Stranger::OtherSecret(claimed) = stranger {
                    let key = self.inside.and_then(|binding| binding.client());
                    aside(|| node.other_secret(claimed, key));
                }
                not_found()
            }
        }
    }

    /// Begins a private channel inside of a request and its response.
    fn tunnel<B>(
        &self,
        request: Request<B>,
        knock: &TunnelKnock,
    ) -> Result<Response<ReplicationBody>, Refusal>
    where
        B: Body + Send + 'static,
    {
        if request.method() != Method::POST {
            return Err(Refusal::Path);
        }
        self.check_protocol(knock.version, request.version())?;
        let ServerShared { node, tracker, tunnels, .. } = &*self.shared;
        if !node.channel.has_tls() {
            return Err(Refusal::Plaintext);
        }
        if node.stop.is_cancelled() {
            return Err(Refusal::Stopping);
        }
        let place = tunnels.begin(knock.node())?;
        let answering = answering(&request);
        let places: Vec<_> = request.extensions().get().cloned().into_iter().chain([place.clone()]).collect();
        let (pipe, body) = Pipe::answering(Incoming::new(request.into_body()));
        let (door, of) = (self.clone(), tracker.clone());
        let (channel, stop) = (node.channel.clone(), node.stop.clone());
        tracker.spawn(async move {
            let service = |inside| door.inside_of(inside, places.clone());
            tokio::select! {
                () = net::serve_private(Guarded::new(pipe, &place), channel, service, of, stop) => {}
                () = place.lost() => tracing::debug!("a channel in which nothing was proved is cut"),
            }
            drop(answering);
        });
        let mut response = Response::new(ReplicationBody::channel(body));
        handshake::of_stream(response.headers_mut());
        Ok(response)
    }

    /// Whether a peer that is not inside a private channel may be served. Where only this machine's
    /// own may, an application's server can't tell.
    fn check_private(&self) -> Result<(), Refusal> {
        let allowed = match self.shared.node.channel.plaintext() {
            None => false,
            Some(Plaintext::Loopback) => self.shared.mount == Mount::Own,
            Some(Plaintext::AnyNetwork) => true,
        };
        if self.inside.is_some() || allowed { Ok(()) } else { Err(Refusal::Private) }
    }

    /// The answer to a peer that proved a secret.
    fn admitted<B>(
        &self,
        request: Request<B>,
        knock: Knock,
        proved: Proved,
    ) -> Result<Response<ReplicationBody>, Refusal>
    where
        B: Body + Send + 'static,
    {
        self.check_private()?;
        let of_connection = request.extensions().get();
        let forwards = self.inside.is_some_and(|binding| binding.is_for_forwards());
        let guest = DoorGuest::of(proved.rights(), forwards);
        if !self.places.iter().chain(of_connection).all(|place| place.proved(guest)) {
            return Err(Refusal::Busy);
        }
        let answering = answering(&request);
        let path = request.uri().path();
        // Such a connection has other limits, and nothing else is said on it.
        if forwards {
            return self.begin_forwards(request, knock, proved, answering);
        }
        let (streams, commands) = (path.ends_with(STREAM_PATH), path.ends_with(COMMAND_PATH));
        let (asks, members) = (commands || path.ends_with(STANDING_PATH), path.ends_with(MEMBERS_PATH));
        if !(streams || asks || members) || request.method() != Method::POST {
            return Err(Refusal::Path);
        }
        self.check(&knock, request.version())?;
        if commands && proved.rights() == Rights::Follower {
            return Err(Refusal::Follower);
        }
        if members {
            return self.ask_members(request, knock, proved, answering);
        }
        let ServerShared { node, replica_server, tracker, .. } = &*self.shared;
        let node = node.clone();
        if asks {
            let (peer, (sender, response)) = self.let_ask(knock, proved, &self.shared.asking, ASKING_MAX)?;
            let upstream = Incoming::new(request.into_body());
            let commanding = commands.then(|| self.shared.commanding.clone());
            tracker.spawn(async move {
                let asking = peer.knock.node;
                let answered = async {
                    match commanding {
                        Some(places) => command::answer(node.clone(), peer, upstream, sender, places).await,
                        None => standing::answer(node.clone(), peer, upstream, sender).await,
                    }
                };
                // The peer sees an answer that broke off.
                if let Err(error) = caught_task("an answer", answered).await {
                    node.report_aside(Condition::StreamPanicked { node: asking, error: &error });
                }
                drop(answering);
            });
            return Ok(response);
        }
        let (peer, (sender, response)) = self.admit(knock, proved)?;
        let (upstream, replica) = (Incoming::new(request.into_body()), peer.knock.node);
        let stream = primary::serve(replica_server.clone(), peer, upstream, sender);
        tracker.spawn(async move {
            // The replica sees a stream that broke off, and comes again.
            if let Err(error) = caught_task("a replica's stream", stream).await {
                node.report_aside(Condition::StreamPanicked { node: replica, error: &error });
            }
            drop(answering);
        });
        Ok(response)
    }

    /// Lets a peer in that asks the members, if this node is one of those that know them.
    #[cfg(feature = "members")]
    fn ask_members<B>(
        &self,
        request: Request<B>,
        knock: Knock,
        proved: Proved,
        answering: Option<Answering>,
    ) -> Result<Response<ReplicationBody>, Refusal>
    where
        B: Body + Send + 'static,
    {
        let door = &self.members;
        let (Some(member), Some(places), Some(shared)) = (door.get(), door.places(), door.shared()) else {
            return Err(Refusal::Path);
        };
        let runtime = member.runtime().ok_or(Refusal::Busy)?.clone();
        let (peer, (sender, response)) = self.let_ask(knock, proved, places, PLACES_MAX)?;
        let (member, shared) = (member.clone(), shared.clone());
        let upstream = Incoming::new(request.into_body());
        let (node, mounted) = (self.shared.node.clone(), self.shared.mount == Mount::Mounted);
        runtime.spawn(async move {
            let asking = peer.knock.node;
            let served = async {
                tokio::select! {
                    () = crate::members::serve(member, peer, shared, upstream, sender) => {}
                    // The application's server waits for its connections.
                    () = node.drain.cancelled(), if mounted => {}
                }
            };
            if let Err(error) = caught_task("an answer", served).await {
                node.report_aside(Condition::StreamPanicked { node: asking, error: &error });
            }
            drop(answering);
        });
        Ok(response)
    }

    #[cfg(not(feature = "members"))]
    fn ask_members<B>(
        &self,
        _: Request<B>,
        _: Knock,
        _: Proved,
        _: Option<Answering>,
    ) -> Result<Response<ReplicationBody>, Refusal> {
        Err(Refusal::Path)
    }

    /// What any peer that proved the secret must be.
    fn check(&self, knock: &Knock, version: Version) -> Result<(), Refusal> {
        let node = &self.shared.node;
        self.check_protocol(knock.version, version)?;
        if knock.cluster != node.cluster {
            return Err(Refusal::Cluster(node.cluster.clone()));
        }
        if knock.database != node.database {
            return Err(Refusal::Database);
        }
        Ok(())
    }

    fn check_protocol(&self, spoken: u32, version: Version) -> Result<(), Refusal> {
        if spoken != handshake::VERSION {
            return Err(Refusal::Version);
        }
        if version < Version::HTTP_2 {
            return Err(Refusal::Http2);
        }
        Ok(())
    }

    /// Lets a peer ask how this node stands, or an operator give a command. What this node does is
    /// no matter.
    fn let_ask(
        &self,
        knock: Knock,
        proved: Proved,
        asking: &Arc<Semaphore>,
        most: usize,
    ) -> Result<(AskingPeer, (StreamSender, Response<ReplicationBody>)), Refusal> {
        let ServerShared { node, .. } = &*self.shared;
        if knock.node == node.me.node {
            return Err(Refusal::DuplicateNode(node.channel.key()));
        }
        if proved.rights() == Rights::Follower && asking.available_permits() <= most / 2 {
            return Err(Refusal::Busy);
        }
        let place = asking.clone().try_acquire_owned().map_err(|_| Refusal::Busy)?;
        let (nonce, opened) = self.open(&knock, proved)?;
        Ok((AskingPeer { knock, nonce, place }, opened))
    }

    /// Lets a replica in, if this node is the primary and has room.
    fn admit(
        &self,
        knock: Knock,
        proved: Proved,
    ) -> Result<(Peer, (StreamSender, Response<ReplicationBody>)), Refusal> {
        let ServerShared { node, replica_server, .. } = &*self.shared;
        if node.drain.is_cancelled() || node.roles.borrow().role == Role::Stopped {
            return Err(Refusal::Stopping);
        }
        if !replica_server.serves() || node.is_superseded() {
            let state = node.roles.borrow();
            let primary = state.primary.as_ref().filter(|primary| primary.node != node.me.node);
            return Err(Refusal::NotPrimary(primary.map(|p| p.addresses.replication.clone())));
        }
        if let Some(conflict) = replica_server.conflict(&knock, proved.rights()) {
            replica_server.refused(&knock, conflict.words(knock.binding.client()));
            return Err(Refusal::DuplicateNode(conflict.key));
        }
        let place = replica_server.place(proved.rights()).ok_or(Refusal::Busy)?;
        let (nonce, opened) = self.open(&knock, proved)?;
        Ok((Peer { knock, nonce, proved, place }, opened))
    }

    /// Answers a knock, by the secret that it was proved with: a response whose body is still to
    /// come, and its nonce.
    fn open(
        &self,
        knock: &Knock,
        proved: Proved,
    ) -> Result<(Nonce, (StreamSender, Response<ReplicationBody>)), Refusal> {
        let node = &self.shared.node;
        let unable = |error| {
            node.report(Condition::KnockNotAnswered { error: &error });
            Refusal::Busy
        };
        let nonce = handshake::nonce().map_err(unable)?;
        let answer = Answer { node: node.me.node, incarnation: node.me.incarnation, nonce };
        let headers = answer.headers(knock, &node.keys.towards(proved)).map_err(unable)?;
        let (sender, body) = ReplicationBody::stream();
        let mut response = Response::new(body);
        *response.headers_mut() = headers;
        Ok((nonce, (sender, response)))
    }
}

impl fmt::Debug for ReplicationService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplicationService").field("door", &self.shared.mount).finish_non_exhaustive()
    }
}

impl<B> Service<Request<B>> for ReplicationService
where
    B: Body + Send + 'static,
    B::Data: Buf,
{
    type Response = Response<ReplicationBody>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        ready(Ok(self.answer(request)))
    }
}

/// What says that a request is being answered, where the node's own listener asks.
fn answering<B>(request: &Request<B>) -> Option<Answering> {
    request.extensions().get().cloned()
}

/// All that a stranger ever sees.
fn not_found() -> Response<ReplicationBody> {
    let mut response = Response::new(ReplicationBody::empty());
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}
