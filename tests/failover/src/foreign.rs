//! Another program's connections: they write to the file of the node that leads, without asking it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::clock::now;
use crate::history::{Outcome, Write};
use crate::world::World;

const NAME: &str = "foreign";
/// What is known of its commits.
pub const COMMITTED: &str = "committed by another program";

/// Writes until it is told to end, now and then in a transaction that stays open for a while.
pub async fn run(world: Arc<World>, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let go_on = world.clients.subscribe();
    let mut op = 0;
    while *go_on.borrow() {
        tokio::time::sleep(Duration::from_millis(rng.random_range(20..400))).await;
        let any = world.members[rng.random_range(0..world.members.len())].clone();
        let member = if rng.random_bool(0.9) { world.leader().unwrap_or(any) } else { any };
        // The files are not to be replaced meanwhile: no program survives that.
        let Ok(_turn) = member.turn.try_lock() else { continue };
        op += 1;
        let begin = now();
        let held = if rng.random_bool(0.1) { rng.random_range(0..3000) } else { 0 };
        let path = member.database();
        let wrote = tokio::task::spawn_blocking(move || write(path, op, Duration::from_millis(held))).await;
        let outcome = match wrote {
            Ok(Ok(())) => Outcome::Unknown(COMMITTED.into()),
            Ok(Err(error)) => match error.sqlite_error_code() {
                Some(ErrorCode::DatabaseBusy | ErrorCode::ReadOnly | ErrorCode::CannotOpen) => {
                    Outcome::NotExecuted(error.to_string())
                }
                _ => Outcome::Unknown(error.to_string()),
            },
            Err(error) => Outcome::Unknown(error.to_string()),
        };
        let (client, asked) = (NAME.to_string(), member.name.clone());
        world.history().writes.push(Write { client, op, asked, begin, end: now(), away: false, outcome });
    }
}

fn write(path: PathBuf, op: u64, held: Duration) -> rusqlite::Result<()> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut conn = Connection::open_with_flags(path, flags)?;
    conn.busy_timeout(Duration::from_millis(200))?;
    // A node that was killed may have commits in the WAL that are not in its log yet.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    let tx = conn.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    tx.execute("INSERT INTO log VALUES (?1, ?2, randomblob(200))", (NAME, op as i64))?;
    std::thread::sleep(held);
    tx.commit()
}
