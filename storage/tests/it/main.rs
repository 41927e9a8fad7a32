//! The storage crate against real back ends: a directory, memory, and an S3 server in this process.

mod blob;
mod checkpoint;
mod raft;
mod s3;
