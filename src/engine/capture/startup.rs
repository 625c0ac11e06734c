//! A primary's database on its way to serve, and what replicas give back to it.

use std::cell::OnceCell;
use std::sync::{Arc, mpsc};

use crate::checksum::PageKey;
use crate::context::NodeContext;
use crate::engine::capture::handle::{Connections, PrimaryEngine};
use crate::engine::checkpoint::restart::keep_from_others;
use crate::engine::file::database::OpenDatabase;
use crate::engine::file::epochs::{write_epochs, write_epochs_when};
use crate::engine::file::unsynced_marker;
use crate::engine::history::epoch::{draw_epoch, open_epoch};
use crate::engine::history::intake_error::IntakeError;
use crate::engine::history::record_intake::RecordIntake;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::options::EngineOptions;
use crate::engine::recover::opened::Opened;
use crate::engine::recover::{self, Findings};
use crate::error::{Error, Result};
use crate::files;
use crate::page::PageSize;
use crate::sqlite::{Handle, Slot};
use crate::threads::beside;
use crate::txid::{Epoch, EpochHistory, Position};
use crate::wire::Unit;

/// A primary's database whose position is known, and that no connection can write to yet. Until it
/// serves, replicas may give back transactions that a power cut took.
#[derive(Debug)]
pub(crate) struct Opening {
    live: WalAppender,
    intake: RecordIntake,
    /// Bytes of the transaction that has begun and not ended.
    unfinished_bytes: u64,
    history: EpochHistory,
    /// Whether the state here had a name. If not, it became history with an epoch of its own.
    exact: bool,
    highest_epoch: u64,
    may_miss: bool,
}

impl Opening {
    /// Opens (and creates) the database, finds the position, and makes good from the log what the
    /// WAL lost. Blocks. A state without a name becomes history, with this epoch, or else one that
    /// the node draws.
    pub(crate) fn begin(
        options: EngineOptions,
        node: Arc<NodeContext>,
        epoch: Option<Epoch>,
    ) -> Result<Opening> {
        let options = options.now(&node);
        let (mut opened, known, may_miss) = Opening::judged(options, node)?;
        if !opened.exact {
            opened.become_history(known, epoch)?;
        }
        Opening::at_rest(opened, may_miss)
    }

    /// Opens the files and judges them, without a word in the history. Whether anything here speaks
    /// of one, and whether a power cut may have taken transactions.
    fn judged(options: EngineOptions, node: Arc<NodeContext>) -> Result<(Findings, bool, bool)> {
        files::make_state_dir(options.paths.state_dir())?;
        let may_miss = unsynced_marker::may_be_lost(&options.paths)?;
        let opened = recover::open(options.clone(), node, true)?;
        let known = opened.is_known();
        let opened = opened.judge(unsynced_marker::was_open(&options.paths))?;
        Ok((opened, known, may_miss))
    }

    fn at_rest(mut opened: Findings, may_miss: bool) -> Result<Opening> {
        // Not before the node has judged the files: a refusal leaves all as it was.
        let tip = opened.base.tip();
        if tip.frame > 0 {
            let (wal, size) = (&opened.base.wal, opened.base.page_size);
            if wal.behind(tip.frame, tip.salts, size)?.is_some_and(|behind| behind.commits) {
                // The primary never acknowledged what a power cut left there. But a bit that flips
                // before it leaves the same.
                opened.set_wal_aside()?;
            }
            wal.cut_behind(tip.frame, tip.salts, size)?;
        } else if opened.wal.is_ours() {
            // Its header was changed, or its first frame. There may be commits in it that no other
            // file has.
            opened.set_wal_aside()?;
        }
        opened.begin_if_empty()?;
        let Findings { base, handle, history, exact, highest_epoch, .. } = opened.redo()?;
        let live = WalAppender::new(base, handle)?;
        let (intake, unfinished_bytes) = (RecordIntake::default(), 0);
        Ok(Opening { live, intake, unfinished_bytes, history, exact, highest_epoch, may_miss })
    }

    /// Whether replicas may have transactions that follow this node's state, and that this node
    /// lost.
    pub(crate) fn may_miss(&self) -> bool {
        self.may_miss && self.exact
    }

