//! What a training job is: a checked description, from TOML or from code.
//!
//! Invariants:
//! 1. A spec that [`TrainSpec::validate`] accepts can be trained; the other modules rely on its bounds.
//! 2. [`TrainSpec::fingerprint`] covers everything that decides the weights' bits and nothing else: not the
//!    name, the number of workers, the device or how often something is saved or said.
//! 3. Unknown and mistyped keys are refused with file and line.

use serde::{Deserialize, Serialize};

use super::checkpointing::CheckpointSpec;
use super::data::DataSpec;
use super::evaluation::EvaluationSpec;
use super::models::ModelSpec;
use super::numerics::Numerics;
use super::optimizer::{Decayed, OptimizerSpec};
use super::schedule::Schedule;
use super::start_from::StartFrom;
use super::validation::InvalidField;
use crate::device::ComputeDevice;

/// Stands for the order in which attention adds: a checkpoint of another order would go on to other bits.
const ATTENTION_ORDER: &[u8] = b"attention in blocks of products";

/// How many workers may train together. The result does not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerRange {
    /// Below this many, the job waits.
    pub min: u32,
    /// More than this many are not used.
    pub max: u32,
}

/// A training job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSpec {
    /// Name of the job.
    pub name: String,
    /// Register the result as a version of this model; absent: only store it.
    #[serde(default)]
    pub register: Option<String>,
    /// What to train on; absent: the embedded digits.
    #[serde(default = "defaults::dataset")]
    pub dataset: DataSpec,
    /// Share of the samples that is never trained on, in (0, 1).
    #[serde(default = "defaults::held_out_fraction")]
    pub held_out_fraction: f64,
    /// Seed of everything random: parameters, data order, held-out part.
    pub seed: u64,
    /// Number of updates.
    pub steps: u64,
    /// Samples in a step, over all workers.
    #[serde(default = "defaults::global_batch")]
    pub global_batch: u64,
    /// Equal parts of a step, whatever the number of workers; a power of two that divides the batch.
    #[serde(default = "defaults::virtual_shards")]
    pub virtual_shards: u32,
    /// Learning rate.
    #[serde(default = "defaults::learning_rate")]
    pub learning_rate: f64,
    /// How the learning rate changes.
    #[serde(default = "defaults::schedule")]
    pub schedule: Schedule,
    /// Decoupled weight decay.
    #[serde(default)]
    pub weight_decay: f64,
    /// Which parameters it shrinks.
    #[serde(default)]
    pub weight_decay_on: Decayed,
    /// Largest norm of a step's mean gradient; absent for no limit.
    #[serde(default)]
    pub clip_norm: Option<f64>,
    /// A checkpoint after each so many steps, and one at the end.
    #[serde(default = "defaults::checkpoint_every_steps")]
    pub checkpoint_every_steps: u64,
    /// A line of progress in the job's log after each so many steps too; absent: after a driver's first step, once a second and at the
    /// end.
    #[serde(default)]
    pub log_every_steps: Option<u64>,
    /// How often to save otherwise, and what is kept.
    #[serde(default)]
    pub checkpoints: CheckpointSpec,
    /// Begin with the weights of another job's checkpoint.
    #[serde(default)]
    pub start_from: Option<StartFrom>,
    /// How many workers may take part.
    #[serde(default = "defaults::workers")]
    pub workers: WorkerRange,
    /// What becomes of a worker that computes other bits than the driver.
    #[serde(default)]
    pub numerics: Numerics,
    /// The network.
    pub model: ModelSpec,
    /// The update rule.
    #[serde(default = "defaults::optimizer")]
    pub optimizer: OptimizerSpec,
    /// When to measure on held-out samples as it goes; absent: at the end only.
    #[serde(default)]
    pub evaluation: Option<EvaluationSpec>,
    /// What trainers compute gradients on. The result does not depend on it.
    #[serde(default)]
    pub device: ComputeDevice,
}

/// Values that serve the digits well and that a job file may leave out.
mod defaults {
    use super::{DataSpec, OptimizerSpec, Schedule, WorkerRange};

    pub(super) fn dataset() -> DataSpec {
        DataSpec::Digits
    }
    pub(super) fn held_out_fraction() -> f64 {
        0.2
    }
    pub(super) fn global_batch() -> u64 {
        128
    }
    pub(super) fn virtual_shards() -> u32 {
        16
    }
    pub(super) fn learning_rate() -> f64 {
        0.005
    }
    pub(super) fn schedule() -> Schedule {
        Schedule::Cosine
    }
    pub(super) fn checkpoint_every_steps() -> u64 {
        50
    }
    pub(super) fn workers() -> WorkerRange {
        WorkerRange { min: 1, max: 2 }
    }
    pub(super) fn optimizer() -> OptimizerSpec {
        OptimizerSpec::Adamw {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
        }
    }
}

