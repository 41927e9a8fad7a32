//! Parquet files: columns of numbers by name.
//!
//! Invariants:
//! 1. A file is taken whole, or refused with file, row (counted from 1) and column.
//! 2. No more of it than a page of each column is in memory at a time, beside the table.

use std::io::{self, BufReader};

use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use ::parquet::record::Field;
use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::opened::{Bytes, Reader, data_error};
use super::table::{Table, TableSpec, Wanted};

/// Parquet files, compressed with Snappy or gzip, or not at all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParquetSpec {
    /// The files, in order: paths, or `store:` and the path of a blob.
    pub files: Vec<String>,
    /// The column with the class; absent: the last one, unless there are `targets`.
    #[serde(default)]
    pub label: Option<String>,
    /// Instead of a class: the columns with the numbers to predict.
    #[serde(default)]
    pub targets: Vec<String>,
    /// The columns with the numbers of a sample; absent: all others, in the order of the file.
    #[serde(default)]
    pub columns: Vec<String>,
    /// The dimensions of a sample's numbers; absent: just so many numbers.
    #[serde(default)]
    pub shape: Option<Vec<usize>>,
    /// How many classes there are; absent: one more than the largest label.
    #[serde(default)]
    pub classes: Option<usize>,
    /// The numbers of a sample are divided by this; absent: 1.
    #[serde(default)]
    pub scale: Option<f64>,
}

impl ParquetSpec {
    /// The table that such files hold.
    pub(super) fn table(&self) -> TableSpec {
        TableSpec {
            shape: self.shape.clone(),
            classes: self.classes,
            targets: (!self.targets.is_empty()).then_some(self.targets.len()),
            scale: self.scale,
        }
    }

    /// Which columns of `names` are read, in the order in which a row of the table has them.
    fn order(&self, file: &str, names: &[String]) -> Result<Vec<usize>, DataError> {
        let find = |wanted: &String| {
            names.iter().position(|name| name == wanted).ok_or_else(|| {
                misfit(
                    file,
                    format!("it has no column {wanted:?}, but {}", names.join(", ")),
                )
            })
        };
        let last = match (&self.label, self.targets.is_empty()) {
            (Some(label), true) => vec![find(label)?],
            (None, true) if !names.is_empty() => vec![names.len() - 1],
            (None, false) => self.targets.iter().map(find).collect::<Result<_, _>>()?,
            _ => {
                return Err(misfit(
                    file,
                    "samples have either a label or targets; name one of them".to_owned(),
                ));
            }
        };
        let mut order = match self.columns.is_empty() {
            true => (0..names.len())
                .filter(|index| !last.contains(index))
                .collect(),
            false => self
                .columns
                .iter()
                .map(find)
                .collect::<Result<Vec<_>, _>>()?,
        };
        order.extend(last);
        Ok(order)
    }
}

