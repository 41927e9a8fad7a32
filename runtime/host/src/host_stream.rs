//! The caller's side of the stream to one host: which calls are unanswered, and what waits to be
//! written.
//!
//! Invariants:
//! 1. A call's number is its place in a table, and free again once it is answered. A call that
//!    nobody waits for keeps its place until then, because the host knows it by that number.
//! 2. A call counts as sent from the moment when the writer takes it. One that is given up before
//!    is never sent.
//! 3. What waits is bounded in number and bytes, what is unanswered in number; beyond that callers
//!    wait.
//! 4. Items that were not asked for, or that do not follow each other, end the stream.

mod sent_call;

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::ActorId;
use mobula_wire::call::{CALLS_IN_FLIGHT_MAX, CalleeMessage, CallerMessage};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

pub(crate) use self::sent_call::SentCall;
use crate::caller_stream::COALESCED_BYTES;
use crate::client::{CallOrder, CallPath};
use crate::mailbox::Deadline;
use crate::reply::{CallResult, CancelLevel, remember, unavailable};

/// Messages that wait to be written to one host: some bursts' worth.
const OUTGOING_MAX: usize = 4096;

/// The same in bytes: eight of the largest arguments.
const OUTGOING_BYTES_MAX: usize = 64 << 20;

/// The stream to one host.
#[derive(Default)]
pub(crate) struct HostStream {
    state: Mutex<State>,
    /// Told when there is room for calls again.
    room: Notify,
    /// How it reaches the host, once it does.
    pub(crate) path: OnceLock<CallPath>,
}

#[derive(Default)]
struct State {
    outgoing: VecDeque<Outgoing>,
    outgoing_bytes: usize,
    /// Calls with a smaller sequence number have been taken by the writer.
    taken: u64,
    next_sequence: u64,
    /// Calls that the writer has taken and the host has not answered.
    owed: usize,
    /// Calls that wait in `outgoing` and are not to be sent.
    withdrawn: HashSet<u64>,
    slots: Vec<Slot>,
    /// Vacant places in `slots`.
    vacant: Vec<u32>,
    writer: Option<Waker>,
    /// Somebody waits in [`HostStream::enter`].
    crowded: bool,
    /// Why the stream ended, once it has.
    ended: Option<Arc<str>>,
}

struct Outgoing {
    /// For requests: their place among all calls of the stream.
    sequence: Option<u64>,
    deadline: Option<Deadline>,
    message: CallerMessage,
}

enum Slot {
    Vacant,
    Waiting(Waiting),
    /// Nobody waits for it, but the host has not answered yet.
    Abandoned,
    /// The answer is there for whoever made the call.
    Answered(Option<Box<Items>>, CallResult),
}

struct Waiting {
    actor: ActorId,
    sequence: u64,
    cancelled: CancelLevel,
    waker: Option<Waker>,
    /// For calls that bring several values.
    items: Option<Box<Items>>,
}

struct Items {
    received: VecDeque<Bytes>,
    next_sequence: u64,
    window: u32,
    /// Read by the caller since credit was last given.
    read: u32,
}

/// How a host broke the protocol. The stream to it ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtocolError {
    #[error("it answered call number {call}, which was not asked or is answered already")]
    NotAsked { call: u32 },
    #[error("item {sequence} of call number {call} came where {expected} was due")]
    OutOfOrder {
        call: u32,
        sequence: u64,
        expected: u64,
    },
    #[error("it sent more items of call number {call} than there was credit for")]
    NoCredit { call: u32 },
}

/// A call as it enters a stream; its number comes from there.
pub(crate) struct NewCall {
    pub(crate) request: mobula_wire::call::CallRequest,
    pub(crate) deadline: Option<Deadline>,
    /// For who takes it back, where there is no room.
    pub(crate) order: CallOrder,
}

impl HostStream {
    pub(crate) fn is_ended(&self) -> bool {
        self.state.lock().ended.is_some()
    }

    /// Whether the writer has taken calls that the host has not answered.
    pub(crate) fn owes_answers(&self) -> bool {
        self.state.lock().owed > 0
    }

