//! Counter-based randomness: a value is a function of where it is used, never of when.
//!
//! Invariants:
//! 1. A draw depends only on (seed, purpose, name, step, index, draw number). No generator has a state
//!    that advances, so any worker can compute any draw, in any order, any number of times.
//! 2. Only integer operations and the functions of [`super::math`] are used, so the bits are the same on
//!    every machine.
//!
//! The generator is Philox 4×32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC'11), checked against the known-answer vectors of the Random123 library.

use serde::{Deserialize, Serialize};

use super::math;

/// What a stream of random numbers is for. The numbers are hashed into keys and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The initial value of a parameter; the stream's name is the parameter's.
    Initialise = 1,
    /// The order of the training samples within an epoch; the stream's step is the epoch.
    DataOrder = 2,
    /// Which samples are held out from training.
    HeldOut = 3,
    /// Which training samples form the reference for drift detection.
    Reference = 4,
    /// What is dropped out; the stream's name is the layer's.
    Dropout = 5,
    /// Which half of its values a quantile sketch gives up; the stream's name is the feature's number, its step the first row.
    Compaction = 6,
}

/// The random numbers of one purpose, name and step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    key: [u32; 2],
}

impl Stream {
    /// The stream keyed by a job's seed, a purpose, a name (a layer or parameter) and a step.
    pub fn new(seed: u64, purpose: Purpose, name: &str, step: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"mobula.training.random.v1");
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(purpose as u32).to_le_bytes());
        hasher.update(&step.to_le_bytes());
        hasher.update(name.as_bytes());
        let digest = hasher.finalize();
        let word = |at: usize| {
            let bytes = digest.as_bytes();
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Self {
            key: [word(0), word(4)],
        }
    }

    /// The key of all its blocks, for a kernel that computes them elsewhere.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn key(&self) -> [u32; 2] {
        self.key
    }

    /// 128 random bits for an item (a global sample or element index) and a draw number.
    pub fn block(&self, index: u64, draw: u32) -> [u32; 4] {
        philox4x32_10([index as u32, (index >> 32) as u32, draw, 0], self.key)
    }

    /// 64 random bits.
    pub fn bits(&self, index: u64, draw: u32) -> u64 {
        let block = self.block(index, draw);
        u64::from(block[0]) | u64::from(block[1]) << 32
    }

    /// A uniform number in [0, 1), a multiple of 2^-53.
    pub fn uniform(&self, index: u64, draw: u32) -> f64 {
        unit_interval(self.bits(index, draw))
    }

    /// A standard normal number, by the Box–Muller transform.
    pub fn normal(&self, index: u64, draw: u32) -> f64 {
        let block = self.block(index, draw);
        let first = unit_interval(u64::from(block[0]) | u64::from(block[1]) << 32);
        let second = unit_interval(u64::from(block[2]) | u64::from(block[3]) << 32);
        // 1 − u lies in (0, 1], so the logarithm is finite. A square root is exact to the last bit.
        (-2.0 * math::ln(1.0 - first)).sqrt() * math::cos_turns(second)
    }
}

fn unit_interval(bits: u64) -> f64 {
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..10 {
        let even = MULTIPLIERS[0] * u64::from(counter[0]);
        let odd = MULTIPLIERS[1] * u64::from(counter[2]);
        counter = [
            (odd >> 32) as u32 ^ counter[1] ^ key[0],
            odd as u32,
            (even >> 32) as u32 ^ counter[3] ^ key[1],
            even as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_known_answers_of_random123() {
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let base = Stream::new(1, Purpose::Initialise, "a", 0).bits(0, 0);
        let others = [
            Stream::new(2, Purpose::Initialise, "a", 0).bits(0, 0),
            Stream::new(1, Purpose::DataOrder, "a", 0).bits(0, 0),
            Stream::new(1, Purpose::Initialise, "b", 0).bits(0, 0),
            Stream::new(1, Purpose::Initialise, "a", 1).bits(0, 0),
            Stream::new(1, Purpose::Initialise, "a", 0).bits(1, 0),
            Stream::new(1, Purpose::Initialise, "a", 0).bits(0, 1),
        ];
        assert!(others.iter().all(|other| *other != base));
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let stream = Stream::new(7, Purpose::Initialise, "moments", 0);
        let n = 20_000u64;
        let mean = |values: &dyn Fn(u64) -> f64| (0..n).map(values).sum::<f64>() / n as f64;
        assert!((mean(&|i| stream.uniform(i, 0)) - 0.5).abs() < 0.01);
        assert!(mean(&|i| stream.normal(i, 0)).abs() < 0.03);
        assert!((mean(&|i| stream.normal(i, 0).powi(2)) - 1.0).abs() < 0.05);
    }
}
