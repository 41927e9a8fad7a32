//! A network on the kernels: parameters in one flat vector, gradients in another, AdamW in place.

use candle_core::{Device, Tensor, Var};
use mobula_actors::kernels::convolution::Images;
use mobula_actors::kernels::gradients::backward_from;
use mobula_actors::kernels::loss::cross_entropy;
use mobula_actors::kernels::update::AdamwUpdate;
use mobula_actors::kernels::{Activation, Execution, affine, convolution, math};
use mobula_actors::training::random::{Purpose, Stream};

/// AdamW's numbers, for us and for the peer.
pub(crate) const LEARNING_RATE: f64 = 1e-3;
pub(crate) const BETA1: f64 = 0.9;
pub(crate) const BETA2: f64 = 0.999;
pub(crate) const EPSILON: f64 = 1e-8;
pub(crate) const WEIGHT_DECAY: f64 = 0.01;

/// One layer; all but the last are followed by a rectifier.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layer {
    Dense { inputs: usize, outputs: usize },
    Convolution { images: Images, outputs: usize },
}

impl Layer {
    fn weight_shape(&self) -> (usize, usize) {
        match *self {
            Layer::Dense { inputs, outputs } => (inputs, outputs),
            Layer::Convolution { images, outputs } => (images.patch_len(), outputs),
        }
    }
}

/// What is trained.
#[derive(Debug, Clone)]
pub(crate) struct Description {
    pub(crate) name: &'static str,
    pub(crate) layers: Vec<Layer>,
    pub(crate) batch: usize,
}

impl Description {
    pub(crate) fn dense(name: &'static str, sizes: &[usize], batch: usize) -> Self {
        let layers = sizes.windows(2).map(|pair| Layer::Dense {
            inputs: pair[0],
            outputs: pair[1],
        });
        Description {
            name,
            layers: layers.collect(),
            batch,
        }
    }

    /// Values of one sample.
    pub(crate) fn features(&self) -> usize {
        match self.layers[0] {
            Layer::Dense { inputs, .. } => inputs,
            Layer::Convolution { images, .. } => images.image_len(),
        }
    }

    pub(crate) fn classes(&self) -> usize {
        self.layers
            .last()
            .expect("a network has layers")
            .weight_shape()
            .1
    }

    /// Multiplications and additions of a step: two for each weight and place forward, twice as many backward.
    pub(crate) fn operations(&self) -> f64 {
        let layer = |layer: &Layer| {
            let (inputs, outputs) = layer.weight_shape();
            let places = match layer {
                Layer::Dense { .. } => 1,
                Layer::Convolution { images, .. } => images.output_len(),
            };
            6.0 * (inputs * outputs * places * self.batch) as f64
        };
        // The first layer's input needs no gradient.
        self.layers.iter().map(layer).sum::<f64>() - layer(&self.layers[0]) / 3.0
    }
}

/// A network with its state.
pub(crate) struct Network {
    description: Description,
    /// Weight and bias of each layer, in order.
    names: Vec<String>,
    vars: Vec<Var>,
    pub(crate) params: Vec<f32>,
    means: Vec<f32>,
    squares: Vec<f32>,
    grads: Vec<f32>,
    step: u64,
}

impl Network {
    /// With seeded first values: weights normal with variance 2 / inputs, biases zero.
    pub(crate) fn new(description: &Description) -> candle_core::Result<Self> {
        let (mut names, mut vars, mut params) = (Vec::new(), Vec::new(), Vec::new());
        for (index, layer) in description.layers.iter().enumerate() {
            let (inputs, outputs) = layer.weight_shape();
            let stream = Stream::new(1, Purpose::Initialise, description.name, index as u64);
            let deviation = (2.0 / inputs as f64).sqrt();
            let weight: Vec<f32> = (0..(inputs * outputs) as u64)
                .map(|i| (stream.normal(i, 0) * deviation) as f32)
                .collect();
            params.extend_from_slice(&weight);
            params.resize(params.len() + outputs, 0.0);
            names.extend([format!("{index}.weight"), format!("{index}.bias")]);
            vars.push(Var::from_vec(weight, (inputs, outputs), &Device::Cpu)?);
            vars.push(Var::from_vec(vec![0.0f32; outputs], outputs, &Device::Cpu)?);
        }
        let zeros = vec![0.0; params.len()];
        Ok(Network {
            description: description.clone(),
            names,
            vars,
            params,
            means: zeros.clone(),
            squares: zeros.clone(),
            grads: zeros,
            step: 0,
        })
    }

