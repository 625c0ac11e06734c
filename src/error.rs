//! The crate's one [`Error`], sorted by who must act.

mod cause;
mod debug;
mod kinds;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::parse::ParseError;
use crate::status::PeerInfo;
use crate::txid::Txid;

pub use cause::Cause;
pub use kinds::{PeerProblem, Unsupported};
pub(crate) use kinds::{shown, without_user};

/// What the crate's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who can do something about an [`Error`].
///
/// ```
/// use replite::{Blame, Error};
///
/// fn alert(error: &Error) -> bool {
///     match error.blame() {
///         Blame::Disk | Blame::Outside | Blame::Replite => true,
///         Blame::Caller | Blame::Peer => false,
///         _ => true,
///     }
/// }
/// assert!(!alert(&Error::Reentrant));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Blame {
    /// The code that called, or the configuration.
    Caller,
    /// The node at the other end of a connection.
    Peer,
    /// The bytes on the disk.
    Disk,
    /// The operating system, the file system, the network, another program.
    Outside,
    /// This crate: please report it.
    Replite,
}

/// Anything that can go wrong. [`Error::blame`] says who must act.
///
/// ```
/// use replite::Error;
///
/// fn advice(error: &Error) -> &'static str {
///     match error {
///         Error::NotPrimary { .. } => "the replay layer sends the request to the primary",
///         Error::Busy { .. } | Error::PoolExhausted { .. } => "try again in a moment",
///         Error::OutcomeUnknown { .. } => "look for the write before it is made again",
///         _ => "see the text",
///     }
/// }
/// assert_eq!(advice(&Error::Reentrant), "see the text");
/// ```
///
/// `Debug` prints the same sentence as `Display`, and after it what of its causes that does not say
/// yet. So a `main` that returns the error tells its user what to do.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // ---- the caller
    /// The configuration contradicts itself or lacks something. Nothing was opened or committed.
    /// Correct it: the text says what.
    #[error("configuration: {0}")]
    Config(String),
    /// A variable of the environment says nothing that can be used, or is none that is known; see
    /// [`Config::from_env`](crate::Config::from_env). Nothing was opened. Correct it: the problem
    /// says what.
    #[error("the environment variable {variable}: {problem}")]
    Environment {
        /// Its name.
        variable: String,
        /// What is wrong with it, and what is right.
        problem: String,
    },
    /// A secret that could be guessed. Nothing was opened. Make another, as the text says.
    #[error(
        "no secret to rely on: {0}; make one with `openssl rand -base64 32`, or derive one from a phrase \
         (Secret::from_phrase)"
    )]
    WeakSecret(&'static str),
    /// A text is not of the form that it should have. Nothing was committed: correct the text.
    #[error(transparent)]
    InvalidText(#[from] ParseError),
    /// The database can't be served. Nothing was changed. The reason says what it would need.
    #[error("{}: {reason}", path.display())]
    Unsupported {
        /// The database file.
        path: PathBuf,
        /// Why.
        reason: Unsupported,
    },
    /// There is a file of this name already. The call replaced nothing: remove it, or give another
    /// name.
    #[error("{} is there already and is not replaced: remove it, or give another name", path.display())]
    FileExists {
        /// The file.
        path: PathBuf,
    },
    /// Another `Db` of this process, or another process, has the database open as a node. Nothing
    /// was opened. Use that one, or end it first.
    #[error("{} is open as a node already, in {holder}", path.display())]
    AlreadyOpen {
        /// The database file.
        path: PathBuf,
        /// Who holds it.
        holder: &'static str,
    },
    /// Code inside of a write asked for another write, or for the writer guard. Nothing of the
    /// second one was run. Use the transaction that the closure was given.
    #[error("a write inside a write: use the transaction that the closure was given")]
    Reentrant,
    /// The call blocks, and was made on a thread that runs async tasks. It did nothing. Use the
    /// async form, or `spawn_blocking`.
    #[error("a blocking call on an async worker thread: use the async form or `spawn_blocking`")]
    BlockingInAsync,
    /// This node is not the primary, so it can't commit. Nothing of the write was run. Send it to
    /// the primary: the replay layer does that.
    #[error(
        "not the primary{}",
        primary.as_ref().map_or(String::new(), |p| format!(" (it is {})", p.addresses.app))
    )]
    NotPrimary {
        /// What is known of the primary.
        primary: Option<Box<PeerInfo>>,
    },
    /// The lease was not handed over. The text says why. This node leads on, unless it says that
    /// its lease ended. Nothing that was committed is lost. Try again, or hand it to another node.
    #[error("the lease was not handed over: {0}")]
    HandoffFailed(String),
    /// The database was shut down, or is shutting down. Nothing of the call was committed. Open it
    /// again.
    #[error("the database is shut down")]
    ShutDown,
    /// The replica has no state yet: it waits for its primary, or is being filled. Nothing was
    /// committed. Wait with [`Db::ready`](crate::Db::ready).
    #[error("no state to read yet: {0}")]
    NoState(String),
    /// Another connection, mostly one of another process, wrote for as long as a write waits for
    /// it. Nothing of the write was run. Try again.
    #[error("another connection kept the database from being written to for {waited:?}")]
    Busy {
        /// How long was waited.
        waited: Duration,
    },
    /// Every pooled connection stayed in use for as long as the limit allows. Nothing was run. Try
    /// again later, or allow more connections.
    #[error("all {limit} read connections stayed in use for {waited:?}")]
    PoolExhausted {
        /// How many connections there are.
        limit: usize,
        /// How long was waited.
        waited: Duration,
    },
    /// Something did not happen in time; the text says what. Nothing of a write was committed. What
    /// else was waited for may still happen. Try again.
    #[error("timed out after {after:?}: {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
    },
    /// A queue with a limit is full. Nothing of the call was begun. Try again later.
    #[error("too many {what}: the limit is {limit}")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The transaction is not in this history and never will be: it was committed on a branch that
    /// was lost. The call committed nothing. What the branch had is in
    /// [`Db::lost`](crate::Db::lost).
    #[error("transaction {txid} is not in this history: its branch was lost")]
    Lost {
        /// The transaction.
        txid: Txid,
    },
    /// The closure panicked, and its transaction was rolled back. Mend the closure.
    #[error("the closure panicked: {0}")]
    Panicked(String),
    /// The application's migration failed, and the database was not opened, or the node did not
    /// become the primary. What the migration had committed by then stays. Mend the migration.
    #[error("migration: {0}")]
    Migration(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// What the application does when its node becomes the primary
    /// ([`Config::on_promote`](crate::Config::on_promote)) failed, and the node did not become it.
    /// What was committed by then stays. Mend what failed.
    #[error("on_promote: {0}")]
    OnPromote(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// SQLite refused, mostly the caller's SQL. Its transaction was rolled back. The code says what
    /// to do.
    #[error("sqlite: {0}")]
    Sqlite(#[from] rusqlite::Error),

    // ---- the peer
    /// The other node can't be talked to, or sent something wrong. Nothing was committed. The
    /// problem says what to do there.
    #[error("peer {peer}: {problem}")]
    Peer {
        /// Its address, or its node id.
        peer: String,
        /// What is wrong.
        problem: PeerProblem,
    },

    // ---- the bytes on the disk
    /// A file's bytes are not what was written. Nothing was committed. The text says what the file
    /// is for, and what to do.
    #[error("{} is corrupt at byte {offset}: {what}; it {cure}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        what: String,
        /// What the file is for, and what to do.
        cure: &'static str,
    },
    /// A file was written by a newer version, and was left as it is. Nothing was committed. Start
    /// that version.
    #[error("{} has format version {found}; this version reads up to {supported}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format's version.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// A file was written by an earlier version whose format is not read any more, and was left as
    /// it is. Nothing was committed. Stop the node and move its state directory away. A replica is
    /// then led to its primary's state, and keeps what differs; a primary begins a new branch.
    #[error(
        "{} has format version {found}, and this version reads none before {supported}: stop the node, move \
         its state directory away and start it again; its primary takes the database over, as a new branch",
        path.display()
    )]
    Older {
        /// The file.
        path: PathBuf,
        /// Its format's version.
        found: u32,
        /// The oldest version that can be read.
        supported: u32,
    },
    /// The database's files are damaged. What is left of them is no committed state that could be
    /// proved, or can be read in two ways. Or it lacks transactions that were on the disk. Nothing
    /// was changed. The text says what is known, which transactions no file has any more, and what
    /// to do.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The database file.
        path: PathBuf,
        /// What is known.
        what: String,
    },
    /// A record of this node's own log does not lead to the position that it states, over the pages
    /// here. The log or the database file is not what was written. Nothing was committed. Look at
    /// the disk, and put a replica's database in the place of this one. A peer's record is a
    /// [`PeerProblem::Mismatch`].
    #[error("position mismatch: expected {expected}, found {found}")]
    Mismatch {
        /// What the record says.
        expected: String,
        /// What the pages say.
        found: String,
    },

    /// What a heal, or the mending of a damaged database, would replace can't be kept: too much of
    /// that kind is kept already. Nothing was changed. Look at it with
    /// [`Db::lost`](crate::Db::lost), and move some of it away.
    #[error(
        "{} has {used} bytes and {needed} more must be kept, which is more than {quota}: \
         move some of it away",
        path.display()
    )]
    LostFull {
        /// The directory.
        path: PathBuf,
        /// Bytes that are in it.
        used: u64,
        /// Bytes that would come to it.
        needed: u64,
        /// The limit.
        quota: u64,
    },

    // ---- outside
    /// The operating system failed a call. Nothing of a write was committed. Look at the disk, the
    /// limit of open files, or the network: the source says at which.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was being done.
        op: &'static str,
        /// To which file or address.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// A write was committed, or may have been, and can't be vouched for. Replication stopped, or
    /// the database was shut down, before the write had its number and was on the disk. Or the node
    /// was not the primary any more when it was. The cause says why.
    ///
    /// Whether the write is kept is not known. It is not rolled back: reads of this node may have
    /// it, and replicas may get it. A failing disk, a power cut or the cure for what went wrong may
    /// take it away again. When the database is open anew, what it has is what was kept. Look there
    /// before the same is done again, or see to it that doing it twice does no harm.
    ///
    /// All other errors of a write say that nothing of it was committed, but for what the
    /// application committed by itself inside of its closure.
    #[error("it is not known whether the write is kept: {cause}")]
    OutcomeUnknown {
        /// The transaction that it is, if it is kept and that is known: [`Db::wait_for`] with it
        /// tells, on any node, once that node knows of the next primary.
        ///
        /// [`Db::wait_for`]: crate::Db::wait_for
        txid: Option<Txid>,
        /// Why it is not known.
        cause: Cause,
    },
    /// Replication of this database has stopped for good. Every later call says so, with the first
    /// cause. Nothing of the call was committed. Mend what the cause says, and open the database
    /// again.
    #[error("replication stopped: {0}")]
    Stopped(Cause),
    /// What SQLite promises to those who keep its locks does not hold. Another program wrote
    /// without them, changed or removed a file, or left the wal-index torn. Nothing of the call was
    /// committed. Find that program; where replication has stopped, open the database again.
    #[error("{0}")]
    Disturbed(String),
    /// The operating system has no random numbers. Nothing was committed. Try again.
    #[error("no random numbers: {0}")]
    NoRandom(String),

    // ---- us
    /// A thread or a task of the node panicked. Nothing of the call was committed. The
    /// application's tracing subscriber and metrics recorder run there, too: if the message is
    /// theirs, mend them. Else report it.
    #[error("a panic in {place}: {message}")]
    ThreadPanicked {
        /// What the thread or the task is for.
        place: String,
        /// What the panic said.
        message: String,
    },
    /// What this crate takes for granted does not hold. Nothing of the call was committed. Please
    /// report it.
    #[error("a defect in replite, please report it: {0}")]
    Internal(String),
}

