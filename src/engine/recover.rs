//! Opening a database file: checks, locks, and what its files are.

mod integrity;
mod judge;
pub(in crate::engine) mod mend;
pub(in crate::engine) mod opened;
pub(in crate::engine) mod position;
mod redo;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::config::DbConfig;

use crate::checksum::Fingerprint;
use crate::context::NodeContext;
use crate::engine::checkpoint::backfill::{LOCK_STEP, mark_again, try_for};
use crate::engine::checkpoint::generation::begin_generation;
use crate::engine::file::anchor::{Anchor, Anchors, FileState, anchored_key};
use crate::engine::file::database::OpenDatabase;
use crate::engine::file::epochs::Epochs;
use crate::engine::file::epochs::{key_of_epochs, read_epochs};
use crate::engine::file::wal_file::{EXTEND_MAX_BYTES, WalFile};
use crate::engine::file::watch::Watch;
use crate::engine::options::EngineOptions;
use crate::engine::recover::position::{LogSays, Wal};
use crate::error::{Error, Result, Unsupported};
use crate::files::{self, Paths, reserve, sync_directory};
use crate::log::{Log, key_of, move_other};
use crate::page::PageSize;
use crate::report::Condition;
use crate::sqlite::{FileLocks, Handle, Lock, Slot, WalIndex, defend};
use crate::status::unix_millis;
use crate::txid::{EpochHistory, Position};
use crate::wal::{IndexHeader, frame_offset, region_of};

/// Longest wait for another process that checkpoints or writes at the moment of opening.
const LOCKS_WAIT: Duration = Duration::from_secs(5);

/// An opened database. `handle` holds CKPT and WRITE.
#[derive(Debug)]
pub(in crate::engine) struct Findings {
    pub(in crate::engine) base: Arc<OpenDatabase>,
    pub(in crate::engine) handle: Handle,
    pub(in crate::engine) primary: bool,
    /// This node opened the newest epoch: commits that the log does not have are of that epoch, and
    /// become records of it. On any other node they belong to no history.
    pub(in crate::engine) own: bool,
    pub(in crate::engine) history: EpochHistory,
    /// Whether the position in the tip is known to be that of the bytes.
    pub(in crate::engine) exact: bool,
    /// A state of the history that is known to be before the one in the tip, which has no name
    /// itself.
    pub(in crate::engine) proved: Option<Position>,
    /// The anchors that count, newest first.
    pub(in crate::engine) known: Vec<Anchor>,
    /// The anchor whose frame is in the WAL. The commits were counted from it.
    pub(in crate::engine) anchor: Option<Anchor>,
    /// The number of the last commit in the WAL, counted from there.
    pub(in crate::engine) counted: u64,
    pub(in crate::engine) log_says: LogSays,
    /// The state is exact by the chain of commits from that anchor.
    pub(in crate::engine) chained: bool,
    /// What the WAL is to the anchors.
    pub(in crate::engine) wal: Wal,
    /// The highest transaction number that anything beside the database speaks of.
    pub(in crate::engine) highest: u64,
    /// The highest epoch number likewise.
    pub(in crate::engine) highest_epoch: u64,
}

