//! Arrays of numbers as files hold them: little-endian, the last dimension nearest.
//!
//! Invariant: an array is looked through once when it is opened, so what is read later is finite and
//! there.

use super::error::DataError;
use super::opened::Bytes;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F64,
    I8,
    U8,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
}

impl Kind {
    /// Bytes of a number.
    pub(super) fn size(self) -> usize {
        match self {
            Kind::I8 | Kind::U8 => 1,
            Kind::I16 | Kind::U16 => 2,
            Kind::F32 | Kind::I32 | Kind::U32 => 4,
            Kind::F64 | Kind::I64 | Kind::U64 => 8,
        }
    }

    fn is_whole(self) -> bool {
        !matches!(self, Kind::F32 | Kind::F64)
    }

    /// The numbers that `bytes` spell; a rest of less than one is left out.
    fn numbers(self, bytes: &[u8]) -> Vec<f32> {
        fn each<const N: usize>(bytes: &[u8], number: fn([u8; N]) -> f32) -> Vec<f32> {
            bytes
                .as_chunks::<N>()
                .0
                .iter()
                .map(|b| number(*b))
                .collect()
        }
        match self {
            Kind::F32 => each(bytes, f32::from_le_bytes),
            Kind::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
            Kind::I8 => each(bytes, |b| f32::from(i8::from_le_bytes(b))),
            Kind::U8 => each(bytes, |b| f32::from(u8::from_le_bytes(b))),
            Kind::I16 => each(bytes, |b| f32::from(i16::from_le_bytes(b))),
            Kind::U16 => each(bytes, |b| f32::from(u16::from_le_bytes(b))),
            Kind::I32 => each(bytes, |b| i32::from_le_bytes(b) as f32),
            Kind::U32 => each(bytes, |b| u32::from_le_bytes(b) as f32),
            Kind::I64 => each(bytes, |b| i64::from_le_bytes(b) as f32),
            Kind::U64 => each(bytes, |b| u64::from_le_bytes(b) as f32),
        }
    }

    /// The whole numbers that `bytes` spell, if this kind has whole numbers only.
    fn whole_numbers(self, bytes: &[u8]) -> Option<Vec<i64>> {
        fn each<const N: usize>(bytes: &[u8], number: fn([u8; N]) -> i64) -> Vec<i64> {
            bytes
                .as_chunks::<N>()
                .0
                .iter()
                .map(|b| number(*b))
                .collect()
        }
        self.is_whole().then(|| match self {
            Kind::I8 => each(bytes, |b| i64::from(i8::from_le_bytes(b))),
            Kind::U8 => each(bytes, |b| i64::from(u8::from_le_bytes(b))),
            Kind::I16 => each(bytes, |b| i64::from(i16::from_le_bytes(b))),
            Kind::U16 => each(bytes, |b| i64::from(u16::from_le_bytes(b))),
            Kind::I32 => each(bytes, |b| i64::from(i32::from_le_bytes(b))),
            Kind::U32 => each(bytes, |b| i64::from(u32::from_le_bytes(b))),
            Kind::I64 => each(bytes, i64::from_le_bytes),
            // Above the limit of labels in any case.
            Kind::U64 => each(bytes, |b| {
                i64::try_from(u64::from_le_bytes(b)).unwrap_or(i64::MAX)
            }),
            Kind::F32 | Kind::F64 => Vec::new(),
        })
    }
}

/// Where an array lies in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) kind: Kind,
    /// The dimensions; the first one counts the samples.
    pub(super) shape: Vec<usize>,
    /// Its first byte.
    pub(super) offset: u64,
}

impl Place {
    /// Samples.
    pub(super) fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    /// Numbers of a sample, if they can be counted.
    pub(super) fn width(&self) -> Option<usize> {
        self.shape
            .get(1..)?
            .iter()
            .try_fold(1usize, |product, side| product.checked_mul(*side))
    }

    /// Bytes of the array, if they can be counted.
    pub(super) fn size_bytes(&self) -> Option<u64> {
        let values = (self.rows() as u64).checked_mul(self.width()? as u64)?;
        values.checked_mul(self.kind.size() as u64)
    }
}

/// An array whose rows are read as they are needed.
#[derive(Debug)]
pub(super) struct Array {
    pub(super) file: String,
    pub(super) bytes: Bytes,
    pub(super) place: Place,
}

