//! The storage crate against real back ends: a directory, memory, and an S3 server in this process.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod blob;
mod checkpoint;
mod crash_points;
mod flips;
mod raft;
mod s3;
