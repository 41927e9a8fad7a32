//! Errors that travel: a rejected command, a failed call. Each says whether the operation took
//! effect, because *unknown* is not *failed*.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whether an operation that ended in an error took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Executed {
    /// It did.
    Yes,
    /// It did not, and will not: trying again cannot do it twice.
    No,
    /// Nobody can tell from here. Try again only with the same key, or if twice is harmless.
    Unknown,
}

impl fmt::Display for Executed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Executed::Yes => "executed",
            Executed::No => "not executed",
            Executed::Unknown => "execution unknown",
        })
    }
}

/// The kinds of refusal, one list for the wire, the API and the metrics. Numbers are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u16)]
pub enum ErrorCode {
    /// The request itself is wrong; repeating it cannot help.
    InvalidArgument = 1,
    /// What it names does not exist.
    NotFound = 2,
    /// What it would create exists already, and differs.
    AlreadyExists = 3,
    /// The state does not allow it now.
    FailedPrecondition = 4,
    /// A stale incarnation, term or session: someone newer has taken over.
    Fenced = 5,
    /// Who asks may not do this.
    PermissionDenied = 6,
    /// Who asks is not known: no token, or a wrong or expired one.
    Unauthenticated = 7,
    /// A bound is reached; trying again later can help.
    Overloaded = 8,
    /// No leader, or no connection; trying again can help.
    Unavailable = 9,
    /// The deadline passed first.
    DeadlineExceeded = 10,
    /// A defect of ours.
    Internal = 11,
    /// The exactly-once session is not known any more; open another one.
    SessionExpired = 12,
}

impl ErrorCode {
    /// All of them, in the order of their numbers.
    pub const ALL: [ErrorCode; 12] = [
        ErrorCode::InvalidArgument,
        ErrorCode::NotFound,
        ErrorCode::AlreadyExists,
        ErrorCode::FailedPrecondition,
        ErrorCode::Fenced,
        ErrorCode::PermissionDenied,
        ErrorCode::Unauthenticated,
        ErrorCode::Overloaded,
        ErrorCode::Unavailable,
        ErrorCode::DeadlineExceeded,
        ErrorCode::Internal,
        ErrorCode::SessionExpired,
    ];

    /// A short stable word for JSON and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorCode::InvalidArgument => "invalid_argument",
            ErrorCode::NotFound => "not_found",
            ErrorCode::AlreadyExists => "already_exists",
            ErrorCode::FailedPrecondition => "failed_precondition",
            ErrorCode::Fenced => "fenced",
            ErrorCode::PermissionDenied => "permission_denied",
            ErrorCode::Unauthenticated => "unauthenticated",
            ErrorCode::Overloaded => "overloaded",
            ErrorCode::Unavailable => "unavailable",
            ErrorCode::DeadlineExceeded => "deadline_exceeded",
            ErrorCode::Internal => "internal",
            ErrorCode::SessionExpired => "session_expired",
        }
    }
}

/// A replicated module's refusal of a command or query: deterministic, and without any effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Rejection {
    /// Which kind of refusal.
    pub code: ErrorCode,
    /// What was refused, why, the limit, and the next step.
    pub message: String,
}

impl Rejection {
    /// A refusal of kind `code`.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Rejection {
            code,
            message: message.into(),
        }
    }

    /// The request itself is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Rejection::new(ErrorCode::InvalidArgument, message)
    }

    /// What the request names does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Rejection::new(ErrorCode::NotFound, message)
    }

    /// A newer incarnation has taken over.
    pub fn fenced(message: impl Into<String>) -> Self {
        Rejection::new(ErrorCode::Fenced, message)
    }
}