    fn logits(&self, samples: &Tensor) -> candle_core::Result<Tensor> {
        let mut values = samples.clone();
        let last = self.description.layers.len() - 1;
        for (index, layer) in self.description.layers.iter().enumerate() {
            let (weight, bias) = (&self.vars[2 * index], &self.vars[2 * index + 1]);
            let activation = match index == last {
                true => Activation::Identity,
                false => Activation::Relu,
            };
            values = match layer {
                Layer::Dense { .. } => affine(&values, weight, bias, activation)?,
                Layer::Convolution { images, .. } => {
                    convolution(&values, weight, bias, *images, activation)?
                }
            };
        }
        Ok(values)
    }

    /// Forward, backward and AdamW; returns the mean loss before the update.
    pub(crate) fn step(
        &mut self,
        samples: &Tensor,
        labels: &[u32],
    ) -> Result<f64, Box<dyn std::error::Error + Send + Sync>> {
        let logits = self.logits(samples)?;
        let classes = self.description.classes();
        let loss = {
            let (storage, _) = logits.storage_and_layout();
            let candle_core::Storage::Cpu(storage) = &*storage else {
                unreachable!("everything here is on the CPU")
            };
            cross_entropy(storage.as_slice::<f32>()?, labels, classes)
        };
        let gradient = Tensor::from_vec(loss.logit_gradients, logits.shape(), &Device::Cpu)?;
        let tensors = self.vars.iter().map(Var::as_tensor);
        let parameters = self.names.iter().map(String::as_str).zip(tensors);
        let buffer = std::mem::take(&mut self.grads);
        self.grads = backward_from(&logits, gradient, parameters, buffer)?;
        self.update(labels.len())?;
        Ok(loss.loss_sum / labels.len() as f64)
    }

    fn update(&mut self, samples: usize) -> candle_core::Result<()> {
        self.step += 1;
        let update = adamw(self.step, samples);
        update.apply(
            Execution::current(),
            &mut self.params,
            &mut self.means,
            &mut self.squares,
            &self.grads,
        );
        let mut rest = &self.params[..];
        for var in &self.vars {
            let (values, behind) = rest.split_at(var.elem_count());
            mobula_actors::kernels::overwrite(var, values)?;
            rest = behind;
        }
        Ok(())
    }
}

/// The update after `step` steps, counted from 1, for sums of gradients over so many samples.
pub(crate) fn adamw(step: u64, samples: usize) -> AdamwUpdate {
    let (mean_part, square_part) = (math::power(BETA1, step), math::power(BETA2, step));
    AdamwUpdate {
        scale: (1.0 / samples as f64) as f32,
        beta1: BETA1 as f32,
        one_minus_beta1: (1.0 - BETA1) as f32,
        beta2: BETA2 as f32,
        one_minus_beta2: (1.0 - BETA2) as f32,
        epsilon: EPSILON as f32,
        inverse_square_correction: (1.0 / (1.0 - square_part)) as f32,
        keep: (1.0 - LEARNING_RATE * WEIGHT_DECAY) as f32,
        rate: (LEARNING_RATE / (1.0 - mean_part)) as f32,
    }
}

/// Batches of normal samples, labelled by a linear teacher, so that there is something to learn.
pub(crate) struct Batches {
    pub(crate) samples: Vec<Tensor>,
    pub(crate) labels: Vec<Vec<u32>>,
}

impl Batches {
    pub(crate) fn new(description: &Description, count: usize) -> candle_core::Result<Self> {
        let (features, classes) = (description.features(), description.classes());
        let normal = |what: &str, index: usize, count: usize| -> Vec<f32> {
            let stream = Stream::new(2, Purpose::Initialise, what, index as u64);
            (0..count as u64)
                .map(|i| stream.normal(i, 0) as f32)
                .collect()
        };
        let teacher = Tensor::from_vec(
            normal("teacher", 0, features * classes),
            (features, classes),
            &Device::Cpu,
        )?;
        let (mut samples, mut labels) = (Vec::new(), Vec::new());
        for index in 0..count {
            let values = normal("samples", index, description.batch * features);
            let batch = Tensor::from_vec(values, (description.batch, features), &Device::Cpu)?;
            let scores = mobula_actors::kernels::product(&batch, &teacher)?;
            labels.push(scores.argmax(1)?.to_vec1::<u32>()?);
            samples.push(batch);
        }
        Ok(Batches { samples, labels })
    }
}
