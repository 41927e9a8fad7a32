//! What an actor is to its host: something that takes a method's name and encoded arguments.
//!
//! `#[mobula::actor]` writes the implementation; nothing keeps a program from writing its own.

use futures::future::BoxFuture;
use mobula_core::error::{CallError, Executed};

use crate::context::ActorContext;
use crate::reply::ItemSender;

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
    /// The method ran, but nowhere is room for its value.
    #[error("{what} ran out of memory: {reason}")]
    OutOfMemory {
        /// Whose value.
        what: String,
        /// What is full, and what to do.
        reason: String,
    },
}

impl From<MethodError> for CallError {
    fn from(error: MethodError) -> Self {
        match error {
            MethodError::User { payload, message } => CallError::User { payload, message },
            MethodError::BadCall(reason) => CallError::BadCall(reason),
            MethodError::ResultLost(reason) => CallError::ResultLost(reason),
            MethodError::OutOfMemory { what, reason } => CallError::OutOfMemory {
                what,
                reason,
                executed: Executed::Yes,
            },
        }
    }
}

/// One call as its actor sees it.
#[derive(Debug)]
pub struct MethodCall<'a> {
    /// The method's name.
    pub method: &'a str,
    /// The encoded arguments.
    pub arguments: &'a [u8],
    /// What the actor knows about itself.
    pub context: &'a ActorContext,
    /// Where several values go, if the caller takes them.
    pub items: Option<ItemSender>,
}

/// The outcome of a method, still to come: the encoded value, or why there is none.
pub type Dispatching<'a> = BoxFuture<'a, Result<Vec<u8>, MethodError>>;

/// An actor whose type its host does not know. Its methods run one after another.
pub trait DynActor: Send + 'static {
    /// Runs one method to its end.
    fn dispatch<'a>(&'a mut self, call: MethodCall<'a>) -> Dispatching<'a>;

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

/// How a method of a [`ConcurrentActor`] uses its actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Alone: it waits for everything before it, and everything after it waits.
    Exclusive,
    /// Beside other shared methods, up to the limit of its group.
    Shared {
        /// Which of the actor's groups.
        group: usize,
    },
}

/// How many methods of one type of actors run at once, and which.
#[derive(Debug, Clone, Copy)]
pub struct Concurrency {
    /// The limit of each group. The first is the group of whatever names none.
    pub limits: &'static [u32],
    /// How a method uses the actor. An unknown method is shared: it only answers that it is
    /// unknown.
    pub access: fn(&str) -> Access,
    /// Whether the actor has a hook for notices. Without one a notice takes no turn, and holds up no method that
    /// others which run already wait for.
    pub heeds_notices: bool,
}

/// An actor that can run several methods at once.
pub trait ConcurrentActor: DynActor + Sync {
    /// Runs one method whose access is shared.
    fn dispatch_shared<'a>(&'a self, call: MethodCall<'a>) -> Dispatching<'a>;
}

/// What a constructor makes.
pub enum ActorBody {
    /// One method after another, in the order of admission.
    Serial(Box<dyn DynActor>),
    /// Several at once.
    Concurrent(Box<dyn ConcurrentActor>, Concurrency),
}

impl ActorBody {
    /// An actor that runs one method after another.
    #[must_use]
    pub fn serial(actor: impl DynActor) -> Self {
        ActorBody::Serial(Box::new(actor))
    }

    /// An actor that runs as many methods at once as `concurrency` says.
    #[must_use]
    pub fn concurrent(actor: impl ConcurrentActor, concurrency: Concurrency) -> Self {
        ActorBody::Concurrent(Box::new(actor), concurrency)
    }
}

/// Runs what blocks its thread, a computation or synchronous I/O, so that the other actors of the
/// process go on: their tasks are given to another thread first. Nothing can end it before its
/// time but the end of the process.
pub fn run_blocking<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        // One thread alone has nobody to hand its tasks to.
        _ => work(),
    }
}
