//! What the workloads write, and what must therefore be found: a state follows from the number of its transactions
//! and from who made each of them.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, Transaction};

use crate::trace::Change;

/// Rows that are used again and again, so that the database stays small and pages become free.
const SLOTS: u64 = 64;

pub const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS t(slot INTEGER PRIMARY KEY, seq INTEGER, who TEXT, v BLOB);
    CREATE INDEX IF NOT EXISTS by_who ON t(who, seq);
    CREATE TABLE IF NOT EXISTS head(id INTEGER PRIMARY KEY, seq INTEGER, chain INTEGER);
    INSERT OR IGNORE INTO head VALUES (1, 0, 0)";

/// Makes the schema in a database that gives free pages back with each commit.
///
/// # Errors
/// As SQLite.
pub fn migrate(conn: &mut Connection) -> rusqlite::Result<()> {
    let done: bool =
        conn.query_row("SELECT count(*) FROM sqlite_schema WHERE name = 'head'", [], |r| r.get(0))?;
    if done {
        return Ok(());
    }
    conn.execute_batch("PRAGMA auto_vacuum = FULL; VACUUM")?;
    let tx = conn.transaction()?;
    tx.execute_batch(SCHEMA)?;
    tx.commit()
}

/// What the transaction with this number writes: mostly less than a page, now and then more than is captured in one go.
#[must_use]
pub fn blob(seq: u64) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    let mut reader = hasher.update(&seq.to_le_bytes()).finalize_xof();
    let mut size = [0; 2];
    reader.fill(&mut size);
    let length = match seq {
        _ if seq.is_multiple_of(211) => 700_000,
        _ if seq.is_multiple_of(61) => 60_000,
        _ => u16::from_le_bytes(size) as usize % 3000,
    };
    let mut bytes = vec![0; length];
    reader.fill(&mut bytes);
    bytes
}

fn link(chain: i64, seq: u64, who: &str) -> i64 {
    let mut hasher = blake3::Hasher::new();
    let hash =
        hasher.update(&chain.to_le_bytes()).update(&seq.to_le_bytes()).update(who.as_bytes()).finalize();
    i64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap())
}

/// One transaction; says before it ends what it is going to be.
///
/// # Errors
/// As SQLite.
pub fn write(tx: &Transaction<'_>, who: &str) -> rusqlite::Result<u64> {
    let (seq, chain): (u64, i64) =
        tx.query_row("SELECT seq + 1, chain FROM head", [], |r| Ok((r.get(0)?, r.get(1)?)))?;
    say(&format!("intent {seq} {who}"));
    tx.execute("INSERT OR REPLACE INTO t VALUES (?1, ?2, ?3, ?4)", (seq % SLOTS, seq, who, blob(seq)))?;
    tx.execute("UPDATE head SET seq = ?1, chain = ?2", (seq, link(chain, seq, who)))?;
    Ok(seq)
}

