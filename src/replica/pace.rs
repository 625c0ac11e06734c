//! What comes from the primary, and how fast, in words.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::net::Heard;
use crate::status::Lag;

/// The time over which a rate is taken.
const SPAN: Duration = Duration::from_secs(5);
/// Pause between two looks.
const STEP: Duration = Duration::from_millis(500);

/// How many bytes come a second.
#[derive(Debug)]
pub(super) struct Pace(VecDeque<(Instant, u64)>);

impl Pace {
    pub(super) fn new(heard: &Heard) -> Pace {
        Pace(VecDeque::from([(Instant::now(), heard.bytes())]))
    }

    /// Bytes a second in the last few seconds.
    pub(super) fn rate(&mut self, heard: &Heard, now: Instant) -> u64 {
        let since = |at: Instant| now.saturating_duration_since(at);
        if self.0.back().is_none_or(|&(at, _)| since(at) >= STEP) {
            self.0.push_back((now, heard.bytes()));
        }
        while self.0.len() > 2 && self.0.get(1).is_some_and(|&(at, _)| since(at) >= SPAN) {
            self.0.pop_front();
        }
        let Some(&(at, bytes)) = self.0.front() else { return 0 };
        let millis = since(at).as_millis().max(1) as u64;
        heard.bytes().saturating_sub(bytes).saturating_mul(1000) / millis
    }
}

/// What is under way on a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Coming {
    /// Transactions.
    Log,
    /// All pages: so many bytes of so many.
    Snapshot { have: u64, total: u64 },
    /// Pages that differ.
    Heal,
}

impl Coming {
    /// What is to be said when this takes long.
    pub(super) fn problem(self, filled: bool, lag: Lag, rate: u64) -> Option<String> {
        let (rate, seconds) = (Bytes(rate), lag.age.as_secs());
        Some(match self {
            Coming::Snapshot { have, total } if !filled && have < total => {
                let (have, total) = (Bytes(have), Bytes(total));
                format!("the database here is being filled: {have} of {total} have come, at {rate}/s")
            }
            _ if !filled => format!(
                "the database here is being filled: what was committed while its pages came is still to \
                 come, at {rate}/s"
            ),
            Coming::Heal => format!(
                "this node is {seconds} s behind: its pages are being compared with the primary's, which \
                 sends at {rate}/s"
            ),
            _ if lag.transactions == 0 => return None,
            _ => {
                let transactions = lag.transactions;
                format!(
                    "this node is {seconds} s behind: {transactions} transactions are still to come, at \
                     {rate}/s"
                )
            }
        })
    }
}

struct Bytes(u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0..10_000 => write!(f, "{:.1} kB", self.0 as f64 / 1e3),
            10_000..1_000_000 => write!(f, "{} kB", self.0 / 1000),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", self.0 as f64 / 1e6),
            _ => write!(f, "{:.1} GB", self.0 as f64 / 1e9),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_that_of_the_last_seconds() {
        let heard = Heard::new();
        let mut pace = Pace::new(&heard);
        assert_eq!(pace.rate(&heard, Instant::now()), 0);
        for _ in 0..100 {
            tokio::time::advance(Duration::from_millis(100)).await;
            heard.note(1000);
            pace.rate(&heard, Instant::now());
        }
        assert!((9_000..=11_000).contains(&pace.rate(&heard, Instant::now())));
        for _ in 0..100 {
            tokio::time::advance(Duration::from_millis(100)).await;
            pace.rate(&heard, Instant::now());
        }
        assert_eq!(pace.rate(&heard, Instant::now()), 0);
        assert!(pace.0.len() < 15, "{}", pace.0.len());
    }

    #[test]
    fn what_comes_is_told_with_how_far_and_how_fast() {
        let lag = Lag { transactions: 3, age: Duration::from_millis(7400), connected: true };
        let say = |coming: Coming, filled| coming.problem(filled, lag, 9_700).unwrap();
        let snapshot = Coming::Snapshot { have: 120_000, total: 3_400_000 };
        let text = "the database here is being filled: 120 kB of 3.4 MB have come, at 9.7 kB/s";
        assert_eq!(say(snapshot, false), text);
        assert!(
            say(Coming::Snapshot { have: 5, total: 5 }, false).contains("committed while its pages came")
        );
        assert!(say(Coming::Heal, true).contains("compared with the primary's, which sends at 9.7 kB/s"));
        let text = "this node is 7 s behind: 3 transactions are still to come, at 9.7 kB/s";
        assert_eq!(say(Coming::Log, true), text);
        let nothing = Lag { transactions: 0, ..lag };
        assert_eq!(Coming::Log.problem(true, nothing, 9), None);
    }
}
