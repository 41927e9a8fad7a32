//! Dense layers with rectifiers between them.

use candle_core::Tensor;

use super::super::data::SampleShape;
use super::super::model::ModelError;
use super::super::parameters::{Initial, Parameter, Parameters};
use super::head::{self, Network};
use crate::kernels::{self, Activation};

/// A multi-layer perceptron.
#[derive(Debug)]
pub(super) struct Mlp {
    /// The width of the input, of each hidden layer, and of the output.
    widths: Vec<usize>,
}

impl Mlp {
    pub(super) fn new(hidden: &[usize], shape: &SampleShape) -> Result<Self, ModelError> {
        let (inputs, outputs) = head::widths("an mlp", shape)?;
        let mut widths = vec![inputs];
        widths.extend(hidden);
        widths.push(outputs);
        Ok(Mlp { widths })
    }
}

/// `values · weight + bias`, then the activation.
pub(super) fn affine(
    parameters: &Parameters,
    values: &Tensor,
    layer: &str,
    activation: Activation,
) -> Result<Tensor, ModelError> {
    let (weight, bias) = (format!("{layer}.weight"), format!("{layer}.bias"));
    if let Some(prepared) = parameters.prepared_layer(&weight, &bias)? {
        return Ok(prepared.apply(values, activation)?);
    }
    let (weight, bias) = (parameters.tensor(&weight)?, parameters.tensor(&bias)?);
    Ok(kernels::affine(values, weight, bias, activation)?)
}

/// The parameters of an affine layer: a weight of `[inputs, outputs]` and a bias of `[outputs]`.
pub(super) fn affine_parameters(layer: &str, inputs: usize, outputs: usize) -> [Parameter; 2] {
    let weight = Initial::he(inputs);
    [
        Parameter::new(format!("{layer}.weight"), &[inputs, outputs], weight),
        Parameter::new(format!("{layer}.bias"), &[outputs], Initial::Zeros),
    ]
}

impl Network for Mlp {
    fn ends(&self) -> (usize, usize) {
        (self.widths[0], self.widths[self.widths.len() - 1])
    }

    fn parameters(&self) -> Vec<Parameter> {
        let layers = self.widths.windows(2).enumerate();
        layers
            .flat_map(|(index, pair)| {
                affine_parameters(&format!("dense.{index}"), pair[0], pair[1])
            })
            .collect()
    }

    fn forward(&self, parameters: &Parameters, features: &[f32]) -> Result<Tensor, ModelError> {
        let inputs = self.widths[0];
        let shape = (features.len() / inputs, inputs);
        let mut values = Tensor::from_slice(features, shape, parameters.device())?;
        let last = self.widths.len() - 2;
        for layer in 0..=last {
            let activation = match layer < last {
                true => Activation::Relu,
                false => Activation::Identity,
            };
            values = affine(parameters, &values, &format!("dense.{layer}"), activation)?;
        }
        Ok(values)
    }
}
