//! A model's parameters as it uses them, and the gradients that it gives for them.
//!
//! Invariants:
//! 1. A parameter's initial value depends only on (seed, its name, its shape, its rule).
//! 2. Gradients are complete: a parameter that the loss did not reach is an error, never a silent zero.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::layout::{Layout, ParameterSlot};
use super::model::{ModelError, check_length};
use super::random::{Purpose, Stream};
use crate::kernels::Execution;
use crate::kernels::affine::PreparedAffine;
use crate::kernels::gradients::backward_from;
use crate::kernels::product::MatrixView;

/// The first values of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Initial {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Normal around zero.
    Normal {
        /// The standard deviation.
        deviation: f64,
    },
}

impl Initial {
    /// Normal with variance 2 / `inputs`, for weights before a rectifier (He et al., ICCV 2015).
    #[must_use]
    pub fn he(inputs: usize) -> Self {
        Initial::Normal {
            deviation: (2.0 / inputs.max(1) as f64).sqrt(),
        }
    }
}

/// One tensor of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name, unique in the model: 1 to 128 characters.
    pub name: String,
    /// Its dimensions; values are row-major.
    pub shape: Vec<usize>,
    /// Its first values.
    pub initial: Initial,
}

impl Parameter {
    /// A parameter.
    #[must_use]
    pub fn new(name: impl Into<String>, shape: &[usize], initial: Initial) -> Self {
        Parameter {
            name: name.into(),
            shape: shape.to_vec(),
            initial,
        }
    }
}

/// The first values of all parameters, flat, in the order of their [`Layout`].
#[must_use]
pub fn initial_values(parameters: &[Parameter], seed: u64) -> Vec<f32> {
    let by_name: BTreeMap<&str, &Parameter> = parameters
        .iter()
        .map(|parameter| (parameter.name.as_str(), parameter))
        .collect();
    let mut flat = Vec::new();
    for (name, parameter) in by_name {
        let count = parameter.shape.iter().product::<usize>();
        match parameter.initial {
            Initial::Zeros => flat.resize(flat.len() + count, 0.0),
            Initial::Ones => flat.resize(flat.len() + count, 1.0),
            Initial::Normal { deviation } => {
                let stream = Stream::new(seed, Purpose::Initialise, name, 0);
                let values = (0..count as u64).map(|i| (stream.normal(i, 0) * deviation) as f32);
                flat.extend(values);
            }
        }
    }
    flat
}

/// The values of all parameters: as slices, or as tensors of candle on the device that the job or the endpoint asks for.
///
/// Those of a model that is only asked ([`Parameters::for_inference`]) also come as prepared dense layers.
///
/// Slices are in the CPU's memory, whatever the device. A model that uses tensors only, and makes its own with
/// [`Parameters::device`], computes there without more ado; one that uses slices computes on the CPU.
#[derive(Debug)]
pub struct Parameters {
    layout: Arc<Layout>,
    flat: Vec<f32>,
    device: Device,
    /// Made when they are asked for first, and again after new values came.
    tensors: OnceLock<BTreeMap<String, Tensor>>,
    usage: Usage,
}

/// What the values are for.
#[derive(Debug)]
enum Usage {
    /// Gradients: candle differentiates by the tensors.
    Training,
    /// Answers: nothing has a gradient. On the CPU dense layers lie in panels, by the name of the weight, made when a layer is
    /// asked for first, so that nothing is copied for a product.
    Inference(Mutex<BTreeMap<String, Arc<PreparedAffine>>>),
}

impl Parameters {
    /// Parameters with these values, on the CPU.
    pub fn new(layout: Arc<Layout>, flat: &[f32]) -> Result<Self, ModelError> {
        Self::on(Device::Cpu, layout, flat)
    }

    /// Parameters with these values, whose tensors are on `device`.
    pub fn on(device: Device, layout: Arc<Layout>, flat: &[f32]) -> Result<Self, ModelError> {
        check_length("the parameter vector", layout.value_count(), flat.len())?;
        Ok(Parameters {
            layout,
            flat: flat.to_vec(),
            device,
            tensors: OnceLock::new(),
            usage: Usage::Training,
        })
    }

