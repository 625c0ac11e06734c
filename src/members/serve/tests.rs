use std::convert::Infallible;
use std::future::poll_fn;

use http_body_util::channel::{Channel, Sender};
use tokio::task::JoinHandle;

use super::*;
use crate::channel::Binding;
use crate::context::{LeaseContext, NodeContext};
use crate::ends::comes;
use crate::files::Paths;
use crate::handshake::Knock;
use crate::members::MembersConfig;
use crate::peer::{Incarnation, NodeId};
use crate::primary::fake::{KEYS, SECRET};
use crate::primary::{StreamReceiver, queue};
use crate::secret::{Keyring, Secret};
use crate::status::{Addresses, PeerInfo, Role};

/// Nothing takes so long.
const LIMIT: Duration = Duration::from_secs(20);
const FOLLOWERS: [u8; 32] = [2; 32];
const NONCES: [[u8; 32]; 2] = [[3; 32], [4; 32]];

/// A node that keeps no record, and says so to all that ask.
fn asked(directory: &std::path::Path) -> Arc<MemberNode> {
    let me = PeerInfo {
        node: NodeId::from_u128(1),
        incarnation: Incarnation::from_u128(2),
        addresses: Addresses { replication: "http://127.0.0.1:1".into(), ..Addresses::default() },
    };
    let keys = Keyring::with_followers(&[Secret::fixed(SECRET)], &[Secret::fixed(FOLLOWERS)]).unwrap();
    let channel = (keys, crate::channel::Channel::open());
    let lease = LeaseContext::fixed();
    let node = NodeContext::new(me, "test".into(), "app".into(), channel, Role::Replica, lease, KEYS);
    let lease_time = Duration::from_secs(10);
    let config = MembersConfig { list: vec![], witness: false, mounted: false, lease_time };
    MemberNode::open(node, &Paths::new(directory.join("app.db")), config).unwrap()
}

/// One connection of a peer.
struct Asking {
    sender: Sender<Bytes, Infallible>,
    answers: StreamReceiver,
    frames: AskFrames,
    served: JoinHandle<()>,
}

impl Asking {
    async fn begin(member: &Arc<MemberNode>, guests: &Arc<Semaphore>, keys: &Keyring) -> Asking {
        let long = Arc::new(Semaphore::new(crate::members::door::LONG_MAX_BYTES));
        Asking::begin_in(member, &SharedRoom { guests: guests.clone(), long }, keys).await
    }

    async fn begin_in(member: &Arc<MemberNode>, shared: &SharedRoom, keys: &Keyring) -> Asking {
        let [nonce, answer] = NONCES;
        let knock = Knock {
            version: handshake::VERSION,
            cluster: "test".into(),
            database: "app".into(),
            node: NodeId::from_u128(9),
            incarnation: Incarnation::from_u128(9),
            nonce,
            binding: Binding::NONE,
        };
        let proof = handshake::prove_members(&knock, &answer, keys);
        let (mut sender, body) = Channel::<Bytes, Infallible>::new(4);
        sender.send_data(Bytes::copy_from_slice(&proof)).await.unwrap();
        let (answering, answers) = queue();
        let place = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        let peer = AskingPeer { knock, nonce: answer, place };
        let served = serve(member.clone(), peer, shared.clone(), Incoming::new(body), answering);
        Asking { sender, answers, frames: AskFrames::default(), served: tokio::spawn(served) }
    }

    /// The answer to this; none where the connection ends instead.
    async fn ask(&mut self, ask: &Ask) -> Option<MemberAnswer> {
        let _ = self.sender.send_data(words::frame(7, ask).unwrap()).await;
        self.answered().await
    }

    async fn answered(&mut self) -> Option<MemberAnswer> {
        let answer = async {
            loop {
                if let Some(json) = self.frames.next().unwrap() {
                    return Some(words::read::<MemberAnswer>(&json).unwrap().1);
                }
                let bytes = poll_fn(|context| self.answers.poll_next(context)).await?;
                self.frames.push(&bytes.ok()?);
            }
        };
        timeout(LIMIT, answer).await.expect("it is answered, or ends")
    }

