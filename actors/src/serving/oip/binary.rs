//! Tensor data as little-endian bytes (the binary tensor data extension).
//!
//! Numbers are their little-endian bytes, booleans a byte each, BYTES elements a 4-byte length and the bytes.

use super::error::DecodeError;
use super::tensor::{Datatype, Tensor, TensorData, element_count};

/// Reads a tensor's bytes; their number must be exactly what datatype and shape take.
pub(super) fn decode(
    tensor: &str,
    datatype: Datatype,
    shape: &[u64],
    bytes: &[u8],
) -> Result<TensorData, DecodeError> {
    let count = element_count(tensor, shape)?;
    if let Some(size) = datatype.size_bytes() {
        let expected =
            count
                .checked_mul(size as u64)
                .ok_or_else(|| DecodeError::ShapeTooLarge {
                    tensor: tensor.to_owned(),
                    shape: shape.to_vec(),
                })?;
        if expected != bytes.len() as u64 {
            return Err(DecodeError::BinarySize {
                tensor: tensor.to_owned(),
                datatype,
                shape: shape.to_vec(),
                expected,
                got: bytes.len() as u64,
            });
        }
    }
    Ok(match datatype {
        Datatype::Bool => TensorData::Bool(bytes.iter().map(|byte| *byte != 0).collect()),
        Datatype::Uint8 => TensorData::Uint8(bytes.to_vec()),
        Datatype::Int8 => TensorData::Int8(bytes.iter().map(|byte| byte.cast_signed()).collect()),
        Datatype::Uint16 => TensorData::Uint16(numbers(bytes, u16::from_le_bytes)),
        Datatype::Fp16 => TensorData::Fp16(numbers(bytes, u16::from_le_bytes)),
        Datatype::Bf16 => TensorData::Bf16(numbers(bytes, u16::from_le_bytes)),
        Datatype::Int16 => TensorData::Int16(numbers(bytes, i16::from_le_bytes)),
        Datatype::Uint32 => TensorData::Uint32(numbers(bytes, u32::from_le_bytes)),
        Datatype::Int32 => TensorData::Int32(numbers(bytes, i32::from_le_bytes)),
        Datatype::Fp32 => TensorData::Fp32(numbers(bytes, f32::from_le_bytes)),
        Datatype::Uint64 => TensorData::Uint64(numbers(bytes, u64::from_le_bytes)),
        Datatype::Int64 => TensorData::Int64(numbers(bytes, i64::from_le_bytes)),
        Datatype::Fp64 => TensorData::Fp64(numbers(bytes, f64::from_le_bytes)),
        Datatype::Bytes => TensorData::Bytes(byte_elements(tensor, shape, count, bytes)?),
    })
}

fn numbers<const SIZE: usize, T>(bytes: &[u8], from_le: impl Fn([u8; SIZE]) -> T) -> Vec<T> {
    let (chunks, _rest) = bytes.as_chunks::<SIZE>();
    chunks.iter().map(|chunk| from_le(*chunk)).collect()
}

fn byte_elements(
    tensor: &str,
    shape: &[u64],
    count: u64,
    mut bytes: &[u8],
) -> Result<Vec<Vec<u8>>, DecodeError> {
    let mut elements = Vec::new();
    while !bytes.is_empty() {
        let index = elements.len() as u64;
        let cut_off = |expected: u64, got: usize| DecodeError::BytesElement {
            tensor: tensor.to_owned(),
            index,
            expected,
            got: got as u64,
        };
        let Some((prefix, rest)) = bytes.split_first_chunk::<4>() else {
            return Err(cut_off(4, bytes.len()));
        };
        let length = u32::from_le_bytes(*prefix);
        let Some((element, rest)) = rest.split_at_checked(length as usize) else {
            return Err(cut_off(u64::from(length), rest.len()));
        };
        // An empty element costs 4 bytes on the wire and 24 in memory; stop as soon as there are too many.
        if index == count {
            return Err(DecodeError::ElementCount {
                tensor: tensor.to_owned(),
                shape: shape.to_vec(),
                expected: count,
                got: index + 1,
            });
        }
        elements.push(element.to_vec());
        bytes = rest;
    }
    Ok(elements)
}

