//! The events of a node, one after the other.

use tokio::sync::broadcast;

use crate::db::Db;
use crate::status::Event;

impl Db {
    /// What happens on this node, from now on. A receiver that is more than 256 events late misses
    /// some, and [`Event::Missed`] tells it how many.
    pub fn events(&self) -> Events {
        Events { receiver: self.inner.node.events() }
    }
}

/// The events of a node; see [`Db::events`](crate::Db::events).
///
/// ```
/// # async fn example(db: replite::Db) -> Result<(), replite::Error> {
/// use replite::Event;
///
/// let mut events = db.events();
/// while let Some(event) = events.next().await {
///     if let Event::WalGrows { bytes, why, .. } = event {
///         eprintln!("the WAL has {bytes} bytes: {why}");
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
}

impl Events {
    /// The next event; none after the database was shut down and dropped.
    ///
    /// # Cancel safety
    /// No event is lost by dropping the future.
    pub async fn next(&mut self) -> Option<Event> {
        match self.receiver.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Event::Missed { events: missed }),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}
