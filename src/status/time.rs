//! Points in time and lengths of it, as JSON and files have them: whole numbers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serializer};

/// Milliseconds since 1970, for display only.
pub(crate) fn unix_millis() -> u64 {
    millis_of(SystemTime::now())
}

/// The time that is so many milliseconds after 1970 began. One that the system can't name is 1970.
pub(crate) fn from_unix_millis(millis: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_millis(millis)).unwrap_or(UNIX_EPOCH)
}

fn millis_of(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, whole_millis)
}

/// A length of time in milliseconds.
pub(crate) fn whole_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A length of time as milliseconds.
pub(super) fn millis<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(whole_millis(*duration))
}

/// The same where it may be unknown.
pub(super) fn some_millis<S: Serializer>(duration: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => millis(duration, to),
        None => to.serialize_none(),
    }
}

/// Times as microseconds since 1970.
pub(super) fn unix_micros<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    to.serialize_u64(since.as_micros() as u64)
}

/// Times as milliseconds since 1970.
pub(crate) mod as_unix_millis {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(millis_of(*time))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        u64::deserialize(from).map(from_unix_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_their_numbers_and_no_number_is_too_large() {
        for millis in [0, 1, 1_700_000_000_123] {
            assert_eq!(millis_of(from_unix_millis(millis)), millis);
        }
        assert!([0, u64::MAX].contains(&millis_of(from_unix_millis(u64::MAX))));
        assert_eq!(millis_of(UNIX_EPOCH - Duration::from_secs(1)), 0);
        assert_eq!(whole_millis(Duration::MAX), u64::MAX);
    }
}
