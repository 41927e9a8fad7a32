//! Why something ended: one closed enum shared by supervisor, API and metrics.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why an actor (or a driver) ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// It finished its work, or stopped itself.
    Completed,
    /// It was asked to stop, by a user or at the end of its job.
    Stopped,
    /// Its code returned an error.
    Failed(String),
    /// Its code panicked.
    Panicked(String),
    /// Its host process ended with this exit code.
    HostExited(i32),
    /// Its host process was ended by this signal.
    HostSignaled(i32),
    /// It could not be started at all: the program is missing, or does not know its type.
    StartFailed(String),
    /// Its node was lost: the lease ran out, or the agent came back without it.
    NodeLost,
    /// It left a node that was about to go, as asked.
    Preempted,
}

impl ExitReason {
    /// A short stable word for metrics and JSON.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            ExitReason::Completed => "completed",
            ExitReason::Stopped => "stopped",
            ExitReason::Failed(_) => "failed",
            ExitReason::Panicked(_) => "panicked",
            ExitReason::HostExited(_) => "host_exited",
            ExitReason::HostSignaled(_) => "host_signaled",
            ExitReason::StartFailed(_) => "start_failed",
            ExitReason::NodeLost => "node_lost",
            ExitReason::Preempted => "preempted",
        }
    }

    /// Whether the end was wanted, so that no restart follows.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        matches!(self, ExitReason::Completed | ExitReason::Stopped)
    }

    /// Whether a restart counts against the actor's budget. What the infrastructure took away
    /// does not: a job on spot machines would otherwise die of its surroundings.
    #[must_use]
    pub fn counts_against_budget(&self) -> bool {
        !matches!(self, ExitReason::NodeLost | ExitReason::Preempted)
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::Completed => f.write_str("completed"),
            ExitReason::Stopped => f.write_str("stopped on request"),
            ExitReason::Failed(why) => write!(f, "failed: {why}"),
            ExitReason::Panicked(why) => write!(f, "panicked: {why}"),
            ExitReason::HostExited(code) => write!(f, "host process exited with code {code}"),
            ExitReason::HostSignaled(signal) => {
                write!(f, "host process was ended by signal {signal}")
            }
            ExitReason::StartFailed(why) => write!(f, "could not be started: {why}"),
            ExitReason::NodeLost => f.write_str("node lost"),
            ExitReason::Preempted => f.write_str("preempted"),
        }
    }
}
