//! The nodes of a cluster in one true time, and what must hold at each moment of it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use super::handing::{Message, Post};
use super::node::{Disk, Engine, Node, Time};
use super::store::{ReadOutcome, Register};
use crate::election::{
    Action, ClockPair, Command, Election, Input, NotHanded, PeerAnswer, Shown, Swapped, Unread,
};
use crate::lease::Version;
use crate::lease::record::{Attempt, LeaseState, Record};
use crate::peer::{Incarnation, NodeId};
use crate::status::PeerInfo;
use crate::txid::Epoch;

pub(super) const MS: Time = 1000;
pub(super) const SECOND: Time = 1_000_000;
pub(super) const LEASE: Duration = Duration::from_secs(2);

/// Numbers by a seed.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, most: u64) -> u64 {
        self.next() % most.max(1)
    }

    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// What becomes of a swap.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Fate {
    /// The store is asked after so long, and answers after so long.
    Answered {
        there: Time,
        back: Time,
    },
    /// No answer comes within the limit; it is done after so long, all the same.
    Silent {
        there: Time,
    },
    /// It is lost on its way.
    Lost,
    /// It is done, and the store's library tries it once more.
    Repeated,
    Refused,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "they are few at a time")]
pub(super) enum Event {
    Wake { wakes: u64 },
    Input(Input),
    Swap { expected: Option<Version>, record: Box<Record>, fate: Fate },
    ReadAt { begun: Duration, back: Time, changes_ago: usize },
    Ask { round: u64, peers: Vec<PeerInfo> },
    Replicate { pass: u64 },
    Prepared,
    Promoted(Epoch),
    Renewed(Epoch),
    Demoted,
    Acknowledge { value: u64, epoch: Epoch },
    Continue,
    Hold { to: Option<PeerInfo>, attempt: Attempt },
    OfferLimit { attempt: Attempt },
    Message(Message),
}

#[derive(Debug)]
struct Timed {
    at: Time,
    count: u64,
    node: usize,
    run: u32,
    event: Event,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Timed) -> bool {
        (self.at, self.count) == (other.at, other.count)
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Timed) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Timed) -> std::cmp::Ordering {
        (self.at, self.count).cmp(&(other.at, other.count))
    }
}

/// A write that a client was told to be done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acked {
    pub(super) value: u64,
    pub(super) epoch: Epoch,
    pub(super) at: Time,
}

/// How a store and a network behave, by chance.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chaos {
    pub(super) silent: u64,
    pub(super) lost: u64,
    pub(super) repeated: u64,
    pub(super) refused: u64,
    pub(super) stale: u64,
    pub(super) slow: u64,
    pub(super) fails: u64,
    pub(super) messages: u64,
}

pub(super) struct World {
    pub(super) now: Time,
    queue: BinaryHeap<Reverse<Timed>>,
    count: u64,
    pub(super) nodes: Vec<Node>,
    pub(super) register: Register,
    pub(super) rng: Rng,
    pub(super) chaos: Chaos,
    pub(super) fates: HashMap<usize, VecDeque<Fate>>,
    /// How long a node's next reads take.
    pub(super) slow_reads: HashMap<usize, Time>,
    /// How many changes ago the records were there that a node reads.
    pub(super) late_reads: HashMap<usize, usize>,
    pub(super) cut: Vec<(usize, usize)>,
    pub(super) acked: Vec<Acked>,
    pub(super) last_ack: HashMap<Epoch, Time>,
    owners: HashMap<Epoch, (Epoch, usize)>,
    next_value: u64,
    pub(super) violation: Option<String>,
    /// Machines that were copied go on for a while as one: only later is that wrong.
    pub(super) forgiven_until: Time,
    /// What a node draws depends only on how many swaps it has sent.
    pub(super) same_random: bool,
    swap_count: HashMap<usize, u64>,
    pub(super) trace: bool,
    pub(super) shown: Vec<Option<Shown>>,
    pub(super) notes: Vec<crate::election::Note>,
    /// An operator gave up what others have.
    pub(super) unchecked: bool,
    pub(super) leases: Vec<(Time, usize, Epoch)>,
    /// What becomes of the next messages between nodes.
    pub(super) posts: VecDeque<Option<Post>>,
    /// Offers are made before the target has all.
    pub(super) hasty: bool,
    pub(super) ended: Vec<Result<NodeId, NotHanded>>,
    pub(super) refused: Vec<NotHanded>,
    /// The epoch that a handoff goes on from.
    pub(super) goes_on_from: HashMap<Epoch, Epoch>,
}

