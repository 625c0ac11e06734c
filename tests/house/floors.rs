//! The walls that ARCHITECTURE.md and `src/engine.rs` describe: which module may import which.
//!
//! Both tables are read from where they stand, so a table that says something else fails here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use crate::graph::{Graph, Need, Target, needs};
use crate::sources::{modules, read};

/// The top modules and their floors, from the table of ARCHITECTURE.md.
pub(crate) fn floors() -> BTreeMap<String, u8> {
    let mut floors = BTreeMap::new();
    for row in rows(&read("ARCHITECTURE.md")) {
        let Some(floor) = row[0].split(' ').next().and_then(|number| number.parse().ok()) else { continue };
        for module in in_backticks(&row[1]) {
            assert!(floors.insert(module.clone(), floor).is_none(), "{module} stands on two floors");
        }
    }
    floors
}

/// The engine's rooms and their places, from the table in `src/engine.rs`. Several in a row have
/// one place.
fn rooms() -> BTreeMap<String, usize> {
    let source = read("src/engine.rs");
    let comment: Vec<&str> = source.lines().map_while(|line| line.strip_prefix("//!")).collect();
    let rows = rows(&comment.join("\n"));
    let places = rows
        .iter()
        .enumerate()
        .flat_map(|(place, row)| in_backticks(&row[0]).into_iter().map(move |room| (room, place)));
    places.collect()
}

/// The rows of a document's tables. The first cell has its text, and so on.
fn rows(text: &str) -> Vec<Vec<String>> {
    let rows = text.lines().filter_map(|line| line.trim().strip_prefix('|')?.strip_suffix('|'));
    let cells = |row: &str| row.split('|').map(|cell| cell.trim().to_string()).collect();
    rows.map(cells).filter(|row: &Vec<String>| row.len() > 1).collect()
}

fn in_backticks(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_string).collect()
}

fn children(of: &[&str]) -> BTreeSet<String> {
    let below = modules().iter().filter(|m| m.path.len() == of.len() + 1 && m.path[..of.len()] == *of);
    below.map(|m| m.path[of.len()].clone()).collect()
}

/// A need of one child of a folder for another one.
struct Edge<'a> {
    from: &'a str,
    to: &'a str,
    need: &'a Need,
}

/// What the children of the folder `of` need of one another.
fn edges<'a>(needs: &'a [Need], of: &'a [String]) -> impl Iterator<Item = Edge<'a>> {
    let child = move |path: &'a Vec<String>| path.strip_prefix(of)?.first().map(String::as_str);
    needs.iter().filter_map(move |need| {
        let Target::Module(to) = &need.to else { return None };
        let (from, to) = (child(&need.from.path)?, child(to)?);
        (from != to).then_some(Edge { from, to, need })
    })
}

fn assert_none(violations: &[String], what: &str) {
    let mut said = String::new();
    for violation in violations {
        writeln!(said, "{violation}").unwrap();
    }
    assert!(said.is_empty(), "{} {what}:\n{said}", violations.len());
}

#[test]
fn each_top_module_stands_on_a_floor() {
    let floors: BTreeSet<String> = floors().into_keys().collect();
    let here = children(&[]);
    let missing: Vec<&String> = here.difference(&floors).collect();
    let gone: Vec<&String> = floors.difference(&here).collect();
    assert!(missing.is_empty(), "the table of floors in ARCHITECTURE.md does not have {missing:?}");
    assert!(gone.is_empty(), "the table of floors in ARCHITECTURE.md has {gone:?}, src does not");
}

#[test]
fn imports_point_down() {
    let floors = floors();
    let needs = needs();
    let mut wrong = Vec::new();
    for Edge { from, to, need } in edges(&needs, &[]) {
        let (Some(here), Some(there)) = (floors.get(from), floors.get(to)) else { continue };
        if there > here {
            wrong.push(format!("{}: {from} (floor {here}) imports {to} (floor {there})", need.place()));
        }
    }
    assert_none(&wrong, "imports point up");
}

#[test]
fn a_floor_has_no_circle() {
    let floors = floors();
    let needs = needs();
    let mut graph = Graph::default();
    for Edge { from, to, need } in edges(&needs, &[]) {
        if floors.get(from) == floors.get(to) {
            graph.add(from, to, need.place());
        }
    }
    assert_none(&graph.circles(), "imports are parts of circles");
}

/// A module and the one that has it may know each other. Its children do not.
#[test]
fn a_folder_has_no_circle() {
    let needs = needs();
    let mut circles = Vec::new();
    for folder in modules().iter().filter(|module| !module.path.is_empty()) {
        let mut graph = Graph::default();
        for Edge { from, to, need } in edges(&needs, &folder.path) {
            graph.add(from, to, need.place());
        }
        circles.extend(graph.circles().into_iter().map(|circle| format!("{}: {circle}", folder.name())));
    }
    assert_none(&circles, "imports are parts of circles");
}

#[test]
fn rooms_of_the_engine_import_from_rooms_above_them() {
    let rooms = rooms();
    let described: BTreeSet<String> = rooms.keys().cloned().collect();
    assert_eq!(described, children(&["engine"]), "the table in src/engine.rs and the engine's rooms");
    let engine = ["engine".to_string()];
    let needs = needs();
    let mut wrong = Vec::new();
    for Edge { from, to, need } in edges(&needs, &engine) {
        if rooms[to] > rooms[from] {
            wrong.push(format!("{}: {from} imports {to}, a room below it", need.place()));
        }
    }
    assert_none(&wrong, "imports point down in the table of src/engine.rs");
}

/// What both roles need is in other rooms.
#[test]
fn capture_and_apply_do_not_know_each_other() {
    let engine = ["engine".to_string()];
    let needs = needs();
    let both = edges(&needs, &engine)
        .filter(|edge| matches!((edge.from, edge.to), ("capture", "apply") | ("apply", "capture")));
    let both: Vec<String> = both.map(|edge| format!("{}: {}", edge.need.place(), edge.from)).collect();
    assert_none(&both, "imports of one role's room in the other's");
}
