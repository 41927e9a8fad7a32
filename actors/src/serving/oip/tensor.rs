//! Element types, tensor data and named tensors.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::error::DecodeError;

/// The element types of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the protocol's own")]
pub enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Bf16,
    Fp32,
    Fp64,
    Bytes,
}

impl Datatype {
    /// Every type, in the order of the specification.
    pub const ALL: [Self; 14] = [
        Self::Bool,
        Self::Uint8,
        Self::Uint16,
        Self::Uint32,
        Self::Uint64,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Fp16,
        Self::Bf16,
        Self::Fp32,
        Self::Fp64,
        Self::Bytes,
    ];

    /// The name on the wire, for example `FP32`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Bf16 => "BF16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
        }
    }

    /// The name in a model configuration, for example `TYPE_FP32`; bytes are called strings there.
    #[must_use]
    pub fn config_name(self) -> String {
        match self {
            Self::Bytes => "TYPE_STRING".to_owned(),
            other => format!("TYPE_{}", other.name()),
        }
    }

    /// The type of a wire name, which is case-sensitive.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|datatype| datatype.name() == name)
    }

    /// Bytes an element; `None` for [`Self::Bytes`], whose elements differ in length.
    #[must_use]
    pub fn size_bytes(self) -> Option<usize> {
        match self {
            Self::Bool | Self::Uint8 | Self::Int8 => Some(1),
            Self::Uint16 | Self::Int16 | Self::Fp16 | Self::Bf16 => Some(2),
            Self::Uint32 | Self::Int32 | Self::Fp32 => Some(4),
            Self::Uint64 | Self::Int64 | Self::Fp64 => Some(8),
            Self::Bytes => None,
        }
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The elements of a tensor, row-major. The half precision types hold raw bits (see the `half` crate).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the variants are the datatypes")]
pub enum TensorData {
    Bool(Vec<bool>),
    Uint8(Vec<u8>),
    Uint16(Vec<u16>),
    Uint32(Vec<u32>),
    Uint64(Vec<u64>),
    Int8(Vec<i8>),
    Int16(Vec<i16>),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Fp16(Vec<u16>),
    Bf16(Vec<u16>),
    Fp32(Vec<f32>),
    Fp64(Vec<f64>),
    Bytes(Vec<Vec<u8>>),
}

/// Evaluates the expression with `$values` bound to the vector of whichever variant there is.
macro_rules! for_any_data {
    ($data:expr, $values:ident => $body:expr) => {
        match $data {
            TensorData::Bool($values) => $body,
            TensorData::Uint8($values) => $body,
            TensorData::Uint16($values) | TensorData::Fp16($values) | TensorData::Bf16($values) => {
                $body
            }
            TensorData::Uint32($values) => $body,
            TensorData::Uint64($values) => $body,
            TensorData::Int8($values) => $body,
            TensorData::Int16($values) => $body,
            TensorData::Int32($values) => $body,
            TensorData::Int64($values) => $body,
            TensorData::Fp32($values) => $body,
            TensorData::Fp64($values) => $body,
            TensorData::Bytes($values) => $body,
        }
    };
}

impl TensorData {
    /// The element type.
    #[must_use]
    pub fn datatype(&self) -> Datatype {
        match self {
            Self::Bool(_) => Datatype::Bool,
            Self::Uint8(_) => Datatype::Uint8,
            Self::Uint16(_) => Datatype::Uint16,
            Self::Uint32(_) => Datatype::Uint32,
            Self::Uint64(_) => Datatype::Uint64,
            Self::Int8(_) => Datatype::Int8,
            Self::Int16(_) => Datatype::Int16,
            Self::Int32(_) => Datatype::Int32,
            Self::Int64(_) => Datatype::Int64,
            Self::Fp16(_) => Datatype::Fp16,
            Self::Bf16(_) => Datatype::Bf16,
            Self::Fp32(_) => Datatype::Fp32,
            Self::Fp64(_) => Datatype::Fp64,
            Self::Bytes(_) => Datatype::Bytes,
        }
    }

    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        for_any_data!(self, values => values.len())
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the elements take in binary form, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        super::binary::size_bytes(self)
    }

    /// Appends elements of the same type; those of another are left out.
    pub fn append(&mut self, more: Self) {
        match (self, more) {
            (Self::Bool(values), Self::Bool(more)) => values.extend(more),
            (Self::Uint8(values), Self::Uint8(more)) => values.extend(more),
            (Self::Uint16(values), Self::Uint16(more))
            | (Self::Fp16(values), Self::Fp16(more))
            | (Self::Bf16(values), Self::Bf16(more)) => values.extend(more),
            (Self::Uint32(values), Self::Uint32(more)) => values.extend(more),
            (Self::Uint64(values), Self::Uint64(more)) => values.extend(more),
            (Self::Int8(values), Self::Int8(more)) => values.extend(more),
            (Self::Int16(values), Self::Int16(more)) => values.extend(more),
            (Self::Int32(values), Self::Int32(more)) => values.extend(more),
            (Self::Int64(values), Self::Int64(more)) => values.extend(more),
            (Self::Fp32(values), Self::Fp32(more)) => values.extend(more),
            (Self::Fp64(values), Self::Fp64(more)) => values.extend(more),
            (Self::Bytes(values), Self::Bytes(more)) => values.extend(more),
            (values, more) => debug_assert_eq!(values.datatype(), more.datatype()),
        }
    }

    /// The elements in `parts` pieces of equal length, which their number must be a multiple of.
    #[must_use]
    pub fn split(self, parts: usize) -> Vec<Self> {
        match self {
            Self::Bool(values) => pieces(values, parts, Self::Bool),
            Self::Uint8(values) => pieces(values, parts, Self::Uint8),
            Self::Uint16(values) => pieces(values, parts, Self::Uint16),
            Self::Uint32(values) => pieces(values, parts, Self::Uint32),
            Self::Uint64(values) => pieces(values, parts, Self::Uint64),
            Self::Int8(values) => pieces(values, parts, Self::Int8),
            Self::Int16(values) => pieces(values, parts, Self::Int16),
            Self::Int32(values) => pieces(values, parts, Self::Int32),
            Self::Int64(values) => pieces(values, parts, Self::Int64),
            Self::Fp16(values) => pieces(values, parts, Self::Fp16),
            Self::Bf16(values) => pieces(values, parts, Self::Bf16),
            Self::Fp32(values) => pieces(values, parts, Self::Fp32),
            Self::Fp64(values) => pieces(values, parts, Self::Fp64),
            Self::Bytes(values) => pieces(values, parts, Self::Bytes),
        }
    }
}

