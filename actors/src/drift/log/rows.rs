//! Rows of the prediction log, from what a policy lets through to a Parquet file.
//!
//! Columns: `request` (text, or absent), `row`, `answered_at` (milliseconds since the Unix epoch), `version`, `class`, `confidence`,
//! `slice` (text, or absent), and `input_<feature>` for each feature: a float, or for a hashed one a text. `version` is the one that
//! answered; the file's own `mobula.version` is the one that was active, whose monitor wrote it.

use std::sync::Arc;

use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, DataType, FloatType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::types::{Type, TypePtr};

use super::policy::{LogPolicy, LoggedFeatures, MILLION};
use crate::serving::feed::Observation;

/// What a row takes in memory beside its features and texts.
const ROW_BYTES: usize = 64;

/// What a hash takes: 16 bytes in hexadecimal digits.
const HASH_CHARS: usize = 32;

/// How a feature is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    Hashed,
}

/// Which features of a version are logged, and how.
#[derive(Debug, Clone)]
pub(in crate::drift) struct Layout {
    row_values: usize,
    columns: Vec<(usize, String, Form)>,
    /// Features that the policy names and the version lacks.
    pub(in crate::drift) unknown: u64,
}

impl Layout {
    pub(in crate::drift) fn new(policy: &LogPolicy, features: &[String]) -> Self {
        let is_hashed = |name: &String| policy.hashed_features.contains(name);
        let is_plain = |name: &String| match &policy.features {
            LoggedFeatures::All => true,
            LoggedFeatures::Named(names) => names.contains(name),
        };
        let columns: Vec<(usize, String, Form)> = features
            .iter()
            .enumerate()
            .filter_map(|(index, name)| {
                // A hash wins over `all`: whoever names a feature means it.
                let form = if is_hashed(name) {
                    Form::Hashed
                } else if is_plain(name) {
                    Form::Plain
                } else {
                    return None;
                };
                Some((index, name.clone(), form))
            })
            .collect();
        let named = match &policy.features {
            LoggedFeatures::All => &[][..],
            LoggedFeatures::Named(names) => names.as_slice(),
        };
        let unknown = named
            .iter()
            .chain(&policy.hashed_features)
            .filter(|name| !features.contains(name))
            .count();
        Layout {
            row_values: features.len(),
            columns,
            unknown: unknown as u64,
        }
    }
}

/// Rows that will be one file.
#[derive(Debug)]
pub(in crate::drift) struct LogRows {
    pub(in crate::drift) began_ms: u64,
    requests: Vec<Option<String>>,
    rows: Vec<i32>,
    at: Vec<i64>,
    versions: Vec<i64>,
    classes: Vec<i32>,
    confidences: Vec<f32>,
    slices: Vec<Option<String>>,
    /// By column of the layout; one of the two is used.
    plain: Vec<Vec<f32>>,
    hashed: Vec<Vec<String>>,
    pub(in crate::drift) bytes: u64,
}

impl LogRows {
    pub(in crate::drift) fn new(layout: &Layout, began_ms: u64) -> Self {
        LogRows {
            began_ms,
            requests: Vec::new(),
            rows: Vec::new(),
            at: Vec::new(),
            versions: Vec::new(),
            classes: Vec::new(),
            confidences: Vec::new(),
            slices: Vec::new(),
            plain: vec![Vec::new(); layout.columns.len()],
            hashed: vec![Vec::new(); layout.columns.len()],
            bytes: 0,
        }
    }

    pub(in crate::drift) fn count(&self) -> usize {
        self.rows.len()
    }

    /// Takes what of an observation is in the sample; how many rows are not.
    pub(in crate::drift) fn add(
        &mut self,
        policy: &LogPolicy,
        layout: &Layout,
        observation: &Observation,
        now_ms: u64,
    ) -> u64 {
        let mut left_out = 0;
        let mut at = 0;
        for (index, request) in observation.requests.iter().enumerate() {
            let count = request.rows as usize;
            let first = at;
            at += count;
            let values = observation
                .rows
                .get(first * layout.row_values..at * layout.row_values);
            let answers = observation
                .classes
                .get(first..at)
                .zip(observation.confidences.get(first..at));
            let version = observation.versions.get(index);
            let (Some(values), Some((classes, confidences)), Some(version)) =
                (values, answers, version)
            else {
                // Not what a router sends; the windows refuse it as well.
                left_out += count as u64;
                continue;
            };
            if !is_sampled(policy, request.id.as_deref(), values) {
                left_out += count as u64;
                continue;
            }
            let name = request.id.as_ref().map(|id| {
                if policy.plain_ids {
                    id.clone()
                } else {
                    hash(&policy.key, id.as_bytes())
                }
            });
            let rows = values.chunks_exact(layout.row_values.max(1));
            for (number, ((row, class), confidence)) in
                (0..).zip(rows.zip(classes).zip(confidences))
            {
                self.requests.push(name.clone());
                self.rows.push(number);
                self.at.push(now_ms.cast_signed());
                self.versions.push(version.cast_signed());
                self.classes.push(class.cast_signed());
                self.confidences.push(*confidence);
                self.slices.push(request.slice.clone());
                self.add_features(policy, layout, row);
                let texts = name.as_ref().map_or(0, String::len)
                    + request.slice.as_ref().map_or(0, String::len);
                self.bytes += (ROW_BYTES + texts) as u64;
            }
        }
        left_out
    }

