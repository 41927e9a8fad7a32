//! Checkpoints of jobs: which ones are committed, and who writes and reads them.
//!
//! The bytes are in the object store, verified hash by hash; that a checkpoint counts is decided by
//! a command through Raft, fenced by the driver's incarnation.
//!
//! * [`state`]: the replicated table of committed checkpoints, a pure module of the head; `command`: what it is
//!   told and asked; `rows`: where it keeps that.
//! * [`keep`]: which of a job's checkpoints stay visible.
//! * [`retention`]: which of them must stay in the object store.
//! * [`preemptions`]: what drivers did about notices that their machines would be taken away.
//! * [`ledger`]: the table as those who save and restore see it.
//! * [`checkpointer`] saves and restores on a job's behalf; [`sharing`] uploads with others who hold the same bytes.
//! * [`client`] is for everybody else: it lists, verifies, pins and prunes; [`safetensors`] writes what other
//!   programs read.
//!
//! Invariants:
//! 1. A checkpoint is visible only after all of its bytes are durable and its manifest exists.
//! 2. What is restored was verified byte by byte; what does not verify is rejected for good, with
//!    its reason, and the one before it is tried.

pub mod checkpointer;
pub mod client;
mod command;
pub mod keep;
pub mod ledger;
pub mod preemptions;
pub mod retention;
mod rows;
pub mod safetensors;
pub mod sharing;
pub mod spread;
pub mod state;

pub use keep::KeepPolicy;
pub use retention::CheckpointRetention;
pub use state::CheckpointModule;
