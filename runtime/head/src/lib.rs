//! The head: it orders every change through Raft, applies it to the tables, and sees to it that
//! workers do what the tables say.
//!
//! The way of a command: `api` → [`raft::RaftHandle`] → the driver's thread (log, fsync, apply) →
//! effects → `dispatcher` → `session` → worker. What only a leader does is in `leadership`; `head` starts
//! and ends all of that; `listeners` are its doors.
//!
//! Invariants:
//! 1. Nothing is acknowledged before it is on disk.
//! 2. Orders are level-triggered: each can be rebuilt from the tables at any time.
//! 3. Every listener is TLS 1.3; QUIC requires a certificate of the cluster.

mod api;
pub mod audit;
pub mod backup;
mod bootstrap;
mod context;
mod dispatcher;
mod error;
mod group;
mod head;
mod health;
mod join;
mod leader_client;
mod leadership;
mod listeners;
mod metrics;
mod options;
mod origin;
pub mod raft;
mod secrets;
mod session;
mod sessions;
#[doc(hidden)]
pub mod simulation;
mod store_health;
mod sweep;
mod timeline;
mod tokens;
mod watch;

pub use bootstrap::{CLIENT_TOKEN_FILE, WORKER_TOKEN_FILE};
pub use error::HeadError;
pub use head::Head;
pub use join::JoinOptions;
pub use options::HeadOptions;
pub use sweep::SweepOptions;
