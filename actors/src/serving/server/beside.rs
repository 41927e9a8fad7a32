//! One request of an HTTP/2 connection on the connection's own task.
//!
//! hyper gives each request of such a connection a task of its own. A caller that asks one thing after the other waits for one
//! more change of tasks on the way in, and for one on the way out; and where a few tasks wake each other in a row, tokio hands the
//! next one to another thread, which has to wake up first. So one request at a time is worked on by the connection's task, as over
//! HTTP/1.1, and those that come meanwhile have tasks of their own.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::BoxFuture;
use hyper::rt::Executor;

/// Where the requests of one connection are worked on; clones are of the same connection.
#[derive(Clone, Default)]
pub(super) struct Beside {
    seat: Arc<Mutex<Seat>>,
}

/// The place of the one request.
#[derive(Default)]
struct Seat {
    is_taken: bool,
    /// Not here while it is polled.
    request: Option<BoxFuture<'static, ()>>,
}

impl Beside {
    /// Works on the request that has the place. To be called by the connection's task whenever the connection waits.
    pub(super) fn poll(&self, context: &mut Context<'_>) {
        let Some(mut request) = self.seat().request.take() else {
            return;
        };
        let polled = request.poll_unpin(context);
        let mut seat = self.seat();
        match polled {
            Poll::Ready(()) => seat.is_taken = false,
            Poll::Pending => seat.request = Some(request),
        }
    }

    fn seat(&self) -> MutexGuard<'_, Seat> {
        // Whole after every single update, so a panic elsewhere does not spoil it.
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Beside {
    fn execute(&self, request: F) {
        let mut seat = self.seat();
        if seat.is_taken {
            drop(seat);
            tokio::spawn(request);
            return;
        }
        seat.is_taken = true;
        // One that panics ends as in a task of its own, and not the others of its connection.
        let ended = AssertUnwindSafe(request).catch_unwind();
        seat.request = Some(ended.map(|_panicked| ()).boxed());
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::sync::mpsc;

    use super::*;

    /// Polls until `done` says something, as a connection's task does.
    async fn drive(beside: &Beside, done: &mut mpsc::UnboundedReceiver<u32>) -> u32 {
        poll_fn(|context| {
            beside.poll(context);
            done.poll_recv(context)
        })
        .await
        .expect("the sender is kept")
    }

    #[tokio::test]
    async fn the_first_request_is_worked_on_here_and_others_elsewhere() {
        let beside = Beside::default();
        let (say, mut done) = mpsc::unbounded_channel();
        let (go, mut may_go) = mpsc::unbounded_channel::<()>();
        let said = say.clone();
        beside.execute(async move {
            may_go.recv().await;
            said.send(1).unwrap();
        });
        let said = say.clone();
        beside.clone().execute(async move { said.send(2).unwrap() });
        // Nobody polls the first one yet.
        assert_eq!(done.recv().await, Some(2));
        go.send(()).unwrap();
        assert_eq!(drive(&beside, &mut done).await, 1);
        // The place is free again.
        let said = say.clone();
        beside.execute(async move { said.send(3).unwrap() });
        assert!(beside.seat().is_taken && done.try_recv().is_err());
        assert_eq!(drive(&beside, &mut done).await, 3);
        assert!(!beside.seat().is_taken);
    }

    #[tokio::test]
    async fn a_panic_ends_its_request_alone() {
        let beside = Beside::default();
        let (say, mut done) = mpsc::unbounded_channel();
        beside.execute(async { panic!("not this") });
        poll_fn(|context| {
            beside.poll(context);
            Poll::Ready(())
        })
        .await;
        beside.execute(async move { say.send(1).unwrap() });
        assert_eq!(drive(&beside, &mut done).await, 1);
    }
}
