//! Mobula's bytes at rest: what the head keeps on its disk, and what anyone keeps in an object
//! store.
//!
//! * On a head (feature `head`): an ordered key-value [`engine`] (RocksDB, or memory in tests); the [`raft_log`] and
//!   the replicated [`tables`] on it; a [`snapshot`] of the tables as a checked stream of bytes.
//! * Anywhere: a [`blob`] store (files or S3); in it [`checkpoint`]s of jobs, fenced and verified,
//!   [`artifact`]s, addressed by what they hold, and a [`state_log`] for each durable actor.
//!
//! Invariants:
//! 1. Nothing that is read back is believed before its checksum or hash is verified, except what
//!    the engine has checked itself.
//! 2. No scheduling, and no talk with other nodes: this crate is told what to keep.

pub mod artifact;
pub mod blob;
pub mod checkpoint;
pub mod digest;
#[cfg(feature = "head")]
pub mod engine;
#[cfg(feature = "head")]
pub mod raft_log;
#[cfg(feature = "head")]
pub mod snapshot;
pub mod state_log;
#[cfg(feature = "head")]
pub mod tables;
