//! Hello, fork and heal over histories made by seed: the decisions and the arithmetic of both
//! sides, without files or sockets.
//!
//! Nodes commit, crash, lose their tails, are restored from old copies, forget their past and are
//! written to by strangers. Then one says hello to another, and what is decided is carried out. It
//! must end with the primary's state, whatever happened; nothing that only the follower had may be
//! replaced without being told to be kept.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::checksum::{Checksum, PageHash};
use crate::engine::{Heal, Overlay, PageStore};
use crate::error::Result;
use crate::log::{Lookup, Touched, mark_numbers};
use crate::page::{PageNo, PageSet, PageSize};
use crate::peer::{Incarnation, NodeId};
use crate::primary::fake::KEYS;
use crate::primary::plan::{ReplicaPlan, plan};
use crate::status::{Addresses, PeerInfo};
use crate::txid::{Epoch, EpochHistory, EpochStart, Place, Position, Txid};
use crate::wire::{
    self, HealBegin, Hello, Image, PageChange, PageRun, Sent, SnapEnd, TxnBegin, TxnEnd, Want,
};

const PAGE_BYTES: usize = 512;
/// Pages that one sum stands for here: few, so that spans are cut everywhere.
const SPAN: u32 = 3;

/// A page is as good as the number that fills it.
type Page = u64;

fn bytes(page: Page) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    bytes[..8].copy_from_slice(&page.to_le_bytes());
    bytes
}

fn hash(number: u32, page: Page) -> PageHash {
    KEYS.page.hash(PageNo::new(number).unwrap(), &bytes(page))
}

fn checksum(pages: &[Page]) -> Checksum {
    (1..).zip(pages).fold(Checksum::EMPTY, |sum, (n, page)| sum.with(hash(n, *page)))
}

/// A committed state, and what its transaction wrote.
#[derive(Clone, PartialEq, Debug)]
struct State {
    position: Position,
    pages: Vec<Page>,
    wrote: Vec<u32>,
}

#[derive(Clone)]
struct ModelNode {
    /// All states, one for each number from 0 on.
    states: Vec<State>,
    history: EpochHistory,
    /// The log has the records from the state at the first number to that at the second.
    log: (usize, usize),
    /// It opened the newest epoch, and commits.
    own: bool,
    /// What the disk holds in place of the tip's pages, if that is something else.
    damaged: Option<Vec<Page>>,
}

impl ModelNode {
    /// In an epoch of its own, as every primary is.
    fn new(rng: &mut StdRng) -> ModelNode {
        let position = Position::new(Txid::new(Epoch::new(0, 0), 0), checksum(&[1, 2, 3]));
        let states = vec![State { position, pages: vec![1, 2, 3], wrote: Vec::new() }];
        let mut node =
            ModelNode { states, history: EpochHistory::default(), log: (0, 0), own: false, damaged: None };
        node.open_epoch(0, rng);
        node
    }

    /// Another node that follows.
    fn replica(&self) -> ModelNode {
        ModelNode { own: false, ..self.clone() }
    }

    fn vouched(&self) -> bool {
        self.log.1 + 1 == self.states.len()
    }

    /// Starts as the primary.
    fn promote(&mut self, rng: &mut StdRng) {
        if self.vouched() {
            return self.open_epoch(0, rng);
        }
        if self.own {
            // All of its own commits are of its epoch.
            self.log.1 = self.states.len() - 1;
            return self.open_epoch(0, rng);
        }
        // No primary vouches for what is here: all of it is one transaction of the new epoch.
        let pages = self.tip().pages.clone();
        self.states.truncate(self.log.1 + 1);
        self.open_epoch(0, rng);
        let wrote = (1..=pages.len() as u32).collect();
        let number = self.tip().position.number() + 1;
        let position = Position::new(Txid::new(self.history.epoch(), number), checksum(&pages));
        self.states.push(State { position, pages, wrote });
        self.log = (self.states.len() - 1, self.states.len() - 1);
    }

    fn tip(&self) -> &State {
        self.states.last().unwrap()
    }

    fn open_epoch(&mut self, above: u64, rng: &mut StdRng) {
        let tip = self.tip().position;
        let epoch = Epoch::new(self.history.epoch().number().max(above) + 1, rng.random());
        self.history.push(EpochStart { epoch, first: tip.number() + 1, before: tip.checksum() });
        self.own = true;
    }

