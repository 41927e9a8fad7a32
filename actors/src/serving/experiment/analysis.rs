//! From sums to intervals that hold at every look, and whether groups have the sizes that they should.
//!
//! Pure: numbers in, numbers out.

use statrs::function::erf::erfc;

use super::findings::{Interval, Ratio};
use super::plan::Measure;
use crate::serving::rollout::sequential::{Moments, increase_lower_bound};

/// Values of each version before anything is concluded from means: the bound on them is asymptotic.
pub const VALUES_MIN: u64 = 50;

/// Groups whose sizes are less likely than this are no chance, but a fault of whoever assigns or counts:
/// the threshold of Fabijan et al. (*Diagnosing Sample Ratio Mismatch in Online Controlled Experiments*, KDD
/// 2019) is this small because it is looked at often.
pub const MISMATCH_P_VALUE: f64 = 0.001;

/// Keys that a group should have before its size says anything: five are the rule for the χ² distribution.
const EXPECTED_MIN: f64 = 5.0;

/// Whether means of so many values, drawn from what all of them look like together, are normal enough: by
/// Cochran's rule as Sugden, Smith and Jones extended it (*Cochran's rule for simple random sampling*, Journal
/// of the Royal Statistical Society B, 2000), more than `28 + 25 g²` values for a skewness of `g`. Of equal
/// values nothing is known.
#[must_use]
pub fn are_enough(control: &Moments, treatment: &Moments) -> bool {
    let fewest = control.count().min(treatment.count());
    let Some(skewness) = control.joined(treatment).skewness() else {
        return false;
    };
    fewest >= VALUES_MIN && fewest as f64 > 28.0 + 25.0 * skewness * skewness
}

/// What the treatment's mean differs by from the control's, in the unit of the moments: the bounds are beyond
/// the truth ever, both together, with a probability of about `alpha` at the most. `None` before two values
/// of each.
#[must_use]
pub fn difference(control: &Moments, treatment: &Moments, alpha: f64) -> Option<Interval> {
    let side = alpha / 2.0;
    let lower = increase_lower_bound(treatment, control, side)?;
    let upper = -increase_lower_bound(control, treatment, side)?;
    let estimate = treatment.mean() - control.mean();
    Some(Interval {
        estimate,
        lower,
        upper,
    })
}

/// An interval in the unit that people read.
#[must_use]
pub fn shown(measure: &Measure, interval: Interval) -> Interval {
    // The relative difference of latencies may be beyond what a number holds while there are few of them.
    let bounded = |value: f64| measure.natural(value).clamp(-f64::MAX, f64::MAX);
    Interval {
        estimate: bounded(interval.estimate),
        lower: bounded(interval.lower),
        upper: bounded(interval.upper),
    }
}

/// Whether two groups have the sizes that shares of `control_share` and `treatment_share` make likely, by the
/// χ² test with one degree of freedom.
#[must_use]
pub fn ratio(
    of: &str,
    (control, treatment): (u64, u64),
    (control_share, treatment_share): (u32, u32),
) -> Ratio {
    let total = (control + treatment) as f64;
    let part = f64::from(treatment_share) / (f64::from(control_share) + f64::from(treatment_share));
    let (of_control, of_treatment) = (total * (1.0 - part), total * part);
    let p_value = if of_control.min(of_treatment) < EXPECTED_MIN {
        1.0
    } else {
        let from_expected = (treatment as f64 - of_treatment).powi(2);
        let chi_square = from_expected / of_control + from_expected / of_treatment;
        // With one degree of freedom it is the square of a normal variable.
        erfc((chi_square / 2.0).sqrt())
    };
    Ratio {
        of: of.to_owned(),
        control,
        treatment,
        p_value,
        is_mismatch: p_value < MISMATCH_P_VALUE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_groups_is_held_against_their_shares() {
        // χ² = 10.83, 6.6349 and 3.8415 are the quantiles of 0.999, 0.99 and 0.95.
        for (sizes, shares, p_value) in [
            ((500, 500), (5_000, 5_000), 1.0),
            ((5_000, 5_340), (5_000, 5_000), 0.000_827),
            ((900, 100), (9_000, 1_000), 1.0),
            ((850, 150), (9_000, 1_000), 1.36e-7),
            ((4, 0), (5_000, 5_000), 1.0),
        ] {
            let found = ratio("keys", sizes, shares);
            assert!(
                (found.p_value - p_value).abs() <= 0.01 * p_value,
                "{sizes:?}: {found:?}"
            );
            assert_eq!(found.is_mismatch, p_value < 0.001, "{sizes:?}");
        }
    }

    #[test]
    fn rare_events_need_more_values_than_common_ones() {
        let of = |events: u64, count: u64| {
            let mut moments = Moments::default();
            (0..count).for_each(|at| moments.add(f64::from(u8::from(at < events))));
            moments
        };
        let equal = |events, count| are_enough(&of(events, count), &of(events, count));
        assert!(equal(50, 100) && !equal(20, 40));
        // A hundredth: a skewness of 9.85, so 2,454 values.
        assert!(!equal(24, 2_400) && equal(25, 2_500));
        assert!(!equal(0, 100_000));
        // What all of them look like together counts: one that never fails is no obstacle.
        assert!(are_enough(&of(0, 2_000), &of(100, 2_000)));
    }

    #[test]
    fn intervals_of_latencies_are_shown_as_parts() {
        let interval = Interval {
            estimate: 1.1f64.ln(),
            lower: 0.0,
            upper: 1e4,
        };
        let found = shown(&Measure::Latency, interval);
        assert!((found.estimate - 0.1).abs() < 1e-12);
        assert_eq!((found.lower, found.upper), (0.0, f64::MAX));
        assert_eq!(shown(&Measure::ErrorRate, interval), interval);
    }
}
