//! Tensor data as JSON: flat or nested arrays of numbers, booleans or strings.
//!
//! The datatype may come after the data, so data is first collected into the narrowest of a few flat lists (at most four
//! times its JSON size, as a number takes two characters and eight bytes; an integer above `i64` widens to sixteen) and
//! converted when the datatype is known. Nesting is not compared with the shape, only the number of elements is: clients
//! send either form. A FP64 of many digits read from JSON may be off by one unit in the last place (serde_json's fast
//! parser, which is as exact as Triton's); binary data is exact.

use half::{bf16, f16};
use serde::de::{DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{SerializeSeq, Serializer};
use serde::{Deserialize, Serialize};

use super::error::{DecodeError, EncodeError};
use super::tensor::{Datatype, Tensor, TensorData};

/// Elements of a JSON array, flattened, before the datatype is known.
#[derive(Debug, PartialEq)]
pub(super) enum FlatData {
    Empty,
    Bools(Vec<bool>),
    Ints(Vec<i64>),
    WideInts(Vec<i128>),
    Floats(Vec<f64>),
    Strings(Vec<String>),
}

impl FlatData {
    fn kind(&self) -> &'static str {
        match self {
            Self::Empty => "nothing",
            Self::Bools(_) => "booleans",
            Self::Ints(_) | Self::WideInts(_) | Self::Floats(_) => "numbers",
            Self::Strings(_) => "strings",
        }
    }

    fn push_bool(&mut self, value: bool) -> Result<(), String> {
        match self {
            Self::Bools(values) => values.push(value),
            Self::Empty => *self = Self::Bools(vec![value]),
            other => return Err(format!("{value} among {}", other.kind())),
        }
        Ok(())
    }

    fn push_int(&mut self, value: i128) -> Result<(), String> {
        if let Self::Empty = self {
            *self = Self::Ints(Vec::new());
        }
        match (&mut *self, i64::try_from(value)) {
            (Self::Ints(values), Ok(narrow)) => values.push(narrow),
            (Self::Ints(values), Err(_)) => {
                let widened = values
                    .iter()
                    .copied()
                    .map(i128::from)
                    .chain([value])
                    .collect();
                *self = Self::WideInts(widened);
            }
            (Self::WideInts(values), _) => values.push(value),
            (Self::Floats(values), _) => values.push(value as f64),
            (other, _) => return Err(format!("{value} among {}", other.kind())),
        }
        Ok(())
    }

    fn push_float(&mut self, value: f64) -> Result<(), String> {
        match self {
            Self::Floats(values) => values.push(value),
            Self::Empty => *self = Self::Floats(vec![value]),
            Self::Ints(values) => {
                *self = Self::Floats(
                    values
                        .iter()
                        .map(|int| *int as f64)
                        .chain([value])
                        .collect(),
                );
            }
            Self::WideInts(values) => {
                *self = Self::Floats(
                    values
                        .iter()
                        .map(|int| *int as f64)
                        .chain([value])
                        .collect(),
                );
            }
            other => return Err(format!("{value} among {}", other.kind())),
        }
        Ok(())
    }

    fn push_string(&mut self, value: String) -> Result<(), String> {
        match self {
            Self::Strings(values) => values.push(value),
            Self::Empty => *self = Self::Strings(vec![value]),
            other => return Err(format!("{value:?} among {}", other.kind())),
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for FlatData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut data = Self::Empty;
        // The outermost value must be an array; inside, arrays and scalars may nest (serde_json stops at depth 128).
        deserializer.deserialize_seq(FlatVisitor {
            data: &mut data,
            is_outermost: true,
        })?;
        Ok(data)
    }
}

struct FlatVisitor<'a> {
    data: &'a mut FlatData,
    is_outermost: bool,
}

impl<'de> DeserializeSeed<'de> for FlatVisitor<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FlatVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_outermost {
            "an array of tensor elements"
        } else {
            "a number, boolean, string or array of them"
        })
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.data.push_bool(value).map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.data.push_int(value.into()).map_err(E::custom)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.data.push_int(value.into()).map_err(E::custom)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.data.push_float(value).map_err(E::custom)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        self.data.push_string(value.to_owned()).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        let Self { data, .. } = self;
        while sequence
            .next_element_seed(FlatVisitor {
                data: &mut *data,
                is_outermost: false,
            })?
            .is_some()
        {}
        Ok(())
    }
}

