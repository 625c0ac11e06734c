//! The notes in SQL.

use replite::rusqlite::{self, Connection, OptionalExtension, params};
use serde::Serialize;

/// One note.
#[derive(Serialize)]
pub(crate) struct Note {
    pub(crate) id: i64,
    pub(crate) text: String,
    /// Which instance took the request that wrote it.
    pub(crate) node: String,
    pub(crate) created: String,
}

/// Makes the tables where they are missing. Triggers keep the index, because the `sqlite3` shell
/// may write, too.
pub(crate) fn migrate(conn: &mut Connection) -> rusqlite::Result<()> {
    let tx = conn.transaction()?;
    let indexed = tx.table_exists(None, "notes_fts")?;
    tx.execute_batch(
        "CREATE TABLE IF NOT EXISTS notes(
             id INTEGER PRIMARY KEY AUTOINCREMENT,
             text TEXT NOT NULL,
             node TEXT NOT NULL DEFAULT '',
             created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
         );
         CREATE VIRTUAL TABLE IF NOT EXISTS notes_fts USING fts5(text, content='notes', content_rowid='id');
         CREATE TRIGGER IF NOT EXISTS notes_added AFTER INSERT ON notes BEGIN
             INSERT INTO notes_fts(rowid, text) VALUES (new.id, new.text);
         END;
         CREATE TRIGGER IF NOT EXISTS notes_gone AFTER DELETE ON notes BEGIN
             INSERT INTO notes_fts(notes_fts, rowid, text) VALUES ('delete', old.id, old.text);
         END;
         CREATE TRIGGER IF NOT EXISTS notes_changed AFTER UPDATE ON notes BEGIN
             INSERT INTO notes_fts(notes_fts, rowid, text) VALUES ('delete', old.id, old.text);
             INSERT INTO notes_fts(rowid, text) VALUES (new.id, new.text);
         END;",
    )?;
    if !indexed {
        // The notes may be older than the index, in an imported file.
        tx.execute("INSERT INTO notes_fts(notes_fts) VALUES ('rebuild')", [])?;
    }
    tx.commit()
}

pub(crate) fn list(conn: &Connection, query: &str, limit: u32) -> rusqlite::Result<Vec<Note>> {
    let row = |r: &rusqlite::Row<'_>| {
        Ok(Note { id: r.get(0)?, text: r.get(1)?, node: r.get(2)?, created: r.get(3)? })
    };
    match fts(query) {
        Some(words) => conn
            .prepare_cached(
                "SELECT n.id, n.text, n.node, n.created FROM notes_fts f JOIN notes n ON n.id = f.rowid
                 WHERE notes_fts MATCH ?1 ORDER BY n.id DESC LIMIT ?2",
            )?
            .query_map(params![words, limit], row)?
            .collect(),
        None => conn
            .prepare_cached("SELECT id, text, node, created FROM notes ORDER BY id DESC LIMIT ?1")?
            .query_map([limit], row)?
            .collect(),
    }
}

/// Each word of the user's in quotes: nothing in it is query syntax then. The last one may be
/// unfinished.
fn fts(query: &str) -> Option<String> {
    let words: Vec<String> = query
        .split_whitespace()
        // FTS5 takes no zero bytes, and a word of nothing but punctuation has no tokens.
        .map(|word| word.replace(['"', '\0'], " "))
        .filter(|word| word.chars().any(char::is_alphanumeric))
        .map(|word| format!("\"{word}\"*"))
        .collect();
    (!words.is_empty()).then(|| words.join(" "))
}

pub(crate) fn add(conn: &Connection, text: &str, node: &str) -> rusqlite::Result<i64> {
    conn.prepare_cached("INSERT INTO notes(text, node) VALUES (?1, ?2)")?.execute([text, node])?;
    Ok(conn.last_insert_rowid())
}

pub(crate) fn change(conn: &Connection, id: i64, text: &str) -> rusqlite::Result<bool> {
    Ok(conn.prepare_cached("UPDATE notes SET text = ?2 WHERE id = ?1")?.execute(params![id, text])? > 0)
}

pub(crate) fn remove(conn: &Connection, id: i64) -> rusqlite::Result<bool> {
    let there = conn
        .prepare_cached("SELECT 1 FROM notes WHERE id = ?1")?
        .query_row([id], |r| r.get::<_, i64>(0))
        .optional()?;
    conn.prepare_cached("DELETE FROM notes WHERE id = ?1")?.execute([id])?;
    Ok(there.is_some())
}
