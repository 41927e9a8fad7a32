//! Data sets: where samples come from, what one looks like, and which of them are trained on.
//!
//! * [`DataSpec`] says what a job asks for; [`shape`] what a sample is; [`rows`] what a batch of them is.
//! * One file a format: [`csv`], [`parquet`], [`npy`], [`safetensors`], [`text`]; `table` checks rows of numbers, `array`
//!   and `arrays` arrays of them; [`files`] brings the bytes (`opened`), `prefetch` before they are needed.
//! * What is too large for memory and does not lie in a file as it is needed goes to one: `scratch`, `numbers`.
//!
//! Invariants:
//! 1. A loaded data set is complete and finite, or loading fails with an error that names file, place,
//!    value and limit.
//! 2. `digest` covers the bytes of the source as stored and how they are read, so a job's record pins
//!    its data.
//! 3. Which samples are held out depends on (seed, count, fraction) only.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub mod csv;
pub mod error;
pub mod files;
pub mod npy;
pub mod parquet;
pub mod rows;
pub mod safetensors;
pub mod shape;
pub mod text;

mod array;
mod arrays;
mod digests;
mod numbers;
mod opened;
mod prefetch;
mod scratch;
mod table;

pub use error::DataError;
pub use files::Files;
pub(super) use prefetch::Prefetch;
pub use rows::{Batch, Samples};
pub use shape::SampleShape;

use self::parquet::ParquetSpec;
use super::permutation::Permutation;
use super::random::Purpose;
use csv::CsvSpec;
use digests::{Digests, Hashed};
use npy::NpySpec;
use rows::Rows;
use safetensors::SafetensorsSpec;
use scratch::{Limits, Room};
use table::Table;
pub use text::BYTE_VOCABULARY;
use text::{Text, TextSpec};

/// The handwritten digits that come with this crate; provenance in `data/README.md`.
pub const EMBEDDED_DIGITS: &[u8] = include_bytes!("../../../data/digits.csv.gz");

/// What a job trains on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataSpec {
    /// [`EMBEDDED_DIGITS`]: 1797 images of 8×8 pixels in ten classes.
    Digits,
    /// Numbers in text.
    Csv(CsvSpec),
    /// Columns by name.
    Parquet(ParquetSpec),
    /// Arrays, one in a file.
    Npy(NpySpec),
    /// Arrays by name.
    Safetensors(SafetensorsSpec),
    /// Text.
    Text(TextSpec),
}

impl DataSpec {
    /// The files that it names.
    #[must_use]
    pub fn files(&self) -> Vec<&str> {
        self.lists()
            .into_iter()
            .flatten()
            .map(String::as_str)
            .collect()
    }

    /// The names of its files, to be changed.
    pub fn files_mut(&mut self) -> Vec<&mut String> {
        let lists = match self {
            DataSpec::Digits => vec![],
            DataSpec::Csv(spec) => vec![&mut spec.files],
            DataSpec::Parquet(spec) => vec![&mut spec.files],
            DataSpec::Npy(spec) => {
                vec![&mut spec.features, &mut spec.labels, &mut spec.targets]
            }
            DataSpec::Safetensors(spec) => vec![&mut spec.files],
            DataSpec::Text(spec) => vec![&mut spec.files],
        };
        lists.into_iter().flatten().collect()
    }

    fn lists(&self) -> Vec<&Vec<String>> {
        match self {
            DataSpec::Digits => vec![],
            DataSpec::Csv(spec) => vec![&spec.files],
            DataSpec::Parquet(spec) => vec![&spec.files],
            DataSpec::Npy(spec) => vec![&spec.features, &spec.labels, &spec.targets],
            DataSpec::Safetensors(spec) => vec![&spec.files],
            DataSpec::Text(spec) => vec![&spec.files],
        }
    }

    /// The number by which numbers are divided, and what says what is to be predicted: how many classes,
    /// and whether there are numbers to predict.
    pub(super) fn scale(&self) -> Option<f64> {
        match self {
            DataSpec::Digits | DataSpec::Text(_) => None,
            DataSpec::Csv(spec) => spec.scale,
            DataSpec::Parquet(spec) => spec.scale,
            DataSpec::Npy(spec) => spec.scale,
            DataSpec::Safetensors(spec) => spec.scale,
        }
    }

