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
                // Drawn only where it is asked for: other scenarios' seeds draw what they always did.
                let percent = plan.all_workers_percent;
                let target = if percent > 0.0 && rng.random::<f64>() * 100.0 < percent {
                    Victim::Workers
                } else {
                    plan.target()
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
                    target,
                    pick,
                    peers,
                });
            }
        }
        faults.sort_by_key(|fault| (fault.at, fault.entry));
        faults.truncate(FAULTS_MAX);
        Timeline { faults }
    }

    /// How long a run must be for `count` faults to come and be over; `None` if they are not within
    /// `limit`.
    #[must_use]
    pub fn length_of(
        seed: u64,
        scenario: &Scenario,
        count: usize,
        limit: Duration,
    ) -> Option<Duration> {
        let drawn = Timeline::draw(seed, scenario, limit);
        let mut ends: Vec<Duration> = drawn.faults.iter().map(|one| one.at + one.lasts).collect();
        ends.sort_unstable();
        ends.get(count.checked_sub(1)?).copied()
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
            Victim::TrainingWorker => "a worker that trains",
            Victim::DriverWorker => "the worker with the driver that trains",
            Victim::Workers => "all workers",
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
    fn notices_are_drawn_from_the_seed_and_give_enough_time() {
        const NOTICES: usize = 200;
        const DAY: Duration = Duration::from_secs(24 * 3600);
        // What a driver leaves out of its grace, and as much again for what it does with the rest.
        const ENOUGH: Duration = Duration::from_secs(8);
        let scenario = Scenario::built_in("train-notices").unwrap();
        let (least, most) = scenario.faults[0].lasts_s;
        let mut drawn = Vec::new();
        for seed in 0..20 {
            let length = Timeline::length_of(seed, &scenario, NOTICES, DAY).unwrap();
            let timeline = Timeline::draw(seed, &scenario, length);
            assert_eq!(timeline, Timeline::draw(seed, &scenario, length));
            let faults = timeline.faults();
            assert_eq!(faults.len(), NOTICES, "seed {seed}");
            assert!(faults.iter().all(|one| one.kind == FaultKind::Notice));
            for one in faults {
                let grace_s = one.lasts.as_secs_f64();
                assert!((least..=most).contains(&grace_s), "seed {seed}: {one}");
                assert!(one.lasts >= ENOUGH, "seed {seed}: {one}");
            }
            let to_all = faults.iter().filter(|one| one.target == Victim::Workers);
            let to_all = to_all.count();
            assert!(0 < to_all && to_all < NOTICES / 2, "seed {seed}: {to_all}");
            // Whom a notice hits is drawn too.
            assert!(faults.windows(2).any(|two| two[0].pick != two[1].pick));
            drawn.push(timeline);
        }
        assert!(drawn.windows(2).all(|two| two[0] != two[1]));
    }

    #[test]
    fn silences_are_drawn_from_the_seed_and_are_longer_than_a_job_may_stand_still() {
        // In which a job is to have gone on elsewhere whose driver is silent; and as much again, so that both run.
        const ENOUGH: Duration = Duration::from_millis(2 * 1_500);
        let scenario = Scenario::built_in("driver-silence").unwrap();
        let mut drawn = Vec::new();
        for seed in 0..20 {
            let timeline = Timeline::draw(seed, &scenario, 4 * MINUTE);
            assert_eq!(timeline, Timeline::draw(seed, &scenario, 4 * MINUTE));
            for one in timeline.faults() {
                let hit = (one.kind, one.target, one.peers);
                let meant = (FaultKind::Cut, Victim::DriverWorker, Peers::Everyone);
                assert_eq!(hit, meant, "seed {seed}");
                assert!(one.lasts >= ENOUGH, "seed {seed}: {one}");
            }
            // As many as its own verdict asks for.
            let least = 4.0 * scenario.checks.faults_min_per_minute;
            let count = timeline.faults().len();
            assert!(count as f64 >= least, "seed {seed}: {count}");
            drawn.push(timeline);
        }
        assert!(drawn.windows(2).all(|two| two[0] != two[1]));
        let shown = drawn[0].faults()[0].to_string();
        let what = "cut the worker with the driver that trains";
        assert!(shown.contains(what), "{shown}");
    }

    #[test]
    fn a_run_is_as_long_as_its_last_fault_asks_for() {
        let scenario = Scenario::from_toml(STORM, "storm").unwrap();
        for count in 1..30 {
            let length = Timeline::length_of(3, &scenario, count, 10 * MINUTE).unwrap();
            assert_eq!(Timeline::draw(3, &scenario, length).faults().len(), count);
        }
        assert_eq!(Timeline::length_of(3, &scenario, 0, MINUTE), None);
        assert_eq!(Timeline::length_of(3, &scenario, 5_000, MINUTE), None);
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
