//! `<state directory>/lost`: what a heal replaced, and what else could not stay. Nothing that was
//! committed anywhere is thrown away.
//!
//! A branch is a directory `branch-<position of its tip>`. When its pages were none of that
//! position's, `-damaged-<time>` follows in the name. It has `branch.json` (what it is) and `pages`
//! (PAGE units: the image of each page that the heal replaced or dropped, as it was). It also has
//! `records` (its transactions, as they stood in the log, as far as they did) and `rows.jsonl`
//! (which rows that concerned). The replica writes it under another name, fsyncs it, and renames it
//! before the heal changes anything.

mod btree;
mod export;
mod list;
mod rows;

use std::fs::{self, File};
use std::io::{BufWriter, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::BytesMut;
use serde::{Deserialize, Serialize};

use crate::checksum::PageKey;
use crate::descriptors::NodeFile;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::Ready;
use crate::engine::options::EngineOptions;
use crate::error::{Error, Result};
use crate::files::{self, Paths, sync_directory};
use crate::page::{PageNo, PageSet};
use crate::status::{as_unix_millis, from_unix_millis, unix_millis};
use crate::txid::Position;
use crate::wire;

#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(super) use btree::fuzz_btree_page;
pub use list::{Lost, LostKind};
pub use rows::{LostRow, LostRows};
pub(super) use rows::{StateBefore, tell};

const FORMAT: u32 = 1;
/// The most bytes of a `branch.json` that the node reads; ours have less than 1000.
const BRANCH_MAX_BYTES: u64 = 64 * 1024;
const PREFIX: &str = "branch-";
/// What to do about a file of a branch that is corrupt.
const CURE: &str = "is a copy of what was replaced, which the node does not need: take what can be read from \
    the other files of its directory, then move that away";

/// A branch of the history that this node had and that a heal replaced by the primary's; see
/// [`Db::lost`](crate::Db::lost).
///
/// ```
/// use replite::{Error, LostBranch};
///
/// fn tell(branch: &LostBranch) -> Result<(), Error> {
///     println!("{} pages of a state that was replaced at {:?}", branch.pages, branch.time);
///     if let Some(told) = branch.rows()? {
///         for row in told.rows {
///             println!("{} {}: {:?} became {:?}", row.table, row.rowid, row.lost, row.kept);
///         }
///     }
///     Ok(())
/// }
/// # let _ = tell;
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LostBranch {
    format: u32,
    /// The last state that is known to be in both histories. None when the logs did not reach back
    /// to it.
    pub fork: Option<Position>,
    /// The state that the heal replaced.
    pub tip: Position,
    /// The state that took its place.
    pub healed_to: Position,
    /// Not a branch: the pages that the heal replaced were not what the position of the tip says.
    /// The disk damaged them, or something other than SQLite changed them.
    pub damaged: bool,
    /// When that was. JSON has it in milliseconds since 1970, as `unix_millis`.
    #[serde(rename = "unix_millis", with = "as_unix_millis")]
    pub time: SystemTime,
    /// The size of a page in bytes.
    pub page_size: u32,
    /// The database's size in pages at the tip.
    pub size_pages: u32,
    /// How many page images the directory keeps.
    pub pages: u64,
    /// Bytes of the branch's transaction records that the directory keeps; they may begin before
    /// the fork.
    pub record_bytes: u64,
    #[serde(skip)]
    path: PathBuf,
}

/// What a heal is about to replace.
pub(super) struct Replaced<'a> {
    pub(super) ready: &'a Ready,
    /// The last state known to be common, and where the records after it begin in the log.
    pub(super) fork: Option<Position>,
    pub(super) records_from: Option<u64>,
    /// Most bytes that all of `lost` may come to.
    pub(super) quota_bytes: u64,
    /// The pages are not what the position says.
    pub(super) damaged: bool,
}

