//! One stream from the primary, from the knock to its end.

mod following;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::context::NodeContext;
use crate::engine::{ReplicaStanding, StreamError};
use crate::error::{Error, PeerProblem, Result, shown};
use crate::handshake::{self, Answer, Asker, Knock};
use crate::net::{Endpoint, Heard, Incoming, OpenResponse, RequestBody};
use crate::peer::PeerKey;
use crate::replica::acks::{acknowledge, encoded};
use crate::replica::clocks::Clocks;
use crate::replica::lag::Lagging;
use crate::replica::offers::{self, OFFERS_MAX};
use crate::replica::units::{Units, foreign};
use crate::replica::{Feed, Reporter, give_back};
use crate::status::PeerInfo;
use crate::threads::blocking;
use crate::txid::{Epoch, EpochHistory, Position};
use crate::wire::{
    Goodbye, Hello, Kind, LeaseOffer, Message, PeerKeys, Plan, RecordPart, Unit, Want, Welcome,
};

/// Bytes that are handed over at once.
const BATCH_MAX_BYTES: usize = 1024 * 1024;
/// Questions of the primary that wait: it asks one at a time, and may have given one up.
const QUESTIONS_MAX: usize = 2;
/// How far the clocks of two machines come apart until the next acknowledgement.
const AHEAD_MAX: Duration = Duration::from_millis(100);
/// Bytes of a goodbye that are shown.
const GOODBYE_MAX_BYTES: usize = 1024;

/// One try to follow.
pub(super) struct PrimaryConnection<'a, F> {
    node: &'a Arc<NodeContext>,
    feed: &'a F,
    primary: &'a Endpoint,
    tracker: &'a TaskTracker,
    lagging: &'a Lagging,
    /// What acknowledgements say the time since.
    dialled: Instant,
    /// What had been taken in when this connection began.
    taken: u64,
    /// The newest epoch that this node knows.
    epoch: Option<Epoch>,
    peer: Option<PeerInfo>,
    /// The key that the primary has proved.
    key: Option<PeerKey>,
    /// Whether the stream delivered something.
    delivered: AtomicBool,
    /// Whether the primary said that it has no more than this node.
    level: bool,
    /// What the primary asks.
    questions: mpsc::Sender<Want>,
    asked: Option<mpsc::Receiver<Want>>,
    /// What the primary offers.
    offers: mpsc::Sender<LeaseOffer>,
    offered: Option<mpsc::Receiver<LeaseOffer>>,
    /// The primary takes no new requests, and may hand its lease over.
    withheld: bool,
    /// Whether it ended because what it delivered could not be taken over.
    choked: AtomicBool,
    /// Cancelled when the primary takes no more requests.
    drained: CancellationToken,
    clocks: Clocks,
    /// What is on this node's disk.
    synced: watch::Receiver<Option<Position>>,
    /// The number of the epoch that this stream is of.
    number: watch::Sender<u64>,
}

