//! Hosts in this process, and their callers over real QUIC. One binary, so that it is linked once.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the failure, and says where"
)]

mod agent;
mod calls;
mod concurrency;
mod objects;
mod order;
mod protocol;
mod supervision;
mod support;