/// Opens the file, takes the locks and finds the position. Does not change the files' content, but
/// for the journal mode of a primary's database and for records that its log lacks. Where the epoch
/// history is gone, takes it from the log. As far as the log reaches, it says which epoch each of
/// its transactions is of.
pub(in crate::engine) fn open(
    options: EngineOptions,
    node: Arc<NodeContext>,
    primary: bool,
) -> Result<Findings> {
    let path = options.paths.database().to_path_buf();
    let mut handle = Handle::open(&path, primary).map_err(|e| refine(e, &options))?;
    let page_size = prepare(&handle, &options, primary)?;
    let index = WalIndex::new(&mut handle)?;
    let locks = hold_all(&mut handle, path)?;
    let header =
        index.header().ok_or_else(|| Error::Disturbed("the wal-index has no sound header".into()))?;
    if header.max_frame > 0 {
        index.ensure(&mut handle, region_of(header.max_frame), true)?;
        // It keeps what a process that died in a transaction entered, if others have the file open.
        index.clean_above(header.max_frame);
    }
    let pages = page_count(&mut handle, &header, page_size)?;
    let wal = WalFile::open(&options.paths)?;
    // It may be new. Were it lost, a database that a copy was going into would be torn for good.
    wal.sync_name()?;
    let mut anchors = Anchors::open(&options.paths, options.page_key().fingerprint())?;
    let Epochs { mut history, mut own } = epochs(&options)?;
    set_other_log_aside(&options, &node)?;
    let log = Log::open(&options.paths.log(), options.log)?;
    if history.last().is_none() {
        (history, own) = (log.epochs()?, false);
    }
    if history.last().is_some() {
        anchors.miss()?;
    }
    let known = position::standing(&mut anchors, &wal, &header, page_size);
    let found = Wal::of(&known, &wal, &header, page_size)?;
    if header.max_frame > 0 && !primary {
        wal.cut_behind(header.max_frame, header.salts, page_size)?;
    }
    let (highest, highest_epoch) = position::highest(&known, &log, &history);
    let tip = position::end(&header, pages);
    let watch = Watch::new(&options, locks.clone(), &wal)?;
    let base = OpenDatabase::new(options, node, page_size, index, wal, log, anchors, tip, locks, watch);
    let opened = Findings {
        base,
        handle,
        primary,
        own,
        history,
        exact: false,
        proved: None,
        known,
        anchor: None,
        counted: 0,
        log_says: LogSays::Nothing,
        chained: false,
        wal: found,
        highest,
        highest_epoch,
    };
    opened.locate(&header, pages)
}

/// Takes CKPT and WRITE, and begins to watch over locks.
fn hold_all(handle: &mut Handle, path: PathBuf) -> Result<Option<Arc<FileLocks>>> {
    let locks = FileLocks::open(&path)?.map(Arc::new);
    if !hold(handle, locks.as_deref(), Slot::CHECKPOINT)? {
        return Err(Error::AlreadyOpen { path, holder: "another process" });
    }
    if !hold(handle, locks.as_deref(), Slot::WRITE)? {
        return Err(Error::Timeout {
            what: "the write lock, which another process holds".into(),
            after: LOCKS_WAIT,
        });
    }
    if let Some(locks) = &locks {
        locks.watch()?;
    }
    Ok(locks)
}

/// Takes a lock for the life of the database. Where the system has such a lock, nothing else in
/// this process can drop it by mistake.
fn hold(handle: &mut Handle, locks: Option<&FileLocks>, slot: Slot) -> Result<bool> {
    let Some(locks) = locks else { return try_for(LOCKS_WAIT, || handle.try_lock(slot, Lock::Exclusive)) };
    let end = std::time::Instant::now() + LOCKS_WAIT;
    while !locks.try_hold(slot)? {
        if std::time::Instant::now() >= end {
            return Ok(false);
        }
        std::thread::sleep(LOCK_STEP);
    }
    Ok(true)
}

/// Says what a failure to open means.
fn refine(error: Error, options: &EngineOptions) -> Error {
    match &error {
        Error::Sqlite(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::NotADatabase) => {
            Error::Unsupported {
                path: options.paths.database().to_path_buf(),
                reason: Unsupported::NotADatabase,
            }
        }
        Error::Sqlite(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseCorrupt) => {
            Error::Damaged {
                path: options.paths.database().to_path_buf(),
                what: format!("SQLite says: {e}; restore it from a replica or a backup"),
            }
        }
        _ => error,
    }
}

/// Turns a primary's database to WAL, reads once so that SQLite recovers, and says the page size.
fn prepare(handle: &Handle, options: &EngineOptions, primary: bool) -> Result<PageSize> {
    let connection = handle.connection();
    let mode = |sql: &str| -> Result<String> {
        connection.query_row(sql, [], |r| r.get(0)).map_err(|e| refine(e.into(), options))
    };
    let mut now = match mode("PRAGMA journal_mode") {
        Err(Error::Damaged { .. }) => {
            // The file is shorter than its first page says, which SQLite puts up with in this mode.
            // Nothing is written in this mode. The defence would undo that.
            defend(connection, false)?;
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_WRITABLE_SCHEMA, true)?;
            mode("PRAGMA journal_mode")?
        }
        now => now?,
    };
    if now != "wal" && primary {
        now = handle.turn_to_wal().map_err(|e| refine(e.into(), options))?;
    }
    if now != "wal" {
        return Err(Error::Unsupported {
            path: options.paths.database().to_path_buf(),
            reason: Unsupported::NotWal(now),
        });
    }
    let read = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get::<_, i64>(0));
    match read {
        // The hashes of its pages tell what they are; the log may make them good.
        Err(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseCorrupt) => {
            Condition::SchemaUnreadable { path: options.paths.database(), error: &e }.say();
        }
        read => drop(read.map_err(|e| refine(e.into(), options))?),
    }
    Ok(PageSize::new(pragma_u32(connection, "page_size")?)?)
}

