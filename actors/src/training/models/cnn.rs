//! 3×3 convolutions with rectifiers, then one dense layer, for images whose channels lie nearest in
//! memory.

use candle_core::Tensor;

use super::super::data::SampleShape;
use super::super::model::ModelError;
use super::super::parameters::{Parameter, Parameters};
use super::head::{self, Network};
use super::mlp::{affine, affine_parameters};
use crate::kernels::convolution::Images;
use crate::kernels::{Activation, convolution};

/// A convolutional network.
#[derive(Debug)]
pub(super) struct Cnn {
    /// Each convolution's input.
    convolutions: Vec<Images>,
    /// Channels of each convolution's output.
    channels: Vec<usize>,
    inputs: usize,
    outputs: usize,
}

impl Cnn {
    pub(super) fn new(channels: &[usize], shape: &SampleShape) -> Result<Self, ModelError> {
        let (inputs, outputs) = head::widths("a cnn", shape)?;
        let features = match shape {
            SampleShape::Classified { features, .. } | SampleShape::Measured { features, .. } => {
                features.as_slice()
            }
            SampleShape::Tokens { .. } => &[],
        };
        let (mut height, mut width, mut in_channels) = match *features {
            [height, width] => (height, width, 1),
            [height, width, channels] => (height, width, channels),
            _ => {
                return Err(ModelError::Shape {
                    model: "a cnn",
                    wanted: "images of [height, width] or [height, width, channels]; give the data \
                             a `shape`",
                    found: shape.to_string(),
                });
            }
        };
        let mut convolutions = Vec::with_capacity(channels.len());
        for (layer, out_channels) in channels.iter().enumerate() {
            let images = Images {
                height,
                width,
                channels: in_channels,
                stride: if layer == 0 { 1 } else { 2 },
            };
            (height, width) = images.output_size();
            in_channels = *out_channels;
            convolutions.push(images);
        }
        Ok(Cnn {
            convolutions,
            channels: channels.to_vec(),
            inputs,
            outputs,
        })
    }
}

impl Network for Cnn {
    fn ends(&self) -> (usize, usize) {
        (self.inputs, self.outputs)
    }

    fn parameters(&self) -> Vec<Parameter> {
        let mut parameters = Vec::new();
        let mut features = self.inputs;
        for (index, (images, outputs)) in self.convolutions.iter().zip(&self.channels).enumerate() {
            parameters.extend(affine_parameters(
                &format!("conv.{index}"),
                images.patch_len(),
                *outputs,
            ));
            let (height, width) = images.output_size();
            features = height * width * outputs;
        }
        parameters.extend(affine_parameters("dense.0", features, self.outputs));
        parameters
    }

    fn forward(&self, parameters: &Parameters, features: &[f32]) -> Result<Tensor, ModelError> {
        let count = features.len() / self.inputs;
        let mut values = Tensor::from_slice(features, (count, self.inputs), parameters.device())?;
        for (layer, images) in self.convolutions.iter().enumerate() {
            let weight = parameters.tensor(&format!("conv.{layer}.weight"))?;
            let bias = parameters.tensor(&format!("conv.{layer}.bias"))?;
            values = convolution(&values, weight, bias, *images, Activation::Relu)?;
        }
        affine(parameters, &values, "dense.0", Activation::Identity)
    }
}
