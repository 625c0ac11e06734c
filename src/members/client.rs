//! Reading and swapping the record at members, from outside or from one that does not lead.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::handshake::Asker;
use crate::lease::{LEASE_TIME_OF_MEMBERS, ReadError, Store, StoreFuture, Stored, SwapError, Version};
use crate::lock::lock;
use crate::members::link::MemberLinks;
use crate::members::types::{AgreedRecord, MEMBERS_MAX, Proposal, place};
use crate::members::words::{Ask, Introduction, MemberAnswer, SwapOutcome};
use crate::random;

/// How long one member has to answer what is read.
const READ_LIMIT: Duration = Duration::from_secs(1);
/// Between two looks for a member that has what was written.
const READ_STEP: Duration = Duration::from_millis(20);
/// How long a swap from outside may take, as if the lease time were this.
const SWAP_TIME: Duration = Duration::from_secs(8);

/// The members, for one that is no node of the cluster.
#[derive(Debug)]
pub(crate) struct MembersFromOutside {
    links: Arc<MemberLinks>,
    urls: Vec<String>,
    /// The place of the newest version that was written here. A member that is late has an older
    /// one.
    written: Mutex<Option<(u64, u64)>>,
}

impl MembersFromOutside {
    pub(crate) fn new(asker: Asker, urls: Vec<String>) -> MembersFromOutside {
        let links = Arc::new(MemberLinks::new(asker, READ_LIMIT));
        MembersFromOutside { links, urls, written: Mutex::default() }
    }

    /// Has the first member that can do it.
    ///
    /// # Errors
    /// Why none did, in words.
    pub(crate) async fn ask_any(&self, ask: impl Fn() -> Ask) -> Result<MemberAnswer, String> {
        let mut problems = Vec::new();
        for url in &self.urls {
            match self.links.ask(url, &ask()).await {
                Ok(MemberAnswer::Unable { may_be_done: true, why }) => {
                    return Err(format!("{url}: it may be done: {why}"));
                }
                Ok(MemberAnswer::Unable { why, .. }) => problems.push(format!("{url}: {why}")),
                Ok(said) => return Ok(said),
                Err(unanswered) if unanswered.sent => return Err(unanswered.why),
                Err(unanswered) => problems.push(unanswered.why),
            }
        }
        Err(problems.join("; "))
    }

    /// How all members introduce themselves.
    pub(crate) async fn introduced(&self) -> BTreeMap<String, Result<Introduction, String>> {
        introduced(&self.links, BTreeMap::new(), self.urls.clone()).await
    }

