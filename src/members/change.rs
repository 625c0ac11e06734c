//! Members are added, removed and replaced while all runs: by joint consensus, one change at a
//! time, on the leader.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::error::{ClientWriteError, RaftError};
use openraft::{ChangeMembers, Raft};
use tokio::time::{Instant, sleep, timeout};

use crate::members::client;
use crate::members::node::MemberNode;
use crate::members::types::{MEMBERS_MAX, Member, TypeConfig};
use crate::members::words::{Ask, Introduction, MemberAnswer, MemberChange};
use crate::report::Condition;

/// How long a new member has to take the log, and a change to be agreed on.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);
/// How long a node has to introduce itself.
const INTRODUCTION_LIMIT: Duration = Duration::from_secs(2);

impl MemberNode {
    /// Changes the members, here or at the leader.
    pub(super) async fn change(self: &Arc<Self>, change: MemberChange, passed: bool) -> MemberAnswer {
        let unable = |may_be_done, why| MemberAnswer::Unable { may_be_done, why };
        match self.leader_elsewhere() {
            Err(why) => unable(false, why),
            Ok(Some(_)) if passed => unable(false, "this member does not lead".into()),
            Ok(Some(leader)) => match self.links.ask(&leader, &Ask::Change { change, passed: true }).await {
                Ok(said) => said,
                Err(unanswered) => unable(unanswered.sent, unanswered.why),
            },
            Ok(None) => {
                // It goes on when the one that asked has gone: half of a change is no state.
                let member = self.clone();
                let changed = tokio::spawn(async move { member.change_here(change).await });
                match changed.await {
                    Ok(Ok(())) => MemberAnswer::Changed,
                    Ok(Err((may_be_done, why))) => unable(may_be_done, why),
                    Err(error) => unable(true, error.to_string()),
                }
            }
        }
    }

    /// Here, at the leader, or at another one that may know it. A member waits for a leader that is
    /// being chosen.
    pub(crate) async fn changed_by_any(self: Arc<Self>, change: MemberChange) -> MemberAnswer {
        let time = self.settings.config.lease_time;
        let until = Instant::now() + time;
        loop {
            let said = self.changed_once(&change).await;
            let not_done = matches!(said, MemberAnswer::Unable { may_be_done: false, .. });
            let being_chosen = self.is_one() && self.leader().is_err();
            if !not_done || !being_chosen || Instant::now() >= until {
                return said;
            }
            sleep(time / 40).await;
        }
    }

    async fn changed_once(self: &Arc<Self>, change: &MemberChange) -> MemberAnswer {
        let mut said = self.change(change.clone(), false).await;
        // A leader that was removed is none afterwards: what it said counts.
        if !matches!(said, MemberAnswer::Unable { may_be_done: false, .. }) || self.leader().is_ok() {
            return said;
        }
        for url in self.others() {
            match self.links.ask(&url, &Ask::Change { change: change.clone(), passed: false }).await {
                Ok(MemberAnswer::Unable { may_be_done: false, why }) => {
                    said = MemberAnswer::Unable { may_be_done: false, why: format!("{url}: {why}") };
                }
                Ok(other) => return other,
                Err(unanswered) if unanswered.sent => {
                    return MemberAnswer::Unable { may_be_done: true, why: unanswered.why };
                }
                Err(unanswered) => said = MemberAnswer::Unable { may_be_done: false, why: unanswered.why },
            }
        }
        said
    }

    /// How all members introduce themselves, this one among them.
    pub(crate) async fn introduced(self: Arc<Self>) -> BTreeMap<String, Result<Introduction, String>> {
        let own = self.own_url().map(|url| (url.to_owned(), Ok(self.introduction())));
        client::introduced(&self.links, own.into_iter().collect(), self.others()).await
    }

