//! Objects: values that processes share by reference.
//!
//! ```text
//!  Object (a counted handle) ── Cell (pending, a value, or an error; whoever waits for it)
//!     │ owned here                     │ borrowed from another process
//!  OwnerTable ◄──── Change, Next ──── Link (one for each owner)
//! ```
//!
//! * [`cell`]: the state of an object and waiting for it; [`payload`]: bytes and how to read them.
//! * [`handle`]: counted handles, sending and receiving them; [`table`]: all objects of a process;
//!   [`values`]: where their values are; [`completer`]: values that come later.
//! * [`store`]: the node's shared memory, for values that are large; `mapping`: its unsafe part.
//! * `brought`: values that travel with the references to them.
//! * `kept`: to the object store and back, what outlives its owner.
//! * `owner`: what the owner knows about holders elsewhere; `link`: what a holder tells the owner.
//!
//! Invariants:
//! 1. An object is freed when its owner knows of no handle, no holder and no reference on its way;
//!    never before, unless a holder was silent for `HOLDER_LEASE` or a reference was on its way
//!    for `TRANSIT_MAX`. Who comes later is told `Freed`.
//! 2. An object settles; only its owner can make it pending again, to create a lost value anew.
//! 3. What one process says about an owner's objects reaches that owner in order.

mod brought;
pub mod cell;
pub mod completer;
pub mod handle;
mod kept;
mod link;
mod mapping;
mod owner;
pub mod payload;
pub mod store;
pub mod table;
pub mod values;

use std::sync::Arc;

pub use brought::{bring, brought};
pub use cell::{Outcome, Value, wait_for};
pub use completer::{Completer, Lineage, ObjectValue};
pub use handle::{Object, capture, holding};
pub use payload::Payload;
pub use table::ObjectTable;
pub use values::PutError;

use crate::context::HostRuntime;

/// The objects of this process, if an agent started it.
#[must_use]
pub fn current() -> Option<Arc<ObjectTable>> {
    HostRuntime::current().and_then(|runtime| runtime.objects().cloned())
}
