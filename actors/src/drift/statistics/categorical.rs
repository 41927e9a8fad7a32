//! Comparisons of counts per class, and the correction for asking many questions at once.

use statrs::function::factorial::ln_binomial;
use statrs::function::gamma::gamma_ur;

/// The outcome of a χ² test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChiSquare {
    /// Pearson's statistic.
    pub statistic: f64,
    /// The degrees of freedom.
    pub degrees_of_freedom: u32,
    /// The probability of a statistic at least this large if nothing changed.
    pub p_value: f64,
}

impl ChiSquare {
    fn new(statistic: f64, degrees_of_freedom: u32) -> Self {
        // The survival function of χ² is the upper regularized incomplete gamma function Q(k/2, x/2).
        let p_value = if statistic <= 0.0 {
            1.0
        } else {
            gamma_ur(f64::from(degrees_of_freedom) / 2.0, statistic / 2.0)
        };
        Self {
            statistic,
            degrees_of_freedom,
            p_value,
        }
    }
}

/// Tests observed counts against expected ones, scaled to the same total. `None` with fewer than two classes, unequal
/// lengths, no observation, or a class that is expected never.
#[must_use]
pub fn chi_square_against_expected(expected: &[u64], observed: &[u64]) -> Option<ChiSquare> {
    let expected_total: u64 = expected.iter().sum();
    let observed_total: u64 = observed.iter().sum();
    let usable = expected.len() == observed.len() && expected.len() >= 2;
    if !usable || observed_total == 0 || expected.contains(&0) {
        return None;
    }
    let scale = observed_total as f64 / expected_total as f64;
    let statistic = expected
        .iter()
        .zip(observed)
        .map(|(e, o)| (*e as f64 * scale, *o as f64))
        .map(|(e, o)| (o - e).powi(2) / e)
        .sum();
    Some(ChiSquare::new(statistic, expected.len() as u32 - 1))
}

/// Tests whether two samples of counts share one distribution (a 2×k contingency table, no continuity correction).
/// Classes that neither has seen are left out; `None` when a sample is empty, lengths differ or only one class is left.
#[must_use]
pub fn chi_square_homogeneity(first: &[u64], second: &[u64]) -> Option<ChiSquare> {
    let first_total = first.iter().sum::<u64>() as f64;
    let second_total = second.iter().sum::<u64>() as f64;
    if first.len() != second.len() || first_total == 0.0 || second_total == 0.0 {
        return None;
    }
    let total = first_total + second_total;
    let (mut classes, mut statistic) = (0u32, 0.0);
    for (a, b) in first.iter().zip(second).filter(|(a, b)| **a + **b > 0) {
        classes += 1;
        let class_total = (a + b) as f64;
        for (count, sample_total) in [(*a, first_total), (*b, second_total)] {
            let expected = class_total * sample_total / total;
            statistic += (count as f64 - expected).powi(2) / expected;
        }
    }
    (classes >= 2).then(|| ChiSquare::new(statistic, classes - 1))
}

/// How many of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Share {
    /// Those that count, [`Share::of`] at the most.
    pub hits: u64,
    /// All.
    pub of: u64,
}

impl Share {
    /// The share, in `[0, 1]`; `0` of none.
    #[must_use]
    pub fn ratio(self) -> f64 {
        self.hits as f64 / (self.of as f64).max(1.0)
    }
}

/// The p-value of Fisher's exact test (1922) that a share has grown: the probability that of all hits together so many fall to
/// `after`, or more, if both shares are samples of one. `1` if it has not grown, or one of them is of none.
///
/// It holds for any counts: unlike a normal approximation's it is not too small where few of few are hits.
#[must_use]
pub fn fisher_exact_growth(before: Share, after: Share) -> f64 {
    if after.ratio() <= before.ratio() || before.of == 0 {
        return 1.0;
    }
    let all = Share {
        hits: before.hits + after.hits,
        of: before.of + after.of,
    };
    let logarithm = ln_binomial(after.of, after.hits) + ln_binomial(before.of, before.hits)
        - ln_binomial(all.of, all.hits);
    let mut term = logarithm.exp();
    let mut sum = term;
    // One hit after the other goes over from `before`. Beyond the mean each term is less than the one before it.
    let (mut there, mut here) = (after.hits, before.hits);
    while here > 0 && there < after.of && term > sum * f64::EPSILON {
        let (leaving, arriving) = (here as f64, (after.of - there) as f64);
        here -= 1;
        there += 1;
        term *= leaving * arriving / (there as f64 * (before.of - here) as f64);
        sum += term;
    }
    sum.min(1.0)
}

/// The Jensen-Shannon distance (the square root of the divergence, natural logarithm) of two aligned histograms, in
/// `[0, √ln 2]`; `None` when one counts nothing or lengths differ.
#[must_use]
pub fn jensen_shannon_distance(first: &[u64], second: &[u64]) -> Option<f64> {
    let first_total = first.iter().sum::<u64>() as f64;
    let second_total = second.iter().sum::<u64>() as f64;
    if first.len() != second.len() || first_total == 0.0 || second_total == 0.0 {
        return None;
    }
    let relative_entropy = |share: f64, middle: f64| {
        if share > 0.0 {
            share * (share / middle).ln()
        } else {
            0.0
        }
    };
    let divergence: f64 = first
        .iter()
        .zip(second)
        .map(|(a, b)| (*a as f64 / first_total, *b as f64 / second_total))
        .map(|(p, q)| (p, q, (p + q) / 2.0))
        .map(|(p, q, middle)| relative_entropy(p, middle) + relative_entropy(q, middle))
        .sum();
    // Rounding may leave a divergence of equal histograms a hair below zero.
    Some((divergence / 2.0).max(0.0).sqrt())
}

