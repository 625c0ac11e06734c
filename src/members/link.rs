//! Asking other members: one connection to each, that many questions share.
//!
//! It is dialled with the first question, and again with the first after it broke. One on which no
//! answer comes for a while is given up: what is between may have forgotten it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::TaskTracker;

use crate::error::PeerProblem;
use crate::handshake::{self, Asker, MEMBERS_PATH};
use crate::lock::lock;
use crate::members::words::{self, Ask, AskFrames, MemberAnswer};
use crate::net::{self, Endpoint};
use crate::replica::foreign;

/// Questions to one member that wait to be sent.
const WAITING_MAX: usize = 64;
/// Questions that are sent and have no answer yet.
const PENDING_MAX: usize = 256;
/// Longest wait for a connection, with all that is proved on it.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// A connection on which nothing is asked is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// How long a change of the members may take: an introduction, the log, and what is agreed on.
const CHANGE_PATIENCE: Duration = Duration::from_secs(30);

/// The connections of this node to others, each dialled when it is needed.
#[derive(Debug)]
pub(crate) struct MemberLinks {
    asker: Asker,
    tracker: TaskTracker,
    /// How long a connection may be silent while a question is open that is answered at once.
    patience: Duration,
    links: Mutex<BTreeMap<String, mpsc::Sender<Question>>>,
    /// Who did last what any of them may do.
    served: Mutex<Option<String>>,
    /// Where the next try begins, where none did.
    turn: AtomicUsize,
}

/// A question has no answer.
#[derive(Debug)]
pub(crate) struct NoReply {
    /// The other side may have it.
    pub(crate) sent: bool,
    pub(crate) why: String,
}

impl NoReply {
    fn unsent(why: impl Into<String>) -> NoReply {
        NoReply { sent: false, why: why.into() }
    }
}

#[derive(Debug)]
struct Question {
    number: u64,
    frame: Bytes,
    answer: Reply,
    /// Its answer takes time, though all is well.
    slow: bool,
}

type Reply = oneshot::Sender<Result<MemberAnswer, NoReply>>;

/// A question that was sent.
struct SentQuestion {
    answer: Reply,
    slow: bool,
}

impl MemberLinks {
    pub(crate) fn new(asker: Asker, patience: Duration) -> MemberLinks {
        let (tracker, links) = (TaskTracker::new(), Mutex::default());
        MemberLinks { asker, tracker, patience, links, served: Mutex::default(), turn: AtomicUsize::new(0) }
    }

    /// In which order nodes are asked of which any may do it: the one that did it last, then the
    /// others, each time from another one on. One that says nothing at all takes all the time that
    /// a try has, and the next try goes elsewhere.
    pub(super) fn in_order(&self, urls: &[String]) -> Vec<String> {
        let mut urls = urls.to_vec();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed).checked_rem(urls.len()).unwrap_or(0);
        urls.rotate_left(turn);
        if let Some(at) = lock(&self.served).take().and_then(|last| urls.iter().position(|url| *url == last))
        {
            urls[..=at].rotate_right(1);
        }
        urls
    }

    /// This one did it.
    pub(super) fn served_by(&self, url: &str) {
        *lock(&self.served) = Some(url.to_owned());
    }

    /// Asks the node at this URL. Its tasks run where this is awaited.
    ///
    /// # Cancel safety
    /// The question may have been sent.
    pub(crate) async fn ask(&self, url: &str, ask: &Ask) -> Result<MemberAnswer, NoReply> {
        let unsent = |error: &dyn std::fmt::Display| NoReply::unsent(format!("{url}: {error}"));
        let number = crate::random::array().map(u64::from_le_bytes).map_err(|error| unsent(&error))?;
        let frame = words::frame(number, ask).map_err(|error| unsent(&error))?;
        let (answer, answered) = oneshot::channel();
        let slow = matches!(ask, Ask::Change { .. } | Ask::Begin);
        let mut question = Question { number, frame, answer, slow };
        // A task that has just ended takes no more: the next one does.
        for _ in 0..2 {
            match self.link(url).map_err(|error| unsent(&error))?.try_send(question) {
                Ok(()) => {
                    let ended = NoReply { sent: true, why: format!("{url}: the connection ended") };
                    return answered.await.unwrap_or(Err(ended));
                }
                Err(mpsc::error::TrySendError::Closed(back)) => question = back,
                Err(mpsc::error::TrySendError::Full(_)) => break,
            }
        }
        Err(unsent(&"too many questions wait"))
    }

    fn link(&self, url: &str) -> Result<mpsc::Sender<Question>, crate::error::Error> {
        let mut links = lock(&self.links);
        if let Some(link) = links.get(url).filter(|link| !link.is_closed()) {
            return Ok(link.clone());
        }
        let to = Endpoint::parse(url)?;
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        links.retain(|_, link| !link.is_closed());
        links.insert(url.to_owned(), sender.clone());
        let link = MemberLink {
            asker: self.asker.clone(),
            tracker: self.tracker.clone(),
            to,
            patience: self.patience,
        };
        self.tracker.spawn(link.run(receiver));
        Ok(sender)
    }
}

struct MemberLink {
    asker: Asker,
    tracker: TaskTracker,
    to: Endpoint,
    patience: Duration,
}

/// A connection on which both sides proved themselves.
struct AskedConnection {
    opened: net::OpenResponse,
    frames: AskFrames,
    pending: BTreeMap<u64, SentQuestion>,
    /// Since when the oldest open question that is no slow one waits, or since when the last answer
    /// came.
    quiet_since: Instant,
}