/// Puts a line into the trace, if there is one: `POWER_ACKS` names the file for that.
pub fn say(line: &str) {
    static ACKS: OnceLock<Option<Mutex<std::fs::File>>> = OnceLock::new();
    let acks = ACKS.get_or_init(|| {
        let path = std::env::var_os("POWER_ACKS")?;
        Some(Mutex::new(std::fs::File::options().append(true).create(true).open(path).unwrap()))
    });
    let Some(acks) = acks else { return };
    acks.lock().unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// The page key of a database, as docs/design.md has it in `database-keys`. Zeros where there is none:
/// then nothing has a checksum yet.
fn page_key(path: &Path) -> [u8; 28] {
    let keys = PathBuf::from(format!("{}-replite/database-keys", path.display()));
    let bytes = std::fs::read(keys).unwrap_or_default();
    bytes.get(12..40).and_then(|key| key.try_into().ok()).unwrap_or([0; 28])
}

/// The checksum of all pages with this page key, as docs/design.md defines it.
#[must_use]
pub fn checksum(pages: &[u8], page_size: usize, page_key: &[u8; 28]) -> u128 {
    let mut sum = 0u128;
    for (number, page) in (1u32..).zip(pages.chunks_exact(page_size)) {
        if u64::from(number - 1) * page_size as u64 == 0x4000_0000 {
            continue;
        }
        let key = [&page_key[..], &number.to_le_bytes()].concat();
        let hash = blake3::keyed_hash(&key.try_into().unwrap(), page);
        sum = sum.wrapping_add(u128::from_le_bytes(hash.as_bytes()[..16].try_into().unwrap()));
    }
    sum
}

/// All pages of a database as plain SQLite reads them, and their checksum. The WAL is left as it is.
///
/// # Errors
/// In words.
pub fn pages(path: &Path) -> Result<(Vec<u8>, u128), String> {
    let text = |e: rusqlite::Error| e.to_string();
    let mut conn = Connection::open(path).map_err(text)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(text)?;
    let size: usize = conn.query_row("PRAGMA page_size", [], |r| r.get(0)).map_err(text)?;
    let pages = conn.serialize("main").map_err(text)?.to_vec();
    let sum = checksum(&pages, size, &page_key(path));
    Ok((pages, sum))
}

/// What a workload said, each with its place in the trace.
#[derive(Debug, Default)]
pub struct Said {
    /// Who made a transaction; several, when one was killed and its number was used again.
    intents: BTreeMap<u64, Vec<(usize, String)>>,
    /// Acknowledged transactions.
    acks: Vec<(usize, u64)>,
    /// What a replica told its primary that it has on its disk, as transaction numbers.
    synced: Vec<(usize, u64)>,
    /// Transaction numbers are this much higher than ours, which know nothing of the schema.
    pub base: Option<(usize, u64)>,
    /// The checksum after each transaction, by its number.
    pub checksums: HashMap<u64, u128>,
    /// Branches of all epochs.
    pub branches: Vec<u64>,
    /// A commit that a foreign process made in a replica's file while it was down.
    pub stray: Option<usize>,
    /// From here on it is on the disk.
    pub stray_synced: Option<usize>,
}

impl Said {
    #[must_use]
    pub fn read(changes: &[Change]) -> Said {
        let mut said = Said::default();
        for (at, change) in changes.iter().enumerate() {
            if let Change::Said(line) = change {
                said.line(at, line);
            }
        }
        said
    }

    /// All transactions up to a number were made by one.
    #[must_use]
    pub fn by(who: &str, last: u64) -> Said {
        let intents = (1..=last).map(|seq| (seq, vec![(0, who.to_string())])).collect();
        Said { intents, ..Said::default() }
    }

    fn line(&mut self, at: usize, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: usize| words[word].parse::<u64>().unwrap();
        match words[0] {
            "intent" => self.intents.entry(number(1)).or_default().push((at, words[2].into())),
            "ack" => self.acks.push((at, number(1))),
            "synced" => self.synced.push((at, number(1))),
            "base" => {
                let before = self.base.get_or_insert((at, number(1)));
                assert_eq!(before.1, number(1), "a number was left out or used twice");
            }
            "position" => {
                let position: replite::Position = words[1].parse().unwrap();
                self.branches.push(position.epoch().branch());
                let sum = position.checksum().as_u128();
                let before = self.checksums.insert(position.number(), sum);
                assert!(before.is_none_or(|b| b == sum), "{position} had another checksum before");
            }
            "stray" => self.stray = Some(at),
            "strayed" => self.stray_synced = Some(at),
            other => panic!("{other} was said"),
        }
    }

    /// The newest transaction that was acknowledged before a place in the trace.
    #[must_use]
    pub fn acknowledged(&self, before: usize) -> u64 {
        self.acks.iter().filter(|(at, _)| *at < before).map(|(_, seq)| *seq).max().unwrap_or(0)
    }

    /// The highest number that a replica said it has on its disk.
    #[must_use]
    pub fn replica_synced(&self, before: usize) -> Option<u64> {
        self.synced.iter().filter(|(at, _)| *at < before).map(|(_, number)| *number).max()
    }

    /// Checks that a database is the state after some whole number of our transactions, and says which.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self, conn: &Connection, before: usize) -> Result<u64, String> {
        let text = |e: rusqlite::Error| e.to_string();
        let ok: String = conn.query_row("PRAGMA integrity_check", [], |r| r.get(0)).map_err(text)?;
        if ok != "ok" {
            return Err(format!("integrity_check: {ok}"));
        }
        let schema = "SELECT count(*) FROM sqlite_schema WHERE name = 'head'";
        if conn.query_row(schema, [], |r| r.get::<_, i64>(0)).map_err(text)? == 0 {
            return Ok(0);
        }
        let (last, chain): (u64, i64) = conn
            .query_row("SELECT seq, chain FROM head", [], |r| Ok((r.get(0)?, r.get(1)?)))
            .map_err(text)?;
        let makers = self.makers(last, chain, before)?;
        let mut statement = conn
            .prepare("SELECT slot, seq, who, v FROM t WHERE who <> 'stray' ORDER BY seq")
            .map_err(text)?;
        let rows = statement
            .query_map([], |r| {
                Ok((
                    r.get::<_, u64>(0)?,
                    r.get::<_, u64>(1)?,
                    r.get::<_, String>(2)?,
                    r.get::<_, Vec<u8>>(3)?,
                ))
            })
            .map_err(text)?;
        let mut expected = last.saturating_sub(SLOTS - 1).max(1);
        for row in rows {
            let (slot, seq, who, v) = row.map_err(text)?;
            if seq != expected || slot != seq % SLOTS || who != makers[seq as usize - 1] || v != blob(seq) {
                return Err(format!(
                    "of state {last}: row {seq} of {who} in slot {slot}, {expected} expected"
                ));
            }
            expected += 1;
        }
        if expected != last + 1 {
            return Err(format!("of state {last}: the rows end before {expected}"));
        }
        Ok(last)
    }

    fn makers(&self, last: u64, chain: i64, before: usize) -> Result<Vec<&str>, String> {
        let mut makers = Vec::new();
        let mut here = 0;
        for seq in 1..=last {
            let known = self.intents.get(&seq).map_or(&[][..], Vec::as_slice);
            let known = || known.iter().rev().filter(|(at, _)| *at < before).map(|(_, who)| who.as_str());
            let next = |who: &&str| seq < last || link(here, seq, who) == chain;
            let who = known().find(next).ok_or_else(|| format!("nobody made transaction {seq} of {last}"))?;
            here = link(here, seq, who);
            makers.push(who);
        }
        if here == chain { Ok(makers) } else { Err(format!("state {last} has another chain")) }
    }
}

/// Lets the stock shell look at a database, where there is one.
///
/// # Errors
/// What it says, if it is not `ok`.
pub fn stock(path: &Path) -> Result<(), String> {
    let out = std::process::Command::new("sqlite3")
        // A process that is just being started may have our locks for a moment.
        .args(["-cmd", ".timeout 20000"])
        .arg(path)
        .arg("PRAGMA integrity_check")
        .output();
    let Ok(out) = out else { return Ok(()) };
    let text = String::from_utf8_lossy(&out.stdout);
    if text.trim() == "ok" {
        return Ok(());
    }
    Err(format!("sqlite3 says {text} {}", String::from_utf8_lossy(&out.stderr)))
}
