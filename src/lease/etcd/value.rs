//! The value of the key: a line of the store's own, and the record.
//!
//! ```text
//! replite-lease 1 <32 hex digits> <32 hex digits> \n
//! <the record>
//! ```
//!
//! The first digits are random: no two values are equal, whatever etcd they are in. The others are
//! a hash of the revision and the value that it took the place of, or zeros where there was none.

use super::messages::KeyValue;
use crate::error::Result;
use crate::hex::{hex, unhex};
use crate::random;

const MAGIC: &str = "replite-lease 1";
/// Bytes of the first line: two spaces, and its end.
const LINE_BYTES: usize = MAGIC.len() + 2 * 32 + 3;

/// A value that this store wrote.
pub(super) struct Value<'a> {
    after: Predecessor,
    pub(super) record: &'a [u8],
}

/// Which value one has taken the place of.
type Predecessor = [u8; 16];

impl Value<'_> {
    /// A new value, in the place of this one.
    ///
    /// # Errors
    /// [`Error::NoRandom`](crate::Error::NoRandom).
    pub(super) fn encode(over: Option<&KeyValue>, record: &[u8]) -> Result<Vec<u8>> {
        let (id, after) = (hex(&random::array::<16>()?), hex(&place(over)));
        let mut value = format!("{MAGIC} {id} {after}\n").into_bytes();
        value.extend_from_slice(record);
        Ok(value)
    }

    pub(super) fn decode(value: &[u8]) -> Option<Value<'_>> {
        let (line, record) = value.split_at_checked(LINE_BYTES)?;
        let line = std::str::from_utf8(line).ok()?.strip_prefix(MAGIC)?.strip_prefix(' ')?;
        let (id, after) = line.strip_suffix('\n')?.split_once(' ')?;
        unhex::<16>(id)?;
        Some(Value { after: unhex(after)?, record })
    }

    /// Whether it has taken the place of this one. No other one ever did then.
    pub(super) fn replaced(&self, over: Option<&KeyValue>) -> bool {
        self.after == place(over)
    }
}

fn place(of: Option<&KeyValue>) -> Predecessor {
    let mut place = Predecessor::default();
    if let Some(KeyValue { mod_revision, value }) = of {
        let mut hash = blake3::Hasher::new();
        hash.update(&mod_revision.to_le_bytes()).update(value);
        hash.finalize_xof().fill(&mut place);
    }
    place
}
