//! Where the sources and the documents are, and which of the sources is built without tests.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::module::Module;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Whether there is such a file or folder.
pub(crate) fn exists(name: &str) -> bool {
    root().join(name).exists()
}

/// The files below `dir` with this ending, by their names from the root on, in order.
pub(crate) fn files(dir: &str, ending: &str) -> Vec<String> {
    let mut found = Vec::new();
    collect(&root().join(dir), ending, &mut found);
    let name = |path: &PathBuf| path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
    let mut names: Vec<String> = found.iter().map(name).collect();
    names.sort();
    assert!(!names.is_empty(), "no file in {dir} ends with .{ending}");
    names
}

fn collect(dir: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, ending, found);
        } else if path.extension().is_some_and(|e| e == ending) {
            found.push(path);
        }
    }
}

/// The crate's modules, without those that are built for tests only. The root comes first.
pub(crate) fn modules() -> &'static [Module] {
    static MODULES: OnceLock<Vec<Module>> = OnceLock::new();
    MODULES.get_or_init(|| {
        let mut all = Vec::new();
        let mut waiting = VecDeque::from([("src/lib.rs".to_string(), Vec::new())]);
        while let Some((file, path)) = waiting.pop_front() {
            for module in Module::read(&file, &path, &read(&file)) {
                let child = |name: &String| {
                    let path: Vec<String> = module.path.iter().chain([name]).cloned().collect();
                    (format!("src/{}.rs", path.join("/")), path)
                };
                waiting.extend(module.declared.iter().map(child));
                all.push(module);
            }
        }
        all
    })
}