/// Why a job file was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not TOML, an unknown key, a missing key or a value of the wrong type.
    #[error("{file}:{line}: {message}")]
    Parse {
        /// The file.
        file: String,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value outside its limits.
    #[error("{file}:{line}: {invalid}")]
    Invalid {
        /// The file.
        file: String,
        /// The line of the key, or 1 where the value is a default.
        line: usize,
        /// The value and the rule.
        invalid: InvalidField,
    },
}

impl TrainSpec {
    /// A job that trains an MLP 64-128-64-10 on the digits to about 97 % in a few seconds.
    pub fn digits_mlp(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            register: None,
            dataset: defaults::dataset(),
            held_out_fraction: defaults::held_out_fraction(),
            seed: 7,
            steps: 300,
            global_batch: defaults::global_batch(),
            virtual_shards: defaults::virtual_shards(),
            learning_rate: defaults::learning_rate(),
            schedule: defaults::schedule(),
            weight_decay: 0.01,
            weight_decay_on: Decayed::All,
            clip_norm: Some(1.0),
            checkpoint_every_steps: defaults::checkpoint_every_steps(),
            log_every_steps: None,
            checkpoints: CheckpointSpec::default(),
            start_from: None,
            workers: defaults::workers(),
            numerics: Numerics::default(),
            model: ModelSpec::Mlp {
                hidden: vec![128, 64],
            },
            optimizer: defaults::optimizer(),
            evaluation: None,
            device: ComputeDevice::Cpu,
        }
    }

    /// A job that trains a small CNN on the digits.
    pub fn digits_cnn(name: &str) -> Self {
        Self {
            model: ModelSpec::Cnn {
                channels: vec![8, 16],
            },
            ..Self::digits_mlp(name)
        }
    }

    /// Reads and checks a job file; `file` names it in errors.
    pub fn from_toml(text: &str, file: &str) -> Result<Self, SpecError> {
        let spec: Self = toml::from_str(text).map_err(|error| SpecError::Parse {
            file: file.to_owned(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            message: error.message().trim().replace('\n', "; "),
        })?;
        spec.validate().map_err(|invalid| SpecError::Invalid {
            file: file.to_owned(),
            line: line_of_key(text, invalid.key),
            invalid,
        })?;
        Ok(spec)
    }

    /// Refuses a job that this program cannot train, because it was built without what the job asks for. Another one
    /// may: a description alone is checked by [`TrainSpec::validate`].
    pub fn check_program(&self) -> Result<(), InvalidField> {
        self.device.check()
    }

    /// Whether it may end before its last step.
    #[must_use]
    pub fn stops_early(&self) -> bool {
        let evaluation = self.evaluation.as_ref();
        evaluation.is_some_and(|evaluation| evaluation.early_stop.is_some())
    }

    /// When to measure, if a checkpoint is made each time: what was measured decides about the job's end, or about
    /// which checkpoints stay.
    #[must_use]
    pub fn saved_evaluation(&self) -> Option<&EvaluationSpec> {
        let is_saved = self.stops_early() || self.checkpoints.keep_best_by.is_some();
        self.evaluation.as_ref().filter(|_| is_saved)
    }

    /// BLAKE3 over everything that decides the weights' bits, the data's digest included.
    pub fn fingerprint(&self, dataset_digest: &str) -> [u8; 32] {
        let parts = (
            (
                "mobula.training.v1",
                dataset_digest,
                &self.model,
                self.seed,
                self.steps,
            ),
            (
                self.held_out_fraction,
                self.global_batch,
                self.virtual_shards,
            ),
            (
                self.learning_rate,
                self.schedule,
                self.weight_decay,
                self.clip_norm,
                self.optimizer,
                // It decides after which step the job ends.
                self.evaluation.as_ref().filter(|_| self.stops_early()),
            ),
            self.start_from.as_ref().map(|from| &from.digest),
        );
        let mut text = serde_json::to_vec(&parts).expect("plain numbers and strings always encode");
        if self.weight_decay_on != Decayed::All {
            // Apart: it came later, and jobs without it keep the fingerprint that they had.
            let decayed = serde_json::to_vec(&self.weight_decay_on);
            text.extend(decayed.expect("a plain name always encodes"));
        }
        if matches!(self.model, ModelSpec::Transformer(_)) {
            text.extend(ATTENTION_ORDER);
        }
        *blake3::hash(&text).as_bytes()
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes()
        .take(offset)
        .filter(|byte| *byte == b'\n')
        .count()
        + 1
}

/// The first line on which `key` stands as a key or in a table's heading; 1 if there is none.
fn line_of_key(text: &str, key: &str) -> usize {
    let names_key = |line: &str| {
        let code = line.split('#').next().unwrap_or_default();
        code.split(|c: char| !(c.is_alphanumeric() || c == '_'))
            .any(|word| word == key)
            && (code.contains('=') || code.trim_start().starts_with('['))
    };
    text.lines()
        .position(names_key)
        .map_or(1, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str =
        "name = \"digits\"\nseed = 7\nsteps = 300\n\n[model.mlp]\nhidden = [128, 64]\n";

    #[test]
    fn a_minimal_file_gets_the_defaults() {
        let spec = TrainSpec::from_toml(MINIMAL, "job.toml").unwrap();
        let mut expected = TrainSpec::digits_mlp("digits");
        (expected.weight_decay, expected.clip_norm) = (0.0, None);
        assert_eq!(spec, expected);
        let text = toml::to_string(&expected).unwrap();
        assert_eq!(TrainSpec::from_toml(&text, "again.toml").unwrap(), expected);
        for spec in [TrainSpec::digits_mlp("a"), TrainSpec::digits_cnn("b")] {
            spec.validate().unwrap();
        }
    }

    #[test]
    fn unknown_mistyped_and_missing_keys_name_file_and_line() {
        let cases = [
            (
                MINIMAL.replace("steps", "stepz"),
                3,
                "unknown field `stepz`",
            ),
            (MINIMAL.replace("300", "\"many\""), 3, "expected u64"),
            (MINIMAL.replace("seed = 7", "seed = -7"), 2, "expected u64"),
            (
                MINIMAL.replace("hidden", "hiden"),
                6,
                "hiden, available keys: hidden",
            ),
            (MINIMAL.replace("mlp", "mlpp"), 5, "unknown variant `mlpp`"),
            (MINIMAL.replace("seed = 7\n", ""), 1, "missing field `seed`"),
            (MINIMAL.replace("= 7", "= = 7"), 2, ""),
            (
                format!("{MINIMAL}[workers]\nmin = 1\nmax = 2\nmost = 3\n"),
                10,
                "unknown field `most`",
            ),
            (
                format!("{MINIMAL}[optimizer.adamw]\nbeta1 = 0.9\n"),
                7,
                "missing field `beta2`",
            ),
        ];
        for (text, line, expected) in cases {
            let error = TrainSpec::from_toml(&text, "job.toml")
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with(&format!("job.toml:{line}: ")),
                "{error}\n{text}"
            );
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_device_is_read_and_another_one_refused() {
        let text = format!("device = \"cuda\"\n{MINIMAL}");
        let spec = TrainSpec::from_toml(&text, "job.toml").unwrap();
        assert_eq!(spec.device, ComputeDevice::Cuda);
        assert_eq!(spec.check_program().is_ok(), cfg!(feature = "cuda"));
        let wrong = text.replace("cuda", "tpu");
        let error = TrainSpec::from_toml(&wrong, "job.toml")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("job.toml:1: unknown variant `tpu`"),
            "{error}"
        );
    }

    #[test]
    fn the_fingerprint_covers_what_decides_the_bits_only() {
        let spec = TrainSpec::digits_mlp("a");
        let original = spec.fingerprint("d");
        let mut same = TrainSpec {
            name: "b".into(),
            checkpoint_every_steps: 1,
            log_every_steps: Some(3),
            ..spec.clone()
        };
        same.workers = WorkerRange { min: 3, max: 9 };
        same.device = ComputeDevice::Cuda;
        assert_eq!(same.fingerprint("d"), original);
        let changed = [
            TrainSpec {
                seed: 8,
                ..spec.clone()
            },
            TrainSpec {
                learning_rate: 0.004,
                ..spec.clone()
            },
            TrainSpec {
                virtual_shards: 32,
                ..spec.clone()
            },
            TrainSpec {
                clip_norm: None,
                ..spec.clone()
            },
            TrainSpec {
                weight_decay_on: Decayed::Matrices,
                ..spec.clone()
            },
            TrainSpec::digits_cnn("a"),
        ];
        assert!(changed.iter().all(|spec| spec.fingerprint("d") != original));
        assert_ne!(spec.fingerprint("e"), original);
    }
}
