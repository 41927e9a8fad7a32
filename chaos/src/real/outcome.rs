//! What a run showed: as a table for people, as JSON for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::departures::Notices;
use super::gaps::{Times, elections, longest_gap, recovery};
use super::injector::Done;
use super::machines::Isolation;
use super::router::Carried;
use super::scenario::Scenario;
use super::silences::Silences;
use super::takeovers::TakeOvers;
use super::traffic::Counts;
use super::training::NextStep;

/// Lines of evidence that are shown of one check.
const EVIDENCE_MAX: usize = 5;

/// After a fault, so much time is looked at for gaps, unless the next fault comes first.
const LOOK_MAX: Duration = Duration::from_secs(30);

/// One thing that had to hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What, with the number of the invariant.
    pub name: String,
    /// Whether it held.
    pub passed: bool,
    /// What was looked at, or what was wrong.
    pub detail: String,
}

impl Check {
    /// Held, unless something speaks against it.
    pub(super) fn of(name: &str, looked_at: String, broken: &[String]) -> Check {
        let detail = match broken {
            [] => looked_at,
            _ => {
                let more = broken.len().saturating_sub(EVIDENCE_MAX);
                let shown = broken.iter().take(EVIDENCE_MAX).cloned();
                let more = (more > 0).then(|| format!("and {more} more"));
                shown.chain(more).collect::<Vec<_>>().join("; ")
            }
        };
        Check {
            name: name.to_owned(),
            passed: broken.is_empty(),
            detail,
        }
    }
}

/// How the faults that hit the leader were felt.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Felt {
    /// From a fault on: the longest time that nobody's write was acknowledged.
    pub write_gap: Times,
    /// From the loss of a leader until another leads.
    pub election: Times,
    /// From a fault until writes are acknowledged at nine tenths of the rate before.
    pub recovery: Times,
    /// From the start of heads that were all away until one leads and every worker answers through it.
    pub reconciled: Times,
}

/// What a run showed.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The scenario's name.
    pub scenario: String,
    /// The seed of its faults.
    pub seed: u64,
    /// How long faults and workload went on, in seconds.
    pub length_s: f64,
    /// Whether machines had networks of their own.
    pub isolation: Isolation,
    /// The machine's load averages at the end.
    pub load: String,
    /// Whether everything held.
    pub passed: bool,
    /// What had to hold.
    pub checks: Vec<Check>,
    /// How many faults of each kind were done.
    pub faults: BTreeMap<&'static str, usize>,
    /// How many of them hit the leader.
    pub faults_on_leader: usize,
    /// Faults that were left out, and why.
    pub left_out: Vec<String>,
    /// How many operations ended how.
    pub counts: Counts,
    /// How the faults were felt.
    pub felt: Felt,
    /// How each loss of a trainer was felt.
    pub next_steps: Vec<NextStep>,
    /// How each loss of a driver was felt.
    pub takeovers: TakeOvers,
    /// How each silence of a driver was felt.
    pub silences: Silences,
    /// What a run with notices showed; absent where none was given.
    pub notices: Option<Notices>,
    /// Messages that workers refused because they came from a leader that was none any more.
    pub stale_refused: u64,
    /// What the network did; absent on loopback.
    pub network: Option<Carried>,
    /// Every fault that was done.
    pub done: Vec<Done>,
}

/// How faults were felt, from when writes were acknowledged and what heads logged.
pub(super) fn felt(
    done: &[Done],
    acknowledged: &[Duration],
    length: Duration,
    logs: &[String],
) -> Felt {
    let mut leading: Vec<_> = logs.iter().flat_map(|log| elections(log)).collect();
    leading.sort_unstable();
    let reconciled = done.iter().filter_map(|done| done.reconciled_ms);
    let reconciled = Times::of(reconciled.map(Duration::from_millis).collect());
    // What hits somebody else is hardly felt, and would only make the figures look better.
    let mut done: Vec<&Done> = done.iter().filter(|done| done.was_leader).collect();
    done.sort_by_key(|done| done.at_ms);
    let (mut gaps, mut back, mut elected) = (Vec::new(), Vec::new(), Vec::new());
    for (position, fault) in done.iter().enumerate() {
        let from = Duration::from_millis(fault.at_ms);
        let next = done.get(position + 1);
        let next = next.map_or(length, |next| Duration::from_millis(next.at_ms));
        let until = next.min(from + LOOK_MAX).min(length);
        // Where nobody writes, nothing is felt.
        if !acknowledged.is_empty() {
            gaps.push(longest_gap(acknowledged, from, until));
        }
        back.extend(recovery(acknowledged, from, until));
        let after = leading.partition_point(|moment| *moment < fault.wall);
        let moment = leading.get(after).copied();
        let took = moment.and_then(|moment| moment.duration_since(fault.wall).ok());
        // Later than the next fault, it is that one's.
        elected.extend(took.filter(|took| *took <= until.saturating_sub(from)));
    }
    Felt {
        write_gap: Times::of(gaps),
        election: Times::of(elected),
        recovery: Times::of(back),
        reconciled,
    }
}

