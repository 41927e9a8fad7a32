//! What a running method knows about the call that it answers: by when, and whether anyone still
//! wants it. Calls that it makes itself inherit both.
//!
//! Invariants:
//! 1. While a method is polled its scope is the current one; outside there is none. A task that a
//!    method spawns has none either, unless it is run [`CallScope::within`] one.
//! 2. A call made in a scope ends with it: it has no later deadline, and is cancelled when the
//!    scope's call is, as forcibly.

use std::time::Duration;

use tokio::time::Instant;

use crate::mailbox::Deadline;
use crate::reply::{CancelLevel, Cancellation};

tokio::task_local! {
    static CURRENT: CallScope;
}

/// The call that a method answers.
#[derive(Debug, Clone)]
pub struct CallScope {
    deadline: Option<Deadline>,
    cancellation: Cancellation,
}

impl CallScope {
    pub(crate) fn new(deadline: Option<Deadline>, cancellation: Cancellation) -> Self {
        CallScope {
            deadline,
            cancellation,
        }
    }

    /// The scope of the method that runs in this task; `None` outside of methods.
    #[must_use]
    pub fn current() -> Option<CallScope> {
        CURRENT.try_with(Clone::clone).ok()
    }

    /// By when the caller wants the answer.
    #[must_use]
    pub fn deadline(&self) -> Option<Deadline> {
        self.deadline
    }

    /// What is left of the caller's time; `None` if it waits without a limit.
    #[must_use]
    pub fn time_left(&self) -> Option<Duration> {
        let deadline = self.deadline?;
        Some(deadline.at.saturating_duration_since(Instant::now()))
    }

    /// Whether the caller wants the call no more: a method that looks may return early. Where the
    /// cancellation is forced, the method is dropped at its next await without being asked.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancellation.level() > CancelLevel::None
    }

    /// Waits until the caller wants the call no more.
    pub async fn cancelled(&self) {
        self.cancellation.reached(CancelLevel::Requested).await;
    }

    /// How much the caller wants the call to end.
    #[must_use]
    pub fn cancellation(&self) -> &Cancellation {
        &self.cancellation
    }

    /// Runs `future` as part of this call: for tasks that a method spawns.
    pub async fn within<F: Future>(self, future: F) -> F::Output {
        CURRENT.scope(self, future).await
    }
}
