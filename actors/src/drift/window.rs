//! A monitor that compares tumbling windows of live traffic with a reference.
//!
//! 1. A window closes after exactly `window_size` observations, whatever time that takes; then it starts empty.
//! 2. A column that has one and the same value in the reference and in the window is not informative: it neither drifts
//!    nor counts among the columns of which a share must drift.
//! 3. A column drifts when its PSI reaches the threshold *and* its Kolmogorov-Smirnov p-value, corrected by Benjamini and
//!    Hochberg over the informative columns, is at most the threshold. The data set drifts when at least the configured
//!    share of informative columns does. Predictions drift by χ² and Jensen-Shannon in the same way.
//! 4. A refused observation leaves the window as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::reference::Reference;
use super::statistics::{
    benjamini_hochberg, chi_square_homogeneity, jensen_shannon_distance, kolmogorov_smirnov,
    population_stability_index,
};

/// Observations a window may hold: with the column bound of a reference this limits a monitor's memory.
pub const MAX_WINDOW_SIZE: usize = 10_000;

/// Observations a window must hold: below, no statistic here can tell a shift from chance.
pub const MIN_WINDOW_SIZE: usize = 20;

/// Looks at a stream for which single tests are corrected (Bonferroni): a window a minute, for thirty days. Uncorrected, a
/// test at `.05` is an alarm every twenty windows of a stream that never changes.
pub const LOOKS: f64 = 30.0 * 24.0 * 60.0;

/// What a monitor decides by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MonitorConfig {
    /// Observations a window.
    pub window_size: usize,
    /// PSI from which a column's shift counts as large; `.1` is moderate, `.25` large by convention.
    pub psi_threshold: f64,
    /// Corrected Kolmogorov-Smirnov p-value up to which a column's shift counts as significant.
    pub ks_p_threshold: f64,
    /// Share of the informative columns that must drift for the data set to drift.
    pub drifted_share_threshold: f64,
    /// Jensen-Shannon distance from which a shift of the predicted classes counts as large.
    pub prediction_distance_threshold: f64,
    /// χ² p-value up to which a shift of the predicted classes counts as significant, corrected for [`LOOKS`].
    pub prediction_p_threshold: f64,
}

impl MonitorConfig {
    /// The thresholds of the field (PSI .25, KS .05, half of the columns, Jensen-Shannon .1, χ² .05 over all looks) for a window size.
    #[must_use]
    pub fn with_window_size(window_size: usize) -> Self {
        Self {
            window_size,
            psi_threshold: 0.25,
            ks_p_threshold: 0.05,
            drifted_share_threshold: 0.5,
            prediction_distance_threshold: 0.1,
            prediction_p_threshold: 0.05 / LOOKS,
        }
    }

    fn validate(&self) -> Result<(), MonitorConfigError> {
        if !(MIN_WINDOW_SIZE..=MAX_WINDOW_SIZE).contains(&self.window_size) {
            return Err(MonitorConfigError::WindowSize {
                got: self.window_size,
            });
        }
        let check = |key: &'static str, got: f64, max: f64| {
            let valid = got > 0.0 && got <= max;
            if valid {
                Ok(())
            } else {
                Err(MonitorConfigError::Threshold { key, got, max })
            }
        };
        check("psi_threshold", self.psi_threshold, f64::MAX)?;
        check("ks_p_threshold", self.ks_p_threshold, 1.0)?;
        check("drifted_share_threshold", self.drifted_share_threshold, 1.0)?;
        check(
            "prediction_distance_threshold",
            self.prediction_distance_threshold,
            1.0,
        )?;
        check("prediction_p_threshold", self.prediction_p_threshold, 1.0)
    }
}

