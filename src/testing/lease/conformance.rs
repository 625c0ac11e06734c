//! The contract of a store, tried.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ledger::{Ledger, SwapFate};
use super::{Broken, Dice};
use crate::lease::record::{LEASE_TIMES, RECORD_MAX_BYTES};
use crate::lease::{Store, Stored, SwapError, Version};

/// Handles that write at the same time.
const WRITERS: usize = 8;
/// Swaps that each of them gets done.
const SWAPS: usize = 12;
/// The longest that each part of the suite takes.
const PART_LIMIT: Duration = Duration::from_secs(120);
/// The wait before a store is asked once more.
const PAUSE: Duration = Duration::from_millis(2);

type StoreHandle = Arc<dyn Store>;

/// Checks a store against the contract of [`Store`]. `make` gives a new handle to one and the same
/// register, which is empty at first and has no other users.
///
/// - Many handles write the first record at once, and then many more. Some of their calls are
///   dropped on the way. What was acknowledged must be one sequence, without what was refused.
/// - A version that was replaced is not taken, nor one whose record is there again byte for byte.
/// - Records have up to 16 KiB of any bytes, and are read by other handles as they were written.
///
/// What outlives a power cut, rule 6, no test of this kind sees. A store may answer with
/// [`SwapError::Unknown`], read old records, fail and stall as the contract allows, as long as
/// something gets done. A call is given up after a quarter of the store's lease time, as a node
/// does. The suite writes some hundred records, and a store in memory takes a moment. The runtime
/// may have one thread or many, and its clock must run.
///
/// ```
/// use std::sync::Arc;
///
/// use replite::lease::Directory;
/// use replite::testing::lease::{Broken, conformance};
///
/// // #[tokio::test]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Broken> {
/// let data = tempfile::tempdir().unwrap();
/// conformance(|| Arc::new(Directory::new(data.path().join("lease")))).await
/// # }
/// ```
///
/// # Errors
/// [`Broken`] says which rule does not hold, and how that was seen.
///
/// # Cancel safety
/// Dropped, it leaves the register with any record.
pub async fn conformance(make: impl Fn() -> Arc<dyn Store>) -> Result<(), Broken> {
    let lease_time = make().lease_time();
    if !LEASE_TIMES.contains(&lease_time) {
        return Err(Broken::useless(format!("a lease time of {lease_time:?} is not 1 s to 60 s")));
    }
    let handles: Vec<StoreHandle> = (0..WRITERS).map(|_| make()).collect();
    let limit = lease_time / 4;
    let sent = in_time("the first record", first_record(&handles, limit)).await?;
    let mut steps = Steps::new(&handles, limit, sent);
    in_time("one swap after the other", steps.run()).await?;
    let sent = steps.sent;
    in_time("many swaps at once", many_at_once(&handles, limit, sent)).await
}

async fn in_time<T>(what: &str, part: impl Future<Output = Result<T, Broken>>) -> Result<T, Broken> {
    let late = || Broken::useless(format!("{what} was not done in {} s", PART_LIMIT.as_secs()));
    tokio::time::timeout(PART_LIMIT, part).await.unwrap_or_else(|_| Err(late()))
}

/// Ends with the first that fails.
async fn all(mut tasks: JoinSet<Result<(), Broken>>) -> Result<(), Broken> {
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap_or_else(|error| Err(Broken::useless(format!("a call ended with {error}"))))?;
    }
    Ok(())
}

