//! The caller's side of a call within one process: no stream lies between.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{CallControl, CallResult, CancelLevel, Destination, remember};

/// What has come of a call within one process.
#[derive(Default)]
pub(super) struct LocalAnswer {
    pub(super) items: VecDeque<Bytes>,
    pub(super) result: Option<CallResult>,
    pub(super) waker: Option<Waker>,
}

/// The caller's side of a call within one process: await it for the answer.
pub struct LocalCall(pub(super) Arc<CallControl>);

impl LocalCall {
    /// The answer, once it is there. It is given out once.
    pub(crate) fn poll_answer(&self, context: &mut Context<'_>) -> Poll<CallResult> {
        let mut answer = self.answer_slot().lock();
        match answer.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                remember(&mut answer.waker, context);
                Poll::Pending
            }
        }
    }

    /// The next item, or the answer when there are no more.
    pub(crate) fn poll_item(&self, context: &mut Context<'_>) -> Poll<Result<Bytes, CallResult>> {
        let mut answer = self.answer_slot().lock();
        if let Some(item) = answer.items.pop_front() {
            drop(answer);
            self.0.grant(1);
            return Poll::Ready(Ok(item));
        }
        match answer.result.take() {
            Some(result) => Poll::Ready(Err(result)),
            None => {
                remember(&mut answer.waker, context);
                Poll::Pending
            }
        }
    }

    /// Tells the method that the caller wants no more of it.
    pub fn cancel(&self, level: CancelLevel) {
        self.0.cancel(level);
    }

    fn answer_slot(&self) -> &Mutex<LocalAnswer> {
        match &self.0.destination {
            Destination::SameProcess(answer) => answer,
            Destination::Stream { .. } => unreachable!("made by `Reply::same_process` only"),
        }
    }
}

impl Future for LocalCall {
    type Output = CallResult;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<CallResult> {
        self.poll_answer(context)
    }
}
