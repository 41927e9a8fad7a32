//! `exp`, `ln`, `tanh` and GELU of many `f32` values, as polynomials with one order of operations.
//!
//! Accuracy, as the tests show against `f64`: `exp` and `ln` within 2 units in the last place, `tanh` within 3.
//! Their polynomials are those of Moshier's Cephes library, evaluated with fused multiply-adds. The error function, a quotient of
//! polynomials, is within 5e-7, and either GELU within 1e-6, relative to the larger of the argument and 1.

use super::division::{Shared, divide};
use super::lanes::{LANES, LaneOperation, Lanes, dispatch, sixteens, sixteens_mut};
use super::{Execution, math};

/// Adding it rounds a number below 2^22 to a whole one, which the sum's lowest bits then hold.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts: the product of the first with a whole exponent is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// e to it is the smallest normal number; below, `exp` is zero.
const EXP_MIN: f32 = -87.336_54;
/// Above it, `exp` is infinite.
const EXP_MAX: f32 = 88.722_83;

/// Horner's scheme, from the highest coefficient.
#[inline(always)]
fn polynomial<L: Lanes, const N: usize>(x: L, coefficients: [f32; N]) -> L {
    let mut sum = L::splat(coefficients[0]);
    for coefficient in &coefficients[1..] {
        sum = sum.multiply_add(x, L::splat(*coefficient));
    }
    sum
}

/// e to the power `x`; 0 below −87.33 (where it would be subnormal), infinity above 88.72.
#[inline(always)]
pub(super) fn exp<L: Lanes>(x: L) -> L {
    let within = x.max(L::splat(EXP_MIN)).min(L::splat(EXP_MAX));
    let shifted = within.multiply_add(L::splat(std::f32::consts::LOG2_E), L::splat(ROUNDER));
    let n = shifted.subtract(L::splat(ROUNDER));
    let r = n.multiply_add(L::splat(-LN_2_HIGH), within);
    let r = n.multiply_add(L::splat(-LN_2_LOW), r);
    let series = polynomial(
        r,
        [
            1.987_569_1e-4,
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ],
    );
    let fraction = series.multiply_add(r.multiply(r), r).add(L::splat(1.0));
    let power = fraction.scaled_by(shifted);
    let power = x.if_less(L::splat(EXP_MIN), L::splat(0.0), power);
    let power = L::splat(EXP_MAX).if_less(x, L::splat(f32::INFINITY), power);
    x.if_nan(power)
}

/// Natural logarithm of positive, normal, finite numbers; −∞ of what is smaller, NaN below zero.
#[inline(always)]
pub(super) fn ln<L: Lanes>(x: L) -> L {
    let (mantissa, exponent) = x.mantissa_and_exponent();
    let r = mantissa.subtract(L::splat(1.0));
    let square = r.multiply(r);
    let series = polynomial(
        r,
        [
            7.037_683_6e-2,
            -1.151_461e-1,
            1.167_699_9e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_8e-1,
            2.000_071_5e-1,
            -2.499_999_4e-1,
            3.333_333e-1,
        ],
    );
    let tail = series.multiply(r).multiply(square);
    let tail = exponent.multiply_add(L::splat(LN_2_LOW), tail);
    let tail = square.multiply_add(L::splat(-0.5), tail);
    let sum = exponent.multiply_add(L::splat(LN_2_HIGH), r.add(tail));
    let sum = x.if_less(
        L::splat(f32::MIN_POSITIVE),
        L::splat(f32::NEG_INFINITY),
        sum,
    );
    let sum = x.if_less(L::splat(0.0), L::splat(f32::NAN), sum);
    let sum = L::splat(f32::MAX).if_less(x, x, sum);
    x.if_nan(sum)
}

/// Hyperbolic tangent.
#[inline(always)]
pub(super) fn tanh<L: Lanes>(x: L) -> L {
    let size = x.magnitude();
    let square = x.multiply(x);
    let series = polynomial(
        square,
        [
            -5.704_988_7e-3,
            2.063_909e-2,
            -5.373_971_6e-2,
            1.333_144_2e-1,
            -3.333_328e-1,
        ],
    );
    let near = series.multiply(square).multiply_add(x, x);
    let power = exp(size.add(size)).add(L::splat(1.0));
    let far = L::splat(1.0).subtract(L::splat(2.0).divide(power));
    let result = size.if_less(L::splat(0.625), near, far.with_sign_of(x));
    x.if_nan(result)
}

