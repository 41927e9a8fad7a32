//! What coordinator and trainers say to each other.
//!
//! Invariants:
//! 1. Every order carries the coordinator's epoch; a trainer that has seen a higher one refuses it.
//! 2. A reply names the digest of the parameters with which it was computed, so that a replica with
//!    other bits is found before its numbers are used.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::reduction::Partial;

/// Grows with changes of who takes part: the driver's incarnation above, a count below. So a new
/// driver outranks whatever an old one still sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Changes of membership that one driver can number, as a power of two; past them the number
    /// stands still, for a driver's epochs must never reach those of the next.
    const COUNT_BITS: u32 = 20;

    /// The first epoch of a driver's start.
    #[must_use]
    pub fn first_of(driver_incarnation: u64) -> Self {
        Epoch(driver_incarnation << Self::COUNT_BITS)
    }

    /// The next epoch of the same driver.
    #[must_use]
    pub fn next(self) -> Self {
        let last = self.0 | ((1 << Self::COUNT_BITS) - 1);
        Epoch((self.0 + 1).min(last))
    }

    /// The driver's start that it belongs to.
    #[must_use]
    pub fn driver_incarnation(self) -> u64 {
        self.0 >> Self::COUNT_BITS
    }
}

/// A trainer as it is when it answers for the first time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Its start: another number means another process, without state.
    pub incarnation: u64,
    /// Where it runs, for people.
    pub node_name: String,
    /// The state it still holds from before, if any.
    pub held: Option<Held>,
    /// The notice that its node was given: when, in milliseconds since the Unix epoch.
    pub notice_ms: Option<u64>,
}

/// The state that a replica holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Number of steps taken.
    pub step: u64,
    /// BLAKE3 of weights and optimizer state, in hex.
    pub digest: String,
}

/// One worker's share of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepOrder {
    /// Who may order.
    pub epoch: Epoch,
    /// The step to compute, counted from 0.
    pub step: u64,
    /// The reduced sums of the steps before it that the replica has not applied yet, in order; the
    /// last one is that of `step - 1`.
    pub updates: Vec<Partial>,
    /// The shards to compute: neighbours, so that few sums come back.
    pub shards: Range<u32>,
}

/// A worker's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReply {
    /// The step.
    pub step: u64,
    /// BLAKE3 of weights and optimizer state before this step, in hex.
    pub digest: String,
    /// One sum for each maximal aligned subtree of the shards.
    pub partials: Vec<Partial>,
    /// The notice that its node was given: when, in milliseconds since the Unix epoch.
    pub notice_ms: Option<u64>,
}

/// Why a trainer did not do as it was told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum TrainerError {
    /// A newer coordinator has taken over.
    #[error("epoch {found} is over, epoch {current} orders here now; stop this coordinator", found = .found.0, current = .current.0)]
    Stale {
        /// The order's epoch.
        found: Epoch,
        /// The epoch that orders now.
        current: Epoch,
    },
    /// It was started again and has no state.
    #[error("this trainer has no state yet; prepare it first")]
    Unprepared,
    /// Its state is of another step.
    #[error(
        "this trainer stands at step {found}, the order is for step {ordered}; prepare it again"
    )]
    OutOfStep {
        /// Its step, with the updates applied.
        found: u64,
        /// The order's step.
        ordered: u64,
    },
    /// The data, the state or the numbers are not what the job needs; the same order fails again.
    #[error("{0}")]
    Unfit(String),
}
