//! Opening a database file: checks, locks, and the position that its bytes stand at.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::Connection;

use crate::checksum::Checksum;
use crate::engine::EngineOptions;
use crate::engine::anchor::{self, Anchor, Anchors, Epochs, FileState};
use crate::engine::append::Appender;
use crate::engine::base::{Base, Tip};
use crate::engine::capture::{Capture, Sink};
use crate::engine::checkpoint::{LOCK_STEP, begin_generation, try_for};
use crate::engine::reserve;
use crate::engine::wal_file::{EXTEND_MAX_BYTES, WalFile, sync_directory};
use crate::engine::watch::Watch;
use crate::error::{Error, Result, Unsupported};
use crate::log::{Found, Log};
use crate::node::Node;
use crate::page::{PageNo, PageSize};
use crate::sqlite::{FileLocks, Handle, Lock, Slot, WalIndex};
use crate::status::unix_millis;
use crate::txid::{Epoch, EpochHistory, Position, Txid};
use crate::wal::{FRAME_HEADER_BYTES, FrameHeader, IndexHeader, frame_offset, region_of};
use crate::wire::Message;

/// Longest wait for another process that checkpoints or writes at the moment of opening.
const LOCKS_WAIT: Duration = Duration::from_secs(5);

/// An opened database, CKPT and WRITE held by `handle`.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) base: Arc<Base>,
    pub(super) handle: Handle,
    pub(super) primary: bool,
    /// This node opened the newest epoch: commits that the log does not have are of that epoch, and become records of it. On any other
    /// node they are nobody's.
    pub(super) own: bool,
    pub(super) history: EpochHistory,
    /// Whether the position in the tip is known to be that of the bytes.
    pub(super) exact: bool,
    /// The highest transaction number that anything beside the database speaks of.
    pub(super) highest: u64,
    /// The highest epoch number likewise.
    pub(super) highest_epoch: u64,
}

/// Opens the file, takes the locks and finds the position. The file's content is not changed, but for the journal
/// mode of a primary's database and for records of the log that its WAL lost.
pub(super) fn open(options: EngineOptions, node: Arc<Node>, primary: bool) -> Result<Opened> {
    let path = options.path.clone();
    let mut handle = Handle::open(&path, primary).map_err(|e| refine(e, &options))?;
    let page_size = prepare(&handle, &options, primary)?;
    let index = WalIndex::new(&mut handle)?;
    let locks = FileLocks::open(&path)?.map(Arc::new);
    // A primary gives WRITE back; so it is SQLite's own lock there.
    if !hold(&mut handle, locks.as_deref(), Slot::CHECKPOINT)? {
        return Err(Error::AlreadyOpen { path, holder: "another process" });
    }
    if !hold(&mut handle, locks.as_deref().filter(|_| !primary), Slot::WRITE)? {
        return Err(Error::Timeout {
            what: "the write lock, which another process holds".into(),
            after: LOCKS_WAIT,
        });
    }
    if let Some(locks) = &locks {
        locks.watch()?;
    }
    let header = index.header().ok_or_else(|| Error::Stopped("the wal-index has no sound header".into()))?;
    if header.max_frame > 0 {
        index.ensure(&mut handle, region_of(header.max_frame), true)?;
    }
    let pages = pragma_u32(handle.connection(), "page_count").map_err(|e| refine(e, &options))?;
    let wal = WalFile::open(&path)?;
    // It may have been made just now. Were it lost, a database into which it was being copied would be torn for good.
    wal.sync_name()?;
    if header.max_frame > 0 {
        wal.cut_behind(header.max_frame, header.salts, page_size)?;
    }
    let anchors = Anchors::open(&options.side)?;
    let Epochs { history, own } = epochs(&options)?;
    let log = Log::open(&options.side.join("log"), options.log)?;
    let known = anchors.newest_first();
    let (highest, highest_epoch) = highest(&known, &log, &history);
    let start = start(&wal, &known, &header, page_size, pages);
    let watch = Watch::new(&options, locks.clone(), &wal)?;
    let base = Base::new(options, node, page_size, index, wal, log, anchors, start.0, locks, watch);
    let mut opened =
        Opened { base, handle, primary, own, history, exact: start.1.is_some(), highest, highest_epoch };
    let mut hashed = None;
    if let Some(anchor) = start.1 {
        (opened, hashed) = opened.replay(&header, anchor)?;
    }
    if !opened.exact {
        opened.look_up(&header, &known, pages, hashed)?;
    }
    Ok(opened)
}

