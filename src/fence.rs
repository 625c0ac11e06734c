//! Until when this node may acknowledge commits, and the clock that says it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The primary has no lease that could end.
const UNLIMITED: u64 = u64::MAX;

/// Until when commits may be acknowledged, on [`boot_time`]. It is looked at
/// after the commit is as durable as it is to be.
#[derive(Debug)]
pub(crate) struct Fence(AtomicU64);

impl Fence {
    /// For a primary without a lease.
    pub(crate) fn unlimited() -> Fence {
        Fence(AtomicU64::new(UNLIMITED))
    }

    /// Acknowledges from now on until this instant.
    pub(crate) fn set(&self, until: Duration) {
        self.0.store((until.as_micros() as u64).min(UNLIMITED - 1), Ordering::Release);
    }

    /// Acknowledges nothing.
    pub(crate) fn close(&self) {
        self.0.store(0, Ordering::Release);
    }

    /// Whether a commit may be acknowledged now.
    pub(crate) fn is_open(&self) -> bool {
        if cfg!(replite_no_fence) {
            return true;
        }
        match self.0.load(Ordering::Acquire) {
            UNLIMITED => true,
            0 => false,
            until => boot_time() < Duration::from_micros(until),
        }
    }

    /// When it ends; none where there is no limit.
    pub(crate) fn until(&self) -> Option<Duration> {
        let until = self.0.load(Ordering::Acquire);
        (until != UNLIMITED).then(|| Duration::from_micros(until))
    }
}

/// The time since the machine was booted, with the time in which it slept (`CLOCK_BOOTTIME`). No
/// one can set this clock.
#[cfg(target_os = "linux")]
pub(crate) fn boot_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.max(0) as u64, now.tv_nsec.clamp(0, 999_999_999) as u32)
}

/// A time that only goes forward, since this process first asked.
#[cfg(not(target_os = "linux"))]
pub(crate) fn boot_time() -> Duration {
    static BEGUN: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    BEGUN.get_or_init(std::time::Instant::now).elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_ends_by_itself_and_stays_closed() {
        let fence = Fence::unlimited();
        assert!(fence.is_open() && fence.until().is_none());
        fence.set(boot_time() + Duration::from_secs(60));
        assert!(fence.is_open());
        fence.set(boot_time());
        assert!(!fence.is_open());
        fence.close();
        assert!(!fence.is_open());
    }
}