impl LostBranch {
    /// Where the branch is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read(path: PathBuf) -> Result<LostBranch> {
        let file = path.join("branch.json");
        let text = files::read(&file, BRANCH_MAX_BYTES).map_err(Error::io("read", &file))?;
        let corrupt = |e: serde_json::Error| Error::Corrupt {
            path: file.clone(),
            offset: 0,
            what: e.to_string(),
            cure: CURE,
        };
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(corrupt)?;
        let found = value.get("format").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if found > u64::from(FORMAT) {
            return Err(Error::Newer { path: file, found: found as u32, supported: FORMAT });
        }
        let branch: LostBranch = serde_json::from_value(value).map_err(corrupt)?;
        Ok(LostBranch { path, ..branch })
    }
}

/// Keeps the local image of every page that the heal will replace or drop, and the branch's
/// records. They are durable on return.
///
/// # Errors
/// [`Error::Io`]; [`Error::LostFull`] when the quota does not allow it: the heal may replace
/// nothing then.
pub(super) fn keep(paths: &Paths, live: &mut WalAppender, replaced: &Replaced<'_>) -> Result<LostBranch> {
    let tip = live.base.tip();
    let lost = paths.lost();
    let mut name = format!("{PREFIX}{}", tip.position);
    if replaced.damaged {
        name += &format!("-damaged-{}", unix_millis());
    }
    let path = lost.join(name);
    if path.join("branch.json").exists() {
        // An earlier heal got this far and no further.
        return LostBranch::read(path);
    }
    let log = live.base.log.clone();
    let (from, until) = (replaced.records_from.unwrap_or(log.complete()), log.complete());
    let pages = differing(live, replaced.ready)?;
    let unit = wire::HEADER_BYTES + 4 + live.base.page_size.bytes();
    let needed = pages.len() as u64 * unit as u64 + until.saturating_sub(from);
    let used = bytes_below(&lost)?;
    if used.saturating_add(needed) > replaced.quota_bytes {
        return Err(Error::LostFull { path: lost, used, needed, quota: replaced.quota_bytes });
    }
    let new = begin_anew(path.with_extension("new"))?;
    write(&new.join("pages"), |out| write_pages(live, &pages, out))?;
    write(&new.join("records"), |out| log.bytes_between(from, until, |bytes| out.put(&bytes)))?;
    let branch = LostBranch {
        format: FORMAT,
        fork: replaced.fork,
        tip: tip.position,
        healed_to: replaced.ready.position,
        damaged: replaced.damaged,
        // As exact as the file has it.
        time: from_unix_millis(unix_millis()),
        page_size: live.base.page_size.get(),
        size_pages: tip.pages,
        pages: pages.len() as u64,
        record_bytes: until.saturating_sub(from),
        path: path.clone(),
    };
    let json = serde_json::to_vec_pretty(&branch).map_err(|e| Error::Internal(e.to_string()))?;
    write(&new.join("branch.json"), |out| out.put(&json))?;
    settle(paths, &new, &path)?;
    Ok(branch)
}

/// Copies a database file that the node is about to empty, and what SQLite has beside it. Returns
/// where to. The copy is durable on return.
///
/// # Errors
/// As for [`keep`].
pub(super) fn keep_file(options: &EngineOptions, mut file: &File) -> Result<PathBuf> {
    let (database, lost) = (options.paths.database(), options.paths.lost());
    let named = |path: &Path| path.file_name().unwrap_or_default().to_owned();
    let beside = [options.paths.wal(), options.paths.journal()];
    let beside = beside.iter().filter(|path| path.exists());
    let mut needed = file.metadata().map_err(Error::io("stat", database))?.len();
    for path in beside.clone() {
        needed += fs::metadata(path).map_err(Error::io("stat", path))?.len();
    }
    let used = bytes_below(&lost)?;
    if used.saturating_add(needed) > options.lost_bytes {
        return Err(Error::LostFull { path: lost, used, needed, quota: options.lost_bytes });
    }
    let new = begin_anew(lost.join("database.new"))?;
    let copy = |from: &mut dyn std::io::Read, name| {
        let to = new.join(name);
        let mut copied = files::create(&to)?;
        std::io::copy(from, &mut copied).map_err(Error::io("write", &to))?;
        copied.sync_all().map_err(Error::io("fsync", &to))
    };
    file.rewind().map_err(Error::io("read", database))?;
    copy(&mut file, named(database))?;
    for path in beside {
        copy(&mut File::open(path).map_err(Error::io("open", path))?, named(path))?;
    }
    let kept = lost.join(format!("database-{}", unix_millis()));
    settle(&options.paths, &new, &kept)?;
    Ok(kept)
}

