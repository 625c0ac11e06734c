//! How Raft's own messages go to the other members.
//!
//! A member whose Raft directory is one of before has not what it once said to have. The leader
//! knows that of those that went back while it leads. It counts no answer of theirs any more, and
//! tells them, so that they stop.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::error::{
    Fatal, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{Snapshot, Vote};
use tokio::time::Instant;

use crate::context::NodeContext;
use crate::lock::lock;
use crate::members::link::MemberLinks;
use crate::members::quiet::say;
use crate::members::types::{Member, TypeConfig};
use crate::members::words::{Ask, MemberAnswer};
use crate::report::Condition;

/// What members said to have, in the term of this leader.
#[derive(Debug, Default)]
pub(super) struct Acknowledged {
    term: u64,
    /// The index up to which each has the log.
    have: BTreeMap<u64, u64>,
    /// Those that have less than they said.
    went_back: BTreeSet<u64>,
}

impl Acknowledged {
    fn of_term(&mut self, term: u64) -> &mut Acknowledged {
        if self.term != term {
            *self = Acknowledged { term, ..Acknowledged::default() };
        }
        self
    }

    /// A member has the log up to there.
    fn has(&mut self, (term, member): (u64, u64), index: u64) {
        let most = self.of_term(term).have.entry(member).or_insert(index);
        *most = index.max(*most);
    }

    /// What a member answers to entries after `prev`, the last of which is `last`. Whether it had
    /// more before.
    fn hear(
        &mut self,
        (term, member): (u64, u64),
        (prev, last): (Option<u64>, Option<u64>),
        said: &AppendEntriesResponse<u64>,
    ) -> bool {
        let have = match said {
            AppendEntriesResponse::Success => last,
            AppendEntriesResponse::PartialSuccess(id) => id.as_ref().map(|id| id.index),
            AppendEntriesResponse::Conflict => {
                let known = self.of_term(term);
                let had = known.have.get(&member);
                let back = prev.zip(had.copied()).is_some_and(|(prev, had)| prev <= had);
                if back {
                    known.went_back.insert(member);
                }
                return back;
            }
            AppendEntriesResponse::HigherVote(_) => None,
        };
        if let Some(have) = have {
            self.has((term, member), have);
        }
        false
    }
}

/// Makes what speaks with one member.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) node: Arc<NodeContext>,
    pub(super) acknowledged: Arc<Mutex<Acknowledged>>,
    pub(crate) links: Arc<MemberLinks>,
    /// Between two tries to reach a member that is away. One that comes back waits no longer for
    /// its leader than for the next heartbeat: else it would begin an election.
    pub(crate) pause: Duration,
    /// Since when members do not answer this leader, and whether that was said.
    pub(super) away: Arc<Mutex<BTreeMap<u64, (Instant, bool)>>>,
    /// After so long it is said.
    pub(super) patience: Duration,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = ToMember;

    async fn new_client(&mut self, target: u64, node: &Member) -> ToMember {
        ToMember { network: self.clone(), to: target, url: node.url.clone() }
    }
}

/// Speaks with one member. It names the member's id: who has another one by now refuses.
pub(crate) struct ToMember {
    network: Network,
    to: u64,
    url: String,
}

/// Why a member does not do what it is asked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct RpcRefused(String);

impl ToMember {
    async fn say(&self, ask: Ask) -> Result<MemberAnswer, Unreachable> {
        let unreachable = |why| Unreachable::new(&RpcRefused(why));
        match self.network.links.ask(&self.url, &ask).await {
            Ok(MemberAnswer::Unable { why, .. }) => Err(unreachable(format!("{}: {why}", self.url))),
            Ok(said) => Ok(said),
            Err(unanswered) => Err(unreachable(unanswered.why)),
        }
    }

    /// Notes whether the member answers, and says when that changed for more than a moment.
    fn answers(&self, problem: Option<&Unreachable>) {
        let mut away = lock(&self.network.away);
        let (node, url) = (self.network.node.clone(), self.url.clone());
        let Some(problem) = problem else {
            if away.remove(&self.to).is_some_and(|(_, said)| said) {
                say(move || node.report_aside(Condition::MemberIsBack { url: &url }));
            }
            return;
        };
        let (since, said) = away.entry(self.to).or_insert_with(|| (Instant::now(), false));
        if !*said && since.elapsed() > self.network.patience {
            *said = true;
            let why = problem.to_string();
            say(move || node.report_aside(Condition::MemberAway { url: &url, why: &why }));
        }
    }

    /// It has all of the log up to a snapshot's end, if it took that.
    fn installed(&self, vote: &Vote<u64>, index: Option<u64>, said: &SnapshotResponse<u64>) {
        if let Some(index) = index.filter(|_| said.vote == *vote) {
            lock(&self.network.acknowledged).has((vote.leader_id.term, self.to), index);
        }
    }

    /// Says nothing to one that went back.
    fn not_back(&self, term: u64) -> Result<(), Unreachable> {
        match lock(&self.network.acknowledged).of_term(term).went_back.contains(&self.to) {
            true => {
                let why = format!("{}: it went back to a state of before", self.url);
                Err(Unreachable::new(&RpcRefused(why)))
            }
            false => Ok(()),
        }
    }
}

