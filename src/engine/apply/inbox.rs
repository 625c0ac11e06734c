//! What goes to the apply thread, and what the thread tells the outside.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use tokio::sync::{mpsc, oneshot, watch};

use crate::engine::apply::stream_error::StreamError;
use crate::engine::file::reader::reader;
use crate::engine::file::term::Term;
use crate::engine::recover::opened::Opened;
use crate::engine::source::answer;
use crate::error::{Cause, Error, Result};
use crate::keys::DatabaseKeys;
use crate::lock::lock;
use crate::page::PageNo;
use crate::txid::{EpochHistory, Position};
use crate::wire::{self, Message, Unit, Want};

/// What the apply thread tells the outside.
#[derive(Debug)]
pub(in crate::engine) struct ApplyShared {
    pub(in crate::engine) term: Mutex<Option<Arc<Term>>>,
    pub(in crate::engine) readable: watch::Sender<bool>,
    /// Odd while readers may see what the position does not have yet.
    pub(in crate::engine) shown: watch::Sender<u64>,
    pub(in crate::engine) synced: watch::Sender<Option<Position>>,
    /// Why the current stream can't go on.
    pub(in crate::engine) failure: Mutex<Option<StreamError>>,
    /// Why the thread has ended, if that was a failure.
    pub(in crate::engine) fallen: Mutex<Option<Cause>>,
    pub(in crate::engine) stop: AtomicBool,
    /// Heals that were finished since the node started.
    pub(in crate::engine) heals: AtomicU64,
    /// Batches that were taken in.
    pub(in crate::engine) taken: AtomicU64,
}

impl ApplyShared {
    /// Readers see more than the position has, until this is dropped.
    pub(in crate::engine) fn show(&self) -> Showing<'_> {
        self.shown.send_modify(|times| *times += 1);
        Showing(&self.shown)
    }

    /// Reads the pages that the primary asks for, piece by piece. The apply thread can't close the
    /// state while this reads a piece.
    pub(in crate::engine) fn answer(&self, want: &Want) -> Result<Bytes> {
        let nothing = || Error::NoState("nothing to compare with yet".into());
        let (mut handle, size) = {
            let base = lock(&self.term);
            let base = base.as_ref().ok_or_else(nothing)?;
            (reader(base)?, (base.page_size, base.page_key))
        };
        let read = |first, most| {
            let base = lock(&self.term);
            base.as_ref().ok_or_else(nothing)?.read_piece(&mut handle, first, most)
        };
        let (bytes, sent) = answer(read, size, &want.runs)?;
        let mut out = BytesMut::from(bytes);
        wire::encode(&Message::Sent(sent), &mut out);
        Ok(out.freeze())
    }
}

/// See [`ApplyShared::show`].
pub(in crate::engine) struct Showing<'a>(&'a watch::Sender<u64>);

impl Drop for Showing<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|times| *times += 1);
    }
}

pub(in crate::engine) enum ApplyCommand {
    Units(Vec<Unit>),
    ReplicaStanding(oneshot::Sender<(ReplicaStanding, mpsc::Receiver<Want>)>),
    /// The primary has these keys.
    Keys(DatabaseKeys, oneshot::Sender<Result<()>>),
    /// The WAL may be ready to be restarted.
    Restart,
    /// The pages are not what the position says.
    Suspect,
    Stop,
    /// Hand on what is open, and end.
    Leave(std::sync::mpsc::SyncSender<Result<Opened>>),
    /// Say which state is here that a primary vouches for, when all that came before this is taken
    /// in.
    Vouched(std::sync::mpsc::SyncSender<Option<Position>>),
    /// End, and close what is open, whatever it is: the node is about to open it in another way.
    Abandon(std::sync::mpsc::SyncSender<()>),
}

/// Where a replica stands, for its hello.
#[derive(Clone, Debug)]
pub(crate) struct ReplicaStanding {
    pub(crate) position: Option<Position>,
    pub(crate) history: Arc<EpochHistory>,
    /// A snapshot that was begun: the position of its first piece, and the first page that is
    /// missing.
    pub(crate) resume: Option<(Position, PageNo)>,
    /// The pages may not be what the position says: the primary and this node compare all of them.
    pub(crate) suspect: bool,
    /// Earlier states, newest first, among which the primary looks for the fork.
    pub(crate) marks: Vec<Position>,
}
