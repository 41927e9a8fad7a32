//! A caller's hold on a call that is on its way: its answer and items, and how to want no more of them.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_wire::call::CallerMessage;

use super::{HostStream, Slot, State, executed};
use crate::reply::{CallResult, CancelLevel, remember};

/// A call in its place on a stream. Dropping it gives up on the answer.
pub(crate) struct SentCall {
    pub(super) stream: Arc<HostStream>,
    pub(super) number: u32,
    /// The place is not ours any more.
    pub(super) over: bool,
}

impl SentCall {
    /// The answer, once it is there.
    pub(crate) fn poll_answer(&mut self, context: &mut Context<'_>) -> Poll<CallResult> {
        let stream = Arc::clone(&self.stream);
        let mut state = stream.state.lock();
        match &mut state.slots[self.number as usize] {
            Slot::Waiting(waiting) => {
                remember(&mut waiting.waker, context);
                Poll::Pending
            }
            Slot::Answered(..) => Poll::Ready(self.take_answer(&mut state)),
            Slot::Vacant | Slot::Abandoned => unreachable!("the place is ours until it is over"),
        }
    }

    fn take_answer(&mut self, state: &mut State) -> CallResult {
        self.over = true;
        let slot = std::mem::replace(&mut state.slots[self.number as usize], Slot::Vacant);
        state.vacant.push(self.number);
        self.stream.make_room(state);
        match slot {
            Slot::Answered(_, result) => result,
            _ => unreachable!("asked only where there is an answer"),
        }
    }

    /// The next item, or the answer when there are no more.
    pub(crate) fn poll_item(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Bytes, CallResult>> {
        let stream = Arc::clone(&self.stream);
        let (item, waker) = {
            let mut state = stream.state.lock();
            let state = &mut *state;
            match &mut state.slots[self.number as usize] {
                Slot::Waiting(waiting) => {
                    let Some(items) = &mut waiting.items else {
                        unreachable!("items are asked of calls that bring them")
                    };
                    let Some(item) = items.received.pop_front() else {
                        remember(&mut waiting.waker, context);
                        return Poll::Pending;
                    };
                    items.read += 1;
                    // Half a window at a time: one message for many items, and the host seldom
                    // waits.
                    let waker = if 2 * items.read >= items.window {
                        let credit = CallerMessage::Credit {
                            call: self.number,
                            items: std::mem::take(&mut items.read),
                        };
                        state.push(None, None, credit)
                    } else {
                        None
                    };
                    (item, waker)
                }
                Slot::Answered(items, _) => {
                    let rest = items.as_mut().and_then(|items| items.received.pop_front());
                    match rest {
                        Some(item) => (item, None),
                        None => return Poll::Ready(Err(self.take_answer(state))),
                    }
                }
                Slot::Vacant | Slot::Abandoned => {
                    unreachable!("the place is ours until it is over")
                }
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Poll::Ready(Ok(item))
    }

    /// Tells the host that the call is not wanted any more; one that was not sent yet is answered
    /// here.
    pub(crate) fn cancel(&self, level: CancelLevel) {
        let waker = {
            let mut state = self.stream.state.lock();
            let state = &mut *state;
            let Slot::Waiting(waiting) = &mut state.slots[self.number as usize] else {
                return;
            };
            if waiting.cancelled >= level {
                return;
            }
            waiting.cancelled = level;
            if waiting.sequence < state.taken {
                let message = CallerMessage::Cancel {
                    call: self.number,
                    forced: level == CancelLevel::Forced,
                };
                state.push(None, None, message)
            } else {
                state.withdrawn.insert(waiting.sequence);
                let waker = waiting.waker.take();
                let items = waiting.items.take();
                let error = CallError::Cancelled {
                    actor: waiting.actor.to_string(),
                    executed: Executed::No,
                };
                state.slots[self.number as usize] = Slot::Answered(items, Err(error));
                waker
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// What an end now would leave unsaid.
    pub(crate) fn executed(&self) -> Executed {
        let state = self.stream.state.lock();
        match &state.slots[self.number as usize] {
            Slot::Waiting(waiting) => executed(waiting.sequence, state.taken),
            _ => Executed::Unknown,
        }
    }

    /// Waits no longer; whether the call may have been executed, as far as that is known here.
    pub(crate) fn give_up(&mut self) -> Executed {
        if std::mem::replace(&mut self.over, true) {
            return Executed::Unknown;
        }
        let mut state = self.stream.state.lock();
        let state = &mut *state;
        match &state.slots[self.number as usize] {
            Slot::Waiting(waiting) if waiting.sequence < state.taken => {
                state.slots[self.number as usize] = Slot::Abandoned;
                Executed::Unknown
            }
            Slot::Waiting(waiting) => {
                state.withdrawn.insert(waiting.sequence);
                state.vacate(self.number);
                self.stream.make_room(state);
                Executed::No
            }
            Slot::Answered(..) => {
                state.vacate(self.number);
                self.stream.make_room(state);
                Executed::Unknown
            }
            Slot::Vacant | Slot::Abandoned => unreachable!("the place is ours until it is over"),
        }
    }
}

impl Drop for SentCall {
    fn drop(&mut self) {
        self.give_up();
    }
}
