//! The tensors of a file, each with the shape that the network wants of it.
//!
//! Invariants:
//! 1. A tensor that is used has been checked against the shape that follows from `config.json`.
//! 2. A tensor that no part of the network uses is refused, but for those of heads that are known to change no answer.

use std::cell::RefCell;
use std::collections::BTreeSet;

use candle_core::safetensors::SliceSafetensors;
use candle_core::{DType, Device};

use super::EncoderError;

/// What encoders are saved with and answer without: the heads of their training, and numbers that count from 0.
const UNUSED: [&str; 3] = ["cls.", "pooler.", "embeddings.position_ids"];

/// The encoder's own tensors are called so where the file has a head as well.
const PREFIX: &str = "bert.";

/// A file of tensors, and which of them have been asked for.
pub(super) struct Weights<'a> {
    file: SliceSafetensors<'a>,
    names: BTreeSet<String>,
    prefix: &'static str,
    used: RefCell<BTreeSet<String>>,
}

impl<'a> Weights<'a> {
    /// Reads the list of tensors, which has to cover the bytes exactly.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, EncoderError> {
        let file = SliceSafetensors::new(bytes)
            .map_err(|error| EncoderError::Malformed(error.to_string()))?;
        let names: BTreeSet<String> = file.tensors().into_iter().map(|(name, _)| name).collect();
        let is_prefixed = names.iter().any(|name| name.starts_with(PREFIX));
        Ok(Weights {
            file,
            names,
            prefix: if is_prefixed { PREFIX } else { "" },
            used: RefCell::default(),
        })
    }

    /// The values of a tensor of the encoder, row-major.
    pub(super) fn get(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EncoderError> {
        self.exact(&format!("{}{name}", self.prefix), shape)
    }

    /// The same for one that also has an older name.
    pub(super) fn get_either(
        &self,
        name: &str,
        older: &str,
        shape: &[usize],
    ) -> Result<Vec<f32>, EncoderError> {
        let is_older = self.names.contains(&format!("{}{older}", self.prefix));
        self.get(if is_older { older } else { name }, shape)
    }

    /// The same by the name in the file.
    pub(super) fn exact(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EncoderError> {
        let found = self.shape_of(name).ok_or_else(|| EncoderError::Missing {
            name: name.to_owned(),
        })?;
        let refused = |reason: String| EncoderError::Tensor {
            name: name.to_owned(),
            reason,
        };
        if found != shape {
            return Err(refused(format!(
                "has the shape {found:?}, config.json makes it {shape:?}"
            )));
        }
        let unreadable = |error: candle_core::Error| refused(format!("cannot be read: {error}"));
        let tensor = self.file.load(name, &Device::Cpu).map_err(unreadable)?;
        if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            let dtype = tensor.dtype();
            return Err(refused(format!(
                "is of {dtype:?}, weights are F32, F16 or BF16: save it as one of these"
            )));
        }
        self.used.borrow_mut().insert(name.to_owned());
        let values = || tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
        values().map_err(unreadable)
    }

    /// The shape of a tensor, by the name in the file.
    pub(super) fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        let tensor = self.file.get(name).ok()?;
        Some(tensor.shape().to_vec())
    }

    /// Refuses a file with a tensor that was not asked for: the network would be another one than was trained.
    pub(super) fn finish(self) -> Result<(), EncoderError> {
        let used = self.used.into_inner();
        let is_known = |name: &str| {
            let own = name.strip_prefix(self.prefix).unwrap_or(name);
            UNUSED.iter().any(|known| own.starts_with(known))
        };
        let mut others = self.names.iter().filter(|name| !used.contains(*name));
        match others.find(|name| !is_known(name)) {
            None => Ok(()),
            Some(name) => Err(EncoderError::Tensor {
                name: name.clone(),
                reason: "belongs to no part of the network that config.json describes: save the encoder, or the \
                         sequence classifier, without it"
                    .to_owned(),
            }),
        }
    }
}