/// Takes a lock for the life of the database: one that nobody in this process can drop by mistake, where there is such a thing.
fn hold(handle: &mut Handle, locks: Option<&FileLocks>, slot: Slot) -> Result<bool> {
    let Some(locks) = locks else { return try_for(handle, slot, Lock::Exclusive, LOCKS_WAIT) };
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
            Error::Unsupported { path: options.path.clone(), reason: Unsupported::NotADatabase }
        }
        Error::Sqlite(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseCorrupt) => {
            Error::Damaged {
                path: options.path.clone(),
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
    let mut now = mode("PRAGMA journal_mode")?;
    if now != "wal" && primary {
        now = mode("PRAGMA journal_mode = WAL")?;
    }
    if now != "wal" {
        return Err(Error::Unsupported { path: options.path.clone(), reason: Unsupported::NotWal(now) });
    }
    connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get::<_, i64>(0))
        .map_err(|e| refine(e.into(), options))?;
    PageSize::new(pragma_u32(connection, "page_size")?)
}

fn pragma_u32(connection: &Connection, name: &str) -> Result<u32> {
    Ok(connection.query_row(&format!("PRAGMA {name}"), [], |r| r.get(0))?)
}

/// Reads the epoch history. One that can't be read is put aside: replicas then find no common history and are filled anew.
fn epochs(options: &EngineOptions) -> Result<Epochs> {
    match anchor::read_epochs(&options.side) {
        Err(error @ Error::Corrupt { .. }) => {
            tracing::error!(%error, "the epoch history is put aside");
            let (from, to) = (options.side.join("epochs"), options.side.join("epochs.corrupt"));
            fs::rename(&from, &to).map_err(Error::io("rename", &from))?;
            Ok(Epochs::default())
        }
        other => other,
    }
}

fn highest(known: &[Anchor], log: &Log, history: &EpochHistory) -> (u64, u64) {
    let positions = known.iter().map(|a| a.position).chain(log.tip());
    let number = positions.clone().map(|p| p.number()).max().unwrap_or(0);
    let first = history.last().map_or(0, |s| s.first.saturating_sub(1));
    let epoch = positions.map(|p| p.epoch().number()).max().unwrap_or(0);
    (number.max(first), epoch.max(history.epoch().number()))
}

/// Where the search for the position begins: at an anchor that fits the WAL, or at the WAL's end with nothing known.
fn start(
    wal: &WalFile,
    known: &[Anchor],
    header: &IndexHeader,
    size: PageSize,
    pages: u32,
) -> (Tip, Option<Anchor>) {
    let fits = |anchor: &&Anchor| {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        // One without an epoch names no state: what is counted from it would get a name that is another state's.
        anchor.position.epoch().number() > 0
            && anchor.frame > 0
            && anchor.frame <= header.max_frame
            && anchor.salts == header.salts
            && wal.read(&mut bytes, frame_offset(anchor.frame, size)).is_ok()
            && FrameHeader::parse(&bytes).sum == anchor.sum
    };
    let nothing = Position::new(Txid::new(Epoch::new(0, 0), 0), Checksum::EMPTY);
    let tip =
        Tip { salts: header.salts, frame: header.max_frame, sum: header.frame_sum, position: nothing, pages };
    match known.iter().find(fits) {
        Some(a) => {
            let tip = Tip { frame: a.frame, sum: a.sum, position: a.position, pages: a.pages, ..tip };
            (tip, Some(*a))
        }
        None => (tip, None),
    }
}

