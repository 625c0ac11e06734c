//! What goes into the log, and what follows when the node can't write or sync it.
//!
//! A full disk, or the log's own quota, never stops a commit: the log loses its past instead, and
//! says so. No later fsync tells what a failed one left on the disk. So the node begins the log
//! anew at its tip. Dropping records mends nothing else: any other failure ends what wanted to
//! append.

use bytes::Bytes;

use crate::engine::file::database::OpenDatabase;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::log::no_room;
use crate::report::Condition;
use crate::status::Role;
use crate::txid::Position;

/// Appends to the log.
///
/// # Errors
/// Those of the system, but for a full disk. Nothing of `units` is in the log then, and the log
/// dropped nothing.
pub(in crate::engine) fn append_or_gap(
    base: &OpenDatabase,
    units: Bytes,
    after: Option<Position>,
) -> Result<()> {
    let mut broken = lock(&base.log_broken);
    if !*broken {
        let mut appended = base.log.append(units.clone(), after);
        // A full disk costs the oldest records first.
        while appended.as_ref().is_err_and(no_room) && base.log.drop_oldest() {
            appended = base.log.append(units.clone(), after);
        }
        match appended {
            Ok(()) => return Ok(()),
            Err(error) if no_room(&error) || base.log.doubtful() => {
                *broken = true;
                say_broken(base, &error);
            }
            Err(error) => return Err(error),
        }
    }
    // The log begins again after a whole transaction, as soon as the disk allows.
    let Some(after) = after else { return Ok(()) };
    match base.log.reset(after) {
        Ok(()) => {
            *broken = false;
            base.node.report(Condition::LogGap { after });
            Ok(())
        }
        Err(error) if no_room(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

/// From here on the log says what the node vouches for. Where the node can't write the log, the log
/// begins after the next transaction.
///
/// # Errors
/// As for [`append_or_gap`].
pub(in crate::engine) fn begin_anew(base: &OpenDatabase, at: Position) -> Result<()> {
    let mut broken = lock(&base.log_broken);
    if *broken {
        return Ok(());
    }
    let Err(error) = base.log.reset(at) else { return Ok(()) };
    *broken = true;
    say_broken(base, &error);
    if no_room(&error) { Ok(()) } else { Err(error) }
}

/// Fsyncs the log.
///
/// # Errors
/// [`Error::Io`]. The log begins anew then, where its last record is whole. Otherwise the code that
/// appends the rest of the record begins it anew.
pub(in crate::engine) fn sync(base: &OpenDatabase) -> Result<()> {
    let Err(error) = base.log.sync() else { return Ok(()) };
    // No thread appends between the two.
    let broken = lock(&base.log_broken);
    let renewed = base.log.renew();
    if !matches!(renewed, Ok(None))
        && !*broken
        && let Some(at) = base.log.tip()
    {
        base.node.report(Condition::LogNotSynced { error: &error, at });
    }
    Err(error)
}

fn say_broken(base: &OpenDatabase, error: &Error) {
    let means = what_a_gap_means(base.node.roles.borrow().role);
    base.node.report(Condition::LogFails { error, means });
    base.note_room(error);
}

/// What comes of a log that lost its past.
fn what_a_gap_means(role: Role) -> &'static str {
    match role {
        Role::Replica => {
            "what the primary commits still comes; should it lead this node back, it has to compare all pages"
        }
        _ => "commits go on; replicas that are behind have to compare all their pages with this node's",
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use rusqlite::Connection;
    use rusqlite::config::DbConfig;
    use tokio::sync::broadcast::error::TryRecvError;

    use crate::engine::apply::handle::ReplicaEngine;
    use crate::engine::apply::stream_error::StreamError;
    use crate::engine::capture::handle::PrimaryEngine;
    use crate::engine::tests::{Home, applied, catch_up, node, send, settled, standing, until};
    use crate::error::Error;
    use crate::log::Lookup;
    use crate::log::tests::Broken;
    use crate::report::Part;
    use crate::status::{Event, Role};
    use crate::wire::{self, Message, Plan, Welcome};

    /// The one segment of a primary's log, by the path that its descriptor has.
    fn segment(home: &Home, name: &str) -> PathBuf {
        let log = fs::canonicalize(home.path(&format!("{name}-replite")).join("log")).unwrap();
        let mut all: Vec<_> = fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    fn primary(home: &Home) -> (PrimaryEngine, Connection) {
        let engine = home.primary("p.db");
        let plain = Connection::open(home.path("p.db")).unwrap();
        plain.execute_batch("CREATE TABLE t(a); INSERT INTO t VALUES (1)").unwrap();
        settled(&engine);
        (engine, plain)
    }

    #[test]
    fn a_log_that_lost_its_past_means_no_snapshot_and_less_on_a_replica() {
        let (primary, replica) =
            (super::what_a_gap_means(Role::Primary), super::what_a_gap_means(Role::Replica));
        assert!(primary.contains("replicas that are behind have to compare"), "{primary}");
        assert!(!replica.contains("replicas") && replica.contains("still comes"), "{replica}");
        assert!(!format!("{primary}{replica}").contains("snapshot"));
    }

    #[test]
    fn an_append_that_fails_for_another_reason_than_a_full_disk_drops_nothing_and_stops_loudly() {
        let home = Home::new();
        let (engine, plain) = primary(&home);
        let mut events = engine.base.node.events();
        let start = engine.log().start().unwrap();
        {
            let _broken = Broken::at(&segment(&home, "p.db"), false);
            plain.execute("INSERT INTO t VALUES (2)", []).unwrap();
            until("the failure", || engine.base.node.failure().is_some());
        }
        let why = engine.base.node.failure().unwrap();
        assert!(why.text().contains("the log can't be written"), "{why}");
        assert!(matches!(engine.begun(), Err(Error::Stopped(_))));
        loop {
            match events.try_recv() {
                Ok(event) => assert!(!matches!(event, Event::LogGap { .. }), "the log was dropped"),
                Err(TryRecvError::Empty) => break,
                Err(error) => panic!("{error}"),
            }
        }
        drop(engine);
        // The commit was made, and the next start has it, with all that was in the log.
        let engine = home.primary("p.db");
        let position = settled(&engine);
        assert_eq!((engine.log().start(), engine.log().tip()), (Some(start), Some(position)));
        assert_eq!(plain.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).unwrap(), 2);
    }

    #[test]
    fn a_transaction_larger_than_the_logs_quota_that_the_log_lacks_keeps_nobody_from_starting() {
        let home = Home::new();
        let (engine, plain) = primary(&home);
        plain.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
        engine.close();
        plain.execute("INSERT INTO t VALUES (randomblob(3000000))", []).unwrap();
        for _ in 0..2 {
            let mut options = home.options("p.db");
            options.log.quota_bytes = 1 << 20;
            let engine = PrimaryEngine::open(options, node()).unwrap();
            let position = settled(&engine);
            assert_eq!(engine.log().tip(), Some(position));
            assert_eq!(plain.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).unwrap(), 2);
            engine.close();
        }
    }

    #[test]
    fn an_append_that_works_again_soon_is_made_up_for() {
        let home = Home::new();
        let (engine, plain) = primary(&home);
        let start = engine.log().start();
        {
            let _broken = Broken::at(&segment(&home, "p.db"), false);
            plain.execute("INSERT INTO t VALUES (2)", []).unwrap();
            until("it is told", || engine.base.node.has_problem(Part::Log));
        }
        let position = settled(&engine);
        assert_eq!((engine.log().start(), engine.log().tip()), (start, Some(position)));
        until("it is over", || !engine.base.node.has_problem(Part::Log));
        engine.base.check().unwrap();
    }

    #[test]
    fn a_log_that_could_not_be_synced_is_begun_anew_at_its_tip() {
        let home = Home::new();
        let (engine, plain) = primary(&home);
        let follower = home.follower("r.db");
        catch_up(&engine, &follower);
        let mut events = engine.base.node.events();
        {
            let _broken = Broken::at(&segment(&home, "p.db"), true);
            plain.execute("INSERT INTO t VALUES (2)", []).unwrap();
            until("the next fsync", || engine.log().start() == engine.log().tip());
        }
        let mut gap = None;
        until("it is told", || {
            if let Ok(Event::LogGap { position: at, .. }) = events.try_recv() {
                gap = Some(at);
            }
            gap.is_some()
        });
        assert_eq!(gap, engine.log().tip());
        // It goes on from there, and so does a replica that is late: by a comparison.
        plain.execute("INSERT INTO t VALUES (3)", []).unwrap();
        let position = settled(&engine);
        assert!(matches!(engine.log().find(gap.unwrap().number()).unwrap(), Lookup::At { .. }));
        engine.log().sync().unwrap();
        catch_up(&engine, &follower);
        assert_eq!(applied(&follower), Some(position));
        engine.close();
        assert_eq!(settled(&home.primary("p.db")).number(), position.number());
    }

    #[test]
    fn a_replica_says_nothing_of_a_state_that_it_can_not_note() {
        let home = Home::new();
        let (engine, _plain) = primary(&home);
        let follower = home.follower("r.db");
        catch_up(&engine, &follower);
        drop(follower);
        // A primary has to say whose this is.
        let stranger = Connection::open(home.path("r.db")).unwrap();
        stranger.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
        stranger.execute("INSERT INTO t VALUES (9)", []).unwrap();
        drop(stranger);
        let node = node();
        let follower = ReplicaEngine::open(home.options("r.db"), node.clone()).unwrap();
        let position = standing(&follower).0.position.unwrap();
        assert_ne!(node.applied.position(), Some(position));
        let (log, aside) = (home.path("r.db-replite").join("log"), home.path("aside"));
        fs::rename(&log, &aside).unwrap();
        fs::write(&log, "no directory").unwrap();
        let welcome = || {
            let mut bytes = bytes::BytesMut::new();
            let (peer, epoch) = (node.me.clone(), position.epoch());
            let page_size = engine.page_size();
            let welcome = Welcome {
                peer,
                epoch,
                plan: Plan::Log,
                position,
                page_size,
                keys: crate::wire::PeerKeys::of(crate::engine::tests::KEYS, true),
                packed: false,
            };
            wire::encode(&Message::Welcome(welcome), &mut bytes);
            bytes
        };
        send(&follower, welcome()).unwrap();
        let mut told = None;
        until("the stream's end", || {
            told = send(&follower, bytes::BytesMut::new()).err();
            told.is_some()
        });
        assert!(matches!(told, Some(StreamError::Failed(Error::Io { .. }))), "{told:?}");
        assert_ne!(node.applied.position(), Some(position), "it would be forgotten with a restart");
        assert!(node.has_problem(Part::Log));
        // The next stream, when the disk is well.
        fs::remove_file(&log).unwrap();
        fs::rename(&aside, &log).unwrap();
        drop(follower);
        let follower = ReplicaEngine::open(home.options("r.db"), node.clone()).unwrap();
        standing(&follower);
        send(&follower, welcome()).unwrap();
        until("it is vouched for", || node.applied.position() == Some(position));
    }
}
