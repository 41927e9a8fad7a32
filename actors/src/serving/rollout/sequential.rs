//! Tests that may be looked at after every request: their chance of a false alarm, over all looks
//! together, is bounded (Ville's inequality).
//!
//! * Events: of events that hit two random parts, each is a coin as biased as the parts are large, if both are
//!   equally prone. [`log_e_value`] is the mixture likelihood ratio of Robbins (1970), used for
//!   experiments as mSPRT by Johari, Pekelis and Walsh (*Always Valid Inference*, 2017) and for counts
//!   by Lindon and Malek (*Anytime-Valid Inference for Multinomial Count Data*, 2022). Each term is a
//!   likelihood ratio of a larger share against the fair one, so their mean stays a supermartingale for
//!   every share up to that: the bound is exact and one-sided.
//! * Means: [`increase_lower_bound`] is the one-sided asymptotic confidence sequence of Waudby-Smith,
//!   Arbour, Sinha, Kennedy and Ramdas (*Time-uniform central limit theory and asymptotic confidence
//!   sequences*, Annals of Statistics 2024, proposition B.1), for the difference of two means of a
//!   randomized experiment.

use serde::{Deserialize, Serialize};
use statrs::function::beta::ln_beta;

/// Shares of the candidate that the mixture looks for between two halves, equally weighted: from a fifth more
/// events than the baseline's to nearly all of them.
const SHARES: [f64; 10] = [0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99];

/// Halvings of an interval of at most 1: what is left is below any share that is shown.
const BISECTIONS: u32 = 50;

/// How many observations of two halves the bound on means is tightest for.
const TUNED_FOR: f64 = 1_000.0;

/// The natural logarithm of the evidence that the candidate is more prone to an event than the baseline, where it has
/// `fair` (between 0 and 1) of the events that hit both equally. It exceeds `ln(1 / alpha)` ever, at equal proneness, with
/// probability `alpha` at the most. The mixture looks for 1.2 to 99 times the odds of
/// `fair`.
#[must_use]
pub fn log_e_value(candidate_events: u64, baseline_events: u64, fair: f64) -> f64 {
    let terms = SHARES.map(|share| {
        let odds = share / (1.0 - share) * fair / (1.0 - fair);
        let share = odds / (1.0 + odds);
        candidate_events as f64 * (share / fair).ln()
            + baseline_events as f64 * ((1.0 - share) / (1.0 - fair)).ln()
    });
    let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = terms.iter().map(|term| (term - largest).exp()).sum();
    largest + sum.ln() - (SHARES.len() as f64).ln()
}

/// What the chance of an event is between, after `events` of `count`: both bounds together are beyond the truth
/// ever, with a probability of `alpha` at the most.
///
/// Exact: the mixture likelihood ratio of Robbins (1970) with the prior Beta(½, ½). A chance is outside as soon as
/// the ratio against it is `1 / alpha`.
#[must_use]
pub fn rate_bounds(events: u64, count: u64, alpha: f64) -> (f64, f64) {
    if count == 0 {
        return (0.0, 1.0);
    }
    let (hits, misses) = (events as f64, count.saturating_sub(events) as f64);
    let mixed = ln_beta(0.5 + hits, 0.5 + misses) - ln_beta(0.5, 0.5);
    let is_outside =
        |chance: f64| mixed - hits * chance.ln() - misses * (-chance).ln_1p() >= (1.0 / alpha).ln();
    let share = hits / (hits + misses);
    // Between what is inside and what is outside the ratio grows all the way.
    let bound = |mut inside: f64, mut outside: f64| {
        for _ in 0..BISECTIONS {
            let middle = f64::midpoint(inside, outside);
            if is_outside(middle) {
                outside = middle;
            } else {
                inside = middle;
            }
        }
        outside
    };
    let lower = if hits == 0.0 { 0.0 } else { bound(share, 0.0) };
    let upper = if misses == 0.0 {
        1.0
    } else {
        bound(share, 1.0)
    };
    (lower, upper)
}

/// Count, mean, variance and skewness of what was observed, kept by Welford's method as Pébay extended it
/// (*Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical
/// Moments*, 2008). Stored with an experiment's count: fields are appended, never changed.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Moments {
    count: u64,
    mean: f64,
    /// Of the differences from the mean, as the next.
    squares: f64,
    cubes: f64,
}

impl Moments {
    /// Takes one observation.
    pub fn add(&mut self, value: f64) {
        self.count += 1;
        let count = self.count as f64;
        let from_mean = value - self.mean;
        let step = from_mean / count;
        self.mean += step;
        let square = from_mean * (value - self.mean);
        self.cubes += square * step * (count - 2.0) - 3.0 * step * self.squares;
        self.squares += square;
    }

