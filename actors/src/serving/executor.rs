//! What computes a replica's batches: a thread of its own, apart from those that read and write, and one batch after the other.
//! Batches so brief that handing them over would take longer than they do are computed by the thread that has read them (`brief`).
//!
//! Invariants:
//! 1. What nobody waits for any more is not begun.
//! 2. A panic is the failure of the batch that caused it; the thread goes on.
//! 3. The thread ends when its handle is dropped, after what it is at.
//! 4. A thread that does not come back from what it is at is found out by the next who asks. Nobody can end it, so of a process that
//!    has left `LEFT_BEHIND_MAX` of them behind no more are started.

mod brief;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use self::brief::{Brevity, Turn};
use super::arm::lock;
use crate::panics::caught;

/// Orders that wait: a replica is sent one batch at a time, and one more when its caller has given one up.
const ORDERS_MAX: usize = 2;

/// What is computed for longer than this hangs. A router gives a batch up long before.
const HANGS_AFTER: Duration = Duration::from_secs(30);

/// Threads of one process that hung when their replicas ended. Each takes a core as long as it does not come back.
const LEFT_BEHIND_MAX: usize = 4;

/// Those of this process.
static LEFT_BEHIND: AtomicUsize = AtomicUsize::new(0);

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum ExecutorError {
    #[error("no thread could be started: {0}")]
    Start(String),
    #[error("it panicked: {0}")]
    Panicked(String),
    #[error("its thread has ended")]
    Ended,
    #[error(
        "{LEFT_BEHIND_MAX} threads of this process compute batches from which they do not come back, which is the limit: take the \
         endpoint down, or give its replicas processes of their own (`mobula serve deploy --memory`)"
    )]
    TooManyHang,
    #[error("it has been at one batch for {} s and does not come back", .since.as_secs())]
    Hangs { since: Duration },
}

type Order<S> = Box<dyn FnOnce(&S) + Send>;

/// The way to the thread, and what it computes with.
pub(super) struct Executor<S> {
    state: Arc<S>,
    orders: mpsc::Sender<Order<S>>,
    work: Arc<Mutex<Work>>,
    hangs_after: Duration,
}

/// What the thread is at.
#[derive(Default)]
struct Work {
    /// What was ordered of it and is not over.
    orders: usize,
    /// When it began what it is at.
    began: Option<Instant>,
    /// Whether it was given up, and counted as such.
    is_left_behind: bool,
    /// How long batches take, there and here.
    brevity: Brevity,
}

