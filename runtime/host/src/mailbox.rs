//! The way into an actor: admission first, then a ractor mailbox.
//!
//! ractor's mailboxes are unbounded, so a semaphore of the actor's capacity stands in front of
//! each; its permit travels inside the message and is given back when the method begins.
//!
//! Invariants:
//! 1. At most `capacity` calls wait in front of an actor.
//! 2. Methods of one actor run one after another, in the order of admission; where its type asks
//!    for more, `concurrent` says which run together.
//! 3. A call that was cancelled while it waited is not executed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::{ActorId, Incarnation};
use mobula_wire::call::{CallKey, MethodName};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::actor::DynActor;
use crate::concurrent::ConcurrentRunner;
use crate::context::ActorContext;
use crate::method::Begun;
use crate::reply::Reply;
use crate::tasks::slot::SlotRunner;

/// When a call is over, answered or not.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    /// The moment.
    pub at: Instant,
    /// How long the caller gave it, in milliseconds; for the error's text.
    pub limit_ms: u64,
}

impl Deadline {
    pub(crate) fn error(&self, actor: ActorId, executed: Executed) -> CallError {
        CallError::DeadlineExceeded {
            actor: actor.to_string(),
            limit_ms: self.limit_ms,
            executed,
        }
    }
}

/// A call on its way to an actor's method.
pub struct IncomingCall {
    /// The method's name.
    pub method: MethodName,
    /// The encoded arguments.
    pub arguments: Bytes,
    /// Past this it is not begun any more.
    pub deadline: Option<Deadline>,
    /// By which a repetition is recognized, where the caller wants exactly one execution.
    pub key: Option<CallKey>,
    /// Where the answer goes.
    pub reply: Reply,
}

pub(crate) enum Envelope {
    Call {
        call: IncomingCall,
        permit: OwnedSemaphorePermit,
    },
    Notice {
        deadline_ms: u64,
    },
}

/// The answer that is due for the method that runs now: kept outside the actor's own task, so
/// that it can still be given when the method panics.
pub(crate) type InFlight = Arc<Mutex<Option<Reply>>>;

/// The way in front of one method after another.
pub(crate) struct SerialIntake {
    capacity: u32,
    permits: Arc<Semaphore>,
    pub(crate) in_flight: InFlight,
    pub(crate) notice_waits: AtomicBool,
}

impl SerialIntake {
    pub(crate) fn new(capacity: u32) -> Self {
        SerialIntake {
            capacity,
            permits: Arc::new(Semaphore::new(capacity as usize)),
            in_flight: InFlight::default(),
            notice_waits: AtomicBool::new(false),
        }
    }
}

/// Where a mailbox puts its calls.
#[derive(Clone)]
pub(crate) enum Intake {
    /// Into ractor's own queue.
    Serial(Arc<SerialIntake>),
    /// To tasks of their own.
    Concurrent(Arc<ConcurrentRunner>),
    /// To the thread of a slot.
    Slot(Arc<SlotRunner>),
}

/// One running incarnation of an actor, seen from outside.
pub struct Mailbox {
    pub(crate) actor: ActorId,
    pub(crate) incarnation: Incarnation,
    pub(crate) context: ActorContext,
    pub(crate) ractor: ractor::ActorRef<Envelope>,
    pub(crate) intake: Intake,
}

impl Mailbox {
    pub(crate) fn new(
        context: ActorContext,
        ractor: ractor::ActorRef<Envelope>,
        intake: Intake,
    ) -> Self {
        Mailbox {
            actor: context.actor(),
            incarnation: context.incarnation(),
            context,
            ractor,
            intake,
        }
    }

    /// Admits a call, or answers it with why not.
    pub fn admit(&self, call: IncomingCall) {
        let serial = match &self.intake {
            Intake::Serial(serial) => serial,
            Intake::Concurrent(runner) => return runner.admit(call),
            Intake::Slot(slot) => return slot.admit(call),
        };
        let Ok(permit) = Arc::clone(&serial.permits).try_acquire_owned() else {
            let error = overloaded(self.actor, serial.capacity);
            return call.reply.send(Err(error));
        };
        // An actor that has just ended gives the message back; dropping it answers the caller.
        drop(self.ractor.send_message(Envelope::Call { call, permit }));
    }

    /// Tells the actor about a notice. One waits at most: a later one only repeats it.
    pub(crate) fn notify(&self, deadline_ms: u64) {
        let waits = match &self.intake {
            Intake::Serial(serial) => &serial.notice_waits,
            Intake::Concurrent(runner) => &runner.notice_waits,
            // What runs may have its time; whoever has more finds another slot.
            Intake::Slot(slot) => return slot.shut("its node will be gone soon"),
        };
        if waits.swap(true, Ordering::AcqRel) {
            return;
        }
        match &self.intake {
            Intake::Serial(_) => {
                drop(self.ractor.send_message(Envelope::Notice { deadline_ms }));
            }
            Intake::Concurrent(runner) => runner.notify(deadline_ms),
            Intake::Slot(_) => {}
        }
    }

    /// Ends the actor at its next await.
    pub(crate) fn kill(&self) {
        match &self.intake {
            Intake::Serial(_) => {}
            Intake::Concurrent(runner) => runner.kill(),
            Intake::Slot(slot) => slot.kill(),
        }
        self.ractor.kill();
    }
}

/// The actor's mailbox is full.
pub(crate) fn overloaded(actor: ActorId, capacity: u32) -> CallError {
    CallError::Overloaded {
        actor: actor.to_string(),
        capacity,
    }
}

/// Runs one admitted call of an actor that runs one at a time.
pub(crate) async fn run_call(
    actor: &mut dyn DynActor,
    context: &ActorContext,
    in_flight: &InFlight,
    call: IncomingCall,
) {
    let Some((mut begun, reply)) = Begun::begin(context, call) else {
        return;
    };
    *in_flight.lock() = Some(reply);
    let result = begun.run(context, |call| actor.dispatch(call)).await;
    if let Some(reply) = in_flight.lock().take() {
        reply.send(result);
    }
}
