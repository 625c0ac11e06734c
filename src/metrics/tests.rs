use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::*;
use crate::status::Role;

const BOARD: &str = include_str!("../../docs/grafana/replite.json");
const GUIDE: &str = include_str!("../../docs/guide.md");

fn names() -> BTreeSet<&'static str> {
    let counters = COUNTERS.iter().map(|counter| counter.name);
    GAUGES.iter().map(|gauge| gauge.name).chain(counters).collect()
}

#[test]
fn gauges_of_one_name_are_together_and_differ_in_their_label_alone() {
    let mut seen = BTreeSet::new();
    for gauges in GAUGES.chunk_by(|one, next| one.name == next.name) {
        assert!(seen.insert(gauges[0].name), "{} is at two places", gauges[0].name);
        let labels: BTreeSet<_> = gauges.iter().map(|gauge| gauge.label).collect();
        assert_eq!(labels.len(), gauges.len(), "{}", gauges[0].name);
        assert!(gauges.iter().all(|gauge| gauge.help == gauges[0].help && gauge.unit == gauges[0].unit));
    }
    for gauge in GAUGES {
        let unit = match gauge.name.rsplit('_').next() {
            Some("bytes") => GaugeUnit::Bytes,
            Some("seconds") => GaugeUnit::Seconds,
            _ => GaugeUnit::Number,
        };
        assert_eq!(gauge.unit, unit, "{}", gauge.name);
        assert!(!gauge.name.ends_with("_total"), "{} is named like a counter", gauge.name);
    }
    for counter in COUNTERS {
        assert!(counter.name.starts_with("replite_") && counter.name.ends_with("_total"), "{}", counter.name);
    }
}

#[test]
fn each_role_has_a_gauge() {
    let roles: BTreeSet<String> =
        GAUGES.iter().filter_map(|gauge| gauge.label).map(|(_, role)| role.to_string()).collect();
    let all = [
        Role::Primary,
        Role::Replica,
        Role::Starting,
        Role::Electing,
        Role::Waiting,
        Role::Promoting,
        Role::Fencing,
        Role::Stopped,
    ];
    for role in all {
        // A new one has to be put into the list above.
        match role {
            Role::Primary | Role::Replica | Role::Starting | Role::Electing => {}
            Role::Waiting | Role::Promoting | Role::Fencing | Role::Stopped => {}
        }
    }
    assert_eq!(roles, all.iter().map(ToString::to_string).collect());
}

#[test]
fn the_guide_names_each_gauge_and_no_other() {
    let named: BTreeSet<&str> = GUIDE
        .split('`')
        .filter(|word| word.starts_with("replite_"))
        .filter(|word| word.chars().all(|c| c == '_' || c.is_ascii_lowercase()))
        .collect();
    assert_eq!(named, names());
}

/// All texts in the board that are queries.
fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if name == "expr" || name == "query" || name == "definition" => {
                        found.push(text.clone());
                    }
                    other => queries(other, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[test]
fn the_board_asks_for_what_there_is() {
    let board: Value = serde_json::from_str(BOARD).unwrap();
    let mut found = Vec::new();
    queries(&board, &mut found);
    let is_name = |c: char| c == '_' || c.is_ascii_alphanumeric();
    let asked: BTreeSet<&str> = found
        .iter()
        .flat_map(|query| query.split(|c| !is_name(c)))
        .filter(|word| word.starts_with("replite_"))
        .collect();
    let unknown: Vec<_> = asked.difference(&names()).copied().collect();
    assert!(unknown.is_empty(), "the board asks for {unknown:?}");
    assert!(asked.len() > 20, "the board asks for {asked:?} only");

    let panels = board["panels"].as_array().unwrap();
    let mut ids = BTreeMap::new();
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap(), title).is_none(), "{title}: its id is another's");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty() && targets.iter().all(|target| target["expr"].is_string()), "{title}");
        for target in targets {
            let query = target["expr"].as_str().unwrap();
            assert!(query.contains("database=~\"$database\""), "{title}: {query}");
        }
    }
    let variables: BTreeSet<&str> = board["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| variable["name"].as_str().unwrap())
        .collect();
    assert!(["datasource", "database", "instance"].iter().all(|name| variables.contains(name)));
}
