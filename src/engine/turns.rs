//! From one role to the other, on one open database.

use crate::engine::apply::handle::ReplicaEngine;
use crate::engine::capture::handle::PrimaryEngine;
use crate::engine::file::epochs::write_epochs;
use crate::engine::file::unsynced_marker;
use crate::engine::recover::opened::Opened;
use crate::error::{Error, Result};
use crate::txid::Epoch;

/// A turn that did not come about.
#[derive(Debug)]
pub(crate) struct NotTurned {
    pub(crate) error: Error,
    /// The database, where a role can go on with it. None: it is closed.
    pub(crate) opened: Option<Box<Opened>>,
}

impl From<Error> for NotTurned {
    fn from(error: Error) -> NotTurned {
        NotTurned { error, opened: None }
    }
}

impl Opened {
    /// Promotion: opens this epoch, and captures from now on what is committed. Blocks.
    pub(crate) fn into_primary(mut self, epoch: Epoch) -> Result<PrimaryEngine, NotTurned> {
        match self.begin_epoch_quickly(epoch) {
            Ok(connections) => Ok(PrimaryEngine::lead(self, connections)?),
            Err(error) => Err(NotTurned { error, opened: Some(Box::new(self)) }),
        }
    }

    /// Demotion: takes in from now on what a primary sends. Blocks.
    pub(crate) fn into_replica(self) -> Result<ReplicaEngine, NotTurned> {
        if let Err(error) = self.leave_epoch() {
            return Err(NotTurned { error, opened: Some(Box::new(self)) });
        }
        Ok(ReplicaEngine::follow(self)?)
    }

