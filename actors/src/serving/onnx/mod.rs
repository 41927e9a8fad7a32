//! Models of the Open Neural Network Exchange, computed by `tract`.
//!
//! Invariants:
//! 1. A file is looked through (`graph`) before anything is computed from it: what is too large, cut off, refers to other
//!    files or asks for operators that are not there is refused by name.
//! 2. What a model takes and gives is what its graph computes, not what the file claims of its outputs; where the two
//!    differ, the file is refused.
//! 3. Requests are joined only where the graph carries the batch dimension from each input to each output, and where a
//!    trial has shown that a row's answer does not depend on the others.
//! 4. A panic of the engine is an error of the model, and so is a model that is not ready in time (`limited`).

mod error;
mod graph;
mod values;

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use tract_onnx::pb::ModelProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::Factoid;
use tract_onnx::tract_hir::internal::{InferenceFact, Symbol, TDim};

pub use self::error::OnnxError;
use self::values::{datatype_of, from_tensor, to_tensor};
use super::fleet::BATCH_ROWS_MAX;
use super::limited::{self, Preparation};
use super::oip::{TensorData, TensorMetadata};
use super::replica::InferError;
use super::rows::{BATCH_BYTES_MAX, Batch, Cell};
use super::signature::{Described, listed};
use crate::panics::caught;

/// The largest file: with its description it has to fit into a version's file.
pub const ONNX_BYTES_MAX: u64 = 300 << 20;

/// What open dimensions other than the batch are tried with, in turn: short texts, single steps, small images.
const TRIED_SIZES: [u64; 4] = [4, 1, 64, 224];

/// How far a row's answer may be from the same row's among others, relative to the larger of the two and to 1: sums are
/// rounded in another order.
const ROW_TOLERANCE: f64 = 1e-4;

/// What is done with a model before it is ready.
const PREPARATION: Preparation = Preparation {
    doing: "being analysed, optimised and tried",
    remedy: "the file may be damaged, or the graph too large; export it again, or simplify the graph",
};

/// A model that is ready to answer.
pub struct OnnxModel {
    plan: Arc<TypedRunnableModel>,
    inputs: Vec<TensorMetadata>,
    outputs: Vec<TensorMetadata>,
    /// Whether the first dimension of all tensors is the batch.
    is_batched: bool,
}

