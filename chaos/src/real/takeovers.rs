//! How soon a training job goes on whose driver was killed: from the kill of the driver's process until a newer driver
//! of the job has taken a step.
//!
//! When the first step that a driver takes has ended it writes a line with the time ([`FirstStep`]) into a log of its
//! own, which has its incarnation in the name and outlives the process, and its worker. The machines of a run share one
//! clock, by which the time of a kill is taken as well.
//!
//! Invariants:
//! 1. Only a signal that went to the process of a job's driver counts as a kill, and only a driver that is newer than
//!    that one has gone on for it.
//! 2. Where a job had taken no step before, had a newer driver already, or took no step after it, there is nothing to
//!    measure: such kills are counted, and have no time.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mobula::core::id::JobId;
use mobula_actors::training::first_step::FirstStep;
use serde::Serialize;

use super::gaps::{Times, unix_ms};
use super::outcome::shown;
use super::training::NextStep;

/// A driver whose process was killed, or whose machine was cut off ([`silences`](super::silences)).
#[derive(Debug, Clone, Copy)]
pub(super) struct LostDriver {
    pub(super) job: JobId,
    /// The incarnation of its start.
    pub(super) incarnation: u64,
    /// When, in milliseconds since the workload began.
    pub(super) at_ms: u64,
    /// When, by the machine's clock.
    pub(super) wall: SystemTime,
}

impl LostDriver {
    /// When a newer driver had taken a step, of all that drivers said.
    pub(super) fn next_step(&self, said: &[Said]) -> Option<NextStep> {
        let lost_ms = unix_ms(self.wall)?;
        let job = self.job;
        let of_job = || said.iter().filter(move |said| said.job == job);
        let has_begun = of_job()
            .any(|said| said.incarnation <= self.incarnation && said.first.ended_ms <= lost_ms);
        let newer = of_job().filter(|said| said.incarnation > self.incarnation);
        let ended_ms = newer.map(|said| said.first.ended_ms).min()?;
        // Before this one was lost: the head had started the newer one for another reason.
        let after_ms = ended_ms.checked_sub(lost_ms)?;
        let at_ms = self.at_ms;
        has_begun.then_some(NextStep { at_ms, after_ms })
    }
}

/// What one start of a job's driver said of its first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) job: JobId,
    pub(super) incarnation: u64,
    pub(super) first: FirstStep,
}

/// How soon jobs went on whose drivers were killed.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TakeOvers {
    /// Drivers that were killed.
    pub killed: usize,
    /// From a kill until a newer driver had taken a step.
    pub next_step: Times,
    /// The same of each, of those after which one did.
    pub next_steps: Vec<NextStep>,
}

impl TakeOvers {
    /// By what drivers said in the logs of workers, whose data are in these directories.
    pub(super) fn read(killed: &[LostDriver], data_dirs: &[PathBuf]) -> TakeOvers {
        let jobs = killed.iter().map(|killed| killed.job);
        TakeOvers::of(killed, &said_of(jobs, data_dirs))
    }

    fn of(killed: &[LostDriver], said: &[Said]) -> TakeOvers {
        let next_steps: Vec<NextStep> = killed
            .iter()
            .filter_map(|killed| killed.next_step(said))
            .collect();
        let times = next_steps
            .iter()
            .map(|step| Duration::from_millis(step.after_ms));
        TakeOvers {
            killed: killed.len(),
            next_step: Times::of(times.collect()),
            next_steps,
        }
    }

    /// A name and a value for people; nothing where no driver was killed.
    pub(super) fn row(&self) -> Option<(&'static str, String)> {
        let without = self.killed - self.next_steps.len();
        let rest = match without {
            0 => String::new(),
            _ => format!("; {without} more kills with no step before, or none after"),
        };
        let times = shown(&self.next_step);
        let text = format!("kill to next committed step {times}{rest}");
        (self.killed > 0).then_some(("driver", text))
    }
}

/// What drivers of these jobs said, in the logs of workers whose data are in these directories.
pub(super) fn said_of(jobs: impl Iterator<Item = JobId>, data_dirs: &[PathBuf]) -> Vec<Said> {
    let jobs: BTreeSet<JobId> = jobs.collect();
    jobs.iter()
        .flat_map(|job| data_dirs.iter().flat_map(move |dir| said_in(dir, *job)))
        .collect()
}

