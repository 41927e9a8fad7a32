//! The agent against a head that the test plays itself, over real QUIC, with real host processes.
//!
//! Hosts are this very test binary: the agent starts it with the argument `host` or `builtin`,
//! which to the test harness are filters that select [`entry::host`] or [`entry::builtin`].

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed; clippy sees only the test functions as tests"
)]

mod entry;
mod fake_head;
mod lifecycle;
mod notices;
