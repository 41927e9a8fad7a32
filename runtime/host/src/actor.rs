//! What an actor is to its host: something that takes a method's name and encoded arguments.
//!
//! `#[mobula::actor]` writes the implementation; nothing keeps a program from writing its own.

use futures::future::BoxFuture;
use mobula_core::error::CallError;

use crate::context::ActorContext;

/// Why a method brought no value. A panic is not one of these: supervision sees it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MethodError {
    /// The method ran and returned an error of the user's own.
    #[error("{message}")]
    User {
        /// The encoded error value.
        payload: Vec<u8>,
        /// How the error prints.
        message: String,
    },
    /// There is no such method, or its arguments do not decode; nothing ran.
    #[error("bad call: {0}")]
    BadCall(String),
    /// The method ran, but its value cannot be encoded.
    #[error("the method ran, but its result is lost: {0}")]
    ResultLost(String),
}

impl From<MethodError> for CallError {
    fn from(error: MethodError) -> Self {
        match error {
            MethodError::User { payload, message } => CallError::User { payload, message },
            MethodError::BadCall(reason) => CallError::BadCall(reason),
            MethodError::ResultLost(reason) => CallError::ResultLost(reason),
        }
    }
}

/// An actor whose type its host does not know.
pub trait DynActor: Send + 'static {
    /// Runs one method to its end.
    fn dispatch<'a>(
        &'a mut self,
        method: &'a str,
        arguments: &'a [u8],
        context: &'a ActorContext,
    ) -> BoxFuture<'a, Result<Vec<u8>, MethodError>>;

    /// Runs once, before the first call.
    fn started<'a>(&'a mut self, _context: &'a ActorContext) -> BoxFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }

    /// The node will be gone at `deadline_ms` (milliseconds since the Unix epoch). Runs between
    /// calls; a method that takes long looks at [`ActorContext::notice`] itself.
    fn on_notice<'a>(
        &'a mut self,
        _deadline_ms: u64,
        _context: &'a ActorContext,
    ) -> BoxFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }

    /// The actor is being stopped, and has the rest of its grace to tidy up. Does not run after a
    /// panic or a kill.
    fn on_stop<'a>(&'a mut self, _context: &'a ActorContext) -> BoxFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }
}
