//! How long a client is waited for that sends a body.
//!
//! A client may be silent for the idle limit. One whose body goes to the primary also has to keep
//! up a rate. There is some patience with it to begin with. Each second that it is waited for costs
//! one of that, and each byte gives some back.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// What a client has to begin with. In so long a link that was lost comes back, and TCP has tried
/// again four times.
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// How fast one client is, and how patient the layer still is with it.
pub(super) struct Tempo {
    /// The longest silence, and the most patience that bytes give.
    idle: Duration,
    /// Bytes a second. None: it need not keep up any.
    rate: Option<u32>,
    /// What is left while there is a rate.
    left: Duration,
    /// Since when it is waited for.
    since: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Tempo {
    pub(super) fn new(idle: Duration) -> Tempo {
        Tempo { idle, rate: None, left: GRACE.min(idle), since: None, alarm: None }
    }

    /// The same client, whose body is read from its beginning again.
    pub(super) fn again(&self) -> Tempo {
        Tempo { rate: self.rate, left: self.left, ..Tempo::new(self.idle) }
    }

    /// From now on it has to keep up so many bytes a second; 0: the idle limit is all.
    pub(super) fn hurry(&mut self, rate: u32) {
        self.rate = Some(rate);
    }

    /// From now on it may take its time.
    pub(super) fn at_leisure(&mut self) {
        self.rate = None;
    }

    pub(super) fn is_hurried(&self) -> bool {
        self.rate.is_some()
    }

    /// Whether it is waited for.
    pub(super) fn waits(&self) -> bool {
        self.since.is_some()
    }

    /// It has sent nothing. Ready when it was waited for long enough.
    pub(super) fn poll_wait(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let since = *self.since.get_or_insert_with(Instant::now);
        let limit = match self.rate {
            Some(rate) if rate > 0 => self.left.min(self.idle),
            _ => self.idle,
        };
        let due = since + limit;
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if alarm.deadline() != due {
            alarm.as_mut().reset(due);
        }
        ready!(alarm.as_mut().poll(cx));
        self.alarm = None;
        Poll::Ready(())
    }

    /// It has sent so many bytes.
    pub(super) fn came(&mut self, bytes: usize) {
        if let Some(since) = self.since.take() {
            self.left = self.left.saturating_sub(since.elapsed());
        }
        if let Some(rate @ 1..) = self.rate {
            let earned = Duration::from_secs(bytes as u64) / rate;
            self.left = self.left.saturating_add(earned).min(self.idle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(60);

    /// Waits for the client for so long; whether it may still send.
    async fn waits(tempo: &mut Tempo, seconds: u64) -> bool {
        let long = Duration::from_secs(seconds);
        tokio::time::timeout(long, std::future::poll_fn(|cx| tempo.poll_wait(cx))).await.is_err()
    }

    fn hurried() -> Tempo {
        let mut tempo = Tempo::new(IDLE);
        tempo.hurry(1024);
        tempo
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_waited_for_as_long_as_its_patience_lasts() {
        assert!(waits(&mut hurried(), 9).await);
        assert!(!waits(&mut hurried(), 11).await);
        let mut drips = hurried();
        assert!(waits(&mut drips, 9).await);
        drips.came(1);
        assert!(!waits(&mut drips, 2).await, "a byte gives next to nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn who_keeps_up_the_rate_is_waited_for_forever() {
        let mut tempo = hurried();
        for _ in 0..100 {
            assert!(waits(&mut tempo, 5).await);
            tempo.came(5 * 1024);
        }
        // Who was fast may pause for the idle limit, and no longer.
        tempo.came(1 << 30);
        assert!(waits(&mut tempo, 59).await);
        tempo.came(1);
        assert!(!waits(&mut tempo, 2).await);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_the_idle_limit_is_all() {
        let mut tempo = Tempo::new(IDLE);
        for rate in [None, Some(0)] {
            if let Some(rate) = rate {
                tempo.hurry(rate);
            }
            for _ in 0..10 {
                assert!(waits(&mut tempo, 59).await);
                tempo.came(1);
            }
            assert!(!waits(&mut tempo, 61).await);
            tempo.came(1);
        }
        let mut tempo = hurried();
        assert!(waits(&mut tempo, 9).await);
        tempo.at_leisure();
        assert!(waits(&mut tempo, 40).await);
        // A limit that is shorter than the patience counts.
        let mut tempo = Tempo::new(Duration::from_secs(1));
        tempo.hurry(1024);
        assert!(!waits(&mut tempo, 2).await);
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_it_is_not_waited_for_costs_nothing() {
        let mut tempo = hurried();
        assert!(waits(&mut tempo, 8).await);
        tempo.came(2);
        tokio::time::sleep(IDLE).await;
        tempo.came(2);
        assert!(waits(&mut tempo, 1).await, "two seconds are left");
        let mut again = tempo.again();
        assert!(!waits(&mut again, 3).await, "a body that is sent again has no new patience");
    }
}