fn pieces<T>(values: Vec<T>, parts: usize, of: fn(Vec<T>) -> TensorData) -> Vec<TensorData> {
    if parts == 1 {
        return vec![of(values)];
    }
    let length = values.len() / parts.max(1);
    let mut values = values.into_iter();
    (0..parts)
        .map(|_| of(values.by_ref().take(length).collect()))
        .collect()
}

/// A named tensor whose data fits its shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    name: String,
    shape: Vec<u64>,
    data: TensorData,
}

impl Tensor {
    /// Joins a name, a shape (outermost dimension first) and its elements.
    ///
    /// # Errors
    /// [`DecodeError::ElementCount`] when the shape does not multiply to the number of elements.
    pub fn new(
        name: impl Into<String>,
        shape: Vec<u64>,
        data: TensorData,
    ) -> Result<Self, DecodeError> {
        let name = name.into();
        let expected = element_count(&name, &shape)?;
        if expected != data.len() as u64 {
            let got = data.len() as u64;
            return Err(DecodeError::ElementCount {
                tensor: name,
                shape,
                expected,
                got,
            });
        }
        Ok(Self { name, shape, data })
    }

    /// The tensor's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The dimensions, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The element type.
    #[must_use]
    pub fn datatype(&self) -> Datatype {
        self.data.datatype()
    }

    /// The elements, row-major.
    #[must_use]
    pub fn data(&self) -> &TensorData {
        &self.data
    }

    /// Gives the elements away.
    #[must_use]
    pub fn into_data(self) -> TensorData {
        self.data
    }
}

/// Elements of a shape; the empty shape is a scalar.
pub(super) fn element_count(tensor: &str, shape: &[u64]) -> Result<u64, DecodeError> {
    let too_large = || DecodeError::ShapeTooLarge {
        tensor: tensor.to_owned(),
        shape: shape.to_vec(),
    };
    // A zero dimension must not hide that the others overflow, hence no early return.
    shape
        .iter()
        .try_fold(1u64, |count, dimension| count.checked_mul(*dimension))
        .ok_or_else(too_large)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_a_bijection() {
        for datatype in Datatype::ALL {
            assert_eq!(Datatype::from_name(datatype.name()), Some(datatype));
        }
        assert_eq!(Datatype::from_name("fp32"), None);
        assert_eq!(Datatype::Bytes.config_name(), "TYPE_STRING");
        assert_eq!(Datatype::Uint16.config_name(), "TYPE_UINT16");
    }

    #[test]
    fn a_tensor_fits_its_shape() {
        let tensor = Tensor::new("x", vec![2, 3], TensorData::Fp32(vec![0.0; 6])).unwrap();
        assert_eq!(
            (tensor.datatype(), tensor.data().len()),
            (Datatype::Fp32, 6)
        );
        assert!(Tensor::new("x", vec![], TensorData::Int8(vec![1])).is_ok());
        let error = Tensor::new("x", vec![2, 3], TensorData::Fp32(vec![0.0; 5])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor \"x\": shape [2, 3] holds 6 elements, got 5"
        );
        let error = Tensor::new("x", vec![u64::MAX, 3], TensorData::Fp32(vec![])).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("more elements than can be counted"),
            "{error}"
        );
    }
}
