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
use crate::txid::Position;
use crate::wire::{self, Message, Sent};

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
    let page = source.page_size().bytes();
    read_pieces(source, from, |first, piece| {
        wire::encode_pieces(first, piece.position, &piece.data, page, &mut bytes)
    })
    .map(|(first, last, next)| {
        let Sent { position, pages } = first;
        (PageBatch { bytes: bytes.freeze(), position, pages, last }, next)
    })
}

pub(super) fn read_sums(source: &dyn StreamSource, from: PageNo) -> Result<(PageBatch, PageNo)> {
    let (size, key) = (source.page_size(), source.page_key());
    let span = span_pages(size);
    let mut sums = Vec::new();
    let (Sent { position, pages }, last, next) = read_pieces(source, from, |first, piece| {
        let mut numbers = first.get()..;
        sums.extend(piece.data.chunks(span as usize * size.bytes()).map(|run| {
            let pages = numbers.by_ref().zip(run.chunks_exact(size.bytes()));
            let pages = pages.filter_map(|(n, page)| Some((PageNo::new(n)?, page)));
            let pages = pages.filter(|(n, _)| !n.is_lock_page(size));
            let sum = pages.fold(Checksum::EMPTY, |sum, (n, page)| sum.with(key.hash(n, page)));
            sum.as_u128().to_le_bytes()
        }));
    })?;
    let mut bytes = BytesMut::new();
    if !sums.is_empty() {
        wire::encode(&Message::Sums { first: from, span, sums: &sums }, &mut bytes);
    }
    Ok((PageBatch { bytes: bytes.freeze(), position, pages, last }, next))
}

/// Pages that one sum stands for: as many as a piece has, which is read at one moment.
fn span_pages(size: PageSize) -> u32 {
    (PIECE_BYTES / size.bytes()) as u32
}

/// Reads some pieces. Where the first was read, where the last of all was, and where the next one
/// begins.
fn read_pieces(
    source: &dyn StreamSource,
    from: PageNo,
    mut visit: impl FnMut(PageNo, &Piece),
) -> Result<(Sent, Option<Sent>, PageNo)> {
    let page_bytes = source.page_size().bytes();
    let mut next = from;
    let mut begun = None;
    for _ in 0..PIECES_AT_ONCE {
        let piece = source.read_piece(next, PIECE_BYTES)?;
        let here = Sent { position: piece.position, pages: piece.pages };
        let first = *begun.get_or_insert(here);
        let read = (piece.data.len() / page_bytes) as u32;
        if read > 0 {
            visit(next, &piece);
        }
        let after = PageNo::new(next.get().saturating_add(read)).unwrap_or(next);
        if read == 0 || after.get() > piece.pages {
            return Ok((first, Some(here), after));
        }
        next = after;
    }
    let first = begun.ok_or_else(|| Error::Internal("a snapshot without pieces".into()))?;
    Ok((first, None, next))
}
