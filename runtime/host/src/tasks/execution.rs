//! What a slot's thread does: polls the tasks that were pushed into it.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use mobula_core::error::{CallError, Executed};
use mobula_wire::task::TaskHead;
use tokio::time::{Instant, Sleep};

use crate::actor::MethodError;
use crate::mailbox::{Deadline, IncomingCall};
use crate::reply::{CallResult, CancelLevel, Reply};
use crate::shell::{panic_text, shortened};
use crate::spans::{self, SpanGuard};
use crate::tasks::context::TaskContext;
use crate::tasks::outcome;
use crate::tasks::registry::TaskCall;
use crate::tasks::slot::{Activity, Shared};

/// The future that a slot's thread runs.
pub(crate) struct Drive {
    shared: Arc<Shared>,
    generation: u64,
    activity: Arc<Activity>,
    current: Option<Running>,
    /// Tasks that waited for an object at least once: each is polled when it is woken.
    aside: FuturesUnordered<Running>,
}

impl Drive {
    pub(crate) fn new(shared: Arc<Shared>, generation: u64) -> Self {
        Drive {
            shared,
            generation,
            activity: Arc::default(),
            current: None,
            aside: FuturesUnordered::new(),
        }
    }

    /// The next task, if one may begin.
    fn begin_next(&mut self) -> Option<Running> {
        if self.activity.is_busy() {
            return None;
        }
        loop {
            let mut calls = self.shared.calls.lock();
            // A thread that was left behind while it computed ends now; what waits is the other one's.
            if calls.is_over(self.generation) {
                return None;
            }
            let call = calls.waiting.pop_front()?;
            match Prepared::new(&self.shared, &self.activity, call) {
                Ok(Prepared { mut running, reply }) => {
                    running.number = calls.enter(reply, running.context.clone());
                    return Some(running);
                }
                Err((reply, error)) => {
                    drop(calls);
                    reply.send(Err(error));
                }
            }
        }
    }
}

impl Future for Drive {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        // Before anything is looked at, so that no push is missed in between.
        this.shared.waker.register(cx.waker());
        loop {
            if this.shared.is_over(this.generation) {
                return Poll::Ready(());
            }
            while let Poll::Ready(Some((number, result))) = this.aside.poll_next_unpin(cx) {
                this.shared.finish(number, result);
            }
            if let Some(current) = &mut this.current {
                match Pin::new(&mut *current).poll(cx) {
                    Poll::Ready((number, result)) => {
                        this.current = None;
                        this.shared.finish(number, result);
                    }
                    Poll::Pending if current.context.is_waiting() => {
                        this.aside.extend(this.current.take());
                        // Polled once more there, which registers its own waker.
                        continue;
                    }
                    Poll::Pending => return Poll::Pending,
                }
            }
            this.current = this.begin_next();
            if this.current.is_some() {
                continue;
            }
            if this.shared.is_over(this.generation) {
                return Poll::Ready(());
            }
            if this.aside.is_empty() && this.shared.is_closed() {
                return Poll::Ready(());
            }
            if !this.aside.is_empty() && !this.activity.is_busy() {
                this.shared.all_wait();
            }
            return Poll::Pending;
        }
    }
}

/// A task that is about to begin, and the answer that is due for it.
struct Prepared {
    running: Running,
    reply: Reply,
}

/// A task that has begun.
struct Running {
    number: u64,
    context: TaskContext,
    task: BoxFuture<'static, Result<Vec<u8>, MethodError>>,
    limit: Option<(Deadline, Pin<Box<Sleep>>)>,
    /// Made when the task first awaits.
    unwanted: Option<BoxFuture<'static, ()>>,
    /// After the future, whose end may be the end of its waiting.
    _counted: Counted,
    /// For the timeline: from here to where it is dropped.
    _span: SpanGuard,
}

/// One task's part in its thread's activity.
struct Counted {
    activity: Arc<Activity>,
    context: TaskContext,
}

impl Drop for Counted {
    fn drop(&mut self) {
        // One that waits is not counted; its futures are dropped before this.
        if !self.context.is_waiting() {
            self.activity.leave();
        }
    }
}

