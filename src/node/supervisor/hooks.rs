//! What the application does when its node becomes the primary, and when it is it no more.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::context::NodeContext;
use crate::error::{Error, Result};
use crate::node::supervisor::{BesideEngine, Turns, wait_for};
use crate::report::Condition;
use crate::status::Role;
use crate::threads::{caught, caught_task};

/// Makes what is to be done; none when no handle of the database is left.
pub(crate) type TurnHook =
    Arc<dyn Fn() -> Option<Pin<Box<dyn Future<Output = Result<()>> + Send>>> + Send + Sync>;

/// What the application does with its node's roles.
pub(crate) struct Hooks {
    pub(crate) on_promote: Option<TurnHook>,
    pub(crate) on_demote: Option<TurnHook>,
    /// How long each of them may take.
    pub(crate) limit: Duration,
}

impl Turns {
    /// Has the application do what it does when its node becomes the primary. Ends early when that
    /// comes to nothing.
    pub(super) fn greet(&self, standing: &mut BesideEngine) -> Result<()> {
        let Some(hook) = &self.hooks.on_promote else { return Ok(()) };
        let mut roles = self.node.roles.subscribe();
        if let Some(before) = standing.on_demote.take() {
            // It has a limit.
            wait_for(async {
                tokio::select! {
                    _ = before => {}
                    () = self.node.stop.cancelled() => {}
                }
            })?;
        }
        self.may_go_on()?;
        let run = caught("on_promote", || hook()).map_err(failed)?.ok_or(Error::ShutDown)?;
        let mut task = self.runtime.spawn(caught_task("on_promote", run));
        let limit = self.hooks.limit;
        let ended = wait_for(async {
            tokio::select! {
                biased;
                () = self.node.stop.cancelled() => Err(Error::ShutDown),
                done = &mut task => match done {
                    Ok(done) => done.map_err(failed).flatten(),
                    // The application's runtime has ended.
                    Err(_) => Err(Error::ShutDown),
                },
                _ = roles.wait_for(|now| matches!(now.role, Role::Fencing | Role::Stopped)) => {
                    Err(Error::NotPrimary { primary: None })
                }
                () = tokio::time::sleep(limit) => {
                    Err(Error::OnPromote(format!("it took longer than {limit:?}").into()))
                }
            }
        });
        task.abort();
        ended.flatten()
    }

    /// Has the application end what it does on the primary, beside what the node does. The next
    /// promotion waits for it.
    pub(super) fn take_leave(&self, standing: &mut BesideEngine) {
        let Some(hook) = &self.hooks.on_demote else { return };
        let run = match caught("on_demote", || hook()) {
            Ok(Some(run)) => run,
            // No handle of the application is left.
            Ok(None) => return,
            Err(error) => return self.node.report_aside(Condition::OnDemoteFailed { error: &error }),
        };
        let (node, limit) = (self.node.clone(), self.hooks.limit);
        standing.on_demote = Some(self.runtime.spawn(async move {
            let done = tokio::time::timeout(limit, caught_task("on_demote", run)).await;
            let late = |_| Error::Timeout { what: "on_demote".into(), after: limit };
            if let Err(error) = done.map_err(late).flatten().flatten() {
                say_failed(&node, &error);
            }
        }));
    }
}

fn say_failed(node: &NodeContext, error: &Error) {
    node.report_aside(Condition::OnDemoteFailed { error });
}

/// A panic is the application's, and a failure like others.
fn failed(error: Error) -> Error {
    match error {
        Error::ThreadPanicked { message, .. } => Error::OnPromote(format!("a panic: {message}").into()),
        other => other,
    }
}
