//! Scenarios: what the cluster is, what its clients do, what goes wrong, and what must hold then.
//!
//! Invariants:
//! 1. Every key is known and fits its fault: anything else is refused with file, line and column.
//! 2. A scenario is bounded: so many machines, operations and jobs as one run can check.

use mobula_core::config::{Config, line_and_column};
use serde::Deserialize;

use super::fault_plan::FaultPlan;

/// The scenarios that come with the binary: their names and texts.
pub const BUILT_IN: [(&str, &str); 14] = [
    (
        "leader-kill",
        include_str!("../../scenarios/leader-kill.toml"),
    ),
    (
        "heads-away",
        include_str!("../../scenarios/heads-away.toml"),
    ),
    (
        "leader-pause",
        include_str!("../../scenarios/leader-pause.toml"),
    ),
    (
        "partition-storm",
        include_str!("../../scenarios/partition-storm.toml"),
    ),
    (
        "one-way-cuts",
        include_str!("../../scenarios/one-way-cuts.toml"),
    ),
    (
        "lossy-network",
        include_str!("../../scenarios/lossy-network.toml"),
    ),
    ("disk-full", include_str!("../../scenarios/disk-full.toml")),
    (
        "rolling-restart",
        include_str!("../../scenarios/rolling-restart.toml"),
    ),
    (
        "members-churn",
        include_str!("../../scenarios/members-churn.toml"),
    ),
    (
        "train-storm",
        include_str!("../../scenarios/train-storm.toml"),
    ),
    (
        "train-notices",
        include_str!("../../scenarios/train-notices.toml"),
    ),
    (
        "trainer-loss",
        include_str!("../../scenarios/trainer-loss.toml"),
    ),
    (
        "driver-loss",
        include_str!("../../scenarios/driver-loss.toml"),
    ),
    (
        "driver-silence",
        include_str!("../../scenarios/driver-silence.toml"),
    ),
];

/// Machines of one run: each is a thread, a network card and a process or more.
const MACHINES_MAX: u32 = 32;

/// Clients of one kind.
const CLIENTS_MAX: u32 = 256;

/// Operations a second, over all clients of one kind.
const RATE_MAX: f64 = 10_000.0;

/// Kinds of training jobs.
const TRAININGS_MAX: usize = 8;

/// Why a scenario is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}:{column}: {message}")]
pub struct ScenarioError {
    file: String,
    line: usize,
    column: usize,
    message: String,
}

/// What is done to a cluster, and what it must show.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name: the built-in one, or the file's.
    #[serde(skip)]
    pub name: String,
    /// One line about what happens.
    pub title: String,
    /// The cluster.
    pub cluster: Shape,
    /// What clients do meanwhile.
    pub workload: Workload,
    /// What goes wrong; each entry goes on by itself.
    #[serde(default, rename = "fault")]
    pub faults: Vec<FaultPlan>,
    /// What must hold besides the promises.
    pub checks: Checks,
}

/// The cluster's machines.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Heads: 1, 3 or 5.
    pub heads: u32,
    /// Workers.
    pub workers: u32,
    /// CPU cores that each worker offers, whatever the machine has.
    #[serde(default = "default_cpus")]
    pub cpus: f64,
    /// A disk of its own for each head, of so many MiB.
    #[serde(default)]
    pub head_disk_mib: Option<u32>,
    /// Configuration of heads and workers, as in a configuration file.
    #[serde(default)]
    pub config: toml::Table,
}

fn default_cpus() -> f64 {
    8.0
}

/// What clients do; rates are over all clients of a kind together.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Clients that submit jobs.
    pub submitters: u32,
    /// Jobs a second.
    pub submits_per_second: f64,
    /// Of these, how many percent are stopped again.
    #[serde(default)]
    pub stops_percent: u32,
    /// Clients that write and read registers.
    pub register_clients: u32,
    /// Registers at a time.
    pub registers: u32,
    /// Writes and reads a second; half are writes.
    pub register_operations_per_second: f64,
    /// Calls a second to a durable counter, each of which must count once.
    #[serde(default)]
    pub increments_per_second: f64,
    /// Training jobs, one after the other and of each kind in turn; all of a kind must end in the same
    /// bits.
    #[serde(default)]
    pub training: Vec<TrainPlan>,
}