/// Many write the first record of an empty register. Returns what was sent.
async fn first_record(handles: &[StoreHandle], limit: Duration) -> Result<HashSet<Vec<u8>>, Broken> {
    let ledger = Arc::new(Ledger::new(None, HashSet::new(), limit));
    loop {
        match ledger.read(&handles[0]).await? {
            Some(None) => break,
            Some(Some(_)) => return Err(Broken::new(3, "the register has a record before any was written")),
            None => tokio::time::sleep(PAUSE).await,
        }
    }
    let made_up = ledger.swap(&handles[0], Some(&Version::new("1")), b"over none", None).await?;
    if matches!(made_up, SwapFate::Done(_)) {
        return Err(Broken::new(1, "a swap over a version was done where there is no record"));
    }
    let mut tasks = JoinSet::new();
    for (number, handle) in handles.iter().cloned().enumerate() {
        let ledger = ledger.clone();
        tasks.spawn(async move {
            ledger.swap(&handle, None, format!("first of {number}").as_bytes(), None).await.map(drop)
        });
    }
    all(tasks).await?;
    let last = write_last(&ledger, &handles[0], "the first").await?;
    ledger.check(&last)?;
    let ledger = Arc::into_inner(ledger).ok_or_else(|| Broken::useless("a call goes on"))?;
    Ok(ledger.into_sent())
}

