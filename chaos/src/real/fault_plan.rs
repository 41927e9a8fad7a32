//! One source of faults in a scenario's file: what, to whom, how often, for how long.
//!
//! Invariant: what means nothing to a kind of fault is refused, not ignored.

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::scenario::Scenario;

/// The longest interval or duration of a fault, in seconds.
const SECONDS_MAX: f64 = 3_600.0;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// SIGKILL, and started again.
    Kill,
    /// SIGSTOP, and SIGCONT.
    Pause,
    /// Nothing to or from the machine arrives.
    Cut,
    /// Nothing to the machine arrives, or nothing from it.
    CutOneWay,
    /// Packets to and from the machine are lost, doubled, late.
    Disturb,
    /// The head's disk is full.
    FillDisk,
    /// The head's disk takes no writes.
    FreezeDisk,
    /// Each machine of the kind is asked to end and started again, one after the other.
    RollingRestart,
    /// A head is removed from the group, loses its disk, and joins under a new id.
    ReplaceHead,
    /// Workers' machines are announced to be taken away, are when the time is over, and come back.
    Notice,
}

impl FaultKind {
    /// The word in files and reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            FaultKind::Kill => "kill",
            FaultKind::Pause => "pause",
            FaultKind::Cut => "cut",
            FaultKind::CutOneWay => "cut-one-way",
            FaultKind::Disturb => "disturb",
            FaultKind::FillDisk => "fill-disk",
            FaultKind::FreezeDisk => "freeze-disk",
            FaultKind::RollingRestart => "rolling-restart",
            FaultKind::ReplaceHead => "replace-head",
            FaultKind::Notice => "notice",
        }
    }

    /// Whether it needs a network between the machines that packets can be taken out of.
    #[must_use]
    pub fn needs_network(self) -> bool {
        matches!(
            self,
            FaultKind::Cut | FaultKind::CutOneWay | FaultKind::Disturb
        )
    }

    fn needs_disk(self) -> bool {
        matches!(self, FaultKind::FillDisk | FaultKind::FreezeDisk)
    }
}

/// Whom a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Victim {
    /// The head that leads when the fault comes.
    Leader,
    /// Any head, drawn.
    Head,
    /// All heads at once.
    Heads,
    /// A worker, drawn.
    Worker,
    /// Of the workers on which something of the job that trains runs, one, drawn.
    TrainingWorker,
    /// The worker on which the driver of the job that trains runs.
    DriverWorker,
    /// All workers at once.
    Workers,
    /// The process of the workload's counter.
    Counter,
    /// The process of a trainer of the job that trains, drawn.
    Trainer,
    /// The process of that job's driver.
    Driver,
}

impl Victim {
    /// Whether it is a process of some job, which the platform starts again by itself.
    #[must_use]
    pub fn is_of_job(self) -> bool {
        matches!(self, Victim::Counter | Victim::Trainer | Victim::Driver)
    }

    /// Whether it is found by a job that trains.
    fn needs_training(self) -> bool {
        matches!(
            self,
            Victim::Trainer
                | Victim::Driver
                | Victim::TrainingWorker
                | Victim::DriverWorker
                | Victim::Workers
        )
    }
}

/// To and from whom a cut or disturbed machine's packets go astray.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peers {
    /// The other heads: clients and workers still reach the machine.
    Heads,
    /// Everybody.
    Everyone,
    /// One of the two, drawn each time.
    Drawn,
}

/// One source of faults.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultPlan {
    /// What happens.
    pub(super) kind: Spanned<FaultKind>,
    /// To whom.
    #[serde(default)]
    pub target: Option<Victim>,
    /// From the end of one to the next, in seconds: from and up to.
    pub every_s: (f64, f64),
    /// How long each lasts, in seconds: from and up to.
    pub lasts_s: (f64, f64),
    /// For cuts and disturbances: to and from whom.
    #[serde(default)]
    pub peers: Option<Peers>,
    /// For disturbances: packets that are lost.
    #[serde(default)]
    pub loss_percent: f64,
    /// For disturbances: packets that arrive twice.
    #[serde(default)]
    pub duplicate_percent: f64,
    /// For disturbances: how late packets are.
    #[serde(default)]
    pub delay_ms: (u64, u64),
    /// For notices: how many of them are given to all workers at once, whoever the target is.
    #[serde(default)]
    pub all_workers_percent: f64,
}

