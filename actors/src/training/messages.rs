//! What coordinator and trainers say to each other.
//!
//! Invariants:
//! 1. Every plan carries the coordinator's epoch; a trainer that has seen a higher one refuses it.
//! 2. Every order to keep a state says which driver gives it, and its number among that driver's; a trainer that has heard a
//!    later one keeps nothing for it. Who ends what is kept names the order that asked for it, and so ends nothing that a
//!    later one asked for.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::collective::parcel::Damaged;
use super::numerics::Probe;
use super::protocol::exchange::Report;
use super::protocol::leader::StateDigest;
use super::protocol::plan::MemberId;

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

/// Which order to keep a state one is: a later one of the same driver outranks it, and so does any of a newer driver. Steps
/// would not tell: the next state that is asked for may be that after an earlier step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct KeepOrder {
    /// The driver's start.
    pub driver_incarnation: u64,
    /// Its number among the orders of that driver, from 1 on.
    pub number: u64,
}

impl KeepOrder {
    /// What comes before all orders of a driver, and after those of all earlier ones.
    #[must_use]
    pub fn before_all_of(driver_incarnation: u64) -> Self {
        KeepOrder {
            driver_incarnation,
            number: 0,
        }
    }

    /// The next order of the same driver.
    #[must_use]
    pub fn next(self) -> Self {
        KeepOrder {
            number: self.number.saturating_add(1),
            ..self
        }
    }
}

/// A trainer as it is when it answers for the first time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Its start: another number means another process, without state.
    pub incarnation: u64,
    /// Where it runs, for people.
    pub node_name: String,
    /// The state it still holds from before, and under which name it exchanges sums, if any.
    pub held: Option<(MemberId, Held)>,
    /// The notice that its node was given: when, in milliseconds since the Unix epoch.
    pub notice_ms: Option<u64>,
}

/// A trainer that has taken a state over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// Under which name it exchanges sums.
    pub member: MemberId,
    /// What it holds now.
    pub held: Held,
    /// What its machine computes.
    pub probe: Probe,
}

/// What a trainer that joins has got of some parts of a state from those who keep it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Fetched {
    /// The first byte of each part that nobody gave: the driver gives those, in this order.
    pub missing: Vec<u64>,
    /// The trainers that are not worth being asked again.
    pub failed: Vec<u32>,
}

/// The state that a replica holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Number of steps taken.
    pub step: u64,
    /// BLAKE3 of weights and optimizer state, in hex.
    pub digest: String,
}

impl Held {
    /// The first sixteen bytes of the digest, which ride on every message of a step.
    #[must_use]
    pub fn short(&self) -> StateDigest {
        short_digest(&self.digest)
    }
}

/// The first sixteen bytes of a BLAKE3 in hex; zeros for what is none.
#[must_use]
pub fn short_digest(hex: &str) -> StateDigest {
    let mut short = [0; 16];
    if let Ok(hash) = blake3::Hash::from_hex(hex) {
        short.copy_from_slice(&hash.as_bytes()[..16]);
    }
    short
}

/// What a driver that leaves its job to trainers knows beside the state: they keep it for the next one. It is as
/// large as a checkpoint's metadata, some hundred KiB at most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Steps of which it knows everything.
    pub step: u64,
    /// What a checkpoint's metadata would say of them.
    pub metadata: BTreeMap<String, String>,
}

/// What a trainer tells the coordinator that listens to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct News {
    /// Grows with each change; the coordinator names the last one that it knows.
    pub number: u64,
    /// Who it is now.
    pub member: MemberId,
    /// The step at which it stands.
    pub step: u64,
    /// What it has to say of others, since the number that was named.
    pub reports: Vec<Report>,
    /// How long it waited for samples, and how long it computed, for its last step.
    pub spent: (Duration, Duration),
    /// CPU time that its process has used.
    pub cpu: Duration,
    /// The notice that its node was given: when, in milliseconds since the Unix epoch.
    pub notice_ms: Option<u64>,
    /// The share of the last moments, a second at most, in which its GPU computed, from 0 to 1; absent on CPUs, and where
    /// the driver does not say.
    pub gpu_utilization: Option<f64>,
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
    /// A message for another start of this trainer.
    #[error("{0} has ended; this is another start of it")]
    Other(MemberId),
    /// What was sent was damaged on the way.
    #[error("{0}")]
    Damaged(#[from] Damaged),
    /// Pieces of a state that do not follow each other.
    #[error(
        "a state is to go on at byte {found} and {expected} bytes of it are here; send all of it again"
    )]
    Misplaced {
        /// Where what came begins, or how long the whole is.
        found: u64,
        /// Bytes that are here.
        expected: u64,
    },
    /// The data, the state or the numbers are not what the job needs; the same order fails again.
    #[error("{0}")]
    Unfit(String),
    /// It does not keep the state after that step, and will not.
    #[error("the state after step {step} is not kept here; somebody else has to upload it")]
    NotKept {
        /// The step.
        step: u64,
    },
    /// Its share of a checkpoint is not stored.
    #[error("a share of the checkpoint of step {step} is not stored: {reason}")]
    NotStored {
        /// The step.
        step: u64,
        /// What the store, or the comparison with what was asked for, said.
        reason: String,
    },
    /// Its machine computes other bits than the driver's.
    #[error("of the same shard it computes {computes}, where {expected} is expected")]
    OtherBits {
        /// What it computes.
        computes: Probe,
        /// What the driver's machine computes.
        expected: Probe,
    },
    /// Something is out of its reach for now, such as the object store with its data. Another trainer may have it.
    #[error("{0}; this trainer is asked again later")]
    Hindered(String),
    /// It gives no such part of a state to one that joins: another trainer has to, or the driver.
    #[error("{0}")]
    NotGiven(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_driver_outranks_every_epoch_of_an_older_one() {
        let mut old = Epoch::first_of(7);
        for _ in 0..1 << 20 {
            let next = old.next();
            assert!(next >= old);
            old = next;
        }
        assert!(Epoch::first_of(8) > old);
        assert_eq!(old.driver_incarnation(), 7);
    }

    #[test]
    fn a_later_order_to_keep_outranks_an_earlier_one_and_a_newer_driver_all_of_an_older_one() {
        let before = KeepOrder::before_all_of(7);
        let (first, second) = (before.next(), before.next().next());
        assert!(before < first && first < second);
        let newer = KeepOrder::before_all_of(8);
        assert!(second < newer && newer < newer.next());
        assert!(KeepOrder::default() < first);
    }

    #[test]
    fn the_short_digest_is_the_beginning_of_the_long_one() {
        let hash = blake3::hash(b"a");
        let short = short_digest(&hash.to_hex());
        assert_eq!(short, hash.as_bytes()[..16]);
        assert_eq!(short_digest("none"), [0; 16]);
    }
}