    /// What both have observed.
    #[must_use]
    pub fn joined(&self, other: &Moments) -> Moments {
        let (one, two) = (self.count as f64, other.count as f64);
        let count = one + two;
        if count == 0.0 {
            return Moments::default();
        }
        let apart = other.mean - self.mean;
        let product = apart * apart * one * two / count;
        Moments {
            count: self.count + other.count,
            mean: self.mean + apart * two / count,
            squares: self.squares + other.squares + product,
            cubes: self.cubes
                + other.cubes
                + product * apart * (one - two) / count
                + 3.0 * apart * (one * other.squares - two * self.squares) / count,
        }
    }

    /// Their skewness; `None` if they are all equal.
    #[must_use]
    pub fn skewness(&self) -> Option<f64> {
        (self.squares > 0.0)
            .then(|| (self.count as f64).sqrt() * self.cubes / self.squares.powf(1.5))
            .filter(|skewness| skewness.is_finite())
    }

    /// Observations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean; 0 before the first.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Their variance, without bias; 0 before the second.
    #[must_use]
    pub fn variance(&self) -> f64 {
        match self.count {
            0 | 1 => 0.0,
            count => self.squares / (count - 1) as f64,
        }
    }
}

/// What the candidate's mean exceeds the baseline's by at least. It is above the truth ever, with a
/// probability of about `alpha` at the most; `None` before two observations of each.
///
/// With `t` observations of two halves, `s²` the variance of the difference scaled to one observation, and `r` a parameter:
/// `difference − s · √(2 (t r² + 1) / (t² r²) · ln(1 + √(t r² + 1) / (2 alpha)))`. Parts that are not halves count as the halves
/// that tell as much, a number that grows with theirs as `t` does: of 50 and 950 observations as 190.
#[must_use]
pub fn increase_lower_bound(candidate: &Moments, baseline: &Moments, alpha: f64) -> Option<f64> {
    if candidate.count() < 2 || baseline.count() < 2 {
        return None;
    }
    let (of_candidate, of_baseline) = (candidate.count() as f64, baseline.count() as f64);
    let halves = 4.0 / (of_candidate.recip() + of_baseline.recip());
    let scaled_variance =
        halves * (candidate.variance() / of_candidate + baseline.variance() / of_baseline);
    // The paper's choice of the parameter for the time at which the bound is to be tightest.
    let confidence = -2.0 * (2.0 * alpha).ln();
    let tuned = (confidence + (confidence + 1.0).ln()) / TUNED_FOR;
    let grown = halves * tuned + 1.0;
    let radius = (2.0 * grown / (halves * halves * tuned)
        * (1.0 + grown.sqrt() / (2.0 * alpha)).ln())
    .sqrt();
    Some(candidate.mean() - baseline.mean() - scaled_variance.sqrt() * radius)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// Simulated runs.
    const RUNS: u64 = 1_000;

    /// As many alarms as a chance of `alpha` gives in [`RUNS`] runs, and three standard deviations: the
    /// bound is on the chance, and runs that are counted scatter around it.
    fn most_alarms(alpha: f64) -> f64 {
        let runs = RUNS as f64;
        alpha * runs + 3.0 * (alpha * (1.0 - alpha) * runs).sqrt()
    }

    #[test]
    fn evidence_is_that_of_the_formula() {
        let halves = |candidate, baseline| log_e_value(candidate, baseline, 0.5);
        assert!(halves(0, 0).abs() < 1e-12);
        // One event of the candidate: the mean of twice the shares.
        let mean: f64 = SHARES.iter().map(|share| 2.0 * share).sum::<f64>() / 10.0;
        assert!((halves(1, 0) - mean.ln()).abs() < 1e-12);
        // Fourteen events, all the candidate's, are enough for one chance in a thousand; five are not.
        assert!(halves(14, 0) > 1_000f64.ln() && halves(5, 0) < 1_000f64.ln());
        assert!(halves(0, 14) < 0.0 && halves(50, 50) < 0.0);
        assert!(halves(u64::MAX, u64::MAX).is_finite());
    }

    #[test]
    fn events_of_unequal_parts_are_held_against_their_shares() {
        // A tenth of the requests has a tenth of the events, then a third of them.
        assert!(log_e_value(100, 900, 0.1) < 0.0);
        assert!(log_e_value(100, 200, 0.1) > 1_000f64.ln());
        assert!(log_e_value(u64::MAX, u64::MAX, 0.01).is_finite());
    }

    #[test]
    fn a_fair_coin_is_seldom_called_unfair_however_often_one_looks() {
        let alpha: f64 = 0.05;
        for fair in [0.5, 0.05, 0.8] {
            let mut alarms = 0;
            for seed in 0..RUNS {
                let mut rng = StdRng::seed_from_u64(seed);
                let (mut candidate, mut baseline) = (0, 0);
                let is_alarm = (0..1_000).any(|_| {
                    *(if rng.random_bool(fair) {
                        &mut candidate
                    } else {
                        &mut baseline
                    }) += 1;
                    log_e_value(candidate, baseline, fair) >= (1.0 / alpha).ln()
                });
                alarms += u64::from(is_alarm);
            }
            println!(
                "coins of {fair} called unfair: {alarms} of {RUNS} (seeds 0..{RUNS}), bound {alpha}"
            );
            assert!(alarms as f64 <= most_alarms(alpha), "{fair}: {alarms}");
        }
    }

    #[test]
    fn bounds_on_a_chance_hold_at_every_look() {
        assert_eq!(rate_bounds(0, 0, 0.05), (0.0, 1.0));
        let (lower, upper) = rate_bounds(0, 100, 0.05);
        assert!(lower == 0.0 && (0.03..0.08).contains(&upper), "{upper}");
        let (lower, upper) = rate_bounds(100, 100, 0.05);
        assert!(upper == 1.0 && (0.92..0.97).contains(&lower), "{lower}");
        let (lower, upper) = rate_bounds(50, 1_000, 0.05);
        assert!((0.02..0.05).contains(&lower) && (0.05..0.09).contains(&upper));
        // One event is enough to know that the chance is not nothing.
        assert!(rate_bounds(1, 1_000_000, 0.01).0 > 0.0);

        let (alpha, chance) = (0.05, 0.02);
        let alarms = (0..RUNS).filter(|seed| {
            let mut rng = StdRng::seed_from_u64(*seed);
            let mut events = 0;
            (1..=1_000).any(|count| {
                events += u64::from(rng.random_bool(chance));
                let (lower, upper) = rate_bounds(events, count, alpha);
                lower > chance || upper < chance
            })
        });
        let alarms = alarms.count();
        println!(
            "chances that were not between their bounds: {alarms} of {RUNS} (seeds 0..{RUNS}), bound {alpha}"
        );
        assert!(alarms as f64 <= most_alarms(alpha), "{alarms}");
    }

    #[test]
    fn moments_are_those_of_the_definition() {
        let mut moments = Moments::default();
        for value in [1.0, 2.0, 4.0, 9.0] {
            moments.add(value);
        }
        assert_eq!((moments.count(), moments.mean()), (4, 4.0));
        assert!((moments.variance() - 38.0 / 3.0).abs() < 1e-12);
        // The cubes of -3, -2, 0 and 5 add up to 90.
        let skewness = 2.0 * 90.0 / 38f64.powf(1.5);
        assert!((moments.skewness().unwrap() - skewness).abs() < 1e-12);
        let of = |values: &[f64]| {
            let mut moments = Moments::default();
            values.iter().for_each(|value| moments.add(*value));
            moments
        };
        let joined = of(&[9.0]).joined(&of(&[2.0, 1.0, 4.0]));
        assert_eq!((joined.count(), joined.mean()), (4, 4.0));
        assert!((joined.variance() - moments.variance()).abs() < 1e-12);
        assert!((joined.skewness().unwrap() - skewness).abs() < 1e-12);
        assert_eq!(of(&[7.0, 7.0]).skewness(), None);
        assert_eq!(of(&[]).joined(&of(&[])), Moments::default());
    }

    #[test]
    fn equal_means_are_seldom_told_apart_and_different_ones_soon() {
        let alpha = 0.05;
        // Looks after each observation of the candidate, of which the baseline has so many times as many.
        let look = |seed, shift: f64, times: usize| {
            let mut rng = StdRng::seed_from_u64(seed);
            let (mut candidate, mut baseline) = (Moments::default(), Moments::default());
            (1..=1_000u64).find(|_| {
                candidate.add(shift + rng.random_range(-1.0..1.0));
                (0..times).for_each(|_| baseline.add(rng.random_range(-1.0..1.0)));
                candidate.count() >= 50
                    && increase_lower_bound(&candidate, &baseline, alpha).unwrap() > 0.0
            })
        };
        // Half a standard deviation is found within so many.
        for (times, soon) in [(1, 400), (19, 250)] {
            let alarms = (0..RUNS).filter(|seed| look(*seed, 0.0, times).is_some());
            let alarms = alarms.count();
            println!(
                "equal means told apart, 1 to {times}: {alarms} of {RUNS} (seeds 0..{RUNS}), bound {alpha}"
            );
            assert!(alarms as f64 <= most_alarms(alpha), "{times}: {alarms}");
            let latest = (0..100).map(|seed| look(seed, 0.29, times).unwrap()).max();
            println!(
                "half a standard deviation, 1 to {times}: found after {latest:?} at the latest"
            );
            assert!(latest.unwrap() <= soon, "{times}: {latest:?}");
        }
        let one = Moments::default();
        assert_eq!(increase_lower_bound(&one, &one, alpha), None);
    }
}