    /// What the WAL has from now on came from a primary.
    fn leave_epoch(&self) -> Result<()> {
        let paths = &self.database.options.paths;
        // The role that ended has synced all, and has WRITE.
        self.database.sync_own_wal()?;
        unsynced_marker::end(paths)?;
        write_epochs(self.database.options.keyed(), &self.history, false)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    use rusqlite::Connection;

    use crate::ends::{Ends, alone, descriptors, threads};
    use crate::engine::capture::handle::PrimaryEngine;
    use crate::engine::capture::startup::Opening;
    use crate::engine::file::epochs::read_epochs;
    use crate::engine::tests::{Home, assert_exact, assert_same, catch_up, node, open_plain, settled};
    use crate::error::Error;
    use crate::txid::Epoch;

    const LIMIT: Duration = Duration::from_secs(20);

    fn rows(connection: &Connection) -> rusqlite::Result<u64> {
        connection.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).map(|n| n as u64)
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn two_nodes_change_roles_a_hundred_times_under_readers_and_a_writer() {
        if !alone("engine::turns::tests::two_nodes_change_roles_a_hundred_times_under_readers_and_a_writer") {
            return;
        }
        let home = Home::new();
        let mut names = ["a.db", "b.db"];
        open_plain(&home.path("a.db")).execute_batch("CREATE TABLE t(a); INSERT INTO t VALUES (1)").unwrap();
        let mut primary = home.primary("a.db");
        let mut replica = home.follower("b.db");
        catch_up(&primary, &replica);
        let (ends, reads, written) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(1));
        std::thread::scope(|scope| {
            let _ends = Ends(&ends);
            for name in names {
                let (path, ends, reads, written) = (home.path(name), &ends, &reads, &written);
                scope.spawn(move || {
                    let connection = Connection::open(path).unwrap();
                    // No reader waits: what is in the way of one is an error.
                    connection.busy_timeout(Duration::ZERO).unwrap();
                    let mut before = 0;
                    while !ends.load(Ordering::Acquire) {
                        let now = rows(&connection).unwrap();
                        let most = written.load(Ordering::Acquire) + 1;
                        assert!((before..=most).contains(&now), "{now} rows after {before}, of {most}");
                        before = now;
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let mut first = None;
            for round in 0..100 {
                let writer = open_plain(&home.path(names[0]));
                for _ in 0..3 {
                    writer.execute("INSERT INTO t VALUES (randomblob(3000))", []).unwrap();
                    written.fetch_add(1, Ordering::AcqRel);
                }
                drop(writer);
                catch_up(&primary, &replica);
                let before = settled(&primary);
                let snapshots = names.map(|name| {
                    let connection = open_plain(&home.path(name));
                    connection.execute_batch("BEGIN").unwrap();
                    rows(&connection).unwrap();
                    connection
                });
                let (led, followed) = (primary.stop(LIMIT).unwrap(), replica.stop().unwrap());
                // A handle to what it was does nothing any more.
                assert!(matches!(primary.check(), Err(Error::ShutDown)));
                assert_eq!((led.position(), followed.position()), (before, before));
                let refused = Connection::open(home.path(names[0])).unwrap();
                refused.busy_timeout(Duration::ZERO).unwrap();
                assert!(refused.execute("INSERT INTO t VALUES (0)", []).is_err(), "nobody writes in between");
                drop(refused);
                let epoch = Epoch::new(led.history.epoch().number() + 1, round);
                (primary, replica) = (followed.into_primary(epoch).unwrap(), led.into_replica().unwrap());
                names.swap(0, 1);
                // What was begun before the change reads the state that it began with.
                for connection in snapshots {
                    connection.execute_batch("SAVEPOINT a").unwrap();
                    assert_eq!(rows(&connection).unwrap(), written.load(Ordering::Acquire), "round {round}");
                }
                let refused = Connection::open(home.path(names[1])).unwrap();
                refused.busy_timeout(Duration::ZERO).unwrap();
                assert!(
                    refused.execute("INSERT INTO t VALUES (0)", []).is_err(),
                    "a replica takes no writes"
                );
                drop(refused);
                let now = (threads(), descriptors(home.path("").as_path()));
                let first = first.get_or_insert(now);
                // A descriptor may be parked for a moment, until no lock of SQLite's is on its
                // file.
                assert!(now.0 <= first.0 && now.1 <= first.1 + 2, "{now:?} of {first:?} in round {round}");
            }
            catch_up(&primary, &replica);
        });
        assert!(reads.load(Ordering::Relaxed) > 1000);
        let position = settled(&primary);
        // The last epoch has no commit yet.
        assert_eq!(position.epoch().number(), 100);
        assert_eq!(position.number(), primary.log().tip().unwrap().number());
        assert_exact(&primary);
        assert_same(&home.path("a.db"), &home.path("b.db"));
        drop((primary, replica));
        let again = home.primary(names[0]);
        assert_eq!(settled(&again).number(), position.number());
        assert_eq!(rows(&open_plain(&home.path(names[0]))).unwrap(), written.load(Ordering::Acquire));
    }

    #[test]
    fn a_node_that_led_is_opened_without_a_word_in_its_history_and_goes_on_in_either_role() {
        let home = Home::new();
        let engine = home.primary("a.db");
        let writer = open_plain(&home.path("a.db"));
        writer.execute_batch("CREATE TABLE t(a); INSERT INTO t VALUES (1)").unwrap();
        let (before, epoch) = (settled(&engine), engine.base.node.applied.history().epoch());
        drop((engine, writer));
        let opened = Opening::begin(home.options("a.db"), node(), None).unwrap().finish_opened().unwrap();
        assert_eq!((opened.position(), opened.history.epoch()), (before, epoch));
        let replica = opened.into_replica().unwrap();
        assert_eq!(replica.vouched().unwrap(), Some(before));
        let on_disk = || {
            let options = home.options("a.db");
            let (paths, key) = options.keyed();
            read_epochs(paths, key).unwrap()
        };
        assert!(!on_disk().own, "what comes now is another node's");
        let next = Epoch::new(epoch.number() + 1, 1);
        let engine = replica.stop().unwrap().into_primary(next).unwrap();
        // Before any commit.
        assert_eq!((on_disk().history.epoch(), on_disk().own), (next, true));
        open_plain(&home.path("a.db")).execute_batch("INSERT INTO t VALUES (2)").unwrap();
        assert_eq!(settled(&engine).epoch(), next);
        drop(engine);
        // Where nothing says which state it is.
        std::fs::remove_dir_all(home.path("a.db-replite")).unwrap();
        let replica = home.follower("a.db");
        assert_eq!(replica.vouched().unwrap(), None);
        replica.abandon().unwrap();
        let opening = Opening::begin(home.options("a.db"), node(), Some(next)).unwrap();
        let engine = opening.finish(Some(next)).unwrap();
        assert_eq!(engine.base.node.applied.history().epoch(), next, "of that epoch, and of no other");
        assert_eq!(rows(&open_plain(&home.path("a.db"))).unwrap(), 2);
    }

    #[test]
    fn a_primary_that_holds_ends_where_it_held_and_a_replica_leads_from_there() {
        let home = Home::new();
        open_plain(&home.path("a.db")).execute_batch("CREATE TABLE t(a)").unwrap();
        let (mut names, mut led) = (["a.db", "b.db"], home.primary("a.db"));
        let mut follows = home.follower("b.db");
        for round in 0..10 {
            open_plain(&home.path(names[0])).execute_batch("INSERT INTO t VALUES (1)").unwrap();
            let mut times = vec![Instant::now()];
            let last = led.hold(LIMIT).unwrap();
            times.push(Instant::now());
            assert_eq!((led.log().tip(), led.base.tip().position), (Some(last), last));
            let other = Connection::open(home.path(names[0])).unwrap();
            other.busy_timeout(Duration::ZERO).unwrap();
            assert!(other.execute("INSERT INTO t VALUES (0)", []).is_err(), "nobody writes");
            assert_eq!(rows(&other).unwrap(), round + 1);
            drop(other);
            catch_up(&led, &follows);
            let mut opened = {
                times.push(Instant::now());
                follows.stop().unwrap()
            };
            times.push(Instant::now());
            assert_eq!(opened.position(), last);
            let connections =
                opened.begin_epoch_quickly(Epoch::new(last.epoch().number() + 1, round)).unwrap();
            times.push(Instant::now());
            let next = PrimaryEngine::lead(opened, connections).unwrap();
            times.push(Instant::now());
            let left = led.stop(Duration::ZERO).unwrap();
            times.push(Instant::now());
            assert_eq!(left.position(), last);
            (led, follows) = (next, left.into_replica().unwrap());
            names.swap(0, 1);
            let took: Vec<_> = times.windows(2).map(|two| two[1] - two[0]).collect();
            let [held, _, stopped, began, leads, left] = took[..] else { unreachable!() };
            eprintln!("held {held:?}; stopped {stopped:?}, began {began:?}, leads {leads:?}; left {left:?}");
        }
        catch_up(&led, &follows);
        assert_same(&home.path("a.db"), &home.path("b.db"));
    }

    #[test]
    fn a_primary_whose_file_others_write_to_stays_the_primary() {
        let home = Home::new();
        let engine = home.primary("a.db");
        let writer = open_plain(&home.path("a.db"));
        writer.execute_batch("CREATE TABLE t(a); BEGIN IMMEDIATE; INSERT INTO t VALUES (1)").unwrap();
        let refused = engine.stop(Duration::from_millis(50));
        assert!(matches!(refused, Err(Error::Timeout { .. })), "{refused:?}");
        writer.execute_batch("COMMIT; INSERT INTO t VALUES (2)").unwrap();
        let before = settled(&engine);
        let opened = engine.stop(LIMIT).unwrap();
        assert_eq!(opened.position(), before);
        // Left to itself it is closed, and free again.
        drop(opened);
        writer.execute_batch("INSERT INTO t VALUES (3)").unwrap();
        assert_eq!(settled(&home.primary("a.db")).number(), before.number() + 1);
    }

    #[test]
    fn a_replica_without_a_state_of_the_cluster_stays_a_replica() {
        let home = Home::new();
        let replica = home.follower("a.db");
        assert!(matches!(replica.stop(), Err(Error::NoState(_))));
        let primary = home.primary("p.db");
        catch_up(&primary, &replica);
        assert_eq!(replica.stop().unwrap().position(), settled(&primary));
    }
}
