//! When a task is executed again, and how often.
//!
//! Invariant: what surely did not run is pushed again without counting; what may have run only as
//! often as its policy allows, over the whole life of its value.

use mobula_core::error::{CallError, Executed};

/// How often a task may be refused by a slot that ends just then, or is full, before something must
/// be wrong. Each refusal costs a slot, so this is reached by defects only.
const REFUSALS_MAX: u32 = 1000;

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

    /// Whether it was executed, where it is not with a slot: what was lost with one may have been.
    pub(crate) fn executed(&self) -> Executed {
        match self.executions {
            0 => Executed::No,
            _ => Executed::Unknown,
        }
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

    /// The same where the value that an execution has brought is lost: `None` if there may be no other
    /// execution.
    pub(crate) fn after_lost_value(mut self) -> Option<Tries> {
        self.executions += 1;
        self.refusals = 0;
        (self.executions <= self.policy.max_retries).then_some(self)
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
    fn executions_for_lost_values_count_with_the_others() {
        let tries = |max_retries| {
            Tries::new(RetryPolicy {
                max_retries,
                retry_errors: false,
            })
        };
        assert_eq!(tries(0).after_lost_value(), None);
        let mut first = tries(3);
        assert_eq!(
            first.judge(&unavailable(Executed::Unknown)),
            Verdict::Again,
            "the first was lost with its slot"
        );
        // The second and the third brought values that were lost.
        let third = first.after_lost_value().expect("two are left");
        assert_eq!(third.attempt(), 3);
        let mut fourth = third.after_lost_value().expect("one is left");
        assert_eq!(fourth.attempt(), 4);
        assert_eq!(fourth.after_lost_value(), None);
        let lost = unavailable(Executed::Unknown);
        assert_eq!(fourth.judge(&lost), Verdict::Final, "four were allowed");
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