impl Opened {
    /// Counts the commits after the anchor, and appends to the log those that it does not have.
    /// The sum of all pages, too, if that had to be known.
    fn replay(self, header: &IndexHeader, anchor: Anchor) -> Result<(Opened, Option<Checksum>)> {
        let Opened { base, handle, primary, own, history, highest, highest_epoch, .. } = self;
        let history = Arc::new(history);
        let mut capture = Capture::new(base.clone(), handle, base.tip(), history.clone());
        capture.batch_bytes = 0;
        let log = base.log.clone();
        let mut sink = Rebuild { tip: log.tip(), log, append: primary && own, number: 0, mismatch: false };
        capture.advance(header, &mut sink)?;
        let tip = capture.tip;
        if let Some(logged) = sink.tip.filter(|l| l.number() == tip.position.number()) {
            sink.mismatch |= logged != tip.position;
        }
        let mut handle = capture.handle;
        // Somebody wrote to the file while we were away: old images that were read from it may be newer than they should
        // be. Then only a full hash decides.
        let doubt = match anchor.file {
            FileState::AtRest { modified: then, .. } => base.watch.modified()? != then,
            FileState::Backfilling(_) => copied_beyond(&base, &mut handle, &anchor, tip.frame)?,
        };
        let hashed = match doubt || sink.mismatch {
            true => Some(base.hash_all(&mut handle, tip.frame, tip.pages)?),
            false => None,
        };
        let exact = hashed.is_none_or(|sum| sum == tip.position.checksum());
        let history = Arc::unwrap_or_clone(history);
        Ok((Opened { base, handle, primary, own, history, exact, highest, highest_epoch }, hashed))
    }

    /// Without a usable anchor: the file at rest, or the hash of everything, may be a state that is known by name.
    fn look_up(
        &mut self,
        header: &IndexHeader,
        known: &[Anchor],
        pages: u32,
        hashed: Option<Checksum>,
    ) -> Result<()> {
        let now = self.base.watch.modified()?;
        // The newest only: the time of an earlier one may be on the disk still when what was copied since is.
        let at_rest = known.first().and_then(|a| match a.file {
            FileState::AtRest { position, modified } if header.max_frame == 0 && modified == now => {
                Some(position)
            }
            _ => None,
        });
        let mut tip = Tip { frame: header.max_frame, sum: header.frame_sum, pages, ..self.base.tip() };
        if let Some(position) = at_rest {
            tip.position = position;
            self.exact = true;
        } else {
            // What was hashed as of the last commit is the state of the WAL's end.
            let sum = match hashed {
                Some(sum) => sum,
                None => self.base.hash_all(&mut self.handle, tip.frame, tip.pages)?,
            };
            let named = known.iter().flat_map(|a| match a.file {
                FileState::AtRest { position, .. } => [Some(a.position), Some(position)],
                FileState::Backfilling(_) => [Some(a.position), None],
            });
            let named = self.base.log.tip().into_iter().chain(named.flatten());
            let found = named.into_iter().filter(|p| p.checksum() == sum).max_by_key(|p| p.number());
            let found = match found {
                // A file that is older than what the log has: of a backup, or of a disk that lost its last writes.
                None => self.base.log.state_with(sum).unwrap_or_else(|error| {
                    tracing::warn!(%error, "the log can't be searched for the state of the database");
                    None
                }),
                found => found,
            };
            self.exact = found.is_some();
            let unnamed = Position::new(Txid::new(Epoch::new(0, 0), 0), sum);
            tip.position = found.unwrap_or(unnamed);
        }
        self.base.leap(tip);
        Ok(())
    }