    pub(crate) fn tip(&self) -> Position {
        self.live.position()
    }

    pub(crate) fn history(&self) -> &EpochHistory {
        &self.history
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.live.base.page_size
    }

    /// What its pages are hashed with.
    pub(crate) fn page_key(&self) -> PageKey {
        self.live.base.page_key
    }

    /// Takes units of records that follow the tip. Each whole transaction stays, whatever comes
    /// after it. Blocks.
    ///
    /// # Errors
    /// [`IntakeError::Mismatch`] and [`IntakeError::Garbled`] when they don't follow, or are no
    /// records.
    pub(crate) fn take(&mut self, units: &[Unit]) -> Result<(), IntakeError> {
        let taken = units.iter().try_for_each(|unit| self.take_unit(unit));
        let published = self.intake.publish(&mut self.live);
        taken.and(published.map_err(IntakeError::from))
    }

    fn take_unit(&mut self, unit: &Unit) -> Result<(), IntakeError> {
        let message = unit.decode().map_err(|e| IntakeError::garbled(e.to_string()))?;
        if !self.intake.unit(&mut self.live, unit, &message, &self.history)? {
            return Err(IntakeError::garbled(format!("{:?} in place of a record", unit.kind)));
        }
        // No log has a longer transaction: it would push all others out.
        self.unfinished_bytes = match self.live.in_transaction() {
            true => self.unfinished_bytes + unit.raw.len() as u64,
            false => 0,
        };
        if self.unfinished_bytes > self.live.base.options.log.quota_bytes {
            return Err(IntakeError::garbled("a transaction larger than the log's quota"));
        }
        Ok(())
    }

    /// Forgets a transaction that did not come to its end.
    pub(crate) fn abort(&mut self) {
        self.intake.abort(Some(&mut self.live));
        self.unfinished_bytes = 0;
    }

    /// Opens this epoch, or else one above all that are known here, and starts the threads. Blocks.
    pub(crate) fn finish(self, epoch: Option<Epoch>) -> Result<PrimaryEngine> {
        let (exact, highest) = (self.exact, self.highest_epoch.max(self.history.epoch().number()));
        let mut opened = self.finish_opened()?;
        // The state that had no name has it by the epoch that is to begin.
        let epoch = match epoch {
            epoch if !exact => epoch.filter(|epoch| *epoch != opened.history.epoch()),
            Some(epoch) => Some(epoch),
            None => Some(draw_epoch(highest).map_err(|error| error.of_files(opened.database.path()))?),
        };
        let connections = opened.begin_epoch(epoch)?;
        PrimaryEngine::lead(opened, connections)
    }

    /// The state that is here, without a role and without an epoch of its own. Blocks.
    pub(crate) fn finish_opened(mut self) -> Result<Opened> {
        self.abort();
        let Opening { live, history, .. } = self;
        let WalAppender { base, handle, .. } = live;
        let opened = Opened::new(base, handle, history);
        // A transaction that began and did not end goes.
        let (base, tip) = (&opened.database, opened.database.tip());
        base.wal.cut_behind(tip.frame, tip.salts, base.page_size)?;
        Ok(opened)
    }
}

impl PrimaryEngine {
    /// Gives WRITE back, and starts the threads. The epoch has begun. Blocks.
    pub(in crate::engine) fn lead(opened: Opened, connections: Connections) -> Result<PrimaryEngine> {
        let Some((base, mut handle, history)) = opened.hand_on() else { return Err(Error::ShutDown) };
        let (tip, epoch) = (base.tip(), history.epoch());
        base.node.applied.lead(history.clone(), tip.position);
        base.give_back(&mut handle, Slot::WRITE)?;
        tracing::info!(position = %tip.position, %epoch, "serving as the primary");
        PrimaryEngine::start(base, handle, history, connections)
    }
}

