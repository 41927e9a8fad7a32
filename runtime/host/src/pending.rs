//! Calls whose answer is still to come.
//!
//! Invariants:
//! 1. Dropping a [`PendingCall`] gives up on its answer; a method that has begun runs to its end
//!    all the same. Dropping a [`PendingStream`] cancels the call.
//! 2. A deadline that passes says *not executed* only if the call was never sent.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::ActorId;
use tokio::time::Sleep;

use crate::host_stream::SentCall;
use crate::mailbox::Deadline;
use crate::reply::{CallResult, CancelLevel, LocalCall};

pub(crate) enum Route {
    Failed(CallError),
    SameProcess(LocalCall),
    Stream(SentCall),
}

impl Route {
    fn poll_answer(&mut self, context: &mut Context<'_>) -> Poll<CallResult> {
        match self {
            Route::Failed(error) => Poll::Ready(Err(error.clone())),
            Route::SameProcess(call) => call.poll_answer(context),
            Route::Stream(call) => call.poll_answer(context),
        }
    }

    fn poll_item(&mut self, context: &mut Context<'_>) -> Poll<Result<Bytes, CallResult>> {
        match self {
            Route::Failed(error) => Poll::Ready(Err(Err(error.clone()))),
            Route::SameProcess(call) => call.poll_item(context),
            Route::Stream(call) => call.poll_item(context),
        }
    }

    fn cancel(&self, level: CancelLevel) {
        match self {
            Route::Failed(_) => {}
            Route::SameProcess(call) => call.cancel(level),
            Route::Stream(call) => call.cancel(level),
        }
    }

    /// What is known while there is no answer.
    fn executed(&self) -> Executed {
        match self {
            Route::Failed(error) => error.executed(),
            Route::SameProcess(_) => Executed::Unknown,
            Route::Stream(call) => call.executed(),
        }
    }

    fn give_up(&mut self) -> Executed {
        match self {
            Route::Failed(error) => error.executed(),
            Route::SameProcess(_) => Executed::Unknown,
            Route::Stream(call) => call.give_up(),
        }
    }
}

fn level(forced: bool) -> CancelLevel {
    if forced {
        CancelLevel::Forced
    } else {
        CancelLevel::Requested
    }
}

/// A call whose answer is still to come.
#[must_use = "the outcome of a call is only known once it is answered"]
pub struct PendingCall {
    actor: ActorId,
    deadline: Option<Deadline>,
    route: Route,
    /// Runs out at the deadline; made when it is first waited for.
    timer: Option<Pin<Box<Sleep>>>,
}

impl PendingCall {
    pub(crate) fn new(actor: ActorId, deadline: Option<Deadline>, route: Route) -> Self {
        PendingCall {
            actor,
            deadline,
            route,
            timer: None,
        }
    }

    /// Waits for the answer, up to the deadline.
    pub async fn answer(mut self) -> CallResult {
        self.wait().await
    }

    /// The same for whoever may yet [`PendingCall::cancel`] it. The answer is given out once.
    pub async fn wait(&mut self) -> CallResult {
        poll_fn(|context| self.poll_answer(context)).await
    }

    /// The same for whoever waits for many.
    pub fn poll_answer(&mut self, context: &mut Context<'_>) -> Poll<CallResult> {
        if let Poll::Ready(result) = self.route.poll_answer(context) {
            return Poll::Ready(result);
        }
        let Some(deadline) = self.deadline else {
            return Poll::Pending;
        };
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline.at)));
        ready!(timer.as_mut().poll(context));
        Poll::Ready(Err(deadline.error(self.actor, self.route.give_up())))
    }

    /// Says that the call is not wanted any more. It is answered all the same:
    /// [`CallError::Cancelled`] if it had not begun, otherwise what its method makes of it, which
    /// is dropped at its next await if `forced`.
    pub fn cancel(&self, forced: bool) {
        self.route.cancel(level(forced));
    }
}

impl std::fmt::Debug for PendingCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingCall")
            .field("actor", &self.actor)
            .finish_non_exhaustive()
    }
}

/// A call that brings several values.
#[must_use = "dropping a stream cancels its call"]
pub struct PendingStream {
    actor: ActorId,
    deadline: Option<Deadline>,
    route: Route,
    ended: bool,
}

impl PendingStream {
    pub(crate) fn new(actor: ActorId, deadline: Option<Deadline>, route: Route) -> Self {
        PendingStream {
            actor,
            deadline,
            route,
            ended: false,
        }
    }

    /// The next item; after the last one what the call itself returned, and then `None`. Cancel
    /// safe.
    pub async fn next(&mut self) -> Option<StreamEvent> {
        if self.ended {
            return None;
        }
        let event = poll_fn(|context| self.route.poll_item(context));
        let event = match self.deadline {
            None => event.await,
            Some(deadline) => match tokio::time::timeout_at(deadline.at, event).await {
                Ok(event) => event,
                Err(_) => {
                    let executed = self.route.executed();
                    self.route.cancel(CancelLevel::Requested);
                    Err(Err(deadline.error(self.actor, executed)))
                }
            },
        };
        Some(match event {
            Ok(item) => StreamEvent::Item(item),
            Err(result) => {
                self.ended = true;
                StreamEvent::End(result)
            }
        })
    }

    /// Says that no more is wanted; [`PendingStream::next`] goes on until the call has ended.
    pub fn cancel(&self, forced: bool) {
        if !self.ended {
            self.route.cancel(level(forced));
        }
    }
}

impl Drop for PendingStream {
    fn drop(&mut self) {
        self.cancel(false);
    }
}

impl std::fmt::Debug for PendingStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingStream")
            .field("actor", &self.actor)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

/// What comes of a [`PendingStream`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEvent {
    /// One of its values, encoded.
    Item(Bytes),
    /// Its end: what the method returned, or why there is nothing more.
    End(CallResult),
}
