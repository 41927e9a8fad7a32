//! Which fault of a scenario comes when, drawn from a seed.
//!
//! Invariants:
//! 1. [`Timeline::draw`] is a function of its arguments: ChaCha8, a stream for each entry of the
//!    scenario, so that an entry that is added leaves the others' faults as they were.
//! 2. Of one entry's faults no two overlap; every fault is over when the run's time is.

use std::fmt;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::fault_plan::{FaultKind, Peers, Victim};
use super::scenario::Scenario;
use crate::schedule::FAULTS_MAX;

/// Clients and cluster find together before anything happens to them.
const QUIET_AT_FIRST: Duration = Duration::from_millis(1_500);

/// One fault to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// When, since the workload's begin.
    pub at: Duration,
    /// For how long.
    pub lasts: Duration,
    /// Which entry of the scenario asks for it.
    pub entry: usize,
    /// What happens.
    pub kind: FaultKind,
    /// To whom.
    pub target: Victim,
    /// Which of several, and which way: drawn, to be taken modulo.
    pub pick: u32,
    /// For cuts and disturbances: with whom.
    pub peers: Peers,
}

/// The faults of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeline {
    faults: Vec<Planned>,
}

impl Timeline {
    /// Draws what `scenario` brings in a run of this length; at most as many faults as a schedule
    /// may have, the rest of the run is quiet then.
    #[must_use]
    pub fn draw(seed: u64, scenario: &Scenario, length: Duration) -> Timeline {
        let mut faults = Vec::new();
        for (entry, plan) in scenario.faults.iter().enumerate() {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(entry as u64 + 1);
            let mut now = QUIET_AT_FIRST;
            for _ in 0..FAULTS_MAX {
                let at = now + between(&mut rng, plan.every_s);
                let lasts = between(&mut rng, plan.lasts_s);
                let pick = rng.random();
                let peers = match plan.peers.unwrap_or(Peers::Everyone) {
                    Peers::Drawn if rng.random() => Peers::Heads,
                    Peers::Drawn => Peers::Everyone,
                    named => named,
                };
                now = at + lasts;
                if now > length {
                    break;
                }
                faults.push(Planned {
                    at,
                    lasts,
                    entry,
                    kind: plan.kind(),
                    target: plan.target(),
                    pick,
                    peers,
                });
            }
        }
        faults.sort_by_key(|fault| (fault.at, fault.entry));
        faults.truncate(FAULTS_MAX);
        Timeline { faults }
    }

    /// The faults, in the order in which they come.
    #[must_use]
    pub fn faults(&self) -> &[Planned] {
        &self.faults
    }
}

/// A time from the first to the second number of seconds, in whole milliseconds.
fn between(rng: &mut ChaCha8Rng, (from, to): (f64, f64)) -> Duration {
    let seconds = from + (to - from) * rng.random::<f64>();
    Duration::from_millis((seconds * 1e3).round() as u64)
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let target = match self.target {
            Victim::Leader => "the leader",
            Victim::Head => "a head",
            Victim::Heads => "all heads",
            Victim::Worker => "a worker",
            Victim::Counter => "the counter",
            Victim::Trainer => "a trainer",
            Victim::Driver => "the driver that trains",
        };
        let seconds = self.at.as_secs_f64();
        let lasts = self.lasts.as_millis();
        write!(
            f,
            "{seconds:7.1} s  {} {target}, {lasts} ms",
            self.kind.as_str()
        )?;
        if self.kind.needs_network() && self.peers == Peers::Heads {
            write!(f, ", towards heads")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_seed_draws_the_same_faults_for_ever() {
        let scenario = Scenario::from_toml(STORM, "storm").unwrap();
        let drawn = Timeline::draw(1, &scenario, Duration::from_secs(20));
        let lines = drawn.faults().iter().map(ToString::to_string);
        let lines: Vec<String> = lines.map(|line| line.trim().to_owned()).collect();
        // If this changes, seeds of old reports no longer repeat their runs.
        assert_eq!(lines.join("\n"), EXPECTED_OF_SEED_1);
    }

    /// Of its own, so that a built-in scenario may change.
    const STORM: &str = r#"
title = "storm"
[cluster]
heads = 3
workers = 1
[workload]
submitters = 0
submits_per_second = 0
register_clients = 0
registers = 0
register_operations_per_second = 0
[checks]
jobs_min_per_minute = 0
register_operations_min_per_minute = 0
faults_min_per_minute = 0
[[fault]]
kind = "cut"
peers = "drawn"
every_s = [2, 4]
lasts_s = [1, 3]
[[fault]]
kind = "kill"
target = "head"
every_s = [5, 9]
lasts_s = [0.1, 0.8]
"#;

    const EXPECTED_OF_SEED_1: &str = "\
5.2 s  cut the leader, 1102 ms, towards heads
8.5 s  cut the leader, 2928 ms
10.0 s  kill a head, 578 ms
15.2 s  cut the leader, 2365 ms, towards heads
16.1 s  kill a head, 752 ms";

    #[test]
    fn faults_of_an_entry_do_not_overlap_and_end_in_time() {
        for (name, _) in super::super::scenario::BUILT_IN {
            let scenario = Scenario::built_in(name).unwrap();
            for seed in 0..50 {
                let timeline = Timeline::draw(seed, &scenario, MINUTE);
                assert!(!timeline.faults().is_empty(), "{name}");
                for entry in 0..scenario.faults.len() {
                    let of_entry = timeline.faults().iter().filter(|f| f.entry == entry);
                    let times: Vec<_> = of_entry.map(|f| (f.at, f.at + f.lasts)).collect();
                    assert!(times.windows(2).all(|pair| pair[0].1 <= pair[1].0));
                    assert!(times.iter().all(|(_, end)| *end <= MINUTE));
                }
            }
        }
    }

    #[test]
    fn an_entry_that_is_added_leaves_the_others_as_they_were() {
        let mut scenario = Scenario::from_toml(STORM, "storm").unwrap();
        let both = Timeline::draw(5, &scenario, MINUTE);
        scenario.faults.pop();
        let alone = Timeline::draw(5, &scenario, MINUTE);
        let of_first = both.faults().iter().filter(|fault| fault.entry == 0);
        assert!(of_first.eq(alone.faults()));
        assert_ne!(alone, Timeline::draw(6, &scenario, MINUTE));
    }
}
