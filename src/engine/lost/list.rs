//! All that the node keeps in `<state directory>/lost`.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::engine::lost::{LostBranch, PREFIX, bytes_below};
use crate::error::{Error, Result};
use crate::files::Paths;
use crate::status::from_unix_millis;

/// Something that the node keeps beside a database because it had to go from its place. It is a
/// directory; see [`Db::lost`](crate::Db::lost).
///
/// ```
/// # async fn example(db: replite::Db) -> Result<(), replite::Error> {
/// for lost in db.lost().await? {
///     println!("{:?}: {} bytes in {}", lost.time, lost.bytes, lost.path.display());
///     if let Some(branch) = lost.branch() {
///         branch.export(&std::env::temp_dir().join("lost.db"))?; // for the shell
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Lost {
    /// What it is.
    pub kind: LostKind,
    /// Where it is.
    pub path: PathBuf,
    /// When the node put it there.
    pub time: SystemTime,
    /// What it takes up of [`Config::lost_quota`](crate::Config::lost_quota).
    pub bytes: u64,
}

/// What a [`Lost`] is.
///
/// ```
/// # async fn example(db: replite::Db) -> Result<(), replite::Error> {
/// use replite::LostKind;
///
/// for lost in db.lost().await? {
///     match &lost.kind {
///         LostKind::Branch(branch) => println!("up to transaction {}", branch.tip.number()),
///         LostKind::Database => println!("a database that gave way to a snapshot"),
///         LostKind::Unreadable(why) => println!("what can't be read: {why}"),
///         other => println!("{other:?}"),
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum LostKind {
    /// What a heal replaced: a branch of the history, or pages that were damaged.
    Branch(Box<LostBranch>),
    /// A database file, with the WAL or the journal that it had, that a snapshot could not go into.
    /// It was damaged, or a foreign one with pages of another size.
    Database,
    /// A log that did not lead to its database's state.
    Log,
    /// A WAL that was not its database's. Or one whose last commit does not have its checksum, as
    /// a kill in the middle of that commit leaves it, or a bit that flipped later. In
    /// the first case nothing was acknowledged of what the node cut off its own.
    Wal,
    /// What the node can't read, or what is of no kind that this version knows; and why.
    Unreadable(String),
}

impl Lost {
    /// The branch, if it is one.
    pub fn branch(&self) -> Option<&LostBranch> {
        match &self.kind {
            LostKind::Branch(branch) => Some(branch),
            _ => None,
        }
    }

