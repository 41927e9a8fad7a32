//! Values as the bytes that are hashed, stored and sent: `f32`, little-endian, one after the other.
//!
//! Where that is how they lie in memory already, nothing is copied.

use std::borrow::Cow;

/// The bytes of `values`.
#[must_use]
pub fn bytes_of(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(values))
    } else {
        Cow::Owned(
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        )
    }
}

/// The values that `bytes` are; what is left over behind the last whole value is dropped.
#[must_use]
pub fn values_of(bytes: &[u8]) -> Vec<f32> {
    let (whole, _) = bytes.as_chunks::<4>();
    let mut values = vec![0.0; whole.len()];
    if cfg!(target_endian = "little") {
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(whole.as_flattened());
    } else {
        for (value, bytes) in values.iter_mut().zip(whole) {
            *value = f32::from_le_bytes(*bytes);
        }
    }
    values
}

/// For `#[serde(with = "...")]`: values as one run of bytes, which costs a copy and not a call for each.
pub mod packed {
    use std::fmt;

    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;

    use super::{bytes_of, values_of};

    /// Writes the values' bytes.
    pub fn serialize<S: Serializer>(values: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&bytes_of(values))
    }

    /// Reads what [`serialize`] wrote.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f32>, D::Error> {
        deserializer.deserialize_bytes(Values)
    }

    struct Values;

    impl Visitor<'_> for Values {
        type Value = Vec<f32>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the bytes of f32 values")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<f32>, E> {
            if bytes.len().is_multiple_of(4) {
                Ok(values_of(bytes))
            } else {
                Err(E::invalid_length(bytes.len(), &"a multiple of 4"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mobula_core::codec;
    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Sums(#[serde(with = "packed")] Vec<f32>);

    #[derive(Debug, Serialize, Deserialize)]
    struct Torn(Vec<u8>);

    #[test]
    fn bytes_are_little_endian_and_a_torn_value_is_refused() {
        assert_eq!(&*bytes_of(&[1.0, -2.0]), [0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
        assert_eq!(values_of(&[0, 0, 0x80, 0x3f, 0, 0]), [1.0]);
        let torn = codec::encode_plain(&Torn(vec![0; 7]));
        let error = codec::decode::<Sums>(&torn, 100).unwrap_err();
        assert!(error.to_string().contains("multiple of 4"), "{error}");
    }

    proptest! {
        #[test]
        fn every_bit_of_any_value_comes_back(bits in prop::collection::vec(any::<u32>(), 0..70)) {
            let values: Vec<f32> = bits.iter().map(|bits| f32::from_bits(*bits)).collect();
            let packed = codec::encode_plain(&Sums(values.clone()));
            prop_assert!(packed.len() <= 4 * values.len() + 9);
            let back: Sums = codec::decode(&packed, packed.len()).unwrap();
            let bits_of = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits_of(&back.0), bits);
            prop_assert_eq!(bits_of(&values_of(&bytes_of(&values))), bits_of(&values));
        }
    }
}
