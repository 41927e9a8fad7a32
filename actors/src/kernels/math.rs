//! Elementary functions whose bits do not depend on the machine's maths library.
//!
//! `f64::exp`, `ln`, `cos` and `powi` call the platform's libm or a compiler intrinsic, whose last bit
//! differs between C libraries and CPU variants. Here each function is one fixed sequence of IEEE
//! additions, multiplications and divisions, which every conforming CPU rounds alike; Rust never
//! contracts them into fused operations. Accuracy is about one unit in the last place of an `f64`, far
//! finer than the `f32` values made from them.

use std::f64::consts::{FRAC_PI_2, LOG2_E, SQRT_2};

/// High part of ln 2: its low 21 bits are zero, so that `k * LN_2_HIGH` is exact for exponents `k`.
const LN_2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
/// ln 2 minus [`LN_2_HIGH`]; both as in FreeBSD's msun.
const LN_2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);

/// e to the power `x`; 0 below −708 (where the result would be subnormal), infinity above 709.
pub fn exp(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    if x < -708.0 {
        return 0.0;
    }
    if x > 709.0 {
        return f64::INFINITY;
    }
    // x = k ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series, whose 14th term is below 1e-17.
    let k = (x * LOG2_E).round();
    let r = (x - k * LN_2_HIGH) - k * LN_2_LOW;
    let mut sum = 1.0;
    for n in (1..=13).rev() {
        sum = 1.0 + sum * r / f64::from(n);
    }
    sum * power_of_two(k as i64)
}

/// Natural logarithm of a positive, finite, normal `x`; NaN for anything else.
pub fn ln(x: f64) -> f64 {
    if !x.is_normal() || x < 0.0 {
        return f64::NAN;
    }
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if mantissa > SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln m = 2 artanh s with s = (m − 1)/(m + 1), |s| < 0.172: the term in s^23 is below 1e-18.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let s_squared = s * s;
    let mut series = 0.0;
    for n in (0..=10).rev() {
        series = 1.0 / f64::from(2 * n + 1) + series * s_squared;
    }
    let k = exponent as f64;
    k * LN_2_HIGH + (2.0 * s * series + k * LN_2_LOW)
}

/// Cosine of an angle given in turns (1.0 is a full circle), for |turns| below 2^50.
pub fn cos_turns(turns: f64) -> f64 {
    let quarters = turns * 4.0;
    let nearest = quarters.round();
    let angle = (quarters - nearest) * FRAC_PI_2;
    // |angle| <= π/4: the first omitted terms are below 1e-17.
    let square = angle * angle;
    let (mut cosine, mut sine) = (1.0, 1.0);
    for n in (1..=8).rev() {
        cosine = 1.0 - cosine * square / f64::from((2 * n - 1) * (2 * n));
        sine = 1.0 - sine * square / f64::from((2 * n) * (2 * n + 1));
    }
    sine *= angle;
    match (nearest as i64).rem_euclid(4) {
        0 => cosine,
        1 => -sine,
        2 => -cosine,
        _ => sine,
    }
}

/// `base` to a whole power, by repeated squaring.
pub fn power(base: f64, exponent: u64) -> f64 {
    let (mut result, mut square, mut rest) = (1.0, base, exponent);
    while rest > 0 {
        if rest & 1 == 1 {
            result *= square;
        }
        square *= square;
        rest >>= 1;
    }
    result
}

fn power_of_two(exponent: i64) -> f64 {
    // Callers keep the exponent within −1022..=1023; 1024 arises just below the overflow limit.
    if exponent > 1023 {
        return 2.0 * f64::from_bits((1023 + 1023) << 52);
    }
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(ours: f64, reference: f64, tolerance: f64) {
        let scale = reference.abs().max(1e-300);
        assert!(
            (ours - reference).abs() <= tolerance * scale,
            "{ours} != {reference}"
        );
    }

    #[test]
    fn agrees_with_the_standard_library_to_a_few_units_in_the_last_place() {
        for i in -7000..7000 {
            let x = f64::from(i) * 0.1;
            close(exp(x), x.exp(), 4e-16);
        }
        for i in 1..5000 {
            let x = f64::from(i) * 0.013;
            assert!(
                (ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs().max(1.0),
                "ln {x}"
            );
            close(ln(1.0 / (x * 1e9)), (1.0 / (x * 1e9)).ln(), 4e-16);
            let turns = f64::from(i) * 0.0037 - 5.0;
            let reference = (turns * std::f64::consts::TAU).cos();
            assert!((cos_turns(turns) - reference).abs() < 2e-14, "cos {turns}");
        }
        close(power(0.999, 1234), 0.999f64.powi(1234), 1e-13);
    }

    #[test]
    fn edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-800.0), 0.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp(710.0), f64::INFINITY);
        assert!(exp(f64::NAN).is_nan() && ln(0.0).is_nan() && ln(-1.0).is_nan());
        assert_eq!(ln(1.0), 0.0);
        assert_eq!([0.0, 0.5, 1.0].map(cos_turns), [1.0, -1.0, 1.0]);
        assert_eq!(power(0.9, 0), 1.0);
        assert_eq!(power(2.0, 10), 1024.0);
    }
}
