//! Sixteen values at a time, with the same bits from AVX-512, from AVX2 and from plain Rust.
//!
//! Invariants:
//! 1. Every operation of [`Lanes`] is exactly rounded, or moves bits; so a function written with them has the
//!    same bits for every implementation.
//! 2. A sum over many values is sixteen sums, of the values at positions `i`, `i + 16`, …, which
//!    [`Lanes::sum`] adds as a tree: first the upper eight to the lower eight, then four, two, one. What is
//!    missing in the last sixteen counts as zero.
//! 3. Implementations that need instructions are made only by [`dispatch`], which has checked them. No other
//!    code can name them.

use super::InstructionSet;

/// Values in a vector.
pub(super) const LANES: usize = 16;

/// Sixteen values.
pub(super) trait Lanes: Copy {
    /// Sixteen sums in `f64`.
    type Double: Copy;

    /// The same value sixteen times.
    fn splat(value: f32) -> Self;
    /// What is in memory.
    fn load(values: &[f32; LANES]) -> Self;
    /// To memory.
    fn store(self, values: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn subtract(self, other: Self) -> Self;
    fn multiply(self, other: Self) -> Self;
    fn divide(self, other: Self) -> Self;
    fn square_root(self) -> Self;
    /// `self · factor + addend`, rounded once.
    fn multiply_add(self, factor: Self, addend: Self) -> Self;
    /// `if self > other { self } else { other }`: the other one where either is NaN.
    fn max(self, other: Self) -> Self;
    /// `if self < other { self } else { other }`.
    fn min(self, other: Self) -> Self;
    /// `if self < limit { below } else { otherwise }`.
    fn if_less(self, limit: Self, below: Self, otherwise: Self) -> Self;
    /// `if self is NaN { self } else { otherwise }`.
    fn if_nan(self, otherwise: Self) -> Self;
    /// Without the sign.
    fn magnitude(self) -> Self;
    /// With the sign of another.
    fn with_sign_of(self, other: Self) -> Self;
    /// `self · 2^n`, where the lowest bits of `shifted` hold `n` (see [`super::elementary`]); the result must
    /// be a normal number.
    fn scaled_by(self, shifted: Self) -> Self;
    /// A normal, positive number as mantissa in [√½, √2) and exponent.
    fn mantissa_and_exponent(self) -> (Self, Self);
    fn double_zero() -> Self::Double;
    /// `sum + self²`, in `f64`: the square of an `f32` is exact there.
    fn add_square(self, sum: Self::Double) -> Self::Double;
    fn double_lanes(sum: Self::Double) -> [f64; LANES];

    /// Loads up to sixteen values, and zeros behind them.
    #[inline(always)]
    fn load_part(values: &[f32]) -> Self {
        let mut all = [0.0; LANES];
        all[..values.len()].copy_from_slice(values);
        Self::load(&all)
    }

    /// Stores the first of the values.
    #[inline(always)]
    fn store_part(self, values: &mut [f32]) {
        let mut all = [0.0; LANES];
        self.store(&mut all);
        values.copy_from_slice(&all[..values.len()]);
    }

    /// The sum of all sixteen, as invariant 2 says.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        tree_sum(lanes)
    }

    /// The largest of all sixteen, by [`Lanes::max`].
    #[inline(always)]
    fn largest(self) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        let mut largest = lanes[0];
        for value in &lanes[1..] {
            largest = if largest > *value { largest } else { *value };
        }
        largest
    }
}

/// The sum of sixteen numbers as a tree.
#[inline(always)]
pub(super) fn tree_sum<T: Copy + std::ops::Add<Output = T>>(mut lanes: [T; LANES]) -> T {
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] = lanes[lane] + lanes[lane + width];
        }
    }
    lanes[0]
}

/// The first values as sixteens, and the fewer than sixteen behind them.
#[inline(always)]
pub(super) fn sixteens(values: &[f32]) -> (&[[f32; LANES]], &[f32]) {
    values.as_chunks::<LANES>()
}

/// As [`sixteens`], to write to.
#[inline(always)]
pub(super) fn sixteens_mut(values: &mut [f32]) -> (&mut [[f32; LANES]], &mut [f32]) {
    values.as_chunks_mut::<LANES>()
}

/// Something to do with vectors of any implementation. `run` must be `#[inline(always)]`, and so must be
/// what it calls, so that it is compiled with the vectors' instructions.
pub(super) trait LaneOperation {
    type Output;
    fn run<L: Lanes>(self) -> Self::Output;
}

/// Does it with these instructions.
pub(super) fn dispatch<O: LaneOperation>(instructions: InstructionSet, operation: O) -> O::Output {
    assert!(
        instructions.is_available(),
        "{instructions:?} on a CPU without"
    );
    match instructions {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the CPU has them, as was just asserted.
        InstructionSet::Avx512 => unsafe { x86::with_avx512(operation) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        InstructionSet::Avx2 => unsafe { x86::with_avx2(operation) },
        _ => operation.run::<Plain>(),
    }
}

/// Sixteen values in an array.
#[derive(Clone, Copy)]
struct Plain([f32; LANES]);

impl Plain {
    #[inline(always)]
    fn zip(self, other: Self, with: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| {
            with(self.0[lane], other.0[lane])
        }))
    }
}

