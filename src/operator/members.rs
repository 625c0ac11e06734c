//! The members that keep the record, seen and changed from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::error::{Error, shown};
use crate::lease::Members;
use crate::members::{Ask, Introduction, MemberAnswer, MemberChange, MembersFromOutside};
use crate::operator::{Operator, OperatorError};

/// Bytes of a member's words that are shown.
const WORDS_MAX_BYTES: usize = 1024;
/// How long members that have begun may take to find their leader, and how often they are asked.
const LEADER_LIMIT: Duration = Duration::from_secs(10);
const LOOKS_EVERY: Duration = Duration::from_millis(100);

/// The members that keep the lease's record, as they themselves say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct MembersView {
    /// All that are asked or known, by their URLs.
    pub members: Vec<MemberView>,
    /// Whether most of the voters answer and know a leader: only then can the record be changed.
    pub agree: bool,
}

/// One of them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct MemberView {
    /// Where it is reached.
    pub url: String,
    /// Its id among the members, in hexadecimal digits. A new one where it lost its Raft directory.
    pub id: Option<String>,
    /// It has a vote, by what the others know.
    pub votes: bool,
    /// It leads the members: that says nothing of who the primary is.
    pub leads: bool,
    /// It has no database.
    pub witness: bool,
    /// Why it does not answer.
    pub problem: Option<String>,
}

impl Operator {
    /// Who the members are that keep the record, by their own words.
    ///
    /// # Errors
    /// [`OperatorError::NoSecret`]; [`OperatorError::Invalid`] where the record is in a store.
    ///
    /// # Cancel safety
    /// Nothing is changed.
    pub async fn members(&self) -> Result<MembersView, OperatorError> {
        let outside = self.these_members().await?;
        Ok(MembersView::of(&outside.introduced().await))
    }

    /// Makes the node at this URL a member. Its own configuration names it as one. It takes the log
    /// first, and has a vote from then on.
    ///
    /// # Errors
    /// [`OperatorError::Members`] with the members' reason, [`OperatorError::Store`] where none of
    /// them can be reached, [`OperatorError::NoSecret`], [`OperatorError::Invalid`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn add_member(&self, url: &str) -> Result<(), OperatorError> {
        let url = normal(url)?;
        self.ask_members(|| change(MemberChange::Add { url: url.clone() })).await
    }

    /// The node at this URL keeps the record no more. It may be gone.
    ///
    /// # Errors
    /// As for [`Operator::add_member`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn remove_member(&self, url: &str) -> Result<(), OperatorError> {
        let url = normal(url)?;
        self.ask_members(|| change(MemberChange::Remove { url: url.clone() })).await
    }

    /// Has the members on the list begin though their nodes have a state of a cluster: when the
    /// record was elsewhere before, or when most of the members lost what they had agreed on. All
    /// of them run, name the same list, and have no Raft directory with anything in it.
    ///
    /// The record is empty then, and no node takes the lease by itself: an operator moves the
    /// record there ([`Operator::move_to`]) or promotes a node ([`Operator::promotion`]). The call
    /// returns when the members can take it.
    ///
    /// # Errors
    /// As for [`Operator::add_member`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn begin_members(&self) -> Result<(), OperatorError> {
        self.ask_members(|| Ask::Begin).await?;
        let register = self.register().await?;
        let begun = Instant::now();
        loop {
            match register.look().await {
                Ok(_) if self.members().await?.agree => return Ok(()),
                Err(error) if begun.elapsed() > LEADER_LIMIT => return Err(error),
                Ok(_) if begun.elapsed() > LEADER_LIMIT => {
                    return Err(OperatorError::Members(
                        "they have begun, and do not agree on a leader".into(),
                    ));
                }
                _ => sleep(LOOKS_EVERY).await,
            }
        }
    }

    async fn ask_members(&self, ask: impl Fn() -> Ask) -> Result<(), OperatorError> {
        let members = self.these_members().await?;
        let why = match members.ask_any(ask).await {
            Ok(MemberAnswer::Changed) => return Ok(()),
            Ok(_) => "a member answers another question".into(),
            Err(why) => shown(&why, WORDS_MAX_BYTES),
        };
        // They refuse, or none is there.
        match members.introduced().await.values().any(Result::is_ok) {
            true => Err(OperatorError::Members(why)),
            false => Err(OperatorError::Store(why)),
        }
    }

    async fn these_members(&self) -> Result<MembersFromOutside, OperatorError> {
        match &self.lease.0 {
            crate::lease::LeaseKind::Members(members) => self.outside(members).await,
            _ => Err(OperatorError::Invalid("the record is not kept by members".into())),
        }
    }

    pub(super) async fn outside(&self, members: &Members) -> Result<MembersFromOutside, OperatorError> {
        let invalid = |error: Error| OperatorError::Invalid(error.to_string());
        let urls = members.list().map_err(invalid)?;
        Ok(MembersFromOutside::new(self.nodes().await?.asker, urls))
    }
}