impl<'a, F: Feed> PrimaryConnection<'a, F> {
    pub(super) fn new(
        node: &'a Arc<NodeContext>,
        feed: &'a F,
        primary: &'a Endpoint,
        tracker: &'a TaskTracker,
        lagging: &'a Lagging,
    ) -> PrimaryConnection<'a, F> {
        let (questions, asked) = mpsc::channel(QUESTIONS_MAX);
        let (offers, offered) = mpsc::channel(OFFERS_MAX);
        PrimaryConnection {
            questions,
            asked: Some(asked),
            offers,
            offered: Some(offered),
            withheld: false,
            node,
            feed,
            primary,
            tracker,
            lagging,
            dialled: Instant::now(),
            taken: feed.taken(),
            epoch: None,
            peer: None,
            key: None,
            delivered: AtomicBool::new(false),
            level: false,
            choked: AtomicBool::new(false),
            drained: CancellationToken::new(),
            clocks: Clocks::default(),
            synced: feed.synced(),
            number: watch::Sender::new(0),
        }
    }

    /// Follows until something ends it, and says what.
    pub(super) async fn run(&mut self, reporter: &mut Reporter) -> StreamError {
        let result = async {
            let asker = Asker::of(self.node);
            let knocked = asker.knock(self.primary, handshake::STREAM_PATH, self.tracker).await;
            let (knock, opened) = knocked.map_err(|problem| self.blame(problem))?;
            self.stream(opened, knock, reporter).await
        };
        match result.await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    /// Whether the stream was good for something: then the next try need not wait.
    pub(super) fn was_fruitful(&self) -> bool {
        self.delivered.load(Ordering::Relaxed) && !self.choked.load(Ordering::Relaxed)
    }

    pub(super) fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// Whether the primary has said that it is about to end.
    pub(super) fn is_drained(&self) -> bool {
        self.drained.is_cancelled()
    }

    /// Everything after the head of the response has come.
    pub(super) async fn stream(
        &mut self,
        opened: OpenResponse,
        knock: Knock,
        reporter: &mut Reporter,
    ) -> Result<Infallible, StreamError> {
        let OpenResponse { status, headers, mut body, request, heard, guard: _guard } = opened;
        let (answer, proved) = match handshake::read_head((status, &headers), &knock, &self.node.keys) {
            Ok(answer) => answer,
            Err(Some(problem)) => return Err(self.blame(problem).into()),
            Err(None) => return Err(self.blame(foreign(status, &headers, &mut body).await).into()),
        };
        self.key = knock.binding.server();
        let (keys, channel, key) = (self.node.keys.clone(), self.node.channel.clone(), self.key);
        let end = tokio::select! {
            ended = self.follow(&knock, &answer, (body, heard), request, reporter) => return ended,
            () = keys.dropped(proved) => PeerProblem::SecretDropped,
            () = channel.shut_out(key) => key.map_or(PeerProblem::SecretDropped, PeerProblem::ShutOut),
        };
        Err(self.blame(end).into())
    }

    /// Everything after the primary has proved the secret.
    async fn follow(
        &mut self,
        knock: &Knock,
        answer: &Answer,
        (body, heard): (Incoming, Arc<Heard>),
        mut request: RequestBody,
        reporter: &mut Reporter,
    ) -> Result<Infallible, StreamError> {
        let (standing, wants) = self.feed.standing().await?;
        self.epoch = Some(standing.history.epoch());
        self.hello(&standing, knock, answer, &mut request).await?;
        let mut units = Units::new(body, heard.clone(), self.primary);
        let first = units.next().await?;
        let welcome = self.welcome(&first, answer, standing.history.epoch())?;
        if welcome.packed {
            units.expect_packed()?;
        }
        self.hear(welcome.epoch).await?;
        self.take_keys(&welcome, &mut units).await?;
        self.lagging.connected(welcome.position, self.dialled, heard);
        self.epoch = Some(welcome.epoch);
        // One that takes back what it lost serves no requests before it has that.
        if welcome.plan != Plan::Recover {
            self.follows(welcome.epoch, welcome.peer.clone());
        }
        reporter.connected((&welcome.peer, self.key), welcome.plan);
        if welcome.plan == Plan::Recover {
            return Err(self.give_back(welcome.position, &mut request, &mut units).await.into());
        }
        // What was decided says whether the primary has the state that is here.
        self.feed.feed(vec![first]).await?;
        let asked = self.asked.take();
        let (accepts, accepted) = mpsc::channel(OFFERS_MAX);
        let waiting = (wants, asked, accepted);
        let (node, drained) = (self.node, self.drained.clone());
        let acks = acknowledge(node, self.feed, self.dialled, waiting, request, drained);
        // There is one stream in each connection.
        let offered = self.offered.take().unwrap_or_else(|| mpsc::channel(1).1);
        let offers = offers::answer(node, self.feed, offered, accepts);
        let outdated = outdated(node, self.number.subscribe());
        let (clocks, synced) = (self.clocks.clone(), self.synced.clone());
        let end = tokio::select! {
            ended = self.receive(&mut units, reporter) => return ended,
            never = clocks.follow(node, synced) => match never {},
            never = offers => match never {},
            () = acks => PeerProblem::Connection("nothing more can be sent on it".into()),
            ours = outdated => old_epoch(*self.number.borrow(), ours),
        };
        Err(self.blame(end).into())
    }

    async fn hello(
        &self,
        standing: &ReplicaStanding,
        knock: &Knock,
        answer: &Answer,
        request: &mut RequestBody,
    ) -> Result<()> {
        let mut hello = Hello {
            proof: [0; 32],
            keys: PeerKeys::of(self.node.database_keys.get(), !self.node.keys.is_follower()),
            peer: self.node.me.clone(),
            position: standing.position,
            history: (*standing.history).clone(),
            resume: standing.resume,
            suspect: standing.suspect,
            marks: standing.marks.clone(),
        };
        handshake::seal_hello(&mut hello, knock, &answer.nonce, &self.node.keys);
        let sent = request.send_data(encoded(&Message::Hello(hello))).await;
        sent.map_err(|_| self.blame(PeerProblem::Connection("it hung up before the hello".into())))
    }

    fn welcome(&self, unit: &Unit, answer: &Answer, ours: Epoch) -> Result<Welcome> {
        let welcome = match unit.decode().map_err(|e| self.garbled(e.to_string()))? {
            Message::Welcome(welcome) => welcome,
            Message::Goodbye(goodbye) => return Err(self.goodbye(goodbye.reason)),
            _ => return Err(self.garbled(format!("{:?} in place of a welcome", unit.kind))),
        };
        if welcome.peer.node != answer.node || welcome.peer.incarnation != answer.incarnation {
            return Err(self.garbled("a welcome from another node than the answer".into()));
        }
        self.check_epoch(welcome.epoch, ours)?;
        Ok(welcome)
    }

    /// Gives the primary what it lost and this node has. Returns how the stream ends: by the
    /// primary's word.
    async fn give_back(&self, after: Position, request: &mut RequestBody, units: &mut Units<'_>) -> Error {
        tracing::info!(primary = %self.primary, %after, "the primary takes back what it lost");
        if let Some(log) = self.feed.log() {
            let mut records = give_back::records(log, after);
            while let Some(bytes) = records.recv().await {
                if request.send_data(bytes).await.is_err() {
                    break;
                }
            }
        }
        let end = Message::Goodbye(Goodbye { reason: "these are all records".into() });
        // Whether it came or not, the primary has the last word.
        let _ = request.send_data(encoded(&end)).await;
        self.delivered.store(true, Ordering::Relaxed);
        match units.next().await {
            Ok(unit) => match self.decode(&unit) {
                Ok(Message::Goodbye(goodbye)) => self.goodbye(goodbye.reason),
                Ok(_) => self.garbled(format!("{:?} in place of a goodbye", unit.kind)),
                Err(error) => error,
            },
            Err(error) => error,
        }
    }

    /// The node never applies anything of a superseded primary. Nor of a second one with the same
    /// epoch number: ours would have exceeded it after our hello.
    fn check_epoch(&self, theirs: Epoch, ours: Epoch) -> Result<()> {
        if theirs.number() < ours.number() || (theirs.number() == ours.number() && theirs != ours) {
            let problem = PeerProblem::OldEpoch { theirs: theirs.to_string(), ours: ours.to_string() };
            return Err(self.blame(problem));
        }
        let heard = self.node.lease.heard.number();
        if !self.node.lease.fixed && theirs.number() < heard {
            return Err(self.blame(old_epoch(theirs.number(), heard)));
        }
        Ok(())
    }

    /// The primary has this epoch. That is on the disk before anything is made of it.
    async fn hear(&self, epoch: Epoch) -> Result<()> {
        let node = self.node.clone();
        // First, for the stream is not ended by its own epoch.
        self.number.send_replace(epoch.number());
        if !node.lease.fixed && node.lease.heard.number() < epoch.number() {
            blocking(move || node.hear(epoch.number())).await?;
        }
        Ok(())
    }

    async fn receive(
        &mut self,
        units: &mut Units<'_>,
        reporter: &mut Reporter,
    ) -> Result<Infallible, StreamError> {
        loop {
            // All that has arrived goes over at once: applying many transactions together costs
            // less.
            let first = units.next().await?;
            let mut batch = Vec::new();
            let mut end = self.sort(first, &mut batch).await;
            let mut bytes = 0;
            while end.is_ok() && bytes < BATCH_MAX_BYTES {
                match units.now().await {
                    Ok(Some(unit)) => {
                        bytes += unit.raw.len();
                        end = self.sort(unit, &mut batch).await;
                    }
                    Ok(None) => break,
                    Err(error) => end = Err(error),
                }
            }
            self.hand_over(batch).await?;
            // What came before the bad unit was good and is taken over first.
            end?;
            if self.level || self.feed.taken() != self.taken {
                reporter.healthy();
            }
        }
    }

    /// Deals with what concerns the stream; data goes into the batch.
    async fn sort(&mut self, unit: Unit, batch: &mut Vec<Unit>) -> Result<()> {
        match unit.kind {
            Kind::Page | Kind::Patch | Kind::TxnEnd | Kind::Txn | Kind::Sums | Kind::Sent => {}
            // A bad one: what takes units in says so, as of others.
            Kind::Next => {}
            Kind::TxnBegin | Kind::SnapBegin | Kind::SnapPiece | Kind::SnapEnd | Kind::HealBegin => {
                self.note(&unit);
            }
            Kind::Epochs => self.epochs(&unit).await?,
            Kind::Heartbeat => {
                let Message::Heartbeat(beat) = self.decode(&unit)? else {
                    return Err(self.garbled("a heartbeat that is none".into()));
                };
                self.lagging.beat(beat.position, self.answered(beat.clock));
                self.clocks.heard(beat.lease_clock, beat.position);
                self.clocks.settle(self.node, *self.synced.borrow());
                self.level |= self.node.applied.position() == Some(beat.position);
                self.delivered.store(true, Ordering::Relaxed);
                self.follows_still();
                return Ok(());
            }
            Kind::Goodbye => {
                let Message::Goodbye(goodbye) = self.decode(&unit)? else {
                    return Err(self.garbled("a goodbye that is none".into()));
                };
                return Err(self.goodbye(goodbye.reason));
            }
            Kind::Want => {
                let Message::Want(want) = self.decode(&unit)? else {
                    return Err(self.garbled("a question that is none".into()));
                };
                // One at a time.
                self.questions.try_send(want).map_err(|_| self.garbled("a second question".into()))?;
                return Ok(());
            }
            Kind::Handoff | Kind::Offer | Kind::Handed => return self.handoff(&unit),
            Kind::Drain => {
                self.decode(&unit)?;
                self.drain();
                return Ok(());
            }
            Kind::Hello | Kind::Welcome | Kind::Ack | Kind::Segment | Kind::Standing | Kind::Accept => {
                return Err(self.garbled(format!("an unexpected {:?}", unit.kind)));
            }
        }
        batch.push(unit);
        Ok(())
    }

    /// When this node's clock was so many microseconds. At 0 the primary had no acknowledgement.
    /// A clock that is ahead of this node's answers none, either: this machine may have stood still
    /// while the primary counted on.
    fn answered(&self, clock: u64) -> Option<Instant> {
        let (now, clock) = (self.dialled.elapsed(), Duration::from_micros(clock));
        let counts = !clock.is_zero() && clock <= now + AHEAD_MAX;
        counts.then(|| self.dialled + clock.min(now))
    }

    async fn epochs(&mut self, unit: &Unit) -> Result<()> {
        let Message::Epochs(history) = self.decode(unit)? else {
            return Err(self.garbled("epochs that are none".into()));
        };
        let history: EpochHistory = history;
        let (theirs, ours) = (history.epoch(), self.epoch.unwrap_or_else(|| history.epoch()));
        self.check_epoch(theirs, ours)?;
        self.hear(theirs).await?;
        self.clocks.told(&history, self.node);
        if let Some(peer) = self.peer.clone() {
            self.follows(theirs, peer);
        }
        Ok(())
    }

    async fn hand_over(&self, batch: Vec<Unit>) -> Result<(), StreamError> {
        let Some(last) = batch.iter().rposition(|u| u.kind.ends_record()) else {
            return self.take(batch).await;
        };
        // Its hash is looked at here, too. The replica's engine refuses a bad one.
        if let Ok(message) = batch[last].decode()
            && let Some(RecordPart::End(end)) = message.parts().last()
        {
            self.lagging.heard(end.after.number());
        }
        self.take(batch).await
    }

    /// Also with nothing but a heartbeat: what was fed last may have failed since.
    async fn take(&self, batch: Vec<Unit>) -> Result<(), StreamError> {
        let data = batch.iter().any(|u| u.kind != Kind::Epochs);
        let fed = self.feed.feed(batch).await;
        match &fed {
            Ok(()) if data => self.delivered.store(true, Ordering::Relaxed),
            Ok(()) => {}
            // Otherwise the primary would be asked at once, again and again, for bytes that we
            // can't take.
            Err(_) => self.choked.store(true, Ordering::Relaxed),
        }
        fed
    }

    fn decode<'u>(&self, unit: &'u Unit) -> Result<Message<'u>> {
        unit.decode().map_err(|e| self.garbled(e.to_string()))
    }

    fn blame(&self, problem: PeerProblem) -> Error {
        Error::peer(self.primary.to_string(), problem)
    }

    fn garbled(&self, what: String) -> Error {
        self.blame(PeerProblem::Garbled(what))
    }

    fn goodbye(&self, reason: String) -> Error {
        self.blame(PeerProblem::Goodbye(shown(&reason, GOODBYE_MAX_BYTES)))
    }
}

/// Returns the number of an epoch that was heard of and is later than the stream's.
async fn outdated(node: &NodeContext, mut number: watch::Receiver<u64>) -> u64 {
    let mut heard = node.lease.heard.watch();
    loop {
        let (ours, theirs) = (*heard.borrow_and_update(), *number.borrow_and_update());
        if !node.lease.fixed && ours > theirs {
            return ours;
        }
        tokio::select! {
            Ok(()) = heard.changed() => {}
            Ok(()) = number.changed() => {}
            // Both senders outlive the stream.
            else => return std::future::pending().await,
        }
    }
}

fn old_epoch(theirs: u64, ours: u64) -> PeerProblem {
    PeerProblem::OldEpoch { theirs: format!("number {theirs}"), ours: format!("number {ours}") }
}