/// √(2/π), and the cubic's factor, of GELU's usual approximation.
const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// `x · Φ(x)` by its usual approximation, `½x(1 + tanh(√(2/π)(x + 0.044715 x³)))`.
#[inline(always)]
pub(super) fn gelu<L: Lanes>(x: L) -> L {
    let (tanh, _) = gelu_tanh(x);
    let half = x.multiply(L::splat(0.5));
    half.multiply_add(tanh, half)
}

/// The derivative of [`gelu`].
#[inline(always)]
pub(super) fn gelu_slope<L: Lanes>(x: L) -> L {
    let (tanh, square) = gelu_tanh(x);
    let half = L::splat(0.5);
    let inner_slope = square.multiply_add(
        L::splat(3.0 * GELU_CUBIC * GELU_SCALE),
        L::splat(GELU_SCALE),
    );
    let tanh_slope = L::splat(1.0).subtract(tanh.multiply(tanh));
    let bend = x.multiply(half).multiply(tanh_slope);
    bend.multiply_add(inner_slope, tanh.multiply_add(half, half))
}

/// The tangent within GELU, and the square of `x`.
#[inline(always)]
fn gelu_tanh<L: Lanes>(x: L) -> (L, L) {
    let square = x.multiply(x);
    let inner = square
        .multiply_add(L::splat(GELU_CUBIC), L::splat(1.0))
        .multiply(x);
    (tanh(inner.multiply(L::splat(GELU_SCALE))), square)
}

/// Where the error function is ±1 in `f32`.
const ERF_END: f32 = 3.832_507;

/// The error function, as a quotient of polynomials: that of XLA and Eigen.
#[inline(always)]
fn erf<L: Lanes>(x: L) -> L {
    let within = x.max(L::splat(-ERF_END)).min(L::splat(ERF_END));
    let square = within.multiply(within);
    let above = polynomial(
        square,
        [
            -2.726_142_3e-10,
            2.770_681_4e-8,
            -2.101_024e-6,
            -5.692_506_4e-5,
            -7.349_906_3e-4,
            -2.954_6e-3,
            -1.609_603_3e-2,
        ],
    );
    let below = polynomial(
        square,
        [
            -1.456_607_2e-5,
            -2.133_740_6e-4,
            -1.682_827e-3,
            -7.373_329e-3,
            -1.426_473_9e-2,
        ],
    );
    let near = within.multiply(above).divide(below);
    let far = L::splat(1.0).with_sign_of(x);
    x.if_nan(x.magnitude().if_less(L::splat(ERF_END), near, far))
}

/// `x · Φ(x)` by the error function, `½x(1 + erf(x/√2))`.
#[inline(always)]
fn gelu_erf<L: Lanes>(x: L) -> L {
    let half = x.multiply(L::splat(0.5));
    let erf = erf(x.multiply(L::splat(std::f32::consts::FRAC_1_SQRT_2)));
    half.multiply_add(erf, half)
}

/// A function of each value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elementary {
    /// e to the power x: 0 below −87.33, infinity above 88.72.
    Exp,
    /// Natural logarithm: −∞ below the smallest normal number, NaN below zero.
    Ln,
    /// Hyperbolic tangent.
    Tanh,
    /// `½x(1 + tanh(√(2/π)(x + 0.044715 x³)))` (Hendrycks and Gimpel, 2016).
    Gelu,
    /// The derivative of the former.
    GeluSlope,
    /// The error function.
    Erf,
    /// `½x(1 + erf(x/√2))`, which [`Elementary::Gelu`] is an approximation of.
    GeluErf,
}

impl Elementary {
    /// Replaces each value by the function of it.
    pub fn apply(self, execution: Execution, values: &mut [f32]) {
        let count = values.len();
        let shared = Shared::new(values);
        divide(execution, count, 4, LANES, |range| {
            // SAFETY: the ranges do not overlap.
            let part = unsafe { shared.part(range) };
            dispatch(execution.instructions(), Apply(self, part));
        });
    }

