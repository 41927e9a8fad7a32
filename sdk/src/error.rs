//! What can go wrong, and whether it took effect all the same.

use std::fmt;

use mobula_core::codec;
use mobula_core::error::{CallError, ErrorCode, Executed};
use mobula_core::kept::KeptError;
use mobula_core::object::ObjectError;
use mobula_host::StateError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What most functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation brought no value. It can be sent, so that an actor's method may return it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Error {
    /// A call to an actor failed.
    #[error(transparent)]
    Call(CallError),
    /// The head refused a request, or could not be reached.
    #[error("{}{message}{}", lead(operation), tail(*executed))]
    Control {
        /// What was asked for.
        operation: String,
        /// Which kind of refusal.
        code: ErrorCode,
        /// What was refused, why, the limit, and the next step.
        message: String,
        /// Whether it took effect.
        executed: Executed,
    },
    /// A value cannot be encoded or decoded.
    #[error("{what}: {reason}")]
    Encoding {
        /// Which value.
        what: String,
        /// What is wrong with it.
        reason: String,
        /// Whether the call that it belongs to took effect.
        executed: Executed,
    },
    /// The process has no cluster, or not the part in it that the operation needs.
    #[error("{0}")]
    NotInCluster(String),
    /// A cluster cannot be found, started or joined.
    #[error("{what}: {reason}")]
    Setup {
        /// Which step.
        what: String,
        /// What stands in the way, and what to do.
        reason: String,
    },
    /// An error of the user's own code, as text.
    #[error("{0}")]
    User(String),
    /// An object has no value here.
    #[error(transparent)]
    Object(ObjectError),
    /// A value was not kept, or what was kept cannot be read.
    #[error(transparent)]
    Kept(KeptError),
}

/// What was asked for, where that says more than the refusal itself.
fn lead(operation: &str) -> String {
    if operation.is_empty() {
        String::new()
    } else {
        format!("{operation}: ")
    }
}

/// Whether it took effect, where that is not what everyone expects of an error.
fn tail(executed: Executed) -> String {
    match executed {
        Executed::No => String::new(),
        Executed::Yes | Executed::Unknown => format!(" ({executed})"),
    }
}

impl Error {
    /// Whether the same may succeed later, with nothing changed but the cluster's condition. A driver
    /// that ends with such an error is started again as its restart policy says, and also with one that
    /// says what was lost with a node or process: its next start makes that anew.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self.code() {
            Some(code) => matches!(
                code,
                ErrorCode::Unavailable | ErrorCode::Overloaded | ErrorCode::DeadlineExceeded
            ),
            None => matches!(
                self,
                Error::Call(CallError::ActorUnavailable { .. } | CallError::Overloaded { .. })
                    | Error::Kept(KeptError::NotStored { .. } | KeptError::OutOfReach { .. })
            ),
        }
    }

    /// Whether the actor that was called has ended for good, in whatever way: it takes no call any more,
    /// and only a new one of its kind will.
    #[must_use]
    pub fn actor_has_ended(&self) -> bool {
        match self {
            Error::Call(CallError::ActorDied { .. } | CallError::NodeLost { .. }) => true,
            // Otherwise it is the method's value that found no room; the actor goes on.
            Error::Call(CallError::OutOfMemory { executed, .. }) => *executed == Executed::No,
            _ => false,
        }
    }

    /// Whether the operation took effect.
    #[must_use]
    pub fn executed(&self) -> Executed {
        match self {
            Error::Call(error) => error.executed(),
            Error::Control { executed, .. } | Error::Encoding { executed, .. } => *executed,
            Error::NotInCluster(_) | Error::Setup { .. } => Executed::No,
            Error::User(_) => Executed::Yes,
            Error::Object(error) => error.executed(),
            Error::Kept(_) => Executed::No,
        }
    }

    /// The head's kind of refusal, if it was the head.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Error::Control { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// The error that the user's own method or task returned, if it is one and of this type.
    #[must_use]
    pub fn user_error<E: DeserializeOwned>(&self) -> Option<E> {
        match self {
            Error::Call(CallError::User { payload, .. }) => {
                codec::decode(payload, payload.len()).ok()
            }
            _ => None,
        }
    }

    /// The same as the end of something of which nobody knows whether an earlier attempt took effect.
    pub(crate) fn after_unknown(self) -> Self {
        match self {
            Error::Call(error) => Error::Call(error.after_unknown()),
            Error::Control {
                operation,
                code,
                message,
                executed: Executed::No,
            } => Error::Control {
                operation,
                code,
                message,
                executed: Executed::Unknown,
            },
            other => other,
        }
    }

    pub(crate) fn setup(what: impl Into<String>, reason: impl fmt::Display) -> Self {
        Error::Setup {
            what: what.into(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn encoding(
        what: impl Into<String>,
        reason: impl fmt::Display,
        executed: Executed,
    ) -> Self {
        Error::Encoding {
            what: what.into(),
            reason: reason.to_string(),
            executed,
        }
    }
}

impl From<CallError> for Error {
    fn from(error: CallError) -> Self {
        Error::Call(error)
    }
}

impl From<StateError> for Error {
    fn from(error: StateError) -> Self {
        Error::User(error.to_string())
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Error::User(error.to_string())
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Error::User(error.to_string())
    }
}

impl From<std::num::ParseIntError> for Error {
    fn from(error: std::num::ParseIntError) -> Self {
        Error::User(error.to_string())
    }
}

impl From<String> for Error {
    fn from(text: String) -> Self {
        Error::User(text)
    }
}

impl From<&str> for Error {
    fn from(text: &str) -> Self {
        Error::User(text.to_owned())
    }
}

/// Why a call to a method that returns `Result<T, E>` brought no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallFailure<E> {
    /// The method ran, and returned this.
    User(E),
    /// Something else went wrong; it says whether the method ran.
    System(Error),
}

impl<E> CallFailure<E> {
    /// Whether the method took effect.
    #[must_use]
    pub fn executed(&self) -> Executed {
        match self {
            CallFailure::User(_) => Executed::Yes,
            CallFailure::System(error) => error.executed(),
        }
    }

    /// The user's error, if it is one.
    pub fn user(self) -> Option<E> {
        match self {
            CallFailure::User(error) => Some(error),
            CallFailure::System(_) => None,
        }
    }
}

impl<E: fmt::Display> fmt::Display for CallFailure<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallFailure::User(error) => error.fmt(f),
            CallFailure::System(error) => error.fmt(f),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> std::error::Error for CallFailure<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            CallFailure::User(_) => None,
            CallFailure::System(error) => Some(error),
        }
    }
}

impl<E: fmt::Display> From<CallFailure<E>> for Error {
    fn from(failure: CallFailure<E>) -> Self {
        match failure {
            CallFailure::User(error) => Error::User(error.to_string()),
            CallFailure::System(error) => error,
        }
    }
}
