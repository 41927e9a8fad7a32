//! One real head: its log on a disk, its API over TLS, its sessions over QUIC. One binary, so that
//! it is linked once.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the failure, and says where"
)]

mod certificates;
mod clock;
mod cluster_port;
mod logs;
mod metrics;
mod one_head;
mod overload;
mod reads;
mod stamps;
mod tokens;
