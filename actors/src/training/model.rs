//! A network with its parameters, for whoever asks it something: serving, drift detection, people.
//!
//! Training does not go through here: it computes with a [`Trainable`] and [`Parameters`] directly.

use std::sync::Arc;

use candle_core::Device;

use super::data::SampleShape;
use super::layout::Layout;
use super::loss::{energy, softmax};
use super::models::{ModelSpec, most_probable};
use super::parameters::{Parameters, initial_values};
use super::trainable::Trainable;
use crate::kernels::gradients::GradientError;

/// Samples evaluated at once: bounds the memory of inference. Each row's bits do not depend on it.
const EVALUATION_BATCH: usize = 256;

/// The same for models of tokens, in tokens.
const EVALUATION_TOKENS: usize = 2048;

/// Why a model could not be built, loaded, trained or evaluated.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The tensor library refused an operation.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// Input of the wrong size.
    #[error("{what} has {found} values where {expected} are needed")]
    Length {
        /// What was given.
        what: &'static str,
        /// Values needed.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A label that no class has.
    #[error("label {label} of sample {index} is outside 0 to {high}")]
    Label {
        /// The label.
        label: u32,
        /// The sample within the shard.
        index: usize,
        /// The largest label there is.
        high: usize,
    },
    /// The loss does not depend on a parameter, so training would leave it as it is.
    #[error(
        "parameter {name} got no gradient: the loss does not depend on it, or an operation on the \
         way has no backward pass"
    )]
    MissingGradient {
        /// The parameter.
        name: String,
    },
    /// A parameter that the model does not have.
    #[error("no parameter is called {name}")]
    UnknownParameter {
        /// The name asked for.
        name: String,
    },
    /// A parameter that no model can have.
    #[error("parameter {name}: {reason}")]
    Parameter {
        /// The parameter.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Samples that the model cannot take.
    #[error("{model} needs {wanted}; the data has {found}")]
    Shape {
        /// The model.
        model: &'static str,
        /// What it takes, and how to give it that.
        wanted: &'static str,
        /// What the samples are.
        found: String,
    },
    /// No model of this program has that name.
    #[error(
        "no model is called {name} in this program, which has {known}: submit the program that \
         registers it with `mobula_actors::trainable!`"
    )]
    UnknownModel {
        /// The name.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A user's own model refuses its configuration.
    #[error("the configuration of {model} is not what it takes: {reason}")]
    Config {
        /// The model.
        model: String,
        /// What is wrong.
        reason: String,
    },
    /// Something that a user's own model has to say.
    #[error("{0}")]
    Other(String),
    /// The model does not say what it answers for a sample.
    #[error("this model gives no outputs for single samples, so it can be trained but not served")]
    NoOutputs,
}

impl From<GradientError> for ModelError {
    fn from(error: GradientError) -> Self {
        match error {
            GradientError::Tensor(error) => ModelError::Tensor(error),
            GradientError::Missing { name } => ModelError::MissingGradient { name },
        }
    }
}

impl ModelError {
    /// Samples that `model` cannot take, and what it takes.
    #[must_use]
    pub fn shape(model: &'static str, wanted: &'static str) -> Self {
        ModelError::Shape {
            model,
            wanted,
            found: "samples of another kind".to_owned(),
        }
    }
}

/// What a classifier says about samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Classification {
    /// The probability of each class, sample by sample.
    pub probabilities: Vec<f32>,
    /// The most probable class of each sample; the lowest where several are equal.
    pub classes: Vec<u32>,
    /// The [`energy`] of each sample's scores: what of them the probabilities do not tell.
    pub energies: Vec<f32>,
}

/// A network with its parameters.
#[derive(Debug)]
pub struct Model {
    shape: SampleShape,
    network: Box<dyn Trainable>,
    parameters: Parameters,
}

impl Model {
    /// A model with seeded initial parameters, for samples of `shape`.
    pub fn new(spec: &ModelSpec, shape: &SampleShape, seed: u64) -> Result<Self, ModelError> {
        let network = spec.build(shape)?;
        let list = network.parameters();
        let layout = Arc::new(Layout::of(&list));
        let parameters =
            Parameters::for_inference(Device::Cpu, layout, &initial_values(&list, seed))?;
        Ok(Self {
            shape: shape.clone(),
            network,
            parameters,
        })
    }

    /// A model with given parameters, on the CPU.
    pub fn from_flat(
        spec: &ModelSpec,
        shape: &SampleShape,
        flat: &[f32],
    ) -> Result<Self, ModelError> {
        Self::on(Device::Cpu, spec, shape, flat)
    }

