//! How often a job saves, and what it asks to be kept: the `[checkpoints]` part of its description.
//!
//! A result's bits never depend on any of this.

use std::fmt;

use mobula_storage::checkpoint::SAVE_TIME_MAX;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::evaluation::{METRIC_LEN_MAX, lower_is_better};
use super::validation::InvalidField;
use crate::checkpoint::KeepPolicy;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