/// What drivers of a job said on the worker whose data are in `data_dir`: nothing where none of them ran there, and
/// nothing of one that took no step.
fn said_in(data_dir: &Path, job: JobId) -> Vec<Said> {
    let logs = std::fs::read_dir(data_dir.join("logs").join(job.to_string()));
    let logs = logs.into_iter().flatten().filter_map(Result::ok);
    logs.filter_map(|log| {
        let path = log.path();
        // `actor-3-7`: of a process of its own, as a driver has one.
        let name = path.file_stem()?.to_str()?.strip_prefix("actor-")?;
        let (_, incarnation) = name.split_once('-')?;
        let incarnation: u64 = incarnation.parse().ok()?;
        let bytes = std::fs::read(&path).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let first: FirstStep = text.lines().find_map(|line| line.parse().ok())?;
        Some(Said {
            job,
            incarnation,
            first,
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    const JOB: JobId = JobId(5);

    fn said(job: JobId, incarnation: u64, ended_ms: u64) -> Said {
        let first = FirstStep { step: 1, ended_ms };
        Said {
            job,
            incarnation,
            first,
        }
    }

    fn killed(incarnation: u64, wall_ms: u64) -> LostDriver {
        LostDriver {
            job: JOB,
            incarnation,
            at_ms: wall_ms - 1_000,
            wall: UNIX_EPOCH + Duration::from_millis(wall_ms),
        }
    }

    /// How long after each kill the next step was done.
    fn after(killed: &[LostDriver], said: &[Said]) -> Vec<u64> {
        let found = TakeOvers::of(killed, said);
        assert_eq!(found.killed, killed.len());
        assert_eq!(found.next_step.count, found.next_steps.len());
        found.next_steps.iter().map(|step| step.after_ms).collect()
    }

    #[test]
    fn a_kill_is_felt_until_a_newer_driver_has_taken_a_step() {
        let said = [
            said(JOB, 7, 2_000),
            said(JOB, 12, 5_250),
            said(JOB, 15, 9_400),
            // Another job's.
            said(JobId(6), 8, 4_100),
        ];
        let found = TakeOvers::of(&[killed(7, 5_000), killed(12, 9_000)], &said);
        let times = &found.next_step;
        assert_eq!((times.count, times.p50_ms, times.max_ms), (2, 250, 400));
        let at: Vec<u64> = found.next_steps.iter().map(|step| step.at_ms).collect();
        assert_eq!(at, [4_000, 8_000]);
    }

    #[test]
    fn the_next_one_may_be_killed_too_before_it_takes_a_step() {
        // Incarnation 9 said nothing.
        let said = [said(JOB, 7, 2_000), said(JOB, 12, 6_000)];
        let twice = [killed(7, 5_000), killed(9, 5_200)];
        assert_eq!(after(&twice, &said), [1_000, 800]);
    }

    #[test]
    fn what_cannot_be_measured_has_no_time_and_is_counted() {
        let said = [said(JOB, 7, 2_000), said(JOB, 12, 6_000)];
        // Before the job's first step.
        assert!(after(&[killed(7, 1_500)], &said).is_empty());
        // After its last.
        assert!(after(&[killed(12, 7_000)], &said).is_empty());
        // Who had been replaced by then.
        assert!(after(&[killed(7, 6_500)], &said).is_empty());
        assert!(after(&[killed(7, 5_000)], &[]).is_empty());
        let found = TakeOvers::of(&[killed(7, 5_000), killed(12, 7_000)], &said);
        let (name, text) = found.row().unwrap();
        assert_eq!(name, "driver");
        assert_eq!(
            text,
            "kill to next committed step p50 1000 ms, p99 1000 ms, longest 1000 ms, of 1; \
             1 more kills with no step before, or none after"
        );
        assert!(TakeOvers::of(&[], &said).row().is_none());
    }

    #[test]
    fn what_drivers_said_is_read_out_of_their_logs_on_every_worker() {
        let run = tempfile::tempdir().unwrap();
        let workers = [1, 2].map(|number| run.path().join(format!("worker-{number}")));
        let write = |worker: &Path, job: &str, name: &str, text: &str| {
            let dir = worker.join("logs").join(job);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(name), text).unwrap();
        };
        let line = |ended_ms| FirstStep { step: 9, ended_ms }.to_string();
        let begin = "training `storm`: 1500 steps";
        let first = format!("{begin}\n{}\nstep 9/1500 loss 0.1\n", line(2_000));
        write(&workers[0], "job-5", "actor-3-7.log", &first);
        // Killed before it took a step, and in the midst of the line.
        write(&workers[0], "job-5", "actor-3-9.log", begin);
        let cut = line(5_500);
        let cut = format!("{begin}\n{}", &cut[..cut.len() - 3]);
        write(&workers[1], "job-5", "actor-3-10.log", &cut);
        let next = format!("{begin}\n{}\n", line(6_000));
        write(&workers[1], "job-5", "actor-3-12.log", &next);
        // A trainer, a host of several, another job.
        write(&workers[1], "job-5", "actor-4-8.log", "a trainer\n");
        write(&workers[1], "job-5", "host-2-8.log", &line(5_100));
        write(&workers[1], "job-6", "actor-9-11.log", &line(5_200));
        let found = TakeOvers::read(&[killed(7, 5_000)], &workers);
        assert_eq!((found.killed, found.next_step.max_ms), (1, 1_000));
        let nothing = TakeOvers::read(&[killed(7, 5_000)], &[run.path().join("worker-3")]);
        assert_eq!((nothing.killed, nothing.next_step.count), (1, 0));
    }
}
