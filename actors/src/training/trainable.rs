//! What can be trained: the one thing that the engine knows of a model.
//!
//! A model of your own is a type that implements [`Trainable`], registered under a name by
//! [`trainable!`](crate::trainable). A job whose TOML has `[model.custom] name = "…"` trains it, if the
//! job's program is the one that the model is linked into: the driver and all trainers are processes of
//! that program, so each of them can construct the model from the job's description.
//!
//! ```
//! use mobula_actors::training::data::{Batch, SampleShape, Samples};
//! use mobula_actors::training::model::ModelError;
//! use mobula_actors::training::parameters::{Gradients, Initial, Parameter, Parameters, ShardOutput};
//! use mobula_actors::training::trainable::{EvaluationSums, ShardContext, Trainable};
//!
//! /// y = w · x, by least squares.
//! #[derive(Debug)]
//! struct Line {
//!     width: usize,
//! }
//!
//! impl Line {
//!     fn errors(&self, parameters: &Parameters, batch: &Batch) -> Result<Vec<f64>, ModelError> {
//!         let Samples::Measured { features, targets } = &batch.samples else {
//!             return Err(ModelError::shape("a line", "numbers to predict"));
//!         };
//!         let weight = parameters.values("weight")?;
//!         let predicted = features.chunks_exact(self.width).map(|x| {
//!             x.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>()
//!         });
//!         Ok(predicted.zip(targets).map(|(y, target)| y - f64::from(*target)).collect())
//!     }
//! }
//!
//! impl Trainable for Line {
//!     fn parameters(&self) -> Vec<Parameter> {
//!         vec![Parameter::new("weight", &[self.width], Initial::Zeros)]
//!     }
//!
//!     fn shard_gradients(
//!         &self,
//!         parameters: &Parameters,
//!         batch: &Batch,
//!         _context: &ShardContext,
//!     ) -> Result<ShardOutput, ModelError> {
//!         let errors = self.errors(parameters, batch)?;
//!         let mut gradients = Gradients::zeros(parameters);
//!         let weight = gradients.of("weight")?;
//!         for (error, x) in errors.iter().zip(batch.features().chunks_exact(self.width)) {
//!             for (gradient, x) in weight.iter_mut().zip(x) {
//!                 *gradient += (error * f64::from(*x)) as f32;
//!             }
//!         }
//!         gradients.finish(errors.iter().map(|error| 0.5 * error * error).sum())
//!     }
//!
//!     fn evaluate(
//!         &self,
//!         parameters: &Parameters,
//!         batch: &Batch,
//!     ) -> Result<EvaluationSums, ModelError> {
//!         let errors = self.errors(parameters, batch)?;
//!         let mut sums = EvaluationSums::new(batch.count);
//!         sums.loss_sum = errors.iter().map(|error| 0.5 * error * error).sum();
//!         sums.add("absolute_error", errors.iter().map(|error| error.abs()).sum());
//!         Ok(sums)
//!     }
//! }
//!
//! mobula_actors::trainable!("line", |_config, shape| match shape {
//!     SampleShape::Measured { .. } => Ok(Box::new(Line { width: shape.feature_count() })),
//!     _ => Err(ModelError::shape("a line", "numbers to predict")),
//! });
//! ```
//!
//! Invariants that an implementation keeps, because the promise of equal bits rests on them:
//! 1. Everything that it answers is a function of its arguments: no clock, no generator with a state, no
//!    iteration over hash maps, no result that depends on threads.
//! 2. What it needs at random comes from [`ShardContext::stream`].
//! 3. Losses and gradients are sums over the samples, never means: the engine divides once, at the end.

use std::collections::BTreeMap;
use std::fmt::Debug;

use serde::{Deserialize, Serialize};

use super::data::{Batch, SampleShape};
use super::model::ModelError;
use super::models::ModelConfig;
use super::parameters::{Parameter, Parameters, ShardOutput};
use super::random::{Purpose, Stream};

/// A model that can be trained.
pub trait Trainable: Debug + Send + Sync {
    /// Its parameters, in any order. The engine keeps them in the order of their names.
    fn parameters(&self) -> Vec<Parameter>;

    /// The sum of the losses of some samples, and its gradient.
    fn shard_gradients(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        context: &ShardContext,
    ) -> Result<ShardOutput, ModelError>;

    /// Measures the model on samples that it is not trained on, without anything random.
    fn evaluate(
        &self,
        parameters: &Parameters,
        batch: &Batch,
    ) -> Result<EvaluationSums, ModelError>;

    /// The scores of each class (or the numbers predicted) for samples given by their numbers only,
    /// sample by sample: what serving asks for. A sample's scores must not depend on the samples beside
    /// it. Models that cannot be served leave it out.
    fn outputs(&self, _parameters: &Parameters, _features: &[f32]) -> Result<Vec<f32>, ModelError> {
        Err(ModelError::NoOutputs)
    }

    /// The scores of each token to come after each of some texts, text by text: what serving asks for a model of
    /// tokens. A text has one token at least, and no more than the model sees. Its scores must not depend on the
    /// texts beside it. Models that cannot be served leave it out.
    fn next_scores(
        &self,
        _parameters: &Parameters,
        _texts: &[Vec<u32>],
    ) -> Result<Vec<f32>, ModelError> {
        Err(ModelError::NoOutputs)
    }
}

