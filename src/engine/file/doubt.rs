//! Keeps over restarts that a verification failed. Until a heal or a verification has cleared them,
//! the pages of a node are not what its position says.
//!
//! `<state directory>/doubt` is there meanwhile. Its content is for people: what the verification
//! found.

use std::io::Read;

use crate::files::{self, Paths, replace_file};
use crate::report::Condition;

/// The most bytes of the text that are read.
const TEXT_MAX_BYTES: u64 = 4096;

/// From now on there is a doubt, also after a restart.
pub(in crate::engine) fn begin(paths: &Paths, text: &str) {
    if let Err(error) = replace_file(&paths.doubt(), text.as_bytes()) {
        Condition::DoubtNotNoted { error: &error }.say();
    }
}

/// What the verification found, if there is a doubt.
pub(in crate::engine) fn text(paths: &Paths) -> Option<String> {
    let file = files::open(&paths.doubt());
    if matches!(&file, Err(error) if error.kind() == std::io::ErrorKind::NotFound) {
        return None;
    }
    let mut bytes = Vec::new();
    // That there is one counts, whether it can be read or not.
    let _ = file.and_then(|file| file.take(TEXT_MAX_BYTES).read_to_end(&mut bytes));
    Some(String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).collect())
}

/// The pages are what the position says.
pub(in crate::engine) fn end(paths: &Paths) {
    // Should a power cut bring the file back, the node looks at the pages once more.
    if let Err(error) = files::remove(&paths.doubt()) {
        Condition::DoubtNotForgotten { error: &error }.say();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_file_is_the_text_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        begin(&paths, "page 7 is bad");
        assert_eq!(fs::read(paths.doubt()).unwrap(), b"page 7 is bad");
    }

    #[test]
    fn a_doubt_is_there_until_it_is_ended_whatever_its_file_says() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        assert_eq!(text(&paths), None);
        end(&paths);
        begin(&paths, "page 7\nis bad");
        begin(&paths, "page 8\nis bad");
        assert_eq!(text(&paths).unwrap(), "page 8is bad");
        fs::write(paths.doubt(), vec![0xff; 10_000]).unwrap();
        assert!(text(&paths).unwrap().len() <= 3 * TEXT_MAX_BYTES as usize);
        end(&paths);
        assert_eq!(text(&paths), None);
    }
}
