//! When a job saves next, and over what time it spreads that.
//!
//! With `every = "auto"` the interval is Young's (Communications of the ACM 17, 1974): √(2·M·s), where `M`
//! is the mean time between failures and `s` what a snapshot stalls training, both as measured. It is
//! never shorter than an upload takes, and never longer than the work that the user is ready to lose.
//!
//! Taking a snapshot copies nothing; most of what it costs comes with the next update, which reads what the snapshot holds
//! and writes elsewhere. So `s` is both: how long it was taken, and how much longer that update took than updates usually
//! do, as the driver's own copy of the state shows it.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::checkpointing::{CheckpointSpec, SaveEvery};

/// Before anything was measured, failures are thought to be this far apart: a busy spot market.
const USUAL_TIME_BETWEEN_FAILURES: Duration = Duration::from_secs(3600);
/// A save's bytes are sent over so many steps, if the next one is twice as far: a snapshot makes one update write
/// elsewhere, and what is read, hashed and written meanwhile takes memory bandwidth from training.
const SPREAD_STEPS: u32 = 8;
/// And over no longer time: what is not saved yet may be lost.
const SPREAD_MAX: Duration = Duration::from_secs(60);
/// No snapshot stalls training for less, as far as a clock can tell.
const STALL_MIN: Duration = Duration::from_micros(10);
/// What an update usually takes is the median of so many: one that something else got in the way of does not change it.
const UPDATES_MAX: usize = 15;

/// Young's interval.
#[must_use]
pub fn young_interval(between_failures: Duration, stall: Duration) -> Duration {
    let seconds = (2.0 * between_failures.as_secs_f64() * stall.as_secs_f64()).sqrt();
    Duration::from_secs_f64(seconds)
}

/// What the next save's time depends on, as measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// How long the job has trained, over all starts of its driver.
    pub trained: Duration,
    /// Trainers and drivers that were lost meanwhile.
    pub failures: u64,
    /// What a snapshot stalls training.
    pub stall: Duration,
    /// What an upload takes.
    pub upload: Duration,
}

impl Measured {
    /// The mean time between failures: what was seen, and one failure at the usual time, so that a job
    /// that has seen none yet has an estimate.
    #[must_use]
    pub fn between_failures(&self) -> Duration {
        let failures = u32::try_from(self.failures).unwrap_or(u32::MAX);
        (self.trained + USUAL_TIME_BETWEEN_FAILURES) / failures.saturating_add(1)
    }

    /// The time between two saves: Young's interval, at most `longest`, and never less than an upload.
    #[must_use]
    pub fn interval(&self, longest: Duration) -> Duration {
        young_interval(self.between_failures(), self.stall.max(STALL_MIN))
            .min(longest)
            .max(self.upload)
    }
}

/// Says when a job saves next.
#[derive(Debug)]
pub struct SaveSchedule {
    every: SaveEvery,
    longest: Duration,
    begun: Instant,
    trained_before: Duration,
    last: Instant,
    stall_latest: Duration,
    stall_longest: Duration,
    /// The shortest step since the last save: one that waited for somebody says nothing.
    step_shortest: Option<Duration>,
    /// What the latest updates took while no snapshot was held, the newest last.
    updates: VecDeque<Duration>,
    /// Whether no update was made since the last snapshot.
    is_fresh: bool,
}

impl SaveSchedule {
    /// The schedule of a driver that begins `now`, after its predecessors have trained for
    /// `trained_before`. `every_steps` counts where `spec` does not say how often.
    #[must_use]
    pub fn new(
        spec: &CheckpointSpec,
        every_steps: u64,
        trained_before: Duration,
        now: Instant,
    ) -> Self {
        SaveSchedule {
            every: spec.every.unwrap_or(SaveEvery::Steps(every_steps)),
            longest: Duration::from_secs(spec.lost_work_max_s),
            begun: now,
            trained_before,
            last: now,
            stall_latest: STALL_MIN,
            stall_longest: Duration::ZERO,
            step_shortest: None,
            updates: VecDeque::with_capacity(UPDATES_MAX),
            is_fresh: false,
        }
    }

    /// Whether to save after `step` steps.
    #[must_use]
    pub fn is_due(&self, step: u64, now: Instant, failures: u64, upload: Duration) -> bool {
        match self.every {
            SaveEvery::Steps(steps) => step.is_multiple_of(steps.max(1)),
            SaveEvery::Auto => now - self.last >= self.interval(now, failures, upload),
        }
    }

    /// The step of the next save behind `step`, where that is known before it comes: at a fixed number of steps, or
    /// with the job's `last` step.
    #[must_use]
    pub fn next_save(&self, step: u64, last: u64) -> Option<u64> {
        let next = match self.every {
            SaveEvery::Steps(steps) => (step / steps.max(1) + 1) * steps.max(1),
            SaveEvery::Auto => last,
        };
        Some(next.min(last)).filter(|next| *next > step)
    }

