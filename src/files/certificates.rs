//! The files of certificates, and whether they have changed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::channel::{CertificateBytes, Certificates};
use crate::error::{Error, Result};
use crate::files::Inode;

/// The most bytes of such a file.
const FILE_MAX_BYTES: u64 = 1024 * 1024;
/// A file that was written so short a time ago may be written once more without its showing.
const SETTLES: Duration = Duration::from_secs(2);

/// What tells one state of a file from another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: Option<Inode>,
}

/// The three files, as they were seen last.
#[derive(Debug)]
pub(crate) struct CertificateFiles {
    pub(crate) certificates: Certificates,
    /// `None`: the next look reads them, whatever they are.
    seen: Option<[Stamp; 3]>,
}

impl CertificateFiles {
    pub(crate) fn new(certificates: Certificates) -> CertificateFiles {
        CertificateFiles { certificates, seen: None }
    }

    /// What is in the files if they may have changed. Blocks.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] for a file that is too long, or a key that others can read.
    /// The next look reads the files again.
    pub(crate) fn changed(&mut self) -> Result<Option<CertificateBytes>> {
        let now = SystemTime::now();
        let seen = self.stamps()?;
        if self.seen == Some(seen) {
            return Ok(None);
        }
        self.seen = None;
        let bytes = self.certificates.read()?;
        // They count as seen only if all is as it was before they were read.
        let settled = |stamp: &Stamp| {
            stamp
                .modified
                .and_then(|modified| now.duration_since(modified).ok())
                .is_some_and(|age| age > SETTLES)
        };
        if seen.iter().all(settled) && self.stamps()? == seen {
            self.seen = Some(seen);
        }
        Ok(Some(bytes))
    }

    /// What was read can't be used: the next look reads it again.
    pub(crate) fn forget(&mut self) {
        self.seen = None;
    }

    fn stamps(&self) -> Result<[Stamp; 3]> {
        let [chain, key, roots] = self.certificates.paths();
        Ok([stamp(chain)?, stamp(key)?, stamp(roots)?])
    }
}

fn stamp(path: &Path) -> Result<Stamp> {
    let meta = fs::metadata(path).map_err(Error::io("stat", path))?;
    Ok(Stamp { modified: meta.modified().ok(), bytes: meta.len(), inode: Inode::of(&meta) })
}

impl Certificates {
    /// What is in the files. Blocks.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] for a file that is too long, or a key that others can read.
    pub(crate) fn read(&self) -> Result<CertificateBytes> {
        let [chain, key, roots] = self.paths();
        Ok(CertificateBytes { chain: read(chain, false)?, key: read(key, true)?, roots: read(roots, false)? })
    }
}

fn read(path: &Path, private: bool) -> Result<Vec<u8>> {
    let file = open(path).map_err(Error::io("open", path))?;
    let meta = file.metadata().map_err(Error::io("stat", path))?;
    if !meta.is_file() {
        return Err(Error::Config(format!("{} is no file", path.display())));
    }
    if private {
        check_private(path, &meta)?;
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(Error::Config(format!("{} has more than {FILE_MAX_BYTES} bytes", path.display())));
    }
    Ok(bytes)
}

/// A pipe in the place of a file holds nothing up.
fn open(path: &Path) -> io::Result<File> {
    let mut options = fs::OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        rustix::fs::OFlags::NONBLOCK.bits().try_into().unwrap_or(0),
    );
    options.open(path)
}

/// Where root gives a program a key, it is mostly by the group.
#[cfg(unix)]
fn check_private(path: &Path, meta: &fs::Metadata) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let (mode, of_root) = (meta.mode() & 0o777, meta.uid() == 0);
    let too_much = if of_root { 0o037 } else { 0o077 };
    if mode & too_much == 0 {
        return Ok(());
    }
    Err(Error::Config(format!(
        "others can read or write the private key {} (mode {mode:o}): chmod 600{}",
        path.display(),
        if of_root { ", or 640 for its group" } else { "" }
    )))
}

#[cfg(not(unix))]
fn check_private(_: &Path, _: &fs::Metadata) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(dir: &Path) -> CertificateFiles {
        for name in ["chain", "key", "roots"] {
            fs::write(dir.join(name), name).unwrap();
        }
        #[cfg(unix)]
        set_mode(&dir.join("key"), 0o600);
        let [chain, key, roots] = ["chain", "key", "roots"].map(|name| dir.join(name));
        CertificateFiles::new(Certificates::new(chain, key, roots))
    }

    #[cfg(unix)]
    fn set_mode(path: &Path, mode: u32) {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// As if all had been written some time ago.
    fn age(dir: &Path, seconds: u64) {
        for name in ["chain", "key", "roots"] {
            let file = File::options().append(true).open(dir.join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
        }
    }

    #[test]
    fn files_are_read_again_when_they_change_and_while_they_may_still_change_unseen() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = files(dir.path());
        for _ in 0..2 {
            assert_eq!(files.changed().unwrap().unwrap().chain, b"chain", "written just now");
        }
        age(dir.path(), 60);
        assert!(files.changed().unwrap().is_some());
        assert!(files.changed().unwrap().is_none());
        // The same length and time, by another file in its place.
        fs::write(dir.path().join("new"), "CHAIN").unwrap();
        fs::rename(dir.path().join("new"), dir.path().join("chain")).unwrap();
        age(dir.path(), 60);
        assert_eq!(files.changed().unwrap().unwrap().chain, b"CHAIN");
        age(dir.path(), 50);
        files.changed().unwrap();
        assert!(files.changed().unwrap().is_none());
        files.forget();
        assert!(files.changed().unwrap().is_some());
        fs::remove_file(dir.path().join("roots")).unwrap();
        assert!(matches!(files.changed(), Err(Error::Io { .. })));
        fs::write(dir.path().join("roots"), vec![b'x'; FILE_MAX_BYTES as usize + 1]).unwrap();
        assert!(
            matches!(files.changed(), Err(Error::Config(why)) if why.contains("more than 1048576 bytes"))
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = files(dir.path());
        let key = dir.path().join("key");
        for open in [0o604, 0o660, 0o644, 0o622] {
            set_mode(&key, open);
            let said = files.changed().unwrap_err().to_string();
            assert!(said.contains("chmod 600") && said.contains(&format!("{open:o}")), "{said}");
        }
        use std::os::unix::fs::MetadataExt;
        let of_root = fs::metadata(&key).unwrap().uid() == 0;
        set_mode(&key, 0o640);
        assert_eq!(files.changed().is_ok(), of_root, "its group's, where it belongs to root");
        set_mode(&key, 0o400);
        assert!(files.changed().is_ok());
        assert!(Certificates::new(dir.path(), &key, &key).read().is_err(), "a directory");
    }
}