impl MemberLink {
    /// Ends when nothing was asked for a while, or no connection could be had.
    async fn run(self, mut questions: mpsc::Receiver<Question>) {
        while let Ok(Some(first)) = timeout(IDLE_LIMIT, questions.recv()).await {
            let connected = timeout(CONNECT_LIMIT, self.connect()).await;
            let connected = connected.unwrap_or_else(|_| {
                Err(PeerProblem::Connection(format!("no connection within {CONNECT_LIMIT:?}")))
            });
            let why = match connected {
                Ok(connection) => match self.converse(connection, first, &mut questions).await {
                    // Broken: those that come now are worth a new connection.
                    Ended::Broken => continue,
                    Ended::Idle => return,
                },
                Err(problem) => format!("{}: {problem}", self.to),
            };
            let _ = first.answer.send(Err(NoReply::unsent(&why)));
            while let Ok(question) = questions.try_recv() {
                let _ = question.answer.send(Err(NoReply::unsent(&why)));
            }
        }
    }
}

/// Why a conversation ended.
enum Ended {
    Broken,
    Idle,
}

/// What happens next in one.
enum NextInTalk {
    Asked(Option<Question>),
    Came(Option<std::io::Result<Bytes>>),
    Silent,
}

impl MemberLink {
    async fn connect(&self) -> Result<AskedConnection, PeerProblem> {
        let asker = &self.asker;
        let (knock, mut opened) = asker.knock(&self.to, MEMBERS_PATH, &self.tracker).await?;
        let answer = match handshake::read_head((opened.status, &opened.headers), &knock, &asker.keys) {
            Ok((answer, _)) => answer,
            Err(Some(problem)) => return Err(problem),
            Err(None) => return Err(foreign(opened.status, &opened.headers, &mut opened.body).await),
        };
        let proof = handshake::prove_members(&knock, &answer.nonce, &asker.keys);
        let sent = opened.request.send_data(Bytes::copy_from_slice(&proof)).await;
        sent.map_err(|_| PeerProblem::Connection("it hung up before the first question".into()))?;
        Ok(AskedConnection {
            opened,
            frames: AskFrames::default(),
            pending: BTreeMap::new(),
            quiet_since: Instant::now(),
        })
    }

    /// Questions and answers, until the connection breaks or nothing is asked any more.
    async fn converse(
        &self,
        mut connection: AskedConnection,
        first: Question,
        questions: &mut mpsc::Receiver<Question>,
    ) -> Ended {
        let mut broken = connection.send(first).await;
        while broken.is_ok() {
            // Answers that are not waited for any more are still to come.
            let limit = match connection.pending.is_empty() {
                true => IDLE_LIMIT,
                false if connection.has_slow_only() => CHANGE_PATIENCE,
                false => self.patience,
            };
            let full = connection.pending.len() >= PENDING_MAX;
            let next = tokio::select! {
                asked = questions.recv(), if !full => NextInTalk::Asked(asked),
                came = connection.opened.body.next() => NextInTalk::Came(came),
                () = sleep_until(connection.quiet_since + limit) => NextInTalk::Silent,
            };
            broken = match next {
                NextInTalk::Asked(Some(question)) => connection.send(question).await,
                NextInTalk::Asked(None) => return Ended::Idle,
                NextInTalk::Came(Some(Ok(bytes))) => connection.hear(&bytes),
                NextInTalk::Came(_) => Err("it hung up".into()),
                NextInTalk::Silent if connection.pending.is_empty() => return Ended::Idle,
                NextInTalk::Silent => Err(format!("no answer within {limit:?}")),
            };
        }
        let why = format!("{}: {}", self.to, broken.err().unwrap_or_default());
        for sent in std::mem::take(&mut connection.pending).into_values() {
            let _ = sent.answer.send(Err(NoReply { sent: true, why: why.clone() }));
        }
        Ended::Broken
    }
}

impl AskedConnection {
    fn has_slow_only(&self) -> bool {
        self.pending.values().all(|sent| sent.slow)
    }

    async fn send(&mut self, question: Question) -> Result<(), String> {
        let Question { number, frame, answer, slow } = question;
        if answer.is_closed() {
            return Ok(());
        }
        if self.has_slow_only() {
            self.quiet_since = Instant::now();
        }
        self.pending.insert(number, SentQuestion { answer, slow });
        self.opened.request.send_data(frame).await.map_err(|_| "it hung up".to_owned())
    }

    fn hear(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.quiet_since = Instant::now();
        self.frames.push(bytes);
        while let Some(json) = self.frames.next().map_err(|error| error.to_string())? {
            let (number, said) = words::read::<MemberAnswer>(&json).map_err(|error| error.to_string())?;
            said.check().map_err(|error| error.to_string())?;
            // Who asked may be gone.
            if let Some(sent) = self.pending.remove(&number) {
                let _ = sent.answer.send(Ok(said));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_try_begins_with_the_one_that_did_it_last_and_else_with_another_one_each_time() {
        let node = crate::primary::fake::node(1, &crate::primary::fake::SECRET, crate::status::Role::Replica);
        let links = MemberLinks::new(Asker::of(&node), Duration::from_secs(1));
        let urls = ["a", "b", "c"].map(String::from);
        let firsts: Vec<String> = (0..4).map(|_| links.in_order(&urls)[0].clone()).collect();
        assert_eq!(firsts, ["a", "b", "c", "a"]);
        links.served_by("a");
        assert_eq!(links.in_order(&urls), ["a", "b", "c"]);
        // It may be the one that hangs now.
        assert_eq!(links.in_order(&urls)[0], "c");
        links.served_by("gone");
        assert_eq!(links.in_order(&urls).len(), 3);
        assert!(links.in_order(&[]).is_empty());
    }
}
