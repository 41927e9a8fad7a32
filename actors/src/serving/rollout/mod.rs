//! Rollouts: how an endpoint goes from one version of its model to another, step by step, with
//! numbers for every step.
//!
//! * [`plan`]: what a rollout is: strategy, steps, guardrails, decisions with their evidence.
//! * [`command`]: what can be said about one.
//! * [`state`]: rollouts as a replicated table (pure); `start`: how one begins; `recording`: what the registry's log
//!   says of its end.
//! * [`split`]: which version a request goes to: sticky, by a hash of its key.
//! * [`sequential`]: tests whose error bound holds at every look (pure).
//! * `looking`: what a router sees of a step; `reporting`: when the head hears of one that is not decided, and
//!   `waiting`: how long a candidate's replicas are waited for; `sentinels`: rows whose answers are known, which a
//!   candidate is asked before it is gone on with.
//! * [`trial`]: what both versions answered in a step, and what follows from it (pure); `tail`: the same of their 95th
//!   percentiles.

pub mod command;
#[cfg(test)]
pub(in crate::serving) mod fixture;
pub(in crate::serving) mod looking;
pub mod plan;
mod recording;
pub(in crate::serving) mod reporting;
pub(in crate::serving) mod sentinels;
pub mod sequential;
pub mod split;
pub(in crate::serving) mod start;
pub mod state;
mod tail;
pub mod trial;
mod waiting;

pub use plan::{Guardrails, Phase, Rollout, Strategy};
