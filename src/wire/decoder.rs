//! Cutting a stream of bytes into units.
use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

use crate::checksum::PageKey;
use crate::wire::{HEADER_BYTES, Kind, MAY_SKIP, PAYLOAD_MAX_BYTES, Unit, VERSION, WireError, fields};

/// A unit's header, its numbers within bounds. Whether its hash holds is not known yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    /// `None`: an unknown kind that may be skipped.
    pub(crate) kind: Option<Kind>,
    /// Bytes of header and payload.
    pub(crate) unit_bytes: usize,
    pub(crate) hash: [u8; 16],
}

impl Header {
    /// # Errors
    /// A version, a length or a kind that this node does not read.
    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let [l0, l1, l2, l3, kind, flags, v0, v1, ..] = *bytes;
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(WireError::Version(version));
        }
        let payload = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if payload > PAYLOAD_MAX_BYTES {
            return Err(WireError::TooLarge(payload));
        }
        let known = Kind::from_u8(kind);
        match (known, flags) {
            // A page's hash does not cover its flags, so they must have their one value.
            (Some(_), 0) | (None, MAY_SKIP) => {}
            (Some(_), _) => return Err(WireError::Fields("flags on a known kind of unit")),
            (None, _) => return Err(WireError::UnknownKind(kind)),
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(&bytes[8..]);
        Ok(Header { kind: known, unit_bytes: HEADER_BYTES + payload, hash })
    }
}

/// Cuts a stream of bytes into units. Never allocates for what a header claims, only for what has
/// arrived.
///
/// A unit that lies in one chunk is a slice of it; one that spans chunks is copied together. Call
/// [`Decoder::next`] until it gives `None` after each push: what is held is then one unfinished
/// unit. After an error every further call gives the same error: there is no way to find the next
/// unit.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    /// The beginning of a unit whose end is in chunks to come.
    pub(super) partial: BytesMut,
    /// Never empty chunks.
    chunks: VecDeque<Bytes>,
    failed: Option<WireError>,
    page_key: Option<PageKey>,
    /// The longest payload of the next unit, where that is less than any may have.
    next_most: Option<usize>,
}

impl Decoder {
    /// A decoder of units whose pages are hashed with this key; none: pages are errors.
    pub(crate) fn new(page_key: Option<PageKey>) -> Decoder {
        Decoder { page_key, ..Decoder::default() }
    }

    /// From the next unit on, pages are hashed with this key.
    pub(crate) fn set_page_key(&mut self, key: PageKey) {
        self.page_key = Some(key);
    }

    /// The next unit may have no longer payload than this, and has to be of a known kind.
    pub(crate) fn expect_at_most(&mut self, bytes: usize) {
        self.next_most = Some(bytes);
    }

    /// Takes in what arrived.
    pub(crate) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.chunks.push_back(bytes);
        }
    }

    /// Bytes that arrived and have not been given out: 0 at a clean end of a stream.
    pub(crate) fn buffered(&self) -> usize {
        self.partial.len() + self.chunks.iter().map(Bytes::len).sum::<usize>()
    }

    /// What has arrived after the last unit, where that is no units. The decoder has nothing then.
    pub(crate) fn take_rest(&mut self) -> impl Iterator<Item = Bytes> {
        let partial = std::mem::take(&mut self.partial).freeze();
        std::iter::once(partial).chain(std::mem::take(&mut self.chunks))
    }

    /// The next whole unit, if it has arrived. Unknown kinds with the may-skip flag are passed
    /// over.
    ///
    /// # Errors
    /// What [`Header::parse`] refuses, and a skipped unit whose hash does not hold.
    pub(crate) fn next(&mut self) -> Result<Option<Unit>, WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.cut().inspect_err(|error| self.failed = Some(error.clone()))
    }

    fn cut(&mut self) -> Result<Option<Unit>, WireError> {
        loop {
            let Some((header, raw)) = self.next_raw()? else {
                return Ok(None);
            };
            if let Some(kind) = header.kind {
                return Ok(Some(Unit { kind, hash: header.hash, raw, page_key: self.page_key }));
            }
            // Verified although no one reads it: a damaged kind byte must not make a unit vanish.
            fields::verify(None, header.hash, &raw, None)?;
        }
    }

    fn next_raw(&mut self) -> Result<Option<(Header, Bytes)>, WireError> {
        if self.partial.is_empty()
            && let Some(chunk) = self.chunks.front_mut()
            && let Some(head) = chunk.first_chunk::<HEADER_BYTES>()
        {
            let header = expected(Header::parse(head)?, self.next_most)?;
            if chunk.len() >= header.unit_bytes {
                let raw = chunk.split_to(header.unit_bytes);
                if chunk.is_empty() {
                    self.chunks.pop_front();
                }
                self.next_most = None;
                return Ok(Some((header, raw)));
            }
        }
        self.fill(HEADER_BYTES);
        let Some(head) = self.partial.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = expected(Header::parse(head)?, self.next_most)?;
        self.fill(header.unit_bytes);
        if self.partial.len() < header.unit_bytes {
            return Ok(None);
        }
        self.next_most = None;
        Ok(Some((header, std::mem::take(&mut self.partial).freeze())))
    }

    /// Moves bytes that are there into `partial` until it has `wanted` of them.
    fn fill(&mut self, wanted: usize) {
        while let Some(chunk) = self.chunks.front_mut() {
            let missing = wanted.saturating_sub(self.partial.len());
            if missing == 0 {
                return;
            }
            let take = missing.min(chunk.len());
            self.partial.extend_from_slice(&chunk[..take]);
            chunk.advance(take);
            if chunk.is_empty() {
                self.chunks.pop_front();
            }
        }
    }
}

/// A header as it may be there.
fn expected(header: Header, most: Option<usize>) -> Result<Header, WireError> {
    let Some(most) = most else { return Ok(header) };
    let payload = header.unit_bytes - HEADER_BYTES;
    match header.kind {
        Some(_) if payload <= most => Ok(header),
        _ => Err(WireError::Unexpected(payload, most)),
    }
}