fn change(change: MemberChange) -> Ask {
    Ask::Change { change, passed: false }
}

fn normal(url: &str) -> Result<String, OperatorError> {
    let endpoint = crate::net::Endpoint::parse(url);
    endpoint.map(|to| to.to_string()).map_err(|error| OperatorError::Invalid(error.to_string()))
}

impl MembersView {
    pub(crate) fn of(said: &BTreeMap<String, Result<Introduction, String>>) -> MembersView {
        let newest = said.values().flatten().max_by_key(|said| *said.membership.log_id());
        let membership = newest.map(|newest| newest.membership.membership().clone()).unwrap_or_default();
        // While they change, the last list is what they will be.
        let lists = membership.get_joint_config();
        let voters = lists.last().cloned().unwrap_or_default();
        let known = |url: &str| membership.nodes().find(|(_, member)| member.url == url);
        let member = |(url, said): (&String, &Result<Introduction, String>)| {
            let known = known(url);
            let answered = said.as_ref().ok();
            let id = answered.and_then(|said| said.id).or(known.map(|(id, _)| *id));
            let votes = id.is_some_and(|id| voters.contains(&id));
            MemberView {
                url: url.clone(),
                id: id.map(|id| format!("{id:x}")),
                votes,
                // One that was removed may not know that it leads no more.
                leads: votes && answered.is_some_and(|said| said.leader == id),
                witness: answered
                    .map_or(known.is_some_and(|(_, member)| member.witness), |said| said.witness),
                problem: said.as_ref().err().map(|why| shown(why, WORDS_MAX_BYTES)),
            }
        };
        let agreeing: BTreeSet<u64> =
            said.values().flatten().filter(|said| said.leader.is_some()).filter_map(|said| said.id).collect();
        let most = |voters: &BTreeSet<u64>| voters.intersection(&agreeing).count() * 2 > voters.len();
        let agree = !lists.is_empty() && lists.iter().all(most);
        MembersView { members: said.iter().map(member).collect(), agree }
    }
}

impl fmt::Display for MembersView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<40} {:<17} is", "member", "id")?;
        for member in &self.members {
            let is = match (&member.problem, member.votes, member.leads) {
                (Some(why), true, _) => format!("a voter that does not answer: {why}"),
                (Some(why), false, _) => format!("no voter, and does not answer: {why}"),
                (None, _, true) => "the leader".into(),
                (None, true, false) => "a voter".into(),
                (None, false, false) => "no voter".into(),
            };
            let witness = if member.witness { ", a witness" } else { "" };
            writeln!(f, "{:<40} {:<17} {is}{witness}", member.url, member.id.as_deref().unwrap_or("-"))?;
        }
        if !self.agree {
            writeln!(f, "most of the voters do not answer, or know no leader: the record can't be changed")?;
        }
        Ok(())
    }
}
