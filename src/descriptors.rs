//! The process's descriptors: a few are kept in reserve.
//!
//! The application's listener takes descriptors for strangers, as many as the system lets it have.
//! When no more are to be had, what is open goes on: the stream, the log, the writer. What is to be
//! opened anew gives up some of the reserve, and takes what is free then. When descriptors are free
//! again, the reserve is made whole.
//!
//! There is one reserve in a process, as there is one limit. It is divided, so that peers
//! and strangers at our door leave readers their [`Share`], and readers the node.
//!
//! Between a descriptor that is given up and the opening that it is meant for, another thread may
//! take it. So it is tried a few times.

use std::fs::{self, File};
use std::future::Future;
use std::io::{self, Read, Write};
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::lock::lock;
use crate::report::Condition;
use crate::threads::aside;

/// The reserve is no more than this part of all that the process may have.
const PART: usize = 8;
/// How often something is tried, with more of the reserve each time.
const TRIES: usize = 4;
/// How long an opening waits for others that began before it had its turn.
const PAUSE: Duration = Duration::from_millis(1);
/// How often it is said that there are none left.
const TOLD_EVERY: Duration = Duration::from_secs(60);
/// What stands for a descriptor in reserve.
const PLACEHOLDER: &str = "/dev/null";

/// What a part of the reserve is for. Where the process may have few, the first ones get theirs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Share {
    /// One of the first connections of a database's pool: with these all readers are served.
    FirstReader,
    /// The node's own files and sockets: the log, its state, the writer, the stream, the lease.
    Node,
    /// A connection of a peer, or of a stranger, to the node's own listener.
    Door,
    /// One more connection of a pool.
    Reader,
}

const SHARES: [Share; 4] = [Share::FirstReader, Share::Node, Share::Door, Share::Reader];

impl Share {
    /// How large it is, where there are so many open databases.
    fn size(self, databases: usize) -> usize {
        match self {
            Share::FirstReader => 4 * databases,
            Share::Node => 8,
            Share::Door => 4,
            Share::Reader => 16,
        }
    }
}

static RESERVE: Mutex<Reserve> = Mutex::new(Reserve {
    databases: 0,
    sizes: [0; 4],
    held: [const { Vec::new() }; 4],
    source: None,
    lent: 0,
    told: None,
});
/// Held for an opening while the reserve lacks some. Of many at one time, each would take a part of
/// what another has given up, and all of them would fail.
static TURN: Mutex<()> = Mutex::new(());
/// Whether the reserve lacks some: while it does not, no one need ask for the lock.
static SHORT: AtomicBool = AtomicBool::new(false);

struct Reserve {
    /// Open databases of this process.
    databases: usize,
    /// Of each share: how many there are to be, and those that are there.
    sizes: [usize; 4],
    held: [Vec<File>; 4],
    /// What those become that were of a file of the node.
    source: Option<File>,
    /// Openings that are under way with what was given up for them. Until they have ended, what is
    /// free is theirs.
    lent: usize,
    told: Option<Instant>,
}

impl Reserve {
    /// How large the shares are to be now. What is there too many is closed.
    fn resize(&mut self) {
        // Where there are no placeholders there is no reserve.
        let possible = self.databases > 0 && placeholder().map_or_else(|error| is_want(&error), |_| true);
        let most = if possible { limit().map_or(usize::MAX, |limit| limit / PART) } else { 0 };
        if !possible {
            self.source = None;
        } else if self.source.is_none() {
            self.source = placeholder().ok();
        }
        let mut left = most;
        for share in SHARES {
            // The first of them does not have all.
            let size = share.size(self.databases).min(left).min(most.div_ceil(2));
            self.sizes[share as usize] = size;
            self.held[share as usize].truncate(size);
            left -= size;
        }
    }

    /// Closes a file, whose descriptor is one of the reserve in the same moment, if that lacks one.
    fn take_back(&mut self, file: File) {
        let lacks = |share: &Share| self.held[*share as usize].len() < self.sizes[*share as usize];
        let own = Some(Share::Node).filter(lacks);
        let (Some(share), Some(source)) = (own.or_else(|| SHARES.into_iter().find(lacks)), &self.source)
        else {
            return;
        };
        if let Some(file) = stand_in(source, file) {
            self.held[share as usize].push(file);
        }
    }
}

/// Makes a file's descriptor one of `source`.
#[cfg(unix)]
fn stand_in(source: &File, file: File) -> Option<File> {
    let mut descriptor = std::os::fd::OwnedFd::from(file);
    rustix::io::dup3(source, &mut descriptor, rustix::io::DupFlags::CLOEXEC).ok()?;
    Some(descriptor.into())
}

#[cfg(not(unix))]
fn stand_in(_: &File, _: File) -> Option<File> {
    None
}

/// Keeps the reserve for as long as this lives, for one open database.
#[derive(Debug)]
pub(crate) struct ReserveHold(());

