//! Deterministic simulation of the control plane: whole clusters in one thread, in virtual time, with
//! everything that can go wrong going wrong, and every answer checked.
//!
//! ```text
//! seed ─► Swarm (which faults, how often) ─► World: heap of events
//!           heads: production core (raft loop, log, tables, sessions, scheduler) on a store in
//!                  memory that forgets what was not synced
//!           workers, clients, operator: models                 network, disks, clocks: models
//!         every message, commit, answer and table ─► RaftChecker, Model ─► Violation, or a trace
//! ```
//!
//! A run has two phases. In the first, anything may fail, and nothing may be *wrong*. Then everything
//! is healed, and all that was begun must end within a bound (I18).
//!
//! Invariants:
//! 1. A seed is a run: the same one twice gives the same trace, on every machine.
//! 2. The heads run the code that real heads run; see [`mobula_head::simulation`].
//! 3. A checker says "broken" with the evidence, and a run that could not be judged is broken too.

mod asked;
mod campaign;
mod checks;
mod client;
mod coverage;
mod domain;
mod domain_model;
mod duties;
mod experiment_model;
mod experiments;
mod fault;
mod head;
mod kept;
mod model;
mod network;
mod operator;
mod options;
mod packet;
mod raft_check;
mod rollouts;
#[cfg(test)]
mod tests;
mod trace;
mod violation;
mod watches;
mod worker;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

pub use campaign::{Campaign, Summary, run_many};
pub use coverage::Counts;
pub use options::Swarm;
pub use violation::Violation;

use world::World;

/// Events after which a run counts as endless: two orders of magnitude above a common one.
pub const EVENTS_MAX: u64 = 3_000_000;

/// What became of a seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What it was about.
    pub swarm: Swarm,
    /// All that happened, as one number.
    pub trace: u64,
    /// What was counted on the way.
    pub counts: Counts,
    /// How long it would have taken, in milliseconds.
    pub virtual_ms: u64,
    /// The bound on its events.
    pub events_max: u64,
    /// What was wrong.
    pub violation: Option<Violation>,
}

impl Report {
    /// The command that does this again.
    #[must_use]
    pub fn replay(&self) -> String {
        let mut command = format!("mobula chaos sim --seed {} --verbose", self.seed);
        if self.events_max != EVENTS_MAX {
            command += &format!(" --events-max {}", self.events_max);
        }
        command
    }
}

std::thread_local! {
    static PANIC: std::cell::RefCell<Option<String>> = const { std::cell::RefCell::new(None) };
    static RUNS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// A panic in a simulated head is a finding of the run, and not the end of the process.
fn keep_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if RUNS.get() {
                PANIC.set(Some(info.to_string()));
            } else {
                before(info);
            }
        }));
    });
}

/// Runs one seed, of at most `events_max` events. `is_verbose` prints what happens.
#[must_use]
pub fn run(seed: u64, events_max: u64, is_verbose: bool) -> Report {
    keep_panics();
    let mut world = World::new(seed, events_max, is_verbose);
    RUNS.set(true);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    RUNS.set(false);
    world.count_up();
    let violation = match ended {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation),
        Err(_) => {
            let message = PANIC.take().unwrap_or_else(|| "without a word".to_owned());
            Some(Violation::new("no head panics", message))
        }
    };
    Report {
        seed,
        swarm: world.swarm.clone(),
        trace: world.trace.value(),
        counts: world.counts,
        virtual_ms: world.now / options::MILLISECOND,
        events_max,
        violation,
    }
}
