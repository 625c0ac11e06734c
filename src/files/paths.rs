//! Where the files of a database are.

use std::path::{Path, PathBuf};

/// What the state directory's name has after the database's.
pub(super) const SUFFIX: &str = "-replite";
/// The epoch history's name in the state directory.
pub(super) const EPOCHS: &str = "epochs";
/// The reserve's name in the state directory.
pub(super) const RESERVE: &str = "reserve";

/// All files of one database: SQLite's, and those in the state directory beside it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Paths {
    database: PathBuf,
    state_dir: PathBuf,
}

impl Paths {
    /// `database` is as SQLite is to open it. Nothing is looked at.
    pub(crate) fn new(database: impl Into<PathBuf>) -> Paths {
        let database = database.into();
        let state_dir = beside(&database, SUFFIX);
        Paths { database, state_dir }
    }

    /// A database that is not there, with its state directory, in a directory of a test.
    #[cfg(any(test, all(fuzzing, feature = "testing")))]
    pub(crate) fn fresh(directory: &Path) -> Paths {
        let paths = Paths::new(directory.join("fresh.db"));
        std::fs::create_dir_all(paths.state_dir()).expect("a directory");
        paths
    }

    /// The database file itself.
    pub(crate) fn database(&self) -> &Path {
        &self.database
    }

    pub(crate) fn wal(&self) -> PathBuf {
        beside(&self.database, "-wal")
    }

    /// The shared index of the WAL.
    pub(crate) fn shm(&self) -> PathBuf {
        beside(&self.database, "-shm")
    }

    /// The rollback journal, which there is while the database is not in WAL mode.
    pub(crate) fn journal(&self) -> PathBuf {
        beside(&self.database, "-journal")
    }

    /// What SQLite puts beside the database file.
    pub(crate) fn beside(&self) -> [PathBuf; 3] {
        [self.wal(), self.journal(), self.shm()]
    }

    /// The directory that holds all files of ours.
    pub(crate) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The directory of the log's segments.
    pub(crate) fn log(&self) -> PathBuf {
        self.state_dir.join("log")
    }

    pub(crate) fn anchors(&self) -> PathBuf {
        self.state_dir.join("anchors")
    }

    /// The epoch history.
    pub(crate) fn epochs(&self) -> PathBuf {
        self.state_dir.join(EPOCHS)
    }

    /// An epoch history that could not be read.
    pub(crate) fn epochs_corrupt(&self) -> PathBuf {
        self.state_dir.join("epochs.corrupt")
    }

    /// Which node this is.
    pub(crate) fn node(&self) -> PathBuf {
        self.state_dir.join("node")
    }

    /// The key that it shows to other nodes.
    pub(crate) fn channel_key(&self) -> PathBuf {
        self.state_dir.join("channel-key")
    }

    /// What the pages and the tokens are keyed with.
    pub(crate) fn database_keys(&self) -> PathBuf {
        self.state_dir.join("database-keys")
    }

    /// Which runs of the node wrote here.
    pub(crate) fn runs(&self) -> PathBuf {
        self.state_dir.join("runs")
    }

    /// Locked while a process has a node here that takes part in elections.
    pub(crate) fn process_lock(&self) -> PathBuf {
        self.state_dir.join("process-lock")
    }

    /// There once the node took part in making the first record of a lease.
    pub(crate) fn bootstrapped(&self) -> PathBuf {
        self.state_dir.join("bootstrapped")
    }

    /// The highest epoch number that was heard of.
    pub(crate) fn heard(&self) -> PathBuf {
        self.state_dir.join("heard")
    }

    /// How far a primary was on its lease clock when it had what is here.
    pub(crate) fn lease_clock(&self) -> PathBuf {
        self.state_dir.join("lease-clock")
    }

    /// The directory of this node as a member that keeps the record of the lease.
    #[cfg(feature = "members")]
    pub(crate) fn members(&self) -> PathBuf {
        self.state_dir.join("members")
    }

    /// There while commits may be lost by a power cut.
    pub(crate) fn unsynced(&self) -> PathBuf {
        self.state_dir.join("unsynced")
    }

    /// There while the pages may not be what the position says.
    pub(crate) fn doubt(&self) -> PathBuf {
        self.state_dir.join("doubt")
    }

    /// The directory of what was replaced and is kept.
    pub(crate) fn lost(&self) -> PathBuf {
        self.state_dir.join("lost")
    }

    /// The directory of a state that comes from another node.
    pub(crate) fn incoming(&self) -> PathBuf {
        self.state_dir.join("incoming")
    }

    pub(crate) fn incoming_pages(&self) -> PathBuf {
        self.incoming().join("pages")
    }

    /// The first page of a state whose other pages are in the database's file.
    pub(crate) fn incoming_first(&self) -> PathBuf {
        self.incoming().join("first")
    }

    /// How far a snapshot has come.
    pub(crate) fn incoming_state(&self) -> PathBuf {
        self.incoming().join("state")
    }

    /// Which pages a comparison has.
    pub(crate) fn incoming_held(&self) -> PathBuf {
        self.incoming().join("held")
    }
}

/// The path with something after its name.
pub(crate) fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// The database that a path in its state directory belongs to.
#[cfg(unix)]
pub(super) fn database_of(path: &Path) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    path.ancestors().find_map(|above| {
        let name = above.file_name()?.as_bytes().strip_suffix(SUFFIX.as_bytes())?;
        Some(above.with_file_name(std::ffi::OsStr::from_bytes(name)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_databases_with_an_end_whatever_it_is_called() {
        for database in ["/data/app.db", "app", "/data/app.db-wal", "/data/a b"] {
            let paths = Paths::new(database);
            assert_eq!(paths.database(), Path::new(database));
            let named = |end: &str| PathBuf::from(format!("{database}{end}"));
            assert_eq!(paths.beside(), [named("-wal"), named("-journal"), named("-shm")]);
            assert_eq!(paths.state_dir(), named("-replite"));
            assert_eq!(paths.log(), named("-replite/log"));
            assert_eq!(paths.incoming_pages(), named("-replite/incoming/pages"));
        }
    }
}