impl ReserveHold {
    pub(crate) fn begin() -> ReserveHold {
        let mut reserve = lock(&RESERVE);
        reserve.databases += 1;
        reserve.resize();
        drop(reserve);
        SHORT.store(true, Ordering::Relaxed);
        refill();
        ReserveHold(())
    }
}

impl Drop for ReserveHold {
    fn drop(&mut self) {
        let mut reserve = lock(&RESERVE);
        reserve.databases -= 1;
        reserve.resize();
    }
}

/// How many descriptors the process may have, if there is a limit.
#[cfg(unix)]
fn limit() -> Option<usize> {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::Nofile).current.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// Elsewhere no program comes near it, and there is no reserve.
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

/// Whether an opening that failed just now may have done so for want of descriptors, for errors
/// that do not say so. A free one does not tell: it may be what another opening has given up of the
/// reserve since then.
pub(crate) fn used_up() -> bool {
    SHORT.load(Ordering::Relaxed) || placeholder().is_err_and(|error| is_want(&error))
}

/// Whether the reserve is whole, or has some of this share. What became free is the reserve's
/// first.
pub(crate) fn has_room(share: Share) -> bool {
    refill() || !lock(&RESERVE).held[share as usize].is_empty()
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
    let Reserve { sizes, held, .. } = &mut *reserve;
    for (held, size) in held.iter_mut().zip(sizes) {
        while held.len() < *size {
            match placeholder() {
                Ok(file) => held.push(file),
                Err(_) => return false,
            }
        }
    }
    SHORT.store(false, Ordering::Relaxed);
    true
}

/// Refills the reserve when it is dropped, as the last field of what has a descriptor: that one is
/// free then.
#[derive(Debug)]
pub(crate) struct Refills;

impl Drop for Refills {
    fn drop(&mut self) {
        refill();
    }
}

/// What was given up of the reserve, until what it is for is open, or can't be opened.
pub(crate) struct Loan(());

impl Drop for Loan {
    fn drop(&mut self) {
        lock(&RESERVE).lent -= 1;
        refill();
    }
}

/// Gives up so many of a share, if it has some.
pub(crate) fn lend(share: Share, count: usize) -> Option<Loan> {
    let mut reserve = lock(&RESERVE);
    let held = &mut reserve.held[share as usize];
    if held.is_empty() {
        return None;
    }
    let given = held.split_off(held.len().saturating_sub(count));
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
    (share, count): (Share, usize),
    is_want: impl Fn(&E) -> bool,
    mut open: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let mut turn = SHORT.load(Ordering::Relaxed).then(|| lock(&TURN));
    let mut opened = open();
    let mut loans = Vec::new();
    for _ in 0..TRIES {
        if !opened.as_ref().is_err_and(&is_want) {
            break;
        }
        turn.get_or_insert_with(|| lock(&TURN));
        match lend(share, count) {
            Some(loan) => loans.push(loan),
            None if loans.is_empty() => break,
            // What was given up may have been with one that failed meanwhile.
            None => std::thread::sleep(PAUSE),
        }
        opened = open();
    }
    opened
}

/// Opens a file of the node, with the reserve if there is no other descriptor.
pub(crate) fn open_file(opens: impl FnMut() -> io::Result<File>) -> io::Result<NodeFile> {
    open((Share::Node, 1), is_want, opens).map(|file| NodeFile(Some(file)))
}

/// The entries of a directory, with the reserve if there is no other descriptor.
pub(crate) fn list(directory: &Path) -> io::Result<fs::ReadDir> {
    open((Share::Node, 1), is_want, || fs::read_dir(directory))
}

/// Removes a directory and what is in it, which takes a descriptor for each level.
pub(crate) fn remove_directory(directory: &Path) -> io::Result<()> {
    open((Share::Node, 2), is_want, || fs::remove_dir_all(directory))
}

/// A file of the node. While the reserve lacks some, its descriptor goes there, and is free at no
/// time in between: strangers would have them all, one after the other.
#[derive(Debug)]
pub(crate) struct NodeFile(Option<File>);

impl NodeFile {
    /// The file by itself, whose descriptor is free when it is closed.
    pub(crate) fn into_file(mut self) -> File {
        match self.0.take() {
            Some(file) => file,
            None => unreachable!("the file is taken only here and when it is dropped"),
        }
    }
}

impl Deref for NodeFile {
    type Target = File;

    fn deref(&self) -> &File {
        match &self.0 {
            Some(file) => file,
            None => unreachable!("the file is taken only when this is dropped"),
        }
    }
}

impl DerefMut for NodeFile {
    fn deref_mut(&mut self) -> &mut File {
        match &mut self.0 {
            Some(file) => file,
            None => unreachable!("the file is taken only when this is dropped"),
        }
    }
}

impl Read for NodeFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (**self).read(buffer)
    }
}

impl Write for NodeFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (**self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        (**self).flush()
    }
}

