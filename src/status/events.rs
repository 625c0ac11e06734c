//! What happens on a node, as an application hears of it.

use std::fmt;

use crate::page::PageNo;
use crate::peer::{NodeId, PeerKey};
use crate::status::{PeerInfo, RoleState, Verification};
use crate::txid::Position;

/// Why a WAL is not begun anew.
///
/// ```
/// use replite::WalReason;
///
/// fn is_ours(why: WalReason) -> bool {
///     // The application's own doing, which it can end.
///     matches!(why, WalReason::Readers | WalReason::OpenTransaction)
/// }
/// # let _ = is_ours;
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum WalReason {
    /// A reader stays inside of one transaction, or readers that take long follow each other
    /// without a gap. The node holds no writer back for one that stays for more than a few seconds:
    /// the WAL grows until it leaves.
    Readers,
    /// One transaction made it as long as that. It becomes shorter once all is copied back.
    LargeTransaction,
    /// A writer leaves its transaction open.
    OpenTransaction,
    /// Copying back, or bringing it to the log, takes longer than writing did: a slow disk.
    Slow,
    /// Copying back fails; the other problems say how.
    Failing,
}

impl fmt::Display for WalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WalReason::Readers => {
                "readers stay in it (transactions that are open for seconds, or a verification)"
            }
            WalReason::LargeTransaction => "a large transaction is being copied back",
            WalReason::OpenTransaction => "a writer leaves its transaction open",
            WalReason::Slow => "the disk takes longer to copy it back than it was written",
            WalReason::Failing => "copying it back fails",
        })
    }
}

/// What came of [`Db::checkpoint`](crate::Db::checkpoint).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), replite::Error> {
/// use std::time::Duration;
///
/// use replite::{Checkpoint, Db};
///
/// let db = Db::temporary(|config| {
///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"))
/// })
/// .await?;
/// match db.checkpoint(Duration::from_secs(5)).await? {
///     Checkpoint::Done => println!("the file is whole"),
///     Checkpoint::Busy { why, .. } => println!("not yet: {why}"),
///     _ => {}
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Checkpoint {
    /// Everything that was committed before the call is in the database file and on the disk, and
    /// the WAL has begun anew.
    Done,
    /// Not within the limit. Everything goes on as before.
    Busy {
        /// The WAL's length in frames.
        frames: u32,
        /// How many of them are copied back.
        backfilled: u32,
        /// What was in the way.
        why: WalReason,
    },
}

