//! A model of seven values, and the chance that everything is drawn from.

use super::{SAMPLES, SHARDS, STEPS, VALUES};
use crate::training::protocol::leader::StateDigest;
use crate::training::reduction::{Partial, ShardFolder};

/// splitmix64 (Steele, Lea and Flood, 2014).
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn percent(&mut self, share: u64) -> bool {
        self.below(100) < share
    }
}

/// A model of seven values.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Toy {
    pub(super) step: u64,
    pub(super) values: Vec<f32>,
}

impl Toy {
    pub(super) fn initial() -> Self {
        Toy {
            step: 0,
            values: (0..VALUES).map(|i| 1.0 / (i as f32 + 3.0)).collect(),
        }
    }

    pub(super) fn digest(&self) -> StateDigest {
        let bytes: Vec<u8> = self.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let hash = blake3::hash(&bytes);
        hash.as_bytes()[..16].try_into().unwrap()
    }

    pub(super) fn gradient(&self, shard: u32) -> Partial {
        let mut key = self.digest().to_vec();
        key.extend_from_slice(&self.step.to_le_bytes());
        key.extend_from_slice(&shard.to_le_bytes());
        let mut rng = Rng(u64::from_le_bytes(
            blake3::hash(&key).as_bytes()[..8].try_into().unwrap(),
        ));
        let scale = 10f32.powi((shard % 4) as i32);
        let mut value = || (rng.below(2_000_003) as f32 / 1e6 - 1.0) * scale;
        let grads: Vec<f32> = (0..VALUES).map(|_| value()).collect();
        Partial::of_shard(shard, f64::from(value()), SAMPLES, grads)
    }

    pub(super) fn apply(&mut self, root: &Partial) {
        assert_eq!(root.count, SAMPLES * u64::from(SHARDS));
        for (value, grad) in self.values.iter_mut().zip(&root.grads) {
            *value = *value * 0.97 - grad * 1e-3;
        }
        self.step += 1;
    }
}

pub(super) fn undisturbed() -> Vec<Toy> {
    let mut states = vec![Toy::initial()];
    while (states.len() as u64) <= STEPS {
        let mut toy = states.last().unwrap().clone();
        let mut folder = ShardFolder::new();
        for shard in 0..SHARDS {
            let sums = toy.gradient(shard);
            let (loss, count) = (sums.loss_sum, sums.count);
            folder.feed(shard, loss, count, sums.grads).unwrap();
        }
        toy.apply(&folder.finish()[0]);
        states.push(toy);
    }
    states
}
