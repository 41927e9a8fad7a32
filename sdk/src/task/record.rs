//! One submitted task: what is pushed for it, and what its value's object comes to.
//!
//! Invariants:
//! 1. A record completes its object exactly once, also when it is dropped.
//! 2. What was cancelled, is late, or is read by nobody is not executed again.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mobula_core::error::CallError;
use mobula_core::object::{ObjectError, ObjectId};
use mobula_host::mailbox::Deadline;
use mobula_host::objects::{Completer, Lineage, Object, bring};
use mobula_host::reply::VALUE_BYTES_MAX;
use mobula_host::spans;
use mobula_host::tasks::complete_with_outcome;
use mobula_wire::control as api;
use mobula_wire::task::TaskHead;
use tokio::time::Instant;

use super::items::ItemSink;
use super::tries::{RetryPolicy, Tries};
use crate::reference::error_of_end;

/// Values that travel with one task: a few of the largest that are kept in processes at all. More
/// would be in the way of the tasks behind it.
const BROUGHT_BYTES_MAX: usize = 256 * 1024;

/// A shorter wait is no lost time to look for, and recording it would cost more than it took.
const WAIT_SHOWN_MIN: Duration = Duration::from_millis(1);

/// What the wire says about a value beside its bytes, at most: where a stored one is.
const ABOUT_VALUE_BYTES: usize = 256;

/// What a task's error calls it.
pub(crate) fn title(name: &str) -> String {
    format!("task `{name}`")
}

/// An error of a call to a slot, as one of the task.
fn about_task(name: &str, error: CallError, slot_end: Option<&api::Actor>) -> CallError {
    let actor = title(name);
    match error {
        CallError::ActorUnavailable {
            reason, executed, ..
        }
        | CallError::ActorDied {
            reason, executed, ..
        } => match slot_end.filter(|slot| slot.exit_code.is_some()) {
            Some(slot) => error_of_end(actor, slot, executed),
            None => CallError::ActorDied {
                actor,
                reason,
                executed,
            },
        },
        CallError::DeadlineExceeded {
            limit_ms, executed, ..
        } => CallError::DeadlineExceeded {
            actor,
            limit_ms,
            executed,
        },
        CallError::Overloaded { capacity, .. } => CallError::Overloaded { actor, capacity },
        CallError::Cancelled { executed, .. } => CallError::Cancelled { actor, executed },
        CallError::OutOfMemory {
            reason, executed, ..
        } => CallError::OutOfMemory {
            what: actor,
            reason,
            executed,
        },
        CallError::NodeLost { node, executed, .. } => CallError::NodeLost {
            actor,
            node,
            executed,
        },
        other => other,
    }
}

/// What is needed to execute a task: kept as long as it may have to be executed again.
pub(crate) struct TaskDescription {
    pub(crate) name: &'static str,
    /// Head and arguments of the first execution, without values.
    payload: Bytes,
    pub(crate) policy: RetryPolicy,
    /// What the arguments refer to, so that it is there for every execution.
    references: Vec<Object>,
}

impl TaskDescription {
    pub(crate) fn new(
        name: &'static str,
        arguments: &[u8],
        policy: RetryPolicy,
        references: Vec<Object>,
    ) -> Self {
        TaskDescription {
            name,
            payload: TaskHead { attempt: 1 }.join(&[], arguments).into(),
            policy,
            references,
        }
    }

    fn payload(&self, attempt: u32) -> Bytes {
        let limit_bytes = BROUGHT_BYTES_MAX.min(VALUE_BYTES_MAX.saturating_sub(
            // What encoding adds to each value.
            self.payload.len() + ABOUT_VALUE_BYTES * self.references.len(),
        ));
        let values = bring(&self.references, limit_bytes);
        if attempt == 1 && values.is_empty() {
            return self.payload.clone();
        }
        let (_, _, arguments) = TaskHead::split(self.payload.clone())
            .expect("the payload was made with a head in front");
        TaskHead { attempt }.join(&values, &arguments).into()
    }
}

/// A submitted task.
pub(crate) struct TaskRecord {
    pub(crate) task: Arc<TaskDescription>,
    pub(crate) deadline: Option<Deadline>,
    pub(crate) tries: Tries,
    /// Where its values go, if it brings several; away while it is under way.
    pub(super) items: Option<ItemSink>,
    /// It was cancelled while it was under way.
    pub(super) is_cancelled: bool,
    result: Completer,
    /// Since when it waits, for what it needs or for a slot.
    waits_since: Instant,
}

