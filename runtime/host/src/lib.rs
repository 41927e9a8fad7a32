//! Running actors in a process: what the SDK and the `mobula` binary start when an agent launches
//! them.
//!
//! * [`actor`]: what an actor is to its host; [`registry`]: the types a program has;
//!   [`context`]: what an actor knows about itself.
//! * [`mailbox`]: admission in front of a ractor actor; `method`: one call from the beginning of
//!   its method to its answer; `admission` and `concurrent`: several
//!   methods of one actor at once; [`supervision`]: starts, ends, panics.
//! * [`scope`]: what a running method knows about its call; [`state`]: what a durable actor keeps;
//!   [`answers`]: its answers to `exactly_once` calls.
//! * [`tasks`]: functions that are called by name, in slots.
//! * [`calls`]: answering calls from other processes; [`reply`]: the duty to answer one.
//! * [`client`]: making calls; [`pending`]: calls whose answer is still to come.
//! * [`objects`]: values that processes share by reference.
//! * [`spans`]: what took how long, for the job's timeline.
//! * [`agent`]: the link to the worker's agent, and a host process from start to end.
//!
//! Invariants:
//! 1. A call is answered exactly once, and an error says whether the method ran.
//! 2. Calls of one caller to one actor run in the order in which they were made.
//! 3. Every queue has a bound; past it the caller is told `Overloaded`, or is made to wait.
//! 4. No actor outlives its agent: a host whose agent is gone ends.

pub mod actor;
mod admission;
pub mod agent;
pub mod answers;
mod caller_stream;
pub mod calls;
pub mod client;
mod concurrent;
pub mod context;
mod host_stream;
pub mod mailbox;
mod method;
mod metrics;
pub mod objects;
pub mod own_metrics;
pub mod pending;
pub mod registry;
pub mod reply;
pub mod scope;
mod shell;
pub mod spans;
pub mod state;
pub mod supervision;
pub mod tasks;

pub use actor::{Access, ActorBody, ConcurrentActor, DynActor, MethodCall, MethodError};
pub use context::{ActorContext, HostInfo, HostRuntime, Notice};
pub use registry::{ActorType, Registry};
pub use scope::CallScope;
pub use state::{ActorState, StateError};
pub use tasks::TaskContext;

#[doc(hidden)]
pub use inventory;
