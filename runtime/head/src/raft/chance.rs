//! What differs from one life of a head to the next, in one place, so that a simulation can say
//! what it is.
//!
//! Invariant: no other part of the driver draws a random number.

use rand::RngCore;

/// The randomness of one life of a head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chance {
    /// Told by no other life of any head's process.
    pub(crate) life: u64,
    /// How long this head waits for a leader.
    pub(crate) elections: ElectionTimeouts,
}

/// Who chooses the election timeouts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ElectionTimeouts {
    /// raft does, anew in each term.
    Drawn,
    /// They are a function of this seed, the member and the term.
    Pinned {
        /// The seed.
        seed: u64,
    },
}

impl Chance {
    /// That of a real process.
    pub(crate) fn drawn() -> Self {
        Chance {
            life: rand::rng().next_u64(),
            elections: ElectionTimeouts::Drawn,
        }
    }
}

impl ElectionTimeouts {
    /// The timeout in ticks, from `election_ticks` to just below twice that; `None` where raft
    /// chooses.
    pub(super) fn ticks(self, member: u64, term: u64, election_ticks: usize) -> Option<usize> {
        let ElectionTimeouts::Pinned { seed } = self else {
            return None;
        };
        let mixed = mix(mix(mix(seed) ^ member) ^ term);
        let spread = u64::try_from(election_ticks)
            .expect("an election takes some ticks")
            .max(1);
        let extra = usize::try_from(mixed % spread).expect("it is below a count of ticks");
        Some(election_ticks + extra)
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on every
/// bit of the input.
fn mix(value: u64) -> u64 {
    let mut mixed = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_timeouts_repeat_differ_and_stay_within_bounds() {
        let timeouts = ElectionTimeouts::Pinned { seed: 7 };
        let drawn: Vec<usize> = (1..=5)
            .flat_map(|member| (1..=20).map(move |term| (member, term)))
            .map(|(member, term)| timeouts.ticks(member, term, 16).unwrap())
            .collect();
        assert!(
            drawn.iter().all(|ticks| (16..32).contains(ticks)),
            "{drawn:?}"
        );
        let distinct: std::collections::BTreeSet<_> = drawn.iter().collect();
        assert!(distinct.len() > 8, "{drawn:?}");
        assert_eq!(timeouts.ticks(1, 1, 16), Some(drawn[0]));
        assert_eq!(ElectionTimeouts::Drawn.ticks(1, 1, 16), None);
    }
}
