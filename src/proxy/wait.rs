//! What happens before a request runs: waiting for its token's transaction, or for the primary.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::proxy::failure::Reason;
use crate::proxy::forward::{Sender, Verdict, forward};
use crate::proxy::head::Head;
use crate::proxy::locate::{HoldLimit, find};
use crate::proxy::plan::Need;
use crate::proxy::replay_body::Keep;
use crate::proxy::shared::LayerShared;
use crate::txid::Txid;

/// Brings a request to where it can run.
pub(super) async fn prepare(
    shared: Arc<LayerShared>,
    need: Need,
    head: Arc<Head>,
    body: Keep,
    sender: Sender,
) -> Verdict {
    let mut hold = HoldLimit::new(&shared, head.client.share);
    if let Need::Applied(txid) = need {
        if applied(&shared, txid, shared.options.wait_timeout).await {
            return Verdict::Here(body, None);
        }
        // While there is no primary to ask, it waits on for one or for the transaction. A primary
        // that goes down in good order has sent all that it acknowledged, but for what took it too
        // long.
        let left = hold.left();
        let found = tokio::select! {
            biased;
            found = find(&shared, &mut hold) => found.is_ok(),
            true = applied(&shared, txid, left) => return Verdict::Here(body, None),
        };
        if !found {
            return Verdict::Failed(Reason::NotApplied);
        }
        tracing::debug!(%txid, "a read asks the primary, because this node is behind");
    }
    let reads = matches!(need, Need::Applied(_) | Need::TokenRead);
    forward(&shared, &head, body, sender, reads).await
}

/// Whether a token's transaction is here within the limit, or will never be.
async fn applied(shared: &LayerShared, txid: Txid, limit: Duration) -> bool {
    let (applied, begun) = (&shared.node.applied, Instant::now());
    match applied.wait_for(txid, limit).await {
        Ok(()) => true,
        Err(Error::Lost { .. }) => {
            tracing::debug!(%txid, "a token's transaction was lost with its branch; it counts as absent");
            // What its client saw before that is not lost.
            let Some(kept) = applied.history().kept_before(txid) else { return true };
            let waited = applied.wait_for(kept, limit.saturating_sub(begun.elapsed())).await;
            matches!(waited, Ok(()) | Err(Error::Lost { .. }))
        }
        Err(_) => false,
    }
}