    /// Parameters with these values, whose tensors are on `device`, of a model that is only asked: it answers with the same bits,
    /// in less time, and has no gradients.
    pub fn for_inference(
        device: Device,
        layout: Arc<Layout>,
        flat: &[f32],
    ) -> Result<Self, ModelError> {
        Ok(Parameters {
            usage: Usage::Inference(Mutex::default()),
            ..Self::on(device, layout, flat)?
        })
    }

    /// Replaces all values.
    pub fn load(&mut self, flat: &[f32]) -> Result<(), ModelError> {
        check_length("the parameter vector", self.flat.len(), flat.len())?;
        self.flat.copy_from_slice(flat);
        self.tensors = OnceLock::new();
        if let Usage::Inference(layers) = &mut self.usage {
            *layers = Mutex::default();
        }
        Ok(())
    }

    /// Where each parameter lies.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the tensors are, and where a model puts its samples.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// All values, flat.
    #[must_use]
    pub fn flat(&self) -> &[f32] {
        &self.flat
    }

    /// The values of one parameter, row-major.
    pub fn values(&self, name: &str) -> Result<&[f32], ModelError> {
        Ok(&self.flat[self.slot(name)?.range()])
    }

    /// One parameter as a tensor with its shape. In training candle differentiates by it.
    pub fn tensor(&self, name: &str) -> Result<&Tensor, ModelError> {
        let tensors = match self.tensors.get() {
            Some(tensors) => tensors,
            None => {
                let made = self.make_tensors()?;
                self.tensors.get_or_init(|| made)
            }
        };
        match tensors.get(name) {
            Some(tensor) => Ok(tensor),
            None => Err(self.unknown(name)),
        }
    }

    /// The dense layer of a weight, inputs × outputs, and a bias, prepared, if the model is only asked, and on the CPU.
    pub(super) fn prepared_layer(
        &self,
        weight: &str,
        bias: &str,
    ) -> Result<Option<Arc<PreparedAffine>>, ModelError> {
        let Usage::Inference(layers) = &self.usage else {
            return Ok(None);
        };
        if !self.device.is_cpu() {
            return Ok(None);
        }
        let mut layers = layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(prepared) = layers.get(weight) {
            return Ok(Some(Arc::clone(prepared)));
        }
        let &[inputs, outputs] = &self.slot(weight)?.shape[..] else {
            return Err(ModelError::Parameter {
                name: weight.to_owned(),
                reason: "a dense layer's weight has two dimensions".to_owned(),
            });
        };
        let matrix = MatrixView::row_major(self.values(weight)?, inputs, outputs);
        let bias = self.values(bias)?;
        check_length("the bias of a dense layer", outputs, bias.len())?;
        let made = PreparedAffine::new(Execution::current(), &matrix, bias);
        let made = Arc::new(made);
        layers.insert(weight.to_owned(), Arc::clone(&made));
        Ok(Some(made))
    }

    fn make_tensors(&self) -> Result<BTreeMap<String, Tensor>, ModelError> {
        if !self.device.is_cpu() {
            return self.make_tensors_of_one_copy();
        }
        let make = |slot: &ParameterSlot| {
            let values = &self.flat[slot.range()];
            let var = Var::from_slice(values, &slot.shape[..], &Device::Cpu)?;
            Ok((slot.name.clone(), self.tensor_of(&var)))
        };
        self.layout.slots.iter().map(make).collect()
    }

    /// The tensors by one copy to the device, which is then divided there.
    fn make_tensors_of_one_copy(&self) -> Result<BTreeMap<String, Tensor>, ModelError> {
        let whole = Tensor::from_slice(&self.flat, self.flat.len(), &self.device)?;
        let make = |slot: &ParameterSlot| {
            let values = whole.narrow(0, slot.offset, slot.value_count())?;
            let var = Var::from_tensor(&values.reshape(&slot.shape[..])?)?;
            Ok((slot.name.clone(), self.tensor_of(&var)))
        };
        self.layout.slots.iter().map(make).collect()
    }

    /// What a model computes with: of one that is only asked candle need not keep how its answers came about.
    fn tensor_of(&self, var: &Var) -> Tensor {
        match self.usage {
            Usage::Training => var.as_tensor().clone(),
            Usage::Inference(_) => var.as_detached_tensor(),
        }
    }

