//! Sends a replica what it lacks, and from then on the log as it grows.

mod pages;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::context::NodeContext;
use crate::error::{Error, Result};
use crate::log::Lookup;
use crate::page::PageNo;
use crate::primary::boundary::Boundary;
use crate::primary::clock::ReplicaClock;
use crate::primary::handoff::StreamWords;
use crate::primary::page_requests::Questions;
use crate::primary::plan::{ReplicaPlan, plan};
use crate::primary::send_queue::{Closed, StreamSender};
use crate::primary::{LAST_REQUESTS_TIMEOUT, LogPin, StreamSource, blocking};
use crate::report::Condition;
use crate::secret::Rights;
use crate::txid::{Epoch, EpochHistory, Position};
use crate::wire::{
    self, HealBegin, Heartbeat, Hello, Message, NOT_PRIMARY, PeerKeys, SHUTTING_DOWN, Shortener, Want,
    Welcome,
};

/// Bytes of the log that are read at once.
const READ_MAX_BYTES: usize = 1024 * 1024;
/// How often the position is said. A replica that hears nothing for some seconds says so, and takes
/// ten seconds of silence for a dead primary.
const BEAT: Duration = Duration::from_secs(1);
/// Longest wait until the log has what the first snapshot piece was read at.
const LOG_LAG_MAX: Duration = Duration::from_secs(10);
/// How often a peer's epoch is exceeded before its hello is given up.
const RAISES_MAX: usize = 3;

/// How a stream ended.
#[derive(Debug)]
pub(super) enum End {
    /// The replica left, or its connection broke.
    Left,
    /// We end it, and say why.
    Said(String),
    /// Something failed.
    Failed(Error),
}

impl From<Error> for End {
    fn from(error: Error) -> End {
        End::Failed(error)
    }
}

/// One replica's stream.
pub(super) struct ReplicaStream {
    node: Arc<NodeContext>,
    source: Arc<dyn StreamSource>,
    sender: StreamSender,
    boundary: Boundary,
    shortener: Shortener,
    /// The history that the replica was told last.
    told: Arc<EpochHistory>,
    last_beat: Instant,
    questions: Questions,
    /// What is said of a handoff.
    words: StreamWords,
    /// Turns to compare all pages.
    comparisons: Arc<Semaphore>,
    /// Until when the stream waits for the replica's requests, once it has told the replica that
    /// this node drains.
    draining: Option<Instant>,
    /// Cancelled when the replica has said that all of them are answered.
    quiet: CancellationToken,
    clock: ReplicaClock,
    rights: Rights,
}

impl ReplicaStream {
    pub(super) fn new(
        node: Arc<NodeContext>,
        source: Arc<dyn StreamSource>,
        sender: StreamSender,
        (questions, words): (Questions, StreamWords),
        (comparisons, clock): (Arc<Semaphore>, ReplicaClock),
        rights: Rights,
    ) -> ReplicaStream {
        let boundary = Boundary::default();
        let (told, last_beat) = (Arc::default(), Instant::now());
        let quiet = CancellationToken::new();
        ReplicaStream {
            node,
            source,
            sender,
            boundary,
            shortener: Shortener::default(),
            told,
            last_beat,
            questions,
            words,
            comparisons,
            draining: None,
            quiet,
            clock,
            rights,
        }
    }

    /// To be cancelled when the replica has said that it sends no more requests.
    pub(super) fn quiet(&self) -> CancellationToken {
        self.quiet.clone()
    }

    /// The way out, when a last unit may be put on it.
    pub(super) fn sender_between_units(self) -> Option<StreamSender> {
        self.boundary.is_clean().then_some(self.sender)
    }

