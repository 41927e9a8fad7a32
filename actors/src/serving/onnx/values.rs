//! Tensors of the protocol as tensors of the engine, and back.

use half::f16;
use tract_onnx::prelude::*;

use super::OnnxError;
use crate::serving::oip::{Datatype, TensorData};
use crate::serving::rows::Cell;

/// The protocol's type; none for what is not served.
pub(super) fn datatype_of(datum_type: DatumType) -> Option<Datatype> {
    Some(match datum_type {
        DatumType::Bool => Datatype::Bool,
        DatumType::U8 => Datatype::Uint8,
        DatumType::U16 => Datatype::Uint16,
        DatumType::U32 => Datatype::Uint32,
        DatumType::U64 => Datatype::Uint64,
        DatumType::I8 => Datatype::Int8,
        DatumType::I16 => Datatype::Int16,
        DatumType::I32 => Datatype::Int32,
        // The engine computes with shapes in a type of its own.
        DatumType::I64 | DatumType::TDim => Datatype::Int64,
        DatumType::F16 => Datatype::Fp16,
        DatumType::F32 => Datatype::Fp32,
        DatumType::F64 => Datatype::Fp64,
        _ => return None,
    })
}

/// An input for the engine.
pub(super) fn to_tensor(name: &str, cell: Cell) -> Result<Tensor, OnnxError> {
    let sizes: Result<Vec<usize>, _> = cell
        .shape
        .iter()
        .map(|size| usize::try_from(*size))
        .collect();
    let count = sizes.ok().and_then(|sizes| {
        let count = sizes
            .iter()
            .try_fold(1usize, |count, size| count.checked_mul(*size))?;
        (count == cell.data.len()).then_some(sizes)
    });
    let Some(shape) = count else {
        return Err(OnnxError::Run(format!(
            "the input {name:?} has {} elements and claims shape {:?}",
            cell.data.len(),
            cell.shape
        )));
    };
    let shape = shape.as_slice();
    let made = match &cell.data {
        TensorData::Bool(values) => Tensor::from_shape(shape, values),
        TensorData::Uint8(values) => Tensor::from_shape(shape, values),
        TensorData::Uint16(values) => Tensor::from_shape(shape, values),
        TensorData::Uint32(values) => Tensor::from_shape(shape, values),
        TensorData::Uint64(values) => Tensor::from_shape(shape, values),
        TensorData::Int8(values) => Tensor::from_shape(shape, values),
        TensorData::Int16(values) => Tensor::from_shape(shape, values),
        TensorData::Int32(values) => Tensor::from_shape(shape, values),
        TensorData::Int64(values) => Tensor::from_shape(shape, values),
        TensorData::Fp16(bits) => {
            let values: Vec<f16> = bits.iter().map(|bits| f16::from_bits(*bits)).collect();
            Tensor::from_shape(shape, &values)
        }
        TensorData::Fp32(values) => Tensor::from_shape(shape, values),
        TensorData::Fp64(values) => Tensor::from_shape(shape, values),
        TensorData::Bf16(_) | TensorData::Bytes(_) => {
            let datatype = cell.data.datatype();
            return Err(OnnxError::Run(format!("the input {name:?} is {datatype}")));
        }
    };
    made.map_err(|error| OnnxError::Run(super::causes(&error)))
}

/// An output of the engine, of the type that was promised.
pub(super) fn from_tensor(
    name: &str,
    datatype: Datatype,
    value: &Tensor,
) -> Result<Cell, OnnxError> {
    let failed = |error: TractError| OnnxError::Run(super::causes(&error));
    let found = datatype_of(value.datum_type());
    if found != Some(datatype) {
        return Err(OnnxError::Run(format!(
            "the output {name:?} is of {:?}, promised was {datatype}",
            value.datum_type()
        )));
    }
    let shape = value.shape().iter().map(|size| *size as u64).collect();
    let number = value.datum_type() == DatumType::TDim;
    let value = if number {
        value.cast_to::<i64>().map_err(failed)?
    } else {
        std::borrow::Cow::Borrowed(value)
    };
    let view = value.try_as_plain_ram().map_err(failed)?;
    let data = match datatype {
        Datatype::Bool => view.as_slice().map(|v| TensorData::Bool(v.to_vec())),
        Datatype::Uint8 => view.as_slice().map(|v| TensorData::Uint8(v.to_vec())),
        Datatype::Uint16 => view.as_slice().map(|v| TensorData::Uint16(v.to_vec())),
        Datatype::Uint32 => view.as_slice().map(|v| TensorData::Uint32(v.to_vec())),
        Datatype::Uint64 => view.as_slice().map(|v| TensorData::Uint64(v.to_vec())),
        Datatype::Int8 => view.as_slice().map(|v| TensorData::Int8(v.to_vec())),
        Datatype::Int16 => view.as_slice().map(|v| TensorData::Int16(v.to_vec())),
        Datatype::Int32 => view.as_slice().map(|v| TensorData::Int32(v.to_vec())),
        Datatype::Int64 => view.as_slice().map(|v| TensorData::Int64(v.to_vec())),
        Datatype::Fp16 => view
            .as_slice::<f16>()
            .map(|values| TensorData::Fp16(values.iter().map(|value| value.to_bits()).collect())),
        Datatype::Fp32 => view.as_slice().map(|v| TensorData::Fp32(v.to_vec())),
        Datatype::Fp64 => view.as_slice().map(|v| TensorData::Fp64(v.to_vec())),
        Datatype::Bf16 | Datatype::Bytes => {
            return Err(OnnxError::Run(format!("the output {name:?} is {datatype}")));
        }
    };
    Ok(Cell {
        shape,
        data: data.map_err(failed)?,
    })
}

/// Values to try a model with: whole numbers are 0 and 1, others lie between -1 and 1, and neighbours differ.
pub(super) fn sample(datatype: Datatype, count: usize) -> TensorData {
    // A Weyl sequence: evenly spread, the same at every try.
    let number = |index: usize| ((index as f32 + 1.0) * 0.618_034).fract() * 2.0 - 1.0;
    let numbers = (0..count).map(number);
    let is_one = (0..count).map(|index| number(index) > 0.0);
    match datatype {
        Datatype::Bool => TensorData::Bool(is_one.collect()),
        Datatype::Uint8 => TensorData::Uint8(is_one.map(u8::from).collect()),
        Datatype::Uint16 => TensorData::Uint16(is_one.map(u16::from).collect()),
        Datatype::Uint32 => TensorData::Uint32(is_one.map(u32::from).collect()),
        Datatype::Uint64 => TensorData::Uint64(is_one.map(u64::from).collect()),
        Datatype::Int8 => TensorData::Int8(is_one.map(i8::from).collect()),
        Datatype::Int16 => TensorData::Int16(is_one.map(i16::from).collect()),
        Datatype::Int32 => TensorData::Int32(is_one.map(i32::from).collect()),
        Datatype::Int64 => TensorData::Int64(is_one.map(i64::from).collect()),
        Datatype::Fp16 => TensorData::Fp16(
            numbers
                .map(|value| f16::from_f32(value).to_bits())
                .collect(),
        ),
        Datatype::Fp32 => TensorData::Fp32(numbers.collect()),
        Datatype::Fp64 => TensorData::Fp64(numbers.map(f64::from).collect()),
        Datatype::Bf16 => {
            let bits = numbers.map(|value| half::bf16::from_f32(value).to_bits());
            TensorData::Bf16(bits.collect())
        }
        Datatype::Bytes => TensorData::Bytes(vec![Vec::new(); count]),
    }
}
