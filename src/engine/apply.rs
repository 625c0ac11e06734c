//! A replica's database, there or yet to come, and the thread that owns it.

pub(in crate::engine) mod handle;
pub(in crate::engine) mod inbox;
pub(in crate::engine) mod stream_error;
pub(in crate::engine) mod thread;
