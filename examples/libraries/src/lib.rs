//! The code of the pages about other libraries, which is run as documentation tests, and sessions
//! as the page has them.

#[doc = include_str!("../../../docs/migrations.md")]
pub mod migrations {}

#[doc = include_str!("../../../docs/libraries.md")]
pub mod libraries {}

pub mod sessions;
