//! The two-sample Kolmogorov-Smirnov test.
//!
//! The statistic is computed in integers. The p-value is exact up to [`EXACT_WORK_MAX`] lattice points and the limit
//! distribution of Kolmogorov beyond. The exact value counts, by Hodges' recurrence (1958), the share of monotone
//! lattice paths that leave the band of width `D`; summing the paths that *leave* keeps full relative precision for the
//! tiny p-values that matter, where `1 − P(stay)` would cancel.

/// Lattice points (`n·m`) up to which the p-value is exact. The recurrence costs a few nanoseconds a point, so this bounds
/// one column to a few milliseconds; beyond it the limit distribution is off by a few per cent of the p-value.
const EXACT_WORK_MAX: u64 = 1_000_000;

/// The outcome of a two-sample Kolmogorov-Smirnov test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KolmogorovSmirnov {
    /// The largest distance between the two empirical distribution functions, in `[0, 1]`.
    pub statistic: f64,
    /// The two-sided probability of a distance at least this large if both samples share a distribution.
    pub p_value: f64,
}

/// Tests whether two ascending samples come from one continuous distribution; `None` when one is empty.
#[must_use]
pub fn kolmogorov_smirnov(reference: &[f64], current: &[f64]) -> Option<KolmogorovSmirnov> {
    if reference.is_empty() || current.is_empty() {
        return None;
    }
    let (n, m) = (reference.len() as u64, current.len() as u64);
    let distance = scaled_distance(reference, current);
    let statistic = distance as f64 / (n * m) as f64;
    let p_value = if distance == 0 {
        1.0
    } else if n * m <= EXACT_WORK_MAX {
        exact_p_value(n, m, distance)
    } else {
        let effective = n as f64 * m as f64 / (n + m) as f64;
        limit_p_value(effective.sqrt() * statistic)
    };
    Some(KolmogorovSmirnov { statistic, p_value })
}

/// The statistic times `n·m`, an integer: the largest `|i·m − j·n|` where `i` and `j` count values up to a point.
fn scaled_distance(reference: &[f64], current: &[f64]) -> u64 {
    let (n, m) = (reference.len(), current.len());
    let (mut i, mut j, mut largest) = (0usize, 0usize, 0u64);
    while i < n && j < m {
        // All ties pass together: the distribution functions are compared only between distinct values.
        let value = reference[i].min(current[j]);
        while i < n && reference[i] <= value {
            i += 1;
        }
        while j < m && current[j] <= value {
            j += 1;
        }
        largest = largest.max((i as u64 * m as u64).abs_diff(j as u64 * n as u64));
    }
    largest
}

/// The share of the `C(n+m, n)` monotone paths from `(0, 0)` to `(n, m)` that touch `|i·m − j·n| ≥ distance`.
///
/// Only the lattice points within the band are visited: from all others the share is 1. Samples of one distribution have a
/// narrow band, so the usual window costs a small part of `n·m`.
fn exact_p_value(n: u64, m: u64, distance: u64) -> f64 {
    // The shorter side is the row, which bounds the memory to the smaller sample.
    let (n, m) = (n.max(m), n.min(m));
    // The first and the last `j` within the band beside `i`.
    let first = |i: u64| {
        (i * m)
            .checked_sub(distance)
            .map_or(0, |below| below / n + 1)
    };
    let last = |i: u64| m.min((i * m + distance - 1) / n);
    // 1 / (i + j): a division for each point took most of the time.
    let inverses: Vec<f64> = (0..=n + m).map(|total| 1.0 / total as f64).collect();
    let mut row = vec![1.0f64; m as usize + 1];
    row[..=last(0) as usize].fill(0.0);
    for i in 1..=n {
        let start = first(i);
        if let Some(left) = start.checked_sub(1) {
            // With m ≤ n the band leaves behind one point of a row at the most.
            row[left as usize] = 1.0;
        }
        let mut below = if start == 0 { 0.0 } else { 1.0 };
        let (from, to) = (start.max(1), last(i));
        let inverses = &inverses[(i + from) as usize..];
        let points = row[from as usize..=to as usize].iter_mut();
        for ((share, inverse), j) in points.zip(inverses).zip(from..) {
            // A random path through (i, j) came from the left with i/(i+j), from below with j/(i+j). What depends on the
            // point below stands last: the others do not wait for it.
            below = *share * (i as f64 * inverse) + below * (j as f64 * inverse);
            *share = below;
        }
    }
    row[m as usize].clamp(0.0, 1.0)
}