    /// It was told all, and the connection ended.
    async fn has_ended(mut self) {
        let end = timeout(LIMIT, poll_fn(|context| self.answers.poll_next(context))).await.unwrap();
        assert!(end.is_none(), "it broke off");
        timeout(LIMIT, self.served).await.unwrap().unwrap();
    }
}

/// One of Raft's own questions.
fn vote() -> Ask {
    let vote = openraft::Vote::new(1, 1);
    Ask::Vote { to: 1, rpc: openraft::raft::VoteRequest { vote, last_log_id: None } }
}

fn unable(said: Option<MemberAnswer>, part: &str) {
    assert!(matches!(&said, Some(MemberAnswer::Unable { why, .. }) if why.contains(part)), "{said:?}");
}

#[tokio::test]
async fn what_a_follower_asks_is_short() {
    let dir = tempfile::tempdir().unwrap();
    let (member, guests) = (asked(dir.path()), Arc::new(Semaphore::new(9)));
    let own = crate::primary::fake::keys(&SECRET);
    let followers = Keyring::with_followers(&[], &[Secret::fixed(FOLLOWERS)]).unwrap();
    let long = || Ask::Change {
        change: crate::members::MemberChange::Add { url: "a".repeat(FOLLOWERS_MAX_BYTES) },
        passed: true,
    };
    let mut follower = Asking::begin(&member, &guests, &followers).await;
    unable(follower.ask(&Ask::Read).await, "no member");
    unable(follower.ask(&Ask::Introduce).await, "may only read");
    unable(follower.ask(&vote()).await, "may only read");
    assert!(follower.ask(&long()).await.is_none(), "the connection ends");
    assert_eq!(guests.available_permits(), 9, "so does its place");
    let mut peer = Asking::begin(&member, &guests, &own).await;
    assert!(peer.ask(&long()).await.is_some());
}

/// What members say can be long, and one that says much of it at once takes no more memory for it.
#[tokio::test]
async fn long_questions_wait_for_room_and_short_ones_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let (member, keys) = (asked(dir.path()), crate::primary::fake::keys(&SECRET));
    let [guests, long] = [9, LONG_BYTES].map(|room| Arc::new(Semaphore::new(room)));
    let shared = SharedRoom { guests, long };
    let mut json = words::frame(7, &vote()).unwrap()[4..].to_vec();
    json.resize(LONG_BYTES + 1, b' ');
    let frame = [&(json.len() as u32).to_le_bytes()[..], &json].concat();
    let mut one = Asking::begin_in(&member, &shared, &keys).await;
    one.sender.send_data(frame.into()).await.unwrap();
    let mut other = Asking::begin_in(&member, &shared, &keys).await;
    unable(other.ask(&vote()).await, "no member");
    let waits = timeout(Duration::from_millis(50), one.answered()).await;
    assert!(waits.is_err(), "there is no room");
    shared.long.add_permits(1);
    unable(one.answered().await, "no member");
    comes("the room is given back", || shared.long.available_permits() == LONG_BYTES + 1).await;
}

#[tokio::test]
async fn guests_without_a_place_are_answered_once_and_members_need_none() {
    let dir = tempfile::tempdir().unwrap();
    let (member, guests) = (asked(dir.path()), Arc::new(Semaphore::new(1)));
    let keys = crate::primary::fake::keys(&SECRET);
    let begin = || Asking::begin(&member, &guests, &keys);
    let mut first = begin().await;
    for _ in 0..2 {
        unable(first.ask(&Ask::Read).await, "no member");
    }
    let mut second = begin().await;
    unable(second.ask(&Ask::Read).await, "no member");
    second.has_ended().await;
    let mut raft = begin().await;
    for ask in [vote(), Ask::Read, vote()] {
        unable(raft.ask(&ask).await, "no member");
    }
    // One that turns out to be a member leaves its place.
    unable(first.ask(&vote()).await, "no member");
    let mut third = begin().await;
    for _ in 0..2 {
        unable(third.ask(&Ask::Read).await, "no member");
    }
}
