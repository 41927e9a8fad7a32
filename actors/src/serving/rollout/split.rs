//! Which version a request goes to.
//!
//! The hash is version 2 of GrowthBook's scheme, FNV-1a of 32 bits applied twice
//! (<https://docs.growthbook.io/lib/build-your-own#hashing>), so that others can compute who saw what.
//!
//! Invariants:
//! 1. A key always has the same bucket within a rollout.
//! 2. Whoever got the candidate gets it at every larger weight, too.

/// Buckets of all keys.
pub const BUCKETS: u32 = 10_000;

/// Which version a request goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The new one.
    Candidate,
    /// The one that it is compared with.
    Baseline,
}

/// FNV-1a of 32 bits (Fowler, Noll, Vo; RFC 9923).
#[must_use]
pub fn fnv1a_32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811C_9DC5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// The bucket of a key, below [`BUCKETS`].
#[must_use]
pub fn bucket(seed: &str, key: &str) -> u32 {
    let inner = fnv1a_32([seed, key].concat().as_bytes());
    fnv1a_32(inner.to_string().as_bytes()) % BUCKETS
}

/// The side of a bucket while the candidate gets `weight_percent` of the requests.
#[must_use]
pub fn side(bucket: u32, weight_percent: u32) -> Side {
    if bucket < weight_percent.min(100) * BUCKETS / 100 {
        Side::Candidate
    } else {
        Side::Baseline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_growthbook() {
        for (key, expected) in [("a", 559), ("b", 460), ("user-1", 3004)] {
            assert_eq!(bucket("exp", key), expected, "{key}");
        }
    }

    #[test]
    fn widening_keeps_its_members() {
        for weights in [[1, 5, 25, 50], [50, 60, 75, 100]] {
            let mut members = vec![false; BUCKETS as usize];
            for weight in weights {
                let sides: Vec<Side> = (0..BUCKETS).map(|at| side(at, weight)).collect();
                let gets = |side: &Side| *side == Side::Candidate;
                assert_eq!(
                    sides.iter().filter(|side| gets(side)).count() as u32,
                    weight * BUCKETS / 100
                );
                for (member, side) in members.iter_mut().zip(&sides) {
                    assert!(!*member || gets(side), "{weight}");
                    *member = gets(side);
                }
            }
        }
    }

    #[test]
    fn keys_spread_evenly() {
        let mut counts = [0u32; 10];
        for user in 0..20_000 {
            counts[bucket("digits/1/", &format!("user-{user}")) as usize / 1_000] += 1;
        }
        // Ten standard deviations of a binomial count around 2000.
        assert!(
            counts.iter().all(|count| count.abs_diff(2_000) < 430),
            "{counts:?}"
        );
    }
}
