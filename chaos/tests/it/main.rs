//! Scenarios on real processes (tier B): a cluster of the `mobula` binary is hurt by a seeded
//! schedule while clients work on it, and the checkers look at what they saw.
//!
//! Each run prints its seed and its faults; `MOBULA_TEST_SEED=<seed>` draws the same ones again:
//!
//! ```text
//! cargo nextest run --workspace -E 'package(mobula-chaos) and kind(test)' --no-capture
//! MOBULA_TEST_SEED=17 cargo nextest run --workspace -E 'package(mobula-chaos) and kind(test)'
//! ```
#![allow(clippy::unwrap_used, reason = "a test")]

mod cluster;
mod scenarios;
mod submits;
