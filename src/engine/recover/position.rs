//! Finds which state the files are. The newest anchor and the commits after it tell, or the file at
//! rest, or the name of their hash.
//!
//! Nothing here guesses. A state is *exact* in two cases. A chain of checksums leads to it from an
//! anchor, over a file that is as that anchor left it. Or the hash of everything is that of a state
//! which an anchor or a record names.

use std::sync::Arc;

use bytes::Bytes;

use crate::checksum::Checksum;
use crate::context::NodeContext;
use crate::engine::checkpoint::backfill::is_marked;
use crate::engine::checkpoint::generation::are_ours;
use crate::engine::file::anchor::{Anchor, Anchors, FileState};
use crate::engine::file::database::{OpenDatabase, Tip};
use crate::engine::file::wal_file::WalFile;
use crate::engine::history::wal_records::{Capture, Sink};
use crate::engine::recover::Findings;
use crate::error::Result;
use crate::log::{Log, Lookup, no_room};
use crate::page::{PageNo, PageSize};
use crate::report::Condition;
use crate::sqlite::Handle;
use crate::txid::{Epoch, EpochHistory, Place, Position, Txid};
use crate::wal::{FRAME_HEADER_BYTES, FrameHeader, IndexHeader, Salts, frame_offset};

/// What the log says of the states that were counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum LogSays {
    /// It led to one of them, or goes on from the last.
    So,
    /// It has another state of one of their numbers.
    Otherwise,
    Nothing,
}

/// What the WAL is to the anchors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum Wal {
    /// The newest anchor's frame is in it.
    Whole,
    /// It is the generation before the newest anchor's, which no node began.
    Before,
    /// A node began it, but no anchor knows it: they are older, or gone.
    Stray,
    /// It is the generation of an anchor, but does not have the frame of that anchor, which was on
    /// the disk. The WAL was cut, or its content was changed.
    Short,
    /// No node began it: SQLite did, which copies all of a WAL back first.
    Foreign,
    /// There is none, or nothing is in it.
    Gone,
}

impl Wal {
    pub(in crate::engine) fn of(
        known: &[Anchor],
        wal: &WalFile,
        header: &IndexHeader,
        size: PageSize,
    ) -> Result<Wal> {
        let known_of = |salts| known.iter().any(|anchor| anchor.frame > 0 && anchor.salts == salts);
        if known.iter().any(|a| a.frame > 0 && a.salts == header.salts && !fits(a, wal, header, size)) {
            return Ok(Wal::Short);
        }
        if header.max_frame == 0 {
            // SQLite has begun it anew, and got no further.
            let foreign = header.salts != Salts::default() && !are_ours(header.salts);
            // There are frames of ours after a header that SQLite does not take for one.
            return Ok(match first_frame(wal, size)?.filter(|_| !foreign) {
                Some(first) if known_of(first.salts) => Wal::Short,
                Some(first) if are_ours(first.salts) => Wal::Stray,
                _ => Wal::Gone,
            });
        }
        Ok(match known_of(header.salts) {
            true if known.first().is_some_and(|a| fits(a, wal, header, size)) => Wal::Whole,
            true => Wal::Before,
            false if are_ours(header.salts) => Wal::Stray,
            false => Wal::Foreign,
        })
    }

    /// Whether frames of ours are in it.
    pub(in crate::engine) fn is_ours(self) -> bool {
        matches!(self, Wal::Whole | Wal::Before | Wal::Stray | Wal::Short)
    }
}

fn first_frame(wal: &WalFile, size: PageSize) -> Result<Option<FrameHeader>> {
    if wal.bytes()? < frame_offset(2, size) {
        return Ok(None);
    }
    let mut bytes = [0; FRAME_HEADER_BYTES];
    wal.read(&mut bytes, frame_offset(1, size))?;
    Ok(Some(FrameHeader::parse(&bytes)))
}

/// Whether the frame of an anchor is in the WAL, with what was before it.
fn fits(anchor: &Anchor, wal: &WalFile, header: &IndexHeader, size: PageSize) -> bool {
    let mut bytes = [0; FRAME_HEADER_BYTES];
    anchor.frame > 0
        && anchor.frame <= header.max_frame
        && anchor.salts == header.salts
        && wal.read(&mut bytes, frame_offset(anchor.frame, size)).is_ok()
        && FrameHeader::parse(&bytes).sum == anchor.sum
}

/// The anchors that count, newest first. The anchor of a commit frame that no one ever wrote does
/// not count: the next one takes its place.
pub(in crate::engine) fn standing(
    anchors: &mut Anchors,
    wal: &WalFile,
    header: &IndexHeader,
    size: PageSize,
) -> Vec<Anchor> {
    anchors.retain(|anchor| !anchor.ahead || fits(anchor, wal, header, size));
    anchors.newest_first()
}

