//! Nodes that end: what becomes of the lease, and of what runs.

use super::handoffs::{begun, goes};
use super::node::Engine;
use super::world::{MS, SECOND, World};
use crate::election::{Command, NotHanded};

#[test]
fn a_replica_that_is_not_fit_yet_is_asked_again() {
    let mut world = begun(2);
    world.nodes[1].draining = true;
    world.command(0, Command::Leave);
    world.run(200 * MS);
    assert!(!world.nodes[0].left);
    world.nodes[1].draining = false;
    assert!(world.until(200 * MS, |world| world.primary() == Some(1)), "{:?}", world.shown);
    assert_eq!(world.ended, [Ok(world.nodes[1].id())], "it was given back");
    assert_eq!(goes(world), None);
}

#[test]
fn a_node_that_ends_while_it_looks_for_a_named_one_that_is_not_fit_takes_the_best() {
    let mut world = begun(3);
    world.nodes[2].draining = true;
    let named = world.nodes[2].id();
    world.command(0, Command::Handoff { to: Some(named) });
    world.run(100 * MS);
    world.command(0, Command::Leave);
    assert!(world.until(SECOND, |world| world.primary() == Some(1)), "{:?}", world.shown);
    let best = world.nodes[1].id();
    assert_eq!(world.ended, [Err(NotHanded::NotFit(named)), Ok(best)], "it was given back");
    assert_eq!(goes(world), None);
}

#[test]
fn a_node_that_ends_alone_acknowledges_what_runs() {
    let mut world = begun(1);
    world.nodes[0].withholds_in = 200 * MS;
    world.command(0, Command::Leave);
    world.run(100 * MS);
    assert!(world.write_acked().is_some(), "it was fenced before what ran had ended");
    assert!(world.until(300 * MS, |world| world.nodes[0].left), "it has not left");
    assert!(world.write_acked().is_none());
}

#[test]
fn a_node_that_has_left_follows_the_next_primary() {
    let mut world = begun(2);
    world.nodes[1].draining = true;
    world.nodes[0].lingers = true;
    world.command(0, Command::Leave);
    assert!(world.until(SECOND, |world| world.nodes[0].left), "it has not left");
    world.nodes[1].draining = false;
    assert!(world.until(2 * SECOND, |world| world.primary() == Some(1)), "{:?}", world.shown);
    let next = world.nodes[1].id();
    let follows = |world: &World| world.nodes[0].engine == Engine::Follows(Some(next));
    assert!(world.until(SECOND, follows), "requests that wait there go nowhere");
}
