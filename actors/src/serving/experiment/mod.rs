//! Experiments: two versions answer side by side, and numbers that were agreed on before say which is better.
//!
//! * [`plan`]: what is compared and by which numbers: written down before the first request, and never changed.
//! * [`command`]: what can be said about an experiment.
//! * [`state`]: experiments as a replicated table (pure).
//! * [`findings`]: what the numbers say, in a form that a row can hold.
//! * [`tally`]: which keys met which version, and what came of them (pure).
//! * `shelf`: where what a router counted is stored, for the next one to go on with.
//! * [`analysis`]: from sums to intervals, and whether the groups have the sizes that they should (pure).
//! * `sentinels`: rows whose answers are known, which the treatment is asked.
//! * [`outcomes`]: what callers report of a key later on, over HTTP.
//! * `comparing`: the router's end.

pub mod analysis;
pub mod command;
pub(in crate::serving) mod comparing;
pub mod findings;
pub mod outcomes;
pub mod plan;
mod sentinels;
mod shelf;
pub mod state;
pub mod tally;

pub use plan::{Direction, Experiment, Guardrail, Measure, Metric, Plan};
