//! The limits of a training job, and the errors that name them.
//!
//! Invariant: every refusal says which key, the value found, the rule with its limit, and what to do.

use super::data::DataSpec;
use super::data::files::FILES_MAX;
use super::optimizer::OptimizerSpec;
use super::spec::{TrainSpec, WorkerRange};
use super::start_from::StartFrom;
use crate::name;

/// Virtual shards, at most: finer division only adds buffers and messages to a step.
pub const VIRTUAL_SHARDS_MAX: u32 = 256;
/// Samples in a step, at most: a step's indices and images stay well within memory.
pub const GLOBAL_BATCH_MAX: u64 = 1 << 20;
/// Steps of a job, at most: positions in the data (step × batch) stay within 64 bits.
pub const STEPS_MAX: u64 = 1 << 40;
/// Parameters of a model, at most: a state is then at most 768 MiB with AdamW's moments.
pub const PARAMETERS_MAX: usize = 64 << 20;
/// Characters of a job's name, at most: it appears in paths, logs and tables.
pub const NAME_LEN_MAX: usize = 64;

/// A value that a job cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {found}: {reason}; {next}")]
pub struct InvalidField {
    /// The key, as in the TOML file.
    pub key: &'static str,
    /// The value found.
    pub found: String,
    /// The rule and its limit.
    pub reason: String,
    /// What to do.
    pub next: &'static str,
}

impl TrainSpec {
    /// Checks every value against its limits.
    pub fn validate(&self) -> Result<(), InvalidField> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        check(
            "name",
            &self.name,
            (1..=NAME_LEN_MAX).contains(&self.name.len())
                && self.name.chars().all(allowed)
                && !self.name.starts_with('-'),
            format!("a name has 1 to {NAME_LEN_MAX} of a-z, 0-9 and -, and does not begin with -"),
            "choose another name",
        )?;
        check(
            "register",
            self.register.as_deref().unwrap_or_default(),
            self.register.as_deref().is_none_or(name::is_valid),
            format!("a model cannot be called that: {}", name::RULE),
            "choose another name, or leave it out to store the version only",
        )?;
        self.validate_dataset()?;
        check(
            "held_out_fraction",
            self.held_out_fraction,
            self.held_out_fraction > 0.0 && self.held_out_fraction < 1.0,
            "it lies between 0 and 1, both excluded".to_owned(),
            "0.2 is usual",
        )?;
        check(
            "steps",
            self.steps,
            (1..=STEPS_MAX).contains(&self.steps),
            format!("a job has 1 to {STEPS_MAX} steps"),
            "give a number in that range",
        )?;
        self.schedule.check(self.steps)?;
        if let Some(evaluation) = &self.evaluation {
            evaluation.check()?;
        }
        self.validate_division()?;
        self.validate_update()?;
        check(
            "checkpoint_every_steps",
            self.checkpoint_every_steps,
            self.checkpoint_every_steps >= 1,
            "at least one step lies between checkpoints".to_owned(),
            "give 1 or more",
        )?;
        check(
            "log_every_steps",
            self.log_every_steps.unwrap_or(1),
            self.log_every_steps != Some(0),
            "at least one step lies between lines".to_owned(),
            "give 1 or more, or leave it out for a line a second",
        )?;
        self.checkpoints.validate()?;
        check(
            "keep_best_by",
            self.checkpoints.keep_best_by.as_deref().unwrap_or_default(),
            self.checkpoints.keep_best_by.is_none() || self.evaluation.is_some(),
            "nothing is measured on held-out samples".to_owned(),
            "say in [evaluation] every how many steps to measure, or leave it out",
        )?;
        self.start_from
            .as_ref()
            .map_or(Ok(()), StartFrom::validate)?;
        self.model.check()
    }

    fn validate_dataset(&self) -> Result<(), InvalidField> {
        let files = self.dataset.files();
        let named = !matches!(self.dataset, DataSpec::Digits);
        check(
            "files",
            format!("{} files", files.len()),
            !named || (1..=FILES_MAX).contains(&files.len()),
            format!("a data set has 1 to {FILES_MAX} files"),
            "name at least one; join small ones",
        )?;
        check(
            "files",
            "an empty name",
            files.iter().all(|file| !file.is_empty()),
            "a file is a path, or store: and the path of a blob".to_owned(),
            "name it",
        )?;
        let scale = self.dataset.scale().unwrap_or(1.0);
        check(
            "scale",
            scale,
            scale.is_finite() && scale > 0.0,
            "numbers are divided by it".to_owned(),
            "give the largest value of the data, or leave it out",
        )?;
        let DataSpec::Csv(csv) = &self.dataset else {
            return Ok(());
        };
        check(
            "targets",
            format!("{:?}", csv.targets),
            csv.targets
                .is_none_or(|targets| targets > 0 && csv.classes.is_none()),
            "samples have classes or at least one number to predict, and not both".to_owned(),
            "leave one out",
        )
    }

    fn validate_division(&self) -> Result<(), InvalidField> {
        check(
            "virtual_shards",
            self.virtual_shards,
            self.virtual_shards.is_power_of_two() && self.virtual_shards <= VIRTUAL_SHARDS_MAX,
            format!("the reduction tree needs a power of two up to {VIRTUAL_SHARDS_MAX}"),
            "16 suits up to 16 workers",
        )?;
        check(
            "global_batch",
            self.global_batch,
            (1..=GLOBAL_BATCH_MAX).contains(&self.global_batch)
                && self
                    .global_batch
                    .is_multiple_of(u64::from(self.virtual_shards)),
            format!(
                "a batch is divided into {} equal virtual shards and is at most {GLOBAL_BATCH_MAX}",
                self.virtual_shards
            ),
            "give a multiple of virtual_shards",
        )?;
        let WorkerRange { min, max } = self.workers;
        check(
            "workers",
            format!("{min} to {max}"),
            1 <= min && min <= max && max <= self.virtual_shards,
            format!(
                "1 <= min <= max <= virtual_shards ({}), because a worker needs a shard",
                self.virtual_shards
            ),
            "lower the workers or raise virtual_shards",
        )
    }

    fn validate_update(&self) -> Result<(), InvalidField> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        check(
            "learning_rate",
            self.learning_rate,
            positive(self.learning_rate) && self.learning_rate <= 100.0,
            "it is above 0 and at most 100".to_owned(),
            "0.005 suits AdamW on the digits",
        )?;
        check(
            "weight_decay",
            self.weight_decay,
            (0.0..=1.0).contains(&self.weight_decay),
            "it lies in 0 to 1".to_owned(),
            "0.01 is usual, 0 turns it off",
        )?;
        check(
            "clip_norm",
            self.clip_norm.unwrap_or_default(),
            self.clip_norm.is_none_or(positive),
            "a norm is above 0".to_owned(),
            "leave it out for no clipping",
        )?;
        let share = |value: f64| (0.0..1.0).contains(&value);
        let (found, valid) = match self.optimizer {
            OptimizerSpec::Sgd { momentum } => (format!("momentum {momentum}"), share(momentum)),
            OptimizerSpec::Adamw {
                beta1,
                beta2,
                epsilon,
            } => (
                format!("beta1 {beta1}, beta2 {beta2}, epsilon {epsilon}"),
                share(beta1) && share(beta2) && positive(epsilon) && epsilon <= 1.0,
            ),
        };
        check(
            "optimizer",
            found,
            valid,
            "momentum and betas lie in 0 (included) to 1 (excluded), epsilon above 0 and at most 1"
                .to_owned(),
            "leave it out for AdamW with 0.9, 0.999 and 1e-8",
        )
    }

    /// Checks the spec against the data: a step must not be larger than an epoch.
    pub fn validate_sample_count(&self, train_sample_count: usize) -> Result<(), InvalidField> {
        check(
            "global_batch",
            self.global_batch,
            self.global_batch <= train_sample_count as u64,
            format!(
                "the training part of the data has {train_sample_count} samples, and a step takes \
                 each once at most"
            ),
            "lower the batch or give more data",
        )
    }
}

