//! Each rule finds the history that breaks it, and lets the one beside it pass.

use std::path::PathBuf;
use std::time::Duration;

use replite::{Epoch, Txid};
use replite_failover::check::{Finals, check};
use replite_failover::history::{Acknowledged, History, Look, OrderlyEnd, Outcome, Paused, Write};
use replite_failover::node::Kept;
use replite_failover::store::StoreKind;
use replite_failover::world::{LeaseSetting, Setting};

const SECOND: u64 = 1_000_000;

fn epoch(number: u64) -> Epoch {
    Epoch::new(number, 7)
}

/// A write of client `c` that a node acknowledged between two instants, in seconds.
fn acknowledged(op: u64, number: u64, node: &str, began: f64, acked: f64) -> Write {
    let at = |seconds: f64| (seconds * SECOND as f64) as u64;
    Write {
        client: "c".into(),
        op,
        asked: node.into(),
        begin: at(began),
        end: at(acked),
        away: false,
        outcome: Outcome::Acknowledged(Acknowledged {
            txid: Txid::new(epoch(number), op),
            node: node.into(),
            run: node.into(),
            began: at(began),
            acked: at(acked),
        }),
    }
}

fn other(op: u64, outcome: Outcome) -> Write {
    Write { outcome, ..acknowledged(op, 1, "n1", 1.0, 1.1) }
}

fn finals(rows: &[(u64, u64)], lost: &[(&str, &[u64])]) -> Finals {
    let kept = |ops: &[u64]| Kept {
        path: PathBuf::new(),
        fork: None,
        tip: None,
        truncated: false,
        rows: ops.iter().map(|op| ("c".to_string(), *op)).collect(),
        what: String::new(),
    };
    Finals {
        rows: rows.iter().map(|(op, times)| (("c".to_string(), *op), *times)).collect(),
        lost: lost.iter().map(|(node, ops)| (node.to_string(), kept(ops))).collect(),
    }
}

/// The rules that a history breaks.
fn broken(history: &History, finals: &Finals) -> Vec<&'static str> {
    let lease = LeaseSetting {
        store: StoreKind::Directory,
        time: Duration::from_secs(2),
        loss: Duration::from_secs(3),
        drain: Duration::from_secs(5),
    };
    let setting = Setting { nodes: 3, lease: Some(lease), log_bytes: None };
    let (violations, _) = check(history, finals, &setting, 0);
    violations.into_iter().map(|violation| violation.rule).collect()
}

fn of(writes: Vec<Write>) -> History {
    History { writes, ..History::default() }
}

#[test]
fn two_nodes_that_acknowledge_in_one_epoch_are_found() {
    let rows = finals(&[(1, 1), (2, 1)], &[]);
    let history = |second: u64, node: &str| {
        of(vec![acknowledged(1, 1, "n1", 1.0, 1.1), acknowledged(2, second, node, 2.0, 2.1)])
    };
    assert_eq!(broken(&history(1, "n1"), &rows), [""; 0]);
    assert_eq!(broken(&history(2, "n2"), &rows), [""; 0]);
    assert_eq!(broken(&history(1, "n2"), &rows), ["1 one primary"]);
}

#[test]
fn an_older_epoch_acknowledges_nothing_that_began_after_a_newer_one_did() {
    let rows = finals(&[(1, 1), (2, 1)], &[]);
    let history =
        |began: f64| of(vec![acknowledged(1, 2, "n2", 1.0, 1.1), acknowledged(2, 1, "n1", began, 9.0)]);
    // When it was decided is not known.
    assert_eq!(broken(&history(1.05), &rows), [""; 0]);
    assert_eq!(broken(&history(1.2), &rows), ["1 at one time"]);
}

#[test]
fn a_number_is_given_once() {
    let mut writes = vec![acknowledged(1, 1, "n1", 1.0, 1.1), acknowledged(2, 1, "n1", 2.0, 2.1)];
    let same = writes[0].acknowledged().unwrap().txid;
    if let Outcome::Acknowledged(acknowledged) = &mut writes[1].outcome {
        acknowledged.txid = same;
    }
    assert_eq!(broken(&of(writes), &finals(&[(1, 1), (2, 1)], &[])), ["1 numbers"]);
}

#[test]
fn what_was_acknowledged_is_there_once_or_kept() {
    let history = of(vec![acknowledged(1, 1, "n1", 1.0, 1.1)]);
    assert_eq!(broken(&history, &finals(&[(1, 1)], &[])), [""; 0]);
    assert_eq!(broken(&history, &finals(&[], &[("n1", &[1])])), [""; 0]);
    assert_eq!(broken(&history, &finals(&[], &[])), ["2 acknowledged"]);
    assert_eq!(broken(&history, &finals(&[(1, 2)], &[])), ["2 once"]);
    assert_eq!(broken(&history, &finals(&[(1, 1)], &[("n1", &[1])])), ["2 once"]);
    assert_eq!(broken(&history, &finals(&[(1, 1), (9, 1)], &[])), ["2 once"]);
}

