//! The rows that a heal changed. The replica reads them from the states before and after it, while
//! it can still read both.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::engine::file::database::{OpenDatabase, Tip};
use crate::engine::file::reader::reader;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::Ready;
use crate::engine::lost::btree::{self, StatePages};
use crate::engine::lost::{CURE, Output, write};
use crate::error::{Error, Result};
use crate::hex::hex;
use crate::page::{PageNo, PageSet};
use crate::sqlite::Handle;

const FILE: &str = "rows.jsonl";
/// Rows that a heal tells of one branch.
const ROWS_MAX: usize = 20_000;
/// Bytes of them.
const BYTES_MAX: usize = 64 << 20;

/// A row of a rowid table that a heal changed.
///
/// ```
/// use replite::LostRow;
///
/// /// What has to be done so that the row is as the lost branch had it.
/// fn action(row: &LostRow) -> &'static str {
///     match (&row.lost, &row.kept) {
///         (Some(_), None) => "insert it",
///         (Some(_), Some(_)) => "update it",
///         (None, _) => "delete it, if the branch had deleted it",
///     }
/// }
/// # let _ = action;
/// ```
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LostRow {
    /// The table.
    pub table: String,
    /// The row's id.
    pub rowid: i64,
    /// The row as the lost branch had it, by column. None: the branch did not have it, because it
    /// had deleted it or because the primary has inserted it since. A blob is an object with the
    /// one field `blob`, in hex.
    pub lost: Option<Map<String, Value>>,
    /// The row as the primary has it.
    pub kept: Option<Map<String, Value>>,
}

/// The rows of a lost branch; see [`LostBranch::rows`](crate::LostBranch::rows).
///
/// ```
/// use replite::{Error, LostBranch};
///
/// fn notes(branch: &LostBranch) -> Result<usize, Error> {
///     let Some(told) = branch.rows()? else { return Ok(0) };
///     if told.truncated {
///         eprintln!("more rows were changed: see the pages");
///     }
///     Ok(told.rows.iter().filter(|row| row.table == "notes").count())
/// }
/// # let _ = notes;
/// ```
#[derive(Clone, PartialEq, Debug, Default)]
#[non_exhaustive]
pub struct LostRows {
    /// The rows, by table and id: first those that the branch had.
    pub rows: Vec<LostRow>,
    /// Whether there were more than the heal told: it tells at most 20,000, of 64 MiB together.
    pub truncated: bool,
}

/// The state before a heal, kept readable beside the one after it.
pub(in crate::engine) struct StateBefore {
    handle: Handle,
    tip: Tip,
}

impl StateBefore {
    /// Holds the state that readers see now.
    pub(in crate::engine) fn hold(live: &WalAppender) -> Result<StateBefore> {
        let handle = reader(&live.base)?;
        handle.connection().execute_batch("BEGIN")?;
        handle.connection().query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        Ok(StateBefore { handle, tip: live.base.tip() })
    }
}

/// Tells the rows of a branch that the node kept at `path`.
pub(in crate::engine) fn tell(
    path: &Path,
    before: StateBefore,
    live: &WalAppender,
    ready: &Ready,
) -> Result<()> {
    let base = &live.base;
    let mut after = reader(base)?;
    after.connection().execute_batch("BEGIN")?;
    let StateBefore { mut handle, tip } = before;
    // What the heal replaced, and what it dropped.
    let mut touched = ready.have.clone();
    (ready.size.saturating_add(1)..=tip.pages).filter_map(PageNo::new).for_each(|page| touched.insert(page));
    let (lost, more_lost) = candidates(base, &mut handle, &tip, &touched)?;
    let (kept, more_kept) = candidates(base, &mut after, &base.tip(), &touched)?;
    let new = path.join("rows.new");
    write(&new, |out| {
        let mut told = Told::default();
        for (table, ids) in &lost {
            for &id in ids {
                told.row(table, id, (handle.connection(), after.connection()), out)?;
            }
        }
        for (table, ids) in &kept {
            let known = lost.get(table);
            for &id in ids.iter().filter(|id| known.is_none_or(|known| !known.contains(id))) {
                told.row(table, id, (handle.connection(), after.connection()), out)?;
            }
        }
        let last = serde_json::json!({ "truncated": told.more || more_lost || more_kept });
        out.put(format!("{last}\n").as_bytes())
    })?;
    fs::rename(&new, path.join(FILE)).map_err(Error::io("rename", &new))
}