/// Why a monitor configuration is refused.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum MonitorConfigError {
    /// The window is too small to decide or too large to keep.
    #[error("window_size {got} is outside {MIN_WINDOW_SIZE}..={MAX_WINDOW_SIZE}")]
    WindowSize {
        /// The size given.
        got: usize,
    },
    /// A threshold is out of its range.
    #[error("{key} {got} must be above 0 and at most {max}")]
    Threshold {
        /// The configuration key.
        key: &'static str,
        /// The value given.
        got: f64,
        /// The largest value allowed.
        max: f64,
    },
}

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
    /// What the value (PSI) or the p-value (KS) is compared with.
    pub threshold: f64,
    /// Rows of the reference sample.
    pub reference_count: u64,
    /// Rows of the window.
    pub current_count: u64,
    /// Whether this statistic is past its threshold.
    pub exceeded: bool,
    /// Whether the column drifts, which takes both statistics.
    pub drifted: bool,
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
    /// PSI, then KS, of every column in the order of the reference.
    pub features: Vec<FeatureDrift>,
    /// The predicted classes.
    pub prediction: PredictionDrift,
    /// Columns that have more than one value in reference and window together.
    pub informative_columns: u64,
    /// Columns that drift.
    pub drifted_columns: u64,
    /// The share of informative columns that makes the data set drift.
    pub drifted_share_threshold: f64,
    /// Whether the data set drifts.
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
    /// The reference columns as the statistics want them, widened once.
    reference_columns: Arc<Vec<Vec<f64>>>,
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
        let widen = |values: &[f32]| values.iter().copied().map(f64::from).collect();
        let reference_columns: Vec<Vec<f64>> = reference
            .columns()
            .iter()
            .map(|column| widen(column.sorted_values()))
            .collect();
        let columns = vec![Vec::with_capacity(config.window_size); reference_columns.len()];
        Ok(Self {
            reference: Arc::new(reference),
            reference_columns: Arc::new(reference_columns),
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
            reference_columns: Arc::clone(&self.reference_columns),
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
        let report = WindowReport {
            window_index: self.window_index,
            samples: self.samples as u64,
            features,
            prediction,
            informative_columns,
            drifted_columns,
            drifted_share_threshold: self.config.drifted_share_threshold,
            dataset_drift: share >= self.config.drifted_share_threshold,
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
        let pairs = || self.reference_columns.iter().zip(&self.columns);
        let informative: Vec<usize> = pairs()
            .enumerate()
            .filter(|(_, (reference, current))| !is_one_value(reference, current))
            .map(|(index, _)| index)
            .collect();
        // A column of one value has D = 0 and p = 1; leaving it out of the correction keeps the others' power.
        let tests: Vec<_> = pairs()
            .map(|(reference, current)| {
                kolmogorov_smirnov(reference, current)
                    .expect("a reference column and a closed window are never empty")
            })
            .collect();
        let raw: Vec<f64> = informative
            .iter()
            .map(|index| tests[*index].p_value)
            .collect();
        let mut p_values = vec![1.0; tests.len()];
        for (index, p_value) in informative.iter().zip(benjamini_hochberg(&raw)) {
            p_values[*index] = p_value;
        }
        let (mut rows, mut drifted_columns) = (Vec::with_capacity(2 * tests.len()), 0);
        for (index, (reference, current)) in pairs().enumerate() {
            let psi = population_stability_index(reference, current)
                .expect("a reference column and a closed window are never empty");
            let is_large = psi >= self.config.psi_threshold;
            let is_significant = p_values[index] <= self.config.ks_p_threshold;
            let drifted = is_large && is_significant;
            drifted_columns += u64::from(drifted);
            let row = |statistic, value, p_value, threshold, exceeded| FeatureDrift {
                feature: self.reference.columns()[index].feature().to_owned(),
                statistic,
                value,
                p_value,
                threshold,
                reference_count: reference.len() as u64,
                current_count: current.len() as u64,
                exceeded,
                drifted,
            };
            rows.push(row(
                Statistic::Psi,
                psi,
                None,
                self.config.psi_threshold,
                is_large,
            ));
            let (value, p_value) = (tests[index].statistic, Some(p_values[index]));
            let threshold = self.config.ks_p_threshold;
            rows.push(row(
                Statistic::Ks,
                value,
                p_value,
                threshold,
                is_significant,
            ));
        }
        (rows, informative.len() as u64, drifted_columns)
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

/// Whether two ascending, non-empty samples hold a single value between them.
fn is_one_value(reference: &[f64], current: &[f64]) -> bool {
    let ends = [
        reference.first(),
        reference.last(),
        current.first(),
        current.last(),
    ];
    ends.iter().all(|end| *end == ends[0])
}

#[cfg(test)]
#[path = "window_alarms_tests.rs"]
mod alarms_tests;
#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