/// Bytes that are looked through at once.
const SCAN_BYTES: usize = 1 << 20;

impl Array {
    /// The numbers of a row, divided by `divisor`, behind those that are in `values`.
    pub(super) fn read_row(
        &self,
        row: usize,
        divisor: f32,
        values: &mut Vec<f32>,
    ) -> Result<(), DataError> {
        let width = self.place.width().unwrap_or(0) * self.place.kind.size();
        let mut buffer = vec![0; width];
        self.read(&mut buffer, row as u64 * width as u64)?;
        values.extend(
            self.place
                .kind
                .numbers(&buffer)
                .iter()
                .map(|value| value / divisor),
        );
        Ok(())
    }

    /// All numbers. For arrays that are known to be small.
    pub(super) fn numbers(&self) -> Result<Vec<f32>, DataError> {
        Ok(self.place.kind.numbers(&self.all()?))
    }

    /// All numbers as whole ones; none if they are not.
    pub(super) fn whole_numbers(&self) -> Result<Option<Vec<i64>>, DataError> {
        Ok(self.place.kind.whole_numbers(&self.all()?))
    }

    fn all(&self) -> Result<Vec<u8>, DataError> {
        let size = self.place.size_bytes().unwrap_or(0);
        let mut buffer = vec![0; usize::try_from(size).unwrap_or(0)];
        self.read(&mut buffer, 0)?;
        Ok(buffer)
    }

    /// Looks through all values; the first that is not finite is an error.
    pub(super) fn check_finite(&self) -> Result<(), DataError> {
        let kind = self.place.kind;
        if kind.is_whole() {
            return Ok(());
        }
        let size = self.place.size_bytes().unwrap_or(0);
        let width = self.place.width().unwrap_or(1).max(1);
        let mut buffer = vec![0; SCAN_BYTES];
        let mut at = 0;
        while at < size {
            let count = (size - at).min(SCAN_BYTES as u64) as usize;
            self.read(&mut buffer[..count], at)?;
            let numbers = kind.numbers(&buffer[..count]);
            if let Some(index) = numbers.iter().position(|value| !value.is_finite()) {
                let value_index = (at / kind.size() as u64) as usize + index;
                return Err(DataError::NotFinite {
                    file: self.file.clone(),
                    row: value_index / width + 1,
                    column: value_index % width + 1,
                    value: numbers[index],
                });
            }
            at += count as u64;
        }
        Ok(())
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), DataError> {
        self.bytes
            .read_at(&self.file, buffer, self.place.offset + offset)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use super::super::opened::OpenFile;
    use super::*;

    fn bytes(values: [f32; 2]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    fn open(path: &str) -> Array {
        Array {
            file: path.to_owned(),
            bytes: Bytes::File(Arc::new(OpenFile::open(path).unwrap())),
            place: Place {
                kind: Kind::F32,
                shape: vec![2, 1],
                offset: 0,
            },
        }
    }

    #[test]
    fn an_array_whose_file_is_written_to_is_not_read_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let (x, other) = (path("x"), path("other"));
        std::fs::write(&x, bytes([1.0, 2.0])).unwrap();
        let array = open(&x);
        // Another file of the name is another file.
        std::fs::write(&other, bytes([3.0, 4.0])).unwrap();
        std::fs::rename(&other, &x).unwrap();
        assert_eq!(array.numbers().unwrap(), [1.0, 2.0]);

        let array = open(&x);
        let again = array.bytes.clone();
        assert_eq!(array.numbers().unwrap(), [3.0, 4.0]);
        // In place: as many bytes, and later, however coarse the file system's clock is.
        let file = File::options().write(true).open(&x).unwrap();
        let later =
            file.metadata().unwrap().modified().unwrap() + std::time::Duration::from_secs(1);
        file.write_all_at(&bytes([5.0, 6.0]), 0).unwrap();
        file.set_modified(later).unwrap();
        let error = array.read_row(1, 1.0, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, DataError::Changed { .. }), "{error}");
        assert!(!error.may_pass());
        let error = again.read_at(&x, &mut [0; 4], 0).unwrap_err();
        assert!(matches!(error, DataError::Changed { .. }), "{error}");
        assert_eq!(open(&x).numbers().unwrap(), [5.0, 6.0]);
    }
}
