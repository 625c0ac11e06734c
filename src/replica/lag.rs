//! How far this node lags, and at what pace it comes nearer to its primary.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::context::NodeContext;
use crate::lock::lock;
use crate::net::Heard;
use crate::replica::pace::{Coming, Lateness, Pace};
use crate::report::Condition;
use crate::status::Lag;
use crate::txid::Position;

/// How often the figures are brought up to date.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// A stream on which nothing came for this long counts as not connected: the primary says its
/// position each second.
const QUIET_MAX: Duration = Duration::from_millis(2500);
/// The lag is unknown when the newest word of the primary is older. It says one each second, and
/// what it said is as old as the acknowledgement that it answers.
const NEWS_MAX: Duration = Duration::from_secs(5);
/// A replica that lags for longer says at what pace it comes nearer.
const SLOW_AFTER: Duration = Duration::from_secs(5);
/// What the primary said and this node does not have yet. One comes each second: this tells more
/// than an hour exactly.
const WORDS_MAX: usize = 4096;

/// What is known of the distance.
#[derive(Debug)]
pub(super) struct Lagging(Mutex<Freshness>);

#[derive(Debug)]
struct Freshness {
    /// The number of the newest transaction that the primary is known to have, once it has said
    /// one.
    newest: Option<u64>,
    /// What the primary had, and when it had no more than that at the earliest, oldest first.
    words: VecDeque<(u64, Instant)>,
    /// When the primary said, at the earliest, the newest of its words.
    news: Option<Instant>,
    /// When the primary had, at the earliest, what this node has.
    level: Option<Instant>,
    /// Since when this node follows.
    follows: Instant,
    /// Whether it is told that the lag is unknown.
    unknown: bool,
    stream: Option<Stream>,
}

/// What is to be said of a stream that stands.
#[derive(Debug)]
enum LagProblem {
    Late(String),
    Unknown(String),
}

/// A stream that stands.
#[derive(Debug)]
struct Stream {
    heard: Arc<Heard>,
    since: Instant,
    pace: Pace,
    coming: Coming,
}

impl Lagging {
    pub(super) fn new() -> Lagging {
        Lagging(Mutex::new(Freshness {
            newest: None,
            words: VecDeque::new(),
            news: None,
            level: None,
            follows: Instant::now(),
            unknown: false,
            stream: None,
        }))
    }

    /// The stream stands, and the primary is at this position, whatever it was before. It said so
    /// after this node dialled, at `dialled`.
    pub(super) fn connected(&self, primary: Position, dialled: Instant, heard: Arc<Heard>) {
        let mut known = self.lock();
        known.newest = Some(primary.number());
        known.words.clear();
        known.word(primary.number(), dialled);
        let (since, coming, pace) = (Instant::now(), Coming::Log, Pace::new(&heard));
        known.stream = Some(Stream { heard, since, pace, coming });
    }

    pub(super) fn disconnected(&self) {
        self.lock().stream = None;
    }

    /// The primary has a transaction of this number.
    pub(super) fn heard(&self, number: u64) {
        let mut known = self.lock();
        known.newest = known.newest.max(Some(number));
    }

    /// The primary has said that it has this position. It said so after what this node sent at
    /// `answers`. A word that answers nothing may be as old as it likes, and is no news.
    pub(super) fn beat(&self, primary: Position, answers: Option<Instant>) {
        let mut known = self.lock();
        known.newest = known.newest.max(Some(primary.number()));
        if let Some(at) = answers {
            known.word(primary.number(), at);
        }
    }

    /// Says what comes on the stream now.
    pub(super) fn comes(&self, change: impl FnOnce(&mut Coming)) {
        if let Some(stream) = &mut self.lock().stream {
            change(&mut stream.coming);
        }
    }

    /// Writes the figures where status looks for them.
    pub(super) fn publish(&self, node: &NodeContext) {
        let applied = node.applied.position().map(Position::number);
        let mut known = self.lock();
        let now = Instant::now();
        let lag = known.figures(applied, now);
        let said = known.problem(applied, lag, now);
        let is_unknown = matches!(said, Some(LagProblem::Unknown(_)));
        let new = !std::mem::replace(&mut known.unknown, is_unknown);
        drop(known);
        node.set_lag(Some(lag));
        node.report(match &said {
            Some(LagProblem::Late(text)) => Condition::Lagging { text },
            Some(LagProblem::Unknown(text)) => Condition::LagUnknown { text, new },
            None => Condition::CaughtUp,
        });
    }

