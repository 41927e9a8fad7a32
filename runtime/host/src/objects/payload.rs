//! Bytes of a value, and how to read them.

use bytes::Bytes;
use mobula_core::codec::{self, EncodeError};
use mobula_wire::object::Format;
use serde::Serialize;

/// A value's bytes in this process's memory. Clones share them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// How to read them.
    pub format: Format,
    /// The bytes.
    pub bytes: Bytes,
}

impl Payload {
    /// The encoded form of `value`.
    pub fn encoded<T: Serialize + ?Sized>(value: &T) -> Result<Self, EncodeError> {
        Ok(Payload {
            format: Format::Encoded,
            bytes: codec::encode(value)?.into(),
        })
    }
}
