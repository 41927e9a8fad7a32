//! How often predictions are right, and whether they are as sure as they are right.
//!
//! This takes labels: without them nothing is said about calibration.

use serde::{Deserialize, Serialize};

use super::join::Outcome;

/// Bins of equal width over the confidence, as Guo et al. (2017) have them.
pub const BINS: usize = 15;

/// Some predictions of one confidence.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct ReliabilityBin {
    /// Predictions.
    pub count: u64,
    /// How sure they were, on average.
    pub confidence: f64,
    /// The share of them that was right.
    pub accuracy: f64,
}

/// What labels say about predictions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reliability {
    /// Predictions with a label.
    pub samples: u64,
    /// The share of them that was right.
    pub accuracy: f64,
    /// The expected calibration error: by how much confidence and accuracy differ, over [`BINS`] bins.
    pub calibration_error: f64,
    /// The bins, from the least to the most sure; bin `i` is above `i/15` and up to `(i + 1)/15`.
    pub bins: Vec<ReliabilityBin>,
}

/// Counts outcomes.
#[derive(Clone, Debug, Default)]
pub struct OutcomeCounts {
    bins: [Counts; BINS],
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    count: u64,
    right: u64,
    confidence: f64,
}

impl OutcomeCounts {
    /// Counts one.
    pub fn add(&mut self, outcome: &Outcome) {
        let confidence = f64::from(outcome.predicted.confidence).clamp(0.0, 1.0);
        let above = (confidence * BINS as f64).ceil() as usize;
        let bin = &mut self.bins[above.clamp(1, BINS) - 1];
        bin.count += 1;
        bin.right += u64::from(outcome.predicted.class == outcome.truth);
        bin.confidence += confidence;
    }

    /// Outcomes so far.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.bins.iter().map(|bin| bin.count).sum()
    }

    /// What they say; nothing if there are none.
    #[must_use]
    pub fn reliability(&self) -> Option<Reliability> {
        let samples = self.samples();
        if samples == 0 {
            return None;
        }
        let right: u64 = self.bins.iter().map(|bin| bin.right).sum();
        let error: f64 = self
            .bins
            .iter()
            .map(|bin| (bin.right as f64 - bin.confidence).abs())
            .sum();
        Some(Reliability {
            samples,
            accuracy: right as f64 / samples as f64,
            calibration_error: error / samples as f64,
            bins: self.bins.iter().map(Counts::bin).collect(),
        })
    }
}

impl Counts {
    fn bin(&self) -> ReliabilityBin {
        let count = (self.count as f64).max(1.0);
        ReliabilityBin {
            count: self.count,
            confidence: self.confidence / count,
            accuracy: self.right as f64 / count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::join::Predicted;
    use super::*;

    fn outcome(confidence: f32, is_right: bool) -> Outcome {
        Outcome {
            predicted: Predicted {
                class: 1,
                confidence,
                slice: None,
            },
            truth: u32::from(is_right),
        }
    }

    fn counted(outcomes: &[(f32, bool)]) -> Reliability {
        let mut counts = OutcomeCounts::default();
        for (confidence, is_right) in outcomes {
            counts.add(&outcome(*confidence, *is_right));
        }
        counts.reliability().unwrap()
    }

    #[test]
    fn nothing_is_said_without_labels() {
        assert_eq!(OutcomeCounts::default().reliability(), None);
    }

    /// Worked out by hand: bins 14 (0.95, 0.95, 0.95: two of three right) and 8 (0.5625: right), so
    /// ECE = (3·|2/3 − 0.95| + 1·|1 − 0.5625|) / 4.
    #[test]
    fn the_calibration_error_is_that_of_the_definition() {
        let found = counted(&[(0.95, true), (0.95, true), (0.95, false), (0.5625, true)]);
        assert_eq!((found.samples, found.accuracy), (4, 0.75));
        let expected = (3.0 * (2.0f64 / 3.0 - 0.95).abs() + 0.4375) / 4.0;
        assert!(
            (found.calibration_error - expected).abs() < 1e-7,
            "{found:?}"
        );
        assert_eq!((found.bins[14].count, found.bins[8].count), (3, 1));
    }

    #[test]
    fn sure_and_right_is_calibrated_and_sure_and_wrong_is_not() {
        assert_eq!(counted(&[(1.0, true); 20]).calibration_error, 0.0);
        assert_eq!(counted(&[(1.0, false); 20]).calibration_error, 1.0);
    }

    #[test]
    fn bins_are_open_below_and_closed_above() {
        let found = counted(&[(0.0, true), (0.2, true), (0.200_01, true), (1.0, true)]);
        let counts: Vec<u64> = found.bins.iter().map(|bin| bin.count).collect();
        // 0.2 as `f32` lies a little above 3/15.
        assert_eq!(counts[0], 1);
        assert_eq!(counts[3], 2);
        assert_eq!(counts[14], 1);
    }
}