    /// The function of sixteen values. Not handed on as a value: a call through `Fn` has none of the instructions that its caller
    /// is compiled with, and then no operation of a vector is inlined.
    #[inline(always)]
    fn of<L: Lanes>(self, x: L) -> L {
        match self {
            Elementary::Exp => exp(x),
            Elementary::Ln => ln(x),
            Elementary::Tanh => tanh(x),
            Elementary::Gelu => gelu(x),
            Elementary::GeluSlope => gelu_slope(x),
            Elementary::Erf => erf(x),
            Elementary::GeluErf => gelu_erf(x),
        }
    }
}

struct Apply<'a>(Elementary, &'a mut [f32]);

impl LaneOperation for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (whole, rest) = sixteens_mut(self.1);
        for sixteen in whole {
            self.0.of(L::load(sixteen)).store(sixteen);
        }
        self.0.of(L::load_part(rest)).store_part(rest);
    }
}

/// The largest value, Σ e^(x − largest), and each e^(x − largest) into `powers`. A NaN is passed over by the
/// largest, and shows in the sum.
#[inline(always)]
pub(super) fn shifted_exponentials<L: Lanes>(row: &[f32], powers: &mut [f32]) -> (f32, f32) {
    let (whole, rest) = sixteens(row);
    let mut largest = L::splat(f32::NEG_INFINITY);
    let mut padded = [f32::NEG_INFINITY; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    for sixteen in whole {
        largest = L::load(sixteen).max(largest);
    }
    largest = L::load(&padded).max(largest);
    let largest = largest.largest();
    let shift = L::splat(largest);
    let mut sum = L::splat(0.0);
    let (whole_powers, rest_powers) = sixteens_mut(powers);
    for (sixteen, power) in whole.iter().zip(whole_powers) {
        let value = exp(L::load(sixteen).subtract(shift));
        value.store(power);
        sum = sum.add(value);
    }
    // What is not there is e^−∞ = 0, unless a NaN or an infinity makes everything NaN.
    let value = exp(L::load(&padded).subtract(shift));
    value.store_part(rest_powers);
    (largest, sum.add(value).sum())
}

/// ln of a positive sum of exponentials, in `f64`.
pub(super) fn log_of_sum(sum: f32) -> f64 {
    math::ln(f64::from(sum))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::execution::all_executions;
    use crate::training::random::{Purpose, Stream};

    /// Units in the last place (of a normal `f32`) between a value and its reference.
    fn units(value: f32, reference: f64) -> f64 {
        let exponent = reference
            .abs()
            .max(f64::from(f32::MIN_POSITIVE))
            .log2()
            .floor();
        (f64::from(value) - reference).abs() / (exponent - 23.0).exp2()
    }

    fn check(function: Elementary, arguments: &[f32], reference: fn(f64) -> f64, units_max: f64) {
        let mut expected: Option<Vec<f32>> = None;
        for execution in all_executions() {
            let mut values = arguments.to_vec();
            function.apply(execution, &mut values);
            for (argument, value) in arguments.iter().zip(&values) {
                let reference = reference(f64::from(*argument));
                let error = units(*value, reference);
                assert!(
                    error <= units_max,
                    "{function:?}({argument:e}) = {value:e}, not {reference:e}: {error} units"
                );
            }
            let expected = expected.get_or_insert_with(|| values.clone());
            let same = expected
                .iter()
                .zip(&values)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{execution:?}");
        }
    }

    fn arguments(low: f32, high: f32) -> Vec<f32> {
        // Not a multiple of sixteen.
        let stream = Stream::new(1, Purpose::Initialise, "arguments", 0);
        let spread = (0..5003).map(|index| low + (high - low) * index as f32 / 5002.0);
        let near_zero = (0..500).map(|index| stream.normal(index, 0) as f32 * 1e-3);
        spread
            .chain(near_zero.filter(|value| (low..=high).contains(value)))
            .collect()
    }

    #[test]
    fn functions_are_within_their_units_of_the_reference_on_every_path() {
        check(Elementary::Exp, &arguments(-87.0, 88.7), f64::exp, 2.0);
        check(Elementary::Ln, &arguments(1e-6, 4.0), f64::ln, 2.0);
        let large: Vec<f32> = arguments(1.0, 88.0).iter().map(|x| x.exp()).collect();
        check(Elementary::Ln, &large, f64::ln, 2.0);
        check(Elementary::Tanh, &arguments(-12.0, 12.0), f64::tanh, 3.0);
    }

    #[test]
    fn gelu_and_its_slope_are_within_a_part_in_a_million() {
        let gelu = |x: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        };
        let arguments = arguments(-10.0, 10.0);
        for execution in all_executions() {
            let mut values = arguments.clone();
            Elementary::Gelu.apply(execution, &mut values);
            let mut slopes = arguments.clone();
            Elementary::GeluSlope.apply(execution, &mut slopes);
            for ((argument, value), slope) in arguments.iter().zip(values).zip(slopes) {
                let x = f64::from(*argument);
                assert!(
                    (f64::from(value) - gelu(x)).abs() < 1e-6 * x.abs().max(1.0),
                    "{x}"
                );
                let difference = (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5;
                assert!((f64::from(slope) - difference).abs() < 2e-6, "slope at {x}");
            }
        }
    }

    /// The error function in `f64`: its series about zero, and further out, where that cancels, a continued fraction.
    fn reference_erf(x: f64) -> f64 {
        let size = x.abs();
        if size < 2.0 {
            let mut term = x;
            let mut sum = x;
            for n in 1..80 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            return sum * 2.0 / std::f64::consts::PI.sqrt();
        }
        let fraction = (1..80)
            .rev()
            .fold(size, |rest, n| size + f64::from(n) / 2.0 / rest);
        (1.0 - (-size * size).exp() / fraction / std::f64::consts::PI.sqrt()).copysign(x)
    }

    #[test]
    fn the_error_function_and_gelu_by_it_are_as_near_as_they_say() {
        assert!((reference_erf(0.5) - 0.520_499_877_813_046_5).abs() < 1e-15);
        assert!((reference_erf(-3.0) + 0.999_977_909_503_001_4).abs() < 1e-15);
        let arguments = arguments(-10.0, 10.0);
        let mut seen = None;
        for execution in all_executions() {
            let mut errors = arguments.clone();
            Elementary::Erf.apply(execution, &mut errors);
            let mut values = arguments.clone();
            Elementary::GeluErf.apply(execution, &mut values);
            for ((argument, erf), value) in arguments.iter().zip(&errors).zip(&values) {
                let x = f64::from(*argument);
                assert!(
                    (f64::from(*erf) - reference_erf(x)).abs() < 5e-7,
                    "{x}: {erf}"
                );
                let gelu = 0.5 * x * (1.0 + reference_erf(x / std::f64::consts::SQRT_2));
                let error = (f64::from(*value) - gelu).abs();
                assert!(error < 1e-6 * x.abs().max(1.0), "{x}: {value} for {gelu}");
            }
            let values: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
            let seen = seen.get_or_insert_with(|| values.clone());
            assert!(*seen == values, "{execution:?}");
        }
    }

    #[test]
    fn edges() {
        for execution in all_executions() {
            let of = |function: Elementary, x: f32| {
                let mut value = [x];
                function.apply(execution, &mut value);
                value[0]
            };
            for (function, argument, expected) in [
                (Elementary::Exp, 0.0, 1.0),
                (Elementary::Exp, -88.0, 0.0),
                (Elementary::Exp, f32::NEG_INFINITY, 0.0),
                (Elementary::Exp, 89.0, f32::INFINITY),
                (Elementary::Exp, f32::INFINITY, f32::INFINITY),
                (Elementary::Ln, 1.0, 0.0),
                (Elementary::Ln, 0.0, f32::NEG_INFINITY),
                (Elementary::Ln, f32::INFINITY, f32::INFINITY),
                (Elementary::Tanh, f32::INFINITY, 1.0),
                (Elementary::Tanh, f32::NEG_INFINITY, -1.0),
                (Elementary::Tanh, 0.0, 0.0),
                (Elementary::Gelu, 0.0, 0.0),
                (Elementary::Erf, f32::NEG_INFINITY, -1.0),
                (Elementary::Erf, 4.0, 1.0),
                (Elementary::GeluErf, 0.0, 0.0),
                (Elementary::GeluErf, 30.0, 30.0),
            ] {
                assert_eq!(of(function, argument), expected, "{function:?} {argument}");
            }
            for function in [
                Elementary::Exp,
                Elementary::Ln,
                Elementary::Tanh,
                Elementary::Gelu,
                Elementary::GeluErf,
            ] {
                assert!(of(function, f32::NAN).is_nan(), "{function:?}");
            }
            assert!(of(Elementary::Ln, -1.0).is_nan());
        }
    }
}
