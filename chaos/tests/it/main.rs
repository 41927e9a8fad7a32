//! Scenarios on real processes (tier B): a cluster of the `mobula` binary is hurt by a seeded
//! schedule while clients work on it, and the checkers look at what they saw.
#![allow(clippy::unwrap_used, reason = "a test")]

mod cluster;
mod submits;
