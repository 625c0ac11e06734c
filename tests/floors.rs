//! The house's walls: modules import from lower floors only, and `unsafe` is in two files.

use std::fs;
use std::path::{Path, PathBuf};

/// Each top module and its floor.
const FLOORS: [(&str, u8); 30] = [
    ("txid", 0),
    ("page", 0),
    ("checksum", 0),
    ("error", 1),
    ("status", 1),
    ("secret", 1),
    ("applied", 1),
    ("metrics", 1),
    ("node", 1),
    ("session", 1),
    ("threads", 1),
    ("token", 1),
    ("wal", 2),
    ("wire", 2),
    ("side", 3),
    ("sqlite", 3),
    ("log", 3),
    ("lease", 3),
    ("net", 3),
    ("handshake", 3),
    ("engine", 4),
    ("primary", 5),
    ("replica", 5),
    ("server", 6),
    ("proxy", 6),
    ("axum", 6),
    ("db", 7),
    ("testing", 8),
    ("fuzz", 8),
    ("lib", 9),
];

fn sources(dir: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|e| e == "rs") {
            all.push(path);
        }
    }
}

fn each(mut check: impl FnMut(&str, &str, &str)) {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    sources(&src, &mut all);
    for path in all {
        let name = path.strip_prefix(&src).unwrap().to_string_lossy().replace('\\', "/");
        if name.contains("tests") || name.contains("fake") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let module = name.split('/').next().unwrap().trim_end_matches(".rs").to_string();
        check(&module, &name, text);
    }
}

fn floor(module: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor)
}

#[test]
fn imports_point_down() {
    let mut wrong = Vec::new();
    each(|module, name, text| {
        let here = floor(module).unwrap_or_else(|| panic!("{module} stands on no floor"));
        for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
            for part in line.split("crate::").skip(1) {
                let word: String = part.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
                // Within a floor modules may know each other; what is not a module is an item of the root.
                if floor(&word).is_some_and(|there| there > here) {
                    wrong.push(format!("{name} (floor {here}) imports {word}: {}", line.trim()));
                }
            }
        }
    });
    // The words of a history are refused by the crate's one error.
    wrong.retain(|w| !(w.contains("(floor 0)") && w.contains("imports error")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_is_in_two_files_and_argued() {
    each(|_, name, text| {
        let blocks = text.lines().filter(|l| {
            let line = l.trim_start();
            !line.starts_with("//") && (line.contains("unsafe {") || line.starts_with("unsafe impl"))
        });
        let count = blocks.count();
        if count > 0 {
            assert!(matches!(name, "sqlite/ffi.rs" | "sqlite/shm.rs"), "unsafe code in {name}");
            let argued = text.matches("SAFETY:").count();
            assert!(argued >= count, "{name}: {count} unsafe places, {argued} arguments");
        }
    });
}