/// One kind of training jobs of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainPlan {
    /// Steps of each.
    pub steps: u64,
    /// Steps between checkpoints.
    pub checkpoint_every_steps: u64,
    /// Trainers of each, at least: with fewer it waits.
    #[serde(default = "default_trainers_min")]
    pub trainers_min: u32,
    /// Trainers of each, at most.
    pub trainers_max: u32,
    /// Widths of the network's hidden layers.
    #[serde(default = "default_hidden")]
    pub hidden: Vec<u32>,
}

fn default_trainers_min() -> u32 {
    1
}

fn default_hidden() -> Vec<u32> {
    vec![96, 64]
}

impl TrainPlan {
    fn complaint(&self) -> Option<String> {
        let fits = (1..=self.trainers_max).contains(&self.trainers_min) && self.trainers_max <= 8;
        if !(1..=1_000_000).contains(&self.steps) || !fits {
            return Some(format!(
                "training of {} steps with {} to {} trainers: allowed are 1 to 1000000 steps and 1 to 8 \
                 trainers",
                self.steps, self.trainers_min, self.trainers_max
            ));
        }
        if self.hidden.is_empty() || !self.hidden.iter().all(|width| (1..=4096).contains(width)) {
            return Some(format!(
                "`hidden` is {:?}: give the width of one layer or more, each of 1 to 4096",
                self.hidden
            ));
        }
        None
    }
}

/// What must hold besides the promises, so that a run shows something.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checks {
    /// Jobs that are acknowledged, at least.
    pub jobs_min_per_minute: f64,
    /// Operations on registers that are answered, at least.
    pub register_operations_min_per_minute: f64,
    /// Counted calls that are answered, at least.
    #[serde(default)]
    pub increments_min_per_minute: f64,
    /// Training jobs that end, at least.
    #[serde(default)]
    pub training_jobs_min_per_minute: f64,
    /// Faults that were done, at least.
    pub faults_min_per_minute: f64,
    /// Of each way in which a training job's driver may leave a machine with what it has (`HANDOFF`,
    /// `SAVE_SHARED`, `SAVE_SOLO`), so many, at least.
    #[serde(default)]
    pub departures_min_per_minute: f64,
    /// Of the drivers of training jobs whose machine was cut off, so many for which a newer one took a step
    /// before it was back, at least.
    #[serde(default)]
    pub takeovers_min_per_minute: f64,
    /// Steps that all training jobs together may take again.
    #[serde(default)]
    pub steps_again_max: Option<u64>,
    /// The longest that nobody's write was acknowledged after a fault, at the 99th percentile.
    #[serde(default)]
    pub write_gap_p99_max_ms: Option<u64>,
    /// The longest that no counted call was answered.
    #[serde(default)]
    pub increments_gap_max_ms: Option<u64>,
    /// The longest, after all heads were away and are started again, until one leads and every worker
    /// answers through it.
    #[serde(default)]
    pub reconciled_max_ms: Option<u64>,
    /// Everything must have ended and every head must agree so long after the last fault.
    #[serde(default = "default_settle_s")]
    pub settle_max_s: u64,
    /// How often a job's program may run again, because faults take workers away.
    #[serde(default)]
    pub job_restarts_max: u64,
    /// Heads may end by themselves, as they do on a disk that fails; they are started again.
    #[serde(default)]
    pub heads_may_end: bool,
}

fn default_settle_s() -> u64 {
    60
}

impl Scenario {
    /// The built-in scenario of this name.
    #[must_use]
    pub fn built_in(name: &str) -> Option<Scenario> {
        let (name, text) = BUILT_IN.iter().find(|(known, _)| *known == name)?;
        let scenario = Scenario::from_toml(text, name);
        Some(scenario.expect("a test reads every built-in scenario"))
    }

