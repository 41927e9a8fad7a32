//! When a job saves, and what it asks to be kept: the `[checkpoints]` part of its description.
//!
//! A result's bits never depend on any of this.
//!
//! With `every = "auto"` the interval is Young's (Communications of the ACM 17, 1974): √(2·M·s), where `M`
//! is the mean time between failures and `s` what a snapshot stalls training, both as measured. It is
//! never shorter than an upload takes, and never longer than the work that the user is ready to lose.

use std::fmt;
use std::time::Duration;

use mobula_storage::checkpoint::SAVE_TIME_MAX;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::time::Instant;

use super::evaluation::{METRIC_LEN_MAX, lower_is_better};
use super::validation::InvalidField;
use crate::checkpoint::KeepPolicy;

/// Before anything was measured, failures are thought to be this far apart: a busy spot market.
const USUAL_TIME_BETWEEN_FAILURES: Duration = Duration::from_secs(3600);
/// No snapshot stalls training for less, as far as a clock can tell.
const STALL_MIN: Duration = Duration::from_micros(10);
/// The longest bound on lost work: a day.
const LOST_WORK_S_MAX: u64 = 24 * 3600;

/// How often a job saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveEvery {
    /// After each so many steps.
    Steps(u64),
    /// As often as pays, by what is measured.
    Auto,
}

impl Serialize for SaveEvery {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            SaveEvery::Steps(steps) => serializer.serialize_u64(*steps),
            SaveEvery::Auto if serializer.is_human_readable() => serializer.serialize_str("auto"),
            // No job saves each 0 steps.
            SaveEvery::Auto => serializer.serialize_u64(0),
        }
    }
}

impl<'de> Deserialize<'de> for SaveEvery {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;

        impl Visitor<'_> for Words {
            type Value = SaveEvery;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of steps, or \"auto\"")
            }

            fn visit_u64<E: serde::de::Error>(self, steps: u64) -> Result<SaveEvery, E> {
                Ok(SaveEvery::Steps(steps))
            }

            fn visit_i64<E: serde::de::Error>(self, steps: i64) -> Result<SaveEvery, E> {
                u64::try_from(steps)
                    .map(SaveEvery::Steps)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(steps), &self))
            }

            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<SaveEvery, E> {
                match word {
                    "auto" => Ok(SaveEvery::Auto),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
                }
            }
        }

        if !deserializer.is_human_readable() {
            return Ok(match u64::deserialize(deserializer)? {
                0 => SaveEvery::Auto,
                steps => SaveEvery::Steps(steps),
            });
        }
        deserializer.deserialize_any(Words)
    }
}

/// The `[checkpoints]` part of a training job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSpec {
    /// How often to save; absent: each `checkpoint_every_steps`.
    pub every: Option<SaveEvery>,
    /// With `every = "auto"`: the longest time between two saves, in seconds.
    pub lost_work_max_s: u64,
    /// How many of the newest are kept while the job runs.
    pub keep_last: u32,
    /// Keep each whose number is a multiple of this too; 0 for none.
    pub keep_every: u32,
    /// Keep so many of the best too.
    pub keep_best: u32,
    /// What they are compared by, as it is measured on held-out samples: `loss`, or a metric of the model such as
    /// `accuracy`. Each evaluation is saved then. Absent: the training loss of the step.
    pub keep_best_by: Option<String>,
    /// Whether less of that is better; absent: yes for `loss`, no for everything else.
    pub lower_is_better: Option<bool>,
    /// What an upload may use of the network; absent: what there is.
    pub upload_bytes_per_second: Option<u64>,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        let keep = KeepPolicy::default();
        CheckpointSpec {
            every: None,
            lost_work_max_s: 600,
            keep_last: keep.last,
            keep_every: keep.every,
            keep_best: keep.best,
            keep_best_by: None,
            lower_is_better: None,
            upload_bytes_per_second: None,
        }
    }
}

impl CheckpointSpec {
    /// What is to be kept.
    #[must_use]
    pub fn policy(&self) -> KeepPolicy {
        KeepPolicy {
            last: self.keep_last,
            every: self.keep_every,
            best: self.keep_best,
            larger_is_better: self
                .keep_best_by
                .as_ref()
                .is_some_and(|metric| !lower_is_better(metric, self.lower_is_better)),
        }
    }

    /// Checks every value against its limits.
    pub fn validate(&self) -> Result<(), InvalidField> {
        if self.every == Some(SaveEvery::Steps(0)) {
            return Err(InvalidField {
                key: "every",
                found: "0".to_owned(),
                reason: "at least one step lies between checkpoints".to_owned(),
                next: "give 1 or more, or \"auto\"",
            });
        }
        if !(1..=LOST_WORK_S_MAX).contains(&self.lost_work_max_s) {
            return Err(InvalidField {
                key: "lost_work_max_s",
                found: self.lost_work_max_s.to_string(),
                reason: format!("it is 1 to {LOST_WORK_S_MAX} seconds"),
                next: "give the time of which the work may be lost",
            });
        }
        if self.upload_bytes_per_second == Some(0) {
            return Err(InvalidField {
                key: "upload_bytes_per_second",
                found: "0".to_owned(),
                reason: "nothing would ever be saved".to_owned(),
                next: "leave it out for no limit",
            });
        }
        self.validate_best()?;
        self.policy().check().map_err(|invalid| InvalidField {
            key: invalid.what,
            found: invalid.found.to_string(),
            reason: invalid.rule,
            next: "give a number in that range",
        })
    }