    /// A transaction in the newest epoch; a stranger's is in nobody's log.
    fn commit(&mut self, rng: &mut StdRng, stranger: bool) {
        let mut pages = self.tip().pages.clone();
        let mut wrote: Vec<u32> = Vec::new();
        match rng.random_range(0..6) {
            0 => (0..rng.random_range(1..5)).for_each(|_| {
                pages.push(rng.random());
                wrote.push(pages.len() as u32);
            }),
            1 if pages.len() > 2 => pages.truncate(rng.random_range(1..pages.len())),
            _ => {}
        }
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..pages.len());
            // Also what the page was in an earlier state.
            let earlier = &self.states[rng.random_range(0..self.states.len())];
            pages[at] = match earlier.pages.get(at) {
                Some(page) if !stranger && rng.random_range(0..3) == 0 => *page,
                _ => rng.random(),
            };
            wrote.push(at as u32 + 1);
        }
        wrote.sort_unstable();
        wrote.dedup();
        let number = self.tip().position.number() + 1;
        let position = Position::new(Txid::new(self.history.epoch(), number), checksum(&pages));
        let logged = self.vouched() && !stranger;
        self.states.push(State { position, pages, wrote });
        self.log.1 += usize::from(logged);
    }

    /// Goes back to an earlier state, as a restored copy or a disk that lost its tail does.
    fn go_back(&mut self, to: usize) {
        self.states.truncate(to + 1);
        self.log = (self.log.0.min(to), self.log.1.min(to));
        let tip = self.tip().position.number();
        let mut kept = EpochHistory::default();
        self.history.iter().filter(|start| start.first <= tip + 1).for_each(|start| kept.push(*start));
        self.history = kept;
    }

    fn find(&self, number: u64) -> Lookup {
        let number = number as usize;
        match number {
            _ if number < self.log.0 => Lookup::TooOld,
            _ if number > self.log.1 => Lookup::NotYet,
            _ => Lookup::At { lsn: number as u64, before: self.states[number].position },
        }
    }

    fn hello(&self) -> Hello {
        let peer =
            PeerInfo { node: NodeId::NIL, incarnation: Incarnation::NIL, addresses: Addresses::default() };
        let marks = mark_numbers(self.log.0 as u64, self.log.1 as u64).filter(|_| self.vouched());
        Hello {
            proof: [0; 32],
            keys: crate::wire::PeerKeys::of(KEYS, true),
            peer,
            position: Some(self.tip().position),
            history: self.history.clone(),
            resume: None,
            suspect: self.damaged.is_some(),
            marks: marks.map(|number| self.states[number as usize].position).collect(),
        }
    }

    /// What the transactions after a state did, as the log tells it.
    fn touched(&self, state: Position) -> Touched {
        let at = state.number() as usize;
        assert!(at >= self.log.0 && self.states[at].position == state, "the fork is not a state of the log");
        let size = (at > self.log.0).then(|| self.states[at].pages.len() as u32);
        let mut touched =
            Touched { pages: PageSet::default(), size, least: size.unwrap_or(u32::MAX), lsn: at as u64 };
        for state in &self.states[at + 1..=self.log.1] {
            state.wrote.iter().for_each(|&n| touched.pages.insert(PageNo::new(n).unwrap()));
            touched.least = touched.least.min(state.pages.len() as u32);
        }
        touched
    }
}

/// What came, over what is there.
struct Memory {
    came: HashMap<u32, Vec<u8>>,
    below: Vec<Page>,
}

impl PageStore for Memory {
    fn write(&mut self, number: PageNo, page: &[u8]) -> Result<()> {
        self.came.insert(number.get(), page.to_vec());
        Ok(())
    }

    fn read(&mut self, number: PageNo, page: &mut [u8]) -> Result<()> {
        page.copy_from_slice(&self.came[&number.get()]);
        Ok(())
    }

    fn read_below(&mut self, first: PageNo, pages: &mut [u8]) -> Result<()> {
        for (at, page) in (first.get() as usize - 1..).zip(pages.chunks_exact_mut(PAGE_BYTES)) {
            page.copy_from_slice(&bytes(self.below[at]));
        }
        Ok(())
    }

    fn cut_above(&mut self, last: u32) -> Result<()> {
        self.came.retain(|number, _| *number <= last);
        Ok(())
    }
}

