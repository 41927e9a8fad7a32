//! How far a window of rows is from the reference to its version, which needs no labels.
//!
//! Two scores of a row, each compared with the same score of the version's reference rows:
//! * the maximum softmax probability (Hendrycks and Gimpel, 2017), which is the probability of the predicted class: rows
//!   of a lower one are further out;
//! * the energy, −ln Σ exp of the logits (Liu et al., 2020): rows of a higher one are further out. Softmax takes away what is common
//!   to all logits, so a row that none of the classes speaks for can have as sure an answer as any; its energy shows.
//!
//! A shift of the logits changes the energy and no probability, so energies can only be compared where the logits come from the same
//! weights: the reference's are computed here from the version's own file, as in its replicas. These say the energy beside their
//! answer, because nothing in the probabilities brings it back. Rows that come without one are scored by their probability alone.

use serde::{Deserialize, Serialize};

use crate::drift::statistics::kolmogorov_smirnov;
use crate::drift::window::LOOKS;
use crate::registry::version_file::VersionFile;

/// Rows in a window, as in a window of features.
pub const WINDOW: usize = 200;

/// Rows are unlike the reference if they are further out than all but this share of it.
const TAIL: f64 = 0.05;

/// The share of a window's rows in that tail from which they count as out of distribution. A model is surer of what it
/// was trained on than of anything else, so somewhat more than [`TAIL`] is no news.
const TAIL_SHARE_THRESHOLD: f64 = 0.25;

/// The p-value up to which a difference counts as significant: `.05`, corrected for the looks.
const P_THRESHOLD: f64 = 0.05 / LOOKS;

/// What of a row is compared with the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// The probability of the predicted class.
    MaxSoftmaxProbability,
    /// −ln Σ exp of the logits.
    Energy,
}

impl Score {
    /// Its name in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Score::MaxSoftmaxProbability => "max_softmax_probability",
            Score::Energy => "energy",
        }
    }
}

/// A score of the version's reference rows.
#[derive(Debug)]
struct ScoreReference {
    score: Score,
    sorted: Vec<f64>,
    /// Rows beyond this are in the tail: below it by probability, above it by energy.
    tail_beyond: f64,
}

impl ScoreReference {
    fn new(score: Score, mut sorted: Vec<f64>) -> Result<Self, String> {
        if sorted.is_empty() || sorted.iter().any(|score| !score.is_finite()) {
            return Err("the version answers its reference rows with no numbers".to_owned());
        }
        sorted.sort_by(f64::total_cmp);
        let in_tail = (sorted.len() as f64 * TAIL) as usize;
        let first_beside_tail = match score {
            Score::MaxSoftmaxProbability => in_tail,
            Score::Energy => sorted.len() - 1 - in_tail,
        };
        Ok(ScoreReference {
            score,
            tail_beyond: sorted[first_beside_tail],
            sorted,
        })
    }

    /// Compares a window's scores with the reference.
    fn compare(&self, mut window: Vec<f64>) -> ScoreComparison {
        window.sort_by(f64::total_cmp);
        let test = kolmogorov_smirnov(&self.sorted, &window)
            .expect("neither the reference nor a full window is empty");
        let in_tail = match self.score {
            Score::MaxSoftmaxProbability => window.partition_point(|row| *row < self.tail_beyond),
            Score::Energy => window.len() - window.partition_point(|row| *row <= self.tail_beyond),
        };
        let tail_share = in_tail as f64 / window.len() as f64;
        ScoreComparison {
            reference_rows: self.sorted.len() as u64,
            reference_mean: mean(&self.sorted),
            window_rows: window.len() as u64,
            window_mean: mean(&window),
            kolmogorov_smirnov: test.statistic,
            p_value: test.p_value,
            p_threshold: P_THRESHOLD,
            tail_share,
            tail_share_threshold: TAIL_SHARE_THRESHOLD,
            is_out: tail_share >= TAIL_SHARE_THRESHOLD && test.p_value <= P_THRESHOLD,
        }
    }
}

/// The reference rows of a version's file, one after the other.
pub(super) fn reference_rows(file: &VersionFile) -> Vec<f32> {
    let columns = &file.reference.columns;
    let rows = columns.iter().map(Vec::len).min().unwrap_or(0);
    (0..rows)
        .flat_map(|row| columns.iter().map(move |column| column[row]))
        .collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// A window's scores beside those of the reference.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreComparison {
    /// Reference rows.
    pub reference_rows: u64,
    /// Their mean score.
    pub reference_mean: f64,
    /// Rows in the window.
    pub window_rows: u64,
    /// The mean score of those.
    pub window_mean: f64,
    /// The Kolmogorov-Smirnov statistic.
    pub kolmogorov_smirnov: f64,
    /// Its p-value.
    pub p_value: f64,
    /// What the p-value is compared with.
    pub p_threshold: f64,
    /// The share of the window's rows that are further out than 95 % of the reference: of a lower probability, or of a higher
    /// energy.
    pub tail_share: f64,
    /// What that is compared with.
    pub tail_share_threshold: f64,
    /// Whether both are past their thresholds.
    pub is_out: bool,
}

