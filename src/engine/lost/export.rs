//! Showing a lost branch: its transactions, its pages, its rows, and all of it as a SQLite file.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use bytes::{Bytes, BytesMut};
use rusqlite::{Connection, OpenFlags};
use serde_json::{Map, Value};

use crate::checksum::PageKey;
use crate::engine::lost::rows::{self, LostRows, quoted};
use crate::engine::lost::{CURE, LostBranch};
use crate::error::{Error, Result};
use crate::files;
use crate::hex::unhex_lossy;
use crate::log::logged;
use crate::page::PageNo;
use crate::sqlite::connect_alone;
use crate::status::LoggedTransaction;
use crate::wire::{Decoder, HEADER_BYTES, Image, Kind, Message, PageChange, RecordPart, Unit};

/// Bytes that one read takes.
const READ_BYTES: usize = 256 * 1024;

/// All functions block.
impl LostBranch {
    /// The branch's transactions, oldest first, as far as the node kept their records. Where the
    /// fork is not known, some before it may be among them.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`].
    pub fn transactions(&self) -> Result<Vec<LoggedTransaction>> {
        let fork = self.fork.map_or(0, |fork| fork.number());
        let (mut listed, mut bytes) = (Vec::new(), 0);
        // The hash of a page in a record is by the key that the database had then.
        self.units("records", Kind::ends_record, |unit, message| {
            bytes += unit.raw.len() as u64;
            if let Some(RecordPart::End(end)) = message.and_then(|message| message.parts().last()) {
                let log_bytes = std::mem::take(&mut bytes);
                if end.after.number() > fork {
                    listed.push(logged(&end, log_bytes));
                }
            }
            Ok(())
        })?;
        Ok(listed)
    }

    /// Visits the pages that the heal replaced, as they were, in order. Each was checked against
    /// its hash.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`]; what `visit` returns.
    pub fn visit_pages(&self, mut visit: impl FnMut(PageNo, &[u8]) -> Result<()>) -> Result<()> {
        self.units(
            "pages",
            |kind| kind == Kind::Page,
            |_, message| match message {
                Some(Message::Change(PageChange { number, image: Image::Whole(page), .. })) => {
                    visit(number, page)
                }
                _ => Ok(()),
            },
        )
    }

    /// The rows that the heal changed. None when the process ended before it told them, or when it
    /// could not read the tables. Then pages and records are all that there is.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`].
    pub fn rows(&self) -> Result<Option<LostRows>> {
        rows::read(self.path())
    }

    /// Writes the branch into a new SQLite file, for `ATTACH` and the shell. A user that can't read
    /// the database can't read that file either.
    ///
    /// `replite_branch` says what the branch is. `replite_transactions`, `replite_pages` and
    /// `replite_rows` have what the functions here give. A table of the branch may have had rows
    /// that the heal replaced. For each such table there is a table `lost_<name>` with those rows:
    /// `replite_rowid` first, then their own columns.
    ///
    /// # Errors
    /// [`Error::FileExists`], [`Error::Io`]; [`Error::Sqlite`]; [`Error::Corrupt`].
    pub fn export(&self, to: &Path) -> Result<()> {
        let made = files::create_like(to, &self.path().join("pages"));
        // Closed before SQLite opens it: a later close would drop its locks.
        drop(made?);
        let done = self.fill(to);
        if done.is_err() {
            // A file that is not whole would pass for one that is. If it can't be removed, that
            // changes nothing about the error.
            let _ = fs::remove_file(to);
        }
        done
    }

