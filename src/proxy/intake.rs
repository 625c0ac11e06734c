//! Taking a request's body in before the primary is asked: a client that is slow costs the primary
//! nothing as long as its body can be kept here.

use std::future::poll_fn;
use std::time::Duration;

use crate::proxy::failure::Reason;
use crate::proxy::head::Head;
use crate::proxy::replay_body::Keep;
use crate::proxy::shared::LayerShared;

/// For how long a body of no declared length is taken in. One that is whole by itself comes along
/// with its head. Of any other the client may wait for an answer before it goes on, as in a call of
/// gRPC with streams.
const UNDECLARED_LIMIT: Duration = Duration::from_millis(100);
/// And how much of it, as a part of what can be kept. It may be a large one, of which the primary
/// should have the beginning soon.
const UNDECLARED_PART: usize = 4;

/// Reads the body until its end, or until it can't be kept any more. One that is known to be larger
/// stays unread: it can wait for a primary, and be sent to another, as it is.
pub(super) async fn take_in(shared: &LayerShared, head: &Head, body: &Keep) -> Result<(), Reason> {
    let (limits, declared) = (&shared.options.budget, body.declared());
    if head.upgrade.is_some() || declared.is_some_and(|bytes| bytes > limits.request as u64) {
        return Ok(());
    }
    let most = declared.map_or(limits.request / UNDECLARED_PART, |_| limits.request);
    let paused = async {
        match declared {
            Some(_) => std::future::pending().await,
            None => tokio::time::sleep(UNDECLARED_LIMIT.min(limits.idle / 4)).await,
        }
    };
    tokio::select! {
        biased;
        taken = poll_fn(|cx| body.poll_take_in(most, cx)) => taken.map_err(|error| {
            // Not louder: any client can do this.
            tracing::debug!(error = &*error as &dyn std::error::Error, "a request's body did not come");
            if body.slow() { Reason::SlowBody } else { Reason::BrokenBody }
        })?,
        () = paused => {}
        () = shared.node.stop.cancelled() => return Err(Reason::NoPrimary),
    }
    body.rests();
    Ok(())
}
