//! What comes from the primary, and how fast, in words.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::net::Heard;

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

/// How late a replica is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lateness {
    /// Whether it has a state.
    pub(super) filled: bool,
    /// Transactions that the primary is known to have and it does not.
    pub(super) missing: u64,
    /// The age of the primary's newest word, if that is so old that more may be missing.
    pub(super) silent: Option<Duration>,
    /// For how long it has been late, and whether that is all of it.
    pub(super) stale: (Duration, bool),
    /// Bytes that come in a second.
    pub(super) rate: u64,
}

impl Coming {
    /// What is to be said when this takes long.
    pub(super) fn problem(self, late: Lateness) -> Option<String> {
        let Lateness { filled, missing, silent, .. } = late;
        let (rate, (stale, is_all)) = (Bytes(late.rate), late.stale);
        let behind = format!("{}{} s behind", if is_all { "" } else { "at least " }, stale.as_secs());
        Some(match (self, silent) {
            (Coming::Snapshot { have, total }, _) if !filled && have < total => {
                let (have, total) = (Bytes(have), Bytes(total));
                format!("the database here is being filled: {have} of {total} have come, at {rate}/s")
            }
            _ if !filled => format!(
                "the database here is being filled: what was committed while its pages came is still to \
                 come, at {rate}/s"
            ),
            (Coming::Heal, _) => format!(
                "this node is {behind}: its pages are being compared with the primary's, which \
                 sends at {rate}/s"
            ),
            (_, Some(silent)) => {
                let silent = silent.as_secs();
                let known = match missing {
                    0 => String::new(),
                    _ => format!(", and at least {missing} transactions are still to come"),
                };
                format!(
                    "how far this node is behind is unknown: the primary's newest word of where it stands is \
                     {silent} s old, and {rate}/s come on its stream{known}"
                )
            }
            _ if missing == 0 => return None,
            _ => format!("this node is {behind}: {missing} transactions are still to come, at {rate}/s"),
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
        let stale = (Duration::from_millis(7400), true);
        let late = Lateness { filled: true, missing: 3, silent: None, stale, rate: 9_700 };
        let say = |coming: Coming, filled| coming.problem(Lateness { filled, ..late }).unwrap();
        let snapshot = Coming::Snapshot { have: 120_000, total: 3_400_000 };
        let text = "the database here is being filled: 120 kB of 3.4 MB have come, at 9.7 kB/s";
        assert_eq!(say(snapshot, false), text);
        assert!(
            say(Coming::Snapshot { have: 5, total: 5 }, false).contains("committed while its pages came")
        );
        assert!(say(Coming::Heal, true).contains("compared with the primary's, which sends at 9.7 kB/s"));
        let text = "this node is 7 s behind: 3 transactions are still to come, at 9.7 kB/s";
        assert_eq!(say(Coming::Log, true), text);
        let text = "this node is at least 7 s behind: 3 transactions are still to come, at 9.7 kB/s";
        assert_eq!(Coming::Log.problem(Lateness { stale: (stale.0, false), ..late }).unwrap(), text);
        let nothing = Lateness { missing: 0, ..late };
        assert_eq!(Coming::Log.problem(nothing), None);
        let silent = Lateness { silent: Some(Duration::from_secs(6)), ..nothing };
        let text = "how far this node is behind is unknown: the primary's newest word of where it stands is \
                    6 s old, and 9.7 kB/s come on its stream";
        assert_eq!(Coming::Log.problem(silent).unwrap(), text);
        let silent = Coming::Log.problem(Lateness { missing: 3, ..silent }).unwrap();
        assert_eq!(silent, format!("{text}, and at least 3 transactions are still to come"));
    }
}
