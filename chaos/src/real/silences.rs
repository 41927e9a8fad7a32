//! How soon a training job goes on elsewhere whose driver fell silent: from when its machine is cut off from everybody
//! until a newer driver of the job has taken a step.
//!
//! The driver's process runs on: no socket of it is closed, nothing of it arrives, and nobody is told. The head
//! notices that the machine's worker does not renew its lease, and starts another driver, which fences that one. The
//! worker ends its hosts of before when it has a session again: until then two drivers run. When a newer driver had
//! taken a step is read as for drivers that were killed ([`takeovers`](super::takeovers)).
//!
//! Invariants:
//! 1. Which driver runs there is asked before the cut, and the time is taken right before it.
//! 2. A driver that was hit again before a newer one took a step had gone on by itself: that silence has no time.
//! 3. Silences without a time are counted, and so is apart which of them were long enough for a newer driver: one
//!    that takes a step only after the silent machine was back makes a longer time, and no takeover.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mobula::core::id::JobId;
use mobula_wire::control::Actor;
use serde::Serialize;

use super::fault_plan::{FaultKind, Peers};
use super::gaps::Times;
use super::injector::{Injector, found, millis, text};
use super::leaks::is_of_run;
use super::node::Node;
use super::outcome::{Check, shown};
use super::takeovers::{LostDriver, Said, said_of};
use super::timeline::Planned;
use super::training::NextStep;
use crate::faults::{Target, start_time_of};

/// How long a driver that was silent may still be there when its job has ended.
pub(super) const GONE_MAX: Duration = Duration::from_secs(10);

const POLL: Duration = Duration::from_millis(50);

/// The driver of the job that trains, and the worker on which it runs.
struct Driving {
    node: Arc<Node>,
    job: JobId,
    /// The incarnation of its start.
    incarnation: u64,
    /// Its process, as in [`SilencedDriver`].
    process: (u32, u64),
}

/// Where the driver among a job's actors runs: on which of the nodes with these names, the incarnation of its start, and
/// its process id.
fn driver_in<'a>(
    actors: &[Actor],
    names: &'a BTreeMap<u64, String>,
) -> Option<(&'a str, u64, u32)> {
    actors.iter().find_map(|actor| {
        let is_driver = actor.type_name == "driver" && actor.state == "running";
        let name = names.get(&actor.node?)?;
        let (incarnation, pid) = (actor.incarnation?, actor.pid?);
        is_driver.then_some((name.as_str(), incarnation, pid))
    })
}

/// Whether a fault of a driver's machine is its silence: nothing to or from it arrives.
fn is_silence(planned: &Planned) -> bool {
    planned.kind == FaultKind::Cut && planned.peers == Peers::Everyone
}

impl Injector {
    /// Does a fault to the worker on which the driver of the job that trains runs.
    pub(super) async fn hit_driver_worker(&self, planned: &Planned) -> Result<(), String> {
        let found = found(|| self.driving());
        let Driving {
            node,
            job,
            incarnation,
            process,
        } = found.await.ok_or("no driver of a job that trains runs")?;
        let (at, wall) = (self.began.elapsed(), SystemTime::now());
        self.put(planned, &node).await?;
        if is_silence(planned) {
            let driver = LostDriver {
                job,
                incarnation,
                at_ms: millis(at),
                wall,
            };
            let lasted = self.began.elapsed().saturating_sub(at);
            self.record.lock().silenced_drivers.push(SilencedDriver {
                driver,
                lasted,
                process,
            });
        }
        self.done(planned.kind, node.name(), false, at, wall);
        // The next fault finds machines to go to.
        self.cluster.wait_for_workers().await.map_err(text)
    }

    /// The driver of the job under way; `None` while none runs, or nobody says.
    async fn driving(&self) -> Option<Driving> {
        let job = (self.training_job)()?;
        let names = self.node_names().await?;
        let actors = self.cluster.admin().list_actors(Some(job)).await.ok()?;
        let (name, incarnation, pid) = driver_in(&actors, &names)?;
        let workers = self.cluster.workers();
        let node = workers.iter().find(|node| node.name() == name)?;
        let target = Target::running(pid).ok()?;
        // A number may have been given to somebody else meanwhile.
        is_of_run(pid, self.cluster.dir()).then(|| Driving {
            node: Arc::clone(node),
            job,
            incarnation,
            process: (target.pid(), target.start_time()),
        })
    }
}

/// A driver whose machine was cut off from everybody, and came back.
#[derive(Debug, Clone, Copy)]
pub(super) struct SilencedDriver {
    pub(super) driver: LostDriver,
    /// For how long it was cut off.
    pub(super) lasted: Duration,
    /// The driver's process: the id, and when it was started, in clock ticks since boot.
    pub(super) process: (u32, u64),
}

