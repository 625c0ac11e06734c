//! That a verification failed, kept over restarts: the pages of a node are not what its position says until they are healed, or verified.
//!
//! `<side>/doubt` is there meanwhile. What is in it is for people: what was found.

use std::io::Read;
use std::path::Path;

use crate::files::{self, replace_file};
use crate::report::Condition;

const NAME: &str = "doubt";
/// The most bytes of the text that are read.
const TEXT_MAX_BYTES: u64 = 4096;

/// From now on there is a doubt, also after a restart.
pub(in crate::engine) fn begin(directory: &Path, text: &str) {
    if let Err(error) = replace_file(directory, NAME, text.as_bytes()) {
        Condition::DoubtNotNoted { error: &error }.say();
    }
}

/// What was found, if there is a doubt.
pub(in crate::engine) fn text(directory: &Path) -> Option<String> {
    let file = files::open(&directory.join(NAME));
    if matches!(&file, Err(error) if error.kind() == std::io::ErrorKind::NotFound) {
        return None;
    }
    let mut bytes = Vec::new();
    // That there is one counts, whether it can be read or not.
    let _ = file.and_then(|file| file.take(TEXT_MAX_BYTES).read_to_end(&mut bytes));
    Some(String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).collect())
}

/// The pages are what the position says.
pub(in crate::engine) fn end(directory: &Path) {
    // Should it come back by a power cut, the pages are looked at once more.
    if let Err(error) = files::remove(&directory.join(NAME)) {
        Condition::DoubtNotForgotten { error: &error }.say();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_doubt_is_there_until_it_is_ended_whatever_its_file_says() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(text(dir.path()), None);
        end(dir.path());
        begin(dir.path(), "page 7\nis bad");
        begin(dir.path(), "page 8\nis bad");
        assert_eq!(text(dir.path()).unwrap(), "page 8is bad");
        fs::write(dir.path().join(NAME), vec![0xff; 10_000]).unwrap();
        assert!(text(dir.path()).unwrap().len() <= 3 * TEXT_MAX_BYTES as usize);
        end(dir.path());
        assert_eq!(text(dir.path()), None);
    }
}
