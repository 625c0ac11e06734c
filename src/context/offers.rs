//! What the stream from a primary says of a handoff, on its way to this node's election.

use std::sync::Mutex;

use tokio::sync::{Notify, mpsc, oneshot};

use crate::lock::lock;
use crate::txid::Position;

/// What may wait for the election. A primary makes one offer at a time.
const WORDS_MAX: usize = 4;

/// What the primary that is followed says.
#[derive(Debug)]
pub(crate) enum HandoffWord {
    /// It offers its lease with this as its last state, which is on this node's disk.
    Offered { attempt: u128, position: Position, answer: oneshot::Sender<Result<String, String>> },
    /// It has handed the lease over: this is the record, and the store's text for its version.
    Handed { attempt: u128, record: Vec<u8>, version: String },
}

/// The way of these words, and of hints that the record may have changed.
#[derive(Debug)]
pub(crate) struct Offers {
    words: mpsc::Sender<HandoffWord>,
    receiver: Mutex<Option<mpsc::Receiver<HandoffWord>>>,
    changed: Notify,
}

impl Default for Offers {
    fn default() -> Offers {
        let (words, receiver) = mpsc::channel(WORDS_MAX);
        Offers { words, receiver: Mutex::new(Some(receiver)), changed: Notify::new() }
    }
}

impl Offers {
    /// The end where words come out. None where it was taken before.
    pub(crate) fn take(&self) -> Option<mpsc::Receiver<HandoffWord>> {
        lock(&self.receiver).take()
    }

    /// Whether this node takes what it is offered: the id of the boot of its machine, or why not.
    ///
    /// # Cancel safety
    /// The election may have accepted by then.
    pub(crate) async fn offered(&self, attempt: u128, position: Position) -> Result<String, String> {
        let (answer, answered) = oneshot::channel();
        let gone = || "its election has ended, or is busy".to_string();
        let word = HandoffWord::Offered { attempt, position, answer };
        self.words.try_send(word).map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    /// The primary says that this node has the lease.
    pub(crate) fn handed(&self, attempt: u128, record: &[u8], version: &str) {
        let word = HandoffWord::Handed { attempt, record: record.to_vec(), version: version.to_owned() };
        if self.words.try_send(word).is_err() {
            self.hint();
        }
    }

    /// The record may have changed.
    pub(crate) fn hint(&self) {
        self.changed.notify_one();
    }

    /// Returns after a hint.
    pub(crate) async fn hinted(&self) {
        self.changed.notified().await;
    }
}