    /// The same without the names of its files, which decide no bit.
    fn without_files(&self) -> DataSpec {
        let mut spec = self.clone();
        for name in spec.files_mut() {
            name.clear();
        }
        spec
    }

    /// How people call it.
    fn name(&self) -> String {
        match self.files().as_slice() {
            [] => "digits".to_owned(),
            [file] => (*file).to_owned(),
            [first, rest @ ..] => format!("{first} and {} more", rest.len()),
        }
    }
}

/// Samples, all of a source's or some of them. Clones share their values.
#[derive(Debug, Clone)]
pub struct Dataset {
    whole: Arc<Whole>,
    /// Which of the source's samples these are; absent for all.
    chosen: Option<Arc<[u64]>>,
}

#[derive(Debug)]
struct Whole {
    source: String,
    digest: String,
    /// BLAKE3 of each file, in hex, in the order in which they were read.
    files: Vec<String>,
    shape: SampleShape,
    rows: Rows,
}

/// A data set in its two parts.
#[derive(Debug, Clone)]
pub struct Split {
    /// The samples trained on.
    pub train: Dataset,
    /// The samples that only evaluation sees.
    pub held_out: Dataset,
}

impl Dataset {
    /// Loads what a job names.
    pub fn load(spec: &DataSpec, files: &Files) -> Result<Self, DataError> {
        Self::load_into(spec, files, &Room::new(Limits::default()))
    }

    fn load_into(spec: &DataSpec, files: &Files, room: &Room) -> Result<Self, DataError> {
        let source = spec.name();
        let mut digests = Digests::of(spec);
        let (shape, rows) = match spec {
            DataSpec::Digits => return Self::digits(),
            DataSpec::Csv(spec) => {
                let mut table = Table::new(spec.table(), room);
                for file in &spec.files {
                    let mut stored = Hashed::new(files.open(file, room)?.reader(file, 0));
                    let line_bytes_max = room.limits().line_bytes;
                    csv::read(file, &mut stored, spec.header, line_bytes_max, &mut table)?;
                    digests.add_rest(file, stored)?;
                }
                table.finish(&source)?
            }
            DataSpec::Parquet(spec) => {
                let mut table = Table::new(spec.table(), room);
                for file in &spec.files {
                    let bytes = files.open(file, room)?;
                    digests.add(file, &bytes)?;
                    parquet::read(file, &bytes, spec, &mut table)?;
                }
                table.finish(&source)?
            }
            DataSpec::Npy(spec) => arrays::load_npy(&source, spec, files, room, &mut digests)?,
            DataSpec::Safetensors(spec) => {
                arrays::load_safetensors(&source, spec, files, room, &mut digests)?
            }
            DataSpec::Text(spec) => {
                let mut text = Text::default();
                for file in &spec.files {
                    let bytes = files.open(file, room)?;
                    digests.add(file, &bytes)?;
                    text.push(file, bytes);
                }
                text::cut(&source, text, spec.context)?
            }
        };
        Ok(Self::of(source, digests, shape, rows))
    }

    /// The embedded handwritten digits. Their digest is that of [`EMBEDDED_DIGITS`].
    pub fn digits() -> Result<Self, DataError> {
        let spec = CsvSpec {
            files: Vec::new(),
            header: false,
            shape: Some(vec![8, 8]),
            classes: Some(10),
            targets: None,
            scale: Some(16.0),
        };
        let room = Room::new(Limits::default());
        let mut table = Table::new(spec.table(), &room);
        let line_bytes_max = room.limits().line_bytes;
        csv::read(
            "digits.csv.gz",
            EMBEDDED_DIGITS,
            false,
            line_bytes_max,
            &mut table,
        )?;
        let (shape, rows) = table.finish("digits")?;
        let digest = blake3::hash(EMBEDDED_DIGITS).to_hex().to_string();
        let source = "digits".to_owned();
        let whole = Whole {
            source,
            digest,
            files: Vec::new(),
            shape,
            rows,
        };
        Ok(Self::of_whole(whole))
    }

