//! Why something ended: one closed enum shared by supervisor, API and metrics.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a driver's process ends with when it has lost its agent: neither success nor an error of `main`.
pub const AGENT_LOST_EXIT_CODE: i32 = 113;

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
    /// Its host process used more memory than it may, and was ended for it.
    OutOfMemory {
        /// How much the process (with all that it started) may use, in bytes; 0 if the machine's
        /// own memory was the limit.
        limit_bytes: u64,
        /// The most that it was seen to use, in bytes; 0 if nobody knows.
        used_bytes: u64,
    },
    /// It could not go on because of something outside it: a driver, because what it asked did not answer; any
    /// actor, because somebody stopped its process and nobody continued it. Another start may.
    Unavailable(String),
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
            ExitReason::OutOfMemory { .. } => "out_of_memory",
            ExitReason::Unavailable(_) => "unavailable",
        }
    }

    /// Whether the end was wanted, so that no restart follows.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        matches!(self, ExitReason::Completed | ExitReason::Stopped)
    }

    /// Whether the program itself ended in an error: another start would most likely end alike.
    #[must_use]
    pub fn is_user_error(&self) -> bool {
        matches!(self, ExitReason::Failed(_))
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
            ExitReason::OutOfMemory {
                limit_bytes,
                used_bytes,
            } => {
                match limit_bytes {
                    0 => f.write_str("out of memory: the machine had none left")?,
                    limit => write!(f, "out of memory: limit {limit} bytes")?,
                }
                match used_bytes {
                    0 => Ok(()),
                    used => write!(f, ", used {used} bytes"),
                }
            }
            ExitReason::Unavailable(why) => write!(f, "could not go on: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_memory_says_what_is_known() {
        let text = |limit_bytes, used_bytes| {
            ExitReason::OutOfMemory {
                limit_bytes,
                used_bytes,
            }
            .to_string()
        };
        assert_eq!(text(64, 70), "out of memory: limit 64 bytes, used 70 bytes");
        assert_eq!(text(64, 0), "out of memory: limit 64 bytes");
        assert_eq!(text(0, 0), "out of memory: the machine had none left");
    }
}