    /// Reads `text`; `file` is its name, in errors and reports.
    pub fn from_toml(text: &str, file: &str) -> Result<Scenario, ScenarioError> {
        let refused = |offset: usize, message: String| {
            let (line, column) = line_and_column(text, offset);
            ScenarioError {
                file: file.to_owned(),
                line,
                column,
                message,
            }
        };
        let mut scenario: Scenario = toml::from_str(text).map_err(|error| {
            let offset = error.span().map_or(0, |span| span.start);
            refused(offset, error.message().to_owned())
        })?;
        scenario.name = file.trim_end_matches(".toml").to_owned();
        // A section's complaint points at its heading.
        let heading = |name: &str| text.find(&format!("[{name}]")).unwrap_or(0);
        if let Some(message) = scenario.cluster.complaint() {
            return Err(refused(heading("cluster"), message));
        }
        if let Some(message) = scenario.workload.complaint() {
            return Err(refused(heading("workload"), message));
        }
        for fault in &scenario.faults {
            if let Some(message) = fault.complaint(&scenario) {
                return Err(refused(fault.kind.span().start, message));
            }
        }
        Ok(scenario)
    }

    /// Whether it can only be run with a network of its own.
    #[must_use]
    pub fn needs_network(&self) -> bool {
        let needs = |fault: &FaultPlan| fault.kind().needs_network();
        self.cluster.head_disk_mib.is_some() || self.faults.iter().any(needs)
    }
}

impl Shape {
    fn complaint(&self) -> Option<String> {
        if ![1, 3, 5].contains(&self.heads) {
            return Some(format!("`heads` is {}: a group has 1, 3 or 5", self.heads));
        }
        let machines = self.heads.saturating_add(self.workers);
        if machines > MACHINES_MAX {
            return Some(format!("{machines} machines, the limit is {MACHINES_MAX}"));
        }
        if !(0.1..=1024.0).contains(&self.cpus) {
            return Some(format!("`cpus` is {}: allowed are 0.1 to 1024", self.cpus));
        }
        if let Some(mib) = self.head_disk_mib
            && !(64..=65_536).contains(&mib)
        {
            return Some(format!(
                "`head_disk_mib` is {mib}: allowed are 64 to 65536, for a head needs some"
            ));
        }
        let text = toml::to_string(&self.config).expect("what was TOML is TOML");
        match Config::from_toml(&text, "config") {
            Ok(_) => None,
            Err(error) => Some(format!("[cluster.config]: {error}")),
        }
    }
}

impl Workload {
    fn complaint(&self) -> Option<String> {
        for (key, clients) in [
            ("submitters", self.submitters),
            ("register_clients", self.register_clients),
            ("registers", self.registers),
        ] {
            if clients > CLIENTS_MAX {
                return Some(format!("`{key}` is {clients}, the limit is {CLIENTS_MAX}"));
            }
        }
        for (key, rate) in [
            ("submits_per_second", self.submits_per_second),
            (
                "register_operations_per_second",
                self.register_operations_per_second,
            ),
            ("increments_per_second", self.increments_per_second),
        ] {
            if !(0.0..=RATE_MAX).contains(&rate) {
                return Some(format!("`{key}` is {rate}: allowed are 0 to {RATE_MAX}"));
            }
        }
        if self.stops_percent > 100 {
            return Some(format!(
                "`stops_percent` is {}: allowed are 0 to 100",
                self.stops_percent
            ));
        }
        if self.training.len() > TRAININGS_MAX {
            return Some(format!(
                "{} kinds of training jobs, the limit is {TRAININGS_MAX}: each is run undisturbed first",
                self.training.len()
            ));
        }
        if let Some(complaint) = self.training.iter().find_map(TrainPlan::complaint) {
            return Some(complaint);
        }
        if self.register_clients > 0 && self.registers == 0 {
            return Some("clients of registers without `registers`: give one or more".into());
        }
        None
    }
}

#[cfg(test)]
#[path = "scenario_tests.rs"]
mod tests;
