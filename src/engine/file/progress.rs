//! How far capture has come, and how the threads that wait for it learn that.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::engine::file::tip::Tip;
use crate::error::{Error, Result};
use crate::wal::Salts;

/// No thread waits any longer for capture when it has given no sign of life for this long.
const STILL_MAX: Duration = Duration::from_secs(30);

/// Signs of life of the thread that captures.
#[derive(Debug, Default)]
pub(in crate::engine) struct CaptureProgress {
    steps: AtomicU64,
    /// Capture waits for the disk, however long that takes.
    on_disk: AtomicU32,
}

impl CaptureProgress {
    pub(in crate::engine) fn step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(in crate::engine) fn is_on_disk(&self) -> bool {
        self.on_disk.load(Ordering::Relaxed) > 0
    }

    /// Until this is dropped, the work is the disk's.
    pub(in crate::engine) fn on_disk(&self) -> OnDisk<'_> {
        self.on_disk.fetch_add(1, Ordering::Relaxed);
        OnDisk(self)
    }
}

/// See [`CaptureProgress::on_disk`].
#[derive(Debug)]
pub(in crate::engine) struct OnDisk<'a>(&'a CaptureProgress);

impl Drop for OnDisk<'_> {
    fn drop(&mut self) {
        self.0.on_disk.fetch_sub(1, Ordering::Relaxed);
        self.0.step();
    }
}

/// The patience of a thread that waits for capture.
#[derive(Debug)]
pub(in crate::engine) struct Patience {
    seen: u64,
    since: Instant,
}

impl Patience {
    pub(in crate::engine) fn new(progress: &CaptureProgress, now: Instant) -> Patience {
        Patience { seen: progress.steps.load(Ordering::Relaxed), since: now }
    }

    /// For how long to wait before the next look.
    ///
    /// # Errors
    /// [`Error::Timeout`] when capture did nothing for too long.
    pub(in crate::engine) fn left(&mut self, progress: &CaptureProgress, now: Instant) -> Result<Duration> {
        let steps = progress.steps.load(Ordering::Relaxed);
        if steps != self.seen || progress.on_disk.load(Ordering::Relaxed) > 0 {
            *self = Patience { seen: steps, since: now };
        }
        let left = STILL_MAX.saturating_sub(now.saturating_duration_since(self.since));
        if left.is_zero() {
            let what = "capture of what was committed, which does nothing any more".into();
            return Err(Error::Timeout { what, after: STILL_MAX });
        }
        // Short waits let the thread see a failure or a stop, too.
        Ok(left.min(Duration::from_millis(50)))
    }
}

/// What the writer wants to know of capture. Capture alone counts all commits, and does not
/// remember the number of each.
#[derive(Debug, Default)]
pub(in crate::engine) struct Asked {
    /// Where the WAL ended before the writer's commit.
    pub(in crate::engine) at: Option<(Salts, u32)>,
    /// The number of the commit that ended there.
    pub(in crate::engine) before: Option<u64>,
    /// The first commit after that.
    pub(in crate::engine) after: Option<Next>,
    /// The last frame that capture took since.
    pub(in crate::engine) taken: u32,
}

/// The frame that a commit ended with, the last of those that only repeat it, and its number.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct Next {
    pub(in crate::engine) end: u32,
    pub(in crate::engine) repeated: u32,
    pub(in crate::engine) number: u64,
}

impl Asked {
    /// Capture has taken a commit, which led from one tip to the next. Returns whether the writer
    /// wants to know.
    pub(in crate::engine) fn hear(&mut self, before: &Tip, now: &Tip) -> bool {
        let Some((_, frame)) = self.at.filter(|(salts, _)| *salts == now.salts) else { return false };
        let number = now.position.number();
        self.taken = now.frame;
        if now.frame == frame {
            self.before = Some(number);
        } else if before.frame == frame {
            self.before = Some(before.position.number());
            self.after = Some(Next { end: now.frame, repeated: now.frame, number });
        } else if let Some(after) = self.after.as_mut()
            && (after.repeated, after.number) == (before.frame, number)
        {
            after.repeated = now.frame;
        } else {
            return false;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capture_is_waited_for_as_long_as_it_gives_signs_of_life() {
        let (progress, begin) = (CaptureProgress::default(), Instant::now());
        let mut patience = Patience::new(&progress, begin);
        let mut now = begin;
        for _ in 0..20 {
            now += STILL_MAX - Duration::from_secs(1);
            progress.step();
            assert!(!patience.left(&progress, now).unwrap().is_zero());
        }
        let on_disk = progress.on_disk();
        for _ in 0..20 {
            now += STILL_MAX * 2;
            assert!(!patience.left(&progress, now).unwrap().is_zero(), "the disk takes as long as it takes");
        }
        drop(on_disk);
        assert!(patience.left(&progress, now + STILL_MAX).is_ok(), "the disk is done");
        let ended = patience.left(&progress, now + STILL_MAX * 2);
        assert!(matches!(ended, Err(Error::Timeout { after: STILL_MAX, .. })), "{ended:?}");
    }
}
