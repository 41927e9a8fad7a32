//! Object stores with real sockets, files in memory and QUIC between them; hosts are played by the
//! tests, which read through the descriptors that they are given.

mod any_order;
mod sharing;
mod short_memory;
mod stage;
