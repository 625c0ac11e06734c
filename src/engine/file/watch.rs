//! Whether the files at the paths are those that a node has open, and the database file is as the
//! node left it.
//!
//! SQLite, and a descriptor, go on with a file that was removed or replaced. A tool that copies
//! another file over the database asks for no lock. So the node knows each file by its device and
//! inode. It knows the database file by its modification time and length, too: only this node
//! writes to it while it holds CKPT.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use crate::engine::file::modified::{modified_of, stamp};
use crate::engine::file::wal_file::WalFile;
use crate::engine::options::EngineOptions;
use crate::error::{Error, Result};
use crate::files::Inode;
use crate::lock::lock;
use crate::sqlite::FileLocks;

/// The files of one open database.
#[derive(Debug)]
pub(in crate::engine) struct Watch {
    files: Vec<KnownFile>,
    database: PathBuf,
    /// With the database's descriptor, where there is one.
    locks: Option<Arc<FileLocks>>,
    left: Mutex<Left>,
}

/// A file, or directory, by what it was when it was opened.
#[derive(Debug)]
struct KnownFile {
    what: What,
    path: PathBuf,
    /// `None`: the watch only looks whether a file is there.
    inode: Option<Inode>,
}

/// How the database file is while no process writes to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Left {
    modified: i64,
    bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum What {
    Database,
    Wal,
    Shm,
    StateDir,
}

/// What is wrong with a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::engine) enum Astray {
    Gone(What, PathBuf),
    Another(What, PathBuf),
    /// Another process wrote to the database file.
    Written(PathBuf),
}

impl fmt::Display for Astray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, path, now) = match self {
            Astray::Gone(what, path) => (*what, path, "was removed"),
            Astray::Another(what, path) => (*what, path, "is another file than the one that was opened"),
            Astray::Written(path) => (What::Database, path, "was written to by somebody else"),
        };
        let cure = match (what, self) {
            (What::Wal | What::Shm, _) => {
                "what is committed is in the log: start the node again, which makes it good from there"
            }
            (What::StateDir, _) => {
                "put it back, if it was moved, and start the node again; without it the log and the history \
                 are gone, and replicas compare their pages"
            }
            (What::Database, Astray::Gone(..)) => {
                "what is committed is in the log: put the file back, or an older copy, and start the node \
                 again"
            }
            (What::Database, _) => {
                "stop the node, put the right file there, of a replica or a backup, with no `-wal` of \
                 another beside it, and start it again"
            }
        };
        write!(f, "{} {now} while it was open here; nothing more is written; {cure}", path.display())
    }
}

impl Watch {
    /// Knows the files as they are from now on. The caller has them open, and holds CKPT.
    pub(in crate::engine) fn new(
        options: &EngineOptions,
        locks: Option<Arc<FileLocks>>,
        wal: &WalFile,
    ) -> Result<Watch> {
        let paths = &options.paths;
        let database = paths.database().to_path_buf();
        let opened = |file: Option<&File>| file.map(|file| file.metadata());
        let known = |what, path: PathBuf, opened: Option<io::Result<Metadata>>| -> Result<KnownFile> {
            let meta = opened.unwrap_or_else(|| fs::metadata(&path)).map_err(Error::io("stat", &path))?;
            Ok(KnownFile { what, path, inode: Inode::of(&meta) })
        };
        let files = vec![
            known(What::Database, database.clone(), opened(locks.as_deref().and_then(FileLocks::database)))?,
            known(What::Wal, paths.wal(), opened(Some(wal.file())))?,
            known(What::Shm, paths.shm(), opened(locks.as_deref().and_then(FileLocks::shm)))?,
            known(What::StateDir, paths.state_dir().to_path_buf(), None)?,
        ];
        let watch = Watch { files, database, locks, left: Mutex::new(Left { modified: 0, bytes: 0 }) };
        watch.leave()?;
        Ok(watch)
    }

    /// What is wrong with the files at the paths; nothing as a rule. A path that this node can't
    /// look at says nothing.
    pub(in crate::engine) fn astray(&self) -> Option<Astray> {
        self.files.iter().find_map(|known| match fs::metadata(&known.path) {
            Ok(meta) if Inode::of(&meta) == known.inode => None,
            Ok(_) => Some(Astray::Another(known.what, known.path.clone())),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Some(Astray::Gone(known.what, known.path.clone()))
            }
            Err(error) => {
                tracing::debug!(path = %known.path.display(), %error, "a file can't be looked at");
                None
            }
        })
    }

    /// The same, and whether the database file is as this node left it. No thread here may be
    /// writing to it.
    pub(in crate::engine) fn as_left(&self) -> Option<Astray> {
        self.astray().or_else(|| self.written())
    }

    /// Whether another process wrote to the file that is open here. No thread here may be writing
    /// to it.
    pub(in crate::engine) fn written(&self) -> Option<Astray> {
        let now = self.now().ok()?;
        (now != *lock(&self.left)).then(|| Astray::Written(self.database.clone()))
    }

    /// This node has written to the database file.
    pub(in crate::engine) fn leave(&self) -> Result<()> {
        *lock(&self.left) = self.now()?;
        Ok(())
    }

    /// When the database file was last modified.
    pub(in crate::engine) fn modified(&self) -> Result<i64> {
        Ok(self.now()?.modified)
    }

    /// Gives the database file, as this node left it, a time that no later write will give it. See
    /// [`stamp`].
    pub(in crate::engine) fn stamp(&self) -> Result<Option<i64>> {
        let stamped = stamp(&self.database, self.descriptor());
        self.leave()?;
        stamped
    }

    fn now(&self) -> Result<Left> {
        let meta = self.descriptor().map_or_else(|| fs::metadata(&self.database), File::metadata);
        let meta = meta.map_err(Error::io("stat", &self.database))?;
        Ok(Left { modified: modified_of(&meta, &self.database)?, bytes: meta.len() })
    }

    fn descriptor(&self) -> Option<&File> {
        self.locks.as_deref().and_then(FileLocks::database)
    }
}
