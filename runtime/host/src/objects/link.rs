//! What a holder tells one owner, and hears from it: two calls that run side by side as long as
//! something is borrowed. One says what changed; the other asks what settled, and waits.
//!
//! Invariants:
//! 1. Changes are sent in the order in which they were made, and again until they arrived.
//! 2. When the owner cannot be reached for [`OWNER_GONE_AFTER`], or another process answers at its
//!    address, everything pending settles as lost.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mobula_core::codec;
use mobula_core::error::CallError;
use mobula_core::id::{Incarnation, NodeId};
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_core::order::ActorAddress;
use mobula_wire::object::{
    CHANGES_MAX, Change, Changes, METHOD_CHANGE, METHOD_NEXT, Next, OBJECTS_ACTOR, Settled,
    WireValue,
};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::cell::{Cell, Outcome, Value};
use super::handle::Object;
use super::payload::Payload;
use super::table::NEXT_WAIT;
use crate::client::{CallClient, OutgoingCall};
use crate::mailbox::Deadline;
use crate::reply::CallResult;

/// How long an owner may stay out of reach before what it owns counts as lost: longer than a
/// connection takes to be found dead and made anew, far shorter than its side waits for us.
pub(crate) const OWNER_GONE_AFTER: Duration = Duration::from_secs(15);

/// How long a change may take to be answered.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// A link that carries nothing is ended after this.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// The way to one owner.
pub(crate) struct Link {
    owner: ProcessId,
    address: String,
    state: Mutex<State>,
    /// There are changes to send.
    changed: Notify,
    /// Something is borrowed again.
    borrowing: Notify,
}

#[derive(Default)]
struct State {
    borrowed: HashMap<u64, Borrowed>,
    /// Bounded by what this process holds and sends: two entries for each handle at most, and one
    /// for each reference that it sent within the last call.
    queue: Vec<Queued>,
    /// Why nothing goes out any more.
    ended: Option<String>,
}

struct Borrowed {
    cell: Arc<Cell>,
    handles: usize,
}

struct Queued {
    change: Change,
    /// Lives until the change has arrived.
    _hold: Option<Object>,
}

impl Link {
    pub(crate) fn new(owner: ProcessId, address: String) -> Arc<Self> {
        Arc::new(Link {
            owner,
            address,
            state: Mutex::default(),
            changed: Notify::new(),
            borrowing: Notify::new(),
        })
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Takes in a reference; `None` if the link has ended.
    pub(crate) fn borrow(
        &self,
        sequence: u64,
        transit: u64,
        hold: Option<Object>,
    ) -> Option<Arc<Cell>> {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return None;
        }
        let borrowed = state.borrowed.entry(sequence).or_insert_with(|| Borrowed {
            cell: Arc::default(),
            handles: 0,
        });
        borrowed.handles += 1;
        let is_new = borrowed.handles == 1;
        let cell = Arc::clone(&borrowed.cell);
        if is_new || transit != 0 {
            state.queue.push(Queued {
                change: Change::Borrow { sequence, transit },
                _hold: hold,
            });
            self.changed.notify_one();
        }
        drop(state);
        if is_new {
            self.borrowing.notify_one();
        }
        Some(cell)
    }

    pub(crate) fn release(&self, sequence: u64) {
        let mut state = self.state.lock();
        let Some(borrowed) = state.borrowed.get_mut(&sequence) else {
            return;
        };
        borrowed.handles -= 1;
        if borrowed.handles == 0 {
            state.borrowed.remove(&sequence);
            self.push(&mut state, Change::Release { sequence });
        }
    }

    pub(crate) fn transit(&self, sequence: u64, transit: u64) {
        self.push(
            &mut self.state.lock(),
            Change::Transit { sequence, transit },
        );
    }