    /// Serves until something ends it.
    pub(super) async fn run(&mut self, hello: &Hello, wants: mpsc::Receiver<Want>) -> End {
        match self.serve(hello, wants).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn serve(
        &mut self,
        hello: &Hello,
        wants: mpsc::Receiver<Want>,
    ) -> Result<std::convert::Infallible, End> {
        let (decision, tip) = self.decide(hello).await?;
        let Some(announced) = decision.announced() else {
            return Err(End::Said("the replica's epochs can't be exceeded".into()));
        };
        self.told = self.node.applied.history();
        let welcome = Welcome {
            peer: self.node.me.clone(),
            epoch: self.told.epoch(),
            plan: announced,
            position: tip,
            page_size: self.source.page_size(),
            keys: PeerKeys::of(self.node.database_keys.get(), self.rights == Rights::Member),
            packed: self.node.channel.compresses(),
        };
        let packed = welcome.packed;
        self.say(&[Message::Welcome(welcome)]).await?;
        if packed {
            self.sender.pack()?;
        }
        self.say(&[Message::Epochs((*self.told).clone())]).await?;
        tracing::debug!(node = %hello.peer.node, ?decision, "a replica's plan");
        match decision {
            ReplicaPlan::Log { lsn } => {
                let pin = self.source.pin(lsn);
                self.log(lsn, pin).await
            }
            ReplicaPlan::Resume { first, from, lsn } => {
                let pin = self.source.pin(lsn);
                self.snapshot(Some(first), from).await?;
                self.log(lsn, pin).await
            }
            ReplicaPlan::Snapshot => {
                // Before the first piece is read: the records after it must still be there at the
                // end.
                let pin = self.pin_tip().await?;
                let first = self.snapshot(None, PageNo::FIRST).await?;
                let lsn = self.after(first).await?;
                self.log(lsn, pin).await
            }
            ReplicaPlan::Heal { from, lsn } => {
                let pin = self.source.pin(lsn);
                let (page_size, source) = (self.source.page_size(), self.source.clone());
                let pages = blocking(move || source.read_piece(PageNo::FIRST, 1)).await?.pages;
                let begin = HealBegin { from, page_size, pages, compare: false, diverged: true };
                self.say(&[Message::HealBegin(begin)]).await?;
                self.answer(wants, None).await?;
                self.log(lsn, pin).await
            }
            ReplicaPlan::Compare { diverged } => {
                let turn = self.turn().await?;
                let pin = self.pin_tip().await?;
                let (first, last) = self.sums(diverged).await?;
                drop(turn);
                self.answer(wants, Some(last)).await?;
                let lsn = self.after(first).await?;
                self.log(lsn, pin).await
            }
            ReplicaPlan::Raise { .. } | ReplicaPlan::TooFar { .. } => Err(End::Left),
        }
    }

    /// Decides, after our epoch was raised above the replica's where that is needed. What a
    /// follower says of epochs moves none.
    async fn decide(&self, hello: &Hello) -> Result<(ReplicaPlan, Position), End> {
        let hello = Arc::new(hello.clone());
        for _ in 0..RAISES_MAX {
            let (node, source, hello) = (self.node.clone(), self.source.clone(), hello.clone());
            let rights = self.rights;
            let decided = blocking(move || {
                let (history, replica) = (node.applied.history(), hello.peer.node);
                // A record is in the log, and may have gone out from there, before the position
                // says so.
                let (said, logged) = (node.applied.position(), source.tip());
                let tip = said.into_iter().chain(logged).max_by_key(|at| at.number());
                let tip = tip.ok_or_else(|| Error::NoState("no position yet".into()))?;
                let find = |number| match source.find(number) {
                    // The log is of no use there, and the pages are.
                    Err(error @ Error::Corrupt { .. }) => {
                        node.report(Condition::PlaceNotFound { error: &error, node: replica });
                        Ok(Lookup::TooOld)
                    }
                    found => found,
                };
                let decision = plan(&history, tip, find, &hello, source.page_key())?;
                match decision {
                    ReplicaPlan::Raise { .. } | ReplicaPlan::TooFar { .. } if rights == Rights::Follower => {
                        let (theirs, ours) = (hello.history.epoch(), history.epoch());
                        node.report(Condition::FollowerAhead { theirs, ours, node: replica });
                        return Ok((ReplicaPlan::TooFar { theirs, ours }, tip));
                    }
                    // By the lease this node may not be the primary any more. It is not for it to
                    // outbid the other.
                    ReplicaPlan::Raise { above } if !node.lease.fixed => {
                        node.hear_later(above.max(history.epoch().number() + 1))?;
                    }
                    ReplicaPlan::Raise { above } => {
                        node.report(Condition::NewerEpoch { above, node: replica });
                        source.raise_epoch(above)?;
                    }
                    ReplicaPlan::TooFar { theirs, ours } => {
                        node.report(Condition::EpochsTooFar { theirs, ours, node: replica });
                    }
                    _ => {}
                }
                Ok((decision, tip))
            });
            match decided.await? {
                (ReplicaPlan::Raise { above }, _) if !self.node.lease.fixed => {
                    return Err(End::Said(superseded(above)));
                }
                (ReplicaPlan::Raise { .. }, _) => {}
                (ReplicaPlan::TooFar { theirs, ours }, _) => return Err(End::Said(too_far(theirs, ours))),
                decided => return Ok(decided),
            }
        }
        Err(End::Said("the replica's epochs can't be exceeded".into()))
    }

    /// The log from `lsn` on, for ever.
    async fn log(&mut self, mut lsn: u64, pin: Box<dyn LogPin>) -> Result<std::convert::Infallible, End> {
        let log = self.source.clone();
        let mut end = log.watch();
        let mut settled = false;
        self.words.follows();
        loop {
            // Seen before reading: an end that moves after the read wakes the wait below.
            end.borrow_and_update();
            let last = log.last();
            let bytes = match read(&log, lsn).await? {
                // What comes after that is for the next primary to say.
                LogRead::Bytes(bytes) => match last.map(|last| last.saturating_sub(lsn) as usize) {
                    Some(left) if left < bytes.len() => bytes.slice(..left),
                    _ => bytes,
                },
                LogRead::Gone => {
                    // A record that was taken back before any of it was sent is nothing to this
                    // replica.
                    let on = log.step_over(lsn);
                    if on == lsn || !self.boundary.is_clean() {
                        return Err(End::Said(FELL_BEHIND.into()));
                    }
                    lsn = on;
                    continue;
                }
            };
            // After reading: what was read may belong to an epoch that was opened in between.
            self.tell_news().await?;
            if bytes.is_empty() {
                if log.end() < lsn {
                    return Err(End::Said("the log was taken back".into()));
                }
                self.tell_words(lsn).await?;
                if settled {
                    return Err(End::Said(SHUTTING_DOWN.into()));
                }
                if last.is_some_and(|last| lsn >= last) {
                    return Err(End::Said(NOT_PRIMARY.into()));
                }
                tokio::select! {
                    changed = end.changed() => changed.map_err(|_| Error::ShutDown)?,
                    want = self.questions.next(), if self.boundary.is_clean() => {
                        self.say(&[Message::Want(want)]).await?;
                    }
                    () = self.words.changed() => {}
                    () = tokio::time::sleep_until(self.last_beat + BEAT) => self.beat().await?,
                    () = self.node.drain.cancelled(),
                        if self.draining.is_none() && self.boundary.is_clean() => {}
                    () = requests_answered(self.draining, &self.quiet) => {
                        // What was acknowledged to a client by now may not have come into the log
                        // yet.
                        let log = log.clone();
                        blocking(move || log.settle()).await?;
                        settled = true;
                    }
                }
                continue;
            }
            let whole = self.boundary.is_clean();
            let n = self.boundary.cut(&bytes);
            let whole = whole && self.boundary.is_clean();
            self.sender.send(self.shortener.shorten(bytes.slice(..n), whole)).await?;
            lsn += n as u64;
            pin.advance(lsn);
            self.beat_if_due().await?;
        }
    }

    async fn pin_tip(&self) -> Result<Box<dyn LogPin>, End> {
        let log = self.source.clone();
        let pin = blocking(move || {
            let tip = log.tip().ok_or_else(|| Error::NoState("the log has no position yet".into()))?;
            match log.find(tip.number())? {
                Lookup::At { lsn, .. } => Ok(log.pin(lsn)),
                found => Err(Error::Internal(format!("the log does not find its tip: {found:?}"))),
            }
        });
        Ok(pin.await?)
    }

    /// Where the log goes on after a position that was just captured.
    async fn after(&self, position: Position) -> Result<u64, End> {
        let log = self.source.clone();
        let mut end = log.watch();
        let deadline = Instant::now() + LOG_LAG_MAX;
        loop {
            end.borrow_and_update();
            let (log, number) = (log.clone(), position.number());
            match blocking(move || log.find(number)).await? {
                Lookup::At { lsn, before } if before == position => return Ok(lsn),
                Lookup::At { .. } | Lookup::TooOld => return Err(End::Said(FELL_BEHIND.into())),
                Lookup::NotYet => {}
            }
            match tokio::time::timeout_at(deadline, end.changed()).await {
                Ok(changed) => changed.map_err(|_| Error::ShutDown)?,
                Err(_) => return Err(End::Said("the log does not follow the database".into())),
            }
        }
    }

    /// What is said between records.
    async fn tell_news(&mut self) -> Result<(), End> {
        self.tell_epochs().await?;
        self.tell_drain().await?;
        self.tell_stage().await?;
        if self.boundary.is_clean()
            && let Some(want) = self.questions.now()
        {
            self.say(&[Message::Want(want)]).await?;
        }
        Ok(())
    }

    /// Offers the lease, or says that it was handed over, when the log is sent up to its end.
    async fn tell_words(&mut self, lsn: u64) -> Result<(), Closed> {
        while self.boundary.is_clean() && self.source.end() <= lsn {
            let Some(word) = self.words.now(self.source.tip()) else { break };
            self.sender.send(word).await?;
        }
        Ok(())
    }

    async fn tell_epochs(&mut self) -> Result<(), End> {
        let history = self.node.applied.history();
        if Arc::ptr_eq(&history, &self.told) || !self.boundary.is_clean() {
            return Ok(());
        }
        self.told = history;
        self.say(&[Message::Epochs((*self.told).clone())]).await?;
        Ok(())
    }

    /// Tells the replica, once, that this node drains: it is to send no more requests.
    async fn tell_drain(&mut self) -> Result<(), Closed> {
        if self.draining.is_some() || !self.node.drain.is_cancelled() || !self.boundary.is_clean() {
            return Ok(());
        }
        self.draining = Some(Instant::now() + LAST_REQUESTS_TIMEOUT);
        self.say(&[Message::Drain]).await
    }

    /// Tells the replica how far a handoff is, when that has changed.
    async fn tell_stage(&mut self) -> Result<(), Closed> {
        if self.boundary.is_clean()
            && let Some(stage) = self.words.stage()
        {
            self.say(&[Message::Handoff(stage)]).await?;
        }
        Ok(())
    }

    async fn beat_if_due(&mut self) -> Result<(), Closed> {
        if self.last_beat.elapsed() >= BEAT { self.beat().await } else { Ok(()) }
    }

    async fn beat(&mut self) -> Result<(), Closed> {
        self.last_beat = Instant::now();
        self.tell_drain().await?;
        self.tell_stage().await?;
        // Before the position: a replica with that position has all that was there by this time.
        let lease_clock = self.lease_clock();
        match self.node.applied.position() {
            Some(position) if self.boundary.is_clean() => {
                let clock = self.clock.now();
                self.say(&[Message::Heartbeat(Heartbeat { position, clock, lease_clock })]).await
            }
            _ => Ok(()),
        }
    }

    /// Microseconds of the epoch that the replica was told last.
    fn lease_clock(&self) -> Option<u64> {
        let (epoch, time) = self.node.lease.clock.now()?;
        (epoch == self.told.epoch()).then_some(time.as_micros() as u64)
    }

    async fn say(&self, messages: &[Message<'_>]) -> Result<(), Closed> {
        let mut bytes = BytesMut::new();
        for message in messages {
            wire::encode(message, &mut bytes);
        }
        self.sender.send(bytes.freeze()).await
    }
}

/// Returns when the requests are answered that a replica had sent before it was told of the drain,
/// or have taken too long. What they commit goes to the replica, too.
async fn requests_answered(until: Option<Instant>, quiet: &CancellationToken) {
    match until {
        Some(until) => drop(tokio::time::timeout_at(until, quiet.cancelled()).await),
        None => std::future::pending().await,
    }
}

/// Said to a replica that knows of a later primary, or of another one with our epoch's number.
fn superseded(theirs: u64) -> String {
    format!(
        "the replica knows an epoch with number {theirs}, which this primary's does not exceed: this node \
         acknowledges nothing until the lease shows which of the two leads"
    )
}

/// Said to a replica whose epochs no start of a primary of this history can have led to.
fn too_far(theirs: Epoch, ours: Epoch) -> String {
    format!(
        "the replica knows epoch {theirs}, which is none of this primary's and too far above its own, \
         {ours}, to be exceeded: if this is the right primary, stop the replica, move its database, the \
         -wal and the directory -replite beside it away, and start it again, so that it is filled anew"
    )
}

/// Said to a replica whose next records were dropped.
pub(super) const FELL_BEHIND: &str = "fell behind the log";

enum LogRead {
    /// Empty at the end.
    Bytes(Bytes),
    /// Dropped, or taken back.
    Gone,
}

/// The log's bytes at `lsn`.
async fn read(log: &Arc<dyn StreamSource>, lsn: u64) -> Result<LogRead> {
    if let Some(bytes) = log.read_memory(lsn, READ_MAX_BYTES) {
        return Ok(LogRead::Bytes(bytes));
    }
    if log.end() <= lsn {
        return Ok(LogRead::Bytes(Bytes::new()));
    }
    let log = log.clone();
    match blocking(move || log.read_disk(lsn, READ_MAX_BYTES)).await {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(LogRead::Gone),
        read => read.map(LogRead::Bytes),
    }
}