    fn fill(&self, to: &Path) -> Result<()> {
        let mut file = connect_alone(to, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        let tx = file.transaction()?;
        tx.execute_batch(
            "CREATE TABLE replite_branch (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
             CREATE TABLE replite_transactions (number INTEGER PRIMARY KEY, position TEXT, \
             unix_micros INTEGER, changed_pages INTEGER, pages INTEGER);
             CREATE TABLE replite_pages (number INTEGER PRIMARY KEY, page BLOB);
             CREATE TABLE replite_rows (name TEXT, row INTEGER, lost TEXT, kept TEXT);",
        )?;
        let Value::Object(facts) = serde_json::to_value(self).map_err(|e| Error::Internal(e.to_string()))?
        else {
            return Err(Error::Internal("a branch without facts".into()));
        };
        for (name, value) in &facts {
            tx.execute("INSERT INTO replite_branch VALUES (?1, ?2)", (name, &sql(value)))?;
        }
        for t in self.transactions()? {
            let micros = t.time.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_micros() as i64);
            let values =
                (t.position.number() as i64, t.position.to_string(), micros, t.changed_pages, t.pages);
            tx.execute("INSERT INTO replite_transactions VALUES (?1, ?2, ?3, ?4, ?5)", values)?;
        }
        {
            let mut insert = tx.prepare("INSERT INTO replite_pages VALUES (?1, ?2)")?;
            self.visit_pages(|number, page| {
                insert.execute((number.get(), page))?;
                Ok(())
            })?;
        }
        for row in self.rows()?.unwrap_or_default().rows {
            let text = |side: &Option<Map<String, Value>>| side.clone().map(|s| Value::Object(s).to_string());
            let values = (&row.table, row.rowid, text(&row.lost), text(&row.kept));
            tx.execute("INSERT INTO replite_rows VALUES (?1, ?2, ?3, ?4)", values)?;
            if let Some(lost) = &row.lost {
                insert_lost(&tx, &row.table, row.rowid, lost)?;
            }
        }
        tx.commit()?;
        file.close().map_err(|(_, error)| error)?;
        files::sync_name(to)
    }

    /// Visits the units of a file, and reads those of some kinds.
    fn units(
        &self,
        name: &str,
        reads: impl Fn(Kind) -> bool,
        mut visit: impl FnMut(&Unit, Option<Message<'_>>) -> Result<()>,
    ) -> Result<()> {
        let path = self.path().join(name);
        let mut file = files::open(&path).map_err(Error::io("open", &path))?;
        let (mut decoder, mut offset) = (Decoder::new(Some(PageKey::KEPT)), 0u64);
        let corrupt = |offset, what: String| Error::Corrupt { path: path.clone(), offset, what, cure: CURE };
        loop {
            let mut buffer = BytesMut::zeroed(READ_BYTES);
            let got = match file.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                got => got.map_err(Error::io("read", &path))?,
            };
            if got == 0 {
                break;
            }
            buffer.truncate(got);
            decoder.push(Bytes::from(buffer));
            while let Some(unit) = decoder.next().map_err(|e| corrupt(offset, e.to_string()))? {
                let message = reads(unit.kind).then(|| unit.decode()).transpose();
                let message = message.map_err(|e| corrupt(offset + HEADER_BYTES as u64, e.to_string()))?;
                visit(&unit, message)?;
                offset += unit.raw.len() as u64;
            }
        }
        if decoder.buffered() > 0 {
            return Err(corrupt(offset, "it ends within a unit".into()));
        }
        Ok(())
    }
}

/// Inserts a row into the table of its like.
fn insert_lost(tx: &Connection, table: &str, rowid: i64, row: &Map<String, Value>) -> Result<()> {
    let table = quoted(&format!("lost_{table}"));
    let columns: String = row.keys().map(|name| format!(", {}", quoted(name))).collect();
    tx.execute_batch(&format!(
        "CREATE TABLE IF NOT EXISTS {table} (replite_rowid INTEGER PRIMARY KEY{columns})"
    ))?;
    let places: String = (0..row.len()).map(|at| format!(", ?{}", at + 2)).collect();
    let mut insert = tx.prepare_cached(&format!("INSERT INTO {table} VALUES (?1{places})"))?;
    let mut values = vec![rusqlite::types::Value::Integer(rowid)];
    values.extend(row.values().map(sql));
    insert.execute(rusqlite::params_from_iter(values))?;
    Ok(())
}

/// What a JSON value of ours was in SQLite.
fn sql(value: &Value) -> rusqlite::types::Value {
    use rusqlite::types::Value as Sql;
    match value {
        Value::Null => Sql::Null,
        Value::Bool(b) => Sql::Integer((*b).into()),
        Value::Number(n) => {
            n.as_i64().map_or_else(|| Sql::Real(n.as_f64().unwrap_or(f64::NAN)), Sql::Integer)
        }
        Value::String(text) => Sql::Text(text.clone()),
        Value::Object(object) => match object.get("blob").and_then(Value::as_str) {
            Some(hex) => Sql::Blob(unhex_lossy(hex)),
            None => Sql::Text(value.to_string()),
        },
        Value::Array(_) => Sql::Text(value.to_string()),
    }
}