impl<S: Send + Sync + 'static> Executor<S> {
    /// Starts the thread.
    pub(super) fn start(state: S) -> Result<Self, ExecutorError> {
        Self::start_with(state, HANGS_AFTER)
    }

    fn start_with(state: S, hangs_after: Duration) -> Result<Self, ExecutorError> {
        if LEFT_BEHIND.load(Ordering::Relaxed) >= LEFT_BEHIND_MAX {
            return Err(ExecutorError::TooManyHang);
        }
        let (orders, mut ordered) = mpsc::channel::<Order<S>>(ORDERS_MAX);
        let state = Arc::new(state);
        let work = Arc::<Mutex<Work>>::default();
        let (there, own) = (Arc::clone(&state), Arc::clone(&work));
        let compute = move || {
            while let Some(order) = ordered.blocking_recv() {
                lock(&own).began = Some(Instant::now());
                order(&there);
                let mut work = lock(&own);
                work.began = None;
                if std::mem::take(&mut work.is_left_behind) {
                    LEFT_BEHIND.fetch_sub(1, Ordering::Relaxed);
                }
            }
        };
        std::thread::Builder::new()
            .name("model".to_owned())
            .spawn(compute)
            .map_err(|error| ExecutorError::Start(error.to_string()))?;
        Ok(Executor {
            state,
            orders,
            work,
            hangs_after,
        })
    }

    /// Has something computed by the thread.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&S) -> T + Send + 'static,
    ) -> Result<T, ExecutorError> {
        if let Some(since) = self.hangs_since() {
            return Err(ExecutorError::Hangs { since });
        }
        let ordered = Ordered::enter(&self.work);
        let (done, is_done) = oneshot::channel();
        let order: Order<S> = Box::new(move |state| {
            if !done.is_closed() {
                // A model holds no state that a batch changes, so none is left half changed.
                let result = caught(|| work(state)).map_err(ExecutorError::Panicked);
                // Before the answer: who has it may ask again at once.
                drop(ordered);
                let _ = done.send(result);
            }
        });
        let sent = self.orders.send(order).await;
        sent.map_err(|_| ExecutorError::Ended)?;
        is_done.await.unwrap_or(Err(ExecutorError::Ended))
    }

    /// Has a batch of so many bytes computed: right here, if batches of as many have been brief and the thread is at nothing.
    pub(super) async fn run_batch<T: Send + 'static>(
        &self,
        size_bytes: usize,
        work: impl FnOnce(&S) -> T + Send + 'static,
    ) -> Result<T, ExecutorError> {
        let measured = Arc::clone(&self.work);
        let timed = move |state: &S| {
            let began = Instant::now();
            let done = work(state);
            lock(&measured).brevity.ran(size_bytes, began.elapsed());
            done
        };
        match self.turn(size_bytes) {
            Some(_turn) => caught(|| timed(&self.state)).map_err(ExecutorError::Panicked),
            None => self.run(timed).await,
        }
    }

    /// Leave to compute a batch here.
    fn turn(&self, size_bytes: usize) -> Option<Turn> {
        let work = lock(&self.work);
        let is_for_here = work.orders == 0 && work.brevity.expects(size_bytes);
        is_for_here.then(Turn::take).flatten()
    }
}

/// An order that is not over.
struct Ordered(Arc<Mutex<Work>>);

impl Ordered {
    fn enter(work: &Arc<Mutex<Work>>) -> Self {
        lock(work).orders += 1;
        Ordered(Arc::clone(work))
    }
}

impl Drop for Ordered {
    fn drop(&mut self) {
        lock(&self.0).orders -= 1;
    }
}

impl<S> Executor<S> {
    /// How long the thread has been at what it does not come back from, if that is so.
    fn hangs_since(&self) -> Option<Duration> {
        let since = lock(&self.work).began?.elapsed();
        (since > self.hangs_after).then_some(since)
    }
}