    /// All that the node keeps beside a database, oldest first.
    pub(crate) fn list(paths: &Paths) -> Result<Vec<Lost>> {
        let lost = paths.lost();
        let entries = match fs::read_dir(&lost) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("read", &lost)(error)),
        };
        let mut all = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("read", &lost))?;
            let path = entry.path();
            // What is not a directory is not ours. What is not complete has no name yet.
            if !path.is_dir() || path.extension().is_some_and(|end| end == "new") {
                continue;
            }
            all.push(Lost::look_at(path));
        }
        all.sort_by(|a, b| (a.time, &a.path).cmp(&(b.time, &b.path)));
        Ok(all)
    }

    /// How many things there are, and the bytes of all files. It looks at so many files at most,
    /// and counts no others.
    pub(crate) fn room(paths: &Paths, most: usize) -> Result<(u64, u64)> {
        let (mut left, mut things, mut bytes) = (most, 0, 0);
        let mut directories = vec![(paths.lost(), true)];
        while let Some((directory, is_top)) = directories.pop() {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                // Another caller moved it away.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("read", &directory)(error)),
            };
            for entry in entries {
                let entry = entry.map_err(Error::io("read", &directory))?;
                if left == 0 {
                    return Ok((things, bytes));
                }
                left -= 1;
                match entry.metadata() {
                    Ok(meta) if meta.is_dir() => {
                        let is_whole = entry.path().extension().is_none_or(|end| end != "new");
                        things += u64::from(is_top && is_whole);
                        directories.push((entry.path(), false));
                    }
                    Ok(meta) => bytes += meta.len(),
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(Error::io("stat", entry.path())(error)),
                }
            }
        }
        Ok((things, bytes))
    }

    fn look_at(path: PathBuf) -> Lost {
        let of_directory = || {
            let time = fs::metadata(&path).and_then(|meta| meta.modified()).ok();
            time.unwrap_or(UNIX_EPOCH)
        };
        let unreadable = |why: String| (LostKind::Unreadable(why), of_directory());
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let (kind, time) = match name.split_once('-') {
            _ if name.starts_with(PREFIX) => match LostBranch::read(path.clone()) {
                Ok(branch) => {
                    let time = branch.time;
                    (LostKind::Branch(Box::new(branch)), time)
                }
                Err(error) => unreadable(error.to_string()),
            },
            Some((kind, time)) => match (kind, time.parse().map(from_unix_millis)) {
                ("database", Ok(time)) => (LostKind::Database, time),
                ("log", Ok(time)) => (LostKind::Log, time),
                ("wal", Ok(time)) => (LostKind::Wal, time),
                _ => unreadable("it is of no known kind".into()),
            },
            None => unreadable("it is of no known kind".into()),
        };
        match bytes_below(&path) {
            Ok(bytes) => Lost { kind, path, time, bytes },
            Err(error) => Lost { kind: LostKind::Unreadable(error.to_string()), path, time, bytes: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_kept_is_listed_and_what_cannot_be_read_hides_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        assert_eq!(Lost::list(&paths).unwrap(), []);
        let lost = paths.lost();
        let make = |name: &str, file: &str, bytes: &[u8]| {
            fs::create_dir_all(lost.join(name)).unwrap();
            fs::write(lost.join(name).join(file), bytes).unwrap();
        };
        let tip = format!("{:016x}-{:016x}-{:016x}-{:032x}", 1, 2, 3, 4);
        let json = format!(
            r#"{{"format":1,"fork":null,"tip":"{tip}","healed_to":"{tip}","damaged":false,"unix_millis":3,
                "page_size":512,"size_pages":1,"pages":1,"record_bytes":0}}"#
        );
        make("database-5", "app.db", &[0; 700]);
        make("log-4", "0.log", &[0; 20]);
        make("wal-2", "app.db-wal", &[0; 30]);
        make("branch-a", "branch.json", json.as_bytes());
        make("branch-b", "branch.json", b"{");
        make("branch-c", "branch.json", br#"{"format":2}"#);
        make("strange-1", "file", b"x");
        make("database.new", "app.db", b"half");
        make("branch-d.new", "pages", b"half");
        fs::write(lost.join("branch-a.sqlite"), b"somebody's").unwrap();
        let all = Lost::list(&paths).unwrap();
        let named = |name: &str| all.iter().find(|one| one.path == lost.join(name)).unwrap();
        assert_eq!(all.len(), 7);
        let begin: Vec<_> = all[..4].iter().map(|one| (one.time, one.bytes)).collect();
        let at = from_unix_millis;
        assert_eq!(begin, [(at(2), 30), (at(3), json.len() as u64), (at(4), 20), (at(5), 700)]);
        assert_eq!(named("wal-2").kind, LostKind::Wal);
        assert_eq!(named("branch-a").branch().unwrap().tip.to_string(), tip);
        assert_eq!(named("log-4").kind, LostKind::Log);
        assert_eq!(named("database-5").kind, LostKind::Database);
        for (name, why) in [("branch-b", "corrupt"), ("branch-c", "version 2"), ("strange-1", "known kind")] {
            let LostKind::Unreadable(said) = &named(name).kind else { panic!("{name}") };
            assert!(
                said.contains(why) && named(name).bytes > 0 && named(name).time > at(5),
                "{name}: {said}"
            );
        }
    }
}