    /// Publishes again and again.
    pub(super) async fn keep_published(&self, node: &NodeContext) {
        loop {
            self.publish(node);
            tokio::time::sleep(PUBLISH_EVERY).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Freshness> {
        lock(&self.0)
    }
}

impl Freshness {
    fn word(&mut self, number: u64, at: Instant) {
        self.news = self.news.max(Some(at));
        // What is left out makes the state seem older, never newer.
        if self.words.len() < WORDS_MAX {
            self.words.push_back((number, at));
        }
    }

    fn figures(&mut self, applied: Option<u64>, now: Instant) -> Lag {
        // Nothing was said yet, or there is no state: that is no equality.
        while let (Some(has), Some(&(number, at))) = (applied, self.words.front())
            && has >= number
        {
            self.level = self.level.max(Some(at));
            self.words.pop_front();
        }
        let since = |at| now.saturating_duration_since(at);
        Lag {
            transactions: self.news.filter(|&at| since(at) <= NEWS_MAX).map(|_| self.missing(applied)),
            age: self.level.map(since),
            connected: self.stream.as_ref().is_some_and(|stream| stream.heard.silence() <= QUIET_MAX),
            stale: since(self.level.unwrap_or(self.follows)),
        }
    }

    /// Transactions that the primary is known to have and this node does not: at least so many.
    fn missing(&self, applied: Option<u64>) -> u64 {
        self.newest.unwrap_or(0).saturating_sub(applied.unwrap_or(0))
    }

    fn problem(&mut self, applied: Option<u64>, lag: Lag, now: Instant) -> Option<LagProblem> {
        let missing = self.missing(applied);
        let stream = self.stream.as_mut()?;
        let rate = stream.pace.rate(&stream.heard, now);
        if !lag.connected {
            let seconds = stream.heard.silence().as_secs();
            let text = format!(
                "nothing was heard from the primary for {seconds} s, not even what it says each second: it \
                 stands still, or the link does"
            );
            return Some(match lag.transactions {
                Some(_) => LagProblem::Late(text),
                None => LagProblem::Unknown(format!("{text}; how far this node is behind is unknown")),
            });
        }
        let standing = now.saturating_duration_since(stream.since);
        let unknown = lag.transactions.is_none();
        if lag.stale.min(standing) < SLOW_AFTER && !unknown {
            return None;
        }
        // Within a stream there was a word: its welcome.
        let silent = unknown.then(|| self.news.map_or(standing, |at| now.saturating_duration_since(at)));
        let late = Lateness {
            filled: applied.is_some(),
            missing,
            silent,
            stale: (lag.stale, lag.age.is_some()),
            rate,
        };
        let said = stream.coming.problem(late)?;
        // Without a state it is no question how late that is.
        Some(if unknown && late.filled { LagProblem::Unknown(said) } else { LagProblem::Late(said) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::fake::{at, node};
    use crate::report::Part;
    use crate::status::{Role, whole_millis};

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn figures(lagging: &Lagging, applied: Option<u64>) -> (Option<u64>, Option<u64>, bool) {
        let lag = lagging.lock().figures(applied, Instant::now());
        (lag.transactions, lag.age.map(whole_millis), lag.connected)
    }

    fn problem(lagging: &Lagging, applied: Option<u64>) -> Option<String> {
        let mut known = lagging.lock();
        let lag = known.figures(applied, Instant::now());
        match known.problem(applied, lag, Instant::now())? {
            LagProblem::Late(text) => Some(text),
            LagProblem::Unknown(text) => Some(format!("unknown: {text}")),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_lag_counts_from_the_last_word_of_the_primary() {
        let lagging = Lagging::new();
        tokio::time::advance(s(5)).await;
        assert_eq!(figures(&lagging, None), (None, None, false), "nothing is known, and nothing is 0");
        let heard = Arc::new(Heard::new());
        heard.wait(true);
        lagging.connected(at(1, 10), Instant::now(), heard.clone());
        assert_eq!(figures(&lagging, Some(7)), (Some(3), None, true), "of what age that is, is not known");
        assert_eq!(figures(&lagging, Some(10)), (Some(0), Some(0), true));
        // Nothing comes: it may have more, and may be gone.
        tokio::time::advance(s(2)).await;
        assert_eq!(figures(&lagging, Some(10)), (Some(0), Some(2000), true));
        assert_eq!(problem(&lagging, Some(10)), None);
        tokio::time::advance(s(1)).await;
        assert_eq!(figures(&lagging, Some(10)), (Some(0), Some(3000), false), "within seconds it is known");
        assert!(problem(&lagging, Some(10)).unwrap().contains("nothing was heard from the primary for 3 s"));
        tokio::time::advance(s(3)).await;
        assert_eq!(figures(&lagging, Some(10)), (None, Some(6000), false));
        let said = problem(&lagging, Some(10)).unwrap();
        assert!(said.starts_with("unknown: nothing was heard from the primary for 6 s"), "{said}");
        lagging.beat(at(1, 10), Some(Instant::now()));
        heard.note(1);
        assert_eq!(figures(&lagging, Some(10)), (Some(0), Some(0), true));
        assert_eq!(problem(&lagging, Some(10)), None);
        lagging.disconnected();
        tokio::time::advance(s(1)).await;
        assert_eq!(figures(&lagging, Some(10)), (Some(0), Some(1000), false));
        assert_eq!(problem(&lagging, Some(10)), None, "the end of the stream is told otherwise");
        tokio::time::advance(s(5)).await;
        assert_eq!(figures(&lagging, Some(10)), (None, Some(6000), false));
    }

    /// What comes is life, whatever it is. Only a word of the primary that answers this node is
    /// news of the lag: not single bytes, not records, and no heartbeat that was held back.
    #[tokio::test(start_paused = true)]
    async fn the_lag_is_unknown_without_a_word_that_answers() {
        let lagging = Lagging::new();
        let heard = Arc::new(Heard::new());
        heard.wait(true);
        let dialled = Instant::now();
        lagging.connected(at(1, 10), dialled, heard.clone());
        for second in 1..=20 {
            tokio::time::advance(s(1)).await;
            heard.note(1);
            match second {
                3 => lagging.beat(at(1, 10), None),
                4 => lagging.beat(at(1, 10), Some(dialled)),
                _ => {}
            }
            let known = (second <= 5).then_some(0);
            assert_eq!(figures(&lagging, Some(10)), (known, Some(second * 1000), true));
            let said = problem(&lagging, Some(10));
            assert_eq!(said.is_some(), known.is_none(), "{said:?}");
        }
        let said = problem(&lagging, Some(10)).unwrap();
        let text = "unknown: how far this node is behind is unknown: the primary's newest word of where it \
                    stands is 20 s old, and";
        assert!(said.starts_with(text), "{said}");
        lagging.heard(12);
        let said = problem(&lagging, Some(10)).unwrap();
        assert!(said.contains("at least 2 transactions are still to come"), "{said}");
        assert_eq!(figures(&lagging, Some(10)), (None, Some(20_000), true));
        lagging.beat(at(1, 12), Some(Instant::now() - s(1)));
        assert_eq!(figures(&lagging, Some(10)), (Some(2), Some(20_000), true));
        assert_eq!(figures(&lagging, Some(12)), (Some(0), Some(1000), true));
        assert_eq!(problem(&lagging, Some(12)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_lag_is_told_once_each_time() {
        let node = node(2, &[7; 32], Role::Replica);
        node.applied.advance(at(1, 10));
        let (lagging, heard) = (Lagging::new(), Arc::new(Heard::new()));
        heard.wait(true);
        lagging.connected(at(1, 10), Instant::now(), heard.clone());
        let unknown = |text: &str| node.problem_of(Part::Behind).is_some_and(|said| said.contains(text));
        for round in 0..2 {
            lagging.beat(at(1, 10), Some(Instant::now()));
            lagging.publish(&node);
            assert_eq!(node.problem_of(Part::Behind), None);
            for second in 6..9 {
                tokio::time::advance(if second == 6 { s(6) } else { s(1) }).await;
                heard.note(1);
                assert_eq!(lagging.lock().unknown, second > 6, "round {round}");
                lagging.publish(&node);
                assert!(unknown(&format!("is {second} s old")), "{:?}", node.problem_of(Part::Behind));
                assert_eq!(node.lag().unwrap().transactions, None);
            }
        }
        assert_eq!(node.public_problems(), ["this instance is behind the primary, or may be"]);
    }

    /// Nothing follows any more, or the runtime stands still: what was said last is no news.
    #[tokio::test(start_paused = true)]
    async fn a_lag_that_is_said_no_more_grows_old() {
        let node = node(2, &[7; 32], Role::Replica);
        node.applied.advance(at(1, 10));
        let (lagging, heard) = (Lagging::new(), Arc::new(Heard::new()));
        lagging.connected(at(1, 10), Instant::now(), heard);
        lagging.publish(&node);
        let lag = || node.lag().unwrap();
        assert_eq!((lag().transactions, lag().age, lag().connected), (Some(0), Some(s(0)), true));
        tokio::time::advance(s(3)).await;
        assert_eq!((lag().transactions, lag().age, lag().connected), (None, Some(s(3)), false));
        assert_eq!(lag().stale, s(3));
    }

    /// A replica that always lags does so by as much as it is late, not for ever longer. A word
    /// that was long on its way is as old as it is.
    #[tokio::test(start_paused = true)]
    async fn a_late_word_is_old_news() {
        let lagging = Lagging::new();
        let heard = Arc::new(Heard::new());
        lagging.connected(at(1, 0), Instant::now(), heard.clone());
        for second in 0..20 {
            heard.note(10_000);
            lagging.beat(at(1, second * 100), Some(Instant::now() - s(3).min(s(second))));
            let applied = (second * 100).saturating_sub(400);
            let (_, millis, _) = figures(&lagging, Some(applied));
            let late = second.min(7) * 1000;
            assert_eq!(millis, Some(late), "four seconds of transactions, three on the way");
            tokio::time::advance(s(1)).await;
        }
        let said = problem(&lagging, Some(1500)).unwrap();
        assert!(said.contains("400 transactions are still to come") && said.contains("10 kB/s"), "{said}");
        for _ in 0..WORDS_MAX + 9 {
            lagging.beat(at(1, 5000), Some(Instant::now()));
        }
        assert_eq!(lagging.lock().words.len(), WORDS_MAX);
    }
}