    fn slot(&self, name: &str) -> Result<&ParameterSlot, ModelError> {
        self.layout.slot(name).ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> ModelError {
        ModelError::UnknownParameter {
            name: name.to_owned(),
        }
    }
}

/// The gradients of one virtual shard in the making, for models that do not use candle.
#[derive(Debug)]
pub struct Gradients {
    layout: Arc<Layout>,
    flat: Vec<f32>,
    given: Vec<bool>,
}

impl Gradients {
    /// Zeros for all of `parameters`.
    #[must_use]
    pub fn zeros(parameters: &Parameters) -> Self {
        let layout = Arc::clone(&parameters.layout);
        Gradients {
            flat: vec![0.0; parameters.flat.len()],
            given: vec![false; layout.slots.len()],
            layout,
        }
    }

    /// The gradient of one parameter, row-major, to be added to. It counts as given from now on.
    pub fn of(&mut self, name: &str) -> Result<&mut [f32], ModelError> {
        let index = self
            .layout
            .slots
            .binary_search_by(|slot| slot.name.as_str().cmp(name))
            .map_err(|_| ModelError::UnknownParameter {
                name: name.to_owned(),
            })?;
        self.given[index] = true;
        Ok(&mut self.flat[self.layout.slots[index].range()])
    }

    /// Gradients with the sum of losses that they belong to.
    pub fn finish(self, loss_sum: f64) -> Result<ShardOutput, ModelError> {
        if let Some(index) = self.given.iter().position(|given| !given) {
            return Err(ModelError::MissingGradient {
                name: self.layout.slots[index].name.clone(),
            });
        }
        Ok(ShardOutput {
            loss_sum,
            grads: self.flat,
        })
    }
}

/// What one virtual shard contributes to a step.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardOutput {
    pub(super) loss_sum: f64,
    pub(super) grads: Vec<f32>,
}

impl ShardOutput {
    /// Sum of the samples' losses.
    #[must_use]
    pub fn loss_sum(&self) -> f64 {
        self.loss_sum
    }

    /// Gradient of that sum, flat, in the order of the parameters' layout.
    #[must_use]
    pub fn gradients(&self) -> &[f32] {
        &self.grads
    }

    /// The gradients that candle found by going back from a scalar, the sum of losses.
    pub fn from_store(
        parameters: &Parameters,
        loss_sum: f64,
        store: &GradStore,
    ) -> Result<Self, ModelError> {
        let mut grads = Vec::with_capacity(parameters.flat.len());
        for slot in &parameters.layout.slots {
            let gradient = store.get(parameters.tensor(&slot.name)?).ok_or_else(|| {
                ModelError::MissingGradient {
                    name: slot.name.clone(),
                }
            })?;
            grads.extend(gradient.flatten_all()?.to_vec1::<f32>()?);
        }
        check_length("the gradient", parameters.flat.len(), grads.len())?;
        Ok(ShardOutput { loss_sum, grads })
    }

    /// As [`ShardOutput::from_store`], for a loss whose gradient with respect to `outputs` the model
    /// computed itself.
    pub fn from_outputs(
        parameters: &Parameters,
        outputs: &Tensor,
        loss_sum: f64,
        output_gradients: Vec<f32>,
    ) -> Result<Self, ModelError> {
        let gradient = Tensor::from_vec(output_gradients, outputs.shape(), outputs.device())?;
        Self::from_output_gradients(parameters, outputs, loss_sum, gradient)
    }

