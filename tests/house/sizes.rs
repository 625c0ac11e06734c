//! Short files, short functions, and one meaning for the name of a type.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::module::Module;
use crate::sources::modules;

/// The longest file, in lines, without what is built for tests only.
const FILE_LINES: usize = 500;

/// May be longer. It is one table with a row for each condition, and a reader looks up one row.
const TABLES: [&str; 1] = ["src/report/conditions.rs"];

/// The longest function, in lines.
const FUNCTION_LINES: usize = 70;

#[test]
fn files_are_short() {
    let mut said = String::new();
    let too_long = |module: &&Module| module.lines > FILE_LINES && !TABLES.contains(&module.file.as_str());
    for module in modules().iter().filter(too_long) {
        writeln!(said, "{}: {} lines", module.file, module.lines).unwrap();
    }
    assert!(said.is_empty(), "files have more than {FILE_LINES} lines without their tests:\n{said}");
}

#[test]
fn functions_are_short() {
    let mut said = String::new();
    for module in modules() {
        for function in module.functions.iter().filter(|function| function.lines > FUNCTION_LINES) {
            let (file, line) = (&module.file, function.line);
            writeln!(said, "{file}:{line}: {} has {} lines", function.name, function.lines).unwrap();
        }
    }
    assert!(said.is_empty(), "functions have more than {FUNCTION_LINES} lines:\n{said}");
}

/// Two types in one module, as for two systems, mean the same.
#[test]
fn a_type_name_means_one_thing() {
    let mut places: BTreeMap<&str, BTreeMap<&[String], String>> = BTreeMap::new();
    for module in modules() {
        for (line, name) in &module.types {
            places.entry(name).or_default().insert(&module.path, format!("{}:{line}", module.file));
        }
    }
    let mut said = String::new();
    for (name, places) in places.iter().filter(|(_, places)| places.len() > 1) {
        let places: Vec<&str> = places.values().map(String::as_str).collect();
        writeln!(said, "{name}: {}", places.join(", ")).unwrap();
    }
    assert!(said.is_empty(), "names of types mean two things:\n{said}");
}