/// The highest transaction and epoch numbers that anything beside the database speaks of.
pub(in crate::engine) fn highest(known: &[Anchor], log: &Log, history: &EpochHistory) -> (u64, u64) {
    let positions = known.iter().map(|a| a.position).chain(log.tip());
    let number = positions.clone().map(|p| p.number()).max().unwrap_or(0);
    let first = history.last().map_or(0, |s| s.first.saturating_sub(1));
    let epoch = positions.map(|p| p.epoch().number()).max().unwrap_or(0);
    (number.max(first), epoch.max(history.epoch().number()))
}

/// The WAL's end, with nothing known of the state there.
pub(in crate::engine) fn end(header: &IndexHeader, pages: u32) -> Tip {
    Tip {
        salts: header.salts,
        frame: header.max_frame,
        sum: header.frame_sum,
        position: unnamed(Checksum::EMPTY),
        pages,
    }
}

/// A state that has no name in any history.
fn unnamed(checksum: Checksum) -> Position {
    Position::new(Txid::new(Epoch::new(0, 0), 0), checksum)
}

impl Findings {
    /// Finds the position of the bytes, as SQLite reads them.
    pub(in crate::engine) fn locate(mut self, header: &IndexHeader, pages: u32) -> Result<Findings> {
        let size = self.base.page_size;
        let mut hashed = None;
        // An anchor without an epoch names no state. A state counted from it would get the name of
        // another state.
        let counts = |anchor: &Anchor| {
            anchor.position.epoch().number() > 0 && fits(anchor, &self.base.wal, header, size)
        };
        if let Some(at) = self.known.iter().position(counts) {
            let anchor = self.known[at];
            (self, hashed) = self.replay(header, anchor, at == 0)?;
        }
        if !self.exact {
            self.look_up(header, pages, hashed)?;
        }
        // A state without a name may have an anchor, too.
        self.exact &= self.base.tip().position.epoch().number() > 0;
        Ok(self)
    }

    /// Counts the commits after the anchor, and appends to the log those that it does not have.
    /// Returns the sum of all pages, too, if it had to hash them.
    fn replay(
        mut self,
        header: &IndexHeader,
        anchor: Anchor,
        newest: bool,
    ) -> Result<(Findings, Option<Checksum>)> {
        let base = self.base.clone();
        // Another process wrote to the file since: old images that the count reads from it may be
        // newer than they should be. Then only a full hash decides.
        let doubt = match anchor.file {
            FileState::AtRest { modified: then, .. } => {
                // After a power cut the file may still have the time of an earlier anchor, with
                // what a copy brought since.
                let copied = matches!(self.known[0].file, FileState::Backfilling(_));
                copied || base.watch.modified()? != then
            }
            FileState::Backfilling(witnesses) => {
                !newest
                    || !is_marked(&mut self.handle, witnesses.mark)?
                    || copied_beyond(&base, &mut self.handle, &anchor, header.max_frame)?
            }
        };
        let append = self.primary && self.own && self.has(anchor.position);
        let tip;
        (self, tip) = self.count(header, anchor, append && !doubt)?;
        let hashed = match doubt || self.log_says == LogSays::Otherwise {
            true => Some(base.hash_all(&mut self.handle, tip.frame, tip.pages)?),
            false => None,
        };
        self.exact = hashed.is_none_or(|sum| sum == tip.position.checksum());
        self.chained = self.exact;
        if self.exact && doubt && append && self.log_says != LogSays::Otherwise {
            // Only now that the numbers are known to be right.
            (self, _) = self.count(header, anchor, true)?;
        }
        self.base.set_tip(tip);
        (self.anchor, self.counted) = (Some(anchor), tip.position.number());
        Ok((self, hashed))
    }

    /// Whether a state is in this node's history.
    pub(in crate::engine) fn has(&self, state: Position) -> bool {
        self.history.place(state.txid()) == Place::OnHistory
    }

    /// The state at the WAL's end, counted from an anchor; and what the log says of it.
    fn count(self, header: &IndexHeader, anchor: Anchor, append: bool) -> Result<(Findings, Tip)> {
        let position = anchor.position;
        let begin =
            Tip { frame: anchor.frame, sum: anchor.sum, position, pages: anchor.pages, ..end(header, 0) };
        self.base.leap(begin);
        // What follows a state that is off the history is not of it either, whatever epochs have
        // its numbers there.
        let history = match self.has(position) {
            true => self.history.clone(),
            false => EpochHistory::ending(position),
        };
        let mut capture = Capture::new(self.base.clone(), self.handle, begin, Arc::new(history));
        capture.batch_bytes = 0;
        capture.repeats = self.primary && self.own;
        let log = self.base.log.clone();
        let confirmed = log.tip() == Some(position);
        let (node, tip) = (self.base.node.clone(), log.tip());
        let mut sink = Rebuild { node, tip, log, append, number: 0, confirmed, mismatch: false };
        capture.advance(header, &mut sink)?;
        let tip = capture.tip;
        if let Some(logged) = sink.tip {
            // The anchor's state, or the end's: where the log has these numbers, it has these
            // states.
            for counted in [position, tip.position] {
                if counted.number() == logged.number() {
                    sink.mismatch |= logged != counted;
                } else if counted.number() < logged.number()
                    && let Lookup::At { before, .. } = self.base.log.find(counted.number())?
                {
                    sink.mismatch |= before != counted;
                    sink.confirmed |= before == tip.position;
                }
            }
        }
        let log_says = match (sink.mismatch, sink.confirmed) {
            (true, _) => LogSays::Otherwise,
            (false, true) => LogSays::So,
            (false, false) => LogSays::Nothing,
        };
        Ok((Findings { handle: capture.handle, log_says, ..self }, tip))
    }

