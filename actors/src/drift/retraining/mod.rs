//! Retraining: what is done about drift, as replicated state.
//!
//! ```text
//! drift event ─► suggested ─► submitting ─► training ─► evaluating ─► gate ─► queued ─► canary ─► promoted
//!                    │            │            │            │           │        │         └────► rolled back
//!                    └────────────┴────────────┴────────────┴───────────┴────────┴──► failed, not better,
//!                                                                                     budget spent, cancelled
//! ```
//!
//! * [`plan`]: rows: the policy of an endpoint, a retraining, its steps.
//! * [`command`]: what can be said about them.
//! * [`tables`]: the tables, and how their rows are read and shown.
//! * [`state`]: what each command does to the tables (pure).
//! * `next`: which step may be taken now, as a function of all tables (pure).
//! * [`evaluation`]: whether a new version is better than the active one (pure).
//! * [`controller`]: the leader's loop, which proposes steps, jobs, and the end of jobs that nobody waits for.
//!
//! Invariants:
//! 1. An endpoint has one retraining under way at the most. A drift event leads to one, and to another one each time that
//!    the cooldown after an end is over and the drift was seen since that end; a drift that has ended begins none.
//! 2. A step names the revision that it follows, and its apply looks again whether it may be taken: a step
//!    that is proposed twice, late, or by two leaders is taken once.
//! 3. A retraining submits one job at the most: the job's idempotency key names the retraining.
//! 4. The canary is begun by the entry that says so. Which version is active only rollouts change.
//! 5. No more jobs are submitted within a period than the policy's budget, and none within the cooldown
//!    after the last retraining's end unless a client asks for it. That the budget is spent ends a retraining; while it is,
//!    the same drift begins no other.

pub mod command;
pub mod controller;
pub mod evaluation;
mod next;
pub mod plan;
pub mod state;
pub mod tables;

pub use command::Command;
pub use plan::{Mode, Phase, RetrainPolicy, Retraining};
pub(super) use state::apply;
pub use tables::{History, Shown};
pub(super) use tables::{find_policy, shown};

#[cfg(test)]
mod errors_tests;
#[cfg(test)]
mod invariants_tests;
#[cfg(test)]
mod leader_tests;
#[cfg(test)]
mod world;