/// Carries a heal out. The primary may go on committing between any two steps.
fn heal(
    primary: &mut ModelNode,
    follower: &ModelNode,
    from: Option<Position>,
    diverged: bool,
    rng: &mut StdRng,
) {
    let size = PageSize::new(PAGE_BYTES as u32).unwrap();
    let begun = from.unwrap_or(primary.tip().position);
    let pages = primary.tip().pages.len() as u32;
    let begin = HealBegin { from: begun, page_size: size, pages, compare: from.is_none(), diverged };
    let below = follower.damaged.clone().unwrap_or_else(|| follower.tip().pages.clone());
    let mut overlay = Overlay::new(size, KEYS.page, begun, below.len() as u32);
    let mut store = Memory { came: HashMap::new(), below };
    let (mut heal, mut want, mut last);
    let meanwhile = |primary: &mut ModelNode, rng: &mut StdRng| {
        if rng.random_range(0..3) == 0 {
            primary.commit(rng, false);
        }
    };
    let sent = |primary: &ModelNode| Sent {
        position: primary.tip().position,
        pages: primary.tip().pages.len() as u32,
    };
    match from {
        Some(from) => {
            let touched = follower.touched(from);
            heal = Heal::since(begin, &touched);
            overlay.trust(follower.tip().position.checksum());
            overlay.drop_above(touched.least, &mut store).unwrap();
            want = heal.want(&overlay, &mut store).unwrap();
            last = sent(primary);
        }
        None => {
            heal = Heal::compare(begin);
            let mut first = 1;
            while first <= primary.tip().pages.len() as u32 {
                let all = &primary.tip().pages;
                let run = &all[first as usize - 1..all.len().min((first + SPAN) as usize - 1)];
                let sum = (first..).zip(run).fold(Checksum::EMPTY, |sum, (n, p)| sum.with(hash(n, *p)));
                let sums = [sum.as_u128().to_le_bytes()];
                heal.sums(&mut overlay, &mut store, (PageNo::new(first).unwrap(), SPAN, &sums)).unwrap();
                first += SPAN;
                meanwhile(primary, rng);
            }
            last = sent(primary);
            want = heal.sent(&mut overlay, &mut store, last).unwrap().unwrap();
        }
    }
    while want != Want::default() {
        for run in &want.runs {
            meanwhile(primary, rng);
            let all = &primary.tip().pages;
            for (n, theirs) in (run.first.get()..).zip(&run.hashes).filter(|(n, _)| *n as usize <= all.len())
            {
                let page = all[n as usize - 1];
                if hash(n, page).to_bytes() != *theirs {
                    let page = bytes(page);
                    let run = PageRun::hashed(PageNo::new(n).unwrap(), &page, size, &KEYS.page);
                    overlay.patch(&run, &mut store).unwrap();
                }
            }
            last = sent(primary);
        }
        want = heal.sent(&mut overlay, &mut store, last).unwrap().unwrap();
    }
    let mut exact = overlay.end(SnapEnd { exact_at: last.position, pages: last.pages }, &mut store).unwrap();
    let records = primary.states[begun.number() as usize..].windows(2);
    for pair in records {
        if exact {
            break;
        }
        let (before, epoch) = (pair[0].position, pair[1].position.epoch());
        overlay.txn_begin(TxnBegin { before, epoch, page_size: size }).unwrap();
        for &n in pair[1].wrote.iter().filter(|n| **n as usize <= pair[1].pages.len()) {
            let (old, new) = (pair[0].pages.get(n as usize - 1), pair[1].pages[n as usize - 1]);
            let (old_bytes, page, mut runs) = (old.map(|page| bytes(*page)), bytes(new), BytesMut::new());
            let image = match rng.random_range(0..4) {
                0 => Image::Whole(&page),
                _ => wire::difference(old_bytes.as_ref().map(|old| &old[..]), &page, &mut runs),
            };
            let replaced = old.map(|old| hash(n, *old));
            let change = PageChange { number: PageNo::new(n).unwrap(), hash: hash(n, new), replaced, image };
            overlay.change(&change, &mut store).unwrap();
        }
        let (after, pages) = (pair[1].position, pair[1].pages.len() as u32);
        let end = TxnEnd { after, pages, changed: 0, unix_micros: 0 };
        exact = overlay.txn_end(end, &mut store).unwrap();
    }
    assert!(exact, "the records do not lead to the state that was named");
    let (have, position, pages) = overlay.into_parts();
    let healed: Vec<Vec<u8>> = (1..=pages)
        .map(|n| match have.contains(PageNo::new(n).unwrap()) {
            true => store.came[&n].clone(),
            false => bytes(store.below[n as usize - 1]).to_vec(),
        })
        .collect();
    let expected = &primary.states[position.number() as usize];
    assert_eq!(expected.position, position);
    assert!(healed == expected.pages.iter().map(|p| bytes(*p).to_vec()).collect::<Vec<_>>());
}