/// Whether there was enough traffic and enough faults to show something.
pub(super) fn enough(
    scenario: &Scenario,
    counts: &Counts,
    faults: usize,
    length: Duration,
) -> Check {
    let minutes = length.as_secs_f64() / 60.0;
    let checks = &scenario.checks;
    let asked = [
        ("jobs", counts.jobs_acknowledged, checks.jobs_min_per_minute),
        (
            "operations on registers",
            counts.register_writes + counts.register_reads,
            checks.register_operations_min_per_minute,
        ),
        (
            "counted calls",
            counts.increments,
            checks.increments_min_per_minute,
        ),
        ("faults", faults as u64, checks.faults_min_per_minute),
    ];
    let (mut had, mut short) = (Vec::new(), Vec::new());
    for (what, count, per_minute) in asked {
        // Part of a fault cannot be had: a short run may have one less than its share.
        let least = (per_minute * minutes).floor() as u64;
        had.push(format!("{count} {what}"));
        if count < least {
            short.push(format!("{count} {what}, and at least {least} are needed"));
        }
    }
    Check::of("enough happened to show something", had.join(", "), &short)
}

/// Times, for people.
pub(super) fn shown(times: &Times) -> String {
    match times.count {
        0 => "-".to_owned(),
        count => format!(
            "p50 {} ms, p99 {} ms, longest {} ms, of {count}",
            times.p50_ms, times.p99_ms, times.max_ms
        ),
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = &self.counts;
        let faults = self
            .faults
            .iter()
            .map(|(kind, count)| format!("{count} {kind}"));
        let faults = faults.collect::<Vec<_>>().join(", ");
        let isolation = match self.isolation {
            Isolation::Namespaces => "a network namespace for each machine",
            Isolation::Loopback => "loopback, no networks of their own",
        };
        let next_steps = self.next_steps.iter();
        let next_steps = next_steps.map(|step| Duration::from_millis(step.after_ms));
        let mut rows = vec![
            ("scenario", format!("{}, seed {}", self.scenario, self.seed)),
            ("length", format!("{:.0} s", self.length_s)),
            ("machines", isolation.to_owned()),
            ("load", self.load.clone()),
            (
                "faults",
                format!("{faults}; {} on the leader", self.faults_on_leader),
            ),
            (
                "jobs",
                format!(
                    "{} acknowledged, {} stopped",
                    counts.jobs_acknowledged, counts.jobs_stopped
                ),
            ),
            (
                "registers",
                format!(
                    "{} writes, {} reads",
                    counts.register_writes, counts.register_reads
                ),
            ),
            ("counted calls", counts.increments.to_string()),
            (
                "not answered",
                format!(
                    "{} surely without effect, {} of unknown outcome",
                    counts.refused, counts.unknown
                ),
            ),
            ("write gap", shown(&self.felt.write_gap)),
            ("election", shown(&self.felt.election)),
            ("recovery", shown(&self.felt.recovery)),
            ("heads back", shown(&self.felt.reconciled)),
            ("step after a loss", shown(&Times::of(next_steps.collect()))),
            ("stale messages refused", self.stale_refused.to_string()),
        ];
        rows.extend(self.takeovers.row());
        rows.extend(self.silences.row());
        if let Some(notices) = &self.notices {
            rows.extend(notices.rows());
        }
        if let Some(network) = &self.network {
            rows.push((
                "packets",
                format!(
                    "{} delivered, {} cut off, {} lost, {} doubled, {} late",
                    network.delivered, network.cut, network.lost, network.doubled, network.delayed
                ),
            ));
        }
        for (name, value) in rows {
            writeln!(f, "{name:<24}{value}")?;
        }
        for reason in &self.left_out {
            writeln!(f, "{:<24}{}", "left out", reason.trim())?;
        }
        for check in &self.checks {
            let result = if check.passed { "ok" } else { "BROKEN" };
            writeln!(f, "{result:<8}{}: {}", check.name, check.detail)?;
        }
        let result = if self.passed { "passed" } else { "FAILED" };
        write!(f, "{result}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::real::fault_plan::FaultKind;
    use std::time::{SystemTime, UNIX_EPOCH};

    #[test]
    fn a_gap_and_an_election_belong_to_their_fault() {
        let wall = UNIX_EPOCH + Duration::from_secs(1_795_259_533);
        let done = |at_ms, was_leader, wall: SystemTime| Done {
            kind: FaultKind::Kill,
            node: "head-1".to_owned(),
            was_leader,
            at_ms,
            healed_ms: at_ms,
            reconciled_ms: None,
            taken: None,
            wall,
        };
        let done = [
            done(1_000, true, wall),
            done(3_000, false, wall + Duration::from_secs(2)),
            done(5_000, true, wall + Duration::from_secs(4)),
        ];
        let is_answered = |at: &u64| !(1_000..1_800).contains(at);
        let answered = (0..10_000).step_by(10).filter(is_answered);
        let answered: Vec<Duration> = answered.map(Duration::from_millis).collect();
        let log = "2026-11-21T11:12:13.500000Z  INFO x: leading term=5".to_owned();
        let felt = felt(&done, &answered, Duration::from_secs(10), &[log]);
        assert_eq!((felt.write_gap.count, felt.write_gap.max_ms), (2, 800));
        assert_eq!((felt.write_gap.p50_ms, felt.election.max_ms), (10, 500));
        assert_eq!((felt.election.count, felt.recovery.count), (1, 2));
    }

    #[test]
    fn too_little_traffic_does_not_pass() {
        let scenario = Scenario::built_in("leader-kill").unwrap();
        let minute = Duration::from_secs(60);
        let nothing = enough(&scenario, &Counts::default(), 0, minute);
        assert!(!nothing.passed, "{nothing:?}");
        let plenty = Counts {
            jobs_acknowledged: 1 << 20,
            register_writes: 1 << 20,
            increments: 1 << 20,
            ..Counts::default()
        };
        assert!(enough(&scenario, &plenty, 1 << 20, minute).passed);
    }
}