    /// As [`ShardOutput::from_outputs`], of gradients that are where the outputs are.
    pub fn from_output_gradients(
        parameters: &Parameters,
        outputs: &Tensor,
        loss_sum: f64,
        output_gradients: Tensor,
    ) -> Result<Self, ModelError> {
        let slots = parameters.layout.slots.iter();
        let tensors = slots
            .map(|slot| Ok((slot.name.as_str(), parameters.tensor(&slot.name)?)))
            .collect::<Result<Vec<_>, ModelError>>()?;
        let grads = backward_from(outputs, output_gradients, tensors, Vec::new())?;
        check_length("the gradient", parameters.flat.len(), grads.len())?;
        Ok(ShardOutput { loss_sum, grads })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Parameters {
        let list = [
            Parameter::new("a", &[2], Initial::Ones),
            Parameter::new("b", &[2], Initial::Normal { deviation: 0.5 }),
        ];
        let layout = Arc::new(Layout::of(&list));
        Parameters::new(layout, &initial_values(&list, 7)).unwrap()
    }

    #[test]
    fn initial_values_depend_on_seed_and_name_only() {
        let weight =
            |name: &str, seed| initial_values(&[Parameter::new(name, &[3], Initial::he(2))], seed);
        assert_ne!(weight("a", 1), weight("a", 2));
        assert_ne!(weight("a", 1), weight("b", 1));
        let together = [
            Parameter::new("z", &[1], Initial::Zeros),
            Parameter::new("a", &[3], Initial::he(2)),
        ];
        assert_eq!(initial_values(&together, 1)[..3], weight("a", 1));
    }

    #[test]
    fn new_values_reach_slices_and_tensors() {
        let mut parameters = parameters();
        assert_eq!(parameters.values("a").unwrap(), [1.0, 1.0]);
        let tensor =
            |parameters: &Parameters| parameters.tensor("b").unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(tensor(&parameters), parameters.values("b").unwrap());
        parameters.load(&[1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(tensor(&parameters), [3.0, 4.0]);
        assert_eq!(parameters.values("b").unwrap(), [3.0, 4.0]);
        let error = parameters.load(&[1.0]).unwrap_err().to_string();
        assert!(error.contains("values where"), "{error}");
        let error = parameters.tensor("c").unwrap_err().to_string();
        assert!(error.contains("no parameter is called c"), "{error}");
    }

    #[test]
    fn new_values_reach_prepared_layers() {
        let list = [
            Parameter::new("x.bias", &[2], Initial::Zeros),
            Parameter::new("x.weight", &[3, 2], Initial::Zeros),
        ];
        let layout = Arc::new(Layout::of(&list));
        let [before, after] = [1.0f32, 2.0].map(|first| (0..8).map(|i| first + i as f32).collect());
        let [before, after]: [Vec<f32>; 2] = [before, after];
        let of = |parameters: &Parameters| {
            let layer = parameters.prepared_layer("x.weight", "x.bias").unwrap();
            layer.unwrap().forward_rows(
                Execution::current(),
                &[1.0, 0.0, -1.0],
                crate::kernels::Activation::Identity,
            )
        };
        let mut parameters =
            Parameters::for_inference(Device::Cpu, Arc::clone(&layout), &before).unwrap();
        assert_eq!(of(&parameters), [1.0 + 3.0 - 7.0, 2.0 + 4.0 - 8.0]);
        parameters.load(&after).unwrap();
        assert_eq!(of(&parameters), [2.0 + 4.0 - 8.0, 3.0 + 5.0 - 9.0]);
        let error = parameters.prepared_layer("x.bias", "x.bias").unwrap_err();
        assert!(error.to_string().contains("two dimensions"), "{error}");
        let error = Parameters::for_inference(Device::Cpu, layout, &after)
            .and_then(|parameters| parameters.prepared_layer("x.weight", "x.weight"));
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("the bias of a dense layer has 6 values"),
            "{error}"
        );
        let trained = self::parameters().prepared_layer("a", "b").unwrap();
        assert!(trained.is_none());
    }

    #[test]
    fn tensors_of_one_copy_are_those_of_many() {
        let parameters = parameters();
        let (one, many) = (
            parameters.make_tensors_of_one_copy().unwrap(),
            parameters.make_tensors().unwrap(),
        );
        assert!(one.keys().eq(many.keys()));
        for (name, tensor) in &one {
            let values = tensor.to_vec1::<f32>().unwrap();
            assert_eq!(values, parameters.values(name).unwrap());
            assert_eq!(tensor.dims(), many[name].dims());
            assert!(tensor.is_variable());
        }
    }

    #[test]
    fn a_parameter_that_the_loss_does_not_reach_is_named() {
        let parameters = parameters();
        let mut gradients = Gradients::zeros(&parameters);
        gradients.of("a").unwrap()[1] = 2.0;
        let error = gradients.finish(1.0).unwrap_err().to_string();
        assert!(error.starts_with("parameter b got no gradient"), "{error}");

        let a = parameters.tensor("a").unwrap();
        // An operation without a way back, as candle's own softmax is.
        let cut = parameters.tensor("b").unwrap().detach();
        let loss = (a * cut).unwrap().sum_all().unwrap();
        let store = loss.backward().unwrap();
        let error = ShardOutput::from_store(&parameters, 1.0, &store).unwrap_err();
        assert!(
            error.to_string().starts_with("parameter b got no gradient"),
            "{error}"
        );
    }
}