    async fn change_here(&self, change: MemberChange) -> Result<(), (bool, String)> {
        let not = |why: String| (false, why);
        let Ok(_one) = self.changing.try_lock() else {
            return Err(not("another change of the members is under way".into()));
        };
        let running = self.raft().ok_or_else(|| not(self.why_not()))?;
        let raft = &running.raft;
        let roll = Roll::of(raft);
        if roll.joint {
            // One that was begun by a leader before this one comes to its end first.
            self.agree(raft, roll.voters.clone(), &BTreeSet::new()).await?;
        }
        match &change {
            MemberChange::Add { url } => {
                let new = self.newcomer(url).await.map_err(not)?;
                self.take_in(raft, &roll, (url, new)).await
            }
            MemberChange::Replace { url, id } => {
                let old = roll.at(url);
                if roll.voters.contains(id) && old.contains(id) {
                    return Ok(());
                }
                if let Some((_, known)) = roll.nodes.iter().find(|(known, _)| known == id)
                    && known.url != *url
                {
                    return self.move_to(raft, (*id, known), url).await;
                }
                if old.is_empty() {
                    return Err(not(format!("{url} is no member: an operator adds it")));
                }
                // The node that is at the place now.
                let new = self.newcomer(url).await.map_err(not)?;
                if new.id != Some(*id) {
                    return Err(not(format!("another member is at {url}")));
                }
                self.take_in(raft, &roll, (url, new)).await
            }
            MemberChange::Remove { url } => {
                let gone = roll.at(url);
                if gone.is_empty() {
                    return Err(not(format!("{url} is no member")));
                }
                let after: BTreeSet<u64> = roll.voters.difference(&gone).copied().collect();
                if after.is_empty() {
                    return Err(not("it is the only member".into()));
                }
                self.agree(raft, after, &gone).await?;
                self.node.report_aside(Condition::MembersChanged { url, what: "removed" });
                Ok(())
            }
        }
    }

    /// Brings a change to its end that a leader before this one had begun.
    pub(super) async fn settle(&self, raft: &Raft<TypeConfig>) {
        let Ok(_one) = self.changing.try_lock() else { return };
        let roll = Roll::of(raft);
        if roll.joint
            && let Err((_, why)) = self.agree(raft, roll.voters, &BTreeSet::new()).await
        {
            tracing::debug!(why, "a change of the members is still under way");
        }
    }

    /// A member is at another URL by now.
    async fn move_to(
        &self,
        raft: &Raft<TypeConfig>,
        (id, known): (u64, &Member),
        url: &str,
    ) -> Result<(), (bool, String)> {
        // Two that both say to be this member are not told apart otherwise.
        if self.newcomer(url).await.map_err(|why| (false, why))?.id != Some(id) {
            return Err((false, format!("another member is at {url}")));
        }
        let member = Member { url: url.to_owned(), witness: known.witness };
        let moved = ChangeMembers::SetNodes(BTreeMap::from([(id, member)]));
        match timeout(CHANGE_LIMIT, raft.change_membership(moved, true)).await {
            Ok(Ok(_)) => {
                self.node.report_aside(Condition::MembersChanged { url, what: "moved" });
                Ok(())
            }
            Ok(Err(error)) => Err((true, error.to_string())),
            Err(_) => Err((true, format!("the members did not agree within {CHANGE_LIMIT:?}"))),
        }
    }

    /// Who is at this URL now, if it can be a member here.
    async fn newcomer(&self, url: &str) -> Result<Introduction, String> {
        if Some(url) == self.own_url() {
            return Ok(self.introduction());
        }
        let said = timeout(INTRODUCTION_LIMIT, self.links.ask(url, &Ask::Introduce)).await;
        let said = match said {
            Ok(Ok(MemberAnswer::Introduced(said))) => *said,
            Ok(Ok(MemberAnswer::Unable { why, .. })) => return Err(format!("{url}: {why}")),
            Ok(Ok(_)) => return Err(format!("{url}: it answers another question")),
            Ok(Err(unanswered)) => return Err(unanswered.why),
            Err(_) => return Err(format!("{url}: no answer within {INTRODUCTION_LIMIT:?}")),
        };
        let Some(id) = said.id else {
            return Err(format!("{url}: its own configuration does not name it as a member"));
        };
        // One that was a member here before may come again. One of others may not.
        let ours = self.introduction();
        let known = |id: &u64| ours.membership.membership().get_node(id).is_some();
        let theirs = said.membership.membership();
        if said.begun && theirs.nodes().next().is_some() && !known(&id) {
            let shared = theirs.nodes().any(|(id, _)| known(id));
            if !shared {
                return Err(format!("{url}: it is a member of others"));
            }
        }
        Ok(said)
    }