impl<S> Drop for Executor<S> {
    fn drop(&mut self) {
        if self.hangs_since().is_none() {
            return;
        }
        let mut work = lock(&self.work);
        // It may have come back just now.
        if work.began.is_some() {
            work.is_left_behind = true;
            LEFT_BEHIND.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_computes_elsewhere_and_outlives_a_panic() {
        let executor = Executor::start(7u32).unwrap();
        let here = std::thread::current().id();
        let there = executor.run(|_| std::thread::current().id()).await.unwrap();
        assert_ne!(here, there);
        let panicked = executor
            .run(|seven| assert_eq!(*seven, 8, "not eight"))
            .await;
        assert!(
            matches!(&panicked, Err(ExecutorError::Panicked(text)) if text.contains("not eight"))
        );
        assert_eq!(executor.run(|seven| seven + 1).await, Ok(8));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_is_brief_is_computed_by_whoever_asks() {
        // On a thread of the runtime, as a replica's calls are.
        let asking = tokio::spawn(async {
            let executor = Executor::start(()).unwrap();
            let by_whom = |(): &()| std::thread::current().id();
            let there = executor.run(by_whom).await.unwrap();
            let ask = |size_bytes| executor.run_batch(size_bytes, by_whom);
            // It is not known yet how long it takes.
            assert_eq!(ask(64).await, Ok(there));
            let mut by = there;
            for _ in 0..10_000 {
                by = ask(64).await.unwrap();
                if by != there {
                    break;
                }
            }
            // What awaits nothing goes on where it is.
            assert_eq!(by, std::thread::current().id());
            // Nothing is known of a larger one.
            assert_eq!(ask(65).await, Ok(there));
            let panicked = executor.run_batch(64, |()| assert_eq!(7, 8, "not eight"));
            let panicked = panicked.await;
            assert!(
                matches!(&panicked, Err(ExecutorError::Panicked(text)) if text.contains("not eight"))
            );
        });
        asking.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nothing_is_computed_here_while_the_thread_is_at_work() {
        let executor = Arc::new(Executor::start(()).unwrap());
        lock(&executor.work).brevity = Brevity::of(64);
        let (begins, has_begun) = oneshot::channel();
        let (release, is_released) = std::sync::mpsc::channel::<()>();
        let other = Arc::clone(&executor);
        let at_work = tokio::spawn(async move {
            let working = other.run(move |()| {
                let _ = begins.send(());
                is_released.recv().is_ok()
            });
            working.await
        });
        has_begun.await.unwrap();
        assert!(executor.turn(64).is_none());
        release.send(()).unwrap();
        assert_eq!(at_work.await.unwrap(), Ok(true));
        // Another test of this process may have a turn.
        assert!((0..1_000_000).any(|_| executor.turn(64).is_some()));
    }

    #[tokio::test]
    async fn what_does_not_come_to_an_end_is_found_out() {
        let executor = Executor::start_with((), Duration::ZERO).unwrap();
        let (begins, has_begun) = oneshot::channel();
        let (release, is_released) = std::sync::mpsc::channel::<()>();
        let at_work = executor.run(move |()| {
            let _ = begins.send(());
            is_released.recv().is_ok()
        });
        let asking = async {
            has_begun.await.unwrap();
            let asked = executor.run(|()| ()).await;
            release.send(()).unwrap();
            asked
        };
        let (at_work, asked) = tokio::join!(at_work, asking);
        assert!(
            matches!(asked, Err(ExecutorError::Hangs { .. })),
            "{asked:?}"
        );
        // It came back after all.
        assert_eq!(at_work, Ok(true));
    }

    #[tokio::test]
    async fn a_thread_that_is_left_behind_is_counted_until_it_comes_back() {
        let (release, is_released) = std::sync::mpsc::channel::<()>();
        let releases = Arc::new(Mutex::new(is_released));
        for _ in 0..LEFT_BEHIND_MAX {
            let executor = Executor::start_with((), Duration::ZERO).unwrap();
            let (begins, has_begun) = oneshot::channel();
            let releases = Arc::clone(&releases);
            let hanging = executor.run(move |()| {
                let _ = begins.send(());
                lock(&releases).recv().is_ok()
            });
            tokio::select! {
                _ = hanging => unreachable!("nobody has released it"),
                begun = has_begun => begun.unwrap(),
            }
        }
        let refused = Executor::start(()).map(drop);
        assert_eq!(refused, Err(ExecutorError::TooManyHang));
        drop(release);
        while LEFT_BEHIND.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        Executor::start(()).unwrap();
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_begun() {
        let executor = Executor::start(()).unwrap();
        let (release, is_released) = std::sync::mpsc::channel::<()>();
        let begun = Arc::new(AtomicUsize::new(0));
        let count = |begun: &Arc<AtomicUsize>| {
            let begun = Arc::clone(begun);
            move |(): &()| {
                begun.fetch_add(1, Ordering::Relaxed);
            }
        };
        let first = executor.run(move |()| is_released.recv().is_ok());
        let given_up = executor.run(count(&begun));
        let both = async {
            tokio::pin!(first);
            {
                tokio::pin!(given_up);
                // Both are ordered, and the second is dropped while the first is at work.
                std::future::poll_fn(|context| {
                    use std::future::Future;
                    assert!(first.as_mut().poll(context).is_pending());
                    assert!(given_up.as_mut().poll(context).is_pending());
                    std::task::Poll::Ready(())
                })
                .await;
            }
            release.send(()).unwrap();
            first.await
        };
        assert_eq!(both.await, Ok(true));
        executor.run(count(&begun)).await.unwrap();
        assert_eq!(begun.load(Ordering::Relaxed), 1);
    }
}
