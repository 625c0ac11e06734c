//! What is known of the WAL's length: which thread waits for a new generation, and which readers
//! are in the way of one.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::lock::lock;

/// What is known of the WAL's length, besides the tip.
#[derive(Debug, Default)]
pub(in crate::engine) struct Bound {
    /// New generations that this node began.
    restarts: AtomicU64,
    /// Until when a thread waits for one.
    asked: Mutex<Option<Instant>>,
    /// The brake holds a writer back until the copy is complete.
    squeezed: AtomicBool,
    /// Frames of this generation's largest transaction.
    pub(in crate::engine) largest: AtomicU32,
    pub(in crate::engine) readers: Mutex<Readers>,
}

/// Readers that are in the way, by their marks. READ0 is the first.
#[derive(Debug, Default)]
pub(in crate::engine) struct Readers {
    /// Since when a mark has been in use whose frame is not the newest. No reader takes such a mark
    /// any more as long as another is free. So it is in use for as long as one reader stays.
    older: [Option<(u32, Instant)>; 5],
    /// The longest that a recent one stayed.
    pub(in crate::engine) longest: Duration,
    /// All is copied but what readers keep out of the file.
    pub(in crate::engine) pinned: bool,
}

impl Readers {
    /// How long the oldest reader that is there has stayed.
    pub(in crate::engine) fn oldest(&self) -> Duration {
        self.older.iter().flatten().map(|(_, since)| since.elapsed()).max().unwrap_or_default()
    }
}

impl Bound {
    pub(in crate::engine) fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Acquire)
    }

    /// A generation began.
    pub(in crate::engine) fn restarted(&self) {
        self.restarts.fetch_add(1, Ordering::AcqRel);
        *lock(&self.asked) = None;
        self.squeeze(false);
        self.largest.store(0, Ordering::Relaxed);
        let mut readers = lock(&self.readers);
        let longest = readers.longest / 2;
        *readers = Readers { longest, ..Readers::default() };
    }

    /// Has the WAL begun anew whatever its length, if that can be by then.
    pub(in crate::engine) fn ask(&self, until: Instant) {
        let mut asked = lock(&self.asked);
        *asked = Some(asked.map_or(until, |before| before.max(until)));
    }

    /// How long a thread still waits for a new beginning.
    pub(in crate::engine) fn asked(&self) -> Option<Duration> {
        let left = lock(&self.asked).map(|until| until.saturating_duration_since(Instant::now()));
        left.filter(|left| !left.is_zero())
    }

    pub(in crate::engine) fn squeeze(&self, yes: bool) {
        self.squeezed.store(yes, Ordering::Release);
    }

    pub(in crate::engine) fn squeezed(&self) -> bool {
        self.squeezed.load(Ordering::Acquire)
    }

    /// Capture or apply took in a transaction of this many frames.
    pub(in crate::engine) fn transaction(&self, frames: u32) {
        if frames > self.largest.load(Ordering::Relaxed) {
            self.largest.store(frames, Ordering::Relaxed);
        }
    }

    /// A mark is in use at a frame that is not the newest, or it is not.
    pub(in crate::engine) fn mark(&self, mark: usize, older: Option<u32>) {
        let mut readers = lock(&self.readers);
        match (readers.older[mark], older) {
            (Some((before, _)), Some(now)) if before == now => {}
            (before, now) => {
                if let Some((_, since)) = before {
                    readers.longest = readers.longest.max(since.elapsed());
                }
                readers.older[mark] = now.map(|frame| (frame, Instant::now()));
            }
        }
    }

    /// Whether readers keep all that is left out of the file.
    pub(in crate::engine) fn pin(&self, pinned: bool) {
        lock(&self.readers).pinned = pinned;
    }

    pub(in crate::engine) fn pinned(&self) -> bool {
        lock(&self.readers).pinned
    }
}