/// The bytes [`encode`] appends.
pub(super) fn size_bytes(data: &TensorData) -> usize {
    match data {
        TensorData::Bytes(elements) => elements.iter().map(|element| 4 + element.len()).sum(),
        other => {
            let size = other
                .datatype()
                .size_bytes()
                .expect("all datatypes but BYTES have a size");
            other.len() * size
        }
    }
}

/// A tensor of little-endian bytes; their number must be exactly what datatype and shape take.
///
/// # Errors
/// [`DecodeError`] where they do not fit.
pub fn tensor_of_bytes(
    name: &str,
    datatype: Datatype,
    shape: Vec<u64>,
    bytes: &[u8],
) -> Result<Tensor, DecodeError> {
    let data = decode(name, datatype, &shape, bytes)?;
    Tensor::new(name, shape, data)
}

/// A tensor's elements as little-endian bytes.
#[must_use]
pub fn tensor_bytes(data: &TensorData) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(data, &mut bytes);
    bytes
}

/// Appends a tensor's bytes.
pub(super) fn encode(data: &TensorData, out: &mut Vec<u8>) {
    out.reserve(size_bytes(data));
    match data {
        TensorData::Bool(values) => out.extend(values.iter().map(|value| u8::from(*value))),
        TensorData::Uint8(values) => out.extend_from_slice(values),
        TensorData::Int8(values) => out.extend(values.iter().map(|value| value.cast_unsigned())),
        TensorData::Uint16(values) | TensorData::Fp16(values) | TensorData::Bf16(values) => {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        TensorData::Int16(values) => {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()))
        }
        TensorData::Uint32(values) => {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()))
        }
        TensorData::Int32(values) => {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()))
        }
        TensorData::Fp32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        TensorData::Uint64(values) => {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()))
        }
        TensorData::Int64(values) => {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()))
        }
        TensorData::Fp64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        TensorData::Bytes(elements) => {
            for element in elements {
                let length = u32::try_from(element.len())
                    .expect("an element is part of a body, which is bounded far below 4 GiB");
                out.extend(length.to_le_bytes());
                out.extend_from_slice(element);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_little_endian() {
        let data = decode("x", Datatype::Uint16, &[2], &[1, 0, 0, 1]).unwrap();
        assert_eq!(data, TensorData::Uint16(vec![1, 256]));
        let mut out = Vec::new();
        encode(&TensorData::Fp32(vec![1.0]), &mut out);
        assert_eq!(out, 1.0f32.to_le_bytes());
    }

    #[test]
    fn bytes_elements_carry_their_length() {
        let data = TensorData::Bytes(vec![b"ab".to_vec(), vec![], vec![0xff]]);
        let mut out = Vec::new();
        encode(&data, &mut out);
        assert_eq!(out, [2, 0, 0, 0, b'a', b'b', 0, 0, 0, 0, 1, 0, 0, 0, 0xff]);
        assert_eq!(size_bytes(&data), out.len());
        assert_eq!(decode("s", Datatype::Bytes, &[3], &out).unwrap(), data);
    }

    #[test]
    fn wrong_sizes_are_named() {
        for (datatype, shape, bytes, expected) in [
            (
                Datatype::Fp32,
                vec![1, 2],
                vec![0; 7],
                "tensor \"x\": FP32 of shape [1, 2] takes 8 bytes, binary_data_size is 7",
            ),
            (
                Datatype::Bytes,
                vec![1],
                vec![9, 0, 0, 0, 1],
                "tensor \"x\": BYTES element 0 claims 9 bytes, 1 are left",
            ),
            (
                Datatype::Bytes,
                vec![1],
                vec![9, 0],
                "tensor \"x\": BYTES element 0 claims 4 bytes, 2 are left",
            ),
            (
                Datatype::Bytes,
                vec![1],
                vec![0; 8],
                "tensor \"x\": shape [1] holds 1 elements, got 2",
            ),
            (
                Datatype::Fp64,
                vec![1 << 62],
                vec![],
                "tensor \"x\": shape [4611686018427387904] has more elements than can be counted",
            ),
        ] {
            let error = decode("x", datatype, &shape, &bytes).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}
