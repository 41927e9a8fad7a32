//! What Mobula's processes say to each other.
//!
//! * [`frame`]: the envelope of everything that is not gRPC; [`frame_queue`]: frames on their way
//!   out; [`hello`]: how a stream begins.
//! * [`session`]: worker agent and leader. [`host`]: agent and host process. [`call`]: calls of
//!   actors; [`same_machine`]: how they change over to a Unix socket; [`task`]: what is in front of
//!   a task's arguments.
//! * [`object`]: values that processes share, their owners and holders; [`store`]: the shared
//!   memory of a node.
//! * [`raft`]: heads among each other.
//! * [`control`]: the gRPC control API, generated from `proto/mobula/v1/control.proto`;
//!   [`convert`]: its messages to and from the types of `mobula-core`.
//!
//! Invariants:
//! 1. Any bytes decode to a value or an error, in memory bounded by the lane's frame limit.
//! 2. A message's variant numbers are persisted in running clusters: new ones go at the end.

pub mod call;
pub mod convert;
pub mod frame;
pub mod frame_queue;
pub mod hello;
pub mod host;
pub mod object;
pub mod raft;
pub mod same_machine;
pub mod session;
pub mod store;
pub mod task;

pub use mobula_core::codec;

/// The gRPC control API.
pub mod control {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        reason = "generated code; the proto file is its documentation"
    )]
    tonic::include_proto!("mobula.v1");
}

/// The version of everything in this crate that is not gRPC. Peers with another one are refused
/// by name, because a cluster is upgraded one process at a time and must say so when it cannot be.
pub const PROTOCOL_VERSION: u16 = 1;
