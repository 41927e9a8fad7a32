//! What drivers of training jobs did about notices, counted over the jobs of a run, and the verdict on the steps
//! that were taken again.
//!
//! Invariants:
//! 1. A step counts as taken again if the next driver says so, or if it goes on behind the step after which the one
//!    before left, as the head keeps it. Where a driver saved and left together with its last trainer nobody is left
//!    who could say more than the head.
//! 2. Where neither is known of a driver that went, the verdict is not that nothing was taken again.

use std::time::Duration;

use mobula::core::id::JobId;
use mobula_actors::checkpoint::preemptions::{JobPreemptions, PreemptionPhase, PreemptionStep};
use serde::Serialize;

use super::gaps::Times;
use super::outcome::{Check, shown};

/// How often drivers left their machines in which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Ways {
    /// `HANDOFF`: another replica went on.
    pub handoff: u64,
    /// `SAVE_SHARED`: saved together with others that went.
    pub save_shared: u64,
    /// `SAVE_SOLO`: saved alone.
    pub save_solo: u64,
    /// `ABANDON`: no save fitted, or it did not end in time.
    pub abandon: u64,
    /// Chose nothing: the job ended before, or the machine went.
    pub undecided: u64,
}

impl Ways {
    fn count(&mut self, choice: Option<PreemptionPhase>) {
        let count = match choice {
            Some(PreemptionPhase::Handoff) => &mut self.handoff,
            Some(PreemptionPhase::SaveShared) => &mut self.save_shared,
            Some(PreemptionPhase::SaveSolo) => &mut self.save_solo,
            Some(PreemptionPhase::Abandon) => &mut self.abandon,
            _ => &mut self.undecided,
        };
        *count += 1;
    }

    /// Of all of these jobs.
    pub(super) fn of(jobs: &[StepsOf]) -> Self {
        let mut ways = Ways::default();
        let departures = jobs.iter().filter_map(|job| job.departures.as_ref());
        departures.for_each(|departures| ways.add(&departures.ways));
        ways
    }

    fn add(&mut self, other: &Ways) {
        self.handoff += other.handoff;
        self.save_shared += other.save_shared;
        self.save_solo += other.save_solo;
        self.abandon += other.abandon;
        self.undecided += other.undecided;
    }
}

/// What one job's drivers did about notices.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Departures {
    ways: Ways,
    /// Drivers that left, of which the next one said where it went on.
    followed: u64,
    /// Steps by which next ones went on behind those before.
    steps_behind: u64,
    /// From each notice until the next driver went on, in milliseconds.
    next_driver_ms: Vec<u64>,
}

impl Departures {
    /// Counts what the head keeps of a job.
    pub(super) fn of(known: &JobPreemptions) -> Self {
        let mut departures = Departures::default();
        let drivers = known
            .steps
            .chunk_by(|one, next| one.incarnation == next.incarnation);
        drivers.for_each(|steps| departures.count(steps));
        departures
    }

    /// Counts what one driver did.
    fn count(&mut self, steps: &[PreemptionStep]) {
        // A notice that was withdrawn asked for nothing.
        let is_withdrawn = |step: &PreemptionStep| step.to == PreemptionPhase::Running;
        let begin = steps.iter().rposition(is_withdrawn).map_or(0, |at| at + 1);
        let steps = &steps[begin..];
        let is_notice = |step: &&PreemptionStep| step.to == PreemptionPhase::Noticed;
        let Some(noticed) = steps.iter().find(is_notice) else {
            return;
        };
        let choices = steps.iter().rev().map(|step| step.to);
        let mut choices = choices.filter(|to| {
            matches!(
                to,
                PreemptionPhase::Handoff
                    | PreemptionPhase::SaveShared
                    | PreemptionPhase::SaveSolo
                    | PreemptionPhase::Abandon
            )
        });
        self.ways.count(choices.next());
        let is_end = |step: &&PreemptionStep| step.to == PreemptionPhase::Gone;
        let Some(gone) = steps.iter().find(is_end) else {
            return;
        };
        // The end is told by the next driver, with the steps that it found.
        let own = steps
            .iter()
            .filter(|step| !matches!(step.to, PreemptionPhase::Detached | PreemptionPhase::Gone));
        let left_after = own.map(|step| step.trained_steps).max().unwrap_or(0);
        self.followed += 1;
        self.steps_behind += left_after.saturating_sub(gone.trained_steps);
        self.next_driver_ms
            .push(gone.said_ms.saturating_sub(noticed.said_ms));
    }
}

/// What is known of the steps of one job that ended.
#[derive(Debug, Clone)]
pub(super) struct StepsOf {
    pub(super) job: JobId,
    /// Steps taken that count.
    pub(super) steps: u64,
    /// Steps taken again, as its drivers counted, and whether they always knew.
    pub(super) lost_steps: u64,
    pub(super) lost_steps_known: bool,
    /// Starts of its driver after the first.
    pub(super) restarts: u64,
    /// What its drivers did about notices; absent where nobody could be asked.
    pub(super) departures: Option<Departures>,
}