impl Prepared {
    fn new(
        shared: &Arc<Shared>,
        activity: &Arc<Activity>,
        call: IncomingCall,
    ) -> Result<Self, (Reply, CallError)> {
        let IncomingCall {
            method,
            arguments,
            deadline,
            reply,
            ..
        } = call;
        if let Some(deadline) = deadline.filter(|deadline| deadline.at <= Instant::now()) {
            let error = deadline.error(shared.context.actor(), Executed::No);
            return Err((reply, error));
        }
        let Some(run) = shared.tasks.get(&method) else {
            let known = shared.tasks.names().join(", ");
            let error = CallError::BadCall(format!(
                "this program has no task `{method}`; it has: {known}; was the job submitted with \
                 an older binary?"
            ));
            return Err((reply, error));
        };
        let (head, values, arguments) = match TaskHead::split(arguments) {
            Ok(parts) => parts,
            Err(error) => return Err((reply, CallError::BadCall(error.to_string()))),
        };
        if !reply.begin() {
            // It was cancelled while it waited, and is answered.
            let error = cancelled(shared.context.actor().to_string(), Executed::No);
            return Err((reply, error));
        }
        let context = TaskContext::new(
            method,
            head.attempt,
            shared.context.clone(),
            Arc::clone(&shared.resources),
            Arc::clone(activity),
            reply.cancellation(),
        );
        let slot = shared.context.incarnation();
        let span = spans::begin(context.name(), "task")
            .by(shared.context.actor(), slot)
            .with("attempt", head.attempt.to_string());
        activity.enter();
        let counted = Counted {
            activity: Arc::clone(activity),
            context: context.clone(),
        };
        let task = run(TaskCall {
            arguments,
            values,
            context: context.clone(),
            items: reply.items(),
        });
        let limit = deadline.map(|limit| (limit, Box::pin(tokio::time::sleep_until(limit.at))));
        let running = Running {
            number: 0,
            context,
            task,
            limit,
            unwanted: None,
            _counted: counted,
            _span: span,
        };
        Ok(Prepared { running, reply })
    }
}

fn cancelled(slot: String, executed: Executed) -> CallError {
    CallError::Cancelled {
        actor: slot,
        executed,
    }
}

impl Running {
    /// What it brought, unless its time was over by then: its caller has given it up, and would drop
    /// a large value without freeing it.
    fn in_time(&self, value: Vec<u8>) -> CallResult {
        let late = self.limit.as_ref().map(|(limit, _)| limit);
        let Some(late) = late.filter(|limit| limit.at <= Instant::now()) else {
            return Ok(value.into());
        };
        let slot = self.context.slot();
        outcome::discard(slot.runtime().objects(), &value);
        Err(late.error(slot.actor(), Executed::Yes))
    }

    /// Why the task is dropped where it awaits, once there is a reason.
    fn poll_limits(&mut self, cx: &mut Context<'_>) -> Poll<CallError> {
        let slot = self.context.slot().actor();
        if let Some((limit, sleep)) = &mut self.limit
            && sleep.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(limit.error(slot, Executed::Unknown));
        }
        let unwanted = self.unwanted.get_or_insert_with(|| {
            let cancellation = self.context.call().clone();
            Box::pin(async move { cancellation.reached(CancelLevel::Requested).await })
        });
        unwanted.as_mut().poll(cx).map(|()| {
            self.context.cancel_children();
            cancelled(slot.to_string(), Executed::Unknown)
        })
    }
}

impl Future for Running {
    type Output = (u64, CallResult);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(u64, CallResult)> {
        let this = &mut *self;
        let task = &mut this.task;
        let polled = this
            .context
            .enter(|| catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(cx))));
        let result = match polled {
            Ok(Poll::Ready(Ok(value))) => this.in_time(value),
            Ok(Poll::Ready(Err(error))) => Err(CallError::from(error)),
            Err(panic) => Err(CallError::Panicked(shortened(panic_text(panic.as_ref())))),
            Ok(Poll::Pending) => Err(ready!(this.poll_limits(cx))),
        };
        Poll::Ready((this.number, result))
    }
}
