//! What happens before a request runs: waiting for its token's transaction, or for the primary.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::Error;
use crate::proxy::failure::Reason;
use crate::proxy::forward::{Sender, Verdict, forward};
use crate::proxy::head::Head;
use crate::proxy::locate::find;
use crate::proxy::plan::Need;
use crate::proxy::replay_body::Keep;
use crate::proxy::shared::LayerShared;
use crate::txid::Txid;

/// Brings a request to where it can run.
pub(super) async fn prepare(shared: Arc<LayerShared>, need: Need, head: Arc<Head>, body: Keep) -> Verdict {
    let held_until = Instant::now() + shared.hold_timeout();
    if let Need::Applied(txid) = need {
        if applied(&shared, txid, shared.options.wait_timeout).await {
            return Verdict::Here(body);
        }
        // While there is no primary to ask, it waits on for one or for the transaction. A primary
        // that goes down in good order has sent all that it acknowledged, but for what took it too
        // long.
        let left = held_until.saturating_duration_since(Instant::now());
        let found = tokio::select! {
            biased;
            found = find(&shared, held_until) => found.is_ok(),
            true = applied(&shared, txid, left) => return Verdict::Here(body),
        };
        if !found {
            return Verdict::Failed(Reason::NotApplied);
        }
        tracing::debug!(%txid, "a read asks the primary, because this node is behind");
    }
    forward(&shared, &head, body, Sender::Client, matches!(need, Need::Applied(_))).await
}

/// Whether a token's transaction is here within the limit, or will never be.
async fn applied(shared: &LayerShared, txid: Txid, limit: Duration) -> bool {
    match shared.node.applied.wait_for(txid, limit).await {
        Ok(()) => true,
        Err(Error::Lost { .. }) => {
            tracing::debug!(%txid, "a token's transaction was lost with its branch; it counts as absent");
            true
        }
        Err(_) => false,
    }
}