/// Makes an empty directory. What an earlier try left that found no room counts for nothing.
fn begin_anew(new: PathBuf) -> Result<PathBuf> {
    files::remove_directory(&new)?;
    files::make_directory(&new)?;
    Ok(new)
}

/// Gives a directory its name when all that is in it is synced.
fn settle(paths: &Paths, new: &Path, path: &Path) -> Result<()> {
    sync_directory(new)?;
    fs::rename(new, path).map_err(Error::io("rename", new))?;
    sync_directory(&paths.lost())?;
    sync_directory(paths.state_dir())
}

/// Our pages that are not in the state that comes, or that are others there.
fn differing(live: &mut WalAppender, ready: &Ready) -> Result<PageSet> {
    let ours = live.base.tip().pages;
    let mut pages = PageSet::default();
    let (mut here, mut there) = (vec![0; ready.page_size.bytes()], vec![0; ready.page_size.bytes()]);
    for page in ready.have.iter().take_while(|page| page.get() <= ours) {
        live.read_current(page, &mut here)?;
        ready.read(page, &mut there)?;
        if here != there {
            pages.insert(page);
        }
    }
    let dropped = (ready.size.saturating_add(1)..=ours).filter_map(PageNo::new);
    dropped.filter(|page| !page.is_lock_page(ready.page_size)).for_each(|page| pages.insert(page));
    Ok(pages)
}

fn write_pages(live: &mut WalAppender, pages: &PageSet, out: &mut Output<'_>) -> Result<()> {
    let mut page = vec![0; live.base.page_size.bytes()];
    let mut unit = BytesMut::new();
    for number in pages.iter() {
        live.read_current(number, &mut page)?;
        unit.clear();
        wire::encode_page(number, PageKey::KEPT.hash(number, &page), &page, &mut unit);
        out.put(&unit)?;
    }
    Ok(())
}

/// A file in the making.
struct Output<'a> {
    path: &'a Path,
    out: BufWriter<NodeFile>,
}

impl Output<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::io("write", self.path))
    }
}

/// Writes a file and fsyncs it.
fn write(path: &Path, fill: impl FnOnce(&mut Output<'_>) -> Result<()>) -> Result<()> {
    let file = files::create(path)?;
    let mut output = Output { path, out: BufWriter::new(file) };
    fill(&mut output)?;
    let file = output.out.into_inner().map_err(|e| Error::io("write", path)(e.into_error()))?;
    file.sync_all().map_err(Error::io("fsync", path))
}

/// A directory of this kind in `lost` that has a file with the very bytes of this one.
pub(super) fn same_file(lost: &Path, prefix: &str, file: &Path) -> Result<Option<PathBuf>> {
    let hash = |path: &Path| -> std::io::Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        std::io::copy(&mut files::open(path)?, &mut hasher)?;
        Ok(hasher.finalize())
    };
    let (Ok(entries), Some(name)) = (fs::read_dir(lost), file.file_name()) else { return Ok(None) };
    let ours = hash(file).map_err(Error::io("read", file))?;
    for entry in entries {
        let path = entry.map_err(Error::io("read", lost))?.path();
        let kind = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if kind.starts_with(prefix) && hash(&path.join(name)).is_ok_and(|theirs| theirs == ours) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Bytes of all files below a directory; none when it is not there.
fn bytes_below(path: &Path) -> Result<u64> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let mut bytes = 0;
    for entry in entries {
        let entry = entry.map_err(Error::io("read", path))?;
        let meta = entry.metadata().map_err(Error::io("stat", entry.path()))?;
        bytes += if meta.is_dir() { bytes_below(&entry.path())? } else { meta.len() };
    }
    Ok(bytes)
}
