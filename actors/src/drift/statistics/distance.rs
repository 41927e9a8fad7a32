//! The first Wasserstein distance ("earth mover's distance") between two samples.

/// The smallest spread a distance is divided by, so that an almost constant reference does not blow it up.
const MIN_DEVIATION: f64 = 0.001;

/// The area between the two empirical distribution functions of ascending samples, in the unit of the values; `None`
/// when one is empty.
#[must_use]
pub fn wasserstein_distance(reference: &[f64], current: &[f64]) -> Option<f64> {
    let once = |value: &f64| (*value, 1);
    distance(reference.iter().map(once), current.iter().map(once))
}

/// The same of ascending points that stand for as many values as their second number says. It is exact for the points; where they are a
/// sketch's, [`DdSketch::distance_error_max`](crate::drift::sketches::DdSketch::distance_error_max) says by how much it may
/// be off for the values.
#[must_use]
pub fn wasserstein_distance_of_points(
    reference: &[(f64, u64)],
    current: &[(f64, u64)],
) -> Option<f64> {
    distance(reference.iter().copied(), current.iter().copied())
}

/// Points of the one and points of the other, by value.
fn distance(
    reference: impl Iterator<Item = (f64, u64)> + Clone,
    current: impl Iterator<Item = (f64, u64)> + Clone,
) -> Option<f64> {
    let total = |points: &mut dyn Iterator<Item = (f64, u64)>| points.map(|(_, n)| n).sum::<u64>();
    let n = total(&mut reference.clone());
    let m = total(&mut current.clone());
    if n == 0 || m == 0 {
        return None;
    }
    let (mut reference, mut current) = (reference.peekable(), current.peekable());
    let (mut i, mut j, mut area) = (0u64, 0u64, 0.0f64);
    let mut at: Option<f64> = None;
    loop {
        let next = match (reference.peek(), current.peek()) {
            (Some((r, _)), Some((c, _))) => r.min(*c),
            (Some((r, _)), None) => *r,
            (None, Some((c, _))) => *c,
            (None, None) => return Some(area),
        };
        let gap = (i as f64 / n as f64 - j as f64 / m as f64).abs();
        area += gap * (next - at.unwrap_or(next));
        at = Some(next);
        while let Some((_, count)) = reference.next_if(|(value, _)| *value <= next) {
            i += count;
        }
        while let Some((_, count)) = current.next_if(|(value, _)| *value <= next) {
            j += count;
        }
    }
}

/// What chance does to the distance between a distribution and samples of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chance {
    /// `∫ √(F(1 − F))`: a sample of `n` is on average no farther than this divided by `√n`.
    spread: f64,
    deviation: f64,
}

impl Chance {
    /// That of the distribution which ascending points and their standard deviation describe.
    #[must_use]
    pub fn of(points: &[(f64, u64)], deviation: f64) -> Self {
        let total = points.iter().map(|(_, count)| count).sum::<u64>() as f64;
        let (mut below, mut spread) = (0u64, 0.0);
        for pair in points.windows(2) {
            below += pair[0].1;
            let share = below as f64 / total;
            spread += (share * (1.0 - share)).sqrt() * (pair[1].0 - pair[0].0);
        }
        Chance { spread, deviation }
    }

    /// At most how probable a distance this large is between samples of so many rows of the one distribution.
    ///
    /// By Jensen's inequality their mean distance is at most `spread · s`, where `s = √(1/n + 1/m)`. A distance is a supremum over functions
    /// of slope one, whose means have deviations of at most `deviation · s`; in the limit of many rows they are normal, and such
    /// a supremum exceeds its mean by `t` with a probability of at most `exp(−t² / 2(deviation · s)²)` (Borell, 1975).
    #[must_use]
    pub fn p_value_max(&self, distance: f64, reference_rows: u64, current_rows: u64) -> f64 {
        let scale = (1.0 / reference_rows as f64 + 1.0 / current_rows as f64).sqrt();
        let excess = distance - self.spread * scale;
        if excess <= 0.0 {
            return 1.0;
        }
        let deviations = excess / (self.deviation * scale);
        (-deviations * deviations / 2.0).exp()
    }
}

/// The Wasserstein distance in standard deviations of the reference (population deviation, at least `0.001`).
#[must_use]
pub fn normed_wasserstein_distance(reference: &[f64], current: &[f64]) -> Option<f64> {
    let distance = wasserstein_distance(reference, current)?;
    Some(distance / norm(standard_deviation(reference)))
}

/// What a distance is divided by to be one in standard deviations.
#[must_use]
pub fn norm(deviation: f64) -> f64 {
    deviation.max(MIN_DEVIATION)
}

/// The standard deviation of all values there are, as of a population.
#[must_use]
pub fn standard_deviation(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    variance.sqrt()
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

    /// Weights are repetitions, to the last bit that matters.
    #[test]
    fn points_with_weights_are_values_that_repeat() {
        let mut random = Lcg::new(9);
        for _ in 0..50 {
            let mut sample = |count: usize| {
                let values = sorted((0..count).map(|_| random.next_unit()).collect());
                let weighted = values.into_iter().map(|x| (x, 1 + (x * 97.0) as u64 % 5));
                weighted.collect::<Vec<_>>()
            };
            let (reference, current) = (sample(300), sample(40));
            let repeat = |points: &[(f64, u64)]| -> Vec<f64> {
                let one = |(x, n): &(f64, u64)| std::iter::repeat_n(*x, *n as usize);
                points.iter().flat_map(one).collect()
            };
            let exact = wasserstein_distance(&repeat(&reference), &repeat(&current)).unwrap();
            let weighted = wasserstein_distance_of_points(&reference, &current).unwrap();
            assert!((exact - weighted).abs() <= 1e-9, "{exact} {weighted}");
        }
    }

    /// The bound holds for samples of one distribution, and is no excuse for half a deviation.
    #[test]
    fn chance_explains_samples_of_the_same_and_no_others() {
        let mut random = Lcg::new(3);
        let mut sample = |count: usize, shift: f64| {
            let value = |_| (0..12).map(|_| random.next_unit()).sum::<f64>() - 6.0 + shift;
            sorted((0..count).map(value).collect())
        };
        let reference = sample(5_000, 0.0);
        let points: Vec<(f64, u64)> = reference.iter().map(|x| (*x, 1)).collect();
        let chance = Chance::of(&points, standard_deviation(&reference));
        let mut p_value = |rows: usize, shift: f64| {
            let current = sample(rows, shift);
            let distance = wasserstein_distance(&reference, &current).unwrap();
            chance.p_value_max(distance, 5_000, rows as u64)
        };
        for rows in [20, 200, 2_000] {
            let seldom = (0..200).filter(|_| p_value(rows, 0.0) <= 0.05).count();
            assert!(seldom <= 10, "{rows}: {seldom} of 200");
        }
        let found = (0..50).filter(|_| p_value(200, 0.5) <= 0.05).count();
        assert!(found >= 48, "{found} of 50");
        let constant = Chance::of(&[(1.0, 9)], 0.0);
        assert_eq!(constant.p_value_max(0.0, 9, 9), 1.0);
        assert_eq!(constant.p_value_max(0.1, 9, 9), 0.0);
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
