//! What both roles write: records to the log, frames to the WAL, epochs.

pub(in crate::engine) mod append_or_gap;
pub(in crate::engine) mod epoch;
pub(in crate::engine) mod images;
pub(in crate::engine) mod intake_error;
pub(in crate::engine) mod record_intake;
pub(in crate::engine) mod wal_appender;
pub(in crate::engine) mod wal_records;
