//! NumPy's `.npy` files: a header in Python's notation, then one array.

use serde::{Deserialize, Serialize};

use super::array::{Kind, Place};
use super::error::DataError;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Bytes of a header, at most: NumPy writes less than a hundred.
pub(super) const HEADER_BYTES_MAX: usize = 64 << 10;

/// Arrays in `.npy` files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NpySpec {
    /// The files with the numbers, `[samples, …]` each, in order.
    pub features: Vec<String>,
    /// The files with the classes, `[samples]` each, in the same order.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Instead of classes: the files with the numbers to predict, `[samples]` or `[samples, targets]`.
    #[serde(default)]
    pub targets: Vec<String>,
    /// How many classes there are; absent: one more than the largest label.
    #[serde(default)]
    pub classes: Option<usize>,
    /// The numbers of a sample are divided by this; absent: 1.
    #[serde(default)]
    pub scale: Option<f64>,
}

/// Where the array lies in a file of `size_bytes` that begins with `start`.
pub(super) fn place(file: &str, start: &[u8], size_bytes: u64) -> Result<Place, DataError> {
    let misfit = |reason: String| DataError::Misfit {
        file: file.to_owned(),
        reason,
    };
    let not_npy =
        || misfit("it does not begin like a .npy file; save it with numpy.save".to_owned());
    if !start.starts_with(MAGIC) {
        return Err(not_npy());
    }
    let version = *start.get(6).ok_or_else(not_npy)?;
    let (from, length) = match version {
        1 => {
            let bytes = start.get(8..10).ok_or_else(not_npy)?;
            (10, usize::from(u16::from_le_bytes([bytes[0], bytes[1]])))
        }
        _ => {
            let bytes = start.get(8..12).ok_or_else(not_npy)?;
            let length = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            (12, length as usize)
        }
    };
    let header = start
        .get(from..from + length.min(HEADER_BYTES_MAX + 1))
        .filter(|_| length <= HEADER_BYTES_MAX)
        .and_then(|header| std::str::from_utf8(header).ok())
        .ok_or_else(not_npy)?;
    let value = |key: &str| {
        let after = header.split_once(&format!("'{key}':"))?.1.trim_start();
        Some(after)
    };
    let descr = value("descr")
        .and_then(|text| text.strip_prefix('\''))
        .and_then(|text| text.split_once('\''))
        .map(|(descr, _)| descr)
        .ok_or_else(|| misfit("its header names no single kind of numbers".to_owned()))?;
    let kind = kind(descr).ok_or_else(|| {
        misfit(format!(
            "it holds numbers of the kind {descr}; convert it with .astype('<f4') or to whole numbers"
        ))
    })?;
    if !value("fortran_order").is_some_and(|text| text.starts_with("False")) {
        return Err(misfit(
            "its columns lie before its rows; save numpy.ascontiguousarray of it".to_owned(),
        ));
    }
    let shape: Vec<usize> = value("shape")
        .and_then(|text| text.strip_prefix('('))
        .and_then(|text| text.split_once(')'))
        .and_then(|(inside, _)| {
            let sides = inside
                .split(',')
                .map(str::trim)
                .filter(|side| !side.is_empty());
            sides.map(|side| side.parse().ok()).collect()
        })
        .ok_or_else(|| misfit("its header has no shape".to_owned()))?;
    let place = Place {
        kind,
        shape,
        offset: (from + length) as u64,
    };
    checked(file, place, size_bytes)
}

/// A place that lies within its file.
pub(super) fn checked(file: &str, place: Place, size_bytes: u64) -> Result<Place, DataError> {
    let end = place
        .size_bytes()
        .and_then(|bytes| bytes.checked_add(place.offset));
    match end {
        Some(end) if end <= size_bytes => Ok(place),
        _ => Err(DataError::Misfit {
            file: file.to_owned(),
            reason: format!(
                "an array of {:?} does not fit into its {size_bytes} bytes; it is cut short, copy \
                 the file again",
                place.shape
            ),
        }),
    }
}

fn kind(descr: &str) -> Option<Kind> {
    Some(match descr {
        "<f4" => Kind::F32,
        "<f8" => Kind::F64,
        "|i1" => Kind::I8,
        "|u1" | "|b1" => Kind::U8,
        "<i2" => Kind::I16,
        "<u2" => Kind::U16,
        "<i4" => Kind::I32,
        "<u4" => Kind::U32,
        "<i8" => Kind::I64,
        "<u8" => Kind::U64,
        _ => return None,
    })
}

/// A `.npy` file's bytes, for tests.
#[cfg(test)]
pub(super) fn written(descr: &str, shape: &str, body: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend([1, 0]);
    bytes.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_says_where_what_lies() {
        let body = [0u8; 24];
        let bytes = written("<f4", "(2, 3)", &body);
        let found = place("a.npy", &bytes, bytes.len() as u64).unwrap();
        let expected = Place {
            kind: Kind::F32,
            shape: vec![2, 3],
            offset: (bytes.len() - 24) as u64,
        };
        assert_eq!(found, expected);
        let labels = written("<i8", "(3,)", &body);
        let found = place("a.npy", &labels, labels.len() as u64).unwrap();
        assert_eq!((found.rows(), found.width()), (3, Some(1)));
    }

    #[test]
    fn other_files_are_refused_with_what_to_do() {
        let good = written("<f4", "(2, 3)", &[0; 24]);
        let size = good.len() as u64;
        let error = |bytes: &[u8], size| place("a.npy", bytes, size).unwrap_err().to_string();
        assert!(error(&good, size - 1).contains("cut short"));
        assert!(error(b"PK\x03\x04", 4).contains("numpy.save"));
        assert!(error(&good[..9], 9).contains("numpy.save"));
        let complex = written("<c8", "(2, 3)", &[0; 48]);
        assert!(error(&complex, 1000).contains("kind <c8"));
        let huge = written("<f8", "(4611686018427387904, 8)", &[]);
        assert!(error(&huge, 1000).contains("cut short"));
        let text = String::from_utf8_lossy(&good).replace("False", "True ");
        let columns = text.into_bytes();
        // The magic's first byte is not UTF-8, so it is put back.
        let columns = [&[0x93][..], &columns[3..]].concat();
        assert!(error(&columns, size).contains("ascontiguousarray"));
    }
}
