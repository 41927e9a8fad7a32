//! The first Wasserstein distance ("earth mover's distance") between two samples.

/// The smallest spread a distance is divided by, so that an almost constant reference does not blow it up.
const MIN_DEVIATION: f64 = 0.001;

/// The area between the two empirical distribution functions of ascending samples, in the unit of the values; `None`
/// when one is empty.
#[must_use]
pub fn wasserstein_distance(reference: &[f64], current: &[f64]) -> Option<f64> {
    if reference.is_empty() || current.is_empty() {
        return None;
    }
    let (n, m) = (reference.len(), current.len());
    let (mut i, mut j, mut area) = (0usize, 0usize, 0.0f64);
    let mut at = reference[0].min(current[0]);
    while i < n || j < m {
        let next = match (reference.get(i), current.get(j)) {
            (Some(r), Some(c)) => r.min(*c),
            (Some(r), None) => *r,
            (None, Some(c)) => *c,
            (None, None) => break,
        };
        let gap = (i as f64 / n as f64 - j as f64 / m as f64).abs();
        area += gap * (next - at);
        at = next;
        while i < n && reference[i] <= next {
            i += 1;
        }
        while j < m && current[j] <= next {
            j += 1;
        }
    }
    Some(area)
}

/// The Wasserstein distance in standard deviations of the reference (population deviation, at least `0.001`).
#[must_use]
pub fn normed_wasserstein_distance(reference: &[f64], current: &[f64]) -> Option<f64> {
    let distance = wasserstein_distance(reference, current)?;
    let count = reference.len() as f64;
    let mean = reference.iter().sum::<f64>() / count;
    let variance = reference.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    Some(distance / variance.sqrt().max(MIN_DEVIATION))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lcg, assert_close, golden_pair, sorted};
    use super::*;

    #[test]
    fn golden_pair_matches_the_reference_values() {
        let (reference, current) = golden_pair();
        assert_close(
            wasserstein_distance(&reference, &current).unwrap(),
            0.099_95,
        );
        assert_close(
            normed_wasserstein_distance(&reference, &current).unwrap(),
            0.346_237_129_551_626_9,
        );
    }

    /// Pinned from scipy 1.17.1, `wasserstein_distance`.
    #[test]
    fn unequal_sizes_match_scipy() {
        for (n, m, shift, expected) in [
            (1, 1, 0.0, 0.350_339_725_147_930_9),
            (7, 4, 0.3, 0.277_967_182_473_678_7),
            (50, 30, 0.2, 0.090_977_332_300_196_04),
            (1437, 64, 0.1, 0.175_943_299_622_475_9),
        ] {
            let mut random = Lcg::new(12_345);
            let reference = sorted((0..n).map(|_| random.next_unit()).collect());
            let current = sorted((0..m).map(|_| random.next_unit() + shift).collect());
            let got = wasserstein_distance(&reference, &current).unwrap();
            assert!((got - expected).abs() < 1e-9, "{n} {m}: {got} {expected}");
        }
    }

    #[test]
    fn constant_and_empty_samples_divide_by_nothing() {
        assert_eq!(wasserstein_distance(&[], &[1.0]), None);
        assert_eq!(wasserstein_distance(&[2.0; 9], &[2.0; 4]), Some(0.0));
        assert_close(
            normed_wasserstein_distance(&[0.0; 9], &[0.5; 4]).unwrap(),
            500.0,
        );
    }
}
