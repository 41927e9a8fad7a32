//! Rollouts: how an endpoint goes from one version of its model to another, step by step, with
//! numbers for every step.
//!
//! * [`plan`]: what a rollout is: strategy, steps, guardrails, decisions with their evidence.
//! * [`command`]: what can be said about one.
//! * [`state`]: rollouts as a replicated table (pure); `start`: how one begins.
//! * [`split`]: which version a request goes to: sticky, by a hash of its key.
//! * [`sequential`]: tests whose error bound holds at every look (pure).
//! * `reporting`: when the head hears the numbers of a step that is not decided.
//! * [`trial`]: what both versions answered in a step, and what follows from it (pure).

pub mod command;
pub mod plan;
pub(in crate::serving) mod reporting;
pub mod sequential;
pub mod split;
pub(in crate::serving) mod start;
pub mod state;
pub mod trial;

pub use plan::{Guardrails, Phase, Rollout, Strategy};
