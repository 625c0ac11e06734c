//! What was sent to a register and what came back: whether all of it is one sequence.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::Broken;
use crate::lease::{Store, Stored, SwapError, Version};
use crate::lock::lock;

/// What became of a swap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum SwapFate {
    Done(Version),
    /// It was not done, and never will be.
    Refused(String),
    /// It may have been done, or may be later.
    Open,
}

#[derive(Debug)]
struct SentRecord {
    over: Option<Version>,
    fate: SwapFate,
}

/// Swaps of records that are all different.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// The version that was there before, if there was one.
    base: Option<Version>,
    /// Records that were sent before. A read may give one of them.
    earlier: HashSet<Vec<u8>>,
    /// The longest that one call may take.
    limit: Duration,
    pages: Mutex<Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    sent: HashMap<Vec<u8>, SentRecord>,
    /// The record of each version that was seen.
    versions: HashMap<Version, Vec<u8>>,
    /// Versions of records that were sent before. A swap of before that was given up may be done
    /// when this ledger has begun already: then its record is what the sequence begins with.
    late: HashSet<Version>,
}

impl Ledger {
    pub(super) fn new(base: Option<Version>, earlier: HashSet<Vec<u8>>, limit: Duration) -> Ledger {
        Ledger { base, earlier, limit, pages: Mutex::default() }
    }

    /// All records that were sent.
    pub(super) fn into_sent(self) -> HashSet<Vec<u8>> {
        let pages = self.pages.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.earlier.into_iter().chain(pages.sent.into_keys()).collect()
    }

    /// One swap, which is given up after a while. Returns what is known of it.
    pub(super) async fn swap(
        &self,
        store: &Arc<dyn Store>,
        over: Option<&Version>,
        record: &[u8],
        limit: Option<Duration>,
    ) -> Result<SwapFate, Broken> {
        debug_assert!(!self.earlier.contains(record), "a record is sent in one part alone");
        let sent = SentRecord { over: over.cloned(), fate: SwapFate::Open };
        lock(&self.pages).sent.insert(record.to_vec(), sent);
        let limit = limit.unwrap_or(self.limit);
        let fate = fate(tokio::time::timeout(limit, store.swap(over, record)).await.ok());
        let mut pages = lock(&self.pages);
        if let Some(sent) = pages.sent.get_mut(record) {
            sent.fate = fate.clone();
        }
        if let SwapFate::Done(version) = &fate {
            self.saw(&mut pages, version, record)?;
        }
        Ok(fate)
    }

    /// The register's record, or an older one; the outer none where the store did not say it.
    pub(super) async fn read(&self, store: &Arc<dyn Store>) -> Result<Option<Option<Stored>>, Broken> {
        let Ok(Ok(read)) = tokio::time::timeout(self.limit, store.read()).await else { return Ok(None) };
        if let Some(stored) = &read {
            let mut pages = lock(&self.pages);
            if self.earlier.contains(&stored.record) {
                pages.late.insert(stored.version.clone());
                return Ok(Some(read));
            }
            if !pages.sent.contains_key(&stored.record) {
                let bytes = stored.record.len();
                return Err(Broken::new(3, format!("a read gives {bytes} bytes that were never written")));
            }
            self.saw(&mut pages, &stored.version, &stored.record)?;
        }
        Ok(Some(read))
    }

    /// A version belongs to one record, and a record that was sent once has one.
    fn saw(&self, pages: &mut Pages, version: &Version, record: &[u8]) -> Result<(), Broken> {
        let of_base = self.base.as_ref() == Some(version);
        let known = pages.versions.insert(version.clone(), record.to_vec());
        if of_base || known.is_some_and(|known| known != record) {
            let version = version.as_str();
            return Err(Broken::new(2, format!("the version {version:?} is that of two records")));
        }
        let others = pages.versions.iter().filter(|(other, of)| *of == record && *other != version);
        if others.count() > 0 {
            return Err(Broken::new(1, "a record that was sent once was written twice"));
        }
        Ok(())
    }

