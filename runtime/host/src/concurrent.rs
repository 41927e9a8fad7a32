//! An actor that runs several methods at once: each in a task of its own, begun by
//! [`Admission`]'s rules.
//!
//! Its ractor actor only starts and ends it, and so stays what supervision knows.
//!
//! Invariants:
//! 1. Nothing runs before the hook `started` is over, or while `on_stop` runs.
//! 2. A panic in one method ends the actor: the others are dropped at their next await, and their
//!    callers learn that nobody knows how far they came.
//! 3. Its end is reported when its last method has let go of it: a method that blocks its thread
//!    cannot be dropped before it awaits or returns.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::FutureExt;
use mobula_core::error::CallError;
use mobula_core::exit::ExitReason;
use parking_lot::Mutex;
use tokio::sync::{Notify, RwLock, RwLockWriteGuard};
use tokio_util::sync::CancellationToken;

use crate::actor::{Access, Concurrency, ConcurrentActor};
use crate::admission::Admission;
use crate::context::ActorContext;
use crate::mailbox::{IncomingCall, overloaded};
use crate::method::Begun;
use crate::shell::{panic_text, shortened};

enum Work {
    Call(IncomingCall),
    Notice { deadline_ms: u64 },
}

struct Calls {
    admission: Admission<Work>,
    /// Whether calls are still taken.
    open: bool,
}

/// A running concurrent actor.
pub(crate) struct ConcurrentRunner {
    /// Never waited for: admission lets nobody in who would have to.
    actor: RwLock<Box<dyn ConcurrentActor>>,
    access: fn(&str) -> Access,
    heeds_notices: bool,
    context: ActorContext,
    calls: Mutex<Calls>,
    capacity: u32,
    pub(crate) notice_waits: AtomicBool,
    /// Told when the last running method is over.
    idle: Notify,
    killed: CancellationToken,
}

impl ConcurrentRunner {
    /// Takes calls from now on, and begins them after [`ConcurrentRunner::started`].
    pub(crate) fn new(
        actor: Box<dyn ConcurrentActor>,
        concurrency: Concurrency,
        context: ActorContext,
        capacity: u32,
    ) -> Arc<Self> {
        let mut admission = Admission::new(concurrency.limits);
        admission.hold();
        Arc::new(ConcurrentRunner {
            actor: RwLock::new(actor),
            access: concurrency.access,
            heeds_notices: concurrency.heeds_notices,
            context,
            calls: Mutex::new(Calls {
                admission,
                open: true,
            }),
            capacity,
            notice_waits: AtomicBool::new(false),
            idle: Notify::new(),
            killed: CancellationToken::new(),
        })
    }

    /// Runs the hook, then lets the calls begin.
    pub(crate) async fn started(self: &Arc<Self>) {
        let held = Held(self);
        self.write().started(&self.context).await;
        drop(held);
    }

    /// Takes a call, or answers it with why not.
    pub(crate) fn admit(self: &Arc<Self>, call: IncomingCall) {
        let mut calls = self.calls.lock();
        if !calls.open {
            // Dropping the call answers it.
            return;
        }
        if calls.admission.waiting() >= self.capacity as usize {
            drop(calls);
            let error = overloaded(self.context.actor(), self.capacity);
            return call.reply.send(Err(error));
        }
        let access = (self.access)(&call.method);
        calls.admission.push(access, Work::Call(call));
        self.begin_all(&mut calls);
    }

    /// Runs the actor's hook for a notice in its turn, if it has one.
    pub(crate) fn notify(self: &Arc<Self>, deadline_ms: u64) {
        if !self.heeds_notices {
            return;
        }
        let mut calls = self.calls.lock();
        if calls.open {
            calls
                .admission
                .push(Access::Exclusive, Work::Notice { deadline_ms });
            self.begin_all(&mut calls);
        }
    }

