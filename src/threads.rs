//! Threads and tasks that a node starts, and what becomes of a panic in one: it ends nothing
//! without a word.
//!
//! The application's code runs in all of them: its tracing subscriber, its metrics recorder,
//! destructors of its values.

use std::any::Any;
use std::future::Future;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::thread::{JoinHandle, ScopedJoinHandle};

use pin_project_lite::pin_project;

use crate::error::{Error, Result};

/// Starts a thread. `work` does what it is there for. `end` then gets what `work` worked on, and
/// how it ended; a panic is an error like others. `end` says it, and gives back what is held.
pub(crate) fn start<T: Send + 'static>(
    name: &'static str,
    state: T,
    work: impl FnOnce(&mut T) -> Result<()> + Send + 'static,
    end: impl FnOnce(T, Result<()>) + Send + 'static,
) -> Result<JoinHandle<()>> {
    let run = move || {
        let mut state = state;
        let ended = caught(name, || work(&mut state)).flatten();
        // Only the panic hook is left to be told of one more panic, and it was called.
        let _ = caught(name, || end(state, ended));
    };
    std::thread::Builder::new().name(name.into()).spawn(run).map_err(Error::io("spawn", name))
}

/// Runs it; a panic becomes an error that says where it was.
pub(crate) fn caught<T>(place: &str, run: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| panicked(place, panic))
}

/// Runs `one` on a thread of its own, and `two` beside it on this one. A panic in `one` is an
/// error.
///
/// # Errors
/// Those of the two. Where there is no thread to be had, `one` does not run.
pub(crate) fn beside<A: Send, B>(
    name: &'static str,
    one: impl FnOnce() -> Result<A> + Send,
    two: impl FnOnce() -> Result<B>,
) -> (Result<A>, Result<B>) {
    std::thread::scope(|scope| {
        let run = move || caught(name, one).flatten();
        let thread = std::thread::Builder::new().name(name.into()).spawn_scoped(scope, run);
        let two = two();
        let one = thread.map_err(Error::io("spawn", name));
        (one.and_then(|thread| thread.join().map_err(|panic| panicked(name, panic)).flatten()), two)
    })
}

/// Work on fewer bytes than this is done before another thread has begun.
const EACH_MIN_BYTES: usize = 256 * 1024;
/// The most threads that share a piece of work.
const EACH_THREADS_MAX: usize = 4;

/// What `run` makes of each item, in their order. Where they come to many bytes, some threads do it
/// together, which takes the longer the more there is.
pub(crate) fn each<'a, T: Sync, R: Send>(
    name: &'static str,
    items: &'a [T],
    bytes: usize,
    run: impl Fn(&'a T) -> R + Sync,
) -> Vec<R> {
    let threads = if bytes < EACH_MIN_BYTES { 1 } else { cores().min(EACH_THREADS_MAX) };
    let mut shares = items.chunks(items.len().div_ceil(threads).max(1));
    let (own, run) = (shares.next().unwrap_or_default(), &run);
    std::thread::scope(|scope| {
        let others: Vec<_> = shares
            .map(|share| {
                let all = move || share.iter().map(run).collect::<Vec<R>>();
                (share, std::thread::Builder::new().name(name.into()).spawn_scoped(scope, all))
            })
            .collect();
        let mut made: Vec<R> = own.iter().map(run).collect();
        for (share, thread) in others {
            match thread.map(ScopedJoinHandle::join) {
                Ok(Ok(done)) => made.extend(done),
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                // There is no thread to be had.
                Err(_) => made.extend(share.iter().map(run)),
            }
        }
        made
    })
}

/// Asked once: it is read from files.
fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, NonZero::get))
}

/// A piece of work on a thread of its own. Dropping it waits for its end.
#[derive(Debug)]
pub(crate) struct SideThread(Option<JoinHandle<Result<()>>>);

impl SideThread {
    pub(crate) fn start(
        name: &'static str,
        run: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<SideThread> {
        let run = move || caught(name, run).flatten();
        let thread = std::thread::Builder::new().name(name.into()).spawn(run);
        Ok(SideThread(Some(thread.map_err(Error::io("spawn", name))?)))
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.0.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for it. Returns how it ended.
    pub(crate) fn end(mut self) -> Result<()> {
        match self.0.take() {
            Some(thread) => thread.join().unwrap_or_else(|panic| Err(panicked("a thread", panic))),
            None => Ok(()),
        }
    }
}

impl Drop for SideThread {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // How it ended is of no use to a caller that gave it up.
            let _ = thread.join();
        }
    }
}

