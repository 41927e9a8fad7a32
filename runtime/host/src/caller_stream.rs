//! The host's side of one caller's stream: which of its calls are unanswered, and what waits to be
//! written to it.
//!
//! Invariants:
//! 1. A call number is in use from its request until its answer; a caller that uses it twice, or
//!    one that is too large, breaks the protocol.
//! 2. After [`CallerStream::end`] nothing is queued, and calls that take items are cancelled.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use mobula_wire::call::{CALLS_IN_FLIGHT_MAX, CalleeMessage};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::reply::{CallControl, CallResult, CancelLevel, remember};

/// Messages are gathered up to this size before they are handed to the transport: about as much as
/// one round of its sending takes up.
pub(crate) const COALESCED_BYTES: usize = 64 * 1024;

/// Answers that wait while no further request is read: a caller that does not take its answers
/// gets to make no more calls.
const OUTGOING_BYTES_MAX: usize = 64 << 20;

/// How a caller broke the protocol. Its stream ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtocolError {
    #[error("call number {call} is over the limit of {CALLS_IN_FLIGHT_MAX}")]
    NumberTooLarge { call: u32 },
    #[error("call number {call} was used again before its answer")]
    NumberInUse { call: u32 },
    #[error("more credit was given for call number {call} than a caller may give")]
    TooMuchCredit { call: u32 },
}

/// What a caller's stream has under way.
#[derive(Default)]
pub(crate) struct CallerStream {
    state: Mutex<State>,
    /// Told when there is room for answers again.
    drained: Notify,
}

#[derive(Default)]
struct State {
    /// By number; as long as the largest number in use made it.
    calls: Vec<Option<Arc<CallControl>>>,
    in_flight: usize,
    outgoing: VecDeque<CalleeMessage>,
    outgoing_bytes: usize,
    writer: Option<Waker>,
    phase: Phase,
}

#[derive(Default, PartialEq, Eq, Clone, Copy)]
enum Phase {
    #[default]
    Open,
    /// The caller makes no more calls and waits for its answers.
    Finishing,
    /// Nobody reads answers any more.
    Ended,
}

impl CallerStream {
    /// Takes up a call that was just read. One that is refused is never answered: its number may
    /// be another call's.
    pub(crate) fn enter(&self, call: u32, control: Arc<CallControl>) -> Result<(), ProtocolError> {
        if call >= CALLS_IN_FLIGHT_MAX {
            control.disown();
            return Err(ProtocolError::NumberTooLarge { call });
        }
        let index = call as usize;
        let mut state = self.state.lock();
        if state.calls.len() <= index {
            state.calls.resize_with(index + 1, || None);
        }
        let slot = &mut state.calls[index];
        if slot.is_some() {
            control.disown();
            return Err(ProtocolError::NumberInUse { call });
        }
        *slot = Some(control);
        state.in_flight += 1;
        Ok(())
    }

    /// Cancels a call; one that is answered already is left alone.
    pub(crate) fn cancel(&self, call: u32, level: CancelLevel) {
        // Not under the lock: a call that has not begun answers at once.
        if let Some(control) = self.find(call) {
            control.cancel(level);
        }
    }

    /// Lets a call send more items.
    pub(crate) fn grant(&self, call: u32, items: u32) -> Result<(), ProtocolError> {
        match self.find(call) {
            Some(control) if !control.grant(items) => Err(ProtocolError::TooMuchCredit { call }),
            _ => Ok(()),
        }
    }

    fn find(&self, call: u32) -> Option<Arc<CallControl>> {
        self.state
            .lock()
            .calls
            .get(call as usize)
            .and_then(Clone::clone)
    }

    /// Ends a call with its answer; gives that back if the call or the stream is over.
    pub(crate) fn answer(&self, call: u32, result: CallResult) -> Option<CallResult> {
        match self.queue(call, CalleeMessage::Answer { call, result }) {
            Err(CalleeMessage::Answer { result, .. }) => Some(result),
            _ => None,
        }
    }

    /// Sends an item of a call; false if the call or the stream is over.
    pub(crate) fn item(&self, call: u32, sequence: u64, value: Bytes) -> bool {
        let message = CalleeMessage::Item {
            call,
            sequence,
            value,
        };
        self.queue(call, message).is_ok()
    }

    /// Queues a message of a call, or gives it back if the call or the stream is over.
    fn queue(&self, call: u32, message: CalleeMessage) -> Result<(), CalleeMessage> {
        let ends_call = matches!(message, CalleeMessage::Answer { .. });
        // Dropped after the lock is given back.
        let (waker, _control) = {
            let mut state = self.state.lock();
            let state = &mut *state;
            let Some(slot @ Some(_)) = state.calls.get_mut(call as usize) else {
                return Err(message);
            };
            let control = if ends_call { slot.take() } else { None };
            state.in_flight -= usize::from(ends_call);
            state.outgoing_bytes += message.size_bytes();
            state.outgoing.push_back(message);
            (state.writer.take(), control)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Moves messages that are ready to `batch`, about as many as are written at once; false when
    /// there will be no more.
    pub(crate) fn poll_outgoing(
        &self,
        context: &mut Context<'_>,
        batch: &mut Vec<CalleeMessage>,
    ) -> Poll<bool> {
        let mut state = self.state.lock();
        if state.phase == Phase::Ended {
            return Poll::Ready(false);
        }
        let was_full = state.outgoing_bytes > OUTGOING_BYTES_MAX;
        let mut batch_bytes = 0;
        while batch_bytes < COALESCED_BYTES
            && let Some(message) = state.outgoing.pop_front()
        {
            batch_bytes += message.size_bytes();
            batch.push(message);
        }
        state.outgoing_bytes -= batch_bytes;
        if was_full && state.outgoing_bytes <= OUTGOING_BYTES_MAX {
            self.drained.notify_waiters();
        }
        if batch_bytes > 0 {
            return Poll::Ready(true);
        }
        if state.phase == Phase::Finishing && state.in_flight == 0 {
            return Poll::Ready(false);
        }
        remember(&mut state.writer, context);
        Poll::Pending
    }

    /// Waits until the caller has taken enough of its answers to be listened to again.
    pub(crate) async fn has_room(&self) {
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            // Registered before the look, so that no change is missed in between.
            drained.as_mut().enable();
            if self.state.lock().outgoing_bytes <= OUTGOING_BYTES_MAX {
                return;
            }
            drained.await;
        }
    }

    /// The caller makes no more calls.
    pub(crate) fn finish(&self) {
        let waker = {
            let mut state = self.state.lock();
            if state.phase == Phase::Open {
                state.phase = Phase::Finishing;
            }
            state.writer.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The caller is gone. Methods run to their end, but those that feed it items are told.
    pub(crate) fn end(&self) {
        let (waker, calls) = {
            let mut state = self.state.lock();
            state.phase = Phase::Ended;
            state.in_flight = 0;
            state.outgoing.clear();
            state.outgoing_bytes = 0;
            (state.writer.take(), std::mem::take(&mut state.calls))
        };
        self.drained.notify_waiters();
        if let Some(waker) = waker {
            waker.wake();
        }
        for control in calls.into_iter().flatten() {
            if control.takes_items() {
                control.cancel(CancelLevel::Requested);
            }
        }
    }
}
