//! A run of pages with their hashes: what a SNAP_PIECE brings.
use std::ops::Range;

use crate::checksum::{PageHash, PageKey};
use crate::page::{PageNo, PageSize};
use crate::wire::PIECE_BYTES;

/// Pages in a row, each with its hash. No number is beyond the last that a page can have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct PageRun<'a> {
    first: PageNo,
    size: PageSize,
    bytes: &'a [u8],
    hashes: Vec<PageHash>,
}

impl<'a> PageRun<'a> {
    /// Hashes the pages. A rest that is no whole page is left out, and so are pages with numbers
    /// that no page has.
    pub(crate) fn hashed(first: PageNo, bytes: &'a [u8], size: PageSize, key: &PageKey) -> PageRun<'a> {
        let numbers = (first.get()..=u32::MAX).filter_map(PageNo::new);
        let pages = numbers.zip(bytes.chunks_exact(size.bytes()));
        let hashes: Vec<_> = pages.map(|(number, page)| key.hash(number, page)).collect();
        PageRun { first, size, bytes: &bytes[..hashes.len() * size.bytes()], hashes }
    }

    pub(crate) fn first(&self) -> PageNo {
        self.first
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.size
    }

    /// All pages, without a gap.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub(crate) fn hashes(&self) -> &[PageHash] {
        &self.hashes
    }

    pub(crate) fn count(&self) -> u32 {
        self.hashes.len() as u32
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (PageNo, &'a [u8], PageHash)> {
        let numbers = (self.first.get()..=u32::MAX).filter_map(PageNo::new);
        let pages = numbers.zip(self.bytes.chunks_exact(self.size.bytes()));
        pages.zip(&self.hashes).map(|((number, page), hash)| (number, page, *hash))
    }

    /// Some pages of it, counted from 0. None of none.
    pub(crate) fn part(&self, pages: Range<usize>) -> Option<PageRun<'a>> {
        let hashes = self.hashes.get(pages.clone()).filter(|hashes| !hashes.is_empty())?.to_vec();
        let first = PageNo::new(self.first.get().checked_add(pages.start as u32)?)?;
        let size = self.size.bytes();
        let bytes = &self.bytes[pages.start * size..pages.end * size];
        Some(PageRun { first, size: self.size, bytes, hashes })
    }

    /// The pieces that it is sent in.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = PageRun<'a>> {
        let at_once = (PIECE_BYTES / self.size.bytes()).max(1);
        let begins = (0..self.hashes.len()).step_by(at_once);
        begins.filter_map(move |begin| self.part(begin..(begin + at_once).min(self.hashes.len())))
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::checksum::Checksum;
    use crate::txid::{Epoch, Position, Txid};
    use crate::wire::{Decoder, Message, WireError, encode_run};

    const KEY: PageKey = PageKey::from_bytes([7; 28]);

    fn run(first: u32, pages: &[u8]) -> PageRun<'_> {
        PageRun::hashed(PageNo::new(first).unwrap(), pages, PageSize::new(512).unwrap(), &KEY)
    }

    #[test]
    fn what_is_sent_in_pieces_is_the_run_with_its_hashes() {
        let pages: Vec<u8> = (0..200 * 512_u32).map(|n| (n / 100) as u8).collect();
        let (all, mut out) = (run(3, &pages), BytesMut::new());
        let position = Position::new(Txid::new(Epoch::new(1, 2), 3), Checksum::EMPTY);
        encode_run(&all, position, &mut out);
        let mut decoder = Decoder::new(Some(KEY));
        decoder.push(out.freeze());
        let mut came = Vec::new();
        while let Some(unit) = decoder.next().unwrap() {
            let Message::SnapPiece { run, .. } = unit.decode().unwrap() else { panic!("{unit:?}") };
            came.extend(run.iter().map(|(number, page, hash)| (number, page.to_vec(), hash)));
        }
        let hash = |number: PageNo, page: &[u8]| KEY.hash(number, page);
        assert!(came.iter().all(|(number, page, found)| *found == hash(*number, page)));
        let expected = (3..).zip(pages.chunks(512)).map(|(n, page)| (PageNo::new(n).unwrap(), page.to_vec()));
        assert!(came.into_iter().map(|(number, page, _)| (number, page)).eq(expected));
    }

    #[test]
    fn a_part_is_where_it_was_and_there_is_none_of_nothing() {
        let pages: Vec<u8> = (0..4 * 512_u32).map(|n| (n / 512) as u8).collect();
        let all = run(7, &pages);
        assert_eq!(all.part(1..3).unwrap(), run(8, &pages[512..3 * 512]));
        assert_eq!([all.part(2..2), all.part(3..5)], [None, None]);
    }

    #[test]
    fn no_page_is_beyond_the_last_number() {
        let most = run(u32::MAX, &[0; 1024]);
        assert_eq!((most.count(), most.bytes().len()), (1, 512));
        assert_eq!(most.iter().map(|(number, ..)| number.get()).collect::<Vec<_>>(), [u32::MAX]);
    }

    #[test]
    fn a_piece_of_parts_of_pages_or_of_too_many_is_refused() {
        let position = [0; 40];
        let pages = [5; 1024];
        for (first, power, bytes) in
            [(1, 8, 1024), (1, 17, 1024), (1, 255, 1024), (1, 10, 512), (0, 9, 512), (u32::MAX, 9, 512)]
        {
            let fields = [&u32::to_le_bytes(first)[..], &position, &[power], &pages[..bytes]].concat();
            let mut decoder = Decoder::new(Some(KEY));
            decoder.push(crate::wire::sealed(10, &fields, KEY));
            let refused = decoder.next().unwrap().unwrap().decode().map(drop);
            assert!(matches!(refused, Err(WireError::Fields(_))), "{first} {power} {bytes}: {refused:?}");
        }
        let mut out = BytesMut::new();
        let position = Position::new(Txid::new(Epoch::new(1, 2), 3), Checksum::EMPTY);
        encode_run(&run(1, &pages), position, &mut out);
        let decoded = |bytes: &[u8], key| {
            let mut decoder = Decoder::new(key);
            decoder.push(bytes::Bytes::copy_from_slice(bytes));
            decoder.next().unwrap().unwrap().decode().map(drop)
        };
        assert_eq!(decoded(&out, Some(KEY)), Ok(()));
        assert!(matches!(decoded(&out, None), Err(WireError::Fields(_))), "no key");
        for at in [24, 30, 68, 70, 600, out.len() - 1] {
            let mut bytes = out.to_vec();
            bytes[at] ^= 1;
            assert!(decoded(&bytes, Some(KEY)).is_err(), "{at}");
        }
    }
}