impl FaultPlan {
    /// What happens.
    #[must_use]
    pub fn kind(&self) -> FaultKind {
        *self.kind.get_ref()
    }

    /// To whom: the leader if nothing is said.
    #[must_use]
    pub fn target(&self) -> Victim {
        self.target.unwrap_or(Victim::Leader)
    }

    /// What is wrong with it, if something is.
    pub(super) fn complaint(&self, scenario: &Scenario) -> Option<String> {
        let kind = self.kind();
        let name = kind.as_str();
        for (key, (from, to)) in [("every_s", self.every_s), ("lasts_s", self.lasts_s)] {
            if !(0.0..=SECONDS_MAX).contains(&from) || !(from..=SECONDS_MAX).contains(&to) {
                return Some(format!(
                    "`{key}` is [{from}, {to}]: expected from and up to, of 0 to {SECONDS_MAX} s"
                ));
            }
        }
        if self.every_s.0 + self.lasts_s.0 < 0.05 {
            return Some("faults without any pause: `every_s` must begin with 0.05 or more".into());
        }
        let is_network = kind.needs_network();
        let is_disturbed =
            self.loss_percent > 0.0 || self.duplicate_percent > 0.0 || self.delay_ms != (0, 0);
        if self.peers.is_some() && !is_network {
            return Some(format!("`peers` means nothing to `{name}`"));
        }
        if is_disturbed != (kind == FaultKind::Disturb) {
            return Some(format!(
                "`loss_percent`, `duplicate_percent` and `delay_ms` are for `disturb`, which needs one \
                 of them; this is `{name}`"
            ));
        }
        if self.all_workers_percent > 0.0 && kind != FaultKind::Notice {
            return Some(format!("`all_workers_percent` means nothing to `{name}`"));
        }
        for percent in [
            self.loss_percent,
            self.duplicate_percent,
            self.all_workers_percent,
        ] {
            if !(0.0..=100.0).contains(&percent) {
                return Some(format!("{percent} percent: allowed are 0 to 100"));
            }
        }
        let (least, most) = self.delay_ms;
        if least > most || most > 10_000 {
            return Some(format!(
                "`delay_ms` is [{least}, {most}]: expected from and up to, of 0 to 10000"
            ));
        }
        if kind.needs_disk() && scenario.cluster.head_disk_mib.is_none() {
            return Some(format!("`{name}` needs `head_disk_mib` in [cluster]"));
        }
        let target = self.target();
        let fits = match kind {
            FaultKind::Notice => matches!(
                target,
                Victim::Worker | Victim::TrainingWorker | Victim::Workers
            ),
            _ if matches!(target, Victim::TrainingWorker | Victim::Workers) => false,
            FaultKind::Kill => true,
            _ if target == Victim::Heads => false,
            FaultKind::FillDisk | FaultKind::FreezeDisk | FaultKind::ReplaceHead => {
                matches!(target, Victim::Leader | Victim::Head)
            }
            FaultKind::Pause => target != Victim::Counter,
            // It goes over all machines of a kind, and this is one of them.
            FaultKind::RollingRestart if target == Victim::DriverWorker => false,
            _ => !target.is_of_job(),
        };
        if !fits {
            return Some(format!("`{name}` cannot hit that target"));
        }
        let hits_worker = matches!(
            target,
            Victim::Worker | Victim::TrainingWorker | Victim::DriverWorker | Victim::Workers
        );
        if hits_worker && scenario.cluster.workers == 0 {
            return Some("there is no worker to hit: give [cluster] some".into());
        }
        if target == Victim::Counter && scenario.workload.increments_per_second <= 0.0 {
            return Some("there is no counter: give `increments_per_second` in [workload]".into());
        }
        let needs_training = target.needs_training() || self.all_workers_percent > 0.0;
        if needs_training && scenario.workload.training.is_empty() {
            return Some("nothing trains: give `training` in [workload]".into());
        }
        if kind == FaultKind::ReplaceHead && scenario.cluster.heads < 3 {
            return Some("the only head cannot be replaced: give [cluster] three".into());
        }
        None
    }
}
