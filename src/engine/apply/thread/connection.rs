//! One stream from the primary: what came of it, and how that becomes this node's state.

use std::sync::atomic::Ordering;

use tokio::sync::mpsc;

use crate::engine::apply::stream_error::StreamError;
use crate::engine::apply::thread::bounded::is_long;
use crate::engine::apply::thread::stage::State;
use crate::engine::apply::thread::{Apply, no_state};
use crate::engine::file::epochs::write_epochs;
use crate::engine::history::record_intake::RecordIntake;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::heal::Heal;
use crate::engine::incoming::{self, IncomingState};
use crate::error::Result;
use crate::report::Condition;
use crate::threads;
use crate::txid::{EpochHistory, Place, Position};
use crate::wire::{Kind, Message, RecordPart, SnapBegin, Unit, Want, WireError};

/// Questions of a heal that may be on their way: one.
const WANTS_MAX: usize = 1;
/// Units that are decoded before the first of them is taken in. They are enough to share among
/// threads, where they are pieces of a snapshot.
const DECODED_UNITS: usize = 64;

/// What belongs to one stream. It goes when the stream ends, and with it what no reader has seen.
pub(super) struct Connection {
    /// What the primary is asked for on the way back.
    wants: mpsc::Sender<Want>,
    intake: RecordIntake,
    pub(super) receiving: Receiving,
    /// A history that this node's state is not in. It becomes ours with the state that follows.
    next_history: Option<EpochHistory>,
}

/// A heal and what is known of the branch that it ends.
pub(super) struct Healing {
    pub(super) heal: Heal,
    /// The last state that is known to be in both histories.
    pub(super) fork: Option<Position>,
    /// Where our records after it begin in the log.
    pub(super) records_from: Option<u64>,
    /// The primary's records may still be such as we had.
    pub(super) behind: bool,
}

/// What the primary sends at the moment.
#[derive(Default)]
#[expect(clippy::large_enum_variant, reason = "a stream has one of them, which stays where it is")]
pub(super) enum Receiving {
    /// Records that follow this node's state.
    #[default]
    Records,
    /// The pages of a snapshot, in order, and records that make it exact.
    Snapshot(IncomingState),
    /// Pages that were asked for, over what is here, and records that make it exact.
    Heal(IncomingState, Healing),
}

impl Receiving {
    /// What comes beside this node's state, if it is no record for that.
    pub(super) fn incoming(&mut self) -> Option<&mut IncomingState> {
        match self {
            Receiving::Records => None,
            Receiving::Snapshot(incoming) | Receiving::Heal(incoming, _) => Some(incoming),
        }
    }

    /// Whether all pages are being compared.
    pub(super) fn compares(&self) -> bool {
        matches!(self, Receiving::Heal(_, healing) if healing.heal.begin.compare)
    }
}

impl Connection {
    /// A new stream, and what comes out of it for the primary.
    pub(super) fn open() -> (Connection, mpsc::Receiver<Want>) {
        let (wants, receiver) = mpsc::channel(WANTS_MAX);
        let (intake, receiving) = Default::default();
        (Connection { wants, intake, receiving, next_history: None }, receiver)
    }

    /// What has come and is not this node's state yet.
    pub(super) fn take_unfinished(&mut self) -> (RecordIntake, Receiving) {
        (std::mem::take(&mut self.intake), std::mem::take(&mut self.receiving))
    }

    pub(super) fn ask(&self, want: Want) -> Result<(), StreamError> {
        // One question is under way at a time: there is room while the stream stands.
        self.wants.try_send(want).map_err(|_| StreamError::Gone)
    }

    fn incoming(&mut self) -> Result<&mut IncomingState, StreamError> {
        self.receiving.incoming().ok_or_else(|| StreamError::garbled("a piece of no snapshot"))
    }

    pub(super) fn healing(&mut self) -> Result<(&mut IncomingState, &mut Healing), StreamError> {
        match &mut self.receiving {
            Receiving::Heal(incoming, healing) => Ok((incoming, healing)),
            _ => Err(StreamError::garbled("a part of no heal")),
        }
    }
}

/// Hashes and reads units, on several threads where they are many bytes. What comes of each, in
/// their order.
fn decode(units: &[Unit]) -> Vec<Result<Message<'_>, WireError>> {
    let bytes = units.iter().map(|unit| unit.raw.len()).sum();
    threads::each("replite-decode", units, bytes, Unit::decode)
}

