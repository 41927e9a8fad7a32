//! From a network's outputs to its loss, for samples with a class or with numbers to predict.

use std::fmt::Debug;

use candle_core::Tensor;

use super::super::data::{Batch, SampleShape, Samples};
use super::super::loss::{cross_entropy, cross_entropy_of};
use super::super::model::{ModelError, check_length};
use super::super::parameters::{Parameter, Parameters, ShardOutput};
use super::super::trainable::{EvaluationSums, ShardContext, Trainable};

/// Layers that make outputs of a sample's numbers; [`Headed`] trains them.
pub(super) trait Network: Debug + Send + Sync {
    /// How many numbers a sample has, and how many outputs.
    fn ends(&self) -> (usize, usize);

    /// As [`Trainable::parameters`].
    fn parameters(&self) -> Vec<Parameter>;

    /// The outputs of some samples, a row each.
    fn forward(&self, parameters: &Parameters, features: &[f32]) -> Result<Tensor, ModelError>;
}

/// A network, with the loss that its outputs have.
#[derive(Debug)]
pub(super) struct Headed<N>(pub(super) N);

impl<N: Network> Trainable for Headed<N> {
    fn parameters(&self) -> Vec<Parameter> {
        self.0.parameters()
    }

    fn shard_gradients(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        _context: &ShardContext,
    ) -> Result<ShardOutput, ModelError> {
        check_batch(batch, self.0.ends())?;
        let outputs = self.0.forward(parameters, batch.features())?;
        let (loss_sum, gradients) = graded_loss(&outputs, batch, self.0.ends().1)?;
        ShardOutput::from_output_gradients(parameters, &outputs, loss_sum, gradients)
    }

    fn evaluate(
        &self,
        parameters: &Parameters,
        batch: &Batch,
    ) -> Result<EvaluationSums, ModelError> {
        check_batch(batch, self.0.ends())?;
        let outputs = self.outputs(parameters, batch.features())?;
        Ok(evaluate(&outputs, batch, self.0.ends().1))
    }

    fn outputs(&self, parameters: &Parameters, features: &[f32]) -> Result<Vec<f32>, ModelError> {
        values_of(&self.0.forward(parameters, features)?)
    }
}

/// A tensor's values, flat.
pub(super) fn values_of(tensor: &Tensor) -> Result<Vec<f32>, ModelError> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// The loss of some outputs.
struct OutputLoss {
    sum: f64,
    /// Its gradient with respect to each output.
    gradients: Vec<f32>,
}

/// How many numbers a network reads and gives for a sample of `shape`, which must have numbers.
pub(super) fn widths(
    what: &'static str,
    shape: &SampleShape,
) -> Result<(usize, usize), ModelError> {
    match shape {
        SampleShape::Classified { .. } | SampleShape::Measured { .. } => {
            Ok((shape.feature_count(), shape.output_count()))
        }
        SampleShape::Tokens { .. } => Err(ModelError::Shape {
            model: what,
            wanted: "samples of numbers",
            found: shape.to_string(),
        }),
    }
}

/// Refuses samples of another kind or size than the network was built for.
fn check_batch(batch: &Batch, (inputs, outputs): (usize, usize)) -> Result<(), ModelError> {
    check_length(
        "the shard's numbers",
        batch.count * inputs,
        batch.features().len(),
    )?;
    match &batch.samples {
        Samples::Classified { labels, .. } => {
            check_length("the shard's labels", batch.count, labels.len())?;
            match labels.iter().position(|label| *label as usize >= outputs) {
                None => Ok(()),
                Some(index) => Err(ModelError::Label {
                    label: labels[index],
                    index,
                    high: outputs - 1,
                }),
            }
        }
        Samples::Measured { targets, .. } => {
            check_length("the shard's targets", batch.count * outputs, targets.len())
        }
        Samples::Tokens { .. } => Err(ModelError::shape("the network", "samples of numbers")),
    }
}

/// The loss of some outputs, and its gradient where they are.
fn graded_loss(outputs: &Tensor, batch: &Batch, width: usize) -> Result<(f64, Tensor), ModelError> {
    if let Samples::Classified { labels, .. } = &batch.samples {
        let loss = cross_entropy_of(outputs, labels, 1.0)?;
        return Ok((loss.loss_sum, loss.logit_gradients));
    }
    let loss = loss(&values_of(outputs)?, batch, width);
    let gradients = Tensor::from_vec(loss.gradients, outputs.shape(), outputs.device())?;
    Ok((loss.sum, gradients))
}

/// Cross-entropy for classes, half the squared distance for numbers: sums over the samples.
fn loss(outputs: &[f32], batch: &Batch, width: usize) -> OutputLoss {
    match &batch.samples {
        Samples::Classified { labels, .. } => {
            let loss = cross_entropy(outputs, labels, width);
            OutputLoss {
                sum: loss.loss_sum,
                gradients: loss.logit_gradients,
            }
        }
        Samples::Measured { targets, .. } => {
            let mut sum = 0.0;
            let difference = |(output, target): (&f32, &f32)| {
                let difference = f64::from(*output) - f64::from(*target);
                sum += 0.5 * difference * difference;
                difference as f32
            };
            let gradients = outputs.iter().zip(targets).map(difference).collect();
            OutputLoss { sum, gradients }
        }
        Samples::Tokens { .. } => unreachable!("check_batch refused tokens"),
    }
}

/// The sums that measure a network: its loss, and what it gets right or how far it is off.
fn evaluate(outputs: &[f32], batch: &Batch, width: usize) -> EvaluationSums {
    let mut sums = EvaluationSums::new(batch.count);
    sums.loss_sum = loss(outputs, batch, width).sum;
    match &batch.samples {
        Samples::Classified { labels, .. } => {
            let rows = outputs.chunks_exact(width).zip(labels);
            let right = rows
                .filter(|(row, label)| most_probable(row) == **label)
                .count();
            sums.add("accuracy", right as f64);
        }
        Samples::Measured { targets, .. } => {
            let mut total = 0.0;
            for (output, target) in outputs.iter().zip(targets) {
                total += (f64::from(*output) - f64::from(*target)).abs();
            }
            sums.add("absolute_error", total / width as f64);
        }
        Samples::Tokens { .. } => unreachable!("check_batch refused tokens"),
    }
    sums
}

/// The class with the highest score; the lowest where several are equal.
pub(in crate::training) fn most_probable(scores: &[f32]) -> u32 {
    let better = |best: usize, class: usize| match scores[class] > scores[best] {
        true => class,
        false => best,
    };
    (1..scores.len()).fold(0, better) as u32
}