impl SilencedDriver {
    /// When a newer driver had taken a step; `hit` are all drivers that something was done to.
    fn next_step(&self, hit: &[LostDriver], said: &[Said]) -> Option<NextStep> {
        let LostDriver {
            job,
            incarnation,
            at_ms,
            ..
        } = self.driver;
        let next = self.driver.next_step(said)?;
        let again = hit
            .iter()
            .filter(|other| (other.job, other.incarnation) == (job, incarnation))
            .map(|other| other.at_ms)
            .filter(|other_ms| *other_ms > at_ms)
            .min();
        again
            .is_none_or(|again_ms| at_ms + next.after_ms <= again_ms)
            .then_some(next)
    }

    /// What is still there of it, if something is.
    fn left(&self) -> Option<String> {
        let (pid, started) = self.process;
        let LostDriver {
            job, incarnation, ..
        } = self.driver;
        (start_time_of(pid) == Some(started)).then(|| {
            format!(
                "the driver of {job} with incarnation {incarnation} still runs as process {pid}"
            )
        })
    }
}

/// Waits until none of these drivers is there any more, at most for `limit`; those that are then. To be asked when all
/// jobs have ended.
pub(super) async fn still_there(silenced: &[SilencedDriver], limit: Duration) -> Vec<String> {
    let deadline = Instant::now() + limit;
    loop {
        let left: Vec<String> = silenced.iter().filter_map(SilencedDriver::left).collect();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// How soon jobs went on elsewhere whose drivers fell silent.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Silences {
    /// Drivers whose machine was cut off, and came back.
    pub silenced: usize,
    /// Those for which a newer driver took a step before the machine was back.
    pub taken_over: usize,
    /// From a cut until a newer driver had taken a step.
    pub next_step: Times,
    /// The same of each, of those after which one did.
    pub next_steps: Vec<NextStep>,
}

impl Silences {
    /// By what drivers said in the logs of workers, whose data are in these directories. `killed` are the drivers that
    /// were killed in the same run.
    pub(super) fn read(
        silenced: &[SilencedDriver],
        killed: &[LostDriver],
        data_dirs: &[PathBuf],
    ) -> Silences {
        let jobs = silenced.iter().map(|silenced| silenced.driver.job);
        Silences::of(silenced, killed, &said_of(jobs, data_dirs))
    }

    fn of(silenced: &[SilencedDriver], killed: &[LostDriver], said: &[Said]) -> Silences {
        let hit = silenced.iter().map(|silenced| silenced.driver);
        let hit: Vec<LostDriver> = hit.chain(killed.iter().copied()).collect();
        let mut taken_over = 0;
        let mut next_steps = Vec::new();
        for one in silenced {
            let Some(next) = one.next_step(&hit, said) else {
                continue;
            };
            taken_over += usize::from(next.after_ms <= millis(one.lasted));
            next_steps.push(next);
        }
        let times = next_steps
            .iter()
            .map(|step| Duration::from_millis(step.after_ms));
        Silences {
            silenced: silenced.len(),
            taken_over,
            next_step: Times::of(times.collect()),
            next_steps,
        }
    }

    /// A name and a value for people; nothing where no driver fell silent.
    pub(super) fn row(&self) -> Option<(&'static str, String)> {
        let without = self.silenced - self.next_steps.len();
        let rest = match without {
            0 => String::new(),
            _ => format!("; {without} more silences with no step before, or no newer driver after"),
        };
        let times = shown(&self.next_step);
        let text = format!("silence to next committed step {times}{rest}");
        (self.silenced > 0).then_some(("driver", text))
    }

    /// That newer drivers took over from so many silent ones, where a scenario asks for some, and that `left`, what is
    /// there of silent ones when all jobs have ended, is nothing: their workers end them when they are back.
    pub(super) fn checks(&self, per_minute: f64, length: Duration, left: &[String]) -> Vec<Check> {
        let mut checks = Vec::new();
        if per_minute > 0.0 {
            // A short run may have none.
            let least = (per_minute * length.as_secs_f64() / 60.0).floor() as usize;
            let had = format!("{} of {} did", self.taken_over, self.silenced);
            let short = (self.taken_over < least).then(|| {
                format!(
                    "{had} before the silent machine was back, and at least {least} are needed: the others had \
                     taken no step, or their silence was not noticed in time"
                )
            });
            let short: Vec<String> = short.into_iter().collect();
            let name = "jobs go on elsewhere while their driver is silent";
            checks.push(Check::of(name, had, &short));
        }
        if self.silenced > 0 {
            let gone = format!("{} were cut off and came back", self.silenced);
            let name = "no driver that was silent outlives its job";
            checks.push(Check::of(name, gone, left));
        }
        checks
    }
}

#[cfg(test)]
#[path = "silences_tests.rs"]
mod tests;
