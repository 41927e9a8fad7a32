//! The replicated log and what drives it.
//!
//! `proposals` (async) → `driver` (one thread, owns raft-rs) → `apply` (pure modules) → effects.
//!
//! Invariants:
//! 1. raft-rs and the engine are touched by the driver's thread only.
//! 2. What a client is told was fsynced before.
//! 3. A failed write ends the process: what is on disk is then unknown (the kernel may call pages
//!    clean that never reached it).

mod apply;
mod driver;
mod proposals;
#[cfg(test)]
mod tests;

pub(crate) use driver::{Driver, DriverOptions};
pub use proposals::{Leadership, Outcome, ProposeError, RaftHandle};
