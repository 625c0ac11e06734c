//! Which thread may wait. A write inside of a write would wait for itself, and one on a thread that
//! drives async tasks would hold them up.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::task::{Context, Poll, Waker};

use tokio::runtime::Handle;
use tokio::task::coop;

use crate::error::{Error, Result};

/// More than any task's budget, which tokio counts in a byte.
const BUDGET_MAX: usize = 256;

thread_local! {
    /// The writers that this thread is inside of, each by its address.
    static INSIDE: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Says that this thread uses a writer's connection, or waits for it, until it is dropped.
#[derive(Debug)]
pub(super) struct Inside {
    writer: usize,
    /// It belongs to the thread that it was made on.
    here: PhantomData<*const ()>,
}

impl Inside {
    pub(super) fn enter(writer: usize) -> Result<Inside> {
        if Inside::is(writer) {
            return Err(Error::Reentrant);
        }
        INSIDE.with_borrow_mut(|all| all.push(writer));
        Ok(Inside { writer, here: PhantomData })
    }

    /// Whether this thread is inside of that writer.
    pub(super) fn is(writer: usize) -> bool {
        INSIDE.with_borrow(|all| all.contains(&writer))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with_borrow_mut(|all| all.retain(|writer| *writer != self.writer));
    }
}

/// Fails on a thread that drives async tasks at the moment.
///
/// Tokio says so only by a panic, which a program that aborts on panics does not survive. But it
/// gives everything that it polls a budget, and code that may block has none: `spawn_blocking`,
/// `block_in_place`, and threads that merely know a runtime. Inside of `tokio::task::unconstrained`
/// this notices nothing.
pub(super) fn may_block() -> Result<()> {
    if Handle::try_current().is_ok() && has_budget() { Err(Error::BlockingInAsync) } else { Ok(()) }
}

/// Whether there is a budget, which then ends. It is left as it was.
fn has_budget() -> bool {
    let mut context = Context::from_waker(Waker::noop());
    // Gives everything back at the end; without a budget there is nothing to give back.
    let mut first = None;
    for _ in 0..BUDGET_MAX {
        if !coop::has_budget_remaining() {
            return true;
        }
        let Poll::Ready(spent) = coop::poll_proceed(&mut context) else { return true };
        if first.is_some() {
            spent.made_progress();
        } else {
            first = Some(spent);
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_entered_once_on_a_thread_and_others_beside_it() {
        let one = Inside::enter(1).unwrap();
        assert!(matches!(Inside::enter(1), Err(Error::Reentrant)));
        let two = Inside::enter(2).unwrap();
        drop(one);
        assert!(!Inside::is(1) && Inside::is(2));
        std::thread::spawn(|| Inside::enter(2).map(drop)).join().unwrap().unwrap();
        drop(two);
        Inside::enter(2).unwrap();
    }

    fn refused() -> bool {
        matches!(may_block(), Err(Error::BlockingInAsync))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn who_drives_tasks_may_not_block_and_others_may() {
        assert!(refused(), "the future of block_on");
        assert!(tokio::spawn(async { refused() }).await.unwrap(), "a task");
        assert!(!tokio::task::spawn_blocking(refused).await.unwrap());
        let in_place = tokio::spawn(async { (tokio::task::block_in_place(refused), refused()) });
        assert_eq!(in_place.await.unwrap(), (false, true));
        let handle = Handle::current();
        let entered = std::thread::spawn(move || {
            let _runtime = handle.enter();
            (refused(), handle.block_on(async { refused() }))
        });
        assert_eq!(entered.join().unwrap(), (false, true));
        tokio::task::LocalSet::new().run_until(async { assert!(refused()) }).await;
        let local = tokio::runtime::Builder::new_current_thread().build().unwrap();
        std::thread::spawn(move || assert!(local.block_on(async { refused() }))).join().unwrap();
        assert!(!std::thread::spawn(refused).join().unwrap(), "no runtime at all");
    }

    #[tokio::test]
    async fn asking_spends_nothing() {
        let spend = |n: usize| {
            let mut context = Context::from_waker(Waker::noop());
            (0..n).all(|_| match coop::poll_proceed(&mut context) {
                Poll::Ready(spent) => {
                    spent.made_progress();
                    true
                }
                Poll::Pending => false,
            })
        };
        tokio::task::yield_now().await;
        assert!(spend(100));
        assert!(refused());
        assert!(spend(20), "as much is left as before");
        assert!(!spend(200));
        assert!(refused(), "also when nothing is left");
    }
}