pub(super) fn check(
    key: &'static str,
    found: impl ToString,
    valid: bool,
    reason: String,
    next: &'static str,
) -> Result<(), InvalidField> {
    if valid {
        Ok(())
    } else {
        Err(InvalidField {
            key,
            found: found.to_string(),
            reason,
            next,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str =
        "name = \"digits\"\nseed = 7\nsteps = 300\n\n[model.mlp]\nhidden = [128, 64]\n";

    #[test]
    fn values_outside_their_limits_say_what_why_and_what_next() {
        let with = |line: &str| line.to_owned() + "\n" + MINIMAL;
        let cases = [
            (
                MINIMAL.replace("\"digits\"", "\"My Job\""),
                1,
                "name is My Job",
            ),
            (MINIMAL.replace("300", "0"), 3, "steps is 0"),
            (
                with("virtual_shards = 12"),
                1,
                "virtual_shards is 12: the reduction tree needs",
            ),
            (
                with("global_batch = 100"),
                1,
                "global_batch is 100: a batch is divided into 16",
            ),
            (
                with("workers = { min = 2, max = 17 }"),
                1,
                "workers is 2 to 17",
            ),
            (
                with("workers = { min = 0, max = 1 }"),
                1,
                "workers is 0 to 1",
            ),
            (with("learning_rate = -1.0"), 1, "learning_rate is -1"),
            (with("learning_rate = nan"), 1, "learning_rate is NaN"),
            (with("weight_decay = 2.0"), 1, "weight_decay is 2"),
            (with("clip_norm = 0.0"), 1, "clip_norm is 0"),
            (with("held_out_fraction = 1.0"), 1, "held_out_fraction is 1"),
            (
                with("checkpoint_every_steps = 0"),
                1,
                "checkpoint_every_steps is 0",
            ),
            (with("log_every_steps = 0"), 1, "log_every_steps is 0"),
            (
                with("dataset = { csv = { files = [] } }"),
                1,
                "files is 0 files",
            ),
            (
                with("register = \"my model\""),
                1,
                "register is my model: a model cannot be called that",
            ),
            (
                with("optimizer = { sgd = { momentum = 1.0 } }"),
                1,
                "optimizer is momentum 1",
            ),
            (MINIMAL.replace("[128, 64]", "[0]"), 6, "hidden is [0]"),
            (
                MINIMAL.replace("[128, 64]", "[5000]"),
                6,
                "hidden is [5000]",
            ),
        ];
        for (text, line, expected) in cases {
            let error = TrainSpec::from_toml(&text, "job.toml")
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with(&format!("job.toml:{line}: {expected}")),
                "{error}"
            );
            assert!(error.contains("; "), "{error}");
        }
        let error = TrainSpec::digits_mlp("a")
            .validate_sample_count(100)
            .unwrap_err()
            .to_string();
        assert!(error.contains("data has 100 samples"), "{error}");
    }
}