impl Error {
    /// Whether a disk, or somebody's share of it, is full.
    pub(crate) fn no_room(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match self {
            // The log's own quota is no system's.
            Error::Io { source, .. } => {
                source.kind() == StorageFull
                    || source.kind() == QuotaExceeded && source.raw_os_error().is_some()
            }
            Error::Sqlite(error) => error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull),
            _ => false,
        }
    }

    /// The error of a write that could not begin, after so much time.
    pub(crate) fn of_begin(error: rusqlite::Error, waited: Duration) -> Error {
        if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) {
            return Error::Busy { waited };
        }
        Error::Sqlite(error)
    }

    /// Who must act.
    pub fn blame(&self) -> Blame {
        match self {
            Error::Config(_)
            | Error::Environment { .. }
            | Error::WeakSecret(_)
            | Error::InvalidText(_)
            | Error::Unsupported { .. }
            | Error::AlreadyOpen { .. }
            | Error::FileExists { .. }
            | Error::Reentrant
            | Error::BlockingInAsync
            | Error::NotPrimary { .. }
            | Error::HandoffFailed(_)
            | Error::ShutDown
            | Error::NoState(_)
            | Error::Busy { .. }
            | Error::PoolExhausted { .. }
            | Error::Timeout { .. }
            | Error::TooMany { .. }
            | Error::Lost { .. }
            | Error::Panicked(_)
            | Error::Migration(_)
            | Error::OnPromote(_)
            | Error::Sqlite(_) => Blame::Caller,
            Error::Peer { .. } => Blame::Peer,
            Error::Corrupt { .. }
            | Error::Newer { .. }
            | Error::Older { .. }
            | Error::Damaged { .. }
            | Error::Mismatch { .. } => Blame::Disk,
            Error::Io { .. } | Error::LostFull { .. } | Error::Disturbed(_) | Error::NoRandom(_) => {
                Blame::Outside
            }
            Error::OutcomeUnknown { cause, .. } | Error::Stopped(cause) => cause.blame(),
            Error::ThreadPanicked { .. } | Error::Internal(_) => Blame::Replite,
        }
    }

    /// Why replication has stopped, if this is what stops it.
    pub(crate) fn cause(&self) -> Cause {
        match self {
            Error::Stopped(cause) | Error::OutcomeUnknown { cause, .. } => cause.clone(),
            other => Cause::new(other.to_string(), other.blame()),
        }
    }

    /// Whether something that must hold does not: there is no other way around it.
    pub(crate) fn is_fatal(&self) -> bool {
        matches!(
            self,
            Error::Stopped(_)
                | Error::Disturbed(_)
                | Error::NoRandom(_)
                | Error::ThreadPanicked { .. }
                | Error::Internal(_)
        )
    }

    /// What it means for a write that may have been committed.
    pub(crate) fn of_a_commit(self) -> Error {
        match self {
            known @ Error::OutcomeUnknown { .. } => known,
            other => Error::OutcomeUnknown { txid: None, cause: other.cause() },
        }
    }

    /// The same for a commit whose transaction is known.
    pub(crate) fn of_commit(self, txid: Txid) -> Error {
        Error::OutcomeUnknown { txid: Some(txid), cause: self.cause() }
    }

    pub(crate) fn io(op: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { op, path, source }
    }

    pub(crate) fn peer(peer: impl Into<String>, problem: PeerProblem) -> Error {
        Error::Peer { peer: peer.into(), problem }
    }

    pub(crate) fn garbled(peer: impl Into<String>, what: impl Into<String>) -> Error {
        Error::peer(peer, PeerProblem::Garbled(what.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_others_are_shown_in_one_bounded_line() {
        assert_eq!(shown("räksmörgås \"日本\" a\\b", 100), "räksmörgås \"日本\" a\\b");
        let evil = "ok\n2026-01-01 ERROR forged\r\t\u{1b}[2J\u{202e}x\u{2028}\u{85}";
        let line = "ok\\n2026-01-01 ERROR forged\\r\\t\\u{1b}[2J\\u{202e}x\\u{2028}\\u{85}";
        assert_eq!(shown(evil, 100), line);
        assert_eq!(shown(&"ä".repeat(1000), 10), "äääää…");
    }
}