/// Kolmogorov's limit distribution, `P(K ≥ z)`.
fn limit_p_value(z: f64) -> f64 {
    if z <= 0.0 {
        return 1.0;
    }
    if z < 1.0 {
        // The theta transform: for small z the alternating series needs many terms that cancel.
        let base = -std::f64::consts::PI.powi(2) / (8.0 * z * z);
        let sum: f64 = (0..8)
            .map(|k| f64::from(2 * k + 1))
            .map(|odd| (base * odd * odd).exp())
            .sum();
        return (1.0 - (2.0 * std::f64::consts::PI).sqrt() / z * sum).clamp(0.0, 1.0);
    }
    let mut sum = 0.0;
    for k in 1..=20 {
        let term = (-2.0 * f64::from(k * k) * z * z).exp();
        sum += if k % 2 == 1 { term } else { -term };
        if term < 1e-300 {
            break;
        }
    }
    (2.0 * sum).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lcg, assert_close, golden_pair, sorted};
    use super::*;

    #[test]
    fn golden_pair_matches_the_reference_values() {
        let (reference, current) = golden_pair();
        let test = kolmogorov_smirnov(&reference, &current).unwrap();
        assert_eq!(test.statistic, 0.137);
        assert_close(test.p_value, 1.343_315_199_398_306_6e-8);
    }

    /// Pinned from scipy 1.17.1, `ks_2samp(x, y, method="exact")`.
    #[test]
    fn exact_p_values_match_scipy() {
        for (n, m, shift, statistic, p_value) in [
            (1, 1, 0.0, 1.0, 1.0),
            (5, 5, 0.3, 0.6, 0.357_142_857_142_857_15),
            (7, 4, 0.3, 0.607_142_857_142_857_1, 0.212_121_212_121_212_13),
            (10, 10, 0.0, 0.4, 0.417_523_652_817_770_4),
            (50, 30, 0.2, 0.2, 0.395_886_084_587_247_6),
            (100, 64, 0.0, 0.099_375, 0.790_625_580_131_801_5),
            (200, 200, 0.1, 0.125, 0.087_838_282_671_313_2),
            (
                300,
                1000,
                0.1,
                0.128_666_666_666_666_68,
                0.000_870_543_367_576_486_1,
            ),
            (
                1437,
                64,
                0.1,
                0.272_573_068_893_528_17,
                0.000_163_199_291_324_316,
            ),
        ] {
            let mut random = Lcg::new(12_345);
            let reference = sorted((0..n).map(|_| random.next_unit()).collect());
            let current = sorted((0..m).map(|_| random.next_unit() + shift).collect());
            let test = kolmogorov_smirnov(&reference, &current).unwrap();
            assert_close(test.statistic, statistic);
            assert_close(test.p_value, p_value);
        }
    }

    /// Pinned from scipy 1.17.1, `kstwobign.sf`.
    #[test]
    fn limit_distribution_matches_scipy() {
        assert_close(
            limit_p_value(0.012 * 20_000f64.sqrt()),
            0.006_302_222_999_698_76,
        );
        assert_close(
            limit_p_value(0.137 * 500f64.sqrt()),
            1.411_746_971_716_905_3e-8,
        );
        assert_close(limit_p_value(0.1 * 61f64.sqrt()), 0.575_300_377_326_085_4);
    }

    #[test]
    fn large_samples_use_the_limit_distribution_and_agree_with_the_exact_one() {
        let mut random = Lcg::new(7);
        let reference = sorted((0..5_000).map(|_| random.next_unit()).collect());
        let current = sorted((0..1_000).map(|_| random.next_unit() + 0.04).collect());
        let test = kolmogorov_smirnov(&reference, &current).unwrap();
        let exact = exact_p_value(5_000, 1_000, (test.statistic * 5e6).round() as u64);
        assert!(
            (test.p_value - exact).abs() / exact < 0.05,
            "{test:?} {exact}"
        );
    }

    /// Every point of the lattice, as the recurrence is written down.
    fn share_of_all_points(n: u64, m: u64, distance: u64) -> f64 {
        let mut rows = vec![vec![0.0f64; m as usize + 1]; n as usize + 1];
        for i in 0..=n as usize {
            for j in 0..=m as usize {
                let total = (i + j).max(1) as f64;
                let left = if i > 0 {
                    rows[i - 1][j] * i as f64
                } else {
                    0.0
                };
                let below = if j > 0 {
                    rows[i][j - 1] * j as f64
                } else {
                    0.0
                };
                let is_outside = (i as u64 * m).abs_diff(j as u64 * n) >= distance;
                rows[i][j] = if is_outside {
                    1.0
                } else {
                    (left + below) / total
                };
            }
        }
        rows[n as usize][m as usize]
    }

    #[test]
    fn the_band_holds_all_that_the_share_depends_on() {
        for (n, m) in [(1, 1), (2, 1), (7, 7), (9, 4), (40, 25), (100, 3)] {
            for distance in 1..=n * m {
                for (one, other) in [(n, m), (m, n)] {
                    let share = exact_p_value(one, other, distance);
                    let expected = share_of_all_points(one, other, distance);
                    assert!(
                        (share - expected).abs() <= 1e-13 * expected,
                        "{one}, {other}, {distance}: {share} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn ties_identical_and_empty_samples() {
        assert_eq!(kolmogorov_smirnov(&[], &[1.0]), None);
        assert_eq!(kolmogorov_smirnov(&[1.0], &[]), None);
        let constant = [0.0; 40];
        let test = kolmogorov_smirnov(&constant, &constant[..7]).unwrap();
        assert_eq!((test.statistic, test.p_value), (0.0, 1.0));
        let apart = kolmogorov_smirnov(&[0.0; 6], &[1.0; 6]).unwrap();
        assert_eq!(apart.statistic, 1.0);
        // 2 of the C(12, 6) = 924 paths.
        assert_close(apart.p_value, 2.0 / 924.0);
    }
}