/// Tells the application something whose end matters more than its being told.
pub(crate) fn aside(tell: impl FnOnce()) {
    // The panic hook was called.
    let _ = caught("telling", tell);
}

/// [`caught`] for a future. After a panic it is not to be polled again.
pub(crate) fn caught_task<F: Future>(place: &'static str, future: F) -> CaughtTask<F> {
    CaughtTask { place, future }
}

pin_project! {
    /// See [`caught_task`].
    pub(crate) struct CaughtTask<F> {
        place: &'static str,
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for CaughtTask<F> {
    type Output = Result<F::Output>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<F::Output>> {
        let this = self.project();
        match caught(this.place, || this.future.poll(context)) {
            Ok(polled) => polled.map(Ok),
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    spawned(run, |panic| panicked("a blocking task", panic)).await
}

/// Runs what blocks where it may. A panic is one of the application's code, and `place` says when.
pub(crate) async fn blocking_for_caller<T: Send + 'static>(
    place: &'static str,
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let panicked = |panic| {
        std::mem::forget(panic);
        Error::Panicked(place.into())
    };
    spawned(run, panicked).await
}

async fn spawned<T: Send + 'static>(
    run: impl FnOnce() -> Result<T> + Send + 'static,
    panicked: impl FnOnce(Box<dyn Any + Send>) -> Error,
) -> Result<T> {
    match tokio::task::spawn_blocking(run).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => Err(panicked(error.into_panic())),
        // The runtime ends.
        Err(_) => Err(Error::ShutDown),
    }
}

fn panicked(place: &str, panic: Box<dyn Any + Send>) -> Error {
    let error = Error::ThreadPanicked { place: place.into(), message: message(&*panic) };
    // What was thrown may have a destructor that panics, too.
    std::mem::forget(panic);
    error
}

/// What a panic said.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn what_each_item_becomes_comes_in_their_order_and_a_panic_is_the_callers() {
        let items: Vec<u32> = (0..37).collect();
        for bytes in [0, EACH_MIN_BYTES] {
            for count in [0, 1, 2, 5, items.len()] {
                let made = each("replite-test", &items[..count], bytes, |n| n * 2);
                assert!(made.into_iter().eq(items[..count].iter().map(|n| n * 2)));
            }
            let last = |n: &u32| assert!(*n < 36, "by intent");
            let panic = catch_unwind(|| each("replite-test", &items, bytes, last)).unwrap_err();
            assert_eq!(message(&*panic), "by intent");
        }
    }

    #[test]
    fn whatever_becomes_of_the_work_its_end_is_run_with_what_it_worked_on() {
        let (tell, told) = mpsc::channel();
        for (how, expected) in
            [("returns", "Ok(())"), ("fails", "the database is shut down"), ("panics", "by intent")]
        {
            let tell = tell.clone();
            let work = move |done: &mut u32| {
                *done += 1;
                match how {
                    "returns" => Ok(()),
                    "fails" => Err(Error::ShutDown),
                    _ => panic!("by intent"),
                }
            };
            let end = move |done, ended: Result<()>| tell.send((done, format!("{ended:?}"))).unwrap();
            start("replite-test", 0, work, end).unwrap().join().unwrap();
            let (done, ended) = told.recv().unwrap();
            assert_eq!(done, 1);
            assert!(ended.contains(expected), "{ended}");
        }
    }

    #[test]
    fn an_end_that_panics_and_what_is_thrown_and_panics_end_the_thread_only() {
        struct Grenade;
        impl Drop for Grenade {
            fn drop(&mut self) {
                panic!("in a destructor");
            }
        }
        let work = |_: &mut ()| std::panic::panic_any(Grenade);
        start("replite-test", (), work, |(), _| panic!("by intent")).unwrap().join().unwrap();
    }

    #[tokio::test]
    async fn a_task_that_panics_is_an_error_and_so_is_what_blocks() {
        let task = caught_task("a test", async {
            tokio::task::yield_now().await;
            if true {
                panic!("by intent");
            }
        });
        assert!(task.await.unwrap_err().to_string().contains("a panic in a test: by intent"));
        assert_eq!(caught_task("a test", async { 5 }).await.unwrap(), 5);
        let blocked = blocking::<()>(|| panic!("by intent")).await;
        assert!(matches!(blocked, Err(Error::ThreadPanicked { message, .. }) if message == "by intent"));
        let blocked = blocking_for_caller::<()>("in a test", || panic!("by intent")).await;
        assert!(matches!(blocked, Err(Error::Panicked(place)) if place == "in a test"));
    }
}
