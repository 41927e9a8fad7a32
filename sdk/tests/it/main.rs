//! The SDK over a host in this process. One binary, so that it is linked once.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the failure, and says where"
)]

mod actors;
mod semantics;
mod support;
mod tasks;
