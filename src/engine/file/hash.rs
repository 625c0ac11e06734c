//! Hashing a whole database as of a frame.

use std::time::{Duration, Instant};

use crate::checksum::Checksum;
use crate::engine::file::database::OpenDatabase;
use crate::error::Result;
use crate::page::PageNo;
use crate::report::Condition;
use crate::sqlite::Handle;

/// Bytes that one read takes from the database file.
const RUN_BYTES: usize = 256 << 10;
/// How often a long hash at open logs how far it has come.
const SAY_EVERY: Duration = Duration::from_secs(1);

/// All pages of a database as of a frame, in runs. Nothing up to that frame may go: the caller
/// holds the locks for it.
pub(in crate::engine) struct Whole<'a> {
    base: &'a OpenDatabase,
    frame: u32,
    pages: u32,
    /// A bit for each page that the WAL has: the others need no look-up.
    in_wal: Vec<u64>,
    run_pages: u32,
}

impl<'a> Whole<'a> {
    pub(in crate::engine) fn new(base: &'a OpenDatabase, frame: u32, pages: u32) -> Whole<'a> {
        let mut in_wal = vec![0; pages as usize / 64 + 1];
        for frame in 1..=frame {
            let page = base.index.page_of(frame);
            if let Some(bits) = in_wal.get_mut(page as usize / 64) {
                *bits |= 1 << (page % 64);
            }
        }
        let run_pages = (RUN_BYTES / base.page_size.bytes()).max(1) as u32;
        Whole { base, frame, pages, in_wal, run_pages }
    }

    pub(in crate::engine) fn runs(&self) -> u32 {
        self.pages.div_ceil(self.run_pages)
    }

    /// Pages of the runs before this one.
    pub(in crate::engine) fn pages_before(&self, run: u32) -> u32 {
        run.saturating_mul(self.run_pages).min(self.pages)
    }

    /// Adds the pages of a run. Makes the buffer as large as it has to be.
    pub(in crate::engine) fn add_run(
        &self,
        handle: &mut Handle,
        run: u32,
        buffer: &mut Vec<u8>,
        mut sum: Checksum,
    ) -> Result<Checksum> {
        let size = self.base.page_size.bytes();
        let before = self.pages_before(run);
        let count = (self.pages_before(run + 1) - before) as usize;
        buffer.resize(count * size, 0);
        let Some(first) = PageNo::new(before + 1) else { return Ok(sum) };
        handle.read(buffer, first.offset(self.base.page_size))?;
        for (number, page) in (first.get()..).zip(buffer.chunks_exact_mut(size)) {
            if self.in_wal[number as usize / 64] & 1 << (number % 64) != 0
                && let Some(found) = self.base.index.lookup(number, 1, self.frame)
            {
                self.base.read_frame(found, page)?;
            }
            if let Some(number) = PageNo::new(number).filter(|n| !n.is_lock_page(self.base.page_size)) {
                sum = sum.with(self.base.page_key.hash(number, page));
            }
        }
        Ok(sum)
    }
}

impl OpenDatabase {
    /// Hashes the whole database as of a frame while the node opens it, and says how far it has
    /// come.
    pub(in crate::engine) fn hash_all(
        &self,
        handle: &mut Handle,
        frame: u32,
        pages: u32,
    ) -> Result<Checksum> {
        let database = self.options.paths.database();
        tracing::info!(database = %database.display(), pages, "hashing the database to find its position");
        let started = Instant::now();
        let mut progress = HashReport { pages, percent: None, said: started };
        let whole = Whole::new(self, frame, pages);
        let (mut sum, mut buffer) = (Checksum::EMPTY, Vec::new());
        for run in 0..whole.runs() {
            if let Some((percent, aloud)) = progress.note(whole.pages_before(run), Instant::now()) {
                let text = format!("hashing the database: {percent} %");
                self.node.report(Condition::Hashing { database, text: &text, aloud });
            }
            let added = whole.add_run(handle, run, &mut buffer, sum);
            sum = added.inspect_err(|_| self.node.report(Condition::HashingFailed))?;
        }
        self.node.report(Condition::Hashed { database, elapsed: started.elapsed() });
        Ok(sum)
    }
}

/// When to say how far a hash has come.
#[derive(Debug)]
struct HashReport {
    pages: u32,
    percent: Option<u32>,
    said: Instant,
}

impl HashReport {
    /// The percentage, if it is another one than before, and whether it is time to say it in the
    /// log.
    fn note(&mut self, done: u32, now: Instant) -> Option<(u32, bool)> {
        let percent = (u64::from(done) * 100 / u64::from(self.pages.max(1))) as u32;
        if self.percent == Some(percent) {
            return None;
        }
        self.percent = Some(percent);
        let aloud = now.saturating_duration_since(self.said) >= SAY_EVERY;
        if aloud {
            self.said = now;
        }
        Some((percent, aloud))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_percent_is_shown_and_one_a_second_is_said_aloud() {
        let begin = Instant::now();
        let mut progress = HashReport { pages: 1000, percent: None, said: begin };
        assert_eq!(progress.note(0, begin), Some((0, false)));
        assert_eq!(progress.note(9, begin + SAY_EVERY), None);
        assert_eq!(progress.note(10, begin + SAY_EVERY), Some((1, true)));
        assert_eq!(progress.note(400, begin + SAY_EVERY), Some((40, false)));
        assert_eq!(progress.note(410, begin + SAY_EVERY * 2), Some((41, true)));
        let mut empty = HashReport { pages: 0, percent: None, said: begin };
        assert_eq!(empty.note(0, begin), Some((0, false)));
    }
}
