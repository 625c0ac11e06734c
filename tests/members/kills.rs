//! Members that are killed, each a process of its own.

use std::time::{Duration, Instant};

use crate::node::{Node, primary};
use crate::support::until;
use crate::world::{LOOK, TIME, World};

/// How often a leader is killed.
const ROUNDS: usize = 5;

/// Waits until all agree on a leader of the members, and one is the primary whose state the others
/// have.
fn settle(nodes: &mut [Node]) -> usize {
    let place = primary(nodes);
    let mut all = || {
        let looks: Vec<_> = nodes.iter_mut().map(Node::look).collect();
        looks.iter().all(|look| look.agree() && look.leader() == looks[0].leader())
            && looks[0].leader().is_some()
    };
    until("one leader of the members", &mut all);
    place
}

/// Starts again what leads the members and is the primary, until two nodes are these.
fn part(world: &World, nodes: &mut Vec<Node>) -> (usize, usize) {
    loop {
        let leads = settle(nodes);
        let look = nodes[leads].look();
        let raft = nodes.iter().position(|node| Some(node.url.as_str()) == look.leader());
        match raft {
            Some(raft) if raft != leads && look.is_primary() => return (leads, raft),
            _ => {
                let both = nodes.remove(leads);
                let number = both.number;
                both.end();
                primary(nodes);
                nodes.push(Node::start(world, number));
            }
        }
    }
}

#[test]
fn the_loss_of_a_raft_leader_elsewhere_costs_no_write() {
    let world = World::new(3);
    let mut nodes = Node::start_all(&world);
    let mut longest = Duration::ZERO;
    for round in 0..ROUNDS {
        let (leads, raft) = part(&world, &mut nodes);
        nodes[leads].write();
        let url = nodes[leads].url.clone();
        let gone = nodes.remove(raft);
        let (number, was) = (gone.number, gone.url.clone());
        gone.kill();
        let killed = Instant::now();
        let at = nodes.iter().position(|node| node.url == url).unwrap();
        // It goes on for longer than the lease that it had then: that was renewed by another one.
        until("another leader of the members", || {
            let look = nodes[at].look();
            look.leader().is_some_and(|leader| leader != was)
        });
        let elected = killed.elapsed();
        while killed.elapsed() < TIME * 3 / 2 {
            std::thread::park_timeout(LOOK);
        }
        let (last, took, failed) = nodes[at].written();
        assert_eq!(failed, [""; 0], "round {round}");
        assert!(took < TIME, "round {round}: a write took {took:?}");
        assert!(nodes[at].look().is_primary() && last > 10);
        longest = longest.max(took);
        eprintln!("round {round}: another Raft leader within {elected:?}; the longest write took {took:?}");
        nodes.push(Node::start(&world, number));
    }
    eprintln!("the longest write took {longest:?}");
}

#[test]
fn the_loss_of_the_primary_makes_another_within_the_lease_time() {
    let world = World::new(3);
    let mut nodes = Node::start_all(&world);
    for round in 0..2 {
        let leads = settle(&mut nodes);
        let raft = nodes[leads].look().leader() == Some(nodes[leads].url.as_str());
        nodes[leads].write();
        let (acknowledged, ..) = nodes[leads].written();
        until("the others have it", || {
            nodes.iter_mut().all(|node| node.look().last().is_some_and(|last| last >= acknowledged))
        });
        let gone = nodes.remove(leads);
        let number = gone.number;
        let last = gone.kill().unwrap_or(acknowledged);
        let killed = Instant::now();
        let next = primary(&mut nodes);
        let took = killed.elapsed();
        let has = nodes[next].look().last().unwrap();
        eprintln!(
            "round {round}: another primary after {took:?}; the last one led Raft: {raft}; \
             acknowledged {last}, there {has}"
        );
        assert!(took < (TIME + Duration::from_secs(1)) * 3, "{took:?}");
        assert!(has >= acknowledged, "{has} of {acknowledged}");
        nodes.push(Node::start(&world, number));
        until("it follows", || nodes.last_mut().unwrap().look().last().is_some_and(|last| last >= has));
    }
}

#[test]
fn a_minority_never_elects() {
    let world = World::new(3);
    let mut nodes = Node::start_all(&world);
    let leads = settle(&mut nodes);
    let mut others: Vec<usize> = Vec::new();
    // The primary and another one.
    let left = (leads + 1) % 3;
    for place in (0..3).rev().filter(|place| *place != left) {
        let gone = nodes.remove(place);
        others.push(gone.number);
        gone.kill();
    }
    let left = &mut nodes[0];
    until("what is wrong", || left.look().words().contains("no leader of the members"));
    let since = Instant::now();
    while since.elapsed() < TIME * 2 {
        let look = left.look();
        assert!(!look.is_primary() && !look.agree(), "{look:?}");
        std::thread::park_timeout(LOOK);
    }
    nodes.push(Node::start(&world, others[0]));
    let next = primary(&mut nodes);
    nodes[next].write();
}

#[test]
fn a_primary_without_the_others_fences_itself_until_one_comes_back() {
    let world = World::new(3);
    let mut nodes = Node::start_all(&world);
    let leads = settle(&mut nodes);
    nodes[leads].write();
    let mut alone = nodes.remove(leads);
    let gone: Vec<usize> = nodes.iter().map(|node| node.number).collect();
    for node in nodes {
        node.kill();
    }
    let killed = Instant::now();
    let mut failed = Vec::new();
    until("the end of its writes", || {
        failed = alone.written().2;
        !failed.is_empty()
    });
    let took = killed.elapsed();
    eprintln!("the last write ended {took:?} after the loss: {failed:?}");
    assert!(took < TIME * 3, "{took:?}");
    until("it leads no more", || !alone.look().is_primary());
    let mut nodes = vec![alone, Node::start(&world, gone[0])];
    let next = primary(&mut nodes);
    nodes[next].write();
}