    /// The time between two saves, as it is now.
    #[must_use]
    pub fn interval(&self, now: Instant, failures: u64, upload: Duration) -> Duration {
        let measured = Measured {
            trained: self.trained(now),
            failures,
            stall: self.stall_latest,
            upload,
        };
        measured.interval(self.longest)
    }

    /// Over what time the save that is due now is to be spread: it must be done well before the next one.
    #[must_use]
    pub fn spread(&self) -> Duration {
        let steps = match self.every {
            SaveEvery::Steps(steps) => {
                u32::try_from(steps / 2).map_or(SPREAD_STEPS, |half| half.min(SPREAD_STEPS))
            }
            SaveEvery::Auto => SPREAD_STEPS,
        };
        let step = self.step_shortest.unwrap_or_default();
        (step * steps).min(SPREAD_MAX)
    }

    /// Takes note of a step, of which the update took `update`. `is_held` says whether a snapshot may be held still.
    pub fn step_taken(&mut self, took: Duration, update: Duration, is_held: bool) {
        let shortest = self
            .step_shortest
            .map_or(took, |shortest| shortest.min(took));
        self.step_shortest = Some(shortest);
        if std::mem::take(&mut self.is_fresh) {
            let usual = self.usual_update().unwrap_or(update);
            self.stalled(self.stall_latest + update.saturating_sub(usual));
        } else if !is_held {
            // Whatever reads a snapshot meanwhile takes memory bandwidth from updates in place too.
            if self.updates.len() == UPDATES_MAX {
                self.updates.pop_front();
            }
            self.updates.push_back(update);
        }
    }

    /// The median of what updates took without a snapshot; none before there was one.
    fn usual_update(&self) -> Option<Duration> {
        let mut updates: Vec<Duration> = self.updates.iter().copied().collect();
        updates.sort_unstable();
        updates.get(updates.len() / 2).copied()
    }

    /// Takes note of a snapshot that was taken from `from` to `to`. What the next update takes for it is added.
    pub fn snapshot_taken(&mut self, from: Instant, to: Instant) {
        self.step_shortest = None;
        self.last = to;
        self.is_fresh = true;
        self.stalled(to - from);
    }

    fn stalled(&mut self, stall: Duration) {
        self.stall_latest = stall;
        self.stall_longest = self.stall_longest.max(stall);
    }

    /// How long the job has trained, over all starts of its driver.
    #[must_use]
    pub fn trained(&self, now: Instant) -> Duration {
        self.trained_before + (now - self.begun)
    }

    /// The longest that a snapshot of this driver stalled training, with the update after it as far as that was made.
    #[must_use]
    pub fn stall_longest(&self) -> Duration {
        self.stall_longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn the_interval_follows_youngs_formula_between_its_bounds() {
        let young = young_interval(2 * HOUR, Duration::from_millis(100));
        assert!((young.as_secs_f64() - 37.947).abs() < 1e-3, "{young:?}");
        let measured = Measured {
            trained: Duration::ZERO,
            failures: 0,
            stall: Duration::from_millis(50),
            upload: Duration::from_secs(1),
        };
        assert_eq!(measured.between_failures(), HOUR);
        let cap = Duration::from_secs(600);
        let usual = measured.interval(cap);
        assert!((usual.as_secs_f64() - 18.974).abs() < 1e-3, "{usual:?}");
        let often = Measured {
            failures: 3,
            ..measured
        };
        let half = often.interval(cap).as_secs_f64() * 2.0;
        assert!((half - usual.as_secs_f64()).abs() < 1e-6, "{half}");
        let rarely = Measured {
            trained: 10_000 * HOUR,
            ..measured
        };
        assert_eq!(rarely.interval(cap), cap);
        let slow = Measured {
            upload: Duration::from_secs(900),
            ..measured
        };
        assert_eq!(
            slow.interval(cap),
            slow.upload,
            "an upload is never overtaken"
        );
        let free = Measured {
            stall: Duration::ZERO,
            ..measured
        };
        assert!(free.interval(cap) >= free.upload);
    }

    #[test]
    fn the_next_save_is_known_where_steps_are_counted_and_at_the_end() {
        let schedule =
            |spec: &CheckpointSpec| SaveSchedule::new(spec, 50, Duration::ZERO, Instant::now());
        let fixed = schedule(&CheckpointSpec::default());
        let next = |step| fixed.next_save(step, 120);
        assert_eq!([0, 49, 50, 99].map(next), [50, 50, 100, 100].map(Some));
        assert_eq!([100, 119, 120].map(next), [Some(120), Some(120), None]);
        let auto = schedule(&CheckpointSpec {
            every: Some(SaveEvery::Auto),
            ..CheckpointSpec::default()
        });
        assert_eq!(auto.next_save(7, 120), Some(120));
    }

    #[test]
    fn a_schedule_counts_steps_or_time() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let upload = Duration::from_millis(200);
        let fixed = SaveSchedule::new(&CheckpointSpec::default(), 50, Duration::ZERO, begun);
        assert!(fixed.is_due(100, at(1), 0, upload) && !fixed.is_due(101, at(1), 0, upload));
        let auto = CheckpointSpec {
            every: Some(SaveEvery::Auto),
            ..CheckpointSpec::default()
        };
        let mut auto = SaveSchedule::new(&auto, 50, HOUR, begun);
        assert!(!auto.is_due(50, at(10), 0, upload));
        assert!(auto.is_due(51, at(5_000), 0, upload));
        auto.snapshot_taken(at(5_000), at(5_001));
        assert_eq!(auto.stall_longest(), Duration::from_millis(1));
        assert!(!auto.is_due(52, at(5_100), 0, upload));
        // √(2 · 2 h · 1 ms) is 3.8 s.
        assert!(!auto.is_due(53, at(8_700), 0, upload) && auto.is_due(53, at(8_900), 0, upload));
        assert_eq!(auto.trained(at(0)), HOUR);
    }

