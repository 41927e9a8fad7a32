//! The way sums take between members: the exchange of a step, reduce-scatter and all-gather in one.
//!
//! A member sends the sums of its subtrees to each bucket's owner while it computes the next shard, and
//! asks every owner for the bucket's sum over all shards. What is sent, and to whom, is the business of
//! [`Member`](super::protocol::member::Member); this module carries it.
//!
//! | backend | way |
//! |---|---|
//! | [`InProcess`] | pointers, between members of one process |
//! | [`ClusterCollective`] | calls of trainers: on one machine they say where the sums lie in [`shared_memory`], between machines they carry them over several QUIC connections |
//!
//! Invariants:
//! 1. A call names the member that it means; another start of that trainer does not take it.
//! 2. Sums travel with a digest of their bytes. Damaged ones are refused, and sent again.

pub mod cluster;
mod compute_thread;
pub mod in_process;
pub mod parcel;
pub mod runner;
pub mod segment;
pub mod shared_memory;

use std::future::Future;

use super::protocol::exchange::{Ask, Contribution, Refusal};
use super::protocol::plan::MemberId;
use super::reduction::Partial;

pub use cluster::ClusterCollective;
pub use in_process::InProcess;
pub use shared_memory::SharedMemory;

/// A member cannot be reached, or did not answer in time. Whether it got the message is unknown, and
/// does not matter: it is sent again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{member} cannot be reached: {reason}")]
pub struct Unreachable {
    /// Which member.
    pub member: MemberId,
    /// What the transport said.
    pub reason: String,
}

/// Carries sums between members.
pub trait Collective: Clone + Send + Sync + 'static {
    /// Sends sums to a bucket's owner.
    fn contribute(
        &self,
        to: MemberId,
        contribution: Contribution,
    ) -> impl Future<Output = Result<Result<(), Refusal>, Unreachable>> + Send;

    /// Asks for the sum of a bucket over all shards; answered once it is there, or with [`Refusal::NotYet`].
    fn ask(
        &self,
        to: MemberId,
        ask: Ask,
    ) -> impl Future<Output = Result<Result<Partial, Refusal>, Unreachable>> + Send;
}
