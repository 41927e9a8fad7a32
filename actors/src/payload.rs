//! Commands, questions and answers of the domain modules as bytes.

use mobula_core::codec;
use mobula_core::error::Rejection;
use serde::de::DeserializeOwned;

/// The command or question that `bytes` spell.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, Rejection> {
    codec::decode(bytes, limit).map_err(|error| Rejection::invalid(error.to_string()))
}
