//! How far this node lags, and at what pace it comes nearer to its primary.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::context::NodeContext;
use crate::lock::lock;
use crate::net::Heard;
use crate::replica::pace::{Coming, Pace};
use crate::report::Condition;
use crate::status::Lag;
use crate::txid::Position;

/// How often the figures are brought up to date.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// A stream on which nothing came for this long counts as not connected: the primary says its
/// position each second.
const QUIET_MAX: Duration = Duration::from_millis(2500);
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
    /// When the primary had, at the earliest, what this node has.
    level: Instant,
    stream: Option<Stream>,
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
        let words = VecDeque::new();
        Lagging(Mutex::new(Freshness { newest: None, words, level: Instant::now(), stream: None }))
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

    /// The primary has said that it has this position, and had no more at the earliest then.
    pub(super) fn beat(&self, primary: Position, at: Instant) {
        let mut known = self.lock();
        known.newest = known.newest.max(Some(primary.number()));
        known.word(primary.number(), at);
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
        let problem = known.problem(applied, lag, now);
        drop(known);
        node.set_lag(Some(lag));
        node.report(match &problem {
            Some(text) => Condition::Lagging { text },
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
            self.level = self.level.max(at);
            self.words.pop_front();
        }
        Lag {
            transactions: self.newest.unwrap_or(0).saturating_sub(applied.unwrap_or(0)),
            age: now.saturating_duration_since(self.level),
            connected: self.stream.as_ref().is_some_and(|stream| stream.heard.silence() <= QUIET_MAX),
        }
    }

    /// What is to be said of a stream that stands.
    fn problem(&mut self, applied: Option<u64>, lag: Lag, now: Instant) -> Option<String> {
        let stream = self.stream.as_mut()?;
        let rate = stream.pace.rate(&stream.heard, now);
        if !lag.connected {
            let seconds = stream.heard.silence().as_secs();
            return Some(format!(
                "nothing was heard from the primary for {seconds} s, not even what it says each second: it \
                 stands still, or the link does"
            ));
        }
        let standing = now.saturating_duration_since(stream.since);
        let behind = lag.age.min(standing);
        if behind < SLOW_AFTER {
            return None;
        }
        stream.coming.problem(applied.is_some(), lag, rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::fake::at;
    use crate::status::whole_millis;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn figures(lagging: &Lagging, applied: Option<u64>) -> (u64, u64, bool) {
        let lag = lagging.lock().figures(applied, Instant::now());
        (lag.transactions, whole_millis(lag.age), lag.connected)
    }

    fn problem(lagging: &Lagging, applied: Option<u64>) -> Option<String> {
        let mut known = lagging.lock();
        let lag = known.figures(applied, Instant::now());
        known.problem(applied, lag, Instant::now())
    }

    #[tokio::test(start_paused = true)]
    async fn the_lag_counts_from_the_last_word_of_the_primary() {
        let lagging = Lagging::new();
        tokio::time::advance(s(5)).await;
        assert_eq!(figures(&lagging, None), (0, 5000, false));
        let heard = Arc::new(Heard::new());
        heard.wait(true);
        lagging.connected(at(1, 10), Instant::now(), heard.clone());
        assert_eq!(figures(&lagging, Some(7)), (3, 5000, true));
        assert_eq!(figures(&lagging, Some(10)), (0, 0, true));
        // Nothing comes: it may have more, and may be gone.
        tokio::time::advance(s(2)).await;
        assert_eq!(figures(&lagging, Some(10)), (0, 2000, true));
        assert_eq!(problem(&lagging, Some(10)), None);
        tokio::time::advance(s(1)).await;
        assert_eq!(figures(&lagging, Some(10)), (0, 3000, false), "within seconds it is known");
        assert!(problem(&lagging, Some(10)).unwrap().contains("nothing was heard from the primary for 3 s"));
        heard.note(1);
        assert_eq!(figures(&lagging, Some(10)), (0, 3000, true), "any byte is life, but no news");
        lagging.beat(at(1, 10), Instant::now());
        assert_eq!(figures(&lagging, Some(10)), (0, 0, true));
        lagging.disconnected();
        tokio::time::advance(s(1)).await;
        assert_eq!(figures(&lagging, Some(10)), (0, 1000, false));
        assert_eq!(problem(&lagging, Some(10)), None, "the end of the stream is told otherwise");
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
            lagging.beat(at(1, second * 100), Instant::now() - s(3).min(s(second)));
            let applied = (second * 100).saturating_sub(400);
            let (_, millis, _) = figures(&lagging, Some(applied));
            assert_eq!(millis, second.min(7) * 1000, "four seconds of transactions, three on the way");
            tokio::time::advance(s(1)).await;
        }
        let said = problem(&lagging, Some(1500)).unwrap();
        assert!(said.contains("400 transactions are still to come") && said.contains("10 kB/s"), "{said}");
        for _ in 0..WORDS_MAX + 9 {
            lagging.beat(at(1, 5000), Instant::now());
        }
        assert_eq!(lagging.lock().words.len(), WORDS_MAX);
    }
}