/// Gives collected elements their datatype. Their number is compared with the shape by [`Tensor::new`].
pub(super) fn to_tensor_data(
    tensor: &str,
    datatype: Datatype,
    flat: FlatData,
) -> Result<TensorData, DecodeError> {
    let context = Context { tensor, datatype };
    Ok(match datatype {
        Datatype::Bf16 => {
            return Err(DecodeError::BinaryOnly {
                tensor: tensor.to_owned(),
                datatype,
            });
        }
        Datatype::Bool => match flat {
            FlatData::Bools(values) => TensorData::Bool(values),
            FlatData::Empty => TensorData::Bool(Vec::new()),
            other => return Err(context.wrong_element(0, &other)),
        },
        Datatype::Bytes => match flat {
            FlatData::Strings(values) => {
                TensorData::Bytes(values.into_iter().map(String::into_bytes).collect())
            }
            FlatData::Empty => TensorData::Bytes(Vec::new()),
            other => return Err(context.wrong_element(0, &other)),
        },
        Datatype::Uint8 => TensorData::Uint8(context.integers(flat)?),
        Datatype::Uint16 => TensorData::Uint16(context.integers(flat)?),
        Datatype::Uint32 => TensorData::Uint32(context.integers(flat)?),
        Datatype::Uint64 => TensorData::Uint64(context.integers(flat)?),
        Datatype::Int8 => TensorData::Int8(context.integers(flat)?),
        Datatype::Int16 => TensorData::Int16(context.integers(flat)?),
        Datatype::Int32 => TensorData::Int32(context.integers(flat)?),
        Datatype::Int64 => TensorData::Int64(context.integers(flat)?),
        Datatype::Fp16 => TensorData::Fp16(context.floats(flat, |value| {
            let rounded = f16::from_f64(value);
            rounded.is_finite().then(|| rounded.to_bits())
        })?),
        Datatype::Fp32 => TensorData::Fp32(context.floats(flat, |value| {
            Some(value as f32).filter(|value| value.is_finite())
        })?),
        Datatype::Fp64 => TensorData::Fp64(context.floats(flat, Some)?),
    })
}

struct Context<'a> {
    tensor: &'a str,
    datatype: Datatype,
}

impl Context<'_> {
    fn element(&self, index: usize, got: impl ToString) -> DecodeError {
        DecodeError::Element {
            tensor: self.tensor.to_owned(),
            index: index as u64,
            got: got.to_string(),
            datatype: self.datatype,
        }
    }

    fn wrong_element(&self, index: usize, flat: &FlatData) -> DecodeError {
        match flat {
            FlatData::Empty => self.element(index, "absent"),
            FlatData::Bools(values) => self.element(index, values[index]),
            FlatData::Ints(values) => self.element(index, values[index]),
            FlatData::WideInts(values) => self.element(index, values[index]),
            FlatData::Floats(values) => self.element(index, values[index]),
            FlatData::Strings(values) => self.element(index, format!("{:?}", values[index])),
        }
    }

    fn integers<T: TryFrom<i64> + TryFrom<i128>>(
        &self,
        flat: FlatData,
    ) -> Result<Vec<T>, DecodeError> {
        fn narrow<S: Copy, T: TryFrom<S>>(values: &[S]) -> Result<Vec<T>, usize> {
            let mut out = Vec::with_capacity(values.len());
            for (index, value) in values.iter().enumerate() {
                out.push(T::try_from(*value).map_err(|_| index)?);
            }
            Ok(out)
        }
        match &flat {
            FlatData::Empty => Ok(Vec::new()),
            FlatData::Ints(values) => narrow(values),
            FlatData::WideInts(values) => narrow(values),
            FlatData::Floats(values) => Err(values
                .iter()
                .position(|value| value.fract() != 0.0)
                .unwrap_or(0)),
            FlatData::Bools(_) | FlatData::Strings(_) => Err(0),
        }
        .map_err(|index| self.wrong_element(index, &flat))
    }

    fn floats<T>(
        &self,
        flat: FlatData,
        convert: impl Fn(f64) -> Option<T>,
    ) -> Result<Vec<T>, DecodeError> {
        let values = match flat {
            FlatData::Empty => Vec::new(),
            FlatData::Ints(values) => values.into_iter().map(|value| value as f64).collect(),
            FlatData::WideInts(values) => values.into_iter().map(|value| value as f64).collect(),
            FlatData::Floats(values) => values,
            other => return Err(self.wrong_element(0, &other)),
        };
        let mut out = Vec::with_capacity(values.len());
        for (index, value) in values.into_iter().enumerate() {
            // With an exponent, as a float may have hundreds of digits.
            out.push(convert(value).ok_or_else(|| self.element(index, format!("{value:e}")))?);
        }
        Ok(out)
    }
}

