//! The networks: an MLP and a small CNN for 8×8 images in ten classes, on candle.
//!
//! Invariants:
//! 1. Parameters are kept and flattened in sorted name order; a [`Layout`] says where each one lies.
//! 2. A parameter's initial value depends only on (seed, its name, its shape).
//! 3. A shard's gradients depend only on (parameters, the shard's samples): products are
//!    fixed-order (`product.rs`), the rest are candle's single-threaded elementwise operations.
//! 4. Every parameter gets a gradient on every shard, or the shard fails.

use std::collections::BTreeMap;

use super::data::{CLASSES, FEATURES};
use super::layout::{Layout, ModelSpec, convolutions};
use super::loss::{cross_entropy, softmax};
use super::product::product;
use super::random::{Purpose, Stream};
use candle_core::{Device, Tensor, Var};

/// Samples evaluated at once: bounds the memory of inference. Each row's bits do not depend on it.
const EVALUATION_BATCH: usize = 256;

/// Why a model could not be built, loaded or evaluated.
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
    #[error("label {label} of sample {index} is outside 0 to 9")]
    Label {
        /// The label.
        label: u8,
        /// The sample within the shard.
        index: usize,
    },
    /// The loss does not depend on a parameter, so training would leave it as it is.
    #[error("parameter {name} got no gradient; the loss does not depend on it")]
    MissingGradient {
        /// The parameter.
        name: String,
    },
}

/// What one virtual shard contributes to a step.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardOutput {
    /// Sum of the samples' losses.
    pub loss_sum: f64,
    /// Gradient of `loss_sum`, flat.
    pub grads: Vec<f32>,
}

/// A network with its parameters.
#[derive(Debug, Clone)]
pub struct Model {
    spec: ModelSpec,
    layout: Layout,
    vars: BTreeMap<String, Var>,
}

impl Model {
    /// A model with seeded initial parameters: weights normal with variance 2 / fan-in (He et al.,
    /// ICCV 2015), biases zero.
    pub fn new(spec: &ModelSpec, seed: u64) -> Result<Self, ModelError> {
        let layout = Layout::of(spec);
        let mut flat = Vec::with_capacity(layout.value_count());
        for slot in &layout.slots {
            match slot.shape[..] {
                [fan_in, _] => {
                    let stream = Stream::new(seed, Purpose::Initialise, &slot.name, 0);
                    let deviation = (2.0 / fan_in as f64).sqrt();
                    let indices = 0..slot.value_count() as u64;
                    flat.extend(indices.map(|i| (stream.normal(i, 0) * deviation) as f32));
                }
                _ => flat.resize(flat.len() + slot.value_count(), 0.0),
            }
        }
        Self::from_flat(spec, &flat)
    }

    /// A model with given parameters.
    pub fn from_flat(spec: &ModelSpec, flat: &[f32]) -> Result<Self, ModelError> {
        let layout = Layout::of(spec);
        check_length("the parameter vector", layout.value_count(), flat.len())?;
        let mut vars = BTreeMap::new();
        for slot in &layout.slots {
            let var = Var::from_slice(&flat[slot.range()], &slot.shape[..], &Device::Cpu)?;
            vars.insert(slot.name.clone(), var);
        }
        Ok(Self {
            spec: spec.clone(),
            layout,
            vars,
        })
    }

