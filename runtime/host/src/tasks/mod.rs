//! Running tasks: functions that are called by name, in *slots*.
//!
//! A slot is an actor of the built-in type [`SLOT_TYPE`]. The head places it like any other, with
//! the resources that one task needs; a pool of tasks (the SDK's) holds it for a while and pushes
//! tasks into it as calls, one after another or many at a time. The head is asked for slots, never
//! about tasks.
//!
//! * [`registry`]: the tasks that a program has; [`context`]: what a task knows about itself, and
//!   how it says that it only waits.
//! * `slot`: a thread that has tasks pushed into it; `execution`: how that thread runs them;
//!   `outcome`: how a value travels back.
//!
//! Invariants:
//! 1. A slot runs one task at a time, in the order of their coming. A task that waits for an
//!    object does not count: the next one begins, so that tasks which wait for tasks get on.
//! 2. Whatever a task does, short of ending the process, ends that task only: a panic, a blocked
//!    thread and an endless loop leave the process's connections and its other slots alone.
//! 3. A slot that nobody has used for a while ends: its holder may be dead.

pub mod context;
mod execution;
mod outcome;
pub mod registry;
pub(crate) mod slot;
#[cfg(test)]
mod slot_tests;

pub use context::{TaskChildren, TaskContext, while_blocked};
pub use outcome::{EncodedValue, complete_with_outcome};
pub use registry::{TaskCall, TaskRegistry, TaskType};
pub use slot::{END_METHOD, RETURN_METHOD, SLOT_TYPE, WATCH_METHOD};