    #[test]
    fn what_the_next_update_takes_longer_is_part_of_a_snapshots_stall() {
        let begun = Instant::now();
        let ms = Duration::from_millis;
        let auto = CheckpointSpec {
            every: Some(SaveEvery::Auto),
            ..CheckpointSpec::default()
        };
        let mut schedule = SaveSchedule::new(&auto, 50, HOUR, begun);
        // One that something got in the way of, and more than are remembered.
        schedule.step_taken(ms(9_000), ms(9_000), false);
        for _ in 0..2 * UPDATES_MAX {
            schedule.step_taken(ms(30), ms(4), false);
        }
        schedule.step_taken(ms(9_000), ms(9_000), false);
        schedule.snapshot_taken(begun, begun + ms(1));
        assert_eq!(schedule.stall_longest(), ms(1), "nothing else is known yet");
        schedule.step_taken(ms(33), ms(7), true);
        assert_eq!(schedule.stall_longest(), ms(1 + 3));
        // Updates in place cost a snapshot nothing, however slow, and do not become what is usual while one is held.
        for _ in 0..2 * UPDATES_MAX {
            schedule.step_taken(ms(30), ms(6), true);
        }
        assert_eq!(schedule.stall_longest(), ms(4));
        // √(2 · 2 h · 4 ms) is 7.6 s; of the millisecond alone it would be 3.8 s.
        let interval = schedule.interval(begun, 0, ms(200));
        assert!(
            (interval.as_secs_f64() - 7.589).abs() < 1e-3,
            "{interval:?}"
        );
        schedule.snapshot_taken(begun, begun + ms(1));
        schedule.step_taken(ms(30), ms(3), true);
        let interval = schedule.interval(begun, 0, ms(200));
        assert!(
            (interval.as_secs_f64() - 3.795).abs() < 1e-3,
            "{interval:?}"
        );
        assert_eq!(schedule.stall_longest(), ms(4));
    }

    #[test]
    fn a_first_snapshot_without_an_update_before_it_has_its_own_time_only() {
        let begun = Instant::now();
        let spec = CheckpointSpec::default();
        let mut schedule = SaveSchedule::new(&spec, 1, Duration::ZERO, begun);
        schedule.snapshot_taken(begun, begun + Duration::from_millis(2));
        schedule.step_taken(HOUR, HOUR, true);
        assert_eq!(schedule.stall_longest(), Duration::from_millis(2));
    }

    #[test]
    fn a_save_is_spread_over_steps_and_done_well_before_the_next() {
        let spread = |every, steps: &[u64]| {
            let spec = CheckpointSpec {
                every: Some(every),
                ..CheckpointSpec::default()
            };
            let mut schedule = SaveSchedule::new(&spec, 50, Duration::ZERO, Instant::now());
            for ms in steps {
                schedule.step_taken(Duration::from_millis(*ms), Duration::ZERO, false);
            }
            schedule.spread().as_millis()
        };
        // A step that waited for somebody who was lost says nothing of how fast this job is.
        assert_eq!(spread(SaveEvery::Steps(50), &[40, 9_000, 50]), 320);
        assert_eq!(spread(SaveEvery::Steps(10), &[40]), 200);
        assert_eq!(spread(SaveEvery::Steps(1), &[40]), 0);
        assert_eq!(spread(SaveEvery::Steps(u64::MAX), &[40]), 320);
        assert_eq!(spread(SaveEvery::Auto, &[40]), 320);
        assert_eq!(spread(SaveEvery::Auto, &[40_000]), 60_000);
        assert_eq!(spread(SaveEvery::Auto, &[]), 0, "nothing is known yet");
    }
}