impl Opened {
    /// Opens the epoch, durably, and makes all that a primary's first commit has to stand on. None:
    /// the node opened the history's last epoch for this. WRITE stays held. Returns what the
    /// primary's threads read with. Blocks.
    ///
    /// One after the other: on a full disk the reserve has room for that, and a file that is
    /// replaced gives its room back.
    ///
    /// # Errors
    /// [`Error::Peer`] when the epoch is not above all that the history has. After any error the
    /// database is still open, and a replica can go on with it.
    pub(in crate::engine) fn begin_epoch(&mut self, epoch: Option<Epoch>) -> Result<Connections> {
        let (base, handle, history) = self.parts()?;
        // An epoch must not be on the disk before the transactions that it follows.
        base.sync_own_wal()?;
        if let Some(epoch) = epoch {
            let next = with_epoch(history, epoch, base.tip().position)?;
            write_epochs(base.options.keyed(), &next, true)?;
            *history = next;
        }
        stand(base, handle)?;
        Connections::open(base)
    }

    /// The same in less time, for writers wait: the parts go to the disk side by side. A disk that
    /// is full lets that fail.
    pub(in crate::engine) fn begin_epoch_quickly(&mut self, epoch: Epoch) -> Result<Connections> {
        let (base, handle, history) = self.parts()?;
        base.sync_own_wal()?;
        let next = with_epoch(history, epoch, base.tip().position)?;
        // Both wait for the disk. The anchor is there before the epoch is.
        let (tell, told) = mpsc::sync_channel(1);
        let anchored = OnceCell::new();
        let (connections, written) = beside(
            "replite-epoch",
            move || {
                let stands = stand(base, handle);
                // It waits for this.
                let _ = tell.send(stands.is_ok());
                stands.and_then(|()| Connections::open(base))
            },
            || {
                write_epochs_when(base.options.keyed(), &next, true, || {
                    match anchored.get_or_init(|| told.recv().unwrap_or(false)) {
                        true => Ok(()),
                        // The other one says why.
                        false => Err(Error::ShutDown),
                    }
                })
            },
        );
        if written.is_ok() {
            *history = next;
        }
        let connections = connections?;
        written.map(|()| connections)
    }
}

/// The history up to this position, with the epoch that goes on from there.
fn with_epoch(history: &EpochHistory, epoch: Epoch, position: Position) -> Result<EpochHistory> {
    let mut next = history.up_to(position);
    open_epoch(&mut next, epoch, position)?;
    Ok(next)
}

