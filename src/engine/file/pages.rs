//! How a page is read as of a frame.

use std::sync::PoisonError;

use bytes::BytesMut;

use crate::engine::file::database::OpenDatabase;
use crate::engine::source::Piece;
use crate::error::Result;
use crate::page::PageNo;
use crate::sqlite::Handle;
use crate::wal::{FRAME_HEADER_BYTES, frame_offset, region_of};

impl OpenDatabase {
    /// Reads a page as of a frame: from the WAL, or from the file when the WAL up to that frame
    /// does not have it.
    pub(in crate::engine) fn read_page(
        &self,
        handle: &mut Handle,
        page: PageNo,
        frame: u32,
        buffer: &mut [u8],
    ) -> Result<()> {
        match self.index.lookup(page.get(), 1, frame) {
            Some(found) => self.read_frame(found, buffer),
            None => handle.read(buffer, page.offset(self.page_size)),
        }
    }

    /// Whether two frames have the same page image.
    pub(in crate::engine) fn is_same_image(&self, one: u32, other: u32) -> Result<bool> {
        let mut images = [vec![0; self.page_size.bytes()], vec![0; self.page_size.bytes()]];
        for (image, frame) in images.iter_mut().zip([one, other]) {
            self.read_frame(frame, image)?;
        }
        Ok(images[0] == images[1])
    }

    pub(in crate::engine) fn read_frame(&self, frame: u32, buffer: &mut [u8]) -> Result<()> {
        self.wal.read(buffer, frame_offset(frame, self.page_size) + FRAME_HEADER_BYTES as u64)
    }

    /// Reads a run of pages as of a frame. The lock page reads as zeros.
    pub(in crate::engine) fn read_run(
        &self,
        handle: &mut Handle,
        first: PageNo,
        frame: u32,
        buffer: &mut [u8],
    ) -> Result<()> {
        handle.read(buffer, first.offset(self.page_size))?;
        for (number, page) in (first.get()..).zip(buffer.chunks_exact_mut(self.page_size.bytes())) {
            if let Some(found) = self.index.lookup(number, 1, frame) {
                self.read_frame(found, page)?;
            }
            if PageNo::new(number).is_some_and(|n| n.is_lock_page(self.page_size)) {
                page.fill(0);
            }
        }
        Ok(())
    }

    /// Reads up to `max_bytes` (at least one page) of pages from `first` on, as of the tip.
    pub(in crate::engine) fn read_piece(
        &self,
        handle: &mut Handle,
        first: PageNo,
        max_bytes: usize,
    ) -> Result<Piece> {
        let size = self.page_size.bytes();
        // No restart of the WAL between looking a frame up and reading it.
        let _generation = self.generation.read().unwrap_or_else(PoisonError::into_inner);
        let tip = self.tip();
        let left = tip.pages.saturating_sub(first.get() - 1) as usize;
        let count = (max_bytes / size).max(1).min(left);
        let mut data = BytesMut::zeroed(count * size);
        if count > 0 {
            self.read_run(handle, first, tip.frame, &mut data)?;
        }
        Ok(Piece { position: tip.position, pages: tip.pages, data: data.freeze() })
    }

    /// Maps the index up to the region of a frame.
    pub(in crate::engine) fn map_to(&self, handle: &mut Handle, frame: u32) -> Result<()> {
        if frame == 0 { Ok(()) } else { self.index.ensure(handle, region_of(frame), true) }
    }
}