    /// Begins a WAL generation when there is none, so that every frame has salts of ours and an anchor.
    pub(super) fn begin_if_empty(&mut self) -> Result<()> {
        if self.base.tip().frame == 0 {
            // Where there is no room for it, no other generation is given up for it.
            let bytes = frame_offset(2, self.base.page_size);
            reserve::with(&self.base.options.side, || self.base.wal.extend(bytes))?;
            begin_generation(&self.base, &mut self.handle, &self.base.tip())?;
        }
        Ok(())
    }

    /// Applies the records that the log has beyond the WAL: an administrator deleted it, or a power cut took its
    /// tail. Records that do not follow are put aside.
    pub(super) fn redo(mut self) -> Result<Opened> {
        let tip = self.base.tip();
        let Some(logged) = self.base.log.tip() else {
            self.reset_log(tip.position)?;
            return Ok(self);
        };
        if logged == tip.position {
            return Ok(self);
        }
        let number = tip.position.number();
        if logged.number() > number
            && let Found::At { lsn, before } = self.base.log.find(number)?
            && before == tip.position
        {
            tracing::warn!(from = %tip.position, to = %logged, "the log is ahead of the WAL and is applied again");
            let Opened { base, handle, primary, own, history, exact, highest, highest_epoch } = self;
            let mut appender = Appender::new(base.clone(), handle)?;
            apply_log(&mut appender, &base.log, lsn, &history)?;
            let handle = appender.handle;
            base.sync_wal()?;
            return Ok(Opened { base, handle, primary, own, history, exact, highest, highest_epoch });
        }
        if logged.number() < number && !self.primary {
            // Somebody wrote to a replica's file, or a power cut took the log's tail: that the log ends before the
            // state says that no primary vouches for it.
            return Ok(self);
        }
        if logged.number() >= number && self.base.log.start() != Some(logged) {
            self.set_log_aside()?;
        }
        // A replica's log goes on to say what its primary vouched for last: begun at this state it would vouch for it, also
        // for what somebody wrote here after the node died between its log and its WAL.
        let vouched = if self.primary { tip.position } else { logged };
        self.reset_log(vouched)?;
        Ok(self)
    }

    /// Begins the log anew. Without room for that, the first record does.
    fn reset_log(&self, at: Position) -> Result<()> {
        let Err(error) = reserve::with(&self.base.options.side, || self.base.log.reset(at)) else {
            return Ok(());
        };
        self.base.note_room(&error);
        if error.no_room() { Ok(()) } else { Err(error) }
    }

    /// Keeps a log that does not belong to this database's state, and begins an empty one.
    fn set_log_aside(&mut self) -> Result<()> {
        let side = &self.base.options.side;
        let kept = side.join("lost").join(format!("log-{}", unix_millis()));
        copy_directory(&side.join("log"), &kept)?;
        tracing::error!(kept = %kept.display(), "the log is not of this database's state and was put aside");
        self.base.node.tell(crate::status::Event::Kept(kept));
        Ok(())
    }

    /// Writes an anchor at the tip, and makes the WAL as long as it will be. WRITE is held.
    pub(super) fn anchor(&mut self) -> Result<()> {
        // One without room for it has room for commits all the same.
        if let Err(error) = self.base.wal.extend(self.base.options.wal_limit_bytes.min(EXTEND_MAX_BYTES)) {
            tracing::warn!(%error, "the WAL is not made longer in advance");
            self.base.note_room(&error);
        }
        self.base.sync_wal()?;
        let now = self.base.watch.modified()?;
        let tip = self.base.tip();
        let file = match self.base.file_state() {
            state @ FileState::AtRest { modified, .. } if modified == now => state,
            // Somebody copied into it.
            _ => FileState::Backfilling(self.base.witnesses(&mut self.handle, 0, &tip)?),
        };
        self.base.write_anchor(&tip, file, true)
    }
}

