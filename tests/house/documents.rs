//! Documents and comments name files that are there.

use std::fmt::Write;

use crate::sources::{exists, files, read};

/// Documents beside those in `docs`. The changelog also tells of files that are gone.
const DOCUMENTS: [&str; 4] = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benches/README.md"];

/// Where paths begin.
const FOLDERS: [&str; 7] = ["src/", "tests/", "docs/", "benches/", "examples/", "fuzz/", "crates/"];

#[test]
fn named_files_are_there() {
    let documents = DOCUMENTS.iter().map(|name| name.to_string()).chain(files("docs", "md"));
    let mut said = String::new();
    for file in documents.chain(files("src", "rs")) {
        for (at, line) in read(&file).lines().enumerate() {
            if file.ends_with(".rs") && !line.trim_start().starts_with("//") {
                continue;
            }
            for path in paths(line).into_iter().filter(|path| !exists(path)) {
                writeln!(said, "{file}:{}: {path}", at + 1).unwrap();
            }
        }
    }
    assert!(said.is_empty(), "files are named that are not there:\n{said}");
}

/// The paths in a line that begin at the root of the repository.
fn paths(line: &str) -> Vec<&str> {
    let words = line.split(|c: char| !(c.is_ascii_alphanumeric() || "/_-.".contains(c)));
    let is_path =
        |word: &&str| FOLDERS.iter().any(|folder| word.starts_with(folder) && word.len() > folder.len());
    words.map(|word| word.trim_end_matches(['.', '/'])).filter(is_path).collect()
}

#[test]
fn paths_are_found() {
    assert_eq!(
        paths("See `src/a.rs`, [b](docs/b-c.md#d) and tests/e."),
        ["src/a.rs", "docs/b-c.md", "tests/e"]
    );
    assert_eq!(paths("`../src/a.rs` and src/ and https://x.example/src/b"), [""; 0]);
}

/// Where the documentation is made, such lines are left out; where README.md is shown as it is,
/// they are not.
#[test]
fn no_line_of_the_readmes_code_is_hidden() {
    let (readme, mut rust, mut said) = (read("README.md"), false, String::new());
    for (at, line) in readme.lines().enumerate() {
        if let Some(kind) = line.strip_prefix("```") {
            rust = kind.starts_with("rust");
        } else if rust && (line.trim_start() == "#" || line.trim_start().starts_with("# ")) {
            writeln!(said, "README.md:{}: {line}", at + 1).unwrap();
        }
    }
    assert!(said.is_empty(), "lines are hidden in the documentation only:\n{said}");
}
