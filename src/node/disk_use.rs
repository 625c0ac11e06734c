//! How much room a database takes up on the disk.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::engine::Lost;
use crate::files::Paths;
use crate::lock::lock;
use crate::metrics::FileSizes;

/// How long what was found in `lost` counts. To look means to go through directories, and a scrape
/// may come every second.
const LOST_AGE: Duration = Duration::from_secs(60);
/// And how many files that looks at.
const LOST_FILES_MAX: usize = 4096;

/// What was seen last of what takes long to see.
#[derive(Debug, Default)]
pub(crate) struct DiskUse {
    lost: Mutex<Option<(Instant, LostRoom)>>,
}

/// How many things are in `lost`, and their bytes; none where that could not be seen.
type LostRoom = Option<(u64, u64)>;

impl DiskUse {
    /// What the files take up. Blocks.
    pub(crate) fn look(&self, paths: &Paths) -> FileSizes {
        let size = |path: &Path| fs::metadata(path).ok().map(|meta| meta.len());
        let lost = self.lost(paths);
        FileSizes {
            database: size(paths.database()),
            wal: size(&paths.wal()),
            lost: lost.map(|(_, bytes)| bytes),
            lost_entries: lost.map(|(things, _)| things),
        }
    }

    fn lost(&self, paths: &Paths) -> LostRoom {
        // Callers that come meanwhile wait for what this one finds.
        let mut seen = lock(&self.lost);
        match *seen {
            Some((at, lost)) if at.elapsed() < LOST_AGE => lost,
            _ => {
                let lost = Lost::room(paths, LOST_FILES_MAX).ok();
                *seen = Some((Instant::now(), lost));
                lost
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_lost_is_counted_with_all_that_is_below_and_not_at_each_look() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path().join("a.db"));
        let (first, deep) = (paths.lost().join("log-1"), paths.lost().join("database-2/deep"));
        fs::create_dir_all(&first).unwrap();
        fs::create_dir_all(&deep).unwrap();
        fs::write(paths.database(), [0; 10]).unwrap();
        fs::write(first.join("one"), [0; 20]).unwrap();
        fs::write(deep.join("two"), [0; 30]).unwrap();
        let seen = FileSizes { database: Some(10), wal: None, lost: Some(50), lost_entries: Some(2) };
        let disk = DiskUse::default();
        assert_eq!(disk.look(&paths), seen);
        fs::write(deep.join("three"), [0; 40]).unwrap();
        fs::write(paths.database(), [0; 11]).unwrap();
        assert_eq!(disk.look(&paths), FileSizes { database: Some(11), ..seen }, "the database's is new");
        assert_eq!(DiskUse::default().look(&paths).lost, Some(90));
        // Five files and directories: of those no more are looked at than may be.
        let (things, bytes) = Lost::room(&paths, 3).unwrap();
        assert!(things <= 2 && bytes < 90, "{things} {bytes}");
    }

    #[test]
    fn without_lost_there_is_nothing_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let seen = DiskUse::default().look(&Paths::new(dir.path().join("a.db")));
        assert_eq!(seen, FileSizes { lost: Some(0), lost_entries: Some(0), ..FileSizes::default() });
    }
}
