//! What a task knows about itself, and how it says that it only waits.
//!
//! Invariants:
//! 1. While a task is polled it is the thread's *current* one; nothing else ever is.
//! 2. A task counts as waiting exactly while one of its [`while_blocked`] futures is pending.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;

use mobula_core::id::JobId;
use mobula_core::resource::Resources;
use mobula_wire::call::MethodName;
use tokio_util::sync::CancellationToken;

use crate::context::ActorContext;
use crate::reply::{CancelLevel, Cancellation};
use crate::tasks::slot::Activity;

/// What a task knows about itself. Clones are the same.
#[derive(Clone)]
pub struct TaskContext(Arc<Inner>);

struct Inner {
    name: MethodName,
    attempt: u32,
    slot: ActorContext,
    resources: Arc<Resources>,
    activity: Arc<Activity>,
    children: OnceLock<Arc<dyn TaskChildren>>,
    /// How many of its futures wait for objects.
    waits: AtomicU32,
    call: Cancellation,
}

impl TaskContext {
    pub(crate) fn new(
        name: MethodName,
        attempt: u32,
        slot: ActorContext,
        resources: Arc<Resources>,
        activity: Arc<Activity>,
        call: Cancellation,
    ) -> Self {
        TaskContext(Arc::new(Inner {
            name,
            attempt,
            slot,
            resources,
            activity,
            children: OnceLock::new(),
            waits: AtomicU32::new(0),
            call,
        }))
    }

    /// The task that this thread runs at this moment. A task that was spawned onto the runtime
    /// runs elsewhere, and has none.
    #[must_use]
    pub fn current() -> Option<TaskContext> {
        CURRENT.with_borrow(Clone::clone)
    }

    /// The task's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Which execution this is, from 1: larger when an earlier one was lost or failed.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.0.attempt
    }

    /// The slot it runs in, and through that the node, the job and the process.
    #[must_use]
    pub fn slot(&self) -> &ActorContext {
        &self.0.slot
    }

    /// What its slot has.
    #[must_use]
    pub fn resources(&self) -> &Resources {
        &self.0.resources
    }

    /// The tasks that it has submitted, as a higher layer keeps them; made at first use.
    pub fn children(&self, make: impl FnOnce() -> Arc<dyn TaskChildren>) -> &Arc<dyn TaskChildren> {
        self.0.children.get_or_init(make)
    }

    /// It was cancelled, and with it what it has submitted.
    pub(crate) fn cancel_children(&self) {
        if let Some(children) = self.0.children.get() {
            children.cancel(self.0.call.level() == CancelLevel::Forced);
        }
    }

    /// Its job.
    #[must_use]
    pub fn job(&self) -> JobId {
        self.0.slot.job()
    }

    /// The name of the node it runs on.
    #[must_use]
    pub fn node_name(&self) -> &str {
        self.0.slot.node_name()
    }

    /// Whether nobody wants the result any more. A task that awaits is dropped there; one that
    /// computes looks here now and then.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.call.level() > CancelLevel::None
    }

    /// Becomes cancelled with the task.
    #[must_use]
    pub fn cancellation(&self) -> CancellationToken {
        self.0.call.token()
    }

    /// What its caller says about ending it.
    pub(crate) fn call(&self) -> &Cancellation {
        &self.0.call
    }

    /// Whether it only waits.
    pub(crate) fn is_waiting(&self) -> bool {
        self.0.waits.load(Ordering::Acquire) > 0
    }

    /// Makes it the thread's current task for as long as `work` runs.
    pub(crate) fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        struct Restore(Option<TaskContext>);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(self.0.take());
            }
        }
        let _restore = Restore(CURRENT.replace(Some(self.clone())));
        work()
    }
}

thread_local! {
    static CURRENT: RefCell<Option<TaskContext>> = const { RefCell::new(None) };
}

/// The tasks that a task has submitted.
pub trait TaskChildren: Any + Send + Sync {
    /// Cancels them.
    fn cancel(&self, forced: bool);
}

impl fmt::Debug for TaskContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskContext")
            .field("name", &self.0.name)
            .field("attempt", &self.0.attempt)
            .field("slot", &self.0.slot)
            .finish_non_exhaustive()
    }
}

/// While this lives, its task waits.
struct Waiting(TaskContext);

impl Waiting {
    fn begin(task: TaskContext) -> Self {
        if task.0.waits.fetch_add(1, Ordering::AcqRel) == 0 {
            task.0.activity.leave();
        }
        Waiting(task)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.0.0.waits.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.0.activity.enter();
        }
    }
}

/// Waits for `future` without keeping the slot of the task that waits: another task runs in it
/// meanwhile. Outside a task it only waits.
pub async fn while_blocked<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut waiting = None;
    poll_fn(move |cx| {
        let outcome = future.as_mut().poll(cx);
        match &outcome {
            Poll::Ready(_) => waiting = None,
            Poll::Pending if waiting.is_none() => {
                waiting = TaskContext::current().map(Waiting::begin);
            }
            Poll::Pending => {}
        }
        outcome
    })
    .await
}