/// All but the epoch that a primary's first commit has to stand on.
fn stand(base: &OpenDatabase, handle: &mut Handle) -> Result<()> {
    let options = &base.options;
    recover::anchor(base, handle)?;
    // The anchor's WAL is synced. What comes now may not be.
    if options.durability.ships_unsynced() {
        unsynced_marker::begin(&options.paths)?;
    } else {
        unsynced_marker::end(&options.paths)?;
    }
    // Another process that stayed in the database may have copied everything back while no node
    // prevented that.
    if let Err(error) = keep_from_others(base, handle) {
        // `keep_from_others` did it in the other way, which needs no room.
        base.note_room(&error);
        if !error.no_room() {
            return Err(error);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use bytes::{Bytes, BytesMut};
    use rusqlite::Connection;

    use super::*;
    use crate::engine::tests::{Home, node, settled};
    use crate::log::Lookup;
    use crate::page::PageNo;
    use crate::txid::Txid;
    use crate::wire::{Decoder, Message, RecordPart, TxnBegin, TxnEnd, encode, encode_page};

    fn units(bytes: &[u8]) -> Vec<Unit> {
        let mut decoder = Decoder::new(Some(crate::engine::tests::KEY));
        decoder.push(Bytes::copy_from_slice(bytes));
        std::iter::from_fn(|| decoder.next().unwrap()).collect()
    }

    fn copy(from: &Path, to: &Path) {
        if from.is_dir() {
            fs::create_dir_all(to).unwrap();
            for entry in fs::read_dir(from).unwrap() {
                let name = entry.unwrap().file_name();
                // What is being replaced may be gone by now.
                if !name.to_string_lossy().ends_with(".new") {
                    copy(&from.join(&name), &to.join(&name));
                }
            }
        } else {
            fs::copy(from, to).unwrap();
        }
    }

    /// A primary with three more transactions than a copy of its files, and their records.
    fn behind(home: &Home) -> (Position, Vec<Vec<Unit>>) {
        let engine = home.primary("a.db");
        let writer = Connection::open(home.path("a.db")).unwrap();
        writer.execute_batch("CREATE TABLE t(a); INSERT INTO t VALUES (0)").unwrap();
        let first = settled(&engine);
        for end in ["", "-wal", "-replite"] {
            copy(&home.path(&format!("a.db{end}")), &home.path(&format!("b.db{end}")));
        }
        fs::write(home.path("b.db-replite").join("unsynced"), "another boot").unwrap();
        for n in 1..=3 {
            // More than one unit may have.
            writer.execute("INSERT INTO t VALUES (randomblob(?1 * 20000))", [n]).unwrap();
        }
        let tip = settled(&engine);
        let log = engine.log();
        let lsn = |number| match log.find(number).unwrap() {
            Lookup::At { lsn, .. } => lsn,
            found => panic!("{found:?}"),
        };
        let record = |number| {
            let (from, to) = (lsn(number - 1), lsn(number));
            units(&log.read_disk(from, (to - from) as usize).unwrap())
        };
        let records = (first.number() + 1..=tip.number()).map(record).collect();
        drop(writer);
        (tip, records)
    }

    #[test]
    fn records_that_follow_are_taken_and_no_others() {
        let home = Home::new();
        let (tip, records) = behind(&home);
        let mut opening = Opening::begin(home.options("b.db"), node(), None).unwrap();
        let before = opening.tip();
        assert!(opening.may_miss());
        assert_eq!((before.number(), records.len()), (tip.number() - 3, 3));

        let mut forged = BytesMut::new();
        let (page, number) = (vec![7; 4096], PageNo::new(2).unwrap());
        let begin = TxnBegin { before, epoch: before.epoch(), page_size: opening.page_size() };
        encode(&Message::TxnBegin(begin), &mut forged);
        encode_page(number, crate::engine::tests::KEY.hash(number, &page), &page, &mut forged);
        let after = Position::new(Txid::new(before.epoch(), before.number() + 1), tip.checksum());
        encode(&Message::TxnEnd(TxnEnd { after, pages: 2, changed: 1, unix_micros: 0 }), &mut forged);
        // With a page that the database does not have afterwards.
        let mut beyond = BytesMut::new();
        let number = PageNo::new(1000).unwrap();
        let hash = crate::engine::tests::KEY.hash(number, &page);
        encode(&Message::TxnBegin(begin), &mut beyond);
        encode_page(number, hash, &page, &mut beyond);
        let after = Position::new(after.txid(), before.checksum().with(hash));
        let pages = opening.live.base.tip().pages;
        encode(&Message::TxnEnd(TxnEnd { after, pages, changed: 1, unix_micros: 0 }), &mut beyond);
        let mut epochs = BytesMut::new();
        encode(&Message::Epochs(opening.history().clone()), &mut epochs);
        let mut garbled = records[0].iter().max_by_key(|unit| unit.raw.len()).unwrap().clone();
        let mut bytes = garbled.raw.to_vec();
        bytes[100] ^= 1;
        garbled.raw = bytes.into();
        for (what, units) in [
            ("a later record", records[1].clone()),
            ("a record whose pages lead elsewhere", units(&forged)),
            ("a page beyond the end", units(&beyond)),
            ("no record", units(&epochs)),
            ("a flipped bit", vec![records[0][0].clone(), garbled]),
            ("a page of no record", records[0][1..].to_vec()),
        ] {
            let error = opening.take(&units).expect_err(what);
            assert!(!matches!(error, IntakeError::Failed(_)), "{what}: {error:?}");
            opening.abort();
            assert_eq!(opening.tip(), before, "{what}");
        }

        // What is whole stays, whatever comes after it.
        opening.take(&[&records[0][..], &records[2][..]].concat()).unwrap_err();
        opening.abort();
        assert_eq!(opening.tip().number(), before.number() + 1);
        // Cut off within the next one, twice; the second time for good.
        opening.take(&records[1][..2]).unwrap();
        opening.abort();
        opening.take(&records[1]).unwrap();
        opening.take(&records[2][..2]).unwrap();
        let engine = opening.finish(None).unwrap();
        let position = settled(&engine);
        assert_eq!(position.number(), tip.number() - 1);
        assert_eq!(engine.log().tip(), Some(position));
        let rows = |name: &str| {
            let sql = "SELECT count(*), sum(length(a)) FROM t";
            let connection = Connection::open(home.path(name)).unwrap();
            connection.query_row(sql, [], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, i64>(1)?))).unwrap()
        };
        assert_eq!(rows("b.db"), (3, 1 + 20_000 + 40_000));
        Connection::open(home.path("b.db")).unwrap().execute("INSERT INTO t VALUES (1)", []).unwrap();
        let position = settled(&engine);
        let Lookup::At { lsn, .. } = engine.log().find(before.number()).unwrap() else { panic!("not found") };
        let mut numbers = Vec::new();
        let mut within = false;
        let check = |_: &Unit, message: Message<'_>| {
            for part in message.parts() {
                match part {
                    RecordPart::Begin(_) => assert!(!std::mem::replace(&mut within, true), "half a record"),
                    RecordPart::End(end) => {
                        numbers.push(end.after.number());
                        within = false;
                    }
                    RecordPart::Change(_) => {}
                }
            }
            Ok(())
        };
        engine.log().records(lsn, engine.log().complete(), check).unwrap();
        assert_eq!(numbers, (before.number() + 1..=position.number()).collect::<Vec<_>>());
        engine.close();
        assert!(!home.path("b.db-replite").join("unsynced").exists());
        let again = Opening::begin(home.options("b.db"), node(), None).unwrap();
        assert_eq!(again.tip(), position);
        assert!(!again.may_miss());
    }

    #[test]
    fn a_transaction_that_no_log_would_have_is_refused_before_it_fills_the_disk() {
        let home = Home::new();
        let (_, records) = behind(&home);
        let mut options = home.options("b.db");
        options.log.quota_bytes = 4000;
        let mut opening = Opening::begin(options, node(), None).unwrap();
        let before = opening.tip();
        // Its end does not even come.
        let error = opening.take(&records[0][..records[0].len() - 1]).unwrap_err();
        assert!(matches!(&error, IntakeError::Garbled(what) if what.contains("quota")), "{error:?}");
        opening.abort();
        assert_eq!(opening.tip(), before);
    }

    /// The disk kept the end of the WAL and not its middle, and the log goes a part of the way.
    /// What the node writes once more from the log is what was there, bit for bit. The end follows
    /// from it.
    #[test]
    fn frames_behind_a_hole_do_not_come_back_when_the_log_fills_it() {
        let home = Home::new();
        let engine = home.primary("a.db");
        let writer = Connection::open(home.path("a.db")).unwrap();
        writer.execute_batch("CREATE TABLE t(a)").unwrap();
        let mut frames = Vec::new();
        for n in 0..10 {
            writer.execute("INSERT INTO t VALUES (?1)", [n]).unwrap();
            let position = settled(&engine);
            frames.push((position, engine.wal().frames));
        }
        let Lookup::At { lsn, .. } = engine.log().find(frames[7].0.number()).unwrap() else {
            panic!("not found")
        };
        for end in ["", "-wal", "-replite"] {
            copy(&home.path(&format!("a.db{end}")), &home.path(&format!("b.db{end}")));
        }
        let wal = fs::File::options().write(true).open(home.path("b.db-wal")).unwrap();
        let hole = crate::wal::frame_offset(frames[4].1, engine.page_size());
        std::os::unix::fs::FileExt::write_all_at(&wal, &[0xff; 512], hole + 1000).unwrap();
        let log = home.path("b.db-replite").join("log").join("0000000000000000.log");
        let log = fs::File::options().write(true).open(log).unwrap();
        log.set_len(crate::wire::SEGMENT_BYTES as u64 + lsn + 100).unwrap();
        let rows = || {
            let connection = Connection::open(home.path("b.db")).unwrap();
            connection.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).unwrap()
        };
        for _ in 0..3 {
            let engine = PrimaryEngine::open(home.options("b.db"), node()).unwrap();
            assert_eq!(settled(&engine), frames[7].0);
            assert_eq!(rows(), 8);
            engine.close();
        }
        assert_eq!(rows(), 8);
    }
}
