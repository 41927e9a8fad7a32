//! How large a window is, and by which thresholds its columns and predictions drift.

use serde::{Deserialize, Serialize};
use thiserror::Error;

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
    /// Corrected p-value up to which a column's shift counts as significant.
    pub p_threshold: f64,
    /// Wasserstein distance, in standard deviations of the reference, from which a column's shift counts as large.
    pub wasserstein_threshold: f64,
    /// Share of the informative columns that must drift for the data set to drift.
    pub drifted_share_threshold: f64,
    /// Jensen-Shannon distance from which a shift of the predicted classes counts as large.
    pub prediction_distance_threshold: f64,
    /// χ² p-value up to which a shift of the predicted classes counts as significant, corrected for [`LOOKS`].
    pub prediction_p_threshold: f64,
    /// Corrected p-value up to which one of the columns that drift must be for the data set to drift, corrected for [`LOOKS`] as well.
    pub dataset_p_threshold: f64,
    /// Jensen-Shannon distance from which a shift of a column's categories counts as large.
    pub category_distance_threshold: f64,
}

impl MonitorConfig {
    /// The thresholds of the field (PSI .25, p .05, Wasserstein .1, half of the columns, Jensen-Shannon .1) for a window size. What is
    /// said of a whole window, of its predictions or of its data set, has p .05 over all looks.
    #[must_use]
    pub fn with_window_size(window_size: usize) -> Self {
        Self {
            window_size,
            psi_threshold: 0.25,
            p_threshold: 0.05,
            wasserstein_threshold: 0.1,
            drifted_share_threshold: 0.5,
            prediction_distance_threshold: 0.1,
            prediction_p_threshold: 0.05 / LOOKS,
            dataset_p_threshold: 0.05 / LOOKS,
            category_distance_threshold: 0.1,
        }
    }

    pub(super) fn validate(&self) -> Result<(), MonitorConfigError> {
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
        check("p_threshold", self.p_threshold, 1.0)?;
        check(
            "wasserstein_threshold",
            self.wasserstein_threshold,
            f64::MAX,
        )?;
        check("drifted_share_threshold", self.drifted_share_threshold, 1.0)?;
        check(
            "prediction_distance_threshold",
            self.prediction_distance_threshold,
            1.0,
        )?;
        check("prediction_p_threshold", self.prediction_p_threshold, 1.0)?;
        check("dataset_p_threshold", self.dataset_p_threshold, 1.0)?;
        check(
            "category_distance_threshold",
            self.category_distance_threshold,
            1.0,
        )
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