/// Scores against the reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutOfDistribution {
    /// Which score: `max_softmax_probability` or `energy`.
    pub score: String,
    /// Why there is nothing to compare with, if there is not.
    pub no_reference: Option<String>,
    /// Windows compared.
    pub windows: u64,
    /// The last of them.
    pub last: Option<ScoreComparison>,
}

impl OutOfDistribution {
    /// Whether the rows of the last window are out.
    #[must_use]
    pub fn is_out(&self) -> bool {
        self.last.is_some_and(|last| last.is_out)
    }
}

/// Compares windows of a score with a reference, if there is one.
#[derive(Debug)]
pub struct ScoreMonitor {
    score: Score,
    reference: Result<ScoreReference, String>,
    window: Vec<f64>,
    windows: u64,
    last: Option<ScoreComparison>,
}

/// Both scores of a version's rows.
#[derive(Debug)]
pub struct ScoreMonitors {
    /// By the probability of the predicted class.
    pub probability: ScoreMonitor,
    /// By the energy of the logits.
    pub energy: ScoreMonitor,
}

impl ScoreMonitors {
    /// Runs the version over the reference rows that its file has, and starts with empty windows.
    #[must_use]
    pub fn of(file: &VersionFile) -> Self {
        let (probabilities, energies) = match reference_scores(file) {
            Ok((probabilities, energies)) => (Ok(probabilities), Ok(energies)),
            Err(reason) => (Err(reason.clone()), Err(reason)),
        };
        ScoreMonitors {
            probability: ScoreMonitor::new(Score::MaxSoftmaxProbability, probabilities),
            energy: ScoreMonitor::new(Score::Energy, energies),
        }
    }
}

/// The probability of the predicted class, and the energy, of each reference row; or why there are none, for people.
fn reference_scores(file: &VersionFile) -> Result<(Vec<f64>, Vec<f64>), String> {
    let rows = reference_rows(file);
    if rows.is_empty() {
        return Err("the version's file has no reference rows".to_owned());
    }
    let model = file
        .build_model()
        .map_err(|error| format!("the version cannot be run by its monitor: {error}"))?;
    let said = model
        .classify(&rows)
        .map_err(|error| format!("the version cannot answer its reference rows: {error}"))?;
    let probabilities = said
        .probabilities
        .chunks_exact(model.shape().output_count())
        .zip(&said.classes)
        .map(|(row, class)| f64::from(row[*class as usize]));
    let energies = said.energies.iter().copied().map(f64::from);
    Ok((probabilities.collect(), energies.collect()))
}

impl ScoreMonitor {
    /// Starts with an empty window, and these scores of the reference rows.
    #[must_use]
    pub fn new(score: Score, reference: Result<Vec<f64>, String>) -> Self {
        ScoreMonitor {
            score,
            reference: reference.and_then(|scores| ScoreReference::new(score, scores)),
            window: Vec::with_capacity(WINDOW),
            windows: 0,
            last: None,
        }
    }

    /// Takes the score of a row; the comparison of the window that it fills, if the rows are out with that one and were not
    /// before.
    pub fn take(&mut self, score: f64) -> Option<ScoreComparison> {
        let was_out = self.last.is_some_and(|last| last.is_out);
        self.add(score).filter(|found| found.is_out && !was_out)
    }