    fn add_features(&mut self, policy: &LogPolicy, layout: &Layout, row: &[f32]) {
        for (column, (index, _, form)) in layout.columns.iter().enumerate() {
            match form {
                Form::Plain => {
                    self.plain[column].push(row[*index]);
                    self.bytes += size_of::<f32>() as u64;
                }
                Form::Hashed => {
                    let digest = hash(&policy.key, &row[*index].to_le_bytes());
                    self.hashed[column].push(digest);
                    self.bytes += (HASH_CHARS + size_of::<String>()) as u64;
                }
            }
        }
    }

    /// The file, of the monitor of this version.
    pub(in crate::drift) fn to_parquet(
        &self,
        layout: &Layout,
        endpoint: &str,
        version: u64,
    ) -> Result<Vec<u8>, ParquetError> {
        let said = vec![
            KeyValue::new("mobula.endpoint".to_owned(), endpoint.to_owned()),
            KeyValue::new("mobula.version".to_owned(), version.to_string()),
        ];
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_key_value_metadata(Some(said))
            .build();
        let mut bytes = Vec::new();
        let mut file =
            SerializedFileWriter::new(&mut bytes, schema(layout)?, Arc::new(properties))?;
        let mut group = file.next_row_group()?;
        write_texts(&mut group, &self.requests)?;
        write::<Int32Type>(&mut group, &self.rows, None)?;
        write::<Int64Type>(&mut group, &self.at, None)?;
        write::<Int64Type>(&mut group, &self.versions, None)?;
        write::<Int32Type>(&mut group, &self.classes, None)?;
        write::<FloatType>(&mut group, &self.confidences, None)?;
        write_texts(&mut group, &self.slices)?;
        for (column, (_, _, form)) in layout.columns.iter().enumerate() {
            match form {
                Form::Plain => write::<FloatType>(&mut group, &self.plain[column], None)?,
                Form::Hashed => {
                    let texts: Vec<ByteArray> = self.hashed[column]
                        .iter()
                        .map(|text| ByteArray::from(text.as_str()))
                        .collect();
                    write::<ByteArrayType>(&mut group, &texts, None)?;
                }
            }
        }
        group.close()?;
        file.close()?;
        Ok(bytes)
    }
}

/// Whether a request is in the sample.
fn is_sampled(policy: &LogPolicy, id: Option<&str>, values: &[f32]) -> bool {
    let mut hasher = blake3::Hasher::new();
    match id {
        Some(id) => {
            hasher.update(id.as_bytes());
        }
        None => {
            hasher.update(bytemuck::cast_slice(values));
        }
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    let place = (u128::from(u64::from_le_bytes(first)) * u128::from(MILLION)) >> 64;
    place < u128::from(policy.sample_per_million)
}

fn hash(key: &[u8; 32], bytes: &[u8]) -> String {
    blake3::keyed_hash(key, bytes).to_hex()[..HASH_CHARS].to_owned()
}

fn schema(layout: &Layout) -> Result<TypePtr, ParquetError> {
    let number = |name: &str, physical| {
        Type::primitive_type_builder(name, physical)
            .with_repetition(Repetition::REQUIRED)
            .build()
            .map(Arc::new)
    };
    let text = |name: &str, repetition| {
        Type::primitive_type_builder(name, Physical::BYTE_ARRAY)
            .with_repetition(repetition)
            .with_logical_type(Some(LogicalType::String))
            .build()
            .map(Arc::new)
    };
    let at = Type::primitive_type_builder("answered_at", Physical::INT64)
        .with_repetition(Repetition::REQUIRED)
        .with_converted_type(ConvertedType::TIMESTAMP_MILLIS)
        .build()?;
    let mut fields = vec![
        text("request", Repetition::OPTIONAL)?,
        number("row", Physical::INT32)?,
        Arc::new(at),
        number("version", Physical::INT64)?,
        number("class", Physical::INT32)?,
        number("confidence", Physical::FLOAT)?,
        text("slice", Repetition::OPTIONAL)?,
    ];
    for (_, feature, form) in &layout.columns {
        let name = format!("input_{feature}");
        fields.push(match form {
            Form::Plain => number(&name, Physical::FLOAT)?,
            Form::Hashed => text(&name, Repetition::REQUIRED)?,
        });
    }
    let schema = Type::group_type_builder("prediction")
        .with_fields(fields)
        .build()?;
    Ok(Arc::new(schema))
}

fn write<T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, &mut Vec<u8>>,
    values: &[T::T],
    levels: Option<&[i16]>,
) -> Result<(), ParquetError> {
    let mut column = group
        .next_column()?
        .expect("a column is written for each field of the schema");
    column.typed::<T>().write_batch(values, levels, None)?;
    column.close()
}

fn write_texts(
    group: &mut SerializedRowGroupWriter<'_, &mut Vec<u8>>,
    texts: &[Option<String>],
) -> Result<(), ParquetError> {
    let levels: Vec<i16> = texts.iter().map(|text| i16::from(text.is_some())).collect();
    let present: Vec<ByteArray> = texts
        .iter()
        .flatten()
        .map(|text| ByteArray::from(text.as_str()))
        .collect();
    write::<ByteArrayType>(group, &present, Some(&levels))
}

#[cfg(test)]
#[path = "rows_tests.rs"]
mod tests;