    /// A model with given parameters, which answers on `device`.
    pub fn on(
        device: Device,
        spec: &ModelSpec,
        shape: &SampleShape,
        flat: &[f32],
    ) -> Result<Self, ModelError> {
        let network = spec.build(shape)?;
        let layout = Arc::new(Layout::of(&network.parameters()));
        Ok(Self {
            shape: shape.clone(),
            parameters: Parameters::for_inference(device, layout, flat)?,
            network,
        })
    }

    /// Where each parameter lies in the flat vector.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        self.parameters.layout()
    }

    /// What its samples look like.
    #[must_use]
    pub fn shape(&self) -> &SampleShape {
        &self.shape
    }

    /// All parameters, flat.
    #[must_use]
    pub fn flat(&self) -> &[f32] {
        self.parameters.flat()
    }

    /// The scores of each sample's classes, or the numbers predicted for it, flat. A sample's bits do
    /// not depend on the others.
    pub fn outputs(&self, features: &[f32]) -> Result<Vec<f32>, ModelError> {
        let width = self.shape.feature_count();
        check_length(
            "the input",
            features.len().next_multiple_of(width),
            features.len(),
        )?;
        let mut outputs = Vec::new();
        for batch in features.chunks(EVALUATION_BATCH * width) {
            outputs.extend(self.network.outputs(&self.parameters, batch)?);
        }
        Ok(outputs)
    }

    /// The probability of each class, sample by sample.
    pub fn probabilities(&self, features: &[f32]) -> Result<Vec<f32>, ModelError> {
        Ok(softmax(&self.outputs(features)?, self.classes()?))
    }

    /// All that it says about samples, computed once.
    pub fn classify(&self, features: &[f32]) -> Result<Classification, ModelError> {
        let count = self.classes()?;
        let scores = self.outputs(features)?;
        let probabilities = softmax(&scores, count);
        let rows = || scores.chunks_exact(count);
        // As `predictions` has them: probabilities may be equal where scores are not.
        let classes: Vec<u32> = rows().map(most_probable).collect();
        let energies = probabilities
            .chunks_exact(count)
            .zip(rows())
            .zip(&classes)
            .map(|((probabilities, scores), class)| {
                let class = *class as usize;
                energy(scores[class], probabilities[class])
            })
            .collect();
        Ok(Classification {
            probabilities,
            classes,
            energies,
        })
    }

    /// The probability of each token to come after each of some texts, text by text, of a model of tokens. A text has one
    /// token at least; of a longer one than the model sees the last tokens count. A text's bits do not depend on the others.
    pub fn next_tokens(&self, texts: &[Vec<u32>]) -> Result<Vec<f32>, ModelError> {
        let SampleShape::Tokens {
            context,
            vocabulary,
        } = self.shape
        else {
            return Err(ModelError::Shape {
                model: "a prediction of tokens",
                wanted: "samples of tokens",
                found: self.shape.to_string(),
            });
        };
        let seen = |text: &Vec<u32>| text[text.len().saturating_sub(context)..].to_vec();
        let seen: Vec<Vec<u32>> = texts.iter().map(seen).collect();
        let mut probabilities = Vec::with_capacity(texts.len() * vocabulary);
        // As many tokens at a time as other samples have numbers.
        for texts in seen.chunks((EVALUATION_TOKENS / context).max(1)) {
            let scores = self.network.next_scores(&self.parameters, texts)?;
            probabilities.extend(softmax(&scores, vocabulary));
        }
        Ok(probabilities)
    }

    /// The most probable class of each sample; the lowest where several are equal.
    pub fn predictions(&self, features: &[f32]) -> Result<Vec<u32>, ModelError> {
        let classes = self.classes()?;
        let outputs = self.outputs(features)?;
        Ok(outputs.chunks_exact(classes).map(most_probable).collect())
    }

    fn classes(&self) -> Result<usize, ModelError> {
        match &self.shape {
            SampleShape::Classified { classes, .. } => Ok(*classes),
            other => Err(ModelError::Shape {
                model: "a prediction of classes",
                wanted: "samples that have classes",
                found: other.to_string(),
            }),
        }
    }
}

pub(super) fn check_length(
    what: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), ModelError> {
    if expected == found {
        Ok(())
    } else {
        Err(ModelError::Length {
            what,
            expected,
            found,
        })
    }
}

#[cfg(test)]
mod tests;
