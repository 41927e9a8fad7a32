//! Which fault comes when, drawn from a seed.
//!
//! A moment is an amount of progress (so many operations have ended), not a time: so the same seed
//! hits the same part of the work on a fast machine and on a slow one.
//!
//! Invariants:
//! 1. [`Schedule::draw`] is a function of its arguments: ChaCha8, whose output is the same in every
//!    version and on every machine.
//! 2. Faults come in the order of their moments, and no two at the same one.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How many faults one schedule may have: a run with more is several runs.
pub const FAULTS_MAX: usize = 10_000;

/// How long a killed process stays away. From nothing to about what an operator's restart takes.
const DOWN_MS: Range<u64> = 0..800;

/// How long a stopped process stays silent: shorter and longer than timeouts of connections.
const PAUSE_MS: Range<u64> = 100..3_000;

/// The variable that repeats a run.
pub const SEED_VARIABLE: &str = "MOBULA_TEST_SEED";

/// The seed to use: that of [`SEED_VARIABLE`], or a fresh one.
pub fn seed_from_env() -> Result<u64, ScheduleError> {
    match std::env::var(SEED_VARIABLE) {
        Err(_) => Ok(rand::rng().random()),
        Ok(text) => text
            .trim()
            .parse()
            .map_err(|_| ScheduleError::Seed { text }),
    }
}

/// Why no schedule could be drawn.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// More faults than moments.
    #[error(
        "{faults} faults do not fit {moments} moments of progress, at most {FAULTS_MAX}: ask for \
         fewer faults, or for more work"
    )]
    TooMany {
        /// Faults asked for.
        faults: usize,
        /// Moments there are.
        moments: u64,
    },
    /// Nobody to hurt.
    #[error("the plan names no target: name a process, say head-1")]
    NoTarget,
    /// The seed cannot be read.
    #[error("`{text}` in {SEED_VARIABLE} is no seed: give the number that a run printed")]
    Seed {
        /// What was given.
        text: String,
    },
}

/// What a schedule is drawn from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// How many times a target is killed and started again.
    pub kills: usize,
    /// How many times a target is stopped and continued.
    pub pauses: usize,
    /// The progress within which faults come.
    pub progress: Range<u64>,
    /// Names of the processes, one of which each fault takes.
    pub targets: Vec<String>,
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; it is started again after this long.
    Kill {
        /// How long it stays away.
        down: Duration,
    },
    /// SIGSTOP, and SIGCONT after this long.
    Pause {
        /// How long it stays silent.
        silent: Duration,
    },
}

/// One fault, and when it comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The progress at which it comes.
    pub progress: u64,
    /// Whom it hits.
    pub target: String,
    /// What happens.
    pub fault: Fault,
}

/// The faults of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    seed: u64,
    events: Vec<Event>,
}

impl Schedule {
    /// Draws the faults that `plan` asks for.
    pub fn draw(seed: u64, plan: &Plan) -> Result<Self, ScheduleError> {
        let faults = plan.kills.saturating_add(plan.pauses);
        let moments = plan.progress.end.saturating_sub(plan.progress.start);
        let room = usize::try_from(moments).unwrap_or(usize::MAX);
        if faults > room.min(FAULTS_MAX) {
            return Err(ScheduleError::TooMany { faults, moments });
        }
        if plan.targets.is_empty() {
            return Err(ScheduleError::NoTarget);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut drawn: Vec<u64> = sample(&mut rng, room, faults)
            .into_iter()
            .map(|moment| plan.progress.start + moment as u64)
            .collect();
        drawn.sort_unstable();
        let mut kills_left = plan.kills;
        let mut events = Vec::with_capacity(faults);
        for (index, progress) in drawn.into_iter().enumerate() {
            // Each order of kills and pauses is equally likely.
            let is_kill = rng.random_range(0..faults - index) < kills_left;
            kills_left -= usize::from(is_kill);
            let fault = if is_kill {
                let down = Duration::from_millis(rng.random_range(DOWN_MS));
                Fault::Kill { down }
            } else {
                let silent = Duration::from_millis(rng.random_range(PAUSE_MS));
                Fault::Pause { silent }
            };
            let target = plan.targets[rng.random_range(0..plan.targets.len())].clone();
            events.push(Event {
                progress,
                target,
                fault,
            });
        }
        Ok(Schedule { seed, events })
    }

    /// What it was drawn from.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The faults, in the order in which they come.
    #[must_use]
    pub fn events(&self) -> &[Event] {
        &self.events
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Kill { down } => write!(f, "kill -9, back after {} ms", down.as_millis()),
            Fault::Pause { silent } => write!(f, "stopped for {} ms", silent.as_millis()),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {0}: repeat with {SEED_VARIABLE}={0}", self.seed)?;
        for event in &self.events {
            let Event {
                progress,
                target,
                fault,
            } = event;
            write!(f, "\n  after {progress:>4} operations: {target} {fault}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan() -> Plan {
        Plan {
            kills: 2,
            pauses: 1,
            progress: 5..60,
            targets: vec!["head-1".to_owned(), "worker-1".to_owned()],
        }
    }

    #[test]
    fn a_seed_draws_the_same_faults_for_ever() {
        let drawn = Schedule::draw(1, &plan()).unwrap().to_string();
        // If this changes, seeds of old reports no longer repeat their runs.
        assert_eq!(drawn, EXPECTED_OF_SEED_1, "{drawn}");
    }

    const EXPECTED_OF_SEED_1: &str = "\
seed 1: repeat with MOBULA_TEST_SEED=1
  after   26 operations: head-1 kill -9, back after 477 ms
  after   34 operations: worker-1 kill -9, back after 226 ms
  after   59 operations: worker-1 stopped for 1437 ms";

    #[test]
    fn a_plan_that_cannot_be_met_is_refused() {
        let crowded = Plan {
            progress: 5..7,
            ..plan()
        };
        let error = Schedule::draw(1, &crowded).unwrap_err();
        assert!(
            error.to_string().contains("3 faults do not fit 2 moments"),
            "{error}"
        );
        let nobody = Plan {
            targets: Vec::new(),
            ..plan()
        };
        assert_eq!(Schedule::draw(1, &nobody), Err(ScheduleError::NoTarget));
    }

    proptest! {
        #[test]
        fn every_seed_gives_what_the_plan_asks_for(
            seed: u64, kills in 0usize..8, pauses in 0usize..8, start in 0u64..100, more in 0u64..100,
        ) {
            let moments = kills as u64 + pauses as u64 + more;
            let plan = Plan { kills, pauses, progress: start..start + moments, ..plan() };
            let schedule = Schedule::draw(seed, &plan).unwrap();
            prop_assert_eq!(&schedule, &Schedule::draw(seed, &plan).unwrap());
            let events = schedule.events();
            let killed = events.iter().filter(|e| matches!(e.fault, Fault::Kill { .. })).count();
            prop_assert_eq!((killed, events.len() - killed), (kills, pauses));
            prop_assert!(events.windows(2).all(|pair| pair[0].progress < pair[1].progress));
            prop_assert!(events.iter().all(|event| plan.progress.contains(&event.progress)));
        }
    }
}
