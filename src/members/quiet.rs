//! The runtime of Raft's tasks: tokio's, without what `openraft` logs.
//!
//! It warns some thirty times a second while a member is away. What an operator is to know of it
//! the node says itself, once.

use std::future::Future;
use std::time::Duration;

use openraft::{AsyncRuntime, OptionalSend, TokioRuntime};
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;

/// See the module.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct QuietRuntime;

/// What is tokio's.
type Of = TokioRuntime;

impl AsyncRuntime for QuietRuntime {
    type JoinError = <Of as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <Of as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <Of as AsyncRuntime>::Sleep;
    type Instant = <Of as AsyncRuntime>::Instant;
    type TimeoutError = <Of as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = <Of as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = <Of as AsyncRuntime>::ThreadLocalRng;
    type OneshotSender<T: OptionalSend> = <Of as AsyncRuntime>::OneshotSender<T>;
    type OneshotReceiverError = <Of as AsyncRuntime>::OneshotReceiverError;
    type OneshotReceiver<T: OptionalSend> = <Of as AsyncRuntime>::OneshotReceiver<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        Of::spawn(future.with_subscriber(NoSubscriber::new()))
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        Of::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        Of::sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(
        duration: Duration,
        future: F,
    ) -> Self::Timeout<R, F> {
        Of::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        Of::timeout_at(deadline, future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        Of::is_panic(join_error)
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        Of::thread_rng()
    }

    fn oneshot<T>() -> (Self::OneshotSender<T>, Self::OneshotReceiver<T>)
    where
        T: OptionalSend,
    {
        Of::oneshot()
    }
}

/// Says something from within one of Raft's tasks.
pub(crate) fn say(tell: impl FnOnce() + Send + 'static) {
    tokio::spawn(async move { tell() });
}
