//! One submitted task, and what follows from the answer to an execution of it.
//!
//! Invariants:
//! 1. A record completes its object exactly once, also when it is dropped.
//! 2. What surely did not run is pushed again without counting; what may have run only as often as
//!    its policy allows.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
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
use crate::reference::error_of_end;

/// How often a task may be refused by a slot that ends just then, or is full, before something must
/// be wrong. Each refusal costs a slot, so this is reached by defects only.
const REFUSALS_MAX: u32 = 1000;

/// Values that travel with one task: a few of the largest that are kept in processes at all. More
/// would be in the way of the tasks behind it.
const BROUGHT_BYTES_MAX: usize = 256 * 1024;

/// A shorter wait is no lost time to look for, and recording it would cost more than it took.
const WAIT_SHOWN_MIN: Duration = Duration::from_millis(1);

/// What the wire says about a value beside its bytes, at most: where a stored one is.
const ABOUT_VALUE_BYTES: usize = 256;

/// When a task is executed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RetryPolicy {
    /// How often at most.
    pub(crate) max_retries: u32,
    /// Whether its own errors and panics are a reason too.
    pub(crate) retry_errors: bool,
}

/// What follows from an answer that is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is pushed again.
    Again,
    /// The error is the task's result.
    Final,
}

/// Where a task stands with its retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tries {
    pub(crate) policy: RetryPolicy,
    /// Executions that have begun or may have.
    executions: u32,
    refusals: u32,
}

impl Tries {
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        Tries {
            policy,
            executions: 0,
            refusals: 0,
        }
    }

    /// The number of the execution that is due, from 1.
    pub(crate) fn attempt(&self) -> u32 {
        self.executions + 1
    }

    /// Judges what an execution brought, and counts it.
    pub(crate) fn judge(&mut self, error: &CallError) -> Verdict {
        let may_run_again = match error {
            CallError::ActorUnavailable { executed, .. }
            | CallError::ActorDied { executed, .. }
            | CallError::OutOfMemory { executed, .. }
            | CallError::NodeLost { executed, .. } => match executed {
                Executed::No => return self.refused(),
                Executed::Yes | Executed::Unknown => true,
            },
            CallError::Overloaded { .. } => return self.refused(),
            CallError::User { .. } | CallError::Panicked(_) => self.policy.retry_errors,
            // Nobody wants it any more, or another execution would end in the same way.
            CallError::Cancelled { .. }
            | CallError::DeadlineExceeded { .. }
            | CallError::BadCall(_)
            | CallError::ResultLost(_)
            | CallError::ObjectLost { .. }
            | CallError::Forgotten { .. }
            | CallError::NotPermitted(_) => false,
        };
        self.executions += 1;
        if may_run_again && self.executions <= self.policy.max_retries {
            Verdict::Again
        } else {
            Verdict::Final
        }
    }

    fn refused(&mut self) -> Verdict {
        self.refusals += 1;
        if self.refusals <= REFUSALS_MAX {
            Verdict::Again
        } else {
            Verdict::Final
        }
    }
}