impl Apply {
    pub(super) fn units(&mut self, connection: &mut Connection, units: &[Unit]) -> Result<(), StreamError> {
        if let State::Known(served) = &self.state {
            served.term.check()?;
        }
        for units in units.chunks(DECODED_UNITS) {
            for (unit, message) in units.iter().zip(decode(units)) {
                let message = message.map_err(|e| StreamError::garbled(e.to_string()))?;
                self.message(connection, unit, message)?;
            }
        }
        self.publish(connection)?;
        let data = |unit: &Unit| !matches!(unit.kind, Kind::Welcome | Kind::Epochs);
        if units.iter().any(data) {
            self.shared.taken.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn message(
        &mut self,
        connection: &mut Connection,
        unit: &Unit,
        message: Message<'_>,
    ) -> Result<(), StreamError> {
        match message {
            Message::Welcome(welcome) => self.welcome(welcome.plan)?,
            Message::Epochs(history) => self.epochs(connection, history)?,
            Message::SnapBegin(begin) => self.snapshot(connection, begin)?,
            Message::HealBegin(begin) => self.heal(connection, begin)?,
            Message::Sums { first, span, sums } => {
                let (incoming, healing) = connection.healing()?;
                incoming.with(self.state.below(), |overlay, store| {
                    healing.heal.sums(overlay, store, (first, span, sums))
                })?;
            }
            Message::Sent(sent) => self.sent(connection, sent)?,
            Message::SnapPiece { run, .. } => match &mut connection.receiving {
                Receiving::Heal(incoming, _) => incoming.patch(&run, self.state.below())?,
                _ => connection.incoming()?.piece(&run)?,
            },
            Message::SnapEnd(end) => {
                if connection.incoming()?.end(end, self.state.below())? {
                    self.adopt(connection)?;
                }
            }
            _ if unit.kind.is_of_record() => self.record(connection, unit, &message)?,
            _ => return Err(StreamError::garbled("a unit that does not belong into a stream")),
        }
        Ok(())
    }

    /// A part of a record. It follows this node's state, or makes what comes exact.
    fn record(
        &mut self,
        connection: &mut Connection,
        unit: &Unit,
        message: &Message<'_>,
    ) -> Result<(), StreamError> {
        let Some(incoming) = connection.receiving.incoming() else {
            let live = self.state.known().ok_or_else(no_state)?;
            connection.intake.unit(live, unit, message, &self.history)?;
            // Without this the thread would not begin the WAL anew before a batch happens to end
            // with a transaction.
            if unit.kind.ends_record() && is_long(live) {
                self.publish(connection)?;
            }
            return Ok(());
        };
        let mut ended = None;
        for part in message.parts() {
            match part {
                RecordPart::Begin(begin) => incoming.txn_begin(begin)?,
                RecordPart::Change(change) => incoming.change(&change, self.state.below())?,
                RecordPart::End(end) => ended = Some((end.after, incoming.txn_end(end, self.state.below())?)),
            }
        }
        if let Some((after, exact)) = ended {
            self.common(connection, after)?;
            if exact {
                self.adopt(connection)?;
            }
        }
        Ok(())
    }

    fn snapshot(&mut self, connection: &mut Connection, begin: SnapBegin) -> Result<(), StreamError> {
        let (first, from) = (begin.first, begin.from);
        self.node.report(Condition::SnapshotStarted { first, from });
        if self.state.below().is_some() {
            return Err(StreamError::garbled("a snapshot over a live database"));
        }
        let (place, key) = (self.place(begin.page_size), self.options.page_key());
        let incoming = IncomingState::begin(&self.options.paths, key, begin, place)?;
        connection.receiving = Receiving::Snapshot(incoming);
        Ok(())
    }

    /// The log gets the records first, then readers see them.
    fn publish(&mut self, connection: &mut Connection) -> Result<()> {
        let Some(live) = self.state.known() else { return Ok(()) };
        let before = live.base.tip().position;
        let showing = self.shared.show();
        connection.intake.publish(live)?;
        let position = live.base.tip().position;
        // Where the position stayed, no primary may vouch for what is here.
        if position != before {
            self.node.applied.advance(position);
        }
        drop(showing);
        self.maybe_restart()
    }

    fn epochs(&mut self, connection: &mut Connection, history: EpochHistory) -> Result<()> {
        let ours = |live: &mut WalAppender| history.place(live.position().txid()) == Place::OnHistory;
        if !self.state.known().is_some_and(ours) {
            connection.next_history = Some(history);
        } else if history != self.history {
            write_epochs(self.options.keyed(), &history, false)?;
            self.history = history.clone();
            self.node.applied.replace(history, self.node.applied.position());
        }
        Ok(())
    }

    /// What came is exact: it becomes this node's state.
    fn adopt(&mut self, connection: &mut Connection) -> Result<(), StreamError> {
        let position = connection.incoming()?.position();
        let history = connection.next_history.take().unwrap_or_else(|| self.history.clone());
        if history.place(position.txid()) != Place::OnHistory {
            return Err(StreamError::garbled("a snapshot that is not in its own history"));
        }
        let (ready, healing) = match std::mem::take(&mut connection.receiving) {
            Receiving::Records => return Ok(()),
            Receiving::Snapshot(incoming) => (incoming.finish()?, None),
            Receiving::Heal(incoming, healing) => (incoming.finish()?, Some(healing)),
        };
        match healing.filter(|_| self.state.below().is_some()) {
            Some(healing) => self.adopt_heal(&healing, &ready, history)?,
            None => {
                self.fill(&ready, history)?;
                self.node.report(Condition::SnapshotFinished { position });
            }
        }
        self.node.set_late(false);
        incoming::discard(&self.options.paths)?;
        Ok(())
    }
}