fn pragma_u32(connection: &Connection, name: &str) -> Result<u32> {
    Ok(connection.query_row(&format!("PRAGMA {name}"), [], |r| r.get(0))?)
}

/// The database's size as of the last commit.
fn page_count(handle: &mut Handle, header: &IndexHeader, size: PageSize) -> Result<u32> {
    // An index that was made for an empty WAL does not say.
    if header.max_frame > 0 {
        return Ok(header.pages);
    }
    pragma_u32(handle.connection(), "page_count").or_else(|_| {
        let pages = handle.size()? / u64::from(size.get());
        Ok(u32::try_from(pages).unwrap_or(u32::MAX))
    })
}

/// Which page key the files in the state directory go with, as far as they say it.
pub(crate) fn key_of_files(paths: &Paths) -> Option<Fingerprint> {
    anchored_key(paths).or_else(|| key_of_epochs(paths)).or_else(|| key_of(&paths.log()))
}

/// Keeps a log whose records are of another page key: it may have a branch that is nowhere else.
fn set_other_log_aside(options: &EngineOptions, node: &NodeContext) -> Result<()> {
    let (paths, key) = options.keyed();
    let kept = move_other(&paths.log(), key, || {
        let kept = paths.lost().join(format!("log-{}", unix_millis()));
        files::make_directory(&kept)?;
        // The directory's name is durable before the node moves anything there.
        sync_directory(&paths.lost())?;
        sync_directory(paths.state_dir())?;
        Ok(kept)
    })?;
    if let Some((kept, from)) = kept {
        node.report(Condition::LogKept { kept: &kept, from: Some(from), to: None });
    }
    Ok(())
}

/// Reads the epoch history. Puts one aside that it can't read, and makes it good from the log as
/// far as that reaches.
fn epochs(options: &EngineOptions) -> Result<Epochs> {
    let (paths, key) = options.keyed();
    match read_epochs(paths, key) {
        Err(error @ Error::Corrupt { .. }) => {
            Condition::EpochsKept { error: &error }.say();
            let (from, to) = (options.paths.epochs(), options.paths.epochs_corrupt());
            fs::rename(&from, &to).map_err(Error::io("rename", &from))?;
            Ok(Epochs::default())
        }
        other => other,
    }
}

impl Findings {
    /// Begins a WAL generation when there is none. Every frame then has salts of ours and an
    /// anchor.
    pub(in crate::engine) fn begin_if_empty(&mut self) -> Result<()> {
        if self.base.tip().frame == 0 {
            // Where there is no room for it, the node gives up no other generation for it.
            let bytes = frame_offset(2, self.base.page_size);
            reserve::with(self.base.options.paths.state_dir(), || self.base.wal.extend(bytes))?;
            begin_generation(&self.base, &mut self.handle, &self.base.tip())?;
        }
        Ok(())
    }
}

/// Writes an anchor at the tip, and makes the WAL as long as it will be. The caller holds WRITE.
pub(in crate::engine) fn anchor(base: &OpenDatabase, handle: &mut Handle) -> Result<()> {
    // A disk without room for that has room for commits all the same.
    if let Err(error) = base.wal.extend(base.options.wal_limit_bytes.min(EXTEND_MAX_BYTES)) {
        base.node.report(Condition::WalNotExtended { error: &error });
        base.note_room(&error);
    }
    // The anchor names a frame and its sum. WRITE is held since the last sync, if there was one.
    base.sync_own_wal()?;
    let now = base.watch.modified()?;
    let tip = base.tip();
    let file = match base.file_state() {
        state @ FileState::AtRest { modified, .. } if modified == now => state,
        // Another process copied into the file.
        _ => {
            let witnesses = base.witnesses(handle, 0, &tip)?;
            let mark = mark_again(base, handle)?;
            base.watch.leave()?;
            FileState::Backfilling(witnesses.marked(mark))
        }
    };
    // What is committed next is counted from it, after a power cut, too.
    base.write_anchor(&tip, file, true)
}
