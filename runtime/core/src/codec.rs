//! The one place that knows how values become bytes: bincode 2, fixed settings, with a limit on
//! size before anything is allocated and no trailing bytes accepted.
//!
//! It lives in the lowest crate because replicated tables are encoded with it too, and those may
//! not import the wire. Nothing else names bincode, so that it can be replaced in this file.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian, NoLimit};
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

/// The largest value that is decoded, whatever the caller's limit: far above what one value should
/// be, and below what a wrong length may make a process reserve.
pub const VALUE_BYTES_MAX: usize = 16 << 30;

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
/// A length prefix inside cannot make this allocate much more than the input itself: bincode
/// claims what a prefix promises from a budget, which is the smallest of some that holds the input:
/// 16 times its size at the most, above 256 MiB four times. (The budget is a type parameter there,
/// hence steps instead of the exact size.)
pub fn decode<T: DeserializeOwned>(bytes: &[u8], limit_bytes: usize) -> Result<T, DecodeError> {
    if bytes.len() > limit_bytes {
        return Err(DecodeError::TooLarge {
            size_bytes: bytes.len(),
            limit_bytes,
        });
    }
    const MIB: usize = 1 << 20;
    const GIB: usize = 1 << 30;
    match bytes.len() {
        size_bytes if size_bytes <= MIB => decode_within::<T, MIB>(bytes),
        size_bytes if size_bytes <= 16 * MIB => decode_within::<T, { 16 * MIB }>(bytes),
        size_bytes if size_bytes <= 256 * MIB => decode_within::<T, { 256 * MIB }>(bytes),
        size_bytes if size_bytes <= GIB => decode_within::<T, GIB>(bytes),
        size_bytes if size_bytes <= 4 * GIB => decode_within::<T, { 4 * GIB }>(bytes),
        size_bytes if size_bytes <= VALUE_BYTES_MAX => decode_within::<T, VALUE_BYTES_MAX>(bytes),
        size_bytes => Err(DecodeError::TooLarge {
            size_bytes,
            limit_bytes: VALUE_BYTES_MAX,
        }),
    }
}

fn decode_within<T: DeserializeOwned, const BUDGET_BYTES: usize>(
    bytes: &[u8],
) -> Result<T, DecodeError> {
    let type_name = std::any::type_name::<T>();
    let budgeted: Configuration<LittleEndian, Fixint, Limit<BUDGET_BYTES>> =
        configuration().with_limit::<BUDGET_BYTES>();
    let (value, used) = bincode::serde::decode_from_slice(bytes, budgeted).map_err(|error| {
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
    fn a_huge_text_length_is_an_error_too() {
        // Found by the property above: the allocation that this asked for aborted the process.
        let mut bytes = (1_u64 << 45).to_le_bytes().to_vec();
        bytes.extend(b"abc");
        let text = decode::<String>(&bytes, 64);
        assert!(
            matches!(text, Err(DecodeError::Malformed { .. })),
            "{text:?}"
        );
        let blob = decode::<Option<Vec<u8>>>(&[&[1], bytes.as_slice()].concat(), 64);
        assert!(
            matches!(blob, Err(DecodeError::Malformed { .. })),
            "{blob:?}"
        );
    }

    #[test]
    fn more_than_256_mib_come_back_and_a_wrong_length_among_them_does_not() {
        let text = "x".repeat((256 << 20) + 1);
        let mut bytes = encode_plain(&text);
        assert!(decode::<String>(&bytes, bytes.len()).unwrap() == text);
        drop(text);
        // Within the budget of so long an input, and beyond it.
        for length in [900_u64 << 20, 1 << 40] {
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            let wrong = decode::<String>(&bytes, bytes.len()).map(|text| text.len());
            assert!(
                matches!(wrong, Err(DecodeError::Malformed { .. })),
                "{wrong:?}"
            );
        }
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
