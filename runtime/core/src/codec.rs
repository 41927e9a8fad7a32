//! The one place that knows how values become bytes: bincode 2, fixed settings, with a limit on
//! size before anything is allocated and no trailing bytes accepted.
//!
//! It lives in the lowest crate because replicated tables are encoded with it too, and those may
//! not import the wire. Nothing else names bincode, so that it can be replaced in this file.

use bincode::config::{Configuration, Fixint, LittleEndian, NoLimit};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why bytes are not the value that was expected.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// More bytes than the receiver accepts.
    #[error("value has {size_bytes} bytes, the limit here is {limit_bytes}")]
    TooLarge {
        /// Size of the input, in bytes.
        size_bytes: usize,
        /// The limit, in bytes.
        limit_bytes: usize,
    },
    /// The bytes do not spell a value of this type.
    #[error("bytes do not decode as {type_name}: {reason}")]
    Malformed {
        /// The Rust type that was expected.
        type_name: &'static str,
        /// What the decoder met.
        reason: String,
    },
    /// The value ends before the bytes do.
    #[error("{count} bytes follow a complete {type_name}")]
    TrailingBytes {
        /// The Rust type that was expected.
        type_name: &'static str,
        /// How many bytes are left over.
        count: usize,
    },
}

/// A value that cannot be encoded (a map whose length is not known, for example).
#[derive(Debug, thiserror::Error)]
#[error("value of type {type_name} cannot be encoded: {reason}")]
pub struct EncodeError {
    type_name: &'static str,
    reason: String,
}

fn configuration() -> Configuration<LittleEndian, Fixint, NoLimit> {
    bincode::config::standard()
        .with_fixed_int_encoding()
        .with_little_endian()
}

/// Encodes `value`.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, EncodeError> {
    bincode::serde::encode_to_vec(value, configuration()).map_err(|error| EncodeError {
        type_name: std::any::type_name::<T>(),
        reason: error.to_string(),
    })
}

/// Encodes a value whose type can always be encoded: plain structs, enums, numbers, strings,
/// vectors and maps, as all of our own messages and table rows are.
pub fn encode_plain<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    encode(value).expect("a type without unsized sequences always encodes")
}

/// Decodes all of `bytes`, which may be at most `limit_bytes` long.
///
/// A length prefix cannot make this allocate more than the input could hold: serde's containers
/// reserve cautiously and the input itself is bounded.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], limit_bytes: usize) -> Result<T, DecodeError> {
    if bytes.len() > limit_bytes {
        return Err(DecodeError::TooLarge {
            size_bytes: bytes.len(),
            limit_bytes,
        });
    }
    let type_name = std::any::type_name::<T>();
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, configuration()).map_err(|error| {
            DecodeError::Malformed {
                type_name,
                reason: error.to_string(),
            }
        })?;
    match bytes.len() - used {
        0 => Ok(value),
        count => Err(DecodeError::TrailingBytes { type_name, count }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_decode_to_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = decode::<(u64, Vec<String>, Option<Vec<u8>>)>(&bytes, 256);
        }

        #[test]
        fn values_survive_the_round_trip(value in any::<(u64, Vec<String>, Option<Vec<u8>>)>()) {
            let bytes = encode_plain(&value);
            prop_assert_eq!(decode::<(u64, Vec<String>, Option<Vec<u8>>)>(&bytes, bytes.len()).unwrap(), value);
        }
    }

    #[test]
    fn a_huge_length_prefix_is_an_error_and_not_an_allocation() {
        let bytes = u64::MAX.to_le_bytes();
        assert!(matches!(
            decode::<Vec<u64>>(&bytes, 64),
            Err(DecodeError::Malformed { .. })
        ));
    }

    #[test]
    fn limits_and_trailing_bytes_are_refused() {
        assert!(matches!(
            decode::<u8>(&[1, 2], 8),
            Err(DecodeError::TrailingBytes { count: 1, .. })
        ));
        assert!(matches!(
            decode::<u64>(&[0; 8], 4),
            Err(DecodeError::TooLarge { limit_bytes: 4, .. })
        ));
    }
}