/// Writes until a swap is acknowledged. All others that count are before it. What it writes is told
/// from the last records of another part: an attempt may be done whose answer said nothing.
async fn write_last(ledger: &Ledger, handle: &StoreHandle, part: &str) -> Result<Vec<u8>, Broken> {
    for attempt in 0.. {
        let Some(read) = ledger.read(handle).await? else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let record = format!("last {attempt} of {part}").into_bytes();
        let over = read.map(|stored| stored.version);
        if matches!(ledger.swap(handle, over.as_ref(), &record, None).await?, SwapFate::Done(_)) {
            return Ok(record);
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(Broken::useless("no swap was acknowledged"))
}

/// Many handles write, each over what it read. Some of their calls are dropped.
async fn many_at_once(
    handles: &[StoreHandle],
    limit: Duration,
    sent: HashSet<Vec<u8>>,
) -> Result<(), Broken> {
    let mut steps = Steps::new(handles, limit, sent);
    let base = steps.write(0, b"before many").await?;
    let ledger = Arc::new(Ledger::new(Some(base), steps.sent, limit));
    let mut tasks = JoinSet::new();
    for (number, handle) in handles.iter().cloned().enumerate() {
        tasks.spawn(writer(ledger.clone(), handle, number));
    }
    all(tasks).await?;
    let last = write_last(&ledger, &handles[0], "many").await?;
    ledger.check(&last)
}

async fn writer(ledger: Arc<Ledger>, handle: StoreHandle, number: usize) -> Result<(), Broken> {
    let dice = Dice::new(number as u64);
    let (mut done, mut attempt) = (0, 0);
    while done < SWAPS {
        let read = ledger.read(&handle).await?;
        let Some(Some(stored)) = read else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        attempt += 1;
        let record = format!("attempt {attempt} of {number}");
        // Every fourth is dropped, if it takes longer than that.
        let given_up = (dice.below(4) == 0).then(|| Duration::from_micros(dice.below(3000)));
        match ledger.swap(&handle, Some(&stored.version), record.as_bytes(), given_up).await? {
            SwapFate::Done(_) => done += 1,
            SwapFate::Refused(_) => tokio::time::sleep(Duration::from_micros(dice.below(2000))).await,
            SwapFate::Open => {}
        }
    }
    Ok(())
}

/// One swap after the other, over what is there.
struct Steps<'a> {
    handles: &'a [StoreHandle],
    limit: Duration,
    sent: HashSet<Vec<u8>>,
    /// Versions that came by.
    seen: HashSet<Version>,
}

/// The record of swaps that must not be done.
const WRONG: &[u8] = b"must not be";

impl Steps<'_> {
    fn new(handles: &[StoreHandle], limit: Duration, sent: HashSet<Vec<u8>>) -> Steps<'_> {
        Steps { handles, limit, sent, seen: HashSet::new() }
    }

    async fn run(&mut self) -> Result<(), Broken> {
        let a = self.write(0, b"a").await?;
        self.refused(1, None, "a swap over no record was done where there is one").await?;
        let b = self.write(1, b"b").await?;
        self.refused(2, Some(&a), "two swaps were done over one version").await?;
        let again = self.write(3, b"a").await?;
        let once_more = self.write(4, b"a").await?;
        if again == a || once_more == a || once_more == again {
            let version = once_more.as_str();
            let what = format!("a record that was written again byte for byte has {version:?} again");
            return Err(Broken::new(2, what));
        }
        for old in [a, b, again] {
            self.refused(5, Some(&old), "a swap was done over a version that was replaced").await?;
        }
        for bytes in [1, 255, 4096, RECORD_MAX_BYTES] {
            let record: Vec<u8> = (0..bytes).map(|at| (at * 31 + 7) as u8).collect();
            let version = self.write(6, &record).await?;
            self.everyone_reads(&Stored::new(record, version)).await?;
        }
        Ok(())
    }

    async fn read(&self, handle: usize) -> Result<Option<Option<Stored>>, Broken> {
        let read = tokio::time::timeout(self.limit, self.handles[handle].read()).await;
        let Ok(Ok(read)) = read else {
            tokio::time::sleep(PAUSE).await;
            return Ok(None);
        };
        match &read {
            Some(stored) if stored.record == WRONG => {
                return Err(Broken::new(1, "a swap was done over a version that was not the register's"));
            }
            Some(stored) if !self.sent.contains(&stored.record) => {
                let bytes = stored.record.len();
                return Err(Broken::new(3, format!("a read gives {bytes} bytes that were never written")));
            }
            _ => {}
        }
        Ok(Some(read))
    }

    async fn swap(
        &self,
        handle: usize,
        over: Option<&Version>,
        record: &[u8],
    ) -> Option<Result<Version, SwapError>> {
        tokio::time::timeout(self.limit, self.handles[handle].swap(over, record)).await.ok()
    }

    /// Writes a record over whatever is there, until that is known to be done. Returns its version.
    async fn write(&mut self, handle: usize, record: &[u8]) -> Result<Version, Broken> {
        self.sent.insert(record.to_vec());
        let before = self.seen.clone();
        // Whether an attempt may have been done whose answer said nothing.
        let mut open = false;
        let end = Instant::now() + PART_LIMIT;
        while Instant::now() < end {
            let Some(read) = self.read(handle).await? else { continue };
            if let Some(Stored { record: bytes, version }) = &read {
                self.seen.insert(version.clone());
                if open && bytes == record && !before.contains(version) {
                    return Ok(version.clone());
                }
            }
            let over = read.map(|stored| stored.version);
            match self.swap(handle, over.as_ref(), record).await {
                Some(Ok(version)) => {
                    self.seen.insert(version.clone());
                    return Ok(version);
                }
                Some(Err(SwapError::Unknown(_))) | None => open = true,
                Some(Err(_)) => tokio::time::sleep(PAUSE).await,
            }
        }
        Err(Broken::useless("no swap was acknowledged"))
    }

    /// A swap that must not be done, by an answer or by what is read.
    async fn refused(&mut self, handle: usize, over: Option<&Version>, what: &str) -> Result<(), Broken> {
        match self.swap(handle, over, WRONG).await {
            Some(Ok(_)) => Err(Broken::new(1, what)),
            // A read that gives it fails.
            _ => Ok(()),
        }
    }

    /// Each handle comes to read the record.
    async fn everyone_reads(&self, written: &Stored) -> Result<(), Broken> {
        let bytes = written.record.len();
        for handle in 0..self.handles.len() {
            let end = Instant::now() + PART_LIMIT / 4;
            loop {
                let read = self.read(handle).await?.flatten();
                match read {
                    Some(read) if read == *written => break,
                    Some(read) if read.version == written.version => {
                        let what = format!("a record of {bytes} bytes is read as {}", read.record.len());
                        return Err(Broken::new(3, what));
                    }
                    _ if Instant::now() > end => {
                        let what = format!("another handle never reads a record of {bytes} bytes");
                        return Err(Broken::new(1, what));
                    }
                    _ => tokio::time::sleep(PAUSE).await,
                }
            }
        }
        Ok(())
    }
}
