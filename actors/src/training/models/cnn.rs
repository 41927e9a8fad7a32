//! 3×3 convolutions with rectifiers, then one dense layer, for images whose channels lie nearest in
//! memory.

use candle_core::{Device, Tensor};

use super::super::data::SampleShape;
use super::super::model::ModelError;
use super::super::parameters::{Parameter, Parameters};
use super::super::patches::{KERNEL_AREA, Patches};
use super::head::{self, Network};
use super::mlp::{affine, affine_parameters};
use crate::kernels::Activation;

/// A convolutional network.
#[derive(Debug)]
pub(super) struct Cnn {
    /// Each convolution's input.
    convolutions: Vec<Patches>,
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
            let patches = Patches {
                height,
                width,
                channels: in_channels,
                stride: if layer == 0 { 1 } else { 2 },
            };
            (height, width) = patches.output_size();
            in_channels = *out_channels;
            convolutions.push(patches);
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
        for (index, (patches, outputs)) in self.convolutions.iter().zip(&self.channels).enumerate()
        {
            let inputs = KERNEL_AREA * patches.channels;
            parameters.extend(affine_parameters(
                &format!("conv.{index}"),
                inputs,
                *outputs,
            ));
            let (height, width) = patches.output_size();
            features = height * width * outputs;
        }
        parameters.extend(affine_parameters("dense.0", features, self.outputs));
        parameters
    }

    fn forward(&self, parameters: &Parameters, features: &[f32]) -> Result<Tensor, ModelError> {
        let count = features.len() / self.inputs;
        let mut values = Tensor::from_slice(features, (count, self.inputs), &Device::Cpu)?;
        for (layer, patches) in self.convolutions.iter().enumerate() {
            let rows = patches.extract(&values)?;
            let layer = format!("conv.{layer}");
            values = affine(parameters, &rows, &layer, Activation::Relu)?.reshape((count, ()))?;
        }
        affine(parameters, &values, "dense.0", Activation::Identity)
    }
}