/// One hello, and what follows.
fn meet(primary: &mut ModelNode, follower: &ModelNode, rng: &mut StdRng) {
    let hello = follower.hello();
    let tip = primary.tip().position;
    let mut decision = plan(&primary.history, tip, |n| Ok(primary.find(n)), &hello, KEYS.page).unwrap();
    if let ReplicaPlan::Raise { above } = decision {
        primary.open_epoch(above, rng);
        decision = plan(&primary.history, tip, |n| Ok(primary.find(n)), &hello, KEYS.page).unwrap();
    }
    let theirs = follower.tip();
    let shared = primary.states.get(theirs.position.number() as usize).is_some_and(|ours| ours == theirs);
    match decision {
        ReplicaPlan::Log { lsn } => {
            assert!(shared && hello.position == Some(theirs.position) && follower.damaged.is_none());
            assert_eq!(lsn, theirs.position.number());
            // What follows is the follower's future: it must have a place in the history that it is
            // told.
            assert_eq!(primary.history.place(theirs.position.txid()), Place::OnHistory);
        }
        ReplicaPlan::Heal { from, lsn } => {
            assert!(!shared, "a state of the primary's is not healed");
            assert_eq!((lsn, primary.states[lsn as usize].position), (from.number(), from));
            assert_eq!(follower.states[lsn as usize], primary.states[lsn as usize], "not in both histories");
            let later = hello.marks.iter().filter(|mark| mark.number() > from.number());
            let in_log = |number| number as usize >= primary.log.0 && number as usize <= primary.log.1;
            for mark in later.filter(|mark| in_log(mark.number())) {
                assert_ne!(primary.states[mark.number() as usize].position, *mark, "a newer mark is shared");
            }
            heal(primary, follower, Some(from), true, rng);
        }
        ReplicaPlan::Compare { diverged } => {
            // What is not kept must be the primary's, or be kept by the replica itself, which
            // knows that no primary vouches for it.
            assert!(diverged || shared || !follower.vouched(), "{:?} would be lost", theirs.position);
            heal(primary, follower, None, diverged, rng);
        }
        other => panic!("{other:?} for a node with a state"),
    }
}

fn history(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut nodes = vec![ModelNode::new(&mut rng)];
    for _ in 0..rng.random_range(3..40) {
        let room = nodes.len() < 4;
        let at = rng.random_range(0..nodes.len());
        let node = &mut nodes[at];
        let last = node.states.len() - 1;
        match rng.random_range(0..14) {
            0 => node.promote(&mut rng),
            // The unsynced tail is lost, or an old copy is put in the node's place. (Who writes to
            // such a copy before its node starts makes transactions in the names of those that are
            // gone; that is seen by their checksums, as far as the log reaches.)
            1 => {
                node.go_back(last - rng.random_range(0..=last.min(6)));
                node.promote(&mut rng);
            }
            2 | 3 if room => {
                let replica = node.replica();
                nodes.push(replica);
            }
            4 => node.log.0 = rng.random_range(node.log.0..=node.log.1),
            5 => {
                node.commit(&mut rng, true);
                // A primary that runs captures what strangers commit.
                if node.own {
                    node.log.1 = node.states.len() - 1;
                }
            }
            _ if node.own => node.commit(&mut rng, false),
            _ => node.promote(&mut rng),
        }
    }
    let primary = rng.random_range(0..nodes.len());
    let mut primary = nodes.swap_remove(primary);
    primary.promote(&mut rng);
    for _ in 0..rng.random_range(0..4) {
        primary.commit(&mut rng, false);
    }
    for mut follower in nodes {
        if rng.random_range(0..8) == 0 {
            let mut pages = follower.tip().pages.clone();
            let at = rng.random_range(0..pages.len());
            pages[at] ^= 1;
            follower.damaged = Some(pages);
        }
        meet(&mut primary, &follower, &mut rng);
    }
}

#[test]
fn whatever_happened_a_follower_ends_with_the_primarys_state_and_nothing_is_lost() {
    let number = |name: &str| std::env::var(name).ok().map(|n| n.parse::<u64>().unwrap());
    let (first, histories) =
        (number("REPLITE_SEED").unwrap_or(0), number("REPLITE_HISTORIES").unwrap_or(4000));
    let begin = Instant::now();
    for seed in first..first + histories {
        if let Err(panic) = std::panic::catch_unwind(|| history(seed)) {
            eprintln!("REPLITE_SEED={seed} REPLITE_HISTORIES=1 shows it");
            std::panic::resume_unwind(panic);
        }
    }
    let took = begin.elapsed().max(Duration::from_micros(1));
    println!("{histories} histories, {:.0} a second", histories as f64 / took.as_secs_f64());
}