    /// Looks without a usable anchor: the file at rest, or the hash of everything, may be a state
    /// that is known by name.
    fn look_up(&mut self, header: &IndexHeader, pages: u32, hashed: Option<Checksum>) -> Result<()> {
        let mut tip = end(header, pages);
        if header.max_frame == 0
            && let Some(position) = self.at_rest()?
        {
            tip.position = position;
            self.exact = true;
        } else {
            // A hash as of the last commit is that of the state at the WAL's end.
            let sum = match hashed {
                Some(sum) => sum,
                None => self.base.hash_all(&mut self.handle, tip.frame, tip.pages)?,
            };
            let found = self.named(sum);
            self.exact = found.is_some();
            tip.position = found.unwrap_or(unnamed(sum));
        }
        self.base.leap(tip);
        Ok(())
    }

    /// The state that the file alone is, if it is as the newest anchor left it. Only the newest
    /// counts. After a power cut the disk may still have the time of an earlier one, together with
    /// what a copy brought since.
    pub(in crate::engine) fn at_rest(&self) -> Result<Option<Position>> {
        let now = self.base.watch.modified()?;
        Ok(self.known.first().and_then(|anchor| match anchor.file {
            FileState::AtRest { position, modified } if modified == now => Some(position),
            _ => None,
        }))
    }

    /// The newest state with this checksum that an anchor or a record of the log names.
    pub(in crate::engine) fn named(&self, sum: Checksum) -> Option<Position> {
        let named = self.known.iter().flat_map(|anchor| match anchor.file {
            FileState::AtRest { position, .. } => [Some(anchor.position), Some(position)],
            FileState::Backfilling(_) => [Some(anchor.position), None],
        });
        let named = self.base.log.tip().into_iter().chain(named.flatten());
        let found = named.filter(|p| p.checksum() == sum).max_by_key(|p| p.number());
        // The file is older than what the log has: it is from a backup, or its WAL is gone.
        found.or_else(|| {
            self.base.log.state_with(sum).unwrap_or_else(|error| {
                self.base.node.report(Condition::StateNotSearched { error: &error });
                None
            })
        })
    }
}

/// Whether another process may have copied frames after the anchor into the file. This node died
/// while it copied those up to the anchor; their pages are read from the WAL. Of each page that
/// only later frames have, the file must hold what was there before them. So it must hold none of
/// their images.
fn copied_beyond(base: &OpenDatabase, handle: &mut Handle, anchor: &Anchor, last: u32) -> Result<bool> {
    let size = base.page_size.bytes();
    let (mut frame, mut file) = (vec![0; FRAME_HEADER_BYTES + size], vec![0; size]);
    let mut pages = anchor.pages;
    for at in anchor.frame + 1..=last {
        base.wal.read(&mut frame, frame_offset(at, base.page_size))?;
        let (head, image) = frame.split_at(FRAME_HEADER_BYTES);
        let commit = FrameHeader::parse(head).commit;
        if commit != 0 {
            // The count reads pages that the commit drops as of the commit before. They have no
            // frame that would tell.
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

/// Appends to the log what it lacks of the commits that this start reads again.
struct Rebuild {
    node: Arc<NodeContext>,
    log: Arc<Log>,
    append: bool,
    tip: Option<Position>,
    number: u64,
    confirmed: bool,
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

    fn on_disk(&self) -> u64 {
        u64::MAX
    }

    fn records(&mut self, units: Bytes, after: Option<Position>) -> Result<()> {
        if self.tip.is_some_and(|t| t.number() == self.number) {
            self.confirmed |= after.is_some() && after == self.tip;
            self.mismatch |= after.is_some_and(|a| Some(a) != self.tip);
        } else if self.wanted() {
            let mut appended = self.log.append(units.clone(), after);
            while appended.as_ref().is_err_and(no_room) && self.log.drop_oldest() {
                appended = self.log.append(units.clone(), after);
            }
            match appended {
                // The log begins anew after these commits.
                Err(error) if no_room(&error) => {
                    self.node.report(Condition::LogLosesPast { error: &error });
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
