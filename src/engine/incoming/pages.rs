//! Where the pages of a state on its way in are.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use crate::descriptors::NodeFile;
use crate::engine::file::database::OpenDatabase;
use crate::error::{Error, Result};
use crate::files::{self, Paths, read_exact_at, write_all_at};
use crate::page::{PageNo, PageSize};

/// Pages, each at its place. Only one thread writes them.
#[derive(Clone, Debug)]
pub(in crate::engine) struct PlacedPages {
    paths: Paths,
    size: PageSize,
    /// All pages, or only the first one.
    file: Arc<NodeFile>,
    /// A database of one page, whose file has all but the first. To who reads it there is nothing
    /// after that page, and this node has CKPT and WRITE of it for as long as these are written.
    database: Option<Arc<OpenDatabase>>,
}

/// Whether the pages that came earlier are in the database's file.
pub(in crate::engine) fn in_place(paths: &Paths) -> bool {
    paths.incoming_first().exists()
}

/// Bytes that are there of pages that came earlier.
pub(super) fn bytes_there(paths: &Paths, size: PageSize) -> Option<u64> {
    if !in_place(paths) {
        return Some(fs::metadata(paths.incoming_pages()).ok()?.len());
    }
    let first = fs::metadata(paths.incoming_first()).ok()?.len();
    let has_first = first == u64::from(size.get());
    Some(if has_first { fs::metadata(paths.database()).ok()?.len() } else { 0 })
}

impl PlacedPages {
    /// In a file of their own, or in that of an empty database with pages of this size.
    pub(super) fn open(
        paths: &Paths,
        size: PageSize,
        database: Option<Arc<OpenDatabase>>,
    ) -> Result<PlacedPages> {
        let path = if database.is_some() { paths.incoming_first() } else { paths.incoming_pages() };
        let (file, _) = files::open_or_create(&path)?;
        Ok(PlacedPages { paths: paths.clone(), size, file: Arc::new(file), database })
    }

    /// The database whose file they are in.
    pub(in crate::engine) fn database(&self) -> Option<&Arc<OpenDatabase>> {
        self.database.as_ref()
    }

    pub(super) fn path(&self) -> PathBuf {
        match &self.database {
            Some(_) => self.paths.incoming_first(),
            None => self.paths.incoming_pages(),
        }
    }

    /// What of a run is in the file in `incoming`, and what after it in the database's.
    fn split(&self, first: PageNo, bytes: usize) -> usize {
        match (&self.database, first) {
            (None, _) => bytes,
            (Some(_), PageNo::FIRST) => self.size.bytes().min(bytes),
            (Some(_), _) => 0,
        }
    }

    pub(super) fn write(&self, first: PageNo, pages: &[u8]) -> Result<()> {
        let (aside, placed) = pages.split_at(self.split(first, pages.len()));
        let at = first.offset(self.size);
        if !aside.is_empty() {
            write_all_at(&self.file, aside, at).map_err(Error::io("write", self.path()))?;
        }
        let Some((database, file)) = self.place().filter(|_| !placed.is_empty()) else { return Ok(()) };
        let written = || write_all_at(file, placed, at + aside.len() as u64);
        database.writing(|| written().map_err(Error::io("write", database.path())))
    }

    pub(in crate::engine) fn read(&self, first: PageNo, pages: &mut [u8]) -> Result<()> {
        let (aside, placed) = pages.split_at_mut(self.split(first, pages.len()));
        let at = first.offset(self.size);
        if !aside.is_empty() {
            read_exact_at(&self.file, aside, at).map_err(Error::io("read", self.path()))?;
        }
        let Some((database, file)) = self.place().filter(|_| !placed.is_empty()) else { return Ok(()) };
        read_exact_at(file, placed, at + aside.len() as u64).map_err(Error::io("read", database.path()))
    }

    /// Forgets pages above a number, where there are some.
    pub(super) fn cut_above(&self, last: u32) -> Result<()> {
        let bytes = |pages: u32| u64::from(pages) * u64::from(self.size.get());
        let aside = if self.database.is_some() { bytes(last.min(1)) } else { bytes(last) };
        if self.file.metadata().map_err(Error::io("stat", self.path()))?.len() > aside {
            self.file.set_len(aside).map_err(Error::io("truncate", self.path()))?;
        }
        let Some((database, file)) = self.place() else { return Ok(()) };
        // Its own first page stays.
        let placed = bytes(last.max(1));
        if file.metadata().map_err(Error::io("stat", database.path()))?.len() > placed {
            database.writing(|| file.set_len(placed).map_err(Error::io("truncate", database.path())))?;
        }
        Ok(())
    }

    /// After a failure it is not known what the disk has of them: the next sync may succeed and say
    /// nothing of it. So no later stream goes on from them.
    pub(super) fn sync(&self) -> Result<()> {
        self.sync_all().inspect_err(|_| {
            if let Err(error) = files::remove(&self.path()) {
                tracing::warn!(%error, "pages that may not be on the disk are still there");
            }
        })
    }

    fn sync_all(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("fsync", self.path()))?;
        let Some((database, file)) = self.place() else { return Ok(()) };
        file.sync_data().map_err(Error::io("fsync", database.path()))
    }

    fn place(&self) -> Option<(&OpenDatabase, &fs::File)> {
        let database = self.database.as_deref()?;
        Some((database, database.file()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stream_goes_on_from_pages_that_a_disk_failed() {
        let dir = tempfile::tempdir().unwrap();
        let (paths, size) = (Paths::fresh(dir.path()), PageSize::new(512).unwrap());
        files::make_directory(&paths.incoming()).unwrap();
        let pages = PlacedPages::open(&paths, size, None).unwrap();
        pages.write(PageNo::FIRST, &[7; 512]).unwrap();
        pages.sync().unwrap();
        assert_eq!(bytes_there(&paths, size), Some(512));
        // Such a file has no fsync.
        let failing =
            PlacedPages { file: Arc::new(files::open(std::path::Path::new("/dev/null")).unwrap()), ..pages };
        assert!(matches!(failing.sync(), Err(Error::Io { .. })));
        assert_eq!(bytes_there(&paths, size), None);
    }
}