impl TaskRecord {
    pub(crate) fn new(
        task: Arc<TaskDescription>,
        deadline: Option<Deadline>,
        result: Completer,
        items: Option<ItemSink>,
    ) -> Self {
        TaskRecord {
            deadline,
            items,
            is_cancelled: false,
            tries: Tries::new(task.policy),
            result,
            task,
            waits_since: Instant::now(),
        }
    }

    /// The same task once more, for its value that is lost. Its time limit was for the first value.
    pub(crate) fn for_lost_value(
        task: Arc<TaskDescription>,
        tries: Tries,
        result: Completer,
    ) -> Self {
        TaskRecord {
            tries,
            ..TaskRecord::new(task, None, result, None)
        }
    }

    /// It begins to wait for something else.
    pub(super) fn wait(&mut self) {
        self.waits_since = Instant::now();
    }

    /// It has waited for `what` until `now`: the job's timeline shows that, if it took long.
    pub(super) fn waited_for(&self, what: &str, now: Instant) {
        let waited = now.duration_since(self.waits_since);
        if waited >= WAIT_SHOWN_MIN {
            drop(
                spans::begin_ago(self.name(), "queue", waited)
                    .with("for", what)
                    .with("attempt", self.tries.attempt().to_string()),
            );
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.task.name
    }

    /// Whether it is to be executed, or executed again.
    pub(crate) fn is_wanted(&self, now: Instant) -> bool {
        !self.is_cancelled && !self.is_late(now) && !self.is_unread()
    }

    fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline.at <= now)
    }

    /// Whether it brings several values, and nobody reads them any more.
    fn is_unread(&self) -> bool {
        self.items.as_ref().is_some_and(ItemSink::is_closed)
    }

    /// The object that its value becomes.
    pub(crate) fn object(&self) -> ObjectId {
        self.result.id()
    }

    /// What is pushed for the execution that is due.
    pub(crate) fn payload(&self) -> Bytes {
        self.task.payload(self.tries.attempt())
    }

    /// An execution brought a value.
    pub(crate) fn complete(
        self,
        outcome: Bytes,
        lineage: impl FnOnce(Arc<TaskDescription>, Tries) -> Arc<dyn Lineage>,
    ) {
        let (task, tries) = (self.task, self.tries);
        let again = Arc::clone(&task);
        let completed = complete_with_outcome(self.result, outcome, || lineage(again, tries));
        if let Err((result, reason)) = completed {
            let error = format!("value of {}: {reason}", title(task.name));
            result.fail(ObjectError::Failed(CallError::ResultLost(error)));
        }
    }

    /// What it needs has no value, and so it has none.
    pub(crate) fn fail_with(self, error: ObjectError) {
        self.result.fail(error);
    }

    /// It is not wanted any more, and so it is not executed again.
    pub(crate) fn fail_unwanted(self, now: Instant) {
        match self.deadline {
            Some(deadline) if !self.is_cancelled && deadline.at <= now => self.fail_late(deadline),
            _ => self.fail_cancelled(),
        }
    }

    /// It was cancelled before it was pushed, or pushed again.
    pub(crate) fn fail_cancelled(self) {
        let error = CallError::Cancelled {
            actor: String::new(),
            executed: self.tries.executed(),
        };
        self.fail(error, None);
    }

    /// Its time ran out before it was pushed, or pushed again.
    pub(crate) fn fail_late(self, deadline: Deadline) {
        let error = CallError::DeadlineExceeded {
            actor: String::new(),
            limit_ms: deadline.limit_ms,
            executed: self.tries.executed(),
        };
        self.fail(error, None);
    }

    /// It has no value. `slot_end` is what its slot ended as, where that is known.
    pub(crate) fn fail(self, error: CallError, slot_end: Option<&api::Actor>) {
        let mut error = about_task(self.task.name, error, slot_end);
        // Its slot knows only what was left of it when the task came there.
        if let (CallError::DeadlineExceeded { limit_ms, .. }, Some(deadline)) =
            (&mut error, self.deadline)
        {
            *limit_ms = deadline.limit_ms;
        }
        self.result.fail(ObjectError::Failed(error));
    }
}
