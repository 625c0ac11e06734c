//! Which images of pages a record has: the last of its transaction, and whether whole.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::log::LogOptions;
use crate::page::{PageNo, PageSet};
use crate::wal::FrameHeader;

/// The pages that the records of this round have whole. A round ends when the log has kept one
/// half of what it keeps since it began, by bytes or by time. So a page that was changed within
/// the newest half of the log can be made from the log alone, but where a full disk took older
/// segments.
#[derive(Debug)]
pub(in crate::engine) struct WholePages {
    whole: PageSet,
    /// Bytes of records since the round began.
    bytes: u64,
    began: Instant,
    /// How often the log had begun anew by then.
    renewals: u64,
    round_bytes: u64,
    round_time: Duration,
}

impl WholePages {
    pub(in crate::engine) fn new(options: &LogOptions, renewals: u64) -> WholePages {
        // Whole segments are dropped.
        let kept = options.keep_bytes.saturating_sub(options.segment_bytes);
        let (round_bytes, round_time) = (kept / 2, options.keep_age / 2);
        let (whole, began) = (PageSet::default(), Instant::now());
        WholePages { whole, bytes: 0, began, renewals, round_bytes, round_time }
    }

    /// Whether a record has the page whole already, this round. If not, the one that asks is to.
    pub(in crate::engine) fn has(&mut self, page: PageNo) -> bool {
        let has = self.whole.contains(page);
        self.whole.insert(page);
        has
    }

    /// The record that was to have the page whole is no record.
    pub(in crate::engine) fn take_back(&mut self, page: PageNo) {
        self.whole.remove(page);
    }

    /// Records of so many bytes go to the log.
    pub(in crate::engine) fn wrote(&mut self, bytes: usize, renewals: u64, now: Instant) {
        self.bytes += bytes as u64;
        let old = now.saturating_duration_since(self.began) > self.round_time;
        if self.bytes > self.round_bytes || old || renewals != self.renewals {
            self.whole = PageSet::default();
            (self.bytes, self.began, self.renewals) = (0, now, renewals);
        }
    }
}

/// The places, in order, of the last image of each page in a run of frames.
pub(in crate::engine) fn newest_images(frames: &[u8], frame: usize) -> Vec<usize> {
    let count = frames.len() / frame;
    if count == 1 {
        return vec![0];
    }
    let mut newest = HashMap::with_capacity(count);
    for at in 0..count {
        newest.insert(FrameHeader::parse(&frames[at * frame..]).page, at);
    }
    let mut places: Vec<usize> = newest.into_values().collect();
    places.sort_unstable();
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::KEY;

    #[test]
    fn each_page_is_whole_once_a_round_and_rounds_end_by_bytes_time_and_a_new_log() {
        let hour = Duration::from_secs(3600);
        let options = LogOptions {
            page_key: KEY,
            segment_bytes: 1000,
            keep_bytes: 11_000,
            keep_age: hour,
            quota_bytes: 20_000,
            tail_bytes: 0,
        };
        let mut images = WholePages::new(&options, 3);
        let (page, begin) = (PageNo::FIRST, images.began);
        assert!(!images.has(page));
        images.wrote(5000, 3, begin + hour / 2);
        assert!(images.has(page));
        images.wrote(1, 3, begin);
        assert!(!images.has(page), "one half of what is kept was written");
        images.wrote(1, 3, begin + hour / 2);
        assert!(images.has(page));
        images.wrote(1, 3, begin + hour / 2 + Duration::from_millis(1));
        assert!(!images.has(page), "half of the time has passed");
        images.wrote(1, 4, begin + hour);
        assert!(!images.has(page), "the log has begun anew");
        assert!(images.has(page));
        images.take_back(page);
        assert!(!images.has(page));
    }
}
