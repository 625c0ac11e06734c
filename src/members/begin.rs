//! How members begin, and how one that lost its Raft directory comes back.
//!
//! The first of the list begins with all of them. It does so when **every** one answers, all name
//! the same list, none knows of a Raft cluster or has a state of the database's cluster, and at
//! most one has a database with content. A list of which one does not answer begins nothing: that
//! one may know of a cluster.
//!
//! A member whose URL is another id's by what the others say has lost its Raft directory. It asks
//! the leader to put its new id in the place of the old one: until then it has no vote.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::{Config, Membership, Raft, SnapshotPolicy};
use tokio::time::{sleep, timeout};

use crate::error::Result;
use crate::lock::lock;
use crate::members::client;
use crate::members::network::Network;
use crate::members::node::{Leader, MemberNode, RunningRaft};
use crate::members::storage::Storage;
use crate::members::types::{Member, TypeConfig};
use crate::members::words::{Ask, ENTRIES_MAX, Introduction, MemberAnswer, MemberChange};
use crate::report::Condition;
use crate::threads::blocking;

/// Entries of the log between two snapshots.
const ENTRIES_PER_SNAPSHOT: u64 = if cfg!(test) { 16 } else { 256 };
/// A new member has the log when it lacks no more than so many entries.
const LAG_MAX: u64 = 8;
/// Entries that stay in the log with a snapshot: a member that lacks so many needs none.
const ENTRIES_KEPT: u64 = if cfg!(test) { 4 } else { 64 };
/// How often others are asked, until this member is one of those that have begun.
const ASKED_EVERY: Duration = Duration::from_millis(250);
/// The same of one that has been one, and may be none any more.
const LOOKS_EVERY: Duration = Duration::from_secs(5);
/// Before a Raft that stopped is started again.
const RESTART_PAUSE: Duration = Duration::from_secs(5);
/// Longest wait for Raft's end.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// What is to be done, by what the members say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum BeginVerdict {
    /// This node begins with these.
    Begin(BTreeMap<u64, Member>),
    /// Its URL is another id's, or its id is at another URL: it asks for that to be changed.
    Replace,
    /// It is one of them.
    IsIn,
    /// It waits for something to change by itself.
    Wait(String),
    /// The members are others: it does not stand for election among them.
    Outside(String),
    /// It waits for an operator.
    Operator(String),
}

/// Whether it has a vote, or will have one when the change that is under way is done.
fn is_voter_at(own: &Introduction, members: &Membership<u64, Member>, url: &str) -> bool {
    let is = |id: u64| {
        let votes = members.get_joint_config().last().is_some_and(|voters| voters.contains(&id));
        votes && members.get_node(&id).is_some_and(|member| member.url == url)
    };
    own.id.is_some_and(is)
}

/// Decides. `own` is at `url`; an operator's word begins whatever state the nodes have.
pub(super) fn verdict(
    (url, own): (&str, &Introduction),
    others: &BTreeMap<String, Result<Introduction, String>>,
    unchecked: bool,
) -> BeginVerdict {
    let answered =
        others.iter().filter_map(|(url, said)| said.as_ref().ok().map(|said| (url.as_str(), said)));
    let all: BTreeMap<&str, &Introduction> = answered.chain([(url, own)]).collect();
    let newest = all.values().filter(|said| said.membership.log_id().is_some());
    if let Some(newest) = newest.max_by_key(|said| *said.membership.log_id()) {
        let members = newest.membership.membership();
        if is_voter_at(own, members, url) {
            return BeginVerdict::IsIn;
        }
        // It moved, or is a learner still.
        if own.id.is_some_and(|id| members.get_node(&id).is_some()) {
            return BeginVerdict::Replace;
        }
        let urls: BTreeSet<&str> = members.nodes().map(|(_, member)| member.url.as_str()).collect();
        if urls.contains(url) {
            return BeginVerdict::Replace;
        }
        let urls: Vec<&str> = urls.into_iter().collect();
        return BeginVerdict::Outside(format!("{url} is no member: the members are {}", urls.join(", ")));
    }
    if let Some((voted, _)) = all.iter().find(|(_, said)| said.begun) {
        return BeginVerdict::Wait(format!("{voted} knows of members that are not reached"));
    }
    if let Some((away, Err(why))) = others.iter().find(|(_, said)| said.is_err()) {
        return BeginVerdict::Wait(format!(
            "the members begin when all of them answer: {away} does not: {why}"
        ));
    }
    let set = |said: &Introduction| said.list.iter().cloned().collect::<BTreeSet<_>>();
    if let Some((other, said)) = all.iter().find(|(_, said)| set(said) != set(own)) {
        return BeginVerdict::Operator(format!("{other} names other members: {}", said.list.join(", ")));
    }
    if let Some((other, _)) = all.iter().find(|(_, said)| !said.ready || said.id.is_none()) {
        return BeginVerdict::Wait(format!("{other} is being opened"));
    }
    if !unchecked {
        if let Some((other, _)) = all.iter().find(|(_, said)| said.has_state) {
            return BeginVerdict::Operator(format!(
                "{other} has a state of a cluster already, so that this is no first start: an operator \
                 decides"
            ));
        }
        let with_content: Vec<&str> =
            all.iter().filter(|(_, said)| said.has_content).map(|(url, _)| *url).collect();
        if with_content.len() > 1 {
            return BeginVerdict::Operator(format!(
                "{} have databases with content",
                with_content.join(" and ")
            ));
        }
        if all.values().all(|said| said.witness) {
            return BeginVerdict::Wait("there are witnesses only".into());
        }
    }
    if own.list.iter().min().map(String::as_str) != Some(url) && !unchecked {
        return BeginVerdict::Wait("the first of the members is about to begin".into());
    }
    let member = |url: &str, said: &Introduction| Member { url: url.to_owned(), witness: said.witness };
    BeginVerdict::Begin(all.iter().filter_map(|(url, said)| Some((said.id?, member(url, said)))).collect())
}