#[test]
fn what_only_a_destroyed_node_had_may_be_gone() {
    let mut history = of(vec![acknowledged(1, 1, "n1", 1.0, 1.1)]);
    history.destroyed = vec![("n2".into(), 2 * SECOND), ("n1".into(), SECOND / 2)];
    assert_eq!(broken(&history, &finals(&[], &[])), ["2 acknowledged"]);
    history.destroyed = vec![("n1".into(), 2 * SECOND)];
    assert_eq!(broken(&history, &finals(&[], &[])), [""; 0]);
}

#[test]
fn what_was_not_executed_is_never_there_and_what_is_not_known_at_most_once() {
    let refused = of(vec![other(1, Outcome::NotExecuted(String::new()))]);
    assert_eq!(broken(&refused, &finals(&[], &[])), [""; 0]);
    assert_eq!(broken(&refused, &finals(&[(1, 1)], &[])), ["2 not executed"]);
    assert_eq!(broken(&refused, &finals(&[], &[("n1", &[1])])), ["2 not executed"]);
    let unknown = of(vec![other(1, Outcome::Unknown(String::new()))]);
    assert_eq!(broken(&unknown, &finals(&[], &[])), [""; 0]);
    assert_eq!(broken(&unknown, &finals(&[(1, 1)], &[])), [""; 0]);
    assert_eq!(broken(&unknown, &finals(&[(1, 2)], &[])), ["2 once"]);
}

#[test]
fn losses_have_a_bound_and_where_replicas_are_connected_another_one() {
    let history = |acked: f64, lossy: bool| History {
        writes: vec![acknowledged(1, 1, "n1", acked - 0.1, acked), acknowledged(2, 1, "n1", 10.0, 10.1)],
        lossy: if lossy { vec![(0, 20 * SECOND)] } else { Vec::new() },
        ..History::default()
    };
    let lost = finals(&[(2, 1)], &[("n1", &[1])]);
    assert_eq!(broken(&history(9.0, true), &lost), [""; 0]);
    assert_eq!(broken(&history(9.0, false), &lost), [""; 0]);
    assert_eq!(broken(&history(6.0, true), &lost), [""; 0]);
    assert_eq!(broken(&history(6.0, false), &lost), ["2 connected"]);
    assert_eq!(broken(&history(1.0, true), &lost), ["2 bound"]);
}

#[test]
fn an_orderly_end_loses_nothing() {
    let history = |trouble: Option<u64>| History {
        writes: vec![acknowledged(1, 1, "n1", 9.9, 10.0)],
        orderly: vec![OrderlyEnd { node: "n1".into(), begin: 10 * SECOND, end: 11 * SECOND }],
        troubled: trouble.map(|at| (at * SECOND, at * SECOND)).into_iter().collect(),
        ..History::default()
    };
    let lost = finals(&[], &[("n1", &[1])]);
    assert_eq!(broken(&history(None), &lost), ["3 orderly"]);
    assert_eq!(broken(&history(Some(2)), &lost), ["3 orderly"]);
    assert_eq!(broken(&history(Some(8)), &lost), [""; 0]);
}

#[test]
fn while_elections_are_paused_only_the_holder_leads() {
    let paused = || vec![Paused { holder: "n1".into(), begin: 2 * SECOND, end: 9 * SECOND }];
    let rows = finals(&[(1, 1)], &[]);
    let wrote = |node: &str, began: f64| {
        let writes = vec![acknowledged(1, 2, node, began, began + 0.1)];
        broken(&History { writes, paused: paused(), ..History::default() }, &rows)
    };
    assert_eq!(wrote("n1", 5.0), [""; 0]);
    assert_eq!(wrote("n2", 1.95), [""; 0]);
    assert_eq!(wrote("n2", 9.1), [""; 0]);
    assert_eq!(wrote("n2", 5.0), ["8 paused"]);
    let led = |node: &str, role: &str| {
        let (begin, end) = (5 * SECOND, 6 * SECOND);
        let look = Look { begin, end, node: node.into(), role: role.into(), epoch: epoch(2), position: None };
        broken(&History { looks: vec![look], paused: paused(), ..History::default() }, &finals(&[], &[]))
    };
    assert_eq!(led("n1", "primary"), [""; 0]);
    assert_eq!(led("n2", "waiting"), [""; 0]);
    assert_eq!(led("n2", "primary"), ["8 paused"]);
}
