//! The order of the data: a keyed permutation with no table, and the positions that a step takes.
//!
//! Invariants:
//! 1. Global position `p` names sample `permutation(seed, p / n)(p % n)` of `n` training samples. Step
//!    `t` of global batch `B` takes positions `[tB, (t+1)B)`, and shard `v` the `v`-th equal slice. So a
//!    loader's whole state is the step number.
//! 2. An epoch has no tail: a batch that reaches the end of one epoch goes on in the next, and within an
//!    epoch each sample is taken exactly once.

use super::random::{Purpose, Stream};

/// Rounds of the Feistel network: 4 suffice for pseudo-randomness (Luby and Rackoff), more mix better.
const ROUNDS: usize = 8;

/// A bijection of `0..count`, chosen by a key.
///
/// A balanced Feistel network permutes the smallest even-width power of two that holds `count`, less
/// than `4 * count`; a value that falls outside `0..count` is sent through again ("cycle walking")
/// until it falls inside, fewer than 4 rounds on average.
#[derive(Debug, Clone)]
pub struct Permutation {
    count: u64,
    half_bits: u32,
    round_keys: [u64; ROUNDS],
}

impl Permutation {
    /// The order of `count` training samples in an epoch.
    ///
    /// # Panics
    /// If `count` is zero or above 2^62.
    pub fn new(seed: u64, epoch: u64, count: u64) -> Self {
        Self::keyed(seed, Purpose::DataOrder, epoch, count)
    }

    /// A permutation for another purpose. Panics as [`Permutation::new`] does.
    pub fn keyed(seed: u64, purpose: Purpose, epoch: u64, count: u64) -> Self {
        assert!(
            (1..=1 << 62).contains(&count),
            "a permutation of {count} items"
        );
        let bits = 64 - (count - 1).leading_zeros();
        let stream = Stream::new(seed, purpose, "permutation", epoch);
        Self {
            count,
            half_bits: bits.div_ceil(2).max(1),
            round_keys: std::array::from_fn(|round| stream.bits(round as u64, 0)),
        }
    }

    /// The item at `position`.
    ///
    /// # Panics
    /// If `position` is not below the count.
    pub fn at(&self, position: u64) -> u64 {
        assert!(
            position < self.count,
            "position {position} of {} items",
            self.count
        );
        let mut value = self.feistel(position);
        // Ends, because the network is a bijection: the cycle of `position` comes back to it at last.
        while value >= self.count {
            value = self.feistel(value);
        }
        value
    }

    fn feistel(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.round_keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Which training samples each shard of each step takes.
#[derive(Debug, Clone, Copy)]
pub struct DataOrder {
    /// The job's seed.
    pub seed: u64,
    /// Number of training samples.
    pub sample_count: u64,
    /// Samples in a step.
    pub global_batch: u64,
    /// Virtual shards in a step; divides the global batch.
    pub virtual_shards: u64,
}

impl DataOrder {
    /// Samples in a shard.
    pub fn shard_size(&self) -> usize {
        (self.global_batch / self.virtual_shards) as usize
    }

    /// The sample indices of one shard of one step, in order.
    pub fn shard(&self, step: u64, shard: u32) -> Vec<usize> {
        let size = self.shard_size() as u64;
        let first = step * self.global_batch + u64::from(shard) * size;
        let mut epoch = first / self.sample_count;
        let mut permutation = Permutation::new(self.seed, epoch, self.sample_count);
        (first..first + size)
            .map(|position| {
                if position / self.sample_count != epoch {
                    epoch = position / self.sample_count;
                    permutation = Permutation::new(self.seed, epoch, self.sample_count);
                }
                permutation.at(position % self.sample_count) as usize
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_a_bijection(seed: u64, epoch in 0u64..100, count in 1u64..3000) {
            let permutation = Permutation::new(seed, epoch, count);
            let mut seen = vec![false; count as usize];
            for position in 0..count {
                let item = permutation.at(position) as usize;
                prop_assert!(!std::mem::replace(&mut seen[item], true));
            }
        }

        #[test]
        fn an_epoch_takes_each_sample_once(seed: u64, samples in 20u64..300, shards in 0u32..4) {
            let virtual_shards = 1 << shards;
            let order =
                DataOrder { seed, sample_count: samples, global_batch: 16, virtual_shards };
            let taken: Vec<usize> = (0..samples * 2 / 16 + 1)
                .flat_map(|step| (0..virtual_shards as u32).flat_map(move |v| order.shard(step, v)))
                .collect();
            for epoch in 0..2 {
                let start = epoch * samples as usize;
                let mut one = taken[start..start + samples as usize].to_vec();
                one.sort_unstable();
                prop_assert!(one.into_iter().eq(0..samples as usize));
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_large_counts_work() {
        let order = |seed, epoch| {
            let permutation = Permutation::new(seed, epoch, 100);
            (0..100)
                .map(|position| permutation.at(position))
                .collect::<Vec<_>>()
        };
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_eq!(order(3, 4), order(3, 4));
        let large = Permutation::new(9, 0, 1 << 62);
        assert!((0..100).all(|position| large.at(position) < 1 << 62));
    }
}