/// The ids of the rows on touched leaf pages, by table, and whether there are more.
fn candidates(
    base: &OpenDatabase,
    handle: &mut Handle,
    tip: &Tip,
    touched: &PageSet,
) -> Result<(BTreeMap<String, BTreeSet<i64>>, bool)> {
    let roots = {
        let sql = "SELECT name, rootpage FROM sqlite_schema WHERE type = 'table' AND rootpage > 0";
        let mut statement = handle.connection().prepare(sql)?;
        let rows = statement.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?;
        rows.collect::<rusqlite::Result<Vec<(String, u32)>>>()?
    };
    let mut page = vec![0; base.page_size.bytes()];
    let frame = tip.frame;
    let read = |number: PageNo, buffer: &mut [u8]| base.read_page(&mut *handle, number, frame, buffer);
    let mut pages = StatePages { read: Box::new(read), page_bytes: page.len(), count: tip.pages };
    let tables = btree::tables(&mut pages, &roots, touched)?;
    let mut found = BTreeMap::new();
    let mut count = 0;
    for (table, leaves) in tables {
        let mut ids = BTreeSet::new();
        for leaf in leaves {
            if count > ROWS_MAX {
                break;
            }
            (pages.read)(leaf, &mut page)?;
            let on_page = btree::rowids(leaf, &page).unwrap_or_default();
            count += on_page.len();
            ids.extend(on_page);
        }
        found.insert(table, ids);
    }
    Ok((found, count > ROWS_MAX))
}

#[derive(Default)]
struct Told {
    rows: usize,
    bytes: usize,
    more: bool,
}

impl Told {
    /// Writes a row if it is not the same in both states.
    fn row(
        &mut self,
        table: &str,
        rowid: i64,
        (before, after): (&Connection, &Connection),
        out: &mut Output<'_>,
    ) -> Result<()> {
        if self.more {
            return Ok(());
        }
        let (lost, kept) = (fetch(before, table, rowid)?, fetch(after, table, rowid)?);
        if lost == kept {
            return Ok(());
        }
        let row = LostRow { table: table.to_owned(), rowid, lost, kept };
        let line = serde_json::to_string(&row).map_err(|e| Error::Internal(e.to_string()))? + "\n";
        if self.rows == ROWS_MAX || self.bytes + line.len() > BYTES_MAX {
            self.more = true;
            return Ok(());
        }
        self.rows += 1;
        self.bytes += line.len();
        out.put(line.as_bytes())
    }
}

/// A row by column; none when there is no such row, or no such table.
fn fetch(connection: &Connection, table: &str, rowid: i64) -> Result<Option<Map<String, Value>>> {
    let sql = format!("SELECT * FROM {} WHERE {} = ?1", quoted(table), rowid_name(connection, table)?);
    let Ok(mut statement) = connection.prepare_cached(&sql) else { return Ok(None) };
    let names = (0..statement.column_count()).map(|at| statement.column_name(at).map(str::to_owned));
    let names = names.collect::<rusqlite::Result<Vec<_>>>()?;
    let row = statement.query_row([rowid], |row| {
        let value = |(at, name): (usize, &String)| Ok((name.clone(), json(row.get_ref(at)?)));
        names.iter().enumerate().map(value).collect::<rusqlite::Result<Map<_, _>>>()
    });
    Ok(row.optional()?)
}

/// A name of the rowid that no column of the table has taken.
fn rowid_name(connection: &Connection, table: &str) -> Result<&'static str> {
    let sql = "SELECT count(*) FROM pragma_table_info(?1) WHERE lower(name) = ?2";
    for name in ["rowid", "_rowid_", "oid"] {
        let mut statement = connection.prepare_cached(sql)?;
        if statement.query_row((table, name), |row| row.get::<_, i64>(0))? == 0 {
            return Ok(name);
        }
    }
    Ok("rowid")
}

pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn json(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(i) => i.into(),
        // Infinity is no JSON.
        ValueRef::Real(r) => {
            serde_json::Number::from_f64(r).map_or_else(|| r.to_string().into(), Value::Number)
        }
        ValueRef::Text(text) => String::from_utf8_lossy(text).into(),
        ValueRef::Blob(blob) => serde_json::json!({ "blob": hex(blob) }),
    }
}

/// The rows that the heal told. `None` when the process ended before that.
pub(super) fn read(path: &Path) -> Result<Option<LostRows>> {
    let path = path.join(FILE);
    let file = match crate::files::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", &path)(error)),
    };
    let corrupt = |offset, what: String| Error::Corrupt { path: path.clone(), offset, what, cure: CURE };
    let mut told = LostRows::default();
    let mut offset = 0;
    for line in BufReader::new(file).lines() {
        let line = line.map_err(Error::io("read", &path))?;
        let value: Value = serde_json::from_str(&line).map_err(|e| corrupt(offset, e.to_string()))?;
        offset += line.len() as u64 + 1;
        if let Some(truncated) = value.get("truncated").and_then(Value::as_bool) {
            told.truncated = truncated;
            return Ok(Some(told));
        }
        told.rows.push(serde_json::from_value(value).map_err(|e| corrupt(offset, e.to_string()))?);
    }
    Err(corrupt(offset, "it ends too early".into()))
}
