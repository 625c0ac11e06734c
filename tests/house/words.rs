//! What a floor does without: the clock, files, the network, threads of its own, `unsafe`.

use std::fmt::Write;

use crate::floors::floors;
use crate::graph::{Target, needs};
use crate::module::Module;
use crate::sources::{modules, read};

/// The only files with `unsafe`, each use of it argued.
const UNSAFE: [&str; 2] = ["src/sqlite/ffi.rs", "src/sqlite/shm.rs"];

/// What speaks over the network, or makes it easy.
const NETWORK: [&str; 7] = ["tokio::net", "std::net", "http", "hyper", "hyper_util", "h2", "tower"];

/// What makes a file or a directory.
const MAKES_FILES: [&str; 7] = [
    "std::fs::File::create",
    "std::fs::File::create_new",
    "std::fs::write",
    "std::fs::copy",
    "std::fs::create_dir",
    "std::fs::create_dir_all",
    "std::fs::DirBuilder",
];

/// Paths that some modules do without.
struct Rule {
    why: &'static str,
    of: Where,
    without: &'static [&'static str],
    /// Paths below these are allowed all the same.
    but: &'static [&'static str],
}

enum Where {
    Floors(&'static [u8]),
    Modules(&'static [&'static str]),
    AllBut(&'static [&'static str]),
}

const RULES: [Rule; 12] = [
    Rule {
        why: "words know nothing of what runs",
        of: Where::Floors(&[0]),
        without: &[
            "std::fs",
            "std::io",
            "std::net",
            "std::sync",
            "std::thread",
            "std::time",
            "tokio",
            "tracing",
        ],
        but: &[],
    },
    Rule {
        why: "data is in memory",
        of: Where::Floors(&[1]),
        without: &["std::fs", "tokio::fs", "tokio::net", "std::net", "http", "hyper", "h2", "tower"],
        but: &["std::net::IpAddr", "std::net::SocketAddr"],
    },
    Rule {
        why: "formats are bytes in, bytes out",
        of: Where::Floors(&[2]),
        without: &[
            "std::fs",
            "std::io",
            "std::net",
            "std::sync",
            "std::thread",
            "std::time",
            "tokio",
            "tracing",
            "rusqlite",
        ],
        but: &["std::time::Duration"],
    },
    Rule {
        why: "files and SQLite have no network",
        of: Where::Modules(&["sqlite", "log", "files", "lock"]),
        without: &NETWORK,
        but: &[],
    },
    Rule { why: "the engine has no network", of: Where::Floors(&[4]), without: &NETWORK, but: &[] },
    Rule {
        why: "the engine runs on threads; tasks only wait for it",
        of: Where::Floors(&[4]),
        without: &["tokio"],
        but: &["tokio::sync"],
    },
    Rule {
        why: "`files` makes what is beside a database, or others could read it",
        of: Where::Modules(&["log", "engine", "primary", "replica", "db::identity", "db::open_files"]),
        without: &MAKES_FILES,
        but: &[],
    },
    Rule {
        why: "`files` opens what is beside a database, and follows no link",
        of: Where::AllBut(&["files", "sqlite::locks", "engine::file::wal_file", "engine::file::modified"]),
        without: &["std::fs::OpenOptions", "std::fs::File::options"],
        but: &[],
    },
    Rule {
        why: "roles reach a database and a peer through the floors below",
        of: Where::Floors(&[5]),
        without: &[
            "std::fs",
            "tokio::fs",
            "rusqlite",
            "std::thread",
            "tokio::net",
            "std::net",
            "hyper",
            "tower",
        ],
        but: &[],
    },
    Rule {
        why: "doors have no file",
        of: Where::Floors(&[6]),
        without: &["std::fs", "tokio::fs", "std::thread"],
        but: &[],
    },
    Rule {
        why: "the handle speaks to other nodes through the doors and roles",
        of: Where::Floors(&[7]),
        without: &NETWORK,
        but: &["std::net::IpAddr", "std::net::SocketAddr", "http::Uri"],
    },
    Rule {
        why: "`threads::start` starts threads, or a panic would end one in silence",
        of: Where::AllBut(&["threads", "engine::check::verify"]),
        without: &["std::thread::spawn", "std::thread::Builder", "std::thread::scope"],
        but: &[],
    },
];

impl Rule {
    fn concerns(&self, module: &Module, floor: Option<u8>) -> bool {
        let is_in = |name: &&str| {
            let path: Vec<&str> = name.split("::").collect();
            module.path.len() >= path.len() && module.path[..path.len()] == path
        };
        match self.of {
            Where::Floors(floors) => floor.is_some_and(|floor| floors.contains(&floor)),
            Where::Modules(names) => names.iter().any(is_in),
            Where::AllBut(names) => !names.iter().any(is_in),
        }
    }

    fn forbids(&self, path: &[String]) -> bool {
        let is_below = |name: &&str| {
            let name: Vec<&str> = name.split("::").collect();
            path.len() >= name.len() && path[..name.len()] == name
        };
        self.without.iter().any(is_below) && !self.but.iter().any(is_below)
    }
}

#[test]
fn floors_do_without_what_is_not_theirs() {
    let floors = floors();
    let mut said = String::new();
    for need in needs() {
        let Target::Outside(path) = &need.to else { continue };
        let floor = need.from.path.first().and_then(|top| floors.get(top)).copied();
        for rule in RULES.iter().filter(|rule| rule.concerns(need.from, floor) && rule.forbids(path)) {
            writeln!(said, "{}: {} ({})", need.place(), path.join("::"), rule.why).unwrap();
        }
    }
    assert!(said.is_empty(), "{} paths are not for their floor:\n{said}", said.lines().count());
}

#[test]
fn unsafe_code_is_in_two_files_and_argued() {
    for module in modules() {
        let Some(first) = module.unsafe_at.first() else { continue };
        assert!(UNSAFE.contains(&module.file.as_str()), "{}:{first}: unsafe code", module.file);
        let argued = read(&module.file).matches("SAFETY:").count();
        let blocks = module.unsafe_blocks;
        assert!(argued >= blocks, "{}: {blocks} unsafe places, {argued} arguments", module.file);
    }
}

/// Bad input is an error, and a broken invariant says which one.
#[test]
fn no_code_is_left_to_be_written_or_to_panic_in_silence() {
    let mut said = String::new();
    for module in modules().iter().filter(|module| module.path.first().is_none_or(|top| top != "testing")) {
        for (line, word) in &module.shortcuts {
            writeln!(said, "{}:{line}: {word}", module.file).unwrap();
        }
    }
    assert!(said.is_empty(), "{} words that are for tests and drafts:\n{said}", said.lines().count());
}