    /// Whether the swaps are one sequence, which leads to this record: all that were acknowledged
    /// are in it, and none that was refused.
    pub(super) fn check(&self, last: &[u8]) -> Result<(), Broken> {
        let pages = lock(&self.pages);
        let base = self.base.as_ref();
        let mut sequence: HashSet<&[u8]> = HashSet::new();
        let mut record = last;
        loop {
            if !sequence.insert(record) {
                return Err(Broken::new(1, "records took each other's place in a circle"));
            }
            let Some(SentRecord { over, .. }) = pages.sent.get(record) else { break };
            if over.as_ref() == base || over.as_ref().is_some_and(|over| pages.late.contains(over)) {
                break;
            }
            let Some(before) = over.as_ref().and_then(|over| pages.versions.get(over)) else {
                return Err(Broken::new(1, "a swap was done over a version that the register never had"));
            };
            record = before;
        }
        for (record, sent) in &pages.sent {
            let is_in = sequence.contains(record.as_slice());
            match &sent.fate {
                SwapFate::Done(_) if !is_in => {
                    let what = "a swap was acknowledged, and its record is not in the sequence: \
                                two took the place of one record";
                    return Err(Broken::new(1, what));
                }
                SwapFate::Refused(how) if is_in => {
                    return Err(Broken::new(4, format!("a swap was answered with {how}, and was done")));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn fate(answer: Option<Result<Version, SwapError>>) -> SwapFate {
    match answer {
        Some(Ok(version)) => SwapFate::Done(version),
        Some(Err(SwapError::Conflict)) => SwapFate::Refused("Conflict".into()),
        Some(Err(SwapError::Unavailable(why))) => SwapFate::Refused(format!("Unavailable ({why})")),
        // A future that was dropped, too.
        Some(Err(SwapError::Unknown(_))) | None => SwapFate::Open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::lease::Memory;

    const LIMIT: Duration = Duration::from_secs(5);

    async fn written(store: &Arc<dyn Store>, over: Option<&Version>, record: &[u8]) -> Version {
        store.swap(over, record).await.unwrap()
    }

    #[tokio::test]
    async fn a_swap_that_was_given_up_before_may_be_what_a_sequence_begins_with() {
        let store: Arc<dyn Store> = Arc::new(Memory::new());
        let base = written(&store, None, b"base").await;
        let earlier = [b"base".to_vec(), b"late".to_vec()].into_iter().collect();
        let ledger = Ledger::new(Some(base.clone()), earlier, LIMIT);
        // It comes to the register only now.
        written(&store, Some(&base), b"late").await;
        let late = ledger.read(&store).await.unwrap().unwrap().unwrap().version;
        let next = ledger.swap(&store, Some(&late), b"next", None).await.unwrap();
        assert!(matches!(next, SwapFate::Done(_)), "{next:?}");
        ledger.check(b"next").unwrap();
    }

    #[tokio::test]
    async fn what_was_acknowledged_before_a_late_swap_is_missed() {
        let store: Arc<dyn Store> = Arc::new(Memory::new());
        let base = written(&store, None, b"base").await;
        let earlier = [b"base".to_vec(), b"late".to_vec()].into_iter().collect();
        let ledger = Ledger::new(Some(base.clone()), earlier, LIMIT);
        let SwapFate::Done(first) = ledger.swap(&store, Some(&base), b"first", None).await.unwrap() else {
            panic!("it was not done");
        };
        // A register that takes it over what it was not meant for.
        written(&store, Some(&first), b"late").await;
        let late = ledger.read(&store).await.unwrap().unwrap().unwrap().version;
        ledger.swap(&store, Some(&late), b"next", None).await.unwrap();
        let broken = ledger.check(b"next").unwrap_err().to_string();
        assert!(broken.contains("rule 1 "), "{broken}");
    }
}
