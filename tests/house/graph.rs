//! Which module needs which: paths are followed through re-exports to the module that has the item.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::module::Module;
use crate::sources::modules;

/// A `use` or a path in the code, and where it leads.
pub(crate) struct Need {
    pub(crate) from: &'static Module,
    pub(crate) line: usize,
    pub(crate) to: Target,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Target {
    /// A module of the crate: the one that was named, or the one that has what was named.
    Module(Vec<String>),
    /// A path that does not begin in the crate.
    Outside(Vec<String>),
}

impl Need {
    pub(crate) fn place(&self) -> String {
        format!("{}:{}", self.from.file, self.line)
    }
}

/// All that the crate's modules need.
pub(crate) fn needs() -> Vec<Need> {
    let crate_ = Crate::new(modules());
    let mut needs = Vec::new();
    for from in modules() {
        let uses = from.uses.iter().map(|u| (u.line, &u.path, true));
        let paths = from.paths.iter().map(|(line, path)| (*line, path, false));
        for (line, path, of_use) in uses.chain(paths) {
            needs.push(Need { from, line, to: crate_.resolve(from, path, of_use) });
        }
    }
    needs
}

struct Crate<'a> {
    modules: HashMap<&'a [String], &'a Module>,
}

impl<'a> Crate<'a> {
    fn new(modules: &'a [Module]) -> Crate<'a> {
        Crate { modules: modules.iter().map(|module| (module.path.as_slice(), module)).collect() }
    }

    /// Where a path leads that stands in `from`. A path of a `use` may begin with a name that the
    /// same `use` brings in, as in `use serde::{self}`; it is the outside crate then.
    fn resolve(&self, from: &'a Module, path: &[String], of_use: bool) -> Target {
        let mut here = from;
        let mut rest = path;
        while let Some((first, after)) = rest.split_first() {
            here = match first.as_str() {
                "crate" => self.modules[&[] as &[String]],
                "self" => here,
                "super" => self.modules[&here.path[..here.path.len() - 1]],
                _ => break,
            };
            rest = after;
        }
        if rest.len() < path.len() {
            self.descend(here, rest, 0)
        } else {
            self.relative(from, path, of_use, 0)
        }
    }

    fn relative(&self, from: &'a Module, path: &[String], of_use: bool, hops: usize) -> Target {
        let bound = from.uses.iter().any(|u| u.name == path[0] && !(of_use && u.path[0] == path[0]));
        if bound || self.child(from, &path[0]).is_some() {
            self.descend(from, path, hops)
        } else {
            Target::Outside(path.to_vec())
        }
    }

    fn child(&self, of: &Module, name: &String) -> Option<&'a Module> {
        let path: Vec<String> = of.path.iter().chain([name]).cloned().collect();
        self.modules.get(path.as_slice()).copied()
    }

    /// From a module to the end of a path: through its modules and what it imports.
    fn descend(&self, here: &'a Module, path: &[String], hops: usize) -> Target {
        assert!(hops < 50, "{} imports {} in a circle", here.name(), path.join("::"));
        let Some((first, rest)) = path.split_first() else { return Target::Module(here.path.clone()) };
        if let Some(child) = self.child(here, first) {
            return self.descend(child, rest, hops + 1);
        }
        let Some(import) = here.uses.iter().find(|u| u.name == *first) else {
            return Target::Module(here.path.clone());
        };
        let whole: Vec<String> = import.path.iter().chain(rest).cloned().collect();
        match whole[0].as_str() {
            "crate" | "self" | "super" => self.resolve(here, &whole, true),
            _ if whole[0] == *first && self.child(here, first).is_none() => Target::Outside(whole),
            _ => self.relative(here, &whole, true, hops + 1),
        }
    }
}

// ---- circles

/// Which needs which, with a place that shows it.
#[derive(Default)]
pub(crate) struct Graph {
    edges: BTreeMap<String, BTreeMap<String, String>>,
}

impl Graph {
    pub(crate) fn add(&mut self, from: &str, to: &str, place: String) {
        self.edges.entry(from.to_string()).or_default().entry(to.to_string()).or_insert(place);
    }

    /// The needs that are part of a circle, a line each.
    pub(crate) fn circles(&self) -> Vec<String> {
        let mut circles = Vec::new();
        for (from, edges) in &self.edges {
            for (to, place) in edges {
                if self.reached(to).contains(from) {
                    circles.push(format!("{from} -> {to} ({place})"));
                }
            }
        }
        circles
    }

    fn reached(&self, from: &str) -> BTreeSet<String> {
        let mut reached = BTreeSet::new();
        let mut waiting = vec![from.to_string()];
        while let Some(next) = waiting.pop() {
            let edges = self.edges.get(&next);
            waiting.extend(
                edges.into_iter().flat_map(|e| e.keys()).filter(|to| !reached.contains(*to)).cloned(),
            );
            reached.insert(next);
        }
        reached
    }
}

// ---- that it follows paths

fn target(sources: &[(&str, &str)], from: &str, path: &str, of_use: bool) -> Target {
    let split =
        |path: &str| path.split("::").filter(|p| !p.is_empty()).map(str::to_string).collect::<Vec<_>>();
    let modules: Vec<Module> =
        sources.iter().flat_map(|(path, text)| Module::read(path, &split(path), text)).collect();
    let crate_ = Crate::new(&modules);
    crate_.resolve(crate_.modules[split(from).as_slice()], &split(path), of_use)
}

#[test]
fn paths_lead_to_the_module_that_has_the_item() {
    let sources = [
        ("", "pub use a::X; mod a; mod b;"),
        ("a", "pub use b::X; mod b; pub use std::fs;"),
        ("a::b", "pub struct X; use super::Y; use crate::b as c; use serde::{self, Z};"),
        ("b", "use crate::a; fn f() { a::b::g() }"),
    ];
    let module = |path: &str| Target::Module(path.split("::").map(str::to_string).collect());
    let outside = |path: &str| Target::Outside(path.split("::").map(str::to_string).collect());
    let cases = [
        ("b", "crate::X", module("a::b")),
        ("b", "crate::X::new", module("a::b")),
        ("b", "a::X", module("a::b")),
        ("b", "a::b", module("a::b")),
        ("b", "a::fs::File", outside("std::fs::File")),
        ("a::b", "super::Y", module("a")),
        ("a::b", "super::super::b::q", module("b")),
        ("a::b", "c::q", module("b")),
        ("a::b", "self::X", module("a::b")),
        ("a::b", "Vec::new", outside("Vec::new")),
        ("a::b", "serde::de::A", outside("serde::de::A")),
    ];
    for (from, path, expected) in cases {
        assert_eq!(target(&sources, from, path, false), expected, "{path} in {from}");
    }
    assert_eq!(target(&sources, "a::b", "serde::Z", true), outside("serde::Z"));
}

#[test]
fn circles_are_found() {
    let mut graph = Graph::default();
    for (from, to) in [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d"), ("d", "e")] {
        graph.add(from, to, "here".to_string());
    }
    assert_eq!(graph.circles(), ["b -> c (here)", "c -> b (here)"]);
}
