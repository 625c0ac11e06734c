//! What a node's gauges show.

#[cfg(feature = "metrics")]
use std::sync::{Arc, Weak};
#[cfg(feature = "metrics")]
use std::time::Duration;

#[cfg(feature = "metrics")]
use crate::context::NodeContext;
use crate::metrics::{NodeFigures, NodeLoad};
use crate::node::database::Database;
#[cfg(feature = "metrics")]
use crate::threads::{aside, blocking};

/// How often the application's recorder gets the gauges.
#[cfg(feature = "metrics")]
const RECORD_PERIOD: Duration = Duration::from_secs(10);

impl Database {
    /// How it stands, in numbers. Blocks: it looks at files.
    #[cfg_attr(
        not(any(feature = "metrics", feature = "prometheus")),
        allow(dead_code, reason = "one of the two features asks")
    )]
    pub(super) fn figures(&self) -> NodeFigures {
        let status = self.status();
        let (held, forwarded, running) = self.node.requests_at_work();
        let (readers, reading) = self.pool.counts();
        let (waiting, queued) = (self.node.applied.waiting(), self.writer.queued());
        NodeFigures {
            health: self.health(&status),
            status,
            sizes: self.disk_use.look(&self.paths),
            load: NodeLoad { held, forwarded, running, waiting, queued, readers, reading },
            #[cfg(feature = "prometheus")]
            counters: self.node.counters().all(),
        }
    }
}

/// Gives the application's recorder the gauges, again and again until the node stops. It keeps no
/// database open.
#[cfg(feature = "metrics")]
pub(super) async fn record(database: Weak<Database>, node: Arc<NodeContext>) {
    // The recorder is the application's code.
    aside(crate::metrics::describe);
    loop {
        let database = database.clone();
        let recorded = blocking(move || {
            if let Some(figures) = database.upgrade().map(|database| database.figures()) {
                aside(|| crate::metrics::record(&figures));
            }
            Ok(())
        });
        if let Err(error) = recorded.await {
            tracing::debug!(%error, "the gauges were not recorded");
        }
        tokio::select! {
            () = node.stop.cancelled() => break,
            () = tokio::time::sleep(RECORD_PERIOD) => {}
        }
    }
    aside(|| crate::metrics::record_closed(&node.database));
}