/// Why a call to an actor brought no value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CallError {
    /// The method itself returned an error: these are its bytes, and its text.
    #[error("{message}")]
    User {
        /// The encoded error value.
        payload: Vec<u8>,
        /// How the error prints.
        message: String,
    },
    /// The method panicked; the actor is gone or restarting.
    #[error("the method panicked: {0}")]
    Panicked(String),
    /// The actor has ended for good.
    #[error("{actor} has ended: {reason} ({executed})")]
    ActorDied {
        /// The actor's id or name.
        actor: String,
        /// Why it ended.
        reason: String,
        /// Whether the call took effect.
        executed: Executed,
    },
    /// The actor cannot be reached now: restarting, or the connection is lost.
    #[error("{actor} is unavailable: {reason} ({executed})")]
    ActorUnavailable {
        /// The actor's id or name.
        actor: String,
        /// What stands in the way.
        reason: String,
        /// Whether the call took effect.
        executed: Executed,
    },
    /// The actor's mailbox is full.
    #[error(
        "{actor} is overloaded: {capacity} calls are waiting, which is its limit; call again later"
    )]
    Overloaded {
        /// The actor's id or name.
        actor: String,
        /// The mailbox's capacity, in calls.
        capacity: u32,
    },
    /// The deadline passed before an answer came.
    #[error("no answer from {actor} within {limit_ms} ms ({executed})")]
    DeadlineExceeded {
        /// The actor's id or name.
        actor: String,
        /// The deadline that was given, in milliseconds.
        limit_ms: u64,
        /// Whether the call took effect.
        executed: Executed,
    },
    /// The method or its arguments are not what the actor understands.
    #[error("bad call: {0}")]
    BadCall(String),
    /// The method ran, but its value cannot be delivered.
    #[error("the method ran, but its result is lost: {0}")]
    ResultLost(String),
    /// The caller, or whoever it called for, cancelled the call.
    #[error("the call to {actor} was cancelled ({executed})")]
    Cancelled {
        /// The actor's id or name.
        actor: String,
        /// Whether the call took effect: *no* where it had not begun.
        executed: Executed,
    },
    /// An object that the call needs, or that holds its result, exists nowhere any more.
    #[error("{object} is lost: {reason} ({executed})")]
    ObjectLost {
        /// The object's id.
        object: String,
        /// How it was lost, and why it was not made again.
        reason: String,
        /// Whether the call took effect.
        executed: Executed,
    },
    /// The actor's process went over its memory limit and was ended, or a value does not fit into
    /// the node's shared memory.
    #[error("{what} ran out of memory: {reason} ({executed})")]
    OutOfMemory {
        /// Who: an actor, a task or an object store.
        what: String,
        /// The limit, what was used, and what to do.
        reason: String,
        /// Whether the call took effect.
        executed: Executed,
    },
    /// The actor's node is gone with everything on it.
    #[error("{actor} was lost with {node} ({executed})")]
    NodeLost {
        /// The actor's id or name.
        actor: String,
        /// The node's id or name.
        node: String,
        /// Whether the call took effect.
        executed: Executed,
    },
    /// The answer to an `exactly_once` call is not kept any more.
    #[error(
        "{actor} keeps no answer to call {key} any more: it cannot tell whether it executed it; \
         look at the actor's state"
    )]
    Forgotten {
        /// The actor's id or name.
        actor: String,
        /// The call's key.
        key: String,
    },
    /// The caller may not call this actor: the two belong to different jobs.
    #[error("not permitted: {0}")]
    NotPermitted(String),
}

impl CallError {
    /// The same as the end of a call of which nobody knows whether an earlier attempt took effect.
    #[must_use]
    pub fn after_unknown(mut self) -> CallError {
        match &mut self {
            CallError::ActorDied { executed, .. }
            | CallError::ActorUnavailable { executed, .. }
            | CallError::DeadlineExceeded { executed, .. }
            | CallError::Cancelled { executed, .. }
            | CallError::ObjectLost { executed, .. }
            | CallError::OutOfMemory { executed, .. }
            | CallError::NodeLost { executed, .. }
                if *executed == Executed::No =>
            {
                *executed = Executed::Unknown;
            }
            CallError::Overloaded { actor, .. } => {
                return CallError::ActorUnavailable {
                    actor: std::mem::take(actor),
                    reason: "it was lost with the call, and takes no more calls now".to_owned(),
                    executed: Executed::Unknown,
                };
            }
            // What a start of it answered, or what another attempt would be refused for too.
            _ => {}
        }
        self
    }

    /// Whether the call took effect.
    #[must_use]
    pub fn executed(&self) -> Executed {
        match self {
            CallError::User { .. } | CallError::ResultLost(_) => Executed::Yes,
            CallError::Panicked(_) | CallError::Forgotten { .. } => Executed::Unknown,
            CallError::ActorDied { executed, .. }
            | CallError::ActorUnavailable { executed, .. }
            | CallError::DeadlineExceeded { executed, .. }
            | CallError::Cancelled { executed, .. }
            | CallError::ObjectLost { executed, .. }
            | CallError::OutOfMemory { executed, .. }
            | CallError::NodeLost { executed, .. } => *executed,
            CallError::Overloaded { .. } | CallError::BadCall(_) | CallError::NotPermitted(_) => {
                Executed::No
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_survive_the_wire() {
        let error = CallError::ActorUnavailable {
            actor: "actor-3".into(),
            reason: "connection lost".into(),
            executed: Executed::Unknown,
        };
        let bytes = crate::codec::encode_plain(&error);
        assert_eq!(
            crate::codec::decode::<CallError>(&bytes, 1024).unwrap(),
            error
        );
    }
}
