//! Drift: does what an endpoint sees today still look like what its model was trained on?
//!
//! * [`window`] compares windows of traffic with a [`mod@reference`], by [`statistics`]; of a large reference there are [`sketches`].
//!   [`streams`] finds changes number by
//!   number, and [`vitals`] says how well a version does: how sure it is, how often it is right, in which slices.
//! * [`monitor`]: the actor that is fed by an endpoint's router, around a `watch` of what it is given. [`state`]: the replicated table of what monitors found.
//!   [`mod@log`]: its answers as files. [`signals`]: those that are about no window, and with [`growth`] whether errors that grew are still as many. [`retraining`]: what is done about it, up to another version in service. [`client`]: what the command line asks.
//!
//! 1. `window`, `baseline`, `categories`, `reference`, `sketches`, `statistics`, `findings`, `growth` and `state` are pure functions of their arguments: no clock, no randomness, no
//!    I/O.
//! 2. Memory is bounded: a [`Reference`] keeps at most [`MAX_REFERENCE_ROWS`] rows and a [`WindowMonitor`] at most one
//!    window of [`MAX_WINDOW_SIZE`] observations. What is known of more rows than that is a sketch of constant size.
//! 3. A column drifts only when it is both *significant* (Kolmogorov-Smirnov or Wasserstein, of categories χ², corrected for the number of columns) and
//!    *large* (PSI above its threshold, and the Wasserstein or Jensen-Shannon distance where there is one); a data set drifts only when enough of its columns do. One rule alone raises
//!    false alarms: a small p-value is cheap with many samples, a large PSI is cheap with few.

mod baseline;
mod categories;
pub mod client;
mod findings;
pub mod growth;
pub mod labels;
pub mod log;
pub mod monitor;
mod named;
pub mod reference;
pub mod retraining;
pub mod signals;
pub mod sketches;
pub mod state;
pub mod statistics;
pub mod streams;
pub mod vitals;
mod watch;
pub mod window;
mod window_config;

pub use reference::{MAX_REFERENCE_ROWS, Reference, ReferenceColumn, ReferenceError};
pub use window::{
    Category, FeatureDrift, MAX_WINDOW_SIZE, MonitorConfig, MonitorConfigError, ObserveError,
    PredictionDrift, Statistic, WindowMonitor, WindowReport,
};
