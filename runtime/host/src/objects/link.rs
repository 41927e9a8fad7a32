//! What a holder tells one owner, and hears from it: two calls that run side by side as long as
//! something is borrowed. One says what changed; the other asks what settled, and waits.
//!
//! Invariants:
//! 1. Changes are sent in the order in which they were made, and again until they arrived.
//! 2. Everything pending settles as an error as soon as the owner is known to have ended: its
//!    node's agent says so, nobody listens at its address any more, or another process does; and
//!    when it cannot be reached for [`OWNER_GONE_AFTER`] without that being known.
//! 3. The agent of an owner's node calls processes of other jobs gone. So its word counts at once only
//!    about an owner that has answered; one that has not is asked, and may say that it refuses.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mobula_core::codec;
use mobula_core::error::CallError;
use mobula_core::id::{Incarnation, NodeId};
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_core::order::ActorAddress;
use mobula_net::probe::nobody_listens;
use mobula_wire::object::{
    CHANGES_MAX, Change, Changes, METHOD_CHANGE, METHOD_NEXT, Next, OBJECTS_ACTOR, Settled,
};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::cell::{Cell, Outcome, Value};
use super::handle::Object;
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

/// Why a link ends before it is idle.
#[derive(Debug, Clone)]
pub(crate) enum Ending {
    /// The owner has ended, for sure.
    Died(String),
    /// It does not answer, or not as it should.
    Lost(String),
    /// It does not let this process read what it owns.
    Refused(String),
}

/// The way to one owner.
pub(crate) struct Link {
    owner: ProcessId,
    address: String,
    /// The agent of its node; empty where there is none.
    agent: String,
    state: Mutex<State>,
    /// There are changes to send.
    changed: Notify,
    /// Something is borrowed again.
    borrowing: Notify,
    /// It has ended.
    ended: Notify,
}

#[derive(Default)]
struct State {
    borrowed: HashMap<u64, Borrowed>,
    /// Bounded by what this process holds and sends: two entries for each handle at most, and one
    /// for each reference that it sent within the last call.
    queue: Vec<Queued>,
    /// Why nothing goes out any more.
    ending: Option<Ending>,
    /// The owner has answered.
    is_answered: bool,
    /// The agent of its node calls it gone.
    is_said_gone: bool,
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
    pub(crate) fn new(owner: ProcessId, address: String, agent: String) -> Arc<Self> {
        Arc::new(Link {
            owner,
            address,
            agent,
            state: Mutex::default(),
            changed: Notify::new(),
            borrowing: Notify::new(),
            ended: Notify::new(),
        })
    }

