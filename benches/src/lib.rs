//! What the benches share: measuring for a while, and a table of what came out.
//!
//! One file in `benches/` is one hot path. Each prints, in one run, our figures and beside them the
//! limit that the machine sets (its disk, its network stack, its arithmetic): a figure alone says
//! nothing, the distance to the limit does.
//!
//! * [`measure`]: repeating something for a while, alone or from many callers at once.
//! * [`report`]: the table of one bench. [`results`]: the figures of a suite, for people and as JSON.
//! * [`tables`]: the scheduler's tables in memory.
//!
//! Invariants:
//! 1. What is measured is real work: real disks, real sockets, answers that are looked at.
//! 2. Each row says what it is and, where it is a limit, that it is one.

pub mod measure;
pub mod report;
pub mod results;
pub mod tables;

use std::time::{SystemTime, UNIX_EPOCH};

use mobula_core::clock::Clock;

/// The machine's clock, for components that take one.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
    }
}
