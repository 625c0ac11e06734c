//! What a primary asks its replicas: for the pages that are not what it has itself.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

use crate::error::{Error, PeerProblem, Result};
use crate::lock::lock;
use crate::page::PageNo;
use crate::secret::Rights;
use crate::status::PeerInfo;
use crate::wire::{Sent, Want};

/// Longest wait for the next pages of an answer. All of them may take long on a slow link.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The most bytes of an answer: twice what is asked for at once.
const ANSWER_MAX_BYTES: usize = 2 * QUESTION_BYTES;
/// Bytes of pages that are asked for at once.
pub(crate) const QUESTION_BYTES: usize = 4 * 1024 * 1024;

/// A replica's pages that are not what was asked about.
#[derive(Debug, Default)]
pub(crate) struct PageAnswer {
    /// Runs of pages.
    pub(crate) pages: Vec<(PageNo, Bytes)>,
    /// The state that the replica read them at.
    pub(crate) at: Option<Sent>,
}

type PageQuestion = (Want, oneshot::Sender<PageAnswer>, watch::Sender<()>);

/// A way to ask one replica, as long as its stream stands.
#[derive(Clone, Debug)]
pub(crate) struct PeerChannel {
    pub(crate) peer: PeerInfo,
    questions: mpsc::Sender<PageQuestion>,
}

impl PeerChannel {
    /// Asks, and waits for the answer. One question at a time.
    pub(crate) async fn ask(&self, want: Want) -> Result<PageAnswer> {
        let peer = || self.peer.node.to_string();
        let gone = || Error::peer(peer(), PeerProblem::Connection("it left, or its stream is busy".into()));
        let (reply, answer) = oneshot::channel();
        let (coming, mut comes) = watch::channel(());
        let asked = async {
            self.questions.send((want, reply, coming)).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())
        };
        let mut asked = std::pin::pin!(asked);
        loop {
            tokio::select! {
                answer = &mut asked => return answer,
                Ok(()) = comes.changed() => {}
                () = tokio::time::sleep(SILENCE_MAX) => {
                    return Err(Error::peer(peer(), PeerProblem::Silent(SILENCE_MAX)));
                }
            }
        }
    }
}

/// The channels of a primary to its replicas.
#[derive(Clone, Debug, Default)]
pub(crate) struct PeerChannels(Arc<Mutex<Vec<PeerChannel>>>);

impl PeerChannels {
    pub(crate) fn list(&self) -> Vec<PeerChannel> {
        let mut channels = lock(&self.0);
        channels.retain(|channel| !channel.questions.is_closed());
        channels.clone()
    }

    /// A new channel, and its two ends in the stream: where questions come out, and where answers
    /// go in. A follower is never asked: its pages count for nothing here.
    pub(super) fn open(&self, peer: &PeerInfo, rights: Rights) -> (Questions, Answers) {
        let (questions, receiver) = mpsc::channel(1);
        if rights == Rights::Member {
            let mut channels = lock(&self.0);
            channels.retain(|channel| !channel.questions.is_closed());
            channels.push(PeerChannel { peer: peer.clone(), questions });
        }
        let pending = Answers::default();
        (Questions { receiver, pending: pending.clone() }, pending)
    }
}

/// The end that speaks.
pub(super) struct Questions {
    receiver: mpsc::Receiver<PageQuestion>,
    pending: Answers,
}

impl Questions {
    /// The next question.
    ///
    /// # Cancel safety
    /// No question is lost by dropping the future.
    pub(super) async fn next(&mut self) -> Want {
        match self.receiver.recv().await {
            Some(asked) => self.pending.begin(asked),
            None => std::future::pending().await,
        }
    }

    /// The next question if there is one.
    pub(super) fn now(&mut self) -> Option<Want> {
        Some(self.pending.begin(self.receiver.try_recv().ok()?))
    }
}

/// The end that hears.
#[derive(Clone, Debug, Default)]
pub(super) struct Answers(Arc<Mutex<Option<Pending>>>);

#[derive(Debug)]
struct Pending {
    answer: PageAnswer,
    bytes: usize,
    reply: oneshot::Sender<PageAnswer>,
    /// Pages have come.
    coming: watch::Sender<()>,
}

impl Answers {
    fn begin(&self, (want, reply, coming): PageQuestion) -> Want {
        // An earlier asker may have given up. Should its answer still come, this asker takes it for
        // its own, which proves nothing. The stream then ends with the answer that no one asked
        // for.
        *lock(&self.0) = Some(Pending { answer: PageAnswer::default(), bytes: 0, reply, coming });
        want
    }

    /// Pages came. False when no one asked for so much.
    pub(super) fn pages(&self, first: PageNo, pages: &[u8]) -> bool {
        match &mut *lock(&self.0) {
            Some(pending) if pending.bytes + pages.len() <= ANSWER_MAX_BYTES => {
                pending.bytes += pages.len();
                pending.answer.pages.push((first, Bytes::copy_from_slice(pages)));
                pending.coming.send_replace(());
                true
            }
            _ => false,
        }
    }

    /// The answer is complete. False when no one asked.
    pub(super) fn end(&self, at: Sent) -> bool {
        let Some(mut pending) = lock(&self.0).take() else { return false };
        pending.answer.at = Some(at);
        // The asker may have gone.
        let _ = pending.reply.send(pending.answer);
        true
    }
}
