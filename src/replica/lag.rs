//! How far this node is behind its primary.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::node::Node;
use crate::status::Lag;
use crate::txid::Position;

/// How often the figures are brought up to date.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);

/// What is known of the distance.
#[derive(Debug)]
pub(super) struct Lagging(Mutex<Known>);

#[derive(Debug)]
struct Known {
    /// The number of the newest transaction that the primary is known to have, once it has said one.
    newest: Option<u64>,
    /// When this node last had everything that was known.
    level: Instant,
    connected: bool,
}

impl Lagging {
    pub(super) fn new() -> Lagging {
        Lagging(Mutex::new(Known { newest: None, level: Instant::now(), connected: false }))
    }

    /// The stream stands, and the primary is at this position, whatever it was before.
    pub(super) fn connected(&self, primary: Position) {
        let mut known = self.lock();
        known.newest = Some(primary.number());
        known.connected = true;
    }

    pub(super) fn disconnected(&self) {
        self.lock().connected = false;
    }

    /// The primary has this position.
    pub(super) fn heard(&self, primary: Position) {
        let mut known = self.lock();
        known.newest = known.newest.max(Some(primary.number()));
    }

    /// Writes the figures where status looks for them.
    pub(super) fn publish(&self, node: &Node) {
        let applied = node.applied.position().map(Position::number);
        node.set_lag(Some(self.lock().figures(applied, Instant::now())));
    }

    /// Publishes again and again.
    pub(super) async fn keep_published(&self, node: &Node) {
        loop {
            self.publish(node);
            tokio::time::sleep(PUBLISH_EVERY).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Known {
    fn figures(&mut self, applied: Option<u64>, now: Instant) -> Lag {
        // Nothing was said yet, or there is no state: that is no equality. A replica whose stream is cut
        // can't know that it is level.
        let level = self.connected && applied.is_some() && self.newest.is_some() && applied >= self.newest;
        if level {
            self.level = now;
        }
        Lag {
            transactions: self.newest.unwrap_or(0).saturating_sub(applied.unwrap_or(0)),
            millis: now.saturating_duration_since(self.level).as_millis() as u64,
            connected: self.connected,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_grows_while_behind_or_cut_off() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut known = Known { newest: None, level: start, connected: false };
        assert_eq!(known.figures(None, at(5)), Lag { transactions: 0, millis: 5, connected: false });
        known.connected = true;
        known.newest = Some(10);
        assert_eq!(known.figures(Some(7), at(20)), Lag { transactions: 3, millis: 20, connected: true });
        assert_eq!(known.figures(Some(10), at(30)), Lag { transactions: 0, millis: 0, connected: true });
        known.connected = false;
        assert_eq!(known.figures(Some(10), at(90)), Lag { transactions: 0, millis: 60, connected: false });
    }
}