/// Says why a tensor has no JSON form, if it has none.
pub(super) fn check_encodable(tensor: &Tensor) -> Result<(), EncodeError> {
    let name = || tensor.name().to_owned();
    let not_finite = |index: usize, got: f64| EncodeError::NotFinite {
        tensor: name(),
        index: index as u64,
        got: got.to_string(),
    };
    let first_not_finite = |mut values: Box<dyn Iterator<Item = f64> + '_>| {
        values
            .by_ref()
            .enumerate()
            .find(|(_, value)| !value.is_finite())
    };
    let bad = match tensor.data() {
        TensorData::Bf16(_) => {
            return Err(EncodeError::BinaryOnly {
                tensor: name(),
                datatype: Datatype::Bf16,
            });
        }
        TensorData::Bytes(elements) => {
            let bad = elements
                .iter()
                .position(|element| std::str::from_utf8(element).is_err());
            return match bad {
                Some(index) => Err(EncodeError::NotUtf8 {
                    tensor: name(),
                    index: index as u64,
                }),
                None => Ok(()),
            };
        }
        TensorData::Fp16(bits) => first_not_finite(Box::new(
            bits.iter().map(|bits| f16::from_bits(*bits).to_f64()),
        )),
        TensorData::Fp32(values) => {
            first_not_finite(Box::new(values.iter().map(|value| f64::from(*value))))
        }
        TensorData::Fp64(values) => first_not_finite(Box::new(values.iter().copied())),
        _ => None,
    };
    bad.map_or(Ok(()), |(index, got)| Err(not_finite(index, got)))
}

/// Tensor data as a flat JSON array; the data must have passed [`check_encodable`].
pub(super) struct JsonData<'a>(pub(super) &'a TensorData);

impl Serialize for JsonData<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            TensorData::Bool(values) => values.serialize(serializer),
            TensorData::Uint8(values) => values.serialize(serializer),
            TensorData::Uint16(values) => values.serialize(serializer),
            TensorData::Uint32(values) => values.serialize(serializer),
            TensorData::Uint64(values) => values.serialize(serializer),
            TensorData::Int8(values) => values.serialize(serializer),
            TensorData::Int16(values) => values.serialize(serializer),
            TensorData::Int32(values) => values.serialize(serializer),
            TensorData::Int64(values) => values.serialize(serializer),
            TensorData::Fp32(values) => values.serialize(serializer),
            TensorData::Fp64(values) => values.serialize(serializer),
            TensorData::Fp16(bits) => {
                serializer.collect_seq(bits.iter().map(|bits| f16::from_bits(*bits).to_f32()))
            }
            TensorData::Bf16(bits) => {
                serializer.collect_seq(bits.iter().map(|bits| bf16::from_bits(*bits).to_f32()))
            }
            TensorData::Bytes(elements) => {
                let mut sequence = serializer.serialize_seq(Some(elements.len()))?;
                for element in elements {
                    let text = std::str::from_utf8(element).map_err(serde::ser::Error::custom)?;
                    sequence.serialize_element(text)?;
                }
                sequence.end()
            }
        }
    }
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
