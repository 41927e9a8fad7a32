//! The thread on which a replica computes: apart from the threads that read and write, and one batch after the other.
//!
//! Invariants:
//! 1. What nobody waits for any more is not begun.
//! 2. A panic is the failure of the batch that caused it; the thread goes on.
//! 3. The thread ends when its handle is dropped, after what it is at.

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::panics::caught;

/// Orders that wait: a replica is sent one batch at a time, and one more when its caller has given one up.
const ORDERS_MAX: usize = 2;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum ExecutorError {
    #[error("no thread could be started: {0}")]
    Start(String),
    #[error("it panicked: {0}")]
    Panicked(String),
    #[error("its thread has ended")]
    Ended,
}

type Order<S> = Box<dyn FnOnce(&S) + Send>;

/// The way to the thread and what it holds.
pub(super) struct Executor<S> {
    orders: mpsc::Sender<Order<S>>,
}

impl<S: Send + 'static> Executor<S> {
    /// Starts the thread.
    pub(super) fn start(state: S) -> Result<Self, ExecutorError> {
        let (orders, mut ordered) = mpsc::channel::<Order<S>>(ORDERS_MAX);
        let work = move || {
            while let Some(order) = ordered.blocking_recv() {
                order(&state);
            }
        };
        std::thread::Builder::new()
            .name("model".to_owned())
            .spawn(work)
            .map_err(|error| ExecutorError::Start(error.to_string()))?;
        Ok(Executor { orders })
    }

    /// Has something computed.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&S) -> T + Send + 'static,
    ) -> Result<T, ExecutorError> {
        let (done, is_done) = oneshot::channel();
        let order: Order<S> = Box::new(move |state| {
            if !done.is_closed() {
                // A model holds no state that a batch changes, so none is left half changed.
                let _ = done.send(caught(|| work(state)).map_err(ExecutorError::Panicked));
            }
        });
        let sent = self.orders.send(order).await;
        sent.map_err(|_| ExecutorError::Ended)?;
        is_done.await.unwrap_or(Err(ExecutorError::Ended))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

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