/// Something worth telling an operator. All of them are logged, too.
///
/// ```
/// use replite::{Db, Event};
///
/// async fn watch(db: Db) {
///     let mut events = db.events();
///     while let Some(event) = events.next().await {
///         match event {
///             Event::Healed { pages, lost: Some(lost), .. } => {
///                 println!("{pages} pages came; what was here is in {}", lost.display());
///             }
///             Event::LocksLost { times, .. } => println!("closed by others: {times}"),
///             other => println!("{other:?}"),
///         }
///     }
/// }
/// # let _ = watch;
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The role, or what is known of the primary, changed.
    #[non_exhaustive]
    Role {
        /// What holds from now on.
        state: RoleState,
    },
    /// This node did not become the primary, and is a replica as before.
    #[non_exhaustive]
    PromotionFailed {
        /// What failed.
        why: String,
    },
    /// A replica connected (on the primary).
    #[non_exhaustive]
    ReplicaJoined {
        /// The replica, as it says.
        replica: PeerInfo,
        /// The key that it has proved; none without TLS.
        key: Option<PeerKey>,
    },
    /// A replica's connection ended (on the primary).
    #[non_exhaustive]
    ReplicaLeft {
        /// The replica, as it says.
        replica: PeerInfo,
        /// The key that it has proved; none without TLS.
        key: Option<PeerKey>,
    },
    /// The stream from the primary stands (on a replica).
    #[non_exhaustive]
    Connected {
        /// The primary, as it says.
        primary: PeerInfo,
        /// The key that it has proved; none without TLS.
        key: Option<PeerKey>,
    },
    /// The stream from the primary ended (on a replica).
    #[non_exhaustive]
    Disconnected {
        /// How it ended.
        why: String,
    },
    /// A snapshot begins.
    #[non_exhaustive]
    SnapshotStarted {
        /// Why this node needs one.
        why: String,
    },
    /// A snapshot was taken over.
    #[non_exhaustive]
    SnapshotFinished {
        /// The state that this node has now.
        position: Position,
    },
    /// The primary begins to lead this node's state back to its own.
    #[non_exhaustive]
    HealStarted {
        /// What led the state astray.
        why: String,
    },
    /// This node's state was led back to the primary's.
    #[non_exhaustive]
    Healed {
        /// The state that it has now.
        position: Position,
        /// How many pages came for it.
        pages: u64,
        /// Where the node keeps what it replaced, if that was not in the primary's history; see
        /// [`Db::lost`](crate::Db::lost).
        lost: Option<std::path::PathBuf>,
    },
    /// Bad pages of this primary were written anew; see
    /// [`Db::find_repair`](crate::Db::find_repair).
    #[non_exhaustive]
    Repaired {
        /// Which.
        pages: Vec<PageNo>,
        /// The replica that had the right images.
        from: PeerInfo,
    },
    /// The log lost its past and begins anew. On a primary, replicas that are at an older state
    /// have to compare their pages.
    #[non_exhaustive]
    LogGap {
        /// Where the log begins.
        position: Position,
    },
    /// The node put local history aside that the primary does not have, before it replaced it.
    #[non_exhaustive]
    Kept {
        /// Where it is kept.
        path: std::path::PathBuf,
    },
    /// The WAL is beyond twice its limit ([`Config::wal_limit`](crate::Config::wal_limit)) and was
    /// not begun anew within a second, or it is beyond four times. The node tells it once for each
    /// doubling. [`Status::problem`](crate::Status::problem) says so for as long as it lasts.
    #[non_exhaustive]
    WalGrows {
        /// Its length in bytes.
        bytes: u64,
        /// Its limit in bytes.
        limit: u64,
        /// What is in the way.
        why: WalReason,
    },
    /// The locks of this process's connections on the database were gone, and the node took them
    /// again. Something in this process opened and closed the database or its `-shm` by other means
    /// than SQLite. What a node holds for life it holds otherwise (on Linux), and did not lose. But
    /// a write that was under way in this process may have met one of another process.
    #[non_exhaustive]
    LocksLost {
        /// The database.
        database: std::path::PathBuf,
        /// How often that happened since the node started.
        times: u64,
    },
    /// All pages were hashed, and are those of the position.
    #[non_exhaustive]
    Verified {
        /// What came of it.
        verification: Verification,
    },
    /// All pages were hashed, and are not those of the position. The disk changed the files, or
    /// something else than SQLite did.
    #[non_exhaustive]
    VerificationFailed {
        /// What came of it.
        verification: Verification,
    },
    /// An operator gave this node a command through its replication endpoint; see
    /// [`operator`](crate::operator).
    #[non_exhaustive]
    OperatorAsks {
        /// Who, as the operator says.
        by: String,
        /// What to do, in words.
        what: String,
    },
    /// The operator's word to take the lease ([`Db::promote_unchecked`](crate::Db)) was not
    /// followed: another node holds it, and renews it.
    #[non_exhaustive]
    LeaseNotTaken {
        /// That node.
        holder: NodeId,
    },
    /// A peer knocked at this node's replication endpoint with another secret. There is at most one
    /// such event a minute.
    #[non_exhaustive]
    OtherSecret {
        /// The id of the node that it says to be. Anyone can say that.
        node: NodeId,
        /// The key that it has; none without TLS, and where it came to no TLS.
        key: Option<PeerKey>,
        /// How often that happened since the last such event.
        times: u64,
    },
    /// The files of [`Config::tls`](crate::Config::tls) have changed, and new connections begin
    /// with what is in them now.
    CertificatesTaken,
    /// What is in the files of [`Config::tls`](crate::Config::tls) can't be used. What was in them
    /// before stays in use.
    #[non_exhaustive]
    CertificatesNotTaken {
        /// What is wrong with them.
        why: String,
    },
    /// Replication of this database has stopped.
    #[non_exhaustive]
    Stopped {
        /// What stopped it.
        why: String,
    },
    /// This receiver was too slow and missed events.
    #[non_exhaustive]
    Missed {
        /// How many.
        events: u64,
    },
}
