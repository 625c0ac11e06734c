//! Random bytes of the operating system.

use crate::error::{Error, Result};

/// Fills a buffer.
///
/// # Errors
/// [`Error::NoRandom`] when the operating system has no random numbers.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|e| Error::NoRandom(e.to_string()))
}

/// Some random bytes.
///
/// # Errors
/// As for [`fill`].
pub(crate) fn array<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}