impl Drop for NodeFile {
    fn drop(&mut self) {
        let Some(file) = self.0.take() else { return };
        if SHORT.load(Ordering::Relaxed) {
            lock(&RESERVE).take_back(file);
        }
    }
}

/// Connects to another node or to a lease's store, with the reserve if there are no other
/// descriptors. A name's look-up does not tell why it failed.
pub(crate) async fn connect<T, E, F>(count: usize, mut connect: impl FnMut() -> F) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let mut connected = connect().await;
    let mut loans = Vec::new();
    while loans.len() < TRIES && connected.is_err() && used_up() {
        let Some(loan) = lend(Share::Node, count) else { break };
        loans.push(loan);
        connected = connect().await;
    }
    connected
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn held() -> [usize; 4] {
        lock(&RESERVE).held.each_ref().map(Vec::len)
    }

    /// As many as the process may have.
    fn take_all() -> Vec<File> {
        std::iter::from_fn(|| placeholder().ok()).collect()
    }

    #[test]
    fn each_share_comes_back_before_others_have_it() {
        if !crate::ends::alone("descriptors::tests::each_share_comes_back_before_others_have_it") {
            return;
        }
        let one = ReserveHold::begin();
        assert_eq!(held(), [4, 8, 4, 16]);
        let two = ReserveHold::begin();
        assert_eq!(held(), [8, 8, 4, 16], "a second database");
        drop(two);
        assert_eq!(held(), [4, 8, 4, 16]);
        let mut others = take_all();
        assert!(used_up());

        // A door takes its own share, and no more.
        let open = |share| open((share, 1), is_want, placeholder);
        let mut doors: Vec<File> = (0..4).map(|_| open(Share::Door).unwrap()).collect();
        assert!(is_want(&open(Share::Door).unwrap_err()));
        assert_eq!(held(), [4, 8, 0, 16]);
        assert!(!has_room(Share::Door) && has_room(Share::Reader));
        // A file of the node is at no time free for others.
        let file = open_file(placeholder).unwrap();
        assert_eq!(held(), [4, 7, 0, 16]);
        drop(file);
        assert!(used_up());
        assert_eq!(held(), [4, 8, 0, 16]);
        // What is free is the reserve's, and then the others'.
        doors.pop();
        assert!(!refill() && used_up());
        assert_eq!(held(), [4, 8, 1, 16]);
        others.truncate(others.len() - 4);
        assert!(refill() && !used_up());
        assert_eq!(held(), [4, 8, 4, 16]);
        drop(one);
        assert_eq!(held(), [0; 4]);
    }

    #[test]
    fn of_many_openings_at_one_time_those_that_have_a_share_succeed() {
        if !crate::ends::alone(
            "descriptors::tests::of_many_openings_at_one_time_those_that_have_a_share_succeed",
        ) {
            return;
        }
        let _kept = ReserveHold::begin();
        let _others = take_all();
        let open = |share| open((share, 2), is_want, || Ok([placeholder()?, placeholder()?]));
        let _readers: Vec<_> = std::iter::from_fn(|| open(Share::Reader).ok()).collect();
        for _ in 0..100 {
            let begin = std::sync::Barrier::new(16);
            let run = |share| {
                begin.wait();
                open(share).ok()
            };
            let opened = std::thread::scope(|scope| {
                let (run, shares) = (&run, [Share::FirstReader, Share::Reader].into_iter().cycle().take(16));
                let threads: Vec<_> = shares.map(|share| scope.spawn(move || run(share))).collect();
                threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            assert!(!opened.is_empty());
            drop(opened);
            refill();
            assert_eq!(held()[Share::FirstReader as usize], 4);
        }
    }

    #[test]
    fn what_is_given_up_for_an_opening_is_not_taken_back_before_it_ends() {
        if !crate::ends::alone(
            "descriptors::tests::what_is_given_up_for_an_opening_is_not_taken_back_before_it_ends",
        ) {
            return;
        }
        let _kept = ReserveHold::begin();
        let others = take_all();
        let loan = lend(Share::Node, 2).unwrap();
        assert!(!refill() && placeholder().is_ok());
        assert!(used_up(), "who failed before it was given up can't see it otherwise");
        drop(loan);
        assert!(used_up());
        assert_eq!(held(), [4, 8, 4, 16]);
        drop(others);
    }

    #[test]
    fn of_a_small_limit_the_reserve_is_a_part() {
        use rustix::process::{Resource, Rlimit, setrlimit};
        if !crate::ends::alone("descriptors::tests::of_a_small_limit_the_reserve_is_a_part") {
            return;
        }
        let usual = rustix::process::getrlimit(Resource::Nofile);
        for (limit, shares) in [(256, [4, 8, 4, 16]), (100, [4, 6, 2, 0]), (40, [3, 2, 0, 0])] {
            setrlimit(Resource::Nofile, Rlimit { current: Some(limit), ..usual }).unwrap();
            let kept = ReserveHold::begin();
            assert_eq!(held(), shares, "{limit}");
            drop(kept);
        }
    }
}