fn copy_directory(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io("create", to))?;
    for entry in fs::read_dir(from).map_err(Error::io("read", from))? {
        let entry = entry.map_err(Error::io("read", from))?;
        let target = to.join(entry.file_name());
        fs::copy(entry.path(), &target).map_err(Error::io("copy", &target))?;
    }
    sync_directory(to)
}

/// Applies the log's records from an LSN to its end.
fn apply_log(appender: &mut Appender, log: &Log, lsn: u64, history: &EpochHistory) -> Result<()> {
    log.records(lsn, log.complete(), |unit| {
        let message = unit.decode().map_err(|e| Error::garbled("the log", e.to_string()))?;
        match message {
            Message::TxnBegin(begin) => appender.begin(begin, history),
            Message::Page { number, hash, .. } => {
                appender.page(number, hash, &unit.raw, crate::wire::HEADER_BYTES + 4)
            }
            Message::TxnEnd(end) => appender.end(end).and_then(|()| appender.publish()),
            _ => Ok(()),
        }
    })
}

/// Whether somebody may have copied frames behind the anchor into the file. We died while we copied those up to it; their pages are read
/// from the WAL. Of each page that only later frames have, the file must hold what was there before them: then it is none of their images.
fn copied_beyond(base: &Base, handle: &mut Handle, anchor: &Anchor, last: u32) -> Result<bool> {
    let size = base.page_size.bytes();
    let (mut frame, mut file) = (vec![0; FRAME_HEADER_BYTES + size], vec![0; size]);
    let mut pages = anchor.pages;
    for at in anchor.frame + 1..=last {
        base.wal.read(&mut frame, frame_offset(at, base.page_size))?;
        let (head, image) = frame.split_at(FRAME_HEADER_BYTES);
        let commit = FrameHeader::parse(head).commit;
        if commit != 0 {
            // What is dropped is read before that, and has no frame that would tell.
            if commit < pages {
                return Ok(true);
            }
            pages = commit;
        }
        let number = base.index.page_of(at);
        if number > anchor.pages || base.index.lookup(number, 1, anchor.frame).is_some() {
            continue;
        }
        if let Some(number) = PageNo::new(number) {
            handle.read(&mut file, number.offset(base.page_size))?;
            if file == image {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Appends to the log what it lacks of the commits that are read again.
struct Rebuild {
    log: Arc<Log>,
    append: bool,
    tip: Option<Position>,
    number: u64,
    mismatch: bool,
}

impl Rebuild {
    /// Whether the record with this number is the one that the log waits for.
    fn wanted(&self) -> bool {
        self.append && !self.mismatch && self.tip.is_some_and(|t| t.number() + 1 == self.number)
    }
}

impl Sink for Rebuild {
    fn committed(&mut self, number: u64) -> Result<()> {
        self.number = number;
        Ok(())
    }

    fn records(&mut self, units: Bytes, after: Option<Position>) -> Result<()> {
        if self.tip.is_some_and(|t| t.number() == self.number) {
            self.mismatch |= after.is_some_and(|a| Some(a) != self.tip);
        } else if self.wanted() {
            let mut appended = self.log.append(units.clone(), after);
            while appended.as_ref().is_err_and(Error::no_room) && self.log.drop_oldest() {
                appended = self.log.append(units.clone(), after);
            }
            match appended {
                // It begins anew behind these commits.
                Err(error) if error.no_room() => {
                    tracing::error!(%error, "the log can't be written: replicas that are behind will need a snapshot");
                    self.append = false;
                    return self.log.abort();
                }
                done => done?,
            }
            if after.is_some() {
                self.tip = after;
            }
        }
        Ok(())
    }
}

/// Drops the epochs that began after the position: their transactions are not in this state.
pub(super) fn truncate_history(history: &EpochHistory, position: Position) -> EpochHistory {
    let mut kept = EpochHistory::default();
    for start in history.iter() {
        if start.first <= position.number() + 1 {
            kept.push(*start);
        }
    }
    kept
}