/// Benjamini and Hochberg's (1995) adjusted p-values, in the order given: rejecting those at most `q` keeps the expected
/// share of false rejections at most `q`.
#[must_use]
pub fn benjamini_hochberg(p_values: &[f64]) -> Vec<f64> {
    let count = p_values.len();
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|a, b| p_values[*a].total_cmp(&p_values[*b]));
    let mut adjusted = vec![1.0; count];
    let mut smallest = 1.0f64;
    for (rank, index) in order.into_iter().enumerate().rev() {
        smallest = smallest.min(p_values[index] * count as f64 / (rank + 1) as f64);
        adjusted[index] = smallest;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use super::super::testing::assert_close;
    use super::*;

    #[test]
    fn golden_counts_match_the_reference_values() {
        let test = chi_square_against_expected(&[500, 300, 200], &[450, 320, 230]).unwrap();
        assert_close(test.statistic, 10.833_333_333_333_332);
        assert_close(test.p_value, 0.004_441_928_425_934_296);
        let test = chi_square_homogeneity(&[500, 300, 200], &[450, 320, 230]).unwrap();
        assert_close(test.statistic, 5.369_763_493_504_955);
        assert_close(test.p_value, 0.068_229_261_871_073_86);
    }

    /// The histograms of the golden pair over their twelve bins.
    #[test]
    fn jensen_shannon_matches_the_reference_value() {
        let first = [96, 96, 96, 95, 96, 96, 96, 95, 96, 96, 42, 0];
        let second = [42, 87, 87, 87, 87, 87, 87, 87, 87, 87, 87, 88];
        let distance = jensen_shannon_distance(&first, &second).unwrap();
        assert_close(distance, 0.202_197_537_245_658_37);
        assert_eq!(jensen_shannon_distance(&first, &first), Some(0.0));
        let apart = jensen_shannon_distance(&[1, 0], &[0, 9]).unwrap();
        assert_close(apart, 2f64.ln().sqrt());
    }

    /// Worked out in fractions; the first is that of the lady who tasted tea, 17/70.
    #[test]
    fn fishers_test_is_exact() {
        let share = |(hits, of)| Share { hits, of };
        for (before, after, expected) in [
            ((1, 4), (3, 4), 0.242_857_142_857_142_85),
            ((0, 100), (1, 50), 0.333_333_333_333_333_3),
            ((200, 2_000), (80, 400), 6.817_009_164_143_885e-8),
            ((15, 300), (48, 50), 3.783_378_321_668_675e-43),
            ((500, 5_000), (60, 400), 0.001_663_148_850_419_053),
        ] {
            let got = fisher_exact_growth(share(before), share(after));
            // Logarithms of large factorials differ.
            assert!((got / expected - 1.0).abs() < 1e-7, "{got}, not {expected}");
            // The other way round the share has not grown.
            assert_eq!(fisher_exact_growth(share(after), share(before)), 1.0);
        }
        assert_eq!(fisher_exact_growth(share((0, 0)), share((5, 5))), 1.0);
        assert_eq!(fisher_exact_growth(share((5, 10)), share((0, 0))), 1.0);
        let million = fisher_exact_growth(share((200_000, 1_000_000)), share((100, 200)));
        assert!((1e-25..1e-15).contains(&million), "{million}");
    }

    /// Pinned from scipy 1.17.1, `chi2.sf`.
    #[test]
    fn survival_function_matches_scipy() {
        for (degrees, statistic, expected) in [
            (1, 3.84, 0.050_043_521_248_705_19),
            (5, 0.5, 0.992_123_293_232_629_6),
            (5, 50.0, 1.385_797_336_700_957_3e-9),
            (63, 70.0, 0.254_367_305_152_719_55),
            (100, 300.0, 7.412_100_857_323_018e-22),
        ] {
            assert_close(ChiSquare::new(statistic, degrees).p_value, expected);
        }
    }

    #[test]
    fn unusable_counts_give_none() {
        assert_eq!(chi_square_against_expected(&[10], &[10]), None);
        assert_eq!(chi_square_against_expected(&[10, 0], &[10, 1]), None);
        assert_eq!(chi_square_homogeneity(&[0, 0], &[1, 2]), None);
        assert_eq!(chi_square_homogeneity(&[5, 0], &[9, 0]), None);
        assert_eq!(jensen_shannon_distance(&[0], &[1]), None);
        let new_class = chi_square_homogeneity(&[100, 0], &[50, 50]).unwrap();
        assert!(new_class.p_value < 1e-10);
    }

    #[test]
    fn adjusted_p_values_match_scipy() {
        let adjusted = benjamini_hochberg(&[0.01, 0.04, 0.03, 0.005, 0.5, 0.001]);
        for (got, expected) in adjusted.iter().zip([0.02, 0.048, 0.045, 0.015, 0.5, 0.006]) {
            assert_close(*got, expected);
        }
        assert_eq!(benjamini_hochberg(&[0.9, 0.95]), [0.95, 0.95]);
        assert!(benjamini_hochberg(&[]).is_empty());
    }
}