impl OnnxModel {
    /// Reads a model and has `prepare` do with it what is to be done before it is used, within a time: the engine may
    /// be at work on a damaged file for ever.
    pub fn prepared<T: Send + 'static>(
        bytes: Bytes,
        prepare: impl FnOnce(Self) -> Result<T, OnnxError> + Send + 'static,
    ) -> Result<T, OnnxError> {
        let file = bytes.clone();
        limited::prepared(&[&file], PREPARATION, move || prepare(Self::load(&bytes)?))?
    }

    /// Reads a model, checks it, and prepares it for answering, in whatever time that takes.
    pub(super) fn load(bytes: &[u8]) -> Result<Self, OnnxError> {
        let size_bytes = bytes.len() as u64;
        if size_bytes > ONNX_BYTES_MAX {
            return Err(OnnxError::TooLarge { size_bytes });
        }
        let proto =
            ModelProto::decode(bytes).map_err(|error| OnnxError::Malformed(error.to_string()))?;
        let engine = tract_onnx::onnx().with_ignore_value_info(true);
        graph::check(&proto, |operator| {
            engine.op_register.0.contains_key(operator)
        })?;
        guarded(|| build(&engine, &proto))
    }

    /// What it takes and gives. It is asked small questions for that: whether it answers at all, and whether each row of a
    /// batch is answered as it is alone.
    pub fn describe(&self) -> Result<Described, OnnxError> {
        let size = self.warm_up()?;
        let max_batch_size = if self.is_batched && self.rows_are_independent(size)? {
            self.fitting_rows(size)
        } else {
            0
        };
        Ok(Described {
            inputs: self.inputs.clone(),
            outputs: self.outputs.clone(),
            max_batch_size,
        })
    }

    /// Refuses a description that is not of this model.
    pub fn check_described(
        &self,
        inputs: &[TensorMetadata],
        outputs: &[TensorMetadata],
        max_batch_size: u32,
    ) -> Result<(), OnnxError> {
        let is_so = listed(inputs) == listed(&self.inputs)
            && listed(outputs) == listed(&self.outputs)
            && (max_batch_size == 0 || self.is_batched);
        if is_so {
            return Ok(());
        }
        Err(OnnxError::Described {
            said: format!("{} to {}", listed(inputs), listed(outputs)),
            found: format!("{} to {}", listed(&self.inputs), listed(&self.outputs)),
        })
    }

    /// Computes a small batch, so that the first request finds a model that has run. What its open dimensions were tried
    /// with is returned.
    pub fn warm_up(&self) -> Result<u64, OnnxError> {
        let mut failure = OnnxError::Run("it was not tried".to_owned());
        for size in TRIED_SIZES {
            if self.row_bytes(size) > BATCH_BYTES_MAX as u64 {
                break;
            }
            match self
                .run(self.sample(1, size))
                .map(|answer| answer.size_bytes())
            {
                Ok(fits) if fits <= BATCH_BYTES_MAX => return Ok(size),
                Ok(size_bytes) => {
                    failure = OnnxError::Run(InferError::too_large(size_bytes as u64).to_string());
                }
                Err(error) => failure = error,
            }
            if !self.has_open_dimensions() {
                break;
            }
        }
        Err(failure)
    }

    /// The outputs of a batch, or of the request of a model that does not batch.
    pub fn run(&self, batch: Batch) -> Result<Batch, OnnxError> {
        let rows = batch.rows;
        if batch.cells.len() != self.inputs.len() {
            return Err(OnnxError::Run(format!(
                "{} inputs were given, it takes {}",
                batch.cells.len(),
                self.inputs.len()
            )));
        }
        let given = batch.cells.into_iter().zip(&self.inputs);
        let tensors: Result<TVec<TValue>, OnnxError> = given
            .map(|(cell, input)| Ok(to_tensor(&input.name, cell)?.into()))
            .collect();
        let tensors = tensors?;
        let computed = guarded(|| {
            self.plan
                .run(tensors)
                .map_err(|error| OnnxError::Run(causes(&error)))
        })?;
        let expected = computed.into_iter().zip(&self.outputs);
        let cells: Result<Vec<Cell>, OnnxError> = expected
            .map(|(value, output)| from_tensor(&output.name, output.datatype, &value))
            .collect();
        Ok(Batch {
            rows,
            cells: cells?,
        })
    }

    /// Rows of the model's inputs, none like another, with small numbers only: they may be places in a table.
    fn sample(&self, rows: u64, open_size: u64) -> Batch {
        let cell = |input: &TensorMetadata| {
            let sizes = input.shape.iter().enumerate();
            let shape: Vec<u64> = sizes
                .map(|(axis, size)| match (self.is_batched, axis) {
                    (true, 0) => rows,
                    _ => u64::try_from(*size).unwrap_or(open_size),
                })
                .collect();
            let count = usize::try_from(shape.iter().product::<u64>()).unwrap_or(0);
            let data = values::sample(input.datatype, count);
            Cell { shape, data }
        };
        Batch {
            rows: self.is_batched.then_some(rows),
            cells: self.inputs.iter().map(cell).collect(),
        }
    }

    /// What the inputs of one row take with open dimensions of this size.
    fn row_bytes(&self, open_size: u64) -> u64 {
        let of_one = |input: &TensorMetadata| {
            let sizes = input.shape.iter().enumerate();
            let sizes = sizes.map(|(axis, size)| match (self.is_batched, axis) {
                (true, 0) => 1,
                _ => u64::try_from(*size).unwrap_or(open_size),
            });
            let element_bytes = input.datatype.size_bytes().unwrap_or(1) as u64;
            sizes.fold(element_bytes, u64::saturating_mul)
        };
        self.inputs.iter().map(of_one).fold(0, u64::saturating_add)
    }

    fn has_open_dimensions(&self) -> bool {
        let skipped = usize::from(self.is_batched);
        let mut inputs = self.inputs.iter();
        inputs.any(|input| input.shape.iter().skip(skipped).any(|size| *size < 0))
    }

    /// Whether each of three different rows is answered among the others as it is alone.
    fn rows_are_independent(&self, open_size: u64) -> Result<bool, OnnxError> {
        const ROWS: u64 = 3;
        let asked = self.sample(ROWS, open_size);
        let Ok(together) = self.run(asked.clone())?.split() else {
            return Ok(false);
        };
        let Ok(asked) = asked.split() else {
            return Ok(false);
        };
        for (row, expected) in asked.into_iter().zip(together) {
            let Ok(alone) = self.run(Batch::join(vec![row]))?.split() else {
                return Ok(false);
            };
            let cells = alone.iter().flat_map(|row| &row.cells);
            let are_equal = cells
                .zip(&expected.cells)
                .all(|(one, other)| one.shape == other.shape && are_near(&one.data, &other.data));
            if !are_equal {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How many rows a batch may have for its inputs and its outputs to fit into a call.
    fn fitting_rows(&self, open_size: u64) -> u32 {
        let row_bytes = |tensors: &[TensorMetadata]| -> u64 {
            let of_one = |tensor: &TensorMetadata| {
                let sizes = tensor.shape.iter().skip(1);
                let sizes = sizes.map(|size| u64::try_from(*size).unwrap_or(open_size));
                let count = sizes.fold(1u64, u64::saturating_mul);
                count.saturating_mul(tensor.datatype.size_bytes().unwrap_or(1) as u64)
            };
            tensors.iter().map(of_one).fold(0, u64::saturating_add)
        };
        let largest = row_bytes(&self.inputs).max(row_bytes(&self.outputs)).max(1);
        let fitting = BATCH_BYTES_MAX as u64 / largest;
        u32::try_from(fitting.clamp(1, BATCH_ROWS_MAX as u64)).unwrap_or(1)
    }
}

/// Runs a part of the engine, which may panic on a graph that it did not expect.
fn guarded<T>(work: impl FnOnce() -> Result<T, OnnxError>) -> Result<T, OnnxError> {
    caught(work).unwrap_or_else(|text| Err(OnnxError::Panicked(text)))
}

/// An error of the engine with its causes, on one line.
fn causes(error: &TractError) -> String {
    /// More of a graph's insides helps nobody.
    const SHOWN_CHARACTERS: usize = 400;
    let text: Vec<String> = error.chain().map(ToString::to_string).collect();
    let line = text.join(": ").replace('\n', " ");
    line.chars().take(SHOWN_CHARACTERS).collect()
}

fn build(engine: &tract_onnx::Onnx, proto: &ModelProto) -> Result<OnnxModel, OnnxError> {
    let refused = |error: TractError| OnnxError::Graph(causes(&error));
    let parsed = engine.parse(proto, None).map_err(refused)?;
    if let Some(name) = parsed.unresolved_inputs.first() {
        return Err(OnnxError::Graph(format!(
            "{name:?} is used and nothing computes it"
        )));
    }
    let mut model = parsed.model;
    let batch = open_dimensions(&mut model)?;
    let names = |model: &InferenceModel| -> Result<Vec<String>, OnnxError> {
        let outlets = model.input_outlets().map_err(refused)?;
        Ok(outlets
            .iter()
            .map(|outlet| model.node(outlet.node).name.clone())
            .collect())
    };
    let input_names = names(&model)?;
    let typed = model
        .into_typed()
        .and_then(|model| model.into_decluttered())
        .map_err(refused)?;
    let mut inputs = Vec::with_capacity(input_names.len());
    for (index, name) in input_names.into_iter().enumerate() {
        let fact = typed.input_fact(index).map_err(refused)?;
        let input = described("input", name, fact)?;
        graph::check_size(&input)?;
        inputs.push(input);
    }
    let declared = &proto
        .graph
        .as_ref()
        .expect("a model without a graph is refused")
        .output;
    let mut outputs = Vec::with_capacity(declared.len());
    let mut carries_batch = true;
    for (index, declared) in declared.iter().enumerate() {
        let fact = typed.output_fact(index).map_err(refused)?;
        let output = described("output", declared.name.clone(), fact)?;
        graph::check_output(declared, &output)?;
        carries_batch &= batch.as_ref().is_some_and(|batch| {
            let is_of_batch = |dim: &TDim| dim.symbols().contains(batch);
            let mut dims = fact.shape.iter();
            dims.next() == Some(&TDim::from(batch.clone())) && !dims.any(is_of_batch)
        });
        outputs.push(output);
    }
    let plan = typed
        .into_optimized()
        .and_then(|model| model.into_runnable())
        .map_err(refused)?;
    Ok(OnnxModel {
        plan,
        inputs,
        outputs,
        is_batched: carries_batch,
    })
}

/// Names the dimensions that are not fixed. That of the batch is returned, if the first dimension of all inputs can be it.
fn open_dimensions(model: &mut InferenceModel) -> Result<Option<Symbol>, OnnxError> {
    let refused = |error: TractError| OnnxError::Graph(causes(&error));
    let count = model.input_outlets().map_err(refused)?.len();
    let mut facts = Vec::with_capacity(count);
    for index in 0..count {
        let name = model.input_outlets().map_err(refused)?[index].node;
        let name = model.node(name).name.clone();
        let fact = model.input_fact(index).map_err(refused)?.clone();
        if fact.shape.is_open() {
            return Err(OnnxError::Tensor {
                kind: "input",
                name,
                reason: "does not say how many dimensions it has: export it with a shape"
                    .to_owned(),
            });
        }
        let Some(datum_type) = fact.datum_type.concretize() else {
            return Err(OnnxError::Tensor {
                kind: "input",
                name,
                reason: "has no element type: export it with one".to_owned(),
            });
        };
        let dims: Vec<Option<TDim>> = fact.shape.dims().map(|dim| dim.concretize()).collect();
        facts.push((datum_type, dims));
    }
    // The first dimensions are the batch if all are open, and none of them is called as another one is.
    let is_open = |dim: &Option<TDim>| dim.as_ref().is_none_or(|dim| dim.to_i64().is_err());
    let first: Vec<Option<&TDim>> = facts
        .iter()
        .map(|(_, dims)| dims.first().and_then(Option::as_ref))
        .collect();
    let are_open = facts
        .iter()
        .all(|(_, dims)| dims.first().is_some_and(is_open));
    let are_one = first.windows(2).all(|pair| pair[0] == pair[1]);
    let mut later = facts
        .iter()
        .flat_map(|(_, dims)| dims.iter().skip(1).flatten());
    let is_used_again = later.any(|dim| {
        let symbols = dim.symbols();
        first
            .iter()
            .flatten()
            .any(|first| first.symbols().iter().any(|one| symbols.contains(one)))
    });
    let is_batched = count > 0 && are_open && are_one && !is_used_again;
    let batch = is_batched.then(|| model.symbols.new_with_prefix("batch"));
    for (index, (datum_type, dims)) in facts.into_iter().enumerate() {
        let named = dims.into_iter().enumerate().map(|(axis, dim)| {
            if let Some(batch) = batch.as_ref().filter(|_| axis == 0) {
                return TDim::from(batch.clone());
            }
            dim.unwrap_or_else(|| model.symbols.new_with_prefix("open").into())
        });
        let shape: TVec<TDim> = named.collect();
        model
            .set_input_fact(index, InferenceFact::dt_shape(datum_type, shape))
            .map_err(refused)?;
    }
    Ok(batch)
}

/// A tensor as the protocol describes it.
fn described(
    kind: &'static str,
    name: String,
    fact: &TypedFact,
) -> Result<TensorMetadata, OnnxError> {
    let Some(datatype) = datatype_of(fact.datum_type) else {
        return Err(OnnxError::Tensor {
            kind,
            name,
            reason: format!(
                "is of {:?}, which is not served: take numbers or truth values",
                fact.datum_type
            ),
        });
    };
    let shape = fact.shape.iter().map(|dim| dim.to_i64().unwrap_or(-1));
    Ok(TensorMetadata {
        name,
        datatype,
        shape: shape.collect(),
        labels: Vec::new(),
    })
}

fn are_near(one: &TensorData, other: &TensorData) -> bool {
    let near = |one: f64, other: f64| {
        let scale = one.abs().max(other.abs()).max(1.0);
        one == other
            || (one.is_nan() && other.is_nan())
            || (one - other).abs() <= ROW_TOLERANCE * scale
    };
    match (one, other) {
        (TensorData::Fp32(one), TensorData::Fp32(other)) => one
            .iter()
            .zip(other)
            .all(|(one, other)| near(f64::from(*one), f64::from(*other))),
        (TensorData::Fp64(one), TensorData::Fp64(other)) => {
            one.iter().zip(other).all(|(one, other)| near(*one, *other))
        }
        (one, other) => one == other,
    }
}

#[cfg(test)]
mod tests;