/// Where in a job a virtual shard stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardContext {
    /// The job's seed.
    pub seed: u64,
    /// The step, counted from 0.
    pub step: u64,
    /// The first sample's number in the endless sequence of samples that the job takes: the sample in
    /// row `j` of the batch has the number `first_sample + j`, and no other sample of the job has it.
    pub first_sample: u64,
    /// Whether this is training: only then is something dropped out.
    pub mode: Mode,
}

/// What a pass through a model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Gradients are wanted.
    Training,
    /// The model is measured.
    Evaluation,
}

impl ShardContext {
    /// A pass that measures: nothing in it is random.
    #[must_use]
    pub fn evaluation() -> Self {
        ShardContext {
            seed: 0,
            step: 0,
            first_sample: 0,
            mode: Mode::Evaluation,
        }
    }

    /// The random numbers of one layer in this step, to be drawn by the number of the sample: whoever
    /// computes the shard, and however often, draws the same.
    #[must_use]
    pub fn stream(&self, layer: &str) -> Stream {
        Stream::new(self.seed, Purpose::Dropout, layer, self.step)
    }

    /// The number of the sample in row `row` of the batch.
    #[must_use]
    pub fn sample(&self, row: usize) -> u64 {
        self.first_sample + row as u64
    }
}

/// What was measured on some samples, as sums over them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationSums {
    /// Samples.
    pub samples: u64,
    /// Sum of their losses.
    pub loss_sum: f64,
    /// Other sums by name: `accuracy` is the sum of what is right of each sample, from 0 to 1.
    pub sums: BTreeMap<String, f64>,
}

impl EvaluationSums {
    /// Nothing yet, about so many samples.
    #[must_use]
    pub fn new(samples: usize) -> Self {
        EvaluationSums {
            samples: samples as u64,
            loss_sum: 0.0,
            sums: BTreeMap::new(),
        }
    }

    /// Adds to the sum of this name.
    pub fn add(&mut self, name: &str, sum: f64) {
        *self.sums.entry(name.to_owned()).or_default() += sum;
    }

    /// Adds the sums of the samples that follow.
    pub fn join(&mut self, next: &EvaluationSums) {
        self.samples += next.samples;
        self.loss_sum += next.loss_sum;
        for (name, sum) in &next.sums {
            self.add(name, *sum);
        }
    }

    /// The means over the samples; zero where there are none.
    #[must_use]
    pub fn means(&self) -> Evaluation {
        let mean = |sum: f64| sum / self.samples.max(1) as f64;
        Evaluation {
            loss: mean(self.loss_sum),
            metrics: self
                .sums
                .iter()
                .map(|(name, sum)| (name.clone(), mean(*sum)))
                .collect(),
        }
    }
}

/// What was measured on held-out samples, as means over them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean loss.
    pub loss: f64,
    /// Other means by name, `accuracy` among them where samples have classes.
    pub metrics: BTreeMap<String, f64>,
}

impl std::fmt::Display for Evaluation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "loss {:.4}", self.loss)?;
        for (name, value) in &self.metrics {
            write!(f, ", {name} {value:.4}")?;
        }
        Ok(())
    }
}

impl Evaluation {
    /// The measure of this name; `loss` is one.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        match name {
            "loss" => Some(self.loss),
            _ => self.metrics.get(name).copied(),
        }
    }
}

/// Makes a model for samples of a shape, from what `[model.custom.config]` says.
pub type Construct = fn(&ModelConfig, &SampleShape) -> Result<Box<dyn Trainable>, ModelError>;

/// A model of a user's own program, found by name.
#[derive(Debug, Clone, Copy)]
pub struct TrainableType {
    /// Its name, unique in the program.
    pub name: &'static str,
    /// Makes one.
    pub construct: Construct,
}

inventory::collect!(TrainableType);

/// Registers a model under a name: `trainable!("name", construct)`, where `construct` is a
/// [`Construct`](crate::training::trainable::Construct).
#[macro_export]
macro_rules! trainable {
    ($name:expr, $construct:expr) => {
        $crate::__inventory::submit! {
            $crate::training::trainable::TrainableType {
                name: $name,
                construct: $construct,
            }
        }
    };
}

/// The model of this name that is linked into this program.
pub(super) fn construct(
    name: &str,
    config: &ModelConfig,
    shape: &SampleShape,
) -> Result<Box<dyn Trainable>, ModelError> {
    let mut named = inventory::iter::<TrainableType>
        .into_iter()
        .filter(|found| found.name == name);
    let Some(found) = named.next() else {
        let mut known: Vec<&str> = inventory::iter::<TrainableType>
            .into_iter()
            .map(|found| found.name)
            .collect();
        known.sort_unstable();
        return Err(ModelError::UnknownModel {
            name: name.to_owned(),
            known: match known.as_slice() {
                [] => "none".to_owned(),
                known => known.join(", "),
            },
        });
    };
    if named.next().is_some() {
        return Err(ModelError::Config {
            model: name.to_owned(),
            reason: "two models of this program have that name; rename one".to_owned(),
        });
    }
    (found.construct)(config, shape)
}