    /// Takes the score of a row; the comparison of the window that it fills.
    fn add(&mut self, score: f64) -> Option<ScoreComparison> {
        let reference = self.reference.as_ref().ok()?;
        self.window.push(score);
        if self.window.len() < WINDOW {
            return None;
        }
        let full = std::mem::replace(&mut self.window, Vec::with_capacity(WINDOW));
        self.windows += 1;
        self.last = Some(reference.compare(full));
        self.last
    }

    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> OutOfDistribution {
        OutOfDistribution {
            score: self.score.as_str().to_owned(),
            no_reference: self.reference.as_ref().err().cloned(),
            windows: self.windows,
            last: self.last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drift::statistics::testing::Lcg;
    use crate::registry::version_file::tests::digits;

    /// A reference of probabilities from 0.7 to 1, or of their negatives as energies: the further out, the higher.
    fn monitor(score: Score) -> ScoreMonitor {
        let mut random = Lcg::new(5);
        let sign = sign(score);
        let scores = (0..1000).map(|_| sign * (0.7 + 0.3 * random.next_unit()));
        ScoreMonitor::new(score, Ok(scores.collect()))
    }

    fn sign(score: Score) -> f64 {
        match score {
            Score::MaxSoftmaxProbability => 1.0,
            Score::Energy => -1.0,
        }
    }

    fn window(monitor: &mut ScoreMonitor, score: impl FnMut() -> f64) -> ScoreComparison {
        std::iter::repeat_with(score)
            .find_map(|score| monitor.add(score))
            .unwrap()
    }

    const BOTH: [Score; 2] = [Score::MaxSoftmaxProbability, Score::Energy];

    #[test]
    fn rows_like_the_reference_are_in_and_those_far_from_it_are_out() {
        for score in BOTH {
            let (mut monitor, mut random, sign) = (monitor(score), Lcg::new(6), sign(score));
            for _ in 0..30 {
                let same = window(&mut monitor, || sign * (0.7 + 0.3 * random.next_unit()));
                assert!(!same.is_out && same.tail_share < 0.12, "{same:?}");
            }
            let far = window(&mut monitor, || sign * (0.3 + 0.5 * random.next_unit()));
            assert!(far.is_out && far.tail_share > 0.7, "{far:?}");
            assert_eq!((far.reference_rows, far.window_rows), (1000, 200));
            let status = monitor.status();
            assert_eq!((status.windows, status.last), (31, Some(far)));
            assert!(status.is_out());
            assert_eq!(status.score, score.as_str());
        }
    }

    #[test]
    fn both_tails_have_the_same_share_of_the_reference() {
        let found = BOTH.map(|score| {
            let mut monitor = monitor(score);
            let reference = monitor.reference.as_ref().unwrap().sorted.clone();
            // Each fifth row of the reference, from its tail on.
            let rows: Vec<f64> = match score {
                Score::MaxSoftmaxProbability => reference,
                Score::Energy => reference.into_iter().rev().collect(),
            };
            let mut fifths = rows.into_iter().step_by(5);
            window(&mut monitor, || fifths.next().unwrap())
        });
        for comparison in found {
            assert_eq!(comparison.tail_share, 0.05, "{comparison:?}");
            assert!(!comparison.is_out);
        }
        assert_eq!(found[0].kolmogorov_smirnov, found[1].kolmogorov_smirnov);
    }

    #[test]
    fn to_be_surer_than_the_reference_is_not_out() {
        for score in BOTH {
            let mut monitor = monitor(score);
            let sure = window(&mut monitor, || sign(score));
            assert!(sure.p_value < 1e-9 && !sure.is_out, "{sure:?}");
        }
    }

    #[test]
    fn rows_that_stay_out_are_told_once() {
        let mut monitor = monitor(Score::Energy);
        let mut told =
            |rows: usize, score: f64| (0..rows).filter_map(|_| monitor.take(score)).count();
        assert_eq!(told(3 * WINDOW, -0.1), 1);
        assert_eq!(told(WINDOW, -0.9), 0);
        assert_eq!(told(2 * WINDOW, -0.1), 1);
    }

    #[test]
    fn a_version_is_its_own_reference_and_one_without_rows_has_none() {
        let file = digits(50);
        let monitors = ScoreMonitors::of(&file);
        let probabilities = &monitors.probability.reference.as_ref().unwrap().sorted;
        assert_eq!(probabilities.len(), 50);
        assert!(probabilities[0] >= 0.1 && probabilities[49] <= 1.0);
        // By the definition, from the logits.
        let model = file.build_model().unwrap();
        let logits = model.outputs(&reference_rows(&file)).unwrap();
        let mut energies: Vec<f64> = logits
            .chunks_exact(10)
            .map(|row| -row.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln())
            .collect();
        energies.sort_by(f64::total_cmp);
        let known = &monitors.energy.reference.as_ref().unwrap().sorted;
        assert_eq!(known.len(), 50);
        for (known, expected) in known.iter().zip(energies) {
            assert!((known - expected).abs() < 1e-5, "{known} {expected}");
        }

        let mut bare = digits(20);
        bare.reference.columns.clear();
        let monitors = ScoreMonitors::of(&bare);
        for mut monitor in [monitors.probability, monitors.energy] {
            for _ in 0..2 * WINDOW {
                assert_eq!(monitor.add(0.1), None);
            }
            let status = monitor.status();
            assert!(!status.is_out() && status.windows == 0);
            assert!(status.no_reference.unwrap().contains("no reference rows"));
        }
    }

    #[test]
    fn a_score_that_is_no_number_is_no_reference() {
        let monitor = ScoreMonitor::new(Score::Energy, Ok(vec![-1.0, f64::NAN]));
        let reason = monitor.status().no_reference.unwrap();
        assert!(reason.contains("no numbers"), "{reason}");
    }
}
