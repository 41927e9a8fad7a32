//! A monitor that compares tumbling windows of live traffic with a reference.
//!
//! 1. A window closes after exactly `window_size` observations, whatever time that takes; then it starts empty.
//! 2. A column that has one and the same value in the reference and in the window is not informative: it neither drifts
//!    nor counts among the columns of which a share must drift.
//! 3. A column drifts when its PSI reaches the threshold *and* its test (`baseline` says which) is past its own: the p-value,
//!    corrected by Benjamini and Hochberg over the informative columns, is at most the threshold, and a Wasserstein distance is also
//!    large. A column of few values drifts as one of categories, by χ² or by Jensen-Shannon, and predictions by both.
//! 4. The data set drifts when at least the configured share of informative columns does, and one of these is significant over all looks
//!    of thirty days as well (Simes' test of all columns together): a single column, and columns that move as one, have no others
//!    to back them, and would drift by chance some times in so many windows.
//! 5. A refused observation leaves the window as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use super::categories::Category;
pub use super::window_config::{
    LOOKS, MAX_WINDOW_SIZE, MIN_WINDOW_SIZE, MonitorConfig, MonitorConfigError,
};

use super::baseline::{Baseline, Comparison};
use super::reference::Reference;
use super::statistics::{benjamini_hochberg, chi_square_homogeneity, jensen_shannon_distance};

/// Why an observation was not taken.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ObserveError {
    /// The row does not have the reference's columns.
    #[error("expected {expected} features as in the reference, got {got}")]
    WidthMismatch {
        /// Columns of the reference.
        expected: usize,
        /// Features given.
        got: usize,
    },
    /// A value is NaN or infinite.
    #[error("feature {feature:?} has the value {value}, which no statistic can place")]
    NotFinite {
        /// The feature.
        feature: String,
        /// The value.
        value: f32,
    },
}

/// A statistic that compares one column with its reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statistic {
    /// The population stability index; past its threshold when at least as large.
    Psi,
    /// Kolmogorov-Smirnov; past its threshold when the corrected p-value is at most as large.
    Ks,
    /// The Wasserstein distance in standard deviations of the reference; past its threshold when at least as large, and not by chance.
    Wasserstein,
    /// χ² of the categories of a column of few values; past its threshold when the corrected p-value is at most as large.
    ChiSquare,
    /// The Jensen-Shannon distance of those categories; past its threshold when at least as large, and not by chance (χ²).
    JensenShannon,
}

impl Statistic {
    /// As reports name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Statistic::Psi => "psi",
            Statistic::Ks => "ks",
            Statistic::Wasserstein => "wasserstein",
            Statistic::ChiSquare => "chi_square",
            Statistic::JensenShannon => "jensen_shannon",
        }
    }
}

/// One statistic of one column in one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FeatureDrift {
    /// The column's name.
    pub feature: String,
    /// The statistic.
    pub statistic: Statistic,
    /// Its value.
    pub value: f64,
    /// The p-value corrected for the number of columns, if the statistic has one.
    pub p_value: Option<f64>,
    /// What the value (PSI, Wasserstein, Jensen-Shannon) or the p-value (KS, χ²) is compared with.
    pub threshold: f64,
    /// By how much the value may be off because the reference is known by a sketch; `None` where it is exact, and for PSI.
    pub error_max: Option<f64>,
    /// Rows of the reference; of categories those of them that are kept, which are counted.
    pub reference_count: u64,
    /// Rows of the window.
    pub current_count: u64,
    /// Whether this statistic is past its threshold.
    pub exceeded: bool,
    /// Whether the column drifts, which takes both statistics.
    pub drifted: bool,
    /// Beside the test of a column of categories those that moved most; else none.
    pub categories: Vec<Category>,
}

/// How the predicted classes compare with the reference's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PredictionDrift {
    /// The Jensen-Shannon distance of the class shares.
    pub jensen_shannon: f64,
    /// The threshold of the distance.
    pub distance_threshold: f64,
    /// The χ² p-value that both share one distribution; `1` when only one class has been seen.
    pub p_value: f64,
    /// The threshold of the p-value.
    pub p_threshold: f64,
    /// Predictions in the reference.
    pub reference_count: u64,
    /// Predictions in the window.
    pub current_count: u64,
    /// Whether both are past their thresholds.
    pub drifted: bool,
}

