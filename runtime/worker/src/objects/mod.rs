//! The node's shared memory for objects.
//!
//! ```text
//!  host ──requests──► link ──┐                     ┌── spill (files below the data directory)
//!  host ◄─descriptors─       ├──► service ─ table ─┤
//!  other agents ──► transfer ┘                     └── transfer (from other agents)
//! ```
//!
//! * `table`: what is where, who reads it, what goes when memory is short: pure decisions, over
//!   `arenas`: the memory that is taken, and the blocks in it.
//! * `service`: one task that owns the table, and performs what it decides. `link`: a host's
//!   socket. `memory`: files in memory. `spill`: the file of objects on disk. `transfer`: from node to node.
//!   `watch`: which processes of other nodes have ended.
//!
//! Invariants:
//! 1. Memory is counted in whole arenas, as it is taken from the system, and never exceeds the
//!    limit.
//! 2. An object that somebody reads stays where it is. Others move to disk, least recently used
//!    first, when memory is short; copies of other nodes' objects are dropped instead.
//! 3. The files in memory have no names, and neither has the one on disk: when the agent and its
//!    hosts are gone nothing is left.
//! 4. A host is given descriptors of its own job's arenas only.

mod arenas;
mod link;
mod memory;
mod metrics;
mod service;
mod spill;
mod table;
mod transfer;
mod watch;

#[cfg(test)]
mod tests;

pub(crate) use link::Keys;
pub use metrics::ObjectStoreMetrics;
pub(crate) use service::{ObjectStore, Service, ServiceParts};
