//! A secret in a file of its own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

use crate::error::{Error, Result};
#[cfg(unix)]
use crate::files::modes::own_user;
use crate::secret::Secret;

/// The most bytes of such a file.
const FILE_MAX_BYTES: u64 = 1024;

impl Secret {
    /// A secret from a file that has its text. When there is no such file, this makes a secret and
    /// the file, for its owner alone (`0600`). Of several processes that begin at the same time,
    /// one makes it and all read it.
    ///
    /// ```
    /// use replite::Secret;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("secret");
    /// let (made, read) = (Secret::from_file(&path)?, Secret::from_file(&path)?);
    /// assert_eq!(made.to_text(), read.to_text());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::WeakSecret`] for a text that is no secret; [`Error::Config`] for a
    /// file that others than its owner can read or write, or that is neither this user's nor
    /// root's.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Secret, Error> {
        read_or_make(path.as_ref())
    }
}

fn read_or_make(path: &Path) -> Result<Secret> {
    match open(path) {
        Ok(file) => read(path, file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make(path)?;
            read(path, open(path).map_err(Error::io("open", path))?)
        }
        Err(error) => Err(Error::io("open", path)(error)),
    }
}

/// A pipe in the place of a file holds nothing up.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        let flags = rustix::fs::OFlags::NONBLOCK.bits().try_into().unwrap_or(0);
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    }
    options.open(path)
}

fn read(path: &Path, file: File) -> Result<Secret> {
    let meta = file.metadata().map_err(Error::io("stat", path))?;
    if !meta.is_file() {
        return Err(Error::Config(format!("the secret's file {} is no file", path.display())));
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let (mode, owner) = (meta.mode() & 0o777, meta.uid());
        // Another user who put it there knows it.
        if owner != 0 && owner != own_user() {
            return Err(Error::Config(format!(
                "the secret's file {} belongs to another user ({owner})",
                path.display()
            )));
        }
        if mode & 0o077 != 0 {
            return Err(Error::Config(format!(
                "others can read or write the secret's file {} (mode {mode:o}): chmod 600",
                path.display()
            )));
        }
    }
    let mut text = String::new();
    file.take(FILE_MAX_BYTES).read_to_string(&mut text).map_err(Error::io("read", path))?;
    Secret::new(&text)
}

/// Makes the file whole under another name first: who finds it can read it. Where another process
/// was faster, its file stays.
fn make(path: &Path) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", uuid::Uuid::new_v4()));
    let new = Path::new(&name);
    let secret = Secret::generate()?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(new).and_then(|mut file| {
        writeln!(file, "{}", secret.to_text())?;
        file.sync_all()
    });
    let linked = written.and_then(|()| fs::hard_link(new, path));
    let _ = fs::remove_file(new);
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Error::io("create", path)(error)),
        _ => {
            // The name, too, outlives a power cut, where the system can say so.
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let _ = File::open(parent.unwrap_or(Path::new("."))).and_then(|directory| directory.sync_all());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_that_begin_at_once_have_one_secret_and_leave_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let begin = || {
            std::thread::scope(|scope| {
                let all: Vec<_> =
                    (0..8).map(|_| scope.spawn(|| read_or_make(&path).unwrap().to_text())).collect();
                all.into_iter().map(|one| one.join().unwrap()).collect::<Vec<_>>()
            })
        };
        let mut all = begin();
        all.dedup();
        assert_eq!(all.len(), 1);
        assert_eq!(begin()[0], all[0], "and it stays");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_can_read_or_that_has_no_secret_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        read_or_make(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for open in [0o640, 0o604, 0o620, 0o666] {
            fs::set_permissions(&path, fs::Permissions::from_mode(open)).unwrap();
            let said = read_or_make(&path).unwrap_err().to_string();
            assert!(said.contains("chmod 600"), "{said}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "correct horse battery staple").unwrap();
        assert!(matches!(read_or_make(&path), Err(Error::WeakSecret(_))));
        assert!(read_or_make(dir.path()).is_err());
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(matches!(read_or_make(&pipe), Err(Error::Config(_))), "it is not waited for");
        if own_user() == 0 {
            let path = dir.path().join("planted");
            read_or_make(&path).unwrap();
            std::os::unix::fs::chown(&path, Some(1234), None).unwrap();
            assert!(read_or_make(&path).unwrap_err().to_string().contains("another user"));
        }
        assert!(matches!(read_or_make(Path::new("/nowhere/secret")), Err(Error::Io { .. })));
    }
}
