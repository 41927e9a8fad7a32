//! The worker agent: the daemon of a machine that runs actors.
//!
//! It joins a cluster (`join`), keeps a session with the leader (`session`), starts and watches host
//! processes (`agent`, `hosts`), finds out what the machine offers ([`discover`]), and passes on
//! notices that the machine is about to be taken away ([`notices`]). It keeps the node's shared
//! memory for objects (`objects`).
//!
//! Invariants:
//! 1. An incarnation of an actor is started at most once here, and its end is reported until the
//!    leader has acknowledged it.
//! 2. The agent believes pidfd rather than messages: a host is dead when the kernel says so, and
//!    then nothing of its process group lives on. No host outlives its agent.
//! 3. With no head at all, hosts run on. When the leader has declared this node lost meanwhile (its
//!    welcome names a new incarnation), every old host is dead before a new order is taken.
//! 4. Placement is the leader's business: nothing here chooses what runs, only in which process.

mod agent;
pub mod discover;
mod error;
mod gather;
mod hosts;
mod join;
mod lease;
mod logs;
mod metrics;
pub mod notices;
mod objects;
mod observe;
mod options;
mod outbox;
mod paths;
mod session;
mod session_handle;
mod spans;
mod worker;

pub use error::{JoinError, WorkerError};
pub use objects::ObjectStoreMetrics;
pub use options::{ResourceOverride, WorkerOptions};
pub use worker::{Handle, Worker, WorkerExit, WorkerStatus, run};