    async fn swap_it(&self, expected: Option<&Version>, record: &[u8]) -> Result<Version, SwapError> {
        let mut swapping = Swapping::begin(expected, record, SWAP_TIME)?;
        loop {
            let command = swapping.command();
            let any = swap_at_any(&self.links, &self.urls, command, "no member was reached".into());
            let tried = timeout(swapping.try_limit(), any).await;
            let outcome = tried.unwrap_or_else(|_| SwapOutcome::Unknown("no answer in time".into()));
            if let Some(ended) = swapping.hear(outcome) {
                return ended;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Store for MembersFromOutside {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        Box::pin(async {
            let begun = Instant::now();
            loop {
                let register = read(&self.links, &self.urls).await.map_err(ReadError::new)?;
                if register.as_ref().and_then(|it| place(&it.version)) >= *lock(&self.written) {
                    return Ok(register.map(|it| Stored::new(it.record, Version::new(it.version))));
                }
                if begun.elapsed() > READ_LIMIT {
                    return Err(ReadError::new("the members that answered lack what was written before"));
                }
                sleep(READ_STEP).await;
            }
        })
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        Box::pin(async move {
            let version = self.swap_it(expected, record).await?;
            let mut written = lock(&self.written);
            *written = place(version.as_str()).max(*written);
            Ok(version)
        })
    }

    fn lease_time(&self) -> Duration {
        LEASE_TIME_OF_MEMBERS
    }
}

/// How these introduce themselves, and those that they know of, and so on.
pub(super) async fn introduced(
    links: &Arc<MemberLinks>,
    mut said: BTreeMap<String, Result<Introduction, String>>,
    mut urls: Vec<String>,
) -> BTreeMap<String, Result<Introduction, String>> {
    while !urls.is_empty() && said.len() < MEMBERS_MAX {
        said.extend(introductions(links, urls).await);
        let known = said.values().flatten().flat_map(|said| said.membership.membership().nodes());
        let known: BTreeSet<String> = known.map(|(_, member)| member.url.clone()).collect();
        urls = known.into_iter().filter(|url| !said.contains_key(url)).collect();
    }
    said
}

/// How the nodes at these URLs introduce themselves.
pub(super) async fn introductions(
    links: &Arc<MemberLinks>,
    urls: impl IntoIterator<Item = String>,
) -> BTreeMap<String, Result<Introduction, String>> {
    let mut asking = JoinSet::new();
    for url in urls {
        let links = links.clone();
        asking.spawn(async move {
            let said = match timeout(READ_LIMIT, links.ask(&url, &Ask::Introduce)).await {
                Ok(Ok(MemberAnswer::Introduced(said))) => Ok(*said),
                Ok(Ok(MemberAnswer::Unable { why, .. })) => Err(why),
                Ok(Ok(_)) => Err("it answers another question".into()),
                Ok(Err(unanswered)) => Err(unanswered.why),
                Err(_) => Err(format!("no answer within {READ_LIMIT:?}")),
            };
            (url, said)
        });
    }
    asking.join_all().await.into_iter().collect()
}

/// Asks all of these for the register; the first that knows it is believed.
pub(super) async fn read(links: &Arc<MemberLinks>, urls: &[String]) -> Result<Option<AgreedRecord>, String> {
    let mut asking = JoinSet::new();
    for url in urls {
        let (links, url) = (links.clone(), url.clone());
        asking.spawn(async move {
            match timeout(READ_LIMIT, links.ask(&url, &Ask::Read)).await {
                Ok(Ok(MemberAnswer::Register(register))) => Ok(register),
                Ok(Ok(MemberAnswer::Unable { why, .. })) => Err(format!("{url}: {why}")),
                Ok(Ok(_)) => Err(format!("{url}: it answers another question")),
                Ok(Err(unanswered)) => Err(unanswered.why),
                Err(_) => Err(format!("{url}: no answer within {READ_LIMIT:?}")),
            }
        });
    }
    let mut problems = Vec::new();
    while let Some(asked) = asking.join_next().await {
        match asked {
            Ok(Ok(register)) => return Ok(register),
            Ok(Err(problem)) => problems.push(problem),
            Err(error) => problems.push(error.to_string()),
        }
    }
    problems.sort_unstable();
    Err(problems.join("; "))
}

/// Has the node at this URL swap.
pub(super) async fn swap_at(links: &MemberLinks, url: &str, command: Proposal, passed: bool) -> SwapOutcome {
    match links.ask(url, &Ask::Swap { command, passed }).await {
        Ok(MemberAnswer::Swapped(outcome)) => outcome,
        Ok(MemberAnswer::Unable { may_be_done: false, why }) => SwapOutcome::NotSent(format!("{url}: {why}")),
        Ok(MemberAnswer::Unable { why, .. }) => SwapOutcome::Unknown(format!("{url}: {why}")),
        Ok(_) => SwapOutcome::Unknown(format!("{url}: it answers another question")),
        Err(unanswered) if unanswered.sent => SwapOutcome::Unknown(unanswered.why),
        Err(unanswered) => SwapOutcome::NotSent(unanswered.why),
    }
}

/// Has the first of these swap that can.
pub(super) async fn swap_at_any(
    links: &MemberLinks,
    urls: &[String],
    command: Proposal,
    mut why: String,
) -> SwapOutcome {
    for url in links.in_order(urls) {
        match swap_at(links, &url, command.clone(), false).await {
            SwapOutcome::NotSent(problem) => why = problem,
            outcome => {
                if !matches!(outcome, SwapOutcome::Unknown(_)) {
                    links.served_by(&url);
                }
                return outcome;
            }
        }
    }
    SwapOutcome::NotSent(why)
}

/// A swap that is tried until it is known what came of it, or its time is over.
pub(super) struct Swapping {
    command: Proposal,
    nonce: u64,
    limit: Duration,
    begun: Instant,
    /// A try may have been done, and why that is not known.
    unknown: Option<String>,
}

impl Swapping {
    /// A node ends a swap after a quarter of the lease time. What was not sent until shortly before
    /// that is said to be so.
    pub(super) fn begin(
        expected: Option<&Version>,
        record: &[u8],
        lease_time: Duration,
    ) -> Result<Swapping, SwapError> {
        let nonce = random::array().map_err(|error| SwapError::Unavailable(error.to_string()))?;
        let nonce = u64::from_le_bytes(nonce);
        let command = Proposal::swap(expected, nonce, record)?;
        Ok(Swapping { command, nonce, limit: lease_time / 5, begun: Instant::now(), unknown: None })
    }

    pub(super) fn command(&self) -> Proposal {
        self.command.clone()
    }

    /// How long one try may take. One that hangs was perhaps sent to a leader that is none any
    /// more.
    pub(super) fn try_limit(&self) -> Duration {
        self.limit / 2
    }

    /// What came of the swap, if that is known by now, or if there is no more time.
    pub(super) fn hear(&mut self, outcome: SwapOutcome) -> Option<Result<Version, SwapError>> {
        let over = self.begun.elapsed() >= self.limit;
        match outcome {
            SwapOutcome::Done(version) => return Some(Ok(Version::new(version))),
            SwapOutcome::Conflict(holds) => {
                let mine = holds.filter(|holds| holds.nonce == self.nonce);
                return Some(match (mine, self.unknown.take()) {
                    (Some(holds), _) => Ok(Version::new(holds.version)),
                    // It was done and replaced since, or never will be.
                    (None, Some(why)) => Err(SwapError::Unknown(why)),
                    (None, None) => Err(SwapError::Conflict),
                });
            }
            SwapOutcome::NotSent(why) if over => {
                return Some(Err(match self.unknown.take() {
                    Some(before) => SwapError::Unknown(before),
                    None => SwapError::Unavailable(why),
                }));
            }
            SwapOutcome::NotSent(_) => {}
            SwapOutcome::Unknown(why) if over => return Some(Err(SwapError::Unknown(why))),
            SwapOutcome::Unknown(why) => self.unknown = Some(why),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::types::Holds;

    fn begin() -> Swapping {
        let before = Version::new("1-2-3");
        Swapping::begin(Some(&before), b"record", Duration::from_secs(10)).unwrap()
    }

    fn not_sent() -> SwapOutcome {
        SwapOutcome::NotSent("away".into())
    }

    fn unknown() -> SwapOutcome {
        SwapOutcome::Unknown("it hung up".into())
    }

    fn holds(nonce: u64) -> SwapOutcome {
        SwapOutcome::Conflict(Some(Holds { version: "1-2-9".into(), nonce }))
    }

    fn is_done(heard: Option<Result<Version, SwapError>>, version: &str) -> bool {
        matches!(heard, Some(Ok(now)) if now.as_str() == version)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_at_once_ends_a_swap() {
        assert!(is_done(begin().hear(SwapOutcome::Done("1-2-4".into())), "1-2-4"));
        for said in [SwapOutcome::Conflict(None), holds(begin().nonce)] {
            assert!(matches!(begin().hear(said), Some(Err(SwapError::Conflict))));
        }
    }

    /// The first try was done, and its answer was lost: the record that the second one finds is its
    /// own. Where another record is there it may have been done, and been replaced.
    #[tokio::test(start_paused = true)]
    async fn a_second_try_tells_of_the_first_one() {
        let mut mine = begin();
        assert!(mine.hear(unknown()).is_none());
        let nonce = mine.nonce;
        assert!(is_done(mine.hear(holds(nonce)), "1-2-9"));
        for said in [holds(nonce ^ 1), SwapOutcome::Conflict(None)] {
            let mut replaced = begin();
            assert!(replaced.hear(unknown()).is_none() && replaced.hear(not_sent()).is_none());
            assert!(matches!(replaced.hear(said), Some(Err(SwapError::Unknown(_)))));
        }
        let mut twice = begin();
        assert!(twice.hear(unknown()).is_none());
        assert!(is_done(twice.hear(SwapOutcome::Done("1-2-4".into())), "1-2-4"));
    }

    #[tokio::test(start_paused = true)]
    async fn when_its_time_is_over_it_says_whether_anything_was_sent() {
        let late = |before: Vec<SwapOutcome>, last: SwapOutcome| async move {
            let mut swapping = begin();
            assert!(before.into_iter().all(|outcome| swapping.hear(outcome).is_none()));
            tokio::time::advance(Duration::from_secs(2)).await;
            swapping.hear(last).unwrap().unwrap_err()
        };
        assert!(matches!(late(vec![not_sent()], not_sent()).await, SwapError::Unavailable(_)));
        assert!(matches!(late(vec![not_sent(), unknown()], not_sent()).await, SwapError::Unknown(_)));
        assert!(matches!(late(vec![], unknown()).await, SwapError::Unknown(_)));
    }

    #[test]
    fn a_second_try_is_the_same_swap_and_another_swap_is_not() {
        let swapping = begin();
        assert_eq!(swapping.command(), swapping.command());
        let Proposal::Swap { nonce, .. } = begin().command();
        assert_ne!(nonce, swapping.nonce);
        // A node gives a swap up after a quarter of the lease time.
        assert!(swapping.limit < Duration::from_secs(10) / 4);
    }
}