impl Lanes for Plain {
    type Double = [f64; LANES];

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        Self(*values)
    }
    #[inline(always)]
    fn store(self, values: &mut [f32; LANES]) {
        *values = self.0;
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn subtract(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn multiply(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn divide(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn square_root(self) -> Self {
        Self(self.0.map(f32::sqrt))
    }
    #[inline(always)]
    fn multiply_add(self, factor: Self, addend: Self) -> Self {
        let fused = |lane: usize| self.0[lane].mul_add(factor.0[lane], addend.0[lane]);
        Self(std::array::from_fn(fused))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn if_less(self, limit: Self, below: Self, otherwise: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            if self.0[lane] < limit.0[lane] {
                below.0[lane]
            } else {
                otherwise.0[lane]
            }
        }))
    }
    #[inline(always)]
    fn if_nan(self, otherwise: Self) -> Self {
        self.zip(otherwise, |a, b| if a.is_nan() { a } else { b })
    }
    #[inline(always)]
    fn magnitude(self) -> Self {
        Self(self.0.map(f32::abs))
    }
    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        self.zip(other, f32::copysign)
    }
    #[inline(always)]
    fn scaled_by(self, shifted: Self) -> Self {
        self.zip(shifted, |value, n| {
            f32::from_bits(value.to_bits().wrapping_add(n.to_bits() << 23))
        })
    }
    #[inline(always)]
    fn mantissa_and_exponent(self) -> (Self, Self) {
        let exponent = |value: f32| (value.to_bits().wrapping_sub(ROOT_HALF) as i32) >> 23;
        let mantissa = |value: f32| {
            f32::from_bits(value.to_bits().wrapping_sub((exponent(value) as u32) << 23))
        };
        let exponents = self.0.map(|value| exponent(value) as f32);
        (Self(self.0.map(mantissa)), Self(exponents))
    }
    #[inline(always)]
    fn double_zero() -> Self::Double {
        [0.0; LANES]
    }
    #[inline(always)]
    fn add_square(self, sum: Self::Double) -> Self::Double {
        std::array::from_fn(|lane| sum[lane] + f64::from(self.0[lane]) * f64::from(self.0[lane]))
    }
    #[inline(always)]
    fn double_lanes(sum: Self::Double) -> [f64; LANES] {
        sum
    }
}

/// The bits of √½.
const ROOT_HALF: u32 = 0x3f35_04f3;

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts values that are hard to treat alike through every operation.
    struct Everything<'a>(&'a [f32; LANES], &'a [f32; LANES]);

    impl LaneOperation for Everything<'_> {
        type Output = Vec<u64>;

        #[inline(always)]
        fn run<L: Lanes>(self) -> Vec<u64> {
            let (a, b) = (L::load(self.0), L::load(self.1));
            let (mantissa, exponent) = a.mantissa_and_exponent();
            let results = [
                a.add(b),
                a.subtract(b),
                a.multiply(b),
                a.divide(b),
                a.square_root(),
                a.multiply_add(b, L::splat(0.1)),
                a.max(b),
                a.min(b),
                a.if_less(b, L::splat(1.0), a),
                a.if_nan(b),
                a.magnitude(),
                a.with_sign_of(b),
                L::splat(1.5).scaled_by(L::splat(12_582_912.0 - 3.0)),
                mantissa,
                exponent,
                L::load_part(&self.0[..5]),
            ];
            // Which NaN comes out is not promised: signs and payloads differ between instructions.
            let bits_of = |value: f32| match value.is_nan() {
                true => u64::MAX,
                false => u64::from(value.to_bits()),
            };
            let mut bits = vec![bits_of(a.sum()), bits_of(a.largest())];
            for result in results {
                let mut lanes = [0.0; LANES];
                result.store(&mut lanes);
                bits.extend(lanes.map(bits_of));
            }
            let squares = b.add_square(a.add_square(L::double_zero()));
            bits.extend(L::double_lanes(squares).map(|value| match value.is_nan() {
                true => u64::MAX,
                false => value.to_bits(),
            }));
            bits
        }
    }

    #[test]
    fn all_implementations_agree_in_every_bit() {
        let hard = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            0.1,
            -3.7e8,
            1e-40,
            f32::MAX,
            f32::MIN_POSITIVE,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::from_bits(ROOT_HALF - 1),
            f32::from_bits(ROOT_HALF),
            1.999_999_9,
            65504.0,
        ];
        for turn in 0..LANES {
            let mut other = hard;
            other.rotate_left(turn);
            let expected = dispatch(InstructionSet::Scalar, Everything(&hard, &other));
            for set in InstructionSet::ALL {
                if set.is_available() {
                    let found = dispatch(set, Everything(&hard, &other));
                    assert_eq!(found, expected, "{set:?}, turn {turn}");
                }
            }
        }
    }

    #[test]
    fn sums_are_trees_over_lanes() {
        let values: [f32; LANES] = std::array::from_fn(|lane| 10f32.powi(lane as i32 - 8));
        let eight: [f32; 8] = std::array::from_fn(|lane| values[lane] + values[lane + 8]);
        let four: [f32; 4] = std::array::from_fn(|lane| eight[lane] + eight[lane + 4]);
        let expected = (four[0] + four[2]) + (four[1] + four[3]);
        assert_eq!(tree_sum(values).to_bits(), expected.to_bits());
    }
}