    /// Samples of CSV text; `file` names it in errors.
    pub fn from_csv(file: &str, bytes: &[u8], spec: &CsvSpec) -> Result<Self, DataError> {
        let mut digests = Digests::of(&DataSpec::Csv(spec.clone()));
        let room = Room::new(Limits::default());
        let mut table = Table::new(spec.table(), &room);
        let mut stored = Hashed::new(bytes);
        let line_bytes_max = room.limits().line_bytes;
        csv::read(file, &mut stored, spec.header, line_bytes_max, &mut table)?;
        digests.add_rest(file, stored)?;
        let (shape, rows) = table.finish(file)?;
        Ok(Self::of(file.to_owned(), digests, shape, rows))
    }

    fn of(source: String, digests: Digests, shape: SampleShape, rows: Rows) -> Self {
        let (digest, files) = digests.finish();
        Self::of_whole(Whole {
            source,
            digest,
            files,
            shape,
            rows,
        })
    }

    fn of_whole(whole: Whole) -> Self {
        Dataset {
            whole: Arc::new(whole),
            chosen: None,
        }
    }

    /// Where the samples came from, as errors name it.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.whole.source
    }

    /// BLAKE3, in hex, of the source's bytes and of how they are read. A part of a data set keeps its
    /// whole's digest.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.whole.digest
    }

    /// BLAKE3, in hex, of each of the source's files: none of the embedded digits.
    #[must_use]
    pub fn file_digests(&self) -> &[String] {
        &self.whole.files
    }

    /// What each sample looks like.
    #[must_use]
    pub fn shape(&self) -> &SampleShape {
        &self.whole.shape
    }

    /// Number of samples.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.chosen {
            Some(chosen) => chosen.len(),
            None => self.whole.rows.count(self.whole.shape.output_count()),
        }
    }

    /// Whether there are no samples.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether samples are read from a file each time they are gathered.
    pub(super) fn is_read_late(&self) -> bool {
        self.whole.rows.is_read_late()
    }

    /// The samples at `indices`, in that order.
    ///
    /// # Panics
    /// If an index is not below [`Dataset::len`].
    pub fn gather(&self, indices: &[usize]) -> Result<Batch, DataError> {
        let rows: Vec<u64> = indices.iter().map(|index| self.row(*index)).collect();
        let shape = &self.whole.shape;
        self.whole
            .rows
            .gather(&rows, shape.feature_count(), shape.output_count())
    }

    /// All samples at once. For data that is known to be small.
    pub fn all(&self) -> Result<Batch, DataError> {
        self.gather(&(0..self.len()).collect::<Vec<_>>())
    }

    /// The part of this data set at `indices`. Panics as [`Dataset::gather`] does.
    #[must_use]
    pub fn part(&self, indices: &[usize]) -> Self {
        Dataset {
            whole: Arc::clone(&self.whole),
            chosen: Some(indices.iter().map(|index| self.row(*index)).collect()),
        }
    }

    /// Splits off the last `held_out_fraction` of a seeded permutation; both parts keep the source's
    /// order. Each part gets at least one sample when there are two.
    #[must_use]
    pub fn split(&self, seed: u64, held_out_fraction: f64) -> Split {
        let count = self.len();
        if count < 2 {
            return Split {
                train: self.clone(),
                held_out: self.part(&[]),
            };
        }
        let held_out_count = (count as f64 * held_out_fraction).round() as usize;
        let train_count = count - held_out_count.clamp(1, count - 1);
        let permutation = Permutation::keyed(seed, Purpose::HeldOut, 0, count as u64);
        let mut order: Vec<usize> = (0..count as u64)
            .map(|position| permutation.at(position) as usize)
            .collect();
        let (train, held_out) = order.split_at_mut(train_count);
        train.sort_unstable();
        held_out.sort_unstable();
        Split {
            train: self.part(train),
            held_out: self.part(held_out),
        }
    }

    fn row(&self, index: usize) -> u64 {
        match &self.chosen {
            Some(chosen) => chosen[index],
            None => {
                assert!(index < self.len(), "sample {index} of {}", self.len());
                index as u64
            }
        }
    }
}

#[cfg(test)]
mod large_tests;
#[cfg(test)]
mod tests;
