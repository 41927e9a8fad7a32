//! Drift: does what an endpoint sees today still look like what its model was trained on?
//!
//! 1. Everything here is a pure function of its arguments: no clock, no randomness, no I/O. The actor that feeds a
//!    monitor and the table that keeps its findings live beside these modules and hold all of that.
//! 2. Memory is bounded: a [`Reference`] keeps at most [`MAX_REFERENCE_ROWS`] rows and a [`WindowMonitor`] at most one
//!    window of [`MAX_WINDOW_SIZE`] observations.
//! 3. A column drifts only when it is both *significant* (Kolmogorov-Smirnov, corrected for the number of columns) and
//!    *large* (PSI above its threshold); a data set drifts only when enough of its columns do. One rule alone raises
//!    false alarms: a small p-value is cheap with many samples, a large PSI is cheap with few.

pub mod reference;
pub mod statistics;
pub mod window;

pub use reference::{MAX_REFERENCE_ROWS, Reference, ReferenceColumn, ReferenceError};
pub use window::{
    FeatureDrift, MAX_WINDOW_SIZE, MonitorConfig, MonitorConfigError, ObserveError,
    PredictionDrift, Statistic, WindowMonitor, WindowReport,
};
