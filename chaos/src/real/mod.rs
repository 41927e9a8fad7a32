//! Real processes, hurt on purpose (tier B): scenarios, the machines they run on, the faults, and
//! what must hold afterwards.
//!
//! ```text
//! scenario  ──► timeline ──► injector ─────────────┐ kill, stop, cut, fill, replace
//!   (TOML)      (seed)                              ▼
//!      └──────► cluster ──► nodes on machines ── router ── clients (traffic) ──► histories
//!                                                                                  │
//!                                              outcome ◄── checkers ◄──────────────┘
//! ```
//!
//! * [`scenario`], [`fault_plan`]: what a file says. [`timeline`]: which fault comes when, drawn from the seed.
//! * [`machine`]: a thread with namespaces of its own, where this user may make them; [`router`]: the
//!   network between them; [`disk`]: a small disk of a machine's own. [`node`]: a head's or worker's
//!   process on one; [`machines`], [`cluster`]: all of them.
//! * [`injector`]: does and heals faults; `blackout`: all heads away at once; `notices`: machines taken away with
//!   notice. [`traffic`]: what clients do and were told. [`job`]: the
//!   programs that they submit; `training`: jobs that must end in the same bits; `departures`: what their
//!   drivers did about notices; `takeovers`, `silences`: how soon they went on whose drivers were killed, or fell silent.
//!   [`gaps`]: how long a fault was felt. `leaks`: what is left behind.
//! * [`runner`]: one run; `play`: what happens in it. [`outcome`]: its table.
//!
//! Invariants:
//! 1. The faults of a run are a function of scenario, seed and length. Whom "the leader" means, and how
//!    processes interleave with them, is up to the run.
//! 2. When a run is over, however it ended, none of its processes, networks and mounts is left.
//! 3. A run that has seen too little does not pass.

mod blackout;
pub mod cluster;
mod counting;
mod departures;
mod device;
pub mod disk;
pub mod fault_plan;
pub mod gaps;
pub mod injector;
pub mod job;
mod leaks;
pub mod machine;
pub mod machines;
pub mod node;
mod notices;
pub mod outcome;
mod play;
pub mod router;
pub mod runner;
pub mod scenario;
mod silences;
mod takeovers;
pub mod timeline;
pub mod traffic;
mod training;
mod verdict;

pub use machines::Isolation;
pub use outcome::{Check, Outcome};
pub use runner::{RunError, RunOptions, run};
pub use scenario::{BUILT_IN, Scenario, ScenarioError};
pub use timeline::Timeline;
