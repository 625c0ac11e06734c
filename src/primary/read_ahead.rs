//! Reads and hashes pages ahead of the stream that sends them.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::checksum::Checksum;
use crate::engine::{PIECE_BYTES, Piece};
use crate::error::{Error, Result};
use crate::page::{PageNo, PageSize};
use crate::primary::{StreamSource, blocking};
use crate::threads;
use crate::txid::Position;
use crate::wire::{self, Message, PageRun, Sent};

/// Pieces that are read and hashed in one go on a blocking thread.
const PIECES_AT_ONCE: usize = 4;
/// Such batches that wait to be sent: reading, hashing and sending overlap.
const GOES_AHEAD: usize = 2;

const _: () = assert!(PIECE_BYTES / PageSize::MIN_BYTES as usize <= wire::SPAN_MAX_PAGES as usize);

/// Some pieces, encoded.
pub(super) struct PageBatch {
    pub(super) bytes: Bytes,
    /// The position of the first piece in it, and the database's size there.
    pub(super) position: Position,
    pub(super) pages: u32,
    /// Said with the last piece: where that was read.
    pub(super) last: Option<Sent>,
}

/// Reads some pages from one on and says where the next ones begin.
pub(super) type ReadPageBatch = fn(&dyn StreamSource, PageNo) -> Result<(PageBatch, PageNo)>;

/// Reads and hashes ahead of the sender; ends when the handle is dropped.
pub(super) fn read_ahead(
    source: Arc<dyn StreamSource>,
    from: PageNo,
    read: ReadPageBatch,
) -> (mpsc::Receiver<Result<PageBatch>>, AbortOnDropHandle<()>) {
    let (sender, receiver) = mpsc::channel(GOES_AHEAD);
    let task = tokio::spawn(async move {
        let mut from = from;
        // A place first: what is read must not be held while the sender waits.
        while let Ok(place) = sender.reserve().await {
            let source = source.clone();
            match blocking(move || read(&*source, from)).await {
                Ok((go, next)) => {
                    let last = go.last.is_some();
                    place.send(Ok(go));
                    if last {
                        return;
                    }
                    from = next;
                }
                Err(error) => return place.send(Err(error)),
            }
        }
    });
    (receiver, AbortOnDropHandle::new(task))
}

pub(super) fn read_go(source: &dyn StreamSource, from: PageNo) -> Result<(PageBatch, PageNo)> {
    let mut bytes = BytesMut::with_capacity(PIECES_AT_ONCE * (PIECE_BYTES + 1024));
    let read = read_pieces(source, from)?;
    for (run, (_, piece)) in hashed(source, &read.pieces).iter().zip(&read.pieces) {
        wire::encode_run(run, piece.position, &mut bytes);
    }
    Ok(read.batch(bytes.freeze()))
}

/// Hashes what was read, on several threads.
fn hashed<'a>(source: &dyn StreamSource, pieces: &'a [(PageNo, Piece)]) -> Vec<PageRun<'a>> {
    let (size, key) = (source.page_size(), source.page_key());
    let bytes = pieces.iter().map(|(_, piece)| piece.data.len()).sum();
    threads::each("replite-hash", pieces, bytes, |(first, piece)| {
        PageRun::hashed(*first, &piece.data, size, &key)
    })
}

pub(super) fn read_sums(source: &dyn StreamSource, from: PageNo) -> Result<(PageBatch, PageNo)> {
    let (size, read) = (source.page_size(), read_pieces(source, from)?);
    let span = span_pages(size);
    let sums: Vec<_> = hashed(source, &read.pieces).iter().map(sum).collect();
    let mut bytes = BytesMut::new();
    if !sums.is_empty() {
        wire::encode(&Message::Sums { first: from, span, sums: &sums }, &mut bytes);
    }
    Ok(read.batch(bytes.freeze()))
}

/// The sum of a piece, of which each but the last has as many pages as a sum stands for.
fn sum(run: &PageRun<'_>) -> [u8; 16] {
    let counted = run.iter().filter(|(number, ..)| !number.is_lock_page(run.page_size()));
    let sum = counted.fold(Checksum::EMPTY, |sum, (_, _, hash)| sum.with(hash));
    sum.as_u128().to_le_bytes()
}

/// Pages that one sum stands for: as many as a piece has, which is read at one moment.
fn span_pages(size: PageSize) -> u32 {
    (PIECE_BYTES / size.bytes()) as u32
}

/// Some pieces that were read, and where the next one begins.
struct PiecesRead {
    pieces: Vec<(PageNo, Piece)>,
    /// Where the first was read.
    first: Sent,
    /// Where the last of all was.
    last: Option<Sent>,
    next: PageNo,
}

impl PiecesRead {
    fn batch(self, bytes: Bytes) -> (PageBatch, PageNo) {
        let Sent { position, pages } = self.first;
        (PageBatch { bytes, position, pages, last: self.last }, self.next)
    }
}

fn read_pieces(source: &dyn StreamSource, from: PageNo) -> Result<PiecesRead> {
    let page_bytes = source.page_size().bytes();
    let (mut next, mut pieces) = (from, Vec::new());
    let mut begun = None;
    for _ in 0..PIECES_AT_ONCE {
        let piece = source.read_piece(next, PIECE_BYTES)?;
        let here = Sent { position: piece.position, pages: piece.pages };
        let first = *begun.get_or_insert(here);
        let read = (piece.data.len() / page_bytes) as u32;
        let after = PageNo::new(next.get().saturating_add(read)).unwrap_or(next);
        let ends = read == 0 || after.get() > piece.pages;
        if read > 0 {
            pieces.push((next, piece));
        }
        next = after;
        if ends {
            return Ok(PiecesRead { pieces, first, last: Some(here), next });
        }
    }
    let first = begun.ok_or_else(|| Error::Internal("a snapshot without pieces".into()))?;
    Ok(PiecesRead { pieces, first, last: None, next })
}
