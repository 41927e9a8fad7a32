//! A digest of what an update has written, which the kernel that writes it computes in the same pass.
//!
//! Invariants:
//! 1. The digest is a sum modulo 2^64 over elements, twice, so that order and division of the work do not show: the
//!    digest of a whole vector is the sum of the digests of its parts.
//! 2. Any one changed value changes it, because a term is a bijection of each value in it. Other differences go unseen
//!    with a probability of about 2^-64. It guards against damage, not against an adversary.

use std::ops::Add;

/// The digest of parameters and both moments of AdamW.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WrittenDigest {
    /// Σ mix(key, parameter, mean).
    pub low: u64,
    /// Σ mix(¬key, square, parameter ⊕ mean).
    pub high: u64,
}

impl Add for WrittenDigest {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            low: self.low.wrapping_add(other.low),
            high: self.high.wrapping_add(other.high),
        }
    }
}

impl WrittenDigest {
    /// The digest of these vectors, whose first element is at `first` in the whole.
    ///
    /// # Panics
    /// If the lengths differ.
    #[must_use]
    pub fn of(first: u64, params: &[f32], means: &[f32], squares: &[f32]) -> Self {
        assert!(
            params.len() == means.len() && params.len() == squares.len(),
            "vectors of different lengths"
        );
        let word = |value: f32| u64::from(value.to_bits());
        let values = params.iter().zip(means).zip(squares);
        (first..)
            .zip(values)
            .fold(Self::default(), |sum, (index, ((p, m), s))| {
                let key = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let (p, m, s) = (word(*p), word(*m), word(*s));
                let term = Self {
                    low: mix(key ^ (p | m << 32)),
                    high: mix(!key ^ (s | (p ^ m) << 32)),
                };
                sum + term
            })
    }
}

/// A bijection of 64 bits in which every bit reaches most others.
fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let word = (word ^ word >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word ^ word >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::test_values::normal;

    #[test]
    fn parts_add_up_and_any_flipped_bit_shows() {
        let vectors = ["p", "m", "s"].map(|name| normal(name, 301, 1.0));
        let of = |vectors: &[Vec<f32>; 3], range: std::ops::Range<usize>| {
            let [p, m, s] = vectors.each_ref().map(|vector| &vector[range.clone()]);
            WrittenDigest::of(range.start as u64, p, m, s)
        };
        let whole = of(&vectors, 0..301);
        assert_eq!(of(&vectors, 0..97) + of(&vectors, 97..301), whole);
        for vector in 0..3 {
            for index in [0, 150, 300] {
                for bit in 0..32 {
                    let mut changed = vectors.clone();
                    let value = &mut changed[vector][index];
                    *value = f32::from_bits(value.to_bits() ^ 1 << bit);
                    assert_ne!(of(&changed, 0..301), whole, "{vector} {index} {bit}");
                }
            }
        }
        let mut swapped = vectors.clone();
        swapped[0].swap(3, 4);
        assert_ne!(of(&swapped, 0..301), whole);
    }
}
