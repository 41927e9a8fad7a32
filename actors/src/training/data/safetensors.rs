//! Safetensors files: arrays by name.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::array::{Kind, Place};
use super::error::DataError;
use super::npy::checked;

/// Bytes of a header's length.
const LENGTH_BYTES: u64 = 8;
/// Bytes of a header that is read, at most: it names each array once.
const HEADER_BYTES_MAX: u64 = 1 << 20;

/// Arrays in `.safetensors` files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SafetensorsSpec {
    /// The files, in order: paths, or `store:` and the path of a blob.
    pub files: Vec<String>,
    /// The name of the array with the numbers, `[samples, …]`.
    pub features: String,
    /// The name of the array with the classes, `[samples]`.
    #[serde(default)]
    pub labels: Option<String>,
    /// Instead of classes: the name of the array with the numbers to predict.
    #[serde(default)]
    pub targets: Option<String>,
    /// How many classes there are; absent: one more than the largest label.
    #[serde(default)]
    pub classes: Option<usize>,
    /// The numbers of a sample are divided by this; absent: 1.
    #[serde(default)]
    pub scale: Option<f64>,
}

/// How many bytes the header of a file takes that begins with these, its length included.
pub(super) fn header_bytes(file: &str, start: &[u8]) -> Result<u64, DataError> {
    let length = start
        .first_chunk::<8>()
        .map(|bytes| u64::from_le_bytes(*bytes))
        .filter(|length| *length <= HEADER_BYTES_MAX);
    match length {
        Some(length) => Ok(length + LENGTH_BYTES),
        None => Err(DataError::Misfit {
            file: file.to_owned(),
            reason: "it does not begin like a safetensors file".to_owned(),
        }),
    }
}

/// What a header says of one array.
#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    /// From where to where, counted from the end of the header.
    data_offsets: (u64, u64),
}

/// Where the array `name` lies in a file of `size_bytes` that begins with `header`.
pub(super) fn place(
    file: &str,
    header: &[u8],
    size_bytes: u64,
    name: &str,
) -> Result<Place, DataError> {
    let misfit = |reason: String| DataError::Misfit {
        file: file.to_owned(),
        reason,
    };
    let text = header.get(LENGTH_BYTES as usize..).unwrap_or_default();
    let arrays: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|error| misfit(format!("its header cannot be read: {error}")))?;
    let Some(info) = arrays.get(name) else {
        let mut names: Vec<&str> = arrays.keys().map(String::as_str).collect();
        names.retain(|name| *name != "__metadata__");
        names.sort_unstable();
        return Err(misfit(format!(
            "it has no array {name:?}, but {}",
            names.join(", ")
        )));
    };
    let info: Info = serde_json::from_value(info.clone()).map_err(|error| {
        misfit(format!(
            "its header says of {name:?} what is not so: {error}"
        ))
    })?;
    let kind = match info.dtype.as_str() {
        "F32" => Kind::F32,
        "F64" => Kind::F64,
        "I8" => Kind::I8,
        "U8" | "BOOL" => Kind::U8,
        "I16" => Kind::I16,
        "U16" => Kind::U16,
        "I32" => Kind::I32,
        "U32" => Kind::U32,
        "I64" => Kind::I64,
        "U64" => Kind::U64,
        other => {
            return Err(misfit(format!(
                "its array {name:?} holds numbers of the kind {other}; convert them to F32 or to \
                 whole numbers"
            )));
        }
    };
    let (start, end) = info.data_offsets;
    let place = Place {
        kind,
        shape: info.shape,
        offset: start.saturating_add(header.len() as u64),
    };
    if end.checked_sub(start) != place.size_bytes() {
        return Err(misfit(format!(
            "its array {name:?} of {:?} takes other than its {start} to {end} bytes; the file is \
             damaged, copy it again",
            place.shape
        )));
    }
    checked(file, place, size_bytes)
}