    /// The bytes are not where the owner said: asks it for another place.
    pub(crate) fn missing(&self, sequence: u64, seen: &Outcome) {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return;
        }
        if let Some(borrowed) = state.borrowed.get(&sequence)
            && borrowed.cell.reset(seen)
        {
            self.push(&mut state, Change::Missing { sequence });
        }
    }

    fn push(&self, state: &mut State, change: Change) {
        if state.ended.is_none() {
            state.queue.push(Queued {
                change,
                _hold: None,
            });
            self.changed.notify_one();
        }
    }

    /// Ends the link; what is pending is lost.
    pub(crate) fn end(&self, reason: &str) {
        let (borrowed, queue) = {
            let mut state = self.state.lock();
            state.ended.get_or_insert_with(|| reason.to_owned());
            (
                std::mem::take(&mut state.borrowed),
                std::mem::take(&mut state.queue),
            )
        };
        for (sequence, borrowed) in borrowed {
            borrowed.cell.settle(Err(self.lost(sequence, reason)));
        }
        drop(queue);
    }

    fn lost(&self, sequence: u64, reason: &str) -> ObjectError {
        ObjectError::Lost {
            object: ObjectId {
                owner: self.owner,
                sequence,
            },
            reason: reason.to_owned(),
        }
    }

    fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.borrowed.is_empty() && state.queue.is_empty()
    }

    /// Ends the link if it carries nothing.
    pub(crate) fn end_if_idle(&self) -> bool {
        let mut state = self.state.lock();
        let is_idle = state.borrowed.is_empty() && state.queue.is_empty();
        if is_idle {
            state.ended.get_or_insert_with(|| "idle".to_owned());
        }
        is_idle
    }

    /// Works until the owner is gone or nothing is borrowed any more; answers why it ended, or
    /// `None` when it is idle.
    pub(crate) async fn run(&self, own: ProcessId, calls: &CallClient) -> Option<String> {
        tokio::select! {
            reason = self.send_changes(own, calls) => reason,
            reason = self.ask_next(own, calls) => Some(reason),
        }
    }

    async fn send_changes(&self, own: ProcessId, calls: &CallClient) -> Option<String> {
        loop {
            let batch: Vec<Queued> = {
                let mut state = self.state.lock();
                let count = state.queue.len().min(CHANGES_MAX);
                state.queue.drain(..count).collect()
            };
            if batch.is_empty() {
                let changed = self.changed.notified();
                if tokio::time::timeout(IDLE_MAX, changed).await.is_err() && self.is_idle() {
                    return None;
                }
                continue;
            }
            let message: Bytes = codec::encode_plain(&Changes {
                holder: own,
                owner: self.owner,
                changes: batch.iter().map(|queued| queued.change).collect(),
            })
            .into();
            let call = || self.call(calls, METHOD_CHANGE, message.clone(), CHANGE_TIMEOUT);
            if let Err(reason) = until_reached(call).await {
                return Some(reason);
            }
        }
    }

    async fn ask_next(&self, own: ProcessId, calls: &CallClient) -> String {
        let mut seen = 0;
        loop {
            if self.state.lock().borrowed.is_empty() {
                self.borrowing.notified().await;
                continue;
            }
            let message: Bytes = codec::encode_plain(&Next {
                holder: own,
                owner: self.owner,
                seen,
            })
            .into();
            // The owner answers when there is nothing to say too; later than that it is stuck.
            let timeout = NEXT_WAIT + CHANGE_TIMEOUT;
            let call = || self.call(calls, METHOD_NEXT, message.clone(), timeout);
            let answer = match until_reached(call).await {
                Ok(answer) => answer,
                Err(reason) => return reason,
            };
            match codec::decode::<Settled>(&answer, answer.len()) {
                Ok(settled) => {
                    seen = settled.number;
                    self.settle(settled);
                }
                Err(error) => return format!("its owner's answer cannot be read: {error}"),
            }
        }
    }

    fn settle(&self, settled: Settled) {
        for (sequence, value) in settled.objects {
            let outcome = value.map(|value| match value {
                WireValue::Inline { format, bytes } => Value::Inline(Payload {
                    format,
                    bytes: bytes.into(),
                }),
                WireValue::Stored(stored) => Value::Stored(stored),
            });
            let cell = {
                let state = self.state.lock();
                state
                    .borrowed
                    .get(&sequence)
                    .map(|borrowed| Arc::clone(&borrowed.cell))
            };
            if let Some(cell) = cell {
                cell.settle(outcome);
            }
        }
    }

    async fn call(
        &self,
        calls: &CallClient,
        method: &'static str,
        arguments: Bytes,
        timeout: Duration,
    ) -> CallResult {
        let target = ActorAddress {
            actor: OBJECTS_ACTOR,
            incarnation: Incarnation(0),
            node: NodeId(0),
            call_address: self.address.clone(),
        };
        let deadline = Deadline {
            at: Instant::now() + timeout,
            limit_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        };
        let call = OutgoingCall::new(method, arguments).with_deadline(Some(deadline));
        calls.call(&target, call).await
    }
}

/// Calls until there is an answer, or the owner has been out of reach for too long. Changes and
/// questions may be repeated without harm.
async fn until_reached<F, Fut>(call: F) -> Result<Bytes, String>
where
    F: Fn() -> Fut,
    Fut: Future<Output = CallResult>,
{
    let began = Instant::now();
    loop {
        match call().await {
            Ok(answer) => return Ok(answer),
            Err(
                error @ (CallError::ActorUnavailable { .. } | CallError::DeadlineExceeded { .. }),
            ) => {
                if began.elapsed() > OWNER_GONE_AFTER {
                    return Err(format!("its owner is out of reach: {error}"));
                }
            }
            Err(error) => return Err(error.to_string()),
        }
        tokio::time::sleep(PAUSE).await;
    }
}
