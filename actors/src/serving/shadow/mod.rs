//! Shadowing: copies of requests go to a candidate whose answers nobody gets, and are compared with those that
//! the callers got.
//!
//! * [`plan`]: how many requests, and which differences count.
//! * [`compare`]: whether two answers are the same, by the types of their outputs (pure).
//! * [`trial`]: what the comparisons came to, and what follows (pure).
//! * [`mirror`]: the queue of copies, which sheds rather than waits.

pub mod compare;
pub mod mirror;
pub mod plan;
pub mod trial;

pub use plan::{Plan, Rule};
