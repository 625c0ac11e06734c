//! Answers to a node that asks for pages by the hashes that it has. Both ends of a stream give
//! them.

use bytes::{Bytes, BytesMut};

use crate::checksum::{PageHash, PageKey};
use crate::error::Result;
use crate::page::{PageNo, PageSize};
use crate::txid::Position;
use crate::wire::{self, PageRun, Sent, WantRun};

/// Bytes of pages that one read takes. Small, because the checkpointer waits meanwhile.
pub(crate) const PIECE_BYTES: usize = 256 * 1024;
const _: () = assert!(PIECE_BYTES + 1024 <= wire::PAYLOAD_MAX_BYTES);

/// A run of pages for a snapshot.
#[derive(Debug)]
pub(crate) struct Piece {
    /// The state when the engine read the piece. A page may be newer than that, never older; the
    /// log records up to the position of the last piece make it exact.
    pub(crate) position: Position,
    /// The database's size in pages at that state. With `first` beyond it the piece is empty: the
    /// last one.
    pub(crate) pages: u32,
    pub(crate) data: Bytes,
}

/// Reads pages that the peer asked for. Encodes those of which the asker has no image with that
/// hash, and says where it read the last.
pub(crate) fn answer(
    mut read_piece: impl FnMut(PageNo, usize) -> Result<Piece>,
    (size, key): (PageSize, PageKey),
    runs: &[WantRun],
) -> Result<(Bytes, Sent)> {
    let mut bytes = BytesMut::new();
    // Also without any run: the peer asks for the position, too.
    let piece = read_piece(PageNo::FIRST, 1)?;
    let mut sent = Sent { position: piece.position, pages: piece.pages };
    for run in runs {
        let (mut next, mut hashes) = (run.first, run.hashes.as_slice());
        while !hashes.is_empty() {
            let piece = read_piece(next, PIECE_BYTES.min(hashes.len() * size.bytes()))?;
            sent = Sent { position: piece.position, pages: piece.pages };
            let read = piece.data.len() / size.bytes();
            if read == 0 {
                break;
            }
            let pages = PageRun::hashed(next, &piece.data, size, &key);
            encode_differing(&pages, piece.position, &hashes[..read], &mut bytes);
            hashes = &hashes[read..];
            let Some(after) = next.get().checked_add(read as u32).and_then(PageNo::new) else { break };
            next = after;
        }
    }
    Ok((bytes.freeze(), sent))
}

/// Encodes the pages whose hashes are not those, as pieces of pages in a row.
fn encode_differing(pages: &PageRun<'_>, position: Position, hashes: &[[u8; 16]], out: &mut BytesMut) {
    let differs = |((number, _, hash), theirs): ((PageNo, _, PageHash), &[u8; 16])| {
        !number.is_lock_page(pages.page_size()) && hash.to_bytes() != *theirs
    };
    let differing = pages.iter().zip(hashes).map(differs).enumerate();
    let mut differing = differing.filter_map(|(at, differs)| differs.then_some(at)).peekable();
    while let Some(begin) = differing.next() {
        let mut end = begin + 1;
        while differing.next_if(|&at| at == end).is_some() {
            end += 1;
        }
        if let Some(run) = pages.part(begin..end) {
            wire::encode_run(&run, position, out);
        }
    }
}