    /// What kind of network this is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Where each parameter lies in the flat vector.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All parameters, flat.
    pub fn flat(&self) -> Result<Vec<f32>, ModelError> {
        let mut flat = Vec::with_capacity(self.layout.value_count());
        for var in self.vars.values() {
            flat.extend(var.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(flat)
    }

    /// Replaces all parameters.
    pub fn load_flat(&mut self, flat: &[f32]) -> Result<(), ModelError> {
        check_length(
            "the parameter vector",
            self.layout.value_count(),
            flat.len(),
        )?;
        for slot in &self.layout.slots {
            let values = Tensor::from_slice(&flat[slot.range()], &slot.shape[..], &Device::Cpu)?;
            self.vars[&slot.name].set(&values)?;
        }
        Ok(())
    }

    /// Loss and gradients of one shard, as sums over its samples (`images` has 64 values for each).
    pub fn shard_gradients(
        &self,
        images: &[f32],
        labels: &[u8],
    ) -> Result<ShardOutput, ModelError> {
        check_length("the shard's images", labels.len() * FEATURES, images.len())?;
        let unknown = labels
            .iter()
            .position(|label| usize::from(*label) >= CLASSES);
        if let Some(index) = unknown {
            return Err(ModelError::Label {
                label: labels[index],
                index,
            });
        }
        let logits = self.forward(images)?;
        let loss = cross_entropy(&logits.flatten_all()?.to_vec1()?, labels, CLASSES);
        // The derivative of Σ logit · g is g: this hands our own gradient of the loss to candle.
        let seed = Tensor::from_vec(loss.logit_gradients, logits.shape(), &Device::Cpu)?;
        let gradients = (logits * seed)?.sum_all()?.backward()?;
        let mut grads = Vec::with_capacity(self.layout.value_count());
        for (name, var) in &self.vars {
            let gradient = gradients
                .get(var.as_tensor())
                .ok_or_else(|| ModelError::MissingGradient { name: name.clone() })?;
            grads.extend(gradient.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(ShardOutput {
            loss_sum: loss.loss_sum,
            grads,
        })
    }

    /// The ten logits of each image, flat. A row's bits do not depend on the other images.
    pub fn logits(&self, images: &[f32]) -> Result<Vec<f32>, ModelError> {
        check_length(
            "the images",
            images.len().next_multiple_of(FEATURES),
            images.len(),
        )?;
        let mut logits = Vec::with_capacity(images.len() / FEATURES * CLASSES);
        for batch in images.chunks(EVALUATION_BATCH * FEATURES) {
            logits.extend(self.forward(batch)?.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(logits)
    }

    /// The ten class probabilities of each image, flat.
    pub fn probabilities(&self, images: &[f32]) -> Result<Vec<f32>, ModelError> {
        Ok(softmax(&self.logits(images)?, CLASSES))
    }

    /// The most probable class of each image; the lowest where several are equal.
    pub fn predictions(&self, images: &[f32]) -> Result<Vec<u8>, ModelError> {
        let logits = self.logits(images)?;
        let best = |row: &[f32]| (1..CLASSES).fold(0, |b, c| if row[c] > row[b] { c } else { b });
        Ok(logits
            .chunks_exact(CLASSES)
            .map(|row| best(row) as u8)
            .collect())
    }

    fn forward(&self, images: &[f32]) -> Result<Tensor, ModelError> {
        let count = images.len() / FEATURES;
        let mut values = Tensor::from_slice(images, (count, FEATURES), &Device::Cpu)?;
        match &self.spec {
            ModelSpec::Mlp { hidden } => {
                for layer in 0..hidden.len() {
                    values = self.affine(&values, &format!("dense.{layer}"))?.relu()?;
                }
                self.affine(&values, &format!("dense.{}", hidden.len()))
            }
            ModelSpec::Cnn { channels } => {
                for (layer, patches) in convolutions(channels).into_iter().enumerate() {
                    let rows = self.affine(&patches.extract(&values)?, &format!("conv.{layer}"))?;
                    values = rows.relu()?.reshape((count, ()))?;
                }
                self.affine(&values, "dense.0")
            }
        }
    }

    fn affine(&self, values: &Tensor, layer: &str) -> Result<Tensor, ModelError> {
        let weight = &self.vars[&format!("{layer}.weight")];
        let bias = &self.vars[&format!("{layer}.bias")];
        Ok(product(values, weight)?.broadcast_add(bias)?)
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
mod tests {
    use super::*;
    use crate::training::data::Dataset;

    fn mlp() -> ModelSpec {
        ModelSpec::Mlp {
            hidden: vec![12, 8],
        }
    }

    fn cnn() -> ModelSpec {
        ModelSpec::Cnn {
            channels: vec![3, 5],
        }
    }

    fn samples(count: usize) -> (Vec<f32>, Vec<u8>) {
        Dataset::digits()
            .unwrap()
            .gather(&(0..count).collect::<Vec<_>>())
    }

    #[test]
    fn initial_values_depend_on_seed_and_name_only() {
        let values = |spec: &ModelSpec, seed, name: &str| {
            let model = Model::new(spec, seed).unwrap();
            let slot = model
                .layout()
                .slots
                .iter()
                .find(|slot| slot.name == name)
                .unwrap()
                .range();
            model.flat().unwrap()[slot].to_vec()
        };
        let deeper = ModelSpec::Mlp {
            hidden: vec![12, 8, 9],
        };
        assert_eq!(
            values(&mlp(), 1, "dense.0.weight"),
            values(&deeper, 1, "dense.0.weight")
        );
        assert_ne!(
            values(&mlp(), 1, "dense.0.weight"),
            values(&mlp(), 2, "dense.0.weight")
        );
        assert!(
            values(&mlp(), 1, "dense.1.bias")
                .iter()
                .all(|value| *value == 0.0)
        );
    }

    #[test]
    fn gradients_match_differences_of_the_loss() {
        let (images, labels) = samples(6);
        for spec in [mlp(), cnn()] {
            let mut model = Model::new(&spec, 3).unwrap();
            // Off zero: a rectifier has no slope where black pixels and a zero bias put its input.
            let flat: Vec<f32> = model
                .flat()
                .unwrap()
                .iter()
                .map(|value| value + 0.02)
                .collect();
            model.load_flat(&flat).unwrap();
            let output = model.shard_gradients(&images, &labels).unwrap();
            assert_eq!(output.grads.len(), flat.len());
            for slot in model.layout().slots.clone() {
                let index = slot.offset + slot.value_count() / 2;
                let mut loss_at = |by: f32| {
                    let mut moved = flat.clone();
                    moved[index] += by;
                    model.load_flat(&moved).unwrap();
                    model.shard_gradients(&images, &labels).unwrap().loss_sum
                };
                let slope = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3;
                let ours = f64::from(output.grads[index]);
                assert!(
                    (slope - ours).abs() < 2e-2 * ours.abs().max(1.0),
                    "{} {slope} {ours}",
                    slot.name
                );
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it() {
        let (images, _) = samples(300);
        for spec in [mlp(), cnn()] {
            let model = Model::new(&spec, 3).unwrap();
            let together = model.logits(&images).unwrap();
            for index in [0, 7, 255, 256, 299] {
                let alone = model
                    .logits(&images[index * FEATURES..][..FEATURES])
                    .unwrap();
                assert_eq!(alone, together[index * CLASSES..][..CLASSES]);
            }
            let probabilities = model.probabilities(&images[..FEATURES]).unwrap();
            assert!((probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn parameters_survive_flattening_and_wrong_sizes_are_refused() {
        let mut model = Model::new(&cnn(), 3).unwrap();
        let flat = model.flat().unwrap();
        assert_eq!(
            Model::from_flat(&cnn(), &flat).unwrap().flat().unwrap(),
            flat
        );
        let (images, mut labels) = samples(2);
        for error in [
            model.load_flat(&flat[1..]).unwrap_err().to_string(),
            model.logits(&images[1..]).unwrap_err().to_string(),
            model
                .shard_gradients(&images[..FEATURES], &labels)
                .unwrap_err()
                .to_string(),
        ] {
            assert!(error.contains("values where"), "{error}");
        }
        labels[1] = 10;
        let error = model
            .shard_gradients(&images, &labels)
            .unwrap_err()
            .to_string();
        assert!(error.contains("label 10 of sample 1"), "{error}");
    }
}