    pub(crate) fn owner(&self) -> ProcessId {
        self.owner
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn agent(&self) -> &str {
        &self.agent
    }

    /// Takes in a reference; `None` if the link has ended.
    pub(crate) fn borrow(
        &self,
        sequence: u64,
        transit: u64,
        hold: Option<Object>,
    ) -> Option<Arc<Cell>> {
        let mut state = self.state.lock();
        if state.ending.is_some() {
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
    pub(crate) fn missing(&self, sequence: u64, cell: &Cell, seen: &Outcome) {
        let mut state = self.state.lock();
        if let Some(ending) = &state.ending {
            // Nobody is left who could know of another place.
            let lost = self.lost(sequence, ending);
            drop(state);
            cell.replace(seen, Err(lost));
            return;
        }
        // What is in no node's memory is never missing.
        if let Ok(Value::Stored(stored)) = seen
            && let Some(borrowed) = state.borrowed.get(&sequence)
            && borrowed.cell.reset(seen)
        {
            let stored = stored.object;
            self.push(&mut state, Change::Missing { sequence, stored });
        }
    }

    fn push(&self, state: &mut State, change: Change) {
        if state.ending.is_none() {
            state.queue.push(Queued {
                change,
                _hold: None,
            });
            self.changed.notify_one();
        }
    }

    /// Ends the link; what is pending is lost.
    pub(crate) fn end(&self, ending: &Ending) {
        let (borrowed, queue) = {
            let mut state = self.state.lock();
            state.ending.get_or_insert_with(|| ending.clone());
            (
                std::mem::take(&mut state.borrowed),
                std::mem::take(&mut state.queue),
            )
        };
        for (sequence, borrowed) in borrowed {
            borrowed.cell.settle(Err(self.lost(sequence, ending)));
        }
        drop(queue);
        self.ended.notify_waiters();
    }

    /// The agent of the owner's node says that it is gone. Ends the link and answers true where that is
    /// certain.
    pub(crate) fn said_gone(&self) -> bool {
        let is_certain = {
            let mut state = self.state.lock();
            state.is_said_gone = true;
            state.is_answered
        };
        if is_certain {
            self.end(&seen_to_end());
        }
        is_certain
    }

    /// Waits until the owner is known to have ended, or to be out of reach; what that means for one
    /// of its objects.
    pub(crate) async fn ended(&self, sequence: u64) -> ObjectError {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // Registered before the look, so that no end is missed in between.
            ended.as_mut().enable();
            if let Some(ending) = &self.state.lock().ending {
                return self.lost(sequence, ending);
            }
            ended.await;
        }
    }

    fn lost(&self, sequence: u64, ending: &Ending) -> ObjectError {
        let object = ObjectId {
            owner: self.owner,
            sequence,
        };
        match ending.clone() {
            Ending::Died(reason) => ObjectError::OwnerDied { object, reason },
            Ending::Lost(reason) => ObjectError::Lost { object, reason },
            Ending::Refused(reason) => ObjectError::NotPermitted { object, reason },
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
            state.ending = Some(Ending::Lost("nothing is borrowed any more".to_owned()));
        }
        is_idle
    }

    /// Works until the owner is gone or nothing is borrowed any more; answers why it ended, or
    /// `None` when it is idle.
    pub(crate) async fn run(&self, own: ProcessId, calls: &CallClient) -> Option<Ending> {
        tokio::select! {
            ending = self.send_changes(own, calls) => ending,
            ending = self.ask_next(own, calls) => Some(ending),
        }
    }

    async fn send_changes(&self, own: ProcessId, calls: &CallClient) -> Option<Ending> {
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
            if let Err(ending) = self.until_reached(call).await {
                return Some(ending);
            }
        }
    }

    async fn ask_next(&self, own: ProcessId, calls: &CallClient) -> Ending {
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
            let answer = match self.until_reached(call).await {
                Ok(answer) => answer,
                Err(ending) => return ending,
            };
            match codec::decode::<Settled>(&answer, answer.len()) {
                Ok(settled) => {
                    seen = settled.number;
                    self.settle(settled);
                }
                Err(error) => {
                    return Ending::Lost(format!("its owner's answer cannot be read: {error}"));
                }
            }
        }
    }

    fn settle(&self, settled: Settled) {
        for (sequence, value) in settled.objects {
            let outcome = value.map(Value::from);
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

    /// Calls until there is an answer, or the owner has been out of reach for too long. Changes and
    /// questions may be repeated without harm.
    async fn until_reached<F, Fut>(&self, call: F) -> Result<Bytes, Ending>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = CallResult>,
    {
        let began = Instant::now();
        loop {
            let error = match call().await {
                Ok(answer) => {
                    self.state.lock().is_answered = true;
                    return Ok(answer);
                }
                Err(error @ CallError::ActorUnavailable { .. }) => {
                    if self.is_closed().await {
                        let reason = format!("nobody listens at {} any more", self.address);
                        return Err(Ending::Died(reason));
                    }
                    error
                }
                Err(error @ CallError::DeadlineExceeded { .. }) => error,
                Err(error @ CallError::ActorDied { .. }) => {
                    return Err(Ending::Died(error.to_string()));
                }
                Err(CallError::NotPermitted(reason)) => return Err(Ending::Refused(reason)),
                Err(error) => return Err(Ending::Lost(error.to_string())),
            };
            if self.state.lock().is_said_gone {
                return Err(seen_to_end());
            }
            if began.elapsed() > OWNER_GONE_AFTER {
                return Err(Ending::Lost(format!("its owner is out of reach: {error}")));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Whether the owner's machine says that nobody listens at its address. Asked only after a
    /// connection has failed, so that a forged answer of the network alone ends nothing.
    async fn is_closed(&self) -> bool {
        match self.address.parse::<SocketAddr>() {
            Ok(address) => nobody_listens(address).await,
            Err(_) => false,
        }
    }
}

fn seen_to_end() -> Ending {
    Ending::Died("the agent of its node saw it end".to_owned())
}