impl StepsOf {
    /// Steps taken again.
    fn again(&self) -> u64 {
        let departures = self.departures.as_ref();
        let behind = departures.map_or(0, |departures| departures.steps_behind);
        self.lost_steps.max(behind)
    }

    /// Whether a driver went of which nobody knows how far it had come.
    fn is_unknown(&self) -> bool {
        let departures = self.departures.as_ref();
        let followed = departures.map_or(0, |departures| departures.followed);
        !self.lost_steps_known && followed < self.restarts
    }
}

/// That jobs took no more steps again than `limit`, and that this is known of all of them.
pub(super) fn check_again(jobs: &[StepsOf], limit: u64, seed: u64) -> Check {
    let again: u64 = jobs.iter().map(StepsOf::again).sum();
    let steps: u64 = jobs.iter().map(|job| job.steps).sum();
    let mut broken = Vec::new();
    if again > limit {
        let took = jobs.iter().filter(|job| job.again() > 0);
        broken.extend(took.map(|job| {
            let again = job.again();
            format!("{} took {again} steps again (seed {seed})", job.job)
        }));
    }
    let unknown = jobs.iter().filter(|job| job.is_unknown());
    broken.extend(unknown.map(|job| {
        format!(
            "how many steps {} took again is known to nobody (seed {seed})",
            job.job
        )
    }));
    let looked_at = format!(
        "{again} of {steps} steps in {} jobs, the limit is {limit}",
        jobs.len()
    );
    Check::of(
        "no more steps are taken again than may be",
        looked_at,
        &broken,
    )
}

/// That drivers left in each way so often that it shows something; `None` of a run that is too short to come to all of them.
pub(super) fn check_ways(ways: &Ways, per_minute: f64, minutes: f64) -> Option<Check> {
    let least = (per_minute * minutes).floor() as u64;
    if least == 0 {
        return None;
    }
    let (mut had, mut short) = (Vec::new(), Vec::new());
    for (way, count) in [
        ("HANDOFF", ways.handoff),
        ("SAVE_SHARED", ways.save_shared),
        ("SAVE_SOLO", ways.save_solo),
    ] {
        had.push(format!("{count} {way}"));
        if count < least {
            short.push(format!("{count} {way}, and at least {least} are needed"));
        }
    }
    let had = had.join(", ");
    Some(Check::of("drivers left in every way", had, &short))
}

/// What a run with notices showed.
#[derive(Debug, Clone, Serialize)]
pub struct Notices {
    /// Notices that were given; one to all workers at once counts once.
    pub given: usize,
    /// Those to all workers at once.
    pub to_all_workers: usize,
    /// Those that were given for a job's sake: of these it is known what they took.
    pub known: usize,
    /// Those of them that took machines with trainers of the job.
    pub with_trainer: usize,
    /// With its driver.
    pub with_driver: usize,
    /// With its driver and trainers.
    pub with_both: usize,
    /// With its driver and all its trainers.
    pub with_all: usize,
    /// Training jobs that ended.
    pub jobs: usize,
    /// Steps that they took.
    pub steps: u64,
    /// Steps of them that were taken again.
    pub steps_again: u64,
    /// How drivers left.
    pub ways: Ways,
    /// From a notice that took no driver to the next step.
    pub next_step: Times,
    /// From a driver's notice until the next driver went on.
    pub next_driver: Times,
}

impl Notices {
    /// Counts what jobs did.
    pub(super) fn count_jobs(&mut self, jobs: &[StepsOf]) {
        let departures = jobs.iter().filter_map(|job| job.departures.as_ref());
        let next_driver = departures.flat_map(|departures| &departures.next_driver_ms);
        let next_driver = next_driver.copied().map(Duration::from_millis);
        self.next_driver = Times::of(next_driver.collect());
        self.ways = Ways::of(jobs);
        self.jobs = jobs.len();
        self.steps = jobs.iter().map(|job| job.steps).sum();
        self.steps_again = jobs.iter().map(StepsOf::again).sum();
    }

    /// Names and values for people.
    pub(super) fn rows(&self) -> Vec<(&'static str, String)> {
        let ways = &self.ways;
        let took = format!(
            "of {}: {} trainers, {} the driver, {} both, {} the driver and every trainer",
            self.known, self.with_trainer, self.with_driver, self.with_both, self.with_all
        );
        vec![
            (
                "notices",
                format!("{}, {} to all workers", self.given, self.to_all_workers),
            ),
            ("notices took", took),
            (
                "drivers left by",
                format!(
                    "{} HANDOFF, {} SAVE_SHARED, {} SAVE_SOLO, {} ABANDON, {} nothing",
                    ways.handoff, ways.save_shared, ways.save_solo, ways.abandon, ways.undecided
                ),
            ),
            (
                "training",
                format!(
                    "{} jobs, {} steps, {} taken again",
                    self.jobs, self.steps, self.steps_again
                ),
            ),
            ("step after a notice", shown(&self.next_step)),
            ("next driver", shown(&self.next_driver)),
        ]
    }
}

#[cfg(test)]
#[path = "departures_tests.rs"]
mod tests;