impl MemberNode {
    /// Runs Raft until the node stops.
    pub(super) async fn run(self: Arc<Self>) {
        let stop = self.node.stop.clone();
        let drained = || self.settings.config.mounted && self.node.drain.is_cancelled();
        while !stop.is_cancelled() && !drained() {
            if let Err(error) = self.run_once().await {
                self.node.report_aside(Condition::MemberStopped { error: &error });
            }
            if self.went_back.is_cancelled() {
                let directory = self.settings.own.as_ref().map(|own| own.directory.display().to_string());
                let directory = directory.unwrap_or_default();
                self.node.report_aside(Condition::ThisMemberWentBack { directory: &directory });
                return;
            }
            tokio::select! {
                () = sleep(RESTART_PAUSE) => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// The storage that was opened with the node, or what is there now.
    async fn storage(&self) -> Result<Option<Storage>> {
        let Some(own) = &self.settings.own else { return Ok(None) };
        if let Some(storage) = lock(&own.storage).take() {
            return Ok(Some(storage));
        }
        let directory = own.directory.clone();
        blocking(move || Storage::open(&directory)).await
    }

    /// Until the node stops, or Raft does.
    async fn run_once(self: &Arc<Self>) -> Result<()> {
        let Some(storage) = self.storage().await? else {
            return Err(crate::error::Error::Internal("the Raft directory is gone".into()));
        };
        let (id, network, state) = (storage.id(), self.network(), storage.watch());
        self.begins_anew();
        let (log, machine) = storage.into_parts();
        let raft = Raft::new(id, self.raft_config()?, network, log, machine).await;
        let raft = raft.map_err(|fatal| crate::error::Error::Internal(format!("Raft: {fatal}")))?;
        self.running.send_replace(Some(RunningRaft { raft: raft.clone(), state }));
        self.node.report_aside(Condition::MemberRuns);
        let ended = tokio::select! {
            ended = self.watch(&raft) => ended,
            () = self.keep_in(&raft) => Ok(()),
            () = self.went_back.cancelled() => Ok(()),
            // Where the application serves the members, it takes in none from now on: a leader that
            // hears no one is none.
            () = self.node.drain.cancelled(), if self.settings.config.mounted => Ok(()),
            () = self.node.stop.cancelled() => Ok(()),
        };
        self.running.send_replace(None);
        // What it still writes is written in order; a new one waits for that.
        let _ = timeout(STOP_LIMIT, raft.shutdown()).await;
        ended
    }

    fn network(&self) -> Network {
        Network {
            node: self.node.clone(),
            acknowledged: Arc::default(),
            away: Arc::default(),
            patience: self.settings.config.lease_time,
            links: self.links.clone(),
            pause: self.settings.config.lease_time / 30,
        }
    }

    fn raft_config(&self) -> Result<Arc<Config>> {
        let millis = |time: Duration| time.as_millis() as u64;
        let time = self.settings.config.lease_time;
        let config = Config {
            cluster_name: self.node.cluster.clone(),
            // Also how long entries have to be answered: no round trip may take longer. An election
            // begins after three of them at the earliest.
            heartbeat_interval: millis(time / 15),
            election_timeout_min: millis(time / 10),
            election_timeout_max: millis(time * 2 / 15),
            install_snapshot_timeout: millis(time / 4),
            max_payload_entries: ENTRIES_MAX,
            replication_lag_threshold: LAG_MAX,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(ENTRIES_PER_SNAPSHOT),
            max_in_snapshot_log_to_keep: ENTRIES_KEPT,
            ..Config::default()
        };
        let config = config.validate();
        config.map(Arc::new).map_err(|error| crate::error::Error::Internal(format!("Raft: {error}")))
    }

    /// Takes note of each change, and says when Raft has stopped.
    async fn watch(&self, raft: &Raft<TypeConfig>) -> Result<()> {
        let mut metrics = raft.metrics();
        let mut voters = BTreeSet::new();
        loop {
            let now = metrics.borrow_and_update().clone();
            self.note(&now);
            if let Err(fatal) = &now.running_state {
                return Err(crate::error::Error::Internal(format!("Raft has stopped: {fatal}")));
            }
            let found: BTreeSet<u64> = now.membership_config.voter_ids().collect();
            if found != voters && now.membership_config.membership().get_joint_config().len() == 1 {
                voters = found;
                self.tell_members(voters.len());
            }
            if metrics.changed().await.is_err() {
                return Err(crate::error::Error::Internal("Raft has ended".into()));
            }
        }
    }

    fn tell_members(&self, voters: usize) {
        if (1..=2).contains(&voters) {
            self.node.report_aside(Condition::MembersTooFew { database: &self.node.database, voters });
        }
    }

    /// Begins with the others, or comes back to them. It goes on for ever: a member that was
    /// replaced while it was away finds that out here.
    async fn keep_in(self: &Arc<Self>, raft: &Raft<TypeConfig>) {
        loop {
            let verdict = self.look(false).await;
            let pause = if verdict == BeginVerdict::IsIn { LOOKS_EVERY } else { ASKED_EVERY };
            let waits = match self.carry_out(raft, verdict).await {
                Ok(()) => None,
                Err(why) => Some(format!("the members have no record for this node yet: {why}")),
            };
            if let Some(why) = waits.as_ref().filter(|why| lock(&self.waits).as_ref() != Some(*why)) {
                tracing::info!(why, "this member waits");
            }
            *lock(&self.waits) = waits;
            sleep(pause).await;
        }
    }

    /// What is to be done by what all say now.
    async fn look(&self, unchecked: bool) -> BeginVerdict {
        let Some(url) = self.own_url() else {
            return BeginVerdict::Operator("this node is no member".into());
        };
        let own = self.introduction();
        // What Raft itself says is enough, unless it has no leader.
        if is_voter_at(&own, own.membership.membership(), url) && own.leader.is_some() && !unchecked {
            return BeginVerdict::IsIn;
        }
        let others = self.introductions().await;
        verdict((url, &own), &others, unchecked)
    }

    async fn carry_out(
        self: &Arc<Self>,
        raft: &Raft<TypeConfig>,
        verdict: BeginVerdict,
    ) -> Result<(), String> {
        // One that was removed does not hear of it by Raft, and would stand for election for ever.
        raft.runtime_config().elect(!matches!(verdict, BeginVerdict::Outside(_)));
        match verdict {
            BeginVerdict::IsIn => {
                if matches!(self.leader(), Ok(Leader::Here(_))) {
                    self.settle(raft).await;
                }
                Ok(())
            }
            BeginVerdict::Begin(members) => {
                let number = members.len();
                raft.initialize(members).await.map_err(|error| error.to_string())?;
                self.node.report_aside(Condition::MembersBegan { members: number });
                Ok(())
            }
            BeginVerdict::Replace => self.ask_for_place().await,
            BeginVerdict::Wait(why) | BeginVerdict::Outside(why) | BeginVerdict::Operator(why) => Err(why),
        }
    }

    /// Asks the leader to put this id at this URL.
    async fn ask_for_place(self: &Arc<Self>) -> Result<(), String> {
        let (Some(url), Some(id)) = (self.own_url(), self.id()) else { return Ok(()) };
        let mut problem = "no member knows a leader".to_owned();
        if matches!(self.leader(), Ok(Leader::Here(_))) {
            return match self.change(MemberChange::Replace { url: url.to_owned(), id }, false).await {
                MemberAnswer::Unable { why, .. } => Err(why),
                _ => Ok(()),
            };
        }
        for other in self.others() {
            let change = MemberChange::Replace { url: url.to_owned(), id };
            match self.links.ask(&other, &Ask::Change { change, passed: false }).await {
                Ok(MemberAnswer::Changed) => {
                    self.node.report_aside(Condition::MemberReplaced { id, url });
                    return Ok(());
                }
                Ok(MemberAnswer::Unable { why, .. }) => problem = format!("{other}: {why}"),
                Ok(_) => problem = format!("{other}: it answers another question"),
                Err(unanswered) => problem = unanswered.why,
            }
        }
        Err(problem)
    }

    /// How all others introduce themselves.
    async fn introductions(&self) -> BTreeMap<String, Result<Introduction, String>> {
        client::introductions(&self.links, self.others()).await
    }

    /// Begins by an operator's word, with all that are on the list.
    pub(super) async fn begin_unchecked(self: &Arc<Self>) -> Result<(), String> {
        let running = self.raft().ok_or("this node is no member, or does not run")?;
        match self.look(true).await {
            BeginVerdict::IsIn => Err("the members have begun".into()),
            verdict => self.carry_out(&running.raft, verdict).await,
        }
    }

    /// How many nodes with a database the members are: so many start the cluster.
    pub(crate) fn starters(&self) -> Option<usize> {
        let running = self.raft()?;
        let metrics = running.raft.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let full = membership.nodes().filter(|(id, member)| voters.contains(id) && !member.witness).count();
        (full > 0).then_some(full)
    }

    /// The leader's URL, or none where this node leads.
    pub(super) fn leader_elsewhere(&self) -> Result<Option<String>, String> {
        Ok(match self.leader()? {
            Leader::Here(_) => None,
            Leader::At(url) => Some(url),
        })
    }
}

#[cfg(test)]
mod tests;