/// What a closed window shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WindowReport {
    /// The window's number, from 0.
    pub window_index: u64,
    /// Observations in the window.
    pub samples: u64,
    /// PSI, then its test, of every column in the order of the reference.
    pub features: Vec<FeatureDrift>,
    /// The predicted classes.
    pub prediction: PredictionDrift,
    /// Columns that have more than one value in reference and window together.
    pub informative_columns: u64,
    /// Columns that drift.
    pub drifted_columns: u64,
    /// The share of informative columns that makes the data set drift.
    pub drifted_share_threshold: f64,
    /// The smallest corrected p-value of the columns that drift; `1` when none does.
    pub dataset_p_value: f64,
    /// Its threshold, which is corrected for all looks.
    pub dataset_p_threshold: f64,
    /// Whether the data set drifts: the share and the p-value are past their thresholds.
    pub dataset_drift: bool,
}

impl WindowReport {
    /// The drifting columns' rows, the largest PSI first: what an event names and a person reads.
    #[must_use]
    pub fn worst_features(&self, count: usize) -> Vec<&FeatureDrift> {
        let drifting = |row: &&FeatureDrift| row.drifted && row.statistic == Statistic::Psi;
        let mut rows: Vec<&FeatureDrift> = self.features.iter().filter(drifting).collect();
        rows.sort_by(|a, b| b.value.total_cmp(&a.value));
        rows.truncate(count);
        rows
    }
}

/// Compares tumbling windows of observations with a reference.
#[derive(Debug)]
pub struct WindowMonitor {
    reference: Arc<Reference>,
    /// The reference columns as the statistics want them, made once.
    baselines: Arc<Vec<Baseline>>,
    config: MonitorConfig,
    window_index: u64,
    samples: usize,
    columns: Vec<Vec<f64>>,
    prediction_counts: BTreeMap<u32, u64>,
}

impl WindowMonitor {
    /// Starts with an empty window.
    ///
    /// # Errors
    /// [`MonitorConfigError`] names the key that is out of range.
    pub fn new(reference: Reference, config: MonitorConfig) -> Result<Self, MonitorConfigError> {
        config.validate()?;
        let baselines = Baseline::all(&reference);
        let columns = vec![Vec::with_capacity(config.window_size); baselines.len()];
        Ok(Self {
            reference: Arc::new(reference),
            baselines: Arc::new(baselines),
            config,
            window_index: 0,
            samples: 0,
            columns,
            prediction_counts: BTreeMap::new(),
        })
    }

    /// Another monitor of the same reference, which they share, with an empty window.
    #[must_use]
    pub fn begin_another(&self) -> Self {
        Self {
            reference: Arc::clone(&self.reference),
            baselines: Arc::clone(&self.baselines),
            config: self.config.clone(),
            window_index: 0,
            samples: 0,
            columns: vec![Vec::new(); self.columns.len()],
            prediction_counts: BTreeMap::new(),
        }
    }

    /// What an open window takes at the most.
    #[must_use]
    pub fn window_bytes(&self) -> usize {
        self.config.window_size * self.columns.len() * size_of::<f64>()
    }

    /// Observations in the open window.
    #[must_use]
    pub fn pending_samples(&self) -> usize {
        self.samples
    }

    /// Windows closed so far.
    #[must_use]
    pub fn closed_windows(&self) -> u64 {
        self.window_index
    }

    /// Takes one served row and the class the model answered; reports when this closes the window. Closing sorts and
    /// tests every column, which takes milliseconds: keep it off the request path.
    ///
    /// # Errors
    /// [`ObserveError`] names the feature; the window is unchanged.
    pub fn observe(
        &mut self,
        features: &[f32],
        predicted_class: u32,
    ) -> Result<Option<WindowReport>, ObserveError> {
        let expected = self.columns.len();
        if features.len() != expected {
            return Err(ObserveError::WidthMismatch {
                expected,
                got: features.len(),
            });
        }
        if let Some(at) = features.iter().position(|value| !value.is_finite()) {
            let feature = self.reference.columns()[at].feature().to_owned();
            return Err(ObserveError::NotFinite {
                feature,
                value: features[at],
            });
        }
        for (column, value) in self.columns.iter_mut().zip(features) {
            column.push(f64::from(*value));
        }
        *self.prediction_counts.entry(predicted_class).or_insert(0) += 1;
        self.samples += 1;
        Ok((self.samples == self.config.window_size).then(|| self.close()))
    }

