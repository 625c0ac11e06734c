//! The process's descriptors: a few are kept in reserve.
//!
//! The listener of the application takes descriptors for strangers, as many as the system lets it
//! have. When no more are to be had, what is open goes on: the stream, the log, the writer. What has
//! to be opened anew gives up some of the reserve, and is opened then. The reserve is filled again,
//! before anything else, when descriptors are free again.
//!
//! There is one reserve in a process, as there is one limit. [`Purpose`] says how far down each may
//! go, so that peers at our door leave some for readers, and readers some for the node itself.
//!
//! Between a descriptor that is given up and the opening that it is meant for, another thread may
//! take it. So it is tried a few times.

use std::fs::File;
use std::future::Future;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::lock::lock;
use crate::report::Condition;
use crate::threads::aside;

/// Most descriptors in the reserve.
const MOST: usize = 32;
/// No more than this part of all that the process may have.
const PART: usize = 8;
/// How often something is tried, with more of the reserve each time.
const TRIES: usize = 4;
/// How often it is said that there are none left.
const TOLD_EVERY: Duration = Duration::from_secs(60);
/// What stands for a descriptor in reserve.
const PLACEHOLDER: &str = "/dev/null";

/// What a descriptor is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// A connection of a peer, or of a stranger, to the node's own listener.
    Door,
    /// A connection of the pool: two files.
    Reader,
    /// The node's own files and sockets: the log, its state, the writer, the stream, the lease.
    Node,
}

impl Purpose {
    /// How many of a reserve of `size` it leaves.
    fn leaves(self, size: usize) -> usize {
        match self {
            Purpose::Door => size - size / 8,
            Purpose::Reader => size / 4,
            Purpose::Node => 0,
        }
    }
}

static RESERVE: Mutex<Reserve> =
    Mutex::new(Reserve { nodes: 0, size: 0, held: Vec::new(), lent: 0, told: None });
/// Whether the reserve lacks some: what is not short need not ask for the lock.
static SHORT: AtomicBool = AtomicBool::new(false);

struct Reserve {
    /// Open databases of this process.
    nodes: usize,
    size: usize,
    held: Vec<File>,
    /// Openings that are under way with what was given up for them. Until they have ended, what is
    /// free is theirs.
    lent: usize,
    told: Option<Instant>,
}

/// Keeps the reserve for as long as this lives, for one open database.
#[derive(Debug)]
pub(crate) struct Kept(());

impl Kept {
    pub(crate) fn begin() -> Kept {
        let mut reserve = lock(&RESERVE);
        reserve.nodes += 1;
        reserve.size = limit().map_or(MOST, |limit| MOST.min(limit / PART));
        // Where there are no placeholders there is no reserve.
        if placeholder().is_err_and(|error| !is_want(&error)) {
            reserve.size = 0;
        }
        drop(reserve);
        SHORT.store(true, Ordering::Relaxed);
        refill();
        Kept(())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mut reserve = lock(&RESERVE);
        reserve.nodes -= 1;
        if reserve.nodes == 0 {
            reserve.size = 0;
            reserve.held.clear();
        }
    }
}

/// How many descriptors the process may have.
#[cfg(unix)]
fn limit() -> Option<usize> {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::Nofile).current.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// Elsewhere no program is likely to come near it.
#[cfg(not(unix))]
fn limit() -> Option<usize> {
    Some(0)
}

fn placeholder() -> io::Result<File> {
    File::open(PLACEHOLDER)
}

/// Whether an error says that the process, or the system, has no descriptor left.
pub(crate) fn is_want(error: &io::Error) -> bool {
    #[cfg(unix)]
    {
        use rustix::io::Errno;
        let want = [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error);
        error.raw_os_error().is_some_and(|code| want.contains(&code))
    }
    #[cfg(not(unix))]
    {
        let _ = error;
        false
    }
}

/// Whether there is none left at this moment, for errors that do not say so.
pub(crate) fn used_up() -> bool {
    placeholder().is_err_and(|error| is_want(&error))
}

/// Whether the reserve is whole, or has more than this purpose leaves. What became free is the
/// reserve's first.
pub(crate) fn has_room(purpose: Purpose) -> bool {
    refill() || {
        let reserve = lock(&RESERVE);
        reserve.held.len() > purpose.leaves(reserve.size)
    }
}

/// Makes the reserve whole again, as far as descriptors are free. Whether it is.
pub(crate) fn refill() -> bool {
    if !SHORT.load(Ordering::Relaxed) {
        return true;
    }
    let mut reserve = lock(&RESERVE);
    if reserve.lent > 0 {
        return false;
    }
    while reserve.held.len() < reserve.size {
        match placeholder() {
            Ok(file) => reserve.held.push(file),
            Err(_) => return false,
        }
    }
    SHORT.store(false, Ordering::Relaxed);
    true
}

/// What was given up of the reserve, until what it is for is open, or can't be opened.
pub(crate) struct Loan(());

impl Drop for Loan {
    fn drop(&mut self) {
        lock(&RESERVE).lent -= 1;
        refill();
    }
}

/// Gives up so many of the reserve, if that leaves what is not for this purpose.
pub(crate) fn lend(purpose: Purpose, count: usize) -> Option<Loan> {
    let mut reserve = lock(&RESERVE);
    let left = reserve.held.len().checked_sub(count)?;
    if left < purpose.leaves(reserve.size) {
        return None;
    }
    let given = reserve.held.split_off(left);
    reserve.lent += 1;
    SHORT.store(true, Ordering::Relaxed);
    let news = reserve.told.is_none_or(|told| told.elapsed() >= TOLD_EVERY);
    if news {
        reserve.told = Some(Instant::now());
    }
    drop(reserve);
    let loan = Loan(());
    drop(given);
    if news {
        aside(|| Condition::DescriptorsUsedUp { limit: limit().unwrap_or_default() }.say());
    }
    Some(loan)
}

/// Opens something that takes `count` descriptors, with the reserve if there are no others.
/// `is_want` says of an error whether it is for want of them.
pub(crate) fn open<T, E>(
    (purpose, count): (Purpose, usize),
    is_want: impl Fn(&E) -> bool,
    mut open: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let mut opened = open();
    let mut loans = Vec::new();
    while loans.len() < TRIES && opened.as_ref().is_err_and(&is_want) {
        let Some(loan) = lend(purpose, count) else { break };
        loans.push(loan);
        opened = open();
    }
    opened
}

/// Opens a file of the node, with the reserve if there is no other descriptor.
pub(crate) fn open_file<T>(opens: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    open((Purpose::Node, 1), is_want, opens)
}

/// Connects to another node or to a lease's store, by a name or an address, with the reserve if there
/// are no other descriptors. The errors of a name's look-up do not tell why.
pub(crate) async fn connect<T, E, F>(count: usize, mut connect: impl FnMut() -> F) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let mut connected = connect().await;
    let mut loans = Vec::new();
    while loans.len() < TRIES && connected.is_err() && used_up() {
        let Some(loan) = lend(Purpose::Node, count) else { break };
        loans.push(loan);
        connected = connect().await;
    }
    connected
}