    /// A learner first, then a voter in the place of what was there.
    async fn take_in(
        &self,
        raft: &Raft<TypeConfig>,
        roll: &Roll,
        (url, new): (&str, Introduction),
    ) -> Result<(), (bool, String)> {
        let Some(id) = new.id else { return Err((false, format!("{url}: it is no member"))) };
        if roll.nodes.len() + 1 >= MEMBERS_MAX {
            return Err((false, "there are too many members".into()));
        }
        let member = Member { url: url.to_owned(), witness: new.witness };
        let learns = timeout(CHANGE_LIMIT, raft.add_learner(id, member, true)).await;
        match learns {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err((true, error.to_string())),
            Err(_) => return Err((true, format!("{url}: it did not take the log within {CHANGE_LIMIT:?}"))),
        }
        let mut gone = roll.at(url);
        gone.remove(&id);
        let mut after: BTreeSet<u64> = roll.voters.difference(&gone).copied().collect();
        after.insert(id);
        self.agree(raft, after, &gone).await?;
        self.node.report_aside(Condition::MembersChanged { url, what: "added" });
        Ok(())
    }

    /// These are the voters from now on, and those others are not even learners.
    async fn agree(
        &self,
        raft: &Raft<TypeConfig>,
        after: BTreeSet<u64>,
        gone: &BTreeSet<u64>,
    ) -> Result<(), (bool, String)> {
        let roll = Roll::of(raft);
        if roll.joint || roll.voters != after {
            self.agree_on(raft, after).await?;
        }
        let left: BTreeSet<u64> =
            Roll::of(raft).nodes.iter().map(|(id, _)| *id).filter(|id| gone.contains(id)).collect();
        if left.is_empty() {
            return Ok(());
        }
        match timeout(CHANGE_LIMIT, raft.change_membership(ChangeMembers::RemoveNodes(left), true)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err((true, error.to_string())),
            Err(_) => Err((true, format!("the members did not agree within {CHANGE_LIMIT:?}"))),
        }
    }

    async fn agree_on(&self, raft: &Raft<TypeConfig>, after: BTreeSet<u64>) -> Result<(), (bool, String)> {
        let change = raft.change_membership(ChangeMembers::ReplaceAllVoters(after.clone()), false);
        match timeout(CHANGE_LIMIT, change).await {
            Ok(Ok(_)) => Ok(()),
            // One that leads no more, be it that it was removed itself, does not say what was done.
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))))
                if comes_about(raft, &after).await =>
            {
                Ok(())
            }
            Ok(Err(error)) => Err((true, error.to_string())),
            Err(_) => Err((true, format!("the members did not agree within {CHANGE_LIMIT:?}"))),
        }
    }
}

/// Who the members are, by their newest list.
struct Roll {
    /// All that get the log.
    nodes: Vec<(u64, Member)>,
    /// Those that have a vote, or will have when what is under way is done.
    voters: BTreeSet<u64>,
    /// A change is under way: the voters of before count as well.
    joint: bool,
}

impl Roll {
    fn of(raft: &Raft<TypeConfig>) -> Roll {
        let metrics = raft.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let configs = membership.get_joint_config();
        Roll {
            nodes: membership.nodes().map(|(id, member)| (*id, member.clone())).collect(),
            voters: configs.last().cloned().unwrap_or_default(),
            joint: configs.len() > 1,
        }
    }

    fn at(&self, url: &str) -> BTreeSet<u64> {
        self.nodes.iter().filter(|(_, member)| member.url == url).map(|(id, _)| *id).collect()
    }
}

/// Whether these come to be the voters after all, as far as this node sees.
async fn comes_about(raft: &Raft<TypeConfig>, voters: &BTreeSet<u64>) -> bool {
    let mut metrics = raft.metrics();
    let agreed = metrics.wait_for(|metrics| {
        let membership = &metrics.membership_config;
        let settled = membership.membership().get_joint_config().len() == 1;
        settled
            && membership.voter_ids().collect::<BTreeSet<_>>() == *voters
            && metrics.last_applied >= *membership.log_id()
    });
    timeout(INTRODUCTION_LIMIT, agreed).await.is_ok_and(|agreed| agreed.is_ok())
}