    fn close(&mut self) -> WindowReport {
        for column in &mut self.columns {
            column.sort_by(f64::total_cmp);
        }
        let prediction = self.prediction_drift();
        let (features, informative_columns, drifted_columns) = self.feature_drifts();
        let share = drifted_columns as f64 / (informative_columns as f64).max(1.0);
        let dataset_p_value = features
            .iter()
            .filter(|row| row.drifted)
            .filter_map(|row| row.p_value)
            .fold(1.0, f64::min);
        let report = WindowReport {
            window_index: self.window_index,
            samples: self.samples as u64,
            features,
            prediction,
            informative_columns,
            drifted_columns,
            drifted_share_threshold: self.config.drifted_share_threshold,
            dataset_p_value,
            dataset_p_threshold: self.config.dataset_p_threshold,
            dataset_drift: share >= self.config.drifted_share_threshold
                && dataset_p_value <= self.config.dataset_p_threshold,
        };
        self.window_index += 1;
        self.samples = 0;
        self.prediction_counts.clear();
        for column in &mut self.columns {
            column.clear();
        }
        report
    }

    fn feature_drifts(&self) -> (Vec<FeatureDrift>, u64, u64) {
        let found: Vec<Comparison> = self
            .baselines
            .iter()
            .zip(&self.columns)
            .map(|(baseline, current)| baseline.compare(current))
            .collect();
        // A column of one value has p = 1; leaving it out of the correction keeps the others' power.
        let informative = |comparison: &&Comparison| !comparison.is_one_value;
        let raw: Vec<f64> = found
            .iter()
            .filter(informative)
            .map(|one| one.p_value)
            .collect();
        let mut corrected = benjamini_hochberg(&raw).into_iter();
        let (mut rows, mut drifted_columns) = (Vec::with_capacity(2 * found.len()), 0);
        for (index, comparison) in found.iter().enumerate() {
            let p_value = if comparison.is_one_value {
                1.0
            } else {
                corrected
                    .next()
                    .expect("each informative column has a p-value")
            };
            let pair = self.rows_of(index, comparison, p_value);
            drifted_columns += u64::from(pair[0].drifted);
            rows.extend(pair);
        }
        (rows, raw.len() as u64, drifted_columns)
    }

    /// PSI and the test of a column.
    fn rows_of(&self, index: usize, found: &Comparison, p_value: f64) -> [FeatureDrift; 2] {
        let config = &self.config;
        let is_significant = p_value <= config.p_threshold;
        let (threshold, is_past) = match found.test {
            Statistic::Wasserstein => {
                let threshold = config.wasserstein_threshold;
                (threshold, is_significant && found.value >= threshold)
            }
            Statistic::JensenShannon => {
                let threshold = config.category_distance_threshold;
                (threshold, is_significant && found.value >= threshold)
            }
            Statistic::Ks | Statistic::ChiSquare | Statistic::Psi => {
                (config.p_threshold, is_significant)
            }
        };
        let is_large = found.psi >= config.psi_threshold;
        let psi = FeatureDrift {
            feature: self.reference.columns()[index].feature().to_owned(),
            statistic: Statistic::Psi,
            value: found.psi,
            p_value: None,
            threshold: config.psi_threshold,
            error_max: None,
            reference_count: found.reference_rows,
            current_count: self.samples as u64,
            exceeded: is_large,
            drifted: is_large && is_past,
            categories: Vec::new(),
        };
        let test = FeatureDrift {
            statistic: found.test,
            value: found.value,
            p_value: Some(p_value),
            threshold,
            error_max: found.error_max,
            exceeded: is_past,
            categories: found.moved.clone(),
            ..psi.clone()
        };
        [psi, test]
    }

    fn prediction_drift(&self) -> PredictionDrift {
        let reference_counts = self.reference.prediction_counts();
        let classes: BTreeSet<u32> = reference_counts
            .keys()
            .chain(self.prediction_counts.keys())
            .copied()
            .collect();
        let aligned = |counts: &BTreeMap<u32, u64>| -> Vec<u64> {
            classes
                .iter()
                .map(|class| counts.get(class).copied().unwrap_or(0))
                .collect()
        };
        let (reference, current) = (aligned(reference_counts), aligned(&self.prediction_counts));
        let jensen_shannon = jensen_shannon_distance(&reference, &current)
            .expect("a reference and a closed window hold predictions");
        let p_value = chi_square_homogeneity(&reference, &current).map_or(1.0, |test| test.p_value);
        let (distance_threshold, p_threshold) = (
            self.config.prediction_distance_threshold,
            self.config.prediction_p_threshold,
        );
        PredictionDrift {
            jensen_shannon,
            distance_threshold,
            p_value,
            p_threshold,
            reference_count: reference.iter().sum(),
            current_count: current.iter().sum(),
            drifted: jensen_shannon >= distance_threshold && p_value <= p_threshold,
        }
    }
}

#[cfg(test)]
#[path = "window_alarms_tests.rs"]
mod alarms_tests;
#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
