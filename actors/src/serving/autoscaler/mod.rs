//! How many replicas an endpoint has: as many as its load needs, within bounds.
//!
//! * [`policy`] is what an operator asks for, [`schedule`] the hours in which other bounds hold.
//! * [`load`] counts what an endpoint's router has in flight; [`windows`] averages it.
//! * [`decision`] turns both into a number of replicas (pure; time comes in).
//! * [`state`] keeps policies and decisions, replicated; `pilot` is the router's end.
//!
//! The endpoint's router decides, because it sees every request, and the head sees one command for each
//! change: load never passes through Raft. A decision is checked against the policy once more where it
//! is applied, and is kept with the numbers that it rests on.

pub mod decision;
pub mod load;
pub(super) mod pilot;
pub mod policy;
pub mod schedule;
pub mod state;
pub mod windows;

pub use decision::{Cause, Change, Figures};
pub use policy::Policy;
pub use state::Scaling;