/// Whether an error says that the slot itself is of no more use. Where only a value found no memory
/// the slot goes on; a process that has ended for want of it says so at the next push.
pub(crate) fn ends_slot(error: &CallError) -> bool {
    match error {
        CallError::ActorUnavailable { .. }
        | CallError::ActorDied { .. }
        | CallError::NodeLost { .. } => true,
        CallError::OutOfMemory { executed, .. } => *executed == Executed::No,
        _ => false,
    }
}

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
            tries: Tries::new(task.policy),
            result,
            task,
            waits_since: Instant::now(),
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

    /// Whether it brings several values, and nobody reads them any more.
    pub(crate) fn is_unread(&self) -> bool {
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
        lineage: impl FnOnce(Arc<TaskDescription>) -> Option<Arc<dyn Lineage>>,
    ) {
        let task = self.task;
        let again = Arc::clone(&task);
        let completed = complete_with_outcome(self.result, outcome, || lineage(again));
        if let Err((result, reason)) = completed {
            let error = format!("value of {}: {reason}", title(task.name));
            result.fail(ObjectError::Failed(CallError::ResultLost(error)));
        }
    }

    /// What it needs has no value, and so it has none.
    pub(crate) fn fail_with(self, error: ObjectError) {
        self.result.fail(error);
    }

    /// Whether it was executed, where it is not with a slot: one that was lost with its slot may have been.
    fn executed(&self) -> Executed {
        match self.tries.executions {
            0 => Executed::No,
            _ => Executed::Unknown,
        }
    }

    /// It was cancelled before it was pushed, or pushed again.
    pub(crate) fn fail_cancelled(self) {
        let error = CallError::Cancelled {
            actor: String::new(),
            executed: self.executed(),
        };
        self.fail(error, None);
    }

    /// Its time ran out before it was pushed, or pushed again.
    pub(crate) fn fail_late(self, deadline: Deadline) {
        let error = CallError::DeadlineExceeded {
            actor: String::new(),
            limit_ms: deadline.limit_ms,
            executed: self.executed(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable(executed: Executed) -> CallError {
        CallError::ActorUnavailable {
            actor: "actor-1".into(),
            reason: "gone".into(),
            executed,
        }
    }

    fn user() -> CallError {
        CallError::User {
            payload: Vec::new(),
            message: "no".into(),
        }
    }

    fn verdicts(max_retries: u32, retry_errors: bool, errors: &[CallError]) -> Vec<Verdict> {
        let mut tries = Tries::new(RetryPolicy {
            max_retries,
            retry_errors,
        });
        errors.iter().map(|error| tries.judge(error)).collect()
    }

    #[test]
    fn what_the_cluster_is_to_blame_for_is_a_reason_and_what_the_caller_wants_is_none() {
        use Verdict::{Again, Final};
        let executed = Executed::Unknown;
        let no_memory = |executed| CallError::OutOfMemory {
            what: "host-1".into(),
            reason: "1 GiB is its limit".into(),
            executed,
        };
        let no_node = CallError::NodeLost {
            actor: "actor-1".into(),
            node: "node-1".into(),
            executed,
        };
        assert_eq!(
            verdicts(
                2,
                false,
                &[no_memory(executed), no_node, no_memory(executed)]
            ),
            [Again, Again, Final]
        );
        assert_eq!(verdicts(0, false, &[no_memory(Executed::No)]), [Again]);
        let cancelled = CallError::Cancelled {
            actor: "actor-1".into(),
            executed,
        };
        let late = CallError::DeadlineExceeded {
            actor: "actor-1".into(),
            limit_ms: 1,
            executed,
        };
        for wanted in [cancelled, late] {
            assert_eq!(verdicts(3, true, &[wanted]), [Final]);
        }
    }

    #[test]
    fn what_may_have_run_is_counted() {
        use Verdict::{Again, Final};
        let lost = || unavailable(Executed::Unknown);
        assert_eq!(verdicts(0, false, &[lost()]), [Final]);
        assert_eq!(
            verdicts(2, false, &[lost(), lost(), lost()]),
            [Again, Again, Final]
        );
    }

    #[test]
    fn what_surely_did_not_run_is_not() {
        let refused = unavailable(Executed::No);
        let mut tries = Tries::new(RetryPolicy {
            max_retries: 0,
            retry_errors: false,
        });
        for _ in 0..REFUSALS_MAX {
            assert_eq!(tries.judge(&refused), Verdict::Again);
        }
        assert_eq!(tries.attempt(), 1);
        assert_eq!(tries.judge(&refused), Verdict::Final, "but not for ever");
    }

    #[test]
    fn own_errors_are_final_unless_said_otherwise() {
        use Verdict::{Again, Final};
        let panicked = || CallError::Panicked("oh".into());
        assert_eq!(verdicts(3, false, &[user()]), [Final]);
        assert_eq!(verdicts(3, false, &[panicked()]), [Final]);
        assert_eq!(
            verdicts(2, true, &[user(), panicked(), user()]),
            [Again, Again, Final]
        );
        let bad = CallError::BadCall("no such task".into());
        assert_eq!(verdicts(3, true, &[bad]), [Final]);
    }
}
