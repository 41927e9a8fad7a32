//! Checkpoints of jobs: which ones are committed, and the actor that writes and reads them.
//!
//! The bytes are in the object store, verified hash by hash; that a checkpoint counts is decided by
//! a command through Raft, fenced by the driver's incarnation.
//!
//! * [`state`]: the replicated table of committed checkpoints, a pure module of the head.
//! * [`retention`]: which of them must stay in the object store.
//! * [`actor`]: the checkpointer, which saves and restores on a job's behalf.
//!
//! Invariants:
//! 1. A checkpoint is visible only after all of its bytes are durable and its manifest exists.
//! 2. What is restored was verified byte by byte; what does not verify is rejected for good, with
//!    its reason, and the one before it is tried.

pub mod actor;
pub mod retention;
pub mod state;

pub use retention::CheckpointRetention;
pub use state::CheckpointModule;