fn odd() -> NetworkError {
    NetworkError::new(&RpcRefused("it answers another question".into()))
}

type Rpc<T> = Result<T, RPCError<u64, Member, RaftError<u64>>>;

impl RaftNetwork<TypeConfig> for ToMember {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<u64>> {
        let (to, term) = (self.to, rpc.vote.leader_id.term);
        if let Err(refused) = self.not_back(term) {
            // It may not have heard of it.
            let _ = self.say(Ask::WentBack { to }).await;
            return Err(refused.into());
        }
        let prev = rpc.prev_log_id.map(|id| id.index);
        let last = rpc.entries.last().map(|entry| entry.log_id.index).or(prev);
        let said = self.say(Ask::Append { to, rpc }).await;
        self.answers(said.as_ref().err());
        let MemberAnswer::Appended(said) = said? else { return Err(odd().into()) };
        if lock(&self.network.acknowledged).hear((term, to), (prev, last), &said) {
            let (node, url) = (self.network.node.clone(), self.url.clone());
            say(move || node.report_aside(Condition::MemberWentBack { url: &url, id: to }));
            // It says so to its own operator, and stops.
            let _ = self.say(Ask::WentBack { to }).await;
            self.not_back(term)?;
        }
        Ok(said)
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, _option: RPCOption) -> Rpc<VoteResponse<u64>> {
        match self.say(Ask::Vote { to: self.to, rpc }).await? {
            MemberAnswer::Voted(said) => Ok(said),
            _ => Err(odd().into()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<u64>,
        snapshot: Snapshot<TypeConfig>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<TypeConfig, Fatal<u64>>> {
        let Snapshot { meta, snapshot: state } = snapshot;
        let index = meta.last_log_id.map(|id| id.index);
        self.not_back(vote.leader_id.term)?;
        let said = self.say(Ask::Snapshot { to: self.to, vote, meta, state });
        tokio::select! {
            said = tokio::time::timeout(option.hard_ttl(), said) => match said {
                Ok(Ok(MemberAnswer::Installed(said))) => {
                    self.installed(&vote, index, &said);
                    Ok(said)
                }
                Ok(Ok(_)) => Err(odd().into()),
                Ok(Err(unreachable)) => Err(unreachable.into()),
                Err(_) => Err(NetworkError::new(&RpcRefused("no answer in time".into())).into()),
            },
            closed = cancel => Err(closed.into()),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(self.network.pause))
    }
}

#[cfg(test)]
mod tests {
    use openraft::raft::AppendEntriesResponse::{Conflict, Success};

    use super::*;

    #[test]
    fn a_member_that_has_less_than_it_said_is_known_by_the_leader_of_that_term() {
        let mut known = Acknowledged::default();
        let mut hear = |term, entries, said| known.hear((term, 7), entries, &said);
        assert!(!hear(1, (Some(9), Some(9)), Conflict), "it never said to have that");
        assert!(!hear(1, (Some(4), Some(6)), Success));
        assert!(!hear(1, (Some(9), Some(9)), Conflict), "nor that");
        assert!(!hear(1, (None, Some(2)), Success), "an old answer takes nothing back");
        assert!(!hear(2, (Some(6), Some(6)), Conflict), "another leader may have taken it away");
        assert!(!hear(2, (Some(4), Some(6)), Success));
        assert!(hear(2, (Some(6), Some(6)), Conflict));
        assert!(known.of_term(2).went_back.contains(&7) && !known.of_term(3).went_back.contains(&7));
    }

    #[tokio::test]
    async fn one_that_goes_back_after_a_snapshot_is_known_too() {
        let node = crate::primary::fake::node(1, &crate::primary::fake::SECRET, crate::status::Role::Replica);
        let links = MemberLinks::new(crate::handshake::Asker::of(&node), Duration::from_secs(1));
        let acknowledged = Arc::<Mutex<Acknowledged>>::default();
        let mut network = Network {
            node,
            acknowledged: acknowledged.clone(),
            links: Arc::new(links),
            pause: Duration::from_secs(1),
            away: Arc::default(),
            patience: Duration::from_secs(1),
        };
        let to = network.new_client(7, &Member { url: "http://127.0.0.1:1".into(), witness: false }).await;
        let vote = Vote::new_committed(2, 1);
        to.installed(&vote, Some(300), &SnapshotResponse { vote: Vote::new(3, 2) });
        assert!(!lock(&acknowledged).hear((2, 7), (Some(300), Some(301)), &Conflict), "it refused");
        to.installed(&vote, Some(300), &SnapshotResponse { vote });
        to.installed(&vote, Some(200), &SnapshotResponse { vote });
        assert!(!lock(&acknowledged).hear((2, 7), (Some(301), Some(301)), &Conflict));
        assert!(to.not_back(2).is_ok());
        assert!(lock(&acknowledged).hear((2, 7), (Some(300), Some(301)), &Conflict));
        assert!(to.not_back(2).is_err() && to.not_back(3).is_ok());
    }
}