/// A file as the decoder reads it: here and there.
struct Chunks {
    file: String,
    bytes: Bytes,
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.bytes.size_bytes()
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<Reader>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(BufReader::new(self.bytes.reader(&self.file, start)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<::bytes::Bytes, ParquetError> {
        let size_bytes = self.bytes.size_bytes();
        if start
            .checked_add(length as u64)
            .is_none_or(|end| end > size_bytes)
        {
            let reason = format!("{length} bytes at {start} are wanted, of {size_bytes}");
            return Err(ParquetError::EOF(reason));
        }
        self.bytes
            .part(&self.file, start, length)
            .map_err(|error| ParquetError::External(Box::new(error)))
    }
}

/// What the decoder said of a file. Where that could not be read, or was changed, this says so.
fn failure(file: &str, bytes: &Bytes, error: ParquetError) -> DataError {
    if let Err(changed) = bytes.check(file) {
        return changed;
    }
    let error = match error {
        ParquetError::External(cause) => match cause.downcast::<DataError>() {
            Ok(known) => return *known,
            Err(cause) => match cause.downcast::<io::Error>() {
                Ok(error) if error.get_ref().is_some_and(|inner| inner.is::<DataError>()) => {
                    return data_error(file, *error);
                }
                Ok(error) => ParquetError::External(error),
                Err(cause) => ParquetError::External(cause),
            },
        },
        other => other,
    };
    misfit(
        file,
        format!("it cannot be read as Parquet ({error}); copy or write the file again"),
    )
}

/// Adds the rows of a file to `table`.
pub(super) fn read(
    file: &str,
    bytes: &Bytes,
    spec: &ParquetSpec,
    table: &mut Table,
) -> Result<(), DataError> {
    let broken = |error: ParquetError| failure(file, bytes, error);
    let chunks = Chunks {
        file: file.to_owned(),
        bytes: bytes.clone(),
    };
    let reader = SerializedFileReader::new(chunks).map_err(broken)?;
    let schema = reader.metadata().file_metadata().schema();
    let names: Vec<String> = schema
        .get_fields()
        .iter()
        .map(|field| field.name().to_owned())
        .collect();
    let order = spec.order(file, &names)?;
    let mut found = 0;
    for (index, row) in reader.get_row_iter(None).map_err(broken)?.enumerate() {
        let fields: Vec<Field> = row
            .map_err(broken)?
            .into_columns()
            .into_iter()
            .map(|(_, field)| field)
            .collect();
        found = index + 1;
        table.begin_row(file, found, order.len())?;
        for (place, column) in order.iter().enumerate() {
            push(file, found, place, *column, &fields[*column], table)?;
        }
    }
    if found == 0 {
        return Err(DataError::Empty {
            file: file.to_owned(),
            wanted: "each row is a sample: its numbers, and its label",
        });
    }
    Ok(())
}

fn push(
    file: &str,
    row: usize,
    place: usize,
    column: usize,
    field: &Field,
    table: &mut Table,
) -> Result<(), DataError> {
    let not = |wanted| DataError::NotANumber {
        file: file.to_owned(),
        line: row,
        column: column + 1,
        text: field.to_string().chars().take(32).collect(),
        wanted,
    };
    match table.wanted(place) {
        Wanted::Number => {
            let value = number(field).ok_or_else(|| not("number"))?;
            table.push_number(file, row, place, value)
        }
        Wanted::Label => {
            let label = whole(field).ok_or_else(|| not("whole number"))?;
            table.push_label(file, row, label)
        }
    }
}

fn whole(field: &Field) -> Option<i64> {
    Some(match field {
        Field::Bool(value) => i64::from(*value),
        Field::Byte(value) => i64::from(*value),
        Field::Short(value) => i64::from(*value),
        Field::Int(value) => i64::from(*value),
        Field::Long(value) => *value,
        Field::UByte(value) => i64::from(*value),
        Field::UShort(value) => i64::from(*value),
        Field::UInt(value) => i64::from(*value),
        // Above the limit of labels in any case.
        Field::ULong(value) => i64::try_from(*value).unwrap_or(i64::MAX),
        _ => return None,
    })
}

fn number(field: &Field) -> Option<f32> {
    match field {
        Field::Float16(value) => Some(value.to_f32()),
        Field::Float(value) => Some(*value),
        Field::Double(value) => Some(*value as f32),
        other => whole(other).map(|value| value as f32),
    }
}

fn misfit(file: &str, reason: String) -> DataError {
    DataError::Misfit {
        file: file.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ::parquet::basic::Compression;
    use ::parquet::data_type::{DoubleType, Int64Type};
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;

    use super::super::scratch::{Limits, Room};
    use super::super::{DataSpec, Dataset, Files, SampleShape, Samples};
    use super::*;

    /// Columns `x`, `y` and `class`, written as other programs would, two rows in a group.
    fn written(compression: Compression, x: &[f64], y: &[f64], class: &[i64]) -> Vec<u8> {
        let schema = "message rows { required double x; required double y; required int64 class; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder()
            .set_compression(compression)
            .build();
        let mut bytes = Vec::new();
        let mut writer =
            SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
        for ((x, y), class) in x.chunks(2).zip(y.chunks(2)).zip(class.chunks(2)) {
            let mut group = writer.next_row_group().unwrap();
            for values in [x, y] {
                let mut column = group.next_column().unwrap().unwrap();
                column
                    .typed::<DoubleType>()
                    .write_batch(values, None, None)
                    .unwrap();
                column.close().unwrap();
            }
            let mut column = group.next_column().unwrap().unwrap();
            column
                .typed::<Int64Type>()
                .write_batch(class, None, None)
                .unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
        bytes
    }

    fn spec(files: Vec<String>) -> ParquetSpec {
        ParquetSpec {
            files,
            label: None,
            targets: Vec::new(),
            columns: Vec::new(),
            shape: None,
            classes: None,
            scale: Some(2.0),
        }
    }

    fn load(spec: ParquetSpec) -> Result<Dataset, DataError> {
        Dataset::load(&DataSpec::Parquet(spec), &Files::local())
    }

    #[test]
    fn columns_are_found_by_name_over_several_compressed_files() {
        let folder = tempfile::tempdir().unwrap();
        let save = |name: &str, bytes: Vec<u8>| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path.display().to_string()
        };
        let files = vec![
            save(
                "a.parquet",
                written(Compression::SNAPPY, &[2.0, 4.0], &[6.0, 8.0], &[0, 2]),
            ),
            save(
                "b.parquet",
                written(Compression::UNCOMPRESSED, &[1.0], &[3.0], &[1]),
            ),
        ];
        let data = load(spec(files.clone())).unwrap();
        let all = data.all().unwrap();
        assert_eq!(all.features(), [1.0, 3.0, 2.0, 4.0, 0.5, 1.5]);
        assert_eq!(all.labels(), [0, 2, 1]);
        let shape = SampleShape::Classified {
            features: vec![2],
            classes: 3,
        };
        assert_eq!(*data.shape(), shape);
        let swapped = ParquetSpec {
            columns: vec!["class".into(), "x".into()],
            targets: vec!["y".into()],
            ..spec(files.clone())
        };
        let samples = Samples::Measured {
            features: vec![0.5, 0.5],
            targets: vec![3.0],
        };
        assert_eq!(
            load(swapped).unwrap().gather(&[2]).unwrap().samples,
            samples
        );

        let unknown = ParquetSpec {
            label: Some("kind".into()),
            ..spec(files.clone())
        };
        let error = load(unknown).unwrap_err().to_string();
        assert!(
            error.contains("no column \"kind\", but x, y, class"),
            "{error}"
        );
        let float_label = ParquetSpec {
            label: Some("y".into()),
            ..spec(files)
        };
        let error = load(float_label).unwrap_err().to_string();
        assert!(
            error.contains("a.parquet:1: column 2 is \"6.0\", not a whole number"),
            "{error}"
        );
        let nan = save(
            "n.parquet",
            written(Compression::SNAPPY, &[1.0, f64::NAN], &[1.0, 1.0], &[0, 0]),
        );
        let error = load(spec(vec![nan])).unwrap_err().to_string();
        assert!(
            error.contains("n.parquet: row 2, value 1: NaN is not finite"),
            "{error}"
        );
        let cut = save(
            "c.parquet",
            written(Compression::SNAPPY, &[1.0], &[1.0], &[0])[..90].to_vec(),
        );
        let error = load(spec(vec![cut])).unwrap_err().to_string();
        assert!(error.contains("cannot be read as Parquet"), "{error}");
    }

    #[test]
    fn groups_of_rows_are_the_same_in_memory_and_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let numbers: Vec<f64> = (0..9).map(|number| f64::from(number) / 7.0).collect();
        let classes: Vec<i64> = (0..9).map(|number| number % 3).collect();
        let stored = written(Compression::SNAPPY, &numbers, &numbers, &classes);
        std::fs::write(&path, &stored).unwrap();
        let file = path.display().to_string();
        let spec = DataSpec::Parquet(spec(vec![file.clone()]));
        let small = || {
            Room::new(Limits {
                memory_bytes: 8,
                ..Limits::default()
            })
        };
        let memory = Dataset::load(&spec, &Files::local()).unwrap();
        let disk = Dataset::load_into(&spec, &Files::local(), &small()).unwrap();
        assert!(!memory.is_read_late() && disk.is_read_late());
        assert_eq!(memory.len(), 9);
        assert_eq!(memory.all().unwrap(), disk.all().unwrap());
        assert_eq!(
            memory.gather(&[8, 2]).unwrap(),
            disk.gather(&[8, 2]).unwrap()
        );
        assert_eq!(memory.digest(), disk.digest());
        assert_eq!(memory.shape(), disk.shape());
        assert_eq!(
            disk.file_digests(),
            [blake3::hash(&stored).to_hex().to_string()]
        );

        // Written to between its hashing and its decoding.
        let room = small();
        let bytes = Files::local().open(&file, &room).unwrap();
        let open = std::fs::File::options().write(true).open(&path).unwrap();
        let later =
            open.metadata().unwrap().modified().unwrap() + std::time::Duration::from_secs(1);
        open.set_modified(later).unwrap();
        let DataSpec::Parquet(spec) = &spec else {
            panic!("{spec:?}")
        };
        let error = read(&file, &bytes, spec, &mut Table::new(spec.table(), &room)).unwrap_err();
        assert!(matches!(error, DataError::Changed { .. }), "{error}");
    }
}
