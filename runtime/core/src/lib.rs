//! The vocabulary of Mobula: what every other crate speaks, and nothing that touches the world.
//!
//! Invariants:
//! 1. No sockets, files, clocks, randomness, threads or async runtime in here.
//! 2. A type that is persisted or sent has explicit, stable tags and a round-trip test.
//! 3. Everything iterated is ordered, so that replicas agree byte for byte.

pub mod arena;
pub mod clock;
pub mod codec;
pub mod config;
pub mod control;
pub mod error;
pub mod exit;
pub mod id;
pub mod kept;
pub mod label;
pub mod mutant;
pub mod namespace;
pub mod object;
pub mod order;
pub mod resource;
pub mod row;
pub mod secret;
pub mod span;
pub mod spec;
pub mod storage;

pub use error::{CallError, ErrorCode, Executed, Rejection};
pub use exit::ExitReason;
pub use id::{ActorId, GroupId, HostId, Incarnation, JobId, NodeId, SessionId, Term};
pub use resource::Resources;
