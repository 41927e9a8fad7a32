//! How sure a model is, which needs no labels: in windows against the reference, and row by row against itself.
//!
//! The score is the maximum softmax probability (Hendrycks and Gimpel, 2017): the probability of the predicted class.
//! The energy score is not computed, because it takes logits, and replicas answer with probabilities, from which the
//! logits' scale cannot be had back.

use serde::{Deserialize, Serialize};

use crate::drift::statistics::kolmogorov_smirnov;
use crate::drift::window::LOOKS;
use crate::registry::version_file::VersionFile;

/// Rows in a window, as in a window of features.
pub const WINDOW: usize = 200;

/// Rows are unlike the reference if they are less sure than this share of it.
const TAIL: f64 = 0.05;

/// The share of a window's rows in that tail from which they count as out of distribution. A model is surer of what it
/// was trained on than of anything else, so somewhat more than [`TAIL`] is no news.
const TAIL_SHARE_THRESHOLD: f64 = 0.25;

/// The p-value up to which a difference counts as significant: `.05`, corrected for the looks.
const P_THRESHOLD: f64 = 0.05 / LOOKS;

/// How sure the version is of its reference rows.
#[derive(Clone, Debug)]
pub struct ConfidenceReference {
    sorted: Vec<f64>,
    tail_below: f64,
}

impl ConfidenceReference {
    /// Runs the version over the reference rows that its file has.
    ///
    /// # Errors
    /// Why there is no reference, for people.
    pub fn of(file: &VersionFile) -> Result<Self, String> {
        let rows = reference_rows(file);
        if rows.is_empty() {
            return Err("the version's file has no reference rows".to_owned());
        }
        let model = file
            .build_model()
            .map_err(|error| format!("the version cannot be run by its monitor: {error}"))?;
        let probabilities = model
            .probabilities(&rows)
            .map_err(|error| format!("the version cannot answer its reference rows: {error}"))?;
        let scores = probabilities
            .chunks_exact(model.shape().output_count())
            .map(|row| f64::from(row.iter().copied().fold(0.0, f32::max)))
            .collect();
        Self::from_scores(scores)
            .ok_or_else(|| "the version answers its reference rows with no numbers".to_owned())
    }

    fn from_scores(mut sorted: Vec<f64>) -> Option<Self> {
        if sorted.is_empty() || sorted.iter().any(|score| !score.is_finite()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        let tail_below = sorted[(sorted.len() as f64 * TAIL) as usize];
        Some(ConfidenceReference { sorted, tail_below })
    }

    /// Compares a window's scores with the reference.
    fn compare(&self, mut window: Vec<f64>) -> ScoreComparison {
        window.sort_by(f64::total_cmp);
        let test = kolmogorov_smirnov(&self.sorted, &window)
            .expect("neither the reference nor a full window is empty");
        let in_tail = window.partition_point(|score| *score < self.tail_below);
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
    /// How sure the version is of them, on average.
    pub reference_mean: f64,
    /// Rows in the window.
    pub window_rows: u64,
    /// How sure it was of those.
    pub window_mean: f64,
    /// The Kolmogorov-Smirnov statistic.
    pub kolmogorov_smirnov: f64,
    /// Its p-value.
    pub p_value: f64,
    /// What the p-value is compared with.
    pub p_threshold: f64,
    /// The share of the window's rows of which the version is less sure than of 95 % of the reference.
    pub tail_share: f64,
    /// What that is compared with.
    pub tail_share_threshold: f64,
    /// Whether both are past their thresholds.
    pub is_out: bool,
}

/// Scores against the reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutOfDistribution {
    /// Which score: `max_softmax_probability`.
    pub score: String,
    /// Why there is nothing to compare with, if there is not.
    pub no_reference: Option<String>,
    /// Windows compared.
    pub windows: u64,
    /// The last of them.
    pub last: Option<ScoreComparison>,
}

/// Compares windows of scores with a reference, if there is one.
#[derive(Debug)]
pub struct ScoreMonitor {
    reference: Result<ConfidenceReference, String>,
    window: Vec<f64>,
    windows: u64,
    last: Option<ScoreComparison>,
}

impl ScoreMonitor {
    /// Starts with an empty window.
    #[must_use]
    pub fn new(reference: Result<ConfidenceReference, String>) -> Self {
        ScoreMonitor {
            reference,
            window: Vec::with_capacity(WINDOW),
            windows: 0,
            last: None,
        }
    }

    /// Takes the confidence of a row; the comparison of the window that it fills.
    pub fn add(&mut self, confidence: f64) -> Option<ScoreComparison> {
        let reference = self.reference.as_ref().ok()?;
        self.window.push(confidence);
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
            score: "max_softmax_probability".to_owned(),
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

    fn monitor() -> ScoreMonitor {
        let mut random = Lcg::new(5);
        let scores = (0..1000).map(|_| 0.7 + 0.3 * random.next_unit()).collect();
        ScoreMonitor::new(Ok(ConfidenceReference::from_scores(scores).unwrap()))
    }

    fn window(monitor: &mut ScoreMonitor, score: impl FnMut() -> f64) -> ScoreComparison {
        std::iter::repeat_with(score)
            .find_map(|score| monitor.add(score))
            .unwrap()
    }

    #[test]
    fn rows_like_the_reference_are_in_and_unsure_ones_are_out() {
        let (mut monitor, mut random) = (monitor(), Lcg::new(6));
        for _ in 0..30 {
            let same = window(&mut monitor, || 0.7 + 0.3 * random.next_unit());
            assert!(!same.is_out && same.tail_share < 0.12, "{same:?}");
        }
        let unsure = window(&mut monitor, || 0.3 + 0.5 * random.next_unit());
        assert!(unsure.is_out && unsure.tail_share > 0.7, "{unsure:?}");
        assert_eq!((unsure.reference_rows, unsure.window_rows), (1000, 200));
        let status = monitor.status();
        assert_eq!((status.windows, status.last), (31, Some(unsure)));
    }

    #[test]
    fn to_be_surer_than_the_reference_is_not_out() {
        let mut monitor = monitor();
        let sure = window(&mut monitor, || 1.0);
        assert!(sure.p_value < 1e-9 && !sure.is_out, "{sure:?}");
    }

    #[test]
    fn a_version_is_its_own_reference_and_one_without_rows_has_none() {
        let file = digits(50);
        let reference = ConfidenceReference::of(&file).unwrap();
        assert_eq!(reference.sorted.len(), 50);
        assert!(reference.sorted[0] >= 0.1 && reference.sorted[49] <= 1.0);

        let mut bare = digits(20);
        bare.reference.columns.clear();
        let mut monitor = ScoreMonitor::new(ConfidenceReference::of(&bare));
        for _ in 0..2 * WINDOW {
            assert_eq!(monitor.add(0.1), None);
        }
        let status = monitor.status();
        assert_eq!(status.windows, 0);
        assert!(status.no_reference.unwrap().contains("no reference rows"));
    }
}
