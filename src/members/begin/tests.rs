use openraft::{CommittedLeaderId, LogId, Membership, StoredMembership};

use super::*;

const URLS: [&str; 3] = ["replite://a:1", "replite://b:1", "replite://c:1"];

/// One that waits for the beginning.
fn fresh(id: u64) -> Introduction {
    Introduction {
        id: Some(id),
        witness: false,
        list: URLS.map(String::from).to_vec(),
        begun: false,
        membership: StoredMembership::default(),
        leader: None,
        last_index: None,
        ready: true,
        has_state: false,
        has_content: false,
    }
}

/// One that knows of these members, as entry number `index` says.
fn knowing(id: u64, index: u64, members: &[(u64, &str)]) -> Introduction {
    let nodes = members.iter().map(|(id, url)| (*id, Member { url: (*url).into(), witness: false }));
    let nodes: BTreeMap<u64, Member> = nodes.collect();
    let membership = Membership::new(vec![nodes.keys().copied().collect()], nodes);
    let log_id = LogId::new(CommittedLeaderId::new(1, 1), index);
    Introduction { begun: true, membership: StoredMembership::new(Some(log_id), membership), ..fresh(id) }
}

type Others = BTreeMap<String, Result<Introduction, String>>;

/// The second and the third.
fn others(second: Introduction, third: Introduction) -> Others {
    [(URLS[1].into(), Ok(second)), (URLS[2].into(), Ok(third))].into()
}

fn decide(own: &Introduction, others: &Others) -> BeginVerdict {
    verdict((URLS[0], own), others, false)
}

fn waits(verdict: BeginVerdict, part: &str) {
    assert!(matches!(&verdict, BeginVerdict::Wait(why) if why.contains(part)), "{verdict:?}");
}

fn needs_operator(verdict: BeginVerdict, part: &str) {
    assert!(matches!(&verdict, BeginVerdict::Operator(why) if why.contains(part)), "{verdict:?}");
}

#[test]
fn the_first_of_the_list_begins_when_all_answer() {
    let all = others(fresh(2), fresh(3));
    let BeginVerdict::Begin(members) = decide(&fresh(1), &all) else { panic!() };
    let found: Vec<(u64, &str)> = members.iter().map(|(id, member)| (*id, member.url.as_str())).collect();
    assert_eq!(found, [(1, URLS[0]), (2, URLS[1]), (3, URLS[2])]);

    let seen_by_second = [(URLS[0].into(), Ok(fresh(1))), (URLS[2].into(), Ok(fresh(3)))].into();
    waits(verdict((URLS[1], &fresh(2)), &seen_by_second, false), "the first of the members");

    let mut one_away = all.clone();
    one_away.insert(URLS[2].into(), Err("refused".into()));
    waits(decide(&fresh(1), &one_away), "replite://c:1 does not: refused");
    // It may know of a cluster, whatever an operator says.
    waits(verdict((URLS[0], &fresh(1)), &one_away, true), "does not: refused");
}

#[test]
fn nothing_is_begun_while_one_is_not_as_the_others() {
    let begin = |third: Introduction| decide(&fresh(1), &others(fresh(2), third));
    let list = vec![URLS[0].into(), URLS[2].into(), "replite://d:1".into()];
    needs_operator(begin(Introduction { list, ..fresh(3) }), "c:1 names other members: replite://a:1, ");
    let list = URLS.iter().rev().map(|url| String::from(*url)).collect();
    assert!(matches!(begin(Introduction { list, ..fresh(3) }), BeginVerdict::Begin(_)), "an order is none");
    needs_operator(begin(Introduction { has_state: true, ..fresh(3) }), "c:1 has a state of a cluster");
    waits(begin(Introduction { ready: false, ..fresh(3) }), "c:1 is being opened");
    waits(begin(Introduction { id: None, ..fresh(3) }), "c:1 is being opened");
    waits(begin(Introduction { begun: true, ..fresh(3) }), "c:1 knows of members");
    let own = Introduction { begun: true, ..fresh(1) };
    waits(decide(&own, &others(fresh(2), fresh(3))), "a:1 knows of members");
}

#[test]
fn one_database_may_have_content() {
    let with_content = |id| Introduction { has_content: true, ..fresh(id) };
    let one = decide(&fresh(1), &others(with_content(2), fresh(3)));
    assert!(matches!(one, BeginVerdict::Begin(_)), "{one:?}");
    let two = decide(&with_content(1), &others(fresh(2), with_content(3)));
    needs_operator(two, "replite://a:1 and replite://c:1 have databases");
    let witness = |id| Introduction { witness: true, ..fresh(id) };
    let all = others(witness(2), witness(3));
    waits(decide(&witness(1), &all), "witnesses only");
    let BeginVerdict::Begin(members) = decide(&fresh(1), &others(fresh(2), witness(3))) else { panic!() };
    assert!(members[&3].witness && !members[&1].witness);
}

#[test]
fn an_operators_word_begins_what_has_a_state() {
    let with_state = |id| Introduction { has_state: true, has_content: true, ..fresh(id) };
    let seen_by_second = [(URLS[0].into(), Ok(with_state(1))), (URLS[2].into(), Ok(with_state(3)))].into();
    let told = verdict((URLS[1], &with_state(2)), &seen_by_second, true);
    assert!(matches!(told, BeginVerdict::Begin(_)), "{told:?}");
    // What one of them agreed to is not forgotten by that.
    let known = knowing(3, 5, &[(3, URLS[2]), (8, URLS[0]), (9, URLS[1])]);
    let told = verdict((URLS[0], &with_state(1)), &others(with_state(2), known), true);
    assert_eq!(told, BeginVerdict::Replace);
    let begun = Introduction { begun: true, ..with_state(3) };
    waits(verdict((URLS[0], &with_state(1)), &others(with_state(2), begun), true), "knows of members");
}

#[test]
fn one_that_lost_its_directory_asks_for_its_place() {
    let members = [(8, URLS[0]), (2, URLS[1]), (3, URLS[2])];
    let all = others(knowing(2, 5, &members), knowing(3, 5, &members));
    assert_eq!(decide(&fresh(1), &all), BeginVerdict::Replace);
    assert_eq!(decide(&knowing(8, 5, &members), &all), BeginVerdict::IsIn);
    // What is newest counts: by it the place is this one's already.
    let later = [(1, URLS[0]), (2, URLS[1]), (3, URLS[2])];
    let all = others(knowing(2, 5, &members), knowing(3, 9, &later));
    assert_eq!(decide(&fresh(1), &all), BeginVerdict::IsIn);
    assert_eq!(decide(&knowing(8, 5, &members), &all), BeginVerdict::Replace);
    // One is enough.
    let mut all = others(knowing(2, 5, &members), fresh(3));
    all.insert(URLS[2].into(), Err("away".into()));
    assert_eq!(decide(&fresh(1), &all), BeginVerdict::Replace);
}

#[test]
fn one_that_was_removed_waits_for_an_operator() {
    let before = [(1, URLS[0]), (2, URLS[1]), (3, URLS[2])];
    let after = [(2, URLS[1]), (3, URLS[2])];
    let all = others(knowing(2, 9, &after), knowing(3, 5, &before));
    let verdict = decide(&knowing(1, 5, &before), &all);
    let why = "a:1 is no member: the members are replite://b:1, ";
    assert!(matches!(&verdict, BeginVerdict::Outside(said) if said.contains(why)), "{verdict:?}");
}