impl World {
    pub(super) fn new(count: usize, seed: u64) -> World {
        World {
            now: 0,
            queue: BinaryHeap::new(),
            count: 0,
            nodes: (0..count).map(|id| Node::new(id as u128, LEASE)).collect(),
            register: Register::new(),
            rng: Rng::new(seed),
            chaos: Chaos::default(),
            fates: HashMap::new(),
            slow_reads: HashMap::new(),
            late_reads: HashMap::new(),
            cut: Vec::new(),
            acked: Vec::new(),
            last_ack: HashMap::new(),
            owners: HashMap::new(),
            next_value: 0,
            violation: None,
            forgiven_until: 0,
            same_random: false,
            swap_count: HashMap::new(),
            trace: std::env::var_os("REPLITE_MODEL_TRACE").is_some(),
            shown: vec![None; count],
            notes: Vec::new(),
            unchecked: false,
            leases: Vec::new(),
            posts: VecDeque::new(),
            hasty: false,
            ended: Vec::new(),
            refused: Vec::new(),
            goes_on_from: HashMap::new(),
        }
    }

    fn say(&self, node: usize, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:>10} {node} {}", self.now / MS, what());
        }
    }

    pub(super) fn wrong(&mut self, what: String) {
        if self.trace {
            eprintln!("{:>10} WRONG {what}", self.now / MS);
        }
        self.violation.get_or_insert(format!("at {} ms: {what}", self.now / MS));
    }

    pub(super) fn push(&mut self, at: Time, node: usize, event: Event) {
        self.count += 1;
        let run = self.nodes[node].run;
        self.queue.push(Reverse(Timed { at, count: self.count, node, run, event }));
    }

    pub(super) fn index(&self, id: NodeId) -> Option<usize> {
        self.nodes.iter().position(|node| node.id() == id)
    }

    /// Whether two nodes reach each other.
    pub(super) fn connected(&self, a: usize, b: usize) -> bool {
        !self.cut.contains(&(a.min(b), a.max(b)))
    }

    // ---- processes

    pub(super) fn start(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        assert!(node.election.is_none(), "it runs");
        node.run += 1;
        let incarnation = Incarnation::from_u128(u128::from(self.count) << 64 | (at as u128) << 32 | 1);
        node.settings.me.incarnation = incarnation;
        node.disk.incarnations.push(incarnation);
        node.settings.incarnations = node.disk.incarnations.clone();
        node.settings.bootstrapped = node.disk.bootstrapped;
        node.engine = Engine::Follows(None);
        node.gate = Duration::ZERO;
        node.stopped_until = None;
        node.left = false;
        (node.withholding, node.held) = (None, false);
        node.election = Some(Election::new(node.settings.clone()));
        self.shown[at] = None;
        self.push(self.now, at, Event::Input(Input::Tick));
        self.replicate_from(at);
    }

    pub(super) fn start_all(&mut self) {
        (0..self.nodes.len()).for_each(|at| self.start(at));
    }

    pub(super) fn kill(&mut self, at: usize) {
        self.say(at, || "killed".into());
        let node = &mut self.nodes[at];
        node.election = None;
        node.run += 1;
        node.gate = Duration::ZERO;
        node.engine = Engine::Follows(None);
    }

    /// The process gets no time for so long.
    pub(super) fn stop(&mut self, at: usize, time: Time) {
        self.nodes[at].stopped_until = Some(self.now + time);
        self.say(at, || "stopped".into());
        self.push(self.now + time, at, Event::Continue);
    }

    /// A copy of a machine, with the process that runs on it.
    pub(super) fn fork(&mut self, of: usize) -> usize {
        let at = self.nodes.len();
        let from = &self.nodes[of];
        let mut copy = Node::new(at as u128, LEASE);
        copy.settings = from.settings.clone();
        copy.disk = from.disk.clone();
        copy.offset = from.offset;
        (copy.engine, copy.gate, copy.gives) = (from.engine, from.gate, from.gives.clone());
        copy.election = from.election.clone();
        self.nodes.push(copy);
        self.shown.push(None);
        let count = self.swap_count.get(&of).copied().unwrap_or_default();
        self.swap_count.insert(at, count);
        self.push(self.now, at, Event::Input(Input::Tick));
        at
    }

    pub(super) fn command(&mut self, at: usize, command: Command) {
        self.unchecked |= command == Command::PromoteUnchecked;
        self.push(self.now, at, Event::Input(Input::Command(command)));
    }

    pub(super) fn give(&mut self, at: usize, input: Input) {
        self.push(self.now, at, Event::Input(input));
    }

    // ---- time

    pub(super) fn run(&mut self, time: Time) {
        let end = self.now + time;
        while self.violation.is_none() && self.queue.peek().is_some_and(|Reverse(next)| next.at <= end) {
            let Some(Reverse(timed)) = self.queue.pop() else { break };
            self.now = self.now.max(timed.at);
            self.happen(timed);
        }
        self.now = end;
    }

    /// Runs until something is so, at most for so long. Returns whether it is.
    pub(super) fn until(&mut self, most: Time, mut is: impl FnMut(&World) -> bool) -> bool {
        let end = self.now + most;
        while !is(self) {
            let next = self.queue.peek().map(|Reverse(next)| next.at);
            if self.violation.is_some() || next.is_none_or(|at| at > end) {
                self.now = end;
                return is(self);
            }
            let Some(Reverse(timed)) = self.queue.pop() else { break };
            self.now = self.now.max(timed.at);
            self.happen(timed);
        }
        true
    }

    fn happen(&mut self, timed: Timed) {
        let Timed { at: _, count: _, node: at, run, event } = timed;
        let in_process = !matches!(event, Event::Swap { .. } | Event::ReadAt { .. });
        let node = &self.nodes[at];
        if in_process && (run != node.run || node.election.is_none()) {
            return;
        }
        if in_process
            && let Some(until) = node.stopped_until
            && until > self.now
        {
            return self.push(until, at, event);
        }
        match event {
            Event::Wake { wakes } if wakes != node.wakes => {}
            Event::Wake { .. } => self.decide(at, Input::Tick),
            Event::Input(input) => self.decide(at, input),
            Event::Swap { expected, record, fate } => self.swap_at(at, run, expected, &record, fate),
            Event::ReadAt { begun, back, changes_ago } => {
                let outcome = self.register.read(changes_ago);
                self.answer_read(at, run, begun, back, outcome);
            }
            Event::Ask { round, peers } => {
                let answers = self.answers(at, &peers);
                self.decide(at, Input::Peers { round, answers });
            }
            Event::Replicate { pass } => {
                if pass == self.nodes[at].replica_pass {
                    self.replicate(at);
                }
            }
            Event::Acknowledge { value, epoch } => self.acknowledge(at, value, epoch),
            Event::Continue => {}
            Event::Hold { to, attempt } => self.hold(at, to.as_ref(), attempt),
            Event::OfferLimit { attempt } => self.withhold_failed(at, attempt, "no answer"),
            Event::Message(message) => self.receive(at, message),
            Event::Prepared | Event::Promoted(_) | Event::Renewed(_) | Event::Demoted => {
                self.engine_did(at, event);
            }
        }
    }

    fn engine_did(&mut self, at: usize, event: Event) {
        let node = &mut self.nodes[at];
        let input = match (event, node.engine) {
            (Event::Prepared, Engine::Prepared) => Input::Prepared { position: node.disk.position() },
            // The stream goes on again: the answer is of no use any more.
            (Event::Prepared, _) => Input::Prepared { position: None },
            (Event::Promoted(epoch), Engine::Promoting(of)) if epoch == of => {
                let fails = node.fails || self.rng.percent(self.chaos.fails);
                if fails {
                    Input::Promoted(Err("it fails".into()))
                } else {
                    node.engine = Engine::Primary(epoch);
                    Input::Promoted(Ok(()))
                }
            }
            (Event::Renewed(epoch), Engine::Primary(_))
                if node.fails || self.rng.percent(self.chaos.fails) =>
            {
                if self.rng.percent(50) {
                    node.disk.open_epoch(epoch);
                }
                Input::Renewed(Err("it fails".into()))
            }
            (Event::Renewed(epoch), Engine::Primary(_)) => {
                node.disk.open_epoch(epoch);
                node.engine = Engine::Primary(epoch);
                node.held = false;
                Input::Renewed(Ok(()))
            }
            (Event::Demoted, Engine::Demoting(_)) => {
                node.engine = Engine::Follows(None);
                Input::Demoted { position: node.disk.position() }
            }
            _ => return,
        };
        self.decide(at, input);
    }

    fn random(&mut self, at: usize) -> [u64; 6] {
        if self.same_random {
            let mut rng = Rng::new(self.swap_count.get(&at).copied().unwrap_or_default());
            return std::array::from_fn(|_| rng.next());
        }
        std::array::from_fn(|_| self.rng.next())
    }

    pub(super) fn decide(&mut self, at: usize, input: Input) {
        let random = self.random(at);
        let node = &self.nodes[at];
        let (mut facts, clock) = (node.facts(random), node.clock(self.now));
        if matches!(node.engine, Engine::Primary(_)) {
            let follows = |of: &&Node| of.engine == Engine::Follows(Some(node.id())) && of.id() != node.id();
            facts.replicas = self.nodes.iter().filter(follows).map(Node::peer).collect();
        }
        if self.trace && !matches!(input, Input::Tick | Input::Read { .. }) {
            eprintln!("{:>10} {at} <- {input:?}", self.now / MS);
        }
        let node = &mut self.nodes[at];
        let Some(election) = &mut node.election else { return };
        let actions = election.decide(input, &facts, clock);
        let wakes = actions.iter().filter(|action| matches!(action, Action::Wake(_))).count();
        assert_eq!(wakes, 1, "one wake for each decision");
        for action in actions {
            if self.trace && !matches!(action, Action::Wake(_) | Action::Read) {
                eprintln!("{:>10} {at} -> {action:?}", self.now / MS);
            }
            self.perform(at, action);
        }
    }

    // ---- what a driver does

    fn perform(&mut self, at: usize, action: Action) {
        match action {
            Action::Read => self.read(at),
            Action::Swap { expected, record } => self.swap(at, expected, record),
            Action::AskPeers { round, peers, limit } => {
                let all = peers.iter().all(|peer| self.reaches(at, peer.node).is_some());
                let after = if all { 5 * MS } else { limit.as_millis() as u64 * MS };
                self.push(self.now + after, at, Event::Ask { round, peers });
            }
            Action::Prepare => {
                assert!(matches!(self.nodes[at].engine, Engine::Follows(_) | Engine::Prepared));
                self.nodes[at].engine = Engine::Prepared;
                self.push(self.now + 2 * MS, at, Event::Prepared);
            }
            Action::Promote { epoch, .. } => {
                if let Engine::Follows(_) = self.nodes[at].engine {
                    if self.nodes[at].accepts == 0 {
                        self.wrong(format!("node {at} leads unprepared, and by no offer"));
                    }
                    self.check_has_all(at, epoch);
                }
                assert!(matches!(self.nodes[at].engine, Engine::Prepared | Engine::Follows(_)));
                self.nodes[at].disk.open_epoch(epoch);
                self.nodes[at].engine = Engine::Promoting(epoch);
                self.push(self.now + self.nodes[at].promotes_in, at, Event::Promoted(epoch));
            }
            Action::Renew { epoch } => {
                assert!(matches!(self.nodes[at].engine, Engine::Primary(_)));
                assert!(self.nodes[at].gate.is_zero(), "a new epoch without a fence");
                self.nodes[at].withholding = None;
                self.push(self.now + 5 * MS, at, Event::Renewed(epoch));
            }
            Action::Demote => {
                let node = &mut self.nodes[at];
                let (Engine::Promoting(epoch) | Engine::Primary(epoch)) = node.engine else {
                    panic!("demoted without leading")
                };
                node.engine = Engine::Demoting(epoch);
                self.let_go(at);
                self.push(self.now + 5 * MS, at, Event::Demoted);
            }
            Action::Follow(peer) => {
                let node = &mut self.nodes[at];
                assert!(matches!(node.engine, Engine::Follows(_) | Engine::Prepared), "{:?}", node.engine);
                node.engine = Engine::Follows(peer.map(|peer| peer.node));
                self.replicate_from(at);
            }
            Action::Lease { until, .. } => self.lease(at, until),
            Action::Fence => self.nodes[at].gate = Duration::ZERO,
            Action::Hear(number) => self.nodes[at].disk.heard = self.nodes[at].disk.heard.max(number),
            Action::MarkBootstrapped => self.nodes[at].disk.bootstrapped = true,
            Action::Wake(wake) => {
                let node = &mut self.nodes[at];
                node.wakes += 1;
                let (wakes, time) = (node.wakes, node.true_time(wake));
                self.push(time.max(self.now), at, Event::Wake { wakes });
            }
            action @ (Action::Withhold { .. }
            | Action::GoOn
            | Action::Handed { .. }
            | Action::HandoffEnded(_)
            | Action::HandoffRefused(_)
            | Action::Accept { .. }
            | Action::Decline { .. }) => self.perform_handoff(at, action),
            Action::Show(shown) => self.shown[at] = Some(shown),
            Action::Note(note) => self.notes.push(note),
            Action::Left => {
                self.nodes[at].left = true;
                if !self.nodes[at].lingers {
                    self.kill(at);
                }
            }
        }
    }

    fn lease(&mut self, at: usize, until: Duration) {
        let now = self.now;
        let node = &mut self.nodes[at];
        let clock = node.clock(now);
        let (Engine::Promoting(epoch) | Engine::Primary(epoch)) = node.engine else {
            panic!("a lease without leading")
        };
        let was = node.gate;
        node.gate = until;
        let ended = (was.is_zero() || was <= clock) && node.gives.last() == Some(&epoch);
        if node.gives.last() != Some(&epoch) {
            node.gives.push(epoch);
            self.leases.push((now, at, epoch));
        }
        if ended && until > clock {
            self.wrong(format!("node {at} acknowledges again in {epoch}, which had ended"));
        }
        // An operator's word may repeat a number that only a lost record had.
        let key = if self.unchecked { epoch } else { Epoch::new(epoch.number(), 0) };
        let owner = *self.owners.entry(key).or_insert((epoch, at));
        if owner != (epoch, at) && self.forgiven_until == 0 {
            self.wrong(format!("nodes {} and {at} both lead in epoch {}", owner.1, epoch.number()));
        }
        self.check_alone();
    }

    /// At no instant may two nodes acknowledge.
    pub(super) fn check_alone(&mut self) {
        if self.now < self.forgiven_until {
            return;
        }
        let open: Vec<usize> = (0..self.nodes.len()).filter(|at| self.nodes[*at].is_open(self.now)).collect();
        if open.len() > 1 {
            self.wrong(format!("nodes {open:?} acknowledge at once"));
        }
    }

    // ---- the store

    fn limit(&self) -> Time {
        LEASE.as_micros() as Time / 4
    }

    fn latency(&mut self) -> Time {
        if self.chaos.slow > 0 && self.rng.percent(self.chaos.slow) {
            return self.rng.below(400) * MS;
        }
        MS + self.rng.below(2 * MS)
    }

    fn read(&mut self, at: usize) {
        let begun = self.nodes[at].clock(self.now);
        if !self.nodes[at].reaches_store {
            let outcome = Err(Unread::Unavailable("cut off".into()));
            let after = if self.rng.percent(50) { MS } else { self.limit() };
            return self.push(self.now + after, at, Event::Input(Input::Read { begun, outcome }));
        }
        let there = self.slow_reads.get(&at).copied().unwrap_or_else(|| self.latency());
        let back = MS;
        if there + back > self.limit() {
            let outcome = Err(Unread::Unavailable("too slow".into()));
            return self.push(self.now + self.limit(), at, Event::Input(Input::Read { begun, outcome }));
        }
        let stale = self.chaos.stale > 0 && self.rng.percent(self.chaos.stale);
        let by_chance = if stale { self.rng.below(3) as usize } else { 0 };
        let changes_ago = self.late_reads.get(&at).copied().unwrap_or(by_chance);
        self.push(self.now + there, at, Event::ReadAt { begun, back, changes_ago });
    }

    fn answer_read(&mut self, at: usize, run: u32, begun: Duration, back: Time, outcome: ReadOutcome) {
        if self.nodes[at].run == run {
            self.push(self.now + back, at, Event::Input(Input::Read { begun, outcome }));
        }
    }

    fn fate(&mut self, at: usize) -> Fate {
        if let Some(fate) = self.fates.get_mut(&at).and_then(VecDeque::pop_front) {
            return fate;
        }
        let mut of = self.rng.below(100);
        let chaos = self.chaos;
        for (percent, fate) in [
            (chaos.silent, Fate::Silent { there: self.rng.below(3000) * MS }),
            (chaos.lost, Fate::Lost),
            (chaos.repeated, Fate::Repeated),
            (chaos.refused, Fate::Refused),
        ] {
            if of < percent {
                return fate;
            }
            of -= percent;
        }
        Fate::Answered { there: self.latency(), back: MS + self.rng.below(MS) }
    }

    fn swap(&mut self, at: usize, expected: Option<Version>, record: Box<Record>) {
        *self.swap_count.entry(at).or_default() += 1;
        let fate = if self.nodes[at].reaches_store { self.fate(at) } else { Fate::Refused };
        self.check_handoff(at, &record);
        let attempt = record.attempt;
        let (limit, now) = (self.limit(), self.now);
        match fate {
            Fate::Answered { there, back } if there + back > limit => {
                self.push(now + there, at, Event::Swap { expected, record, fate: Fate::Silent { there } });
                self.push(now + limit, at, unknown(attempt));
            }
            Fate::Answered { there, .. } => {
                self.push(now + there, at, Event::Swap { expected, record, fate })
            }
            Fate::Repeated => self.push(now + MS, at, Event::Swap { expected, record, fate }),
            Fate::Silent { there } => {
                self.push(now + there, at, Event::Swap { expected, record, fate });
                self.push(now + limit, at, unknown(attempt));
            }
            Fate::Lost => self.push(now + limit, at, unknown(attempt)),
            Fate::Refused => {
                let outcome = Swapped::Unavailable("refused".into());
                self.push(now + MS, at, Event::Input(Input::Swapped { attempt, outcome }));
            }
        }
    }

    fn swap_at(&mut self, at: usize, run: u32, expected: Option<Version>, record: &Record, fate: Fate) {
        let outcome = self.register.swap(expected.as_ref(), record);
        self.say(at, || format!("the store: {outcome:?} {:?} by {:?}", record.state, record.attempt));
        let attempt = record.attempt;
        let (back, outcome) = match fate {
            Fate::Answered { back, .. } => (back, outcome),
            Fate::Repeated => (MS, Swapped::Conflict),
            _ => return,
        };
        if self.nodes[at].run == run {
            self.push(self.now + back, at, Event::Input(Input::Swapped { attempt, outcome }));
        }
    }

    // ---- the peers

    /// A peer that answers.
    fn reaches(&self, from: usize, to: NodeId) -> Option<usize> {
        let to = self.index(to)?;
        let node = &self.nodes[to];
        let awake = node.stopped_until.is_none_or(|until| until <= self.now);
        (self.connected(from, to) && node.election.is_some() && awake).then_some(to)
    }

    fn answers(&mut self, from: usize, peers: &[PeerInfo]) -> Vec<PeerAnswer> {
        let reached: Vec<usize> = peers.iter().filter_map(|peer| self.reaches(from, peer.node)).collect();
        let answer = |at: usize| {
            let node = &self.nodes[at];
            let facts = node.facts([0; 6]);
            let own = node.election.as_ref()?.answer(&facts, node.clock(self.now));
            Some(PeerAnswer {
                peer: node.peer(),
                position: facts.position,
                epoch: own.epoch,
                fit: own.fit,
                has_state: facts.has_state,
                has_content: facts.has_content,
            })
        };
        reached.into_iter().filter_map(answer).collect()
    }

    fn replicate_from(&mut self, at: usize) {
        self.nodes[at].replica_pass += 1;
        let pass = self.nodes[at].replica_pass;
        let after = 10 * MS + self.rng.below(100 * MS);
        self.push(self.now + after, at, Event::Replicate { pass });
    }

    fn replicate(&mut self, at: usize) {
        let Engine::Follows(Some(of)) = self.nodes[at].engine else { return };
        if let Some(from) = self.reaches(at, of).filter(|from| *from != at) {
            self.take_from(at, from);
        }
        self.replicate_from(at);
    }

    pub(super) fn take_from(&mut self, at: usize, from: usize) {
        let primary = &self.nodes[from];
        let (Engine::Primary(epoch) | Engine::Demoting(epoch)) = primary.engine else { return };
        if epoch.number() < self.nodes[at].disk.heard || primary.disk.epochs.epoch() != epoch {
            // An older one is refused, and hears of the newer.
            let heard = self.nodes[at].disk.heard;
            return self.push(self.now, from, Event::Input(Input::Heard(heard)));
        }
        let took = primary.election.as_ref().and_then(Election::took).filter(|took| took.0 == epoch);
        let clock = took.map(|(_, took)| primary.clock(self.now).saturating_sub(took));
        let theirs: Disk = primary.disk.clone();
        let node = &mut self.nodes[at];
        let batch = node.batch;
        let all = node.disk.follow(&theirs, batch);
        node.disk.heard = node.disk.heard.max(epoch.number());
        if let (true, Some(clock), Some(position)) = (all, clock, theirs.position()) {
            node.disk.synced = Some(ClockPair { epoch, clock, position });
        }
    }

    // ---- clients

    /// A client writes on a node. Returns the value, if it commits.
    pub(super) fn write(&mut self, at: usize) -> Option<u64> {
        let node = &mut self.nodes[at];
        let Engine::Primary(epoch) = node.engine else { return None };
        let awake = node.stopped_until.is_none_or(|until| until <= self.now);
        if node.election.is_none() || !awake || node.held || node.disk.epochs.epoch() != epoch {
            return None;
        }
        self.next_value += 1;
        let value = self.next_value;
        node.disk.commit(epoch, value);
        let after = self.rng.below(20 * MS);
        self.push(self.now + after, at, Event::Acknowledge { value, epoch });
        Some(value)
    }

    /// The decision is made on a clock that is read after the commit.
    fn acknowledge(&mut self, at: usize, value: u64, epoch: Epoch) {
        if self.nodes[at].engine == Engine::Primary(epoch) && self.nodes[at].is_open(self.now) {
            self.acked.push(Acked { value, epoch, at: self.now });
            self.last_ack.insert(epoch, self.now);
            self.check_alone();
        }
    }

    /// Writes on the primary, if there is one, and lets the write be acknowledged.
    pub(super) fn write_acked(&mut self) -> Option<u64> {
        let value = self.write(self.primary()?)?;
        self.run(25 * MS);
        Some(value).filter(|value| self.acked.iter().any(|acked| acked.value == *value))
    }

    // ---- what tests look at

    /// The node that serves and may acknowledge.
    pub(super) fn primary(&self) -> Option<usize> {
        let serves = |node: &Node| matches!(node.engine, Engine::Primary(_)) && node.is_open(self.now);
        self.nodes.iter().position(serves)
    }

    pub(super) fn has(&self, at: usize, value: u64) -> bool {
        self.nodes[at].disk.entries.iter().any(|entry| entry.value == value)
    }

    pub(super) fn was_lost(&self, value: u64) -> bool {
        let lost = self.nodes.iter().flat_map(|node| &node.disk.lost).flatten();
        lost.into_iter().any(|entry| entry.value == value)
    }

    /// For how long a node still holds back after promotions that failed.
    pub(super) fn back_off(&self, at: usize) -> Time {
        let node = &self.nodes[at];
        let until = node.election.as_ref().map_or(Duration::ZERO, |election| election.setback.until);
        node.true_time(until).saturating_sub(self.now)
    }

    pub(super) fn holder(&self) -> Option<usize> {
        match &self.register.record()?.state {
            LeaseState::Held(tenure) => self.index(tenure.holder.node),
            _ => None,
        }
    }

    /// A cluster that has begun: the first node leads, and the others have its state.
    pub(super) fn begun(count: usize) -> World {
        let mut world = World::new(count, 1);
        world.nodes.iter_mut().for_each(|node| node.settings.bootstrap = Some(count));
        world.start_all();
        assert!(world.until(10 * SECOND, |world| world.primary() == Some(0)), "no first start");
        for _ in 0..3 {
            world.write_acked().expect("the primary acknowledges");
        }
        world.run(2 * SECOND);
        assert_eq!(world.violation, None);
        world
    }
}

fn unknown(attempt: Attempt) -> Event {
    Event::Input(Input::Swapped { attempt, outcome: Swapped::Unknown("no answer".into()) })
}