    /// Whether a state of so many bytes can be saved with this limit: a save that takes too long is none, and would be
    /// begun again for ever. Half of the time is for what else may happen to it.
    pub(super) fn check_limit(&self, state_bytes: u64) -> Result<(), InvalidField> {
        let least = state_bytes.div_ceil(SAVE_TIME_MAX.as_secs() / 2);
        match self.upload_bytes_per_second {
            Some(limit) if limit < least => Err(InvalidField {
                key: "upload_bytes_per_second",
                found: limit.to_string(),
                reason: format!(
                    "the state has {state_bytes} bytes, and a checkpoint must be stored within {} s: at least {least}",
                    SAVE_TIME_MAX.as_secs()
                ),
                next: "give more, or leave it out for no limit",
            }),
            _ => Ok(()),
        }
    }
}

impl CheckpointSpec {
    /// Refuses what would mean nothing.
    fn validate_best(&self) -> Result<(), InvalidField> {
        let refused = |key, found: &str, reason: &str, next| {
            Err(InvalidField {
                key,
                found: found.to_owned(),
                reason: reason.to_owned(),
                next,
            })
        };
        match (&self.keep_best_by, self.lower_is_better) {
            (Some(metric), _) if !(1..=METRIC_LEN_MAX).contains(&metric.len()) => refused(
                "keep_best_by",
                metric,
                &format!("a metric has a name of 1 to {METRIC_LEN_MAX} characters"),
                "loss, or accuracy where samples have classes",
            ),
            (Some(metric), _) if self.keep_best == 0 => refused(
                "keep_best_by",
                metric,
                "keep_best is 0, so nothing is compared",
                "say in keep_best how many to keep, or leave it out",
            ),
            (None, Some(said)) => refused(
                "lower_is_better",
                &said.to_string(),
                "less of a training loss is always better",
                "name another metric in keep_best_by, or leave it out",
            ),
            _ => Ok(()),
        }
    }
}

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

    /// Takes note of a snapshot that stalled training from `from` to `to`.
    pub fn snapshot_taken(&mut self, from: Instant, to: Instant) {
        self.last = to;
        self.stall_latest = to - from;
        self.stall_longest = self.stall_longest.max(self.stall_latest);
    }

    /// How long the job has trained, over all starts of its driver.
    #[must_use]
    pub fn trained(&self, now: Instant) -> Duration {
        self.trained_before + (now - self.begun)
    }

    /// The longest that a snapshot of this driver stalled training.
    #[must_use]
    pub fn stall_longest(&self) -> Duration {
        self.stall_longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn spec(text: &str) -> Result<CheckpointSpec, String> {
        let spec: CheckpointSpec = toml::from_str(text).map_err(|error| error.to_string())?;
        spec.validate().map_err(|error| error.to_string())?;
        Ok(spec)
    }

    #[test]
    fn every_key_is_read_and_checked() {
        assert_eq!(spec("").unwrap(), CheckpointSpec::default());
        let auto = spec("every = \"auto\"\nlost_work_max_s = 60\nkeep_best = 2\n").unwrap();
        assert_eq!(auto.every, Some(SaveEvery::Auto));
        assert_eq!(auto.policy().best, 2);
        let steps = spec("every = 7\nupload_bytes_per_second = 1000").unwrap();
        assert_eq!(steps.every, Some(SaveEvery::Steps(7)));
        for spec in [auto, steps] {
            let text = toml::to_string(&spec).unwrap();
            assert_eq!(toml::from_str::<CheckpointSpec>(&text).unwrap(), spec);
            let text = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<CheckpointSpec>(&text).unwrap(), spec);
            let bytes = mobula_core::codec::encode_plain(&spec);
            let read: CheckpointSpec = mobula_core::codec::decode(&bytes, 1024).unwrap();
            assert_eq!(read, spec, "as trainers get it");
        }
        for (text, expected) in [
            ("every = \"often\"", "a number of steps, or \"auto\""),
            ("every = -1", "a number of steps, or \"auto\""),
            ("every = 0", "every is 0"),
            ("evry = 1", "unknown field `evry`"),
            ("lost_work_max_s = 0", "lost_work_max_s is 0"),
            ("lost_work_max_s = 90000", "1 to 86400 seconds"),
            ("keep_last = 0", "keep_last is 0"),
            ("keep_best = 100", "keep_best is 100"),
            ("upload_bytes_per_second = 0", "nothing would ever be saved"),
            (
                "keep_best_by = \"accuracy\"",
                "keep_best is 0, so nothing is compared",
            ),
            (
                "keep_best = 1\nkeep_best_by = \"\"",
                "a name of 1 to 64 characters",
            ),
            (
                "keep_best = 1\nlower_is_better = true",
                "lower_is_better is true",
            ),
        ] {
            let error = spec(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_limit_that_no_save_can_keep_is_refused_with_the_least_that_would_do() {
        let limited = spec("upload_bytes_per_second = 400000").unwrap();
        limited.check_limit(300_000_000).unwrap();
        let error = limited.check_limit(768 << 20).unwrap_err().to_string();
        assert!(
            error.contains("upload_bytes_per_second is 400000"),
            "{error}"
        );
        assert!(error.contains("within 1800 s: at least 894785"), "{error}");
        spec("").unwrap().check_limit(u64::MAX).unwrap();
    }

    #[test]
    fn less_of_a_loss_is_better_and_more_of_everything_else_unless_it_is_said() {
        let larger = |text: &str| {
            let text = format!("keep_best = 2\n{text}");
            spec(&text).unwrap().policy().larger_is_better
        };
        assert!(!larger(""));
        assert!(!larger("keep_best_by = \"loss\""));
        assert!(larger("keep_best_by = \"accuracy\""));
        let lower = "keep_best_by = \"absolute_error\"\nlower_is_better = true";
        assert!(!larger(lower));
    }

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
}