    /// Puts a call in line, once there is room for it.
    pub(crate) async fn enter(self: &Arc<Self>, call: NewCall) -> Result<SentCall, CallError> {
        let actor = call.request.actor;
        let deadline = call.deadline;
        let mut call = Some(call);
        // Nearly always there is room at once.
        if let Some(outcome) = self.try_enter(&mut call) {
            return outcome;
        }
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            // Registered before the look, so that no change is missed in between.
            room.as_mut().enable();
            if let Some(outcome) = self.try_enter(&mut call) {
                return outcome;
            }
            match deadline {
                None => room.await,
                Some(deadline) => {
                    if tokio::time::timeout_at(deadline.at, room).await.is_err() {
                        return Err(deadline.error(actor, Executed::No));
                    }
                }
            }
        }
    }

    /// Takes the call out of `call`, or leaves it there if there is no room for it now.
    pub(crate) fn try_enter(
        self: &Arc<Self>,
        call: &mut Option<NewCall>,
    ) -> Option<Result<SentCall, CallError>> {
        let (waker, number) = {
            let mut state = self.state.lock();
            let state = &mut *state;
            let actor = call.as_ref()?.request.actor;
            if let Some(reason) = &state.ended {
                return Some(Err(unavailable(actor, &**reason, Executed::No)));
            }
            if state.outgoing.len() >= OUTGOING_MAX
                || state.outgoing_bytes >= OUTGOING_BYTES_MAX
                || (state.vacant.is_empty() && state.slots.len() >= CALLS_IN_FLIGHT_MAX as usize)
            {
                state.crowded = true;
                return None;
            }
            let NewCall {
                mut request,
                deadline,
                ..
            } = call.take()?;
            let sequence = state.next_sequence;
            state.next_sequence += 1;
            let waiting = Slot::Waiting(Waiting {
                actor,
                sequence,
                cancelled: CancelLevel::None,
                waker: None,
                items: request.window.map(|window| {
                    Box::new(Items {
                        received: VecDeque::new(),
                        next_sequence: 0,
                        window,
                        read: 0,
                    })
                }),
            });
            let number = match state.vacant.pop() {
                Some(number) => {
                    state.slots[number as usize] = waiting;
                    number
                }
                None => {
                    state.slots.push(waiting);
                    // Below CALLS_IN_FLIGHT_MAX, which is a u32.
                    (state.slots.len() - 1) as u32
                }
            };
            request.call = number;
            let waker = state.push(Some(sequence), deadline, CallerMessage::Request(request));
            (waker, number)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Some(Ok(SentCall {
            stream: Arc::clone(self),
            number,
            over: false,
        }))
    }

    /// Moves what waits to `batch`, about as much as is written at once. False when the stream has
    /// ended.
    pub(crate) fn poll_outgoing(
        &self,
        context: &mut Context<'_>,
        batch: &mut Vec<CallerMessage>,
    ) -> Poll<bool> {
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.ended.is_some() {
            return Poll::Ready(false);
        }
        let mut batch_bytes = 0;
        while batch_bytes < COALESCED_BYTES
            && let Some(mut outgoing) = state.outgoing.pop_front()
        {
            let size_bytes = outgoing.message.size_bytes();
            state.outgoing_bytes -= size_bytes;
            if let Some(sequence) = outgoing.sequence {
                state.taken = sequence + 1;
                if !state.withdrawn.is_empty() && state.withdrawn.remove(&sequence) {
                    continue;
                }
            }
            if let (Some(deadline), CallerMessage::Request(request)) =
                (outgoing.deadline, &mut outgoing.message)
            {
                let left = deadline.at.saturating_duration_since(Instant::now());
                // Up: what is left of a millisecond is not nothing.
                let left_ms = left.as_micros().div_ceil(1_000);
                request.timeout_ms = Some(u64::try_from(left_ms).unwrap_or(u64::MAX));
            }
            batch_bytes += size_bytes;
            state.owed += usize::from(matches!(outgoing.message, CallerMessage::Request(_)));
            batch.push(outgoing.message);
        }
        self.make_room(state);
        if batch.is_empty() {
            remember(&mut state.writer, context);
            return Poll::Pending;
        }
        Poll::Ready(true)
    }

    fn make_room(&self, state: &mut State) {
        if std::mem::take(&mut state.crowded) {
            self.room.notify_waiters();
        }
    }

    /// Takes up what the host sent.
    pub(crate) fn receive(&self, message: CalleeMessage) -> Result<(), ProtocolError> {
        let waker = {
            let mut state = self.state.lock();
            match message {
                CalleeMessage::Answer { call, result } => {
                    let waker = state.answer(call, result)?;
                    self.make_room(&mut state);
                    waker
                }
                CalleeMessage::Item {
                    call,
                    sequence,
                    value,
                } => state.item(call, sequence, value)?,
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Nothing more will come: whoever waits is told what is known.
    pub(crate) fn end(&self, reason: &str) {
        let mut wakers = Vec::new();
        {
            let mut state = self.state.lock();
            let state = &mut *state;
            if state.ended.is_some() {
                return;
            }
            state.ended = Some(reason.into());
            state.outgoing.clear();
            for slot in &mut state.slots {
                let Slot::Waiting(waiting) = slot else {
                    continue;
                };
                let executed = executed(waiting.sequence, state.taken);
                let error = unavailable(waiting.actor, reason, executed);
                wakers.extend(waiting.waker.take());
                *slot = Slot::Answered(waiting.items.take(), Err(error));
            }
            wakers.extend(state.writer.take());
        }
        self.room.notify_waiters();
        for waker in wakers {
            waker.wake();
        }
    }
}

/// What an end of the stream leaves unsaid about a call.
fn executed(sequence: u64, taken: u64) -> Executed {
    if sequence < taken {
        Executed::Unknown
    } else {
        Executed::No
    }
}

impl State {
    #[must_use]
    fn push(
        &mut self,
        sequence: Option<u64>,
        deadline: Option<Deadline>,
        message: CallerMessage,
    ) -> Option<Waker> {
        self.outgoing_bytes += message.size_bytes();
        self.outgoing.push_back(Outgoing {
            sequence,
            deadline,
            message,
        });
        self.writer.take()
    }

    fn vacate(&mut self, number: u32) {
        self.slots[number as usize] = Slot::Vacant;
        self.vacant.push(number);
    }

    fn answer(&mut self, call: u32, result: CallResult) -> Result<Option<Waker>, ProtocolError> {
        match self.slots.get_mut(call as usize) {
            Some(slot @ Slot::Waiting(_)) => {
                let Slot::Waiting(waiting) = std::mem::replace(slot, Slot::Vacant) else {
                    return Err(ProtocolError::NotAsked { call });
                };
                *slot = Slot::Answered(waiting.items, result);
                self.owed = self.owed.saturating_sub(1);
                Ok(waiting.waker)
            }
            Some(Slot::Abandoned) => {
                self.vacate(call);
                self.owed = self.owed.saturating_sub(1);
                Ok(None)
            }
            _ => Err(ProtocolError::NotAsked { call }),
        }
    }

    fn item(
        &mut self,
        call: u32,
        sequence: u64,
        value: Bytes,
    ) -> Result<Option<Waker>, ProtocolError> {
        let waiting = match self.slots.get_mut(call as usize) {
            Some(Slot::Waiting(waiting)) => waiting,
            // On its way when its caller gave up.
            Some(Slot::Abandoned) => return Ok(None),
            _ => return Err(ProtocolError::NotAsked { call }),
        };
        let Some(items) = &mut waiting.items else {
            return Err(ProtocolError::NoCredit { call });
        };
        if sequence != items.next_sequence {
            return Err(ProtocolError::OutOfOrder {
                call,
                sequence,
                expected: items.next_sequence,
            });
        }
        if items.received.len() + items.read as usize >= items.window as usize {
            return Err(ProtocolError::NoCredit { call });
        }
        items.next_sequence += 1;
        items.received.push_back(value);
        Ok(waiting.waker.take())
    }
}

#[cfg(test)]
mod tests {
    use mobula_core::id::Incarnation;
    use mobula_wire::call::CallRequest;

    use super::*;

    fn entered(stream: &Arc<HostStream>) -> SentCall {
        let request = CallRequest {
            call: 0,
            timeout_ms: None,
            actor: ActorId(1),
            incarnation: Incarnation(1),
            method: "any".into(),
            key: None,
            window: None,
            arguments: Bytes::new(),
        };
        let call = NewCall {
            request,
            deadline: None,
            order: CallOrder::Kept,
        };
        stream.try_enter(&mut Some(call)).unwrap().unwrap()
    }

    /// Has the writer take what waits.
    fn take(stream: &HostStream) {
        let mut context = Context::from_waker(Waker::noop());
        let _ = stream.poll_outgoing(&mut context, &mut Vec::new());
    }

    #[test]
    fn an_answer_is_owed_from_when_its_call_is_taken_until_it_comes() {
        let stream = Arc::new(HostStream::default());
        let answered = |call| {
            let result = Ok(Bytes::new());
            stream.receive(CalleeMessage::Answer { call, result })
        };
        let sent = entered(&stream);
        assert!(!stream.owes_answers());
        take(&stream);
        assert!(stream.owes_answers());
        answered(sent.number).unwrap();
        // Also while its caller has not taken it.
        assert!(!stream.owes_answers());
        drop(sent);

        // One that is given up is owed all the same,
        let sent = entered(&stream);
        take(&stream);
        let number = sent.number;
        drop(sent);
        assert!(stream.owes_answers());
        answered(number).unwrap();
        assert!(!stream.owes_answers());

        // but if it was not sent.
        drop(entered(&stream));
        take(&stream);
        assert!(!stream.owes_answers());
    }
}