    fn begin_all(self: &Arc<Self>, calls: &mut Calls) {
        while let Some((access, work)) = calls.admission.begin_next() {
            let runner = Arc::clone(self);
            // Ends with its method, or by `killed`; `ended` waits for it.
            tokio::spawn(async move {
                runner.run(access, work).await;
                runner.finished(access);
            });
        }
    }

    fn finished(self: &Arc<Self>, access: Access) {
        let mut calls = self.calls.lock();
        calls.admission.finished(access);
        self.begin_all(&mut calls);
        if calls.admission.is_idle() {
            self.idle.notify_waiters();
        }
    }

    async fn run(&self, access: Access, work: Work) {
        let panicked = match work {
            Work::Call(call) => self.run_one(access, call).await,
            Work::Notice { deadline_ms } => {
                self.notice_waits.store(false, Ordering::Release);
                let mut actor = self.write();
                let hook = actor.on_notice(deadline_ms, &self.context);
                self.unless_killed(hook).await.and_then(Result::err)
            }
        };
        if let Some(panic) = panicked {
            self.context.end(ExitReason::Panicked(panic));
            self.kill();
        }
    }

    /// Runs one method; answers what it said if it panicked.
    async fn run_one(&self, access: Access, call: IncomingCall) -> Option<String> {
        let (mut begun, reply) = Begun::begin(&self.context, call)?;
        let outcome = match access {
            Access::Exclusive => {
                let mut actor = self.write();
                let running = begun.run(&self.context, |call| actor.dispatch(call));
                self.unless_killed(running).await
            }
            Access::Shared { .. } => {
                let actor = self
                    .actor
                    .try_read()
                    .expect("nothing exclusive runs beside");
                let running = begun.run(&self.context, |call| actor.dispatch_shared(call));
                self.unless_killed(running).await
            }
        };
        match outcome {
            Some(Ok(result)) => {
                reply.send(result);
                None
            }
            Some(Err(panic)) => {
                reply.send(Err(CallError::Panicked(panic.clone())));
                Some(panic)
            }
            // Dropping the answer says that the method was under way.
            None => None,
        }
    }

    fn write(&self) -> RwLockWriteGuard<'_, Box<dyn ConcurrentActor>> {
        self.actor
            .try_write()
            .expect("an exclusive method runs alone")
    }

    /// Runs to the end, to a panic (its text is the error), or until the actor is killed.
    async fn unless_killed<F: Future>(&self, future: F) -> Option<Result<F::Output, String>> {
        let caught = AssertUnwindSafe(future).catch_unwind();
        tokio::select! {
            biased;
            () = self.killed.cancelled() => None,
            outcome = caught => Some(outcome.map_err(|panic| shortened(panic_text(panic.as_ref())))),
        }
    }

    /// No call begins any more; those that wait are answered, those that run are waited for.
    pub(crate) async fn close(&self) {
        self.shut();
        self.idle().await;
    }

    fn shut(&self) {
        let waiting = {
            let mut calls = self.calls.lock();
            calls.open = false;
            calls.admission.drain()
        };
        // Dropping a call answers it, which needs no lock.
        drop(waiting);
    }

    /// Runs the hook of a wanted end.
    pub(crate) async fn stopped(&self) {
        self.close().await;
        self.write().on_stop(&self.context).await;
    }

    /// Drops what runs at its next await, and what waits at once.
    pub(crate) fn kill(&self) {
        self.shut();
        self.killed.cancel();
    }

    /// Waits until nothing runs.
    async fn idle(&self) {
        loop {
            let change = self.idle.notified();
            tokio::pin!(change);
            // Registered before the look, so that no end is missed in between.
            change.as_mut().enable();
            if self.calls.lock().admission.is_idle() {
                return;
            }
            change.await;
        }
    }
}

/// Lets the calls begin when the hook is over; if that ended by a panic or a kill, none ever does.
struct Held<'a>(&'a Arc<ConcurrentRunner>);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.shut();
        }
        self.0.finished(Access::Exclusive);
    }
}
