//! The one clock of a run: checker and nodes read the same, which no jump of the wall clock moves.

use rustix::time::{ClockId, clock_gettime};

/// Microseconds since the machine was booted.
pub type Micros = u64;

/// The instant.
#[must_use]
pub fn now() -> Micros {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// Seconds between two instants.
#[must_use]
pub fn seconds(from: Micros, to: Micros) -> f64 {
    (to as f64 - from as f64) / 1e6
}
