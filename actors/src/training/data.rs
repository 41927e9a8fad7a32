//! Data sets: 8×8 images with labels, read from (compressed) CSV, checked value by value.
//!
//! Invariants:
//! 1. A loaded data set is complete: every line has 64 pixels in 0..=16 and a label in 0..=9, or loading
//!    fails with an error that names file and line (counted from 1).
//! 2. `digest` is the BLAKE3 of the source bytes as stored, so a job's record pins its data.
//! 3. Which samples are held out depends on (seed, count, fraction) only.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;

use super::permutation::Permutation;
use super::random::Purpose;

/// Pixels on one side of an image.
pub const IMAGE_SIDE: usize = 8;
/// Features of a sample: the pixels, row by row.
pub const FEATURES: usize = IMAGE_SIDE * IMAGE_SIDE;
/// Classes a label can name.
pub const CLASSES: usize = 10;
/// The largest pixel value; images are scaled by it to 0..=1.
pub const PIXEL_MAX: f32 = 16.0;
/// The name by which a job asks for [`EMBEDDED_DIGITS`].
pub const DIGITS: &str = "digits";
/// The handwritten digits that come with this crate; provenance in `data/README.md`.
pub const EMBEDDED_DIGITS: &[u8] = include_bytes!("../../data/digits.csv.gz");

/// Bound on the text of a data set, compressed or not. It becomes about twice this in memory, which
/// every trainer holds; a small gzip file can otherwise expand without limit.
const TEXT_BYTES_MAX: u64 = 256 << 20;
const COLUMNS: usize = FEATURES + 1;

/// Why a data set could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file is absent or cannot be read.
    #[error(
        "cannot read data file {file}: {source}; give a path that exists on the worker, or \"digits\""
    )]
    Unreadable {
        /// The file.
        file: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The name says gzip, the bytes do not.
    #[error("{file} is named .gz but does not begin like a gzip file; rename or compress it")]
    NotGzip {
        /// The file.
        file: String,
    },
    /// The compressed stream is cut short or damaged.
    #[error(
        "{file}:{line}: the gzip stream is truncated or damaged here ({reason}); copy the file again"
    )]
    Truncated {
        /// The file.
        file: String,
        /// Line of the text at which the stream broke.
        line: usize,
        /// What the decoder said.
        reason: String,
    },
    /// More text than a data set may have.
    #[error("{file} holds more than {limit} bytes of text, the limit for one data set; split it")]
    TooLarge {
        /// The file.
        file: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// No line at all.
    #[error("{file} holds no samples; each line needs 64 pixels and a label")]
    Empty {
        /// The file.
        file: String,
    },
    /// A line that is not UTF-8 text.
    #[error("{file}:{line}: not text; each line needs 64 pixels and a label, separated by commas")]
    NotText {
        /// The file.
        file: String,
        /// The line.
        line: usize,
    },
    /// A line with too few or too many columns.
    #[error(
        "{file}:{line}: {found} columns where {expected} are needed (64 pixels, then the label)"
    )]
    ColumnCount {
        /// The file.
        file: String,
        /// The line.
        line: usize,
        /// Columns found.
        found: usize,
        /// Columns needed.
        expected: usize,
    },
    /// A value that is not a number, or a label that is not a whole one.
    #[error("{file}:{line}: column {column} is {text:?}, not a {wanted}")]
    NotANumber {
        /// The file.
        file: String,
        /// The line.
        line: usize,
        /// The column, counted from 1.
        column: usize,
        /// The text found.
        text: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A value outside its range.
    #[error("{file}:{line}: column {column} is {text}, outside 0 to {high}")]
    OutOfRange {
        /// The file.
        file: String,
        /// The line.
        line: usize,
        /// The column, counted from 1.
        column: usize,
        /// The text found.
        text: String,
        /// The largest value allowed.
        high: u32,
    },
}

/// Samples in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Where the samples came from, as errors name it.
    pub source: String,
    /// BLAKE3, in hex, of the source's bytes. A part of a data set keeps its whole's digest.
    pub digest: String,
    /// `len() * 64` pixels scaled to 0..=1, sample by sample.
    pub images: Vec<f32>,
    /// One label a sample.
    pub labels: Vec<u8>,
}

/// A data set in its two parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// The samples trained on.
    pub train: Dataset,
    /// The samples that only evaluation sees.
    pub held_out: Dataset,
}

impl Dataset {
    /// Loads what a job names: `"digits"` for the embedded set, otherwise a path.
    pub fn load(name: &str) -> Result<Self, DataError> {
        if name == DIGITS {
            Self::digits()
        } else {
            Self::from_path(Path::new(name))
        }
    }

    /// The embedded handwritten digits.
    pub fn digits() -> Result<Self, DataError> {
        Self::from_bytes("digits.csv.gz", EMBEDDED_DIGITS)
    }

    /// Loads a `.csv` or `.csv.gz` file.
    pub fn from_path(path: &Path) -> Result<Self, DataError> {
        let file = path.display().to_string();
        let unreadable = |source| DataError::Unreadable {
            file: file.clone(),
            source,
        };
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|source| source.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes))
            .map_err(unreadable)?;
        Self::from_bytes(&file, &bytes)
    }

    /// Loads from bytes; `file` names them in errors, and its ending `.gz` says that they are compressed.
    pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<Self, DataError> {
        let decompressed;
        let text = if file.ends_with(".gz") {
            decompressed = decompress(file, bytes)?;
            &decompressed[..]
        } else {
            bytes
        };
        if text.len() as u64 > TEXT_BYTES_MAX {
            return Err(DataError::TooLarge {
                file: file.to_owned(),
                limit: TEXT_BYTES_MAX,
            });
        }
        let mut dataset = Self {
            source: file.to_owned(),
            digest: blake3::hash(bytes).to_hex().to_string(),
            images: Vec::new(),
            labels: Vec::new(),
        };
        let body = text.strip_suffix(b"\n").unwrap_or(text);
        if body.is_empty() {
            return Err(DataError::Empty {
                file: file.to_owned(),
            });
        }
        for (index, line) in body.split(|byte| *byte == b'\n').enumerate() {
            dataset.push_line(file, index + 1, line)?;
        }
        Ok(dataset)
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The pixels of one sample.
    ///
    /// # Panics
    /// If `index` is not below [`Dataset::len`].
    pub fn image(&self, index: usize) -> &[f32] {
        &self.images[index * FEATURES..(index + 1) * FEATURES]
    }

    /// The samples at `indices`, in that order. Panics as [`Dataset::image`] does.
    pub fn gather(&self, indices: &[usize]) -> (Vec<f32>, Vec<u8>) {
        let mut images = Vec::with_capacity(indices.len() * FEATURES);
        for &index in indices {
            images.extend_from_slice(self.image(index));
        }
        (
            images,
            indices.iter().map(|&index| self.labels[index]).collect(),
        )
    }

    /// The part of this data set at `indices`. Panics as [`Dataset::image`] does.
    pub fn part(&self, indices: &[usize]) -> Self {
        let (images, labels) = self.gather(indices);
        Self {
            source: self.source.clone(),
            digest: self.digest.clone(),
            images,
            labels,
        }
    }

    /// Splits off the last `held_out_fraction` of a seeded permutation; both parts keep file order.
    /// Each part gets at least one sample when there are two.
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

    fn push_line(&mut self, file: &str, line: usize, bytes: &[u8]) -> Result<(), DataError> {
        let text = std::str::from_utf8(bytes)
            .map_err(|_| DataError::NotText {
                file: file.to_owned(),
                line,
            })?
            .trim_end_matches('\r');
        let found = if text.is_empty() {
            0
        } else {
            text.split(',').count()
        };
        if found != COLUMNS {
            let file = file.to_owned();
            return Err(DataError::ColumnCount {
                file,
                line,
                found,
                expected: COLUMNS,
            });
        }
        for (index, cell) in text.split(',').map(str::trim).enumerate() {
            let column = index + 1;
            let not_a_number = |wanted| DataError::NotANumber {
                file: file.to_owned(),
                line,
                column,
                text: shortened(cell),
                wanted,
            };
            let out_of_range = |high| DataError::OutOfRange {
                file: file.to_owned(),
                line,
                column,
                text: shortened(cell),
                high,
            };
            if column < COLUMNS {
                let pixel: f32 = cell.parse().map_err(|_| not_a_number("number"))?;
                if !(0.0..=PIXEL_MAX).contains(&pixel) {
                    return Err(out_of_range(PIXEL_MAX as u32));
                }
                self.images.push(pixel / PIXEL_MAX);
            } else {
                let label: i64 = cell.parse().map_err(|_| not_a_number("whole number"))?;
                let known = u8::try_from(label)
                    .ok()
                    .filter(|label| usize::from(*label) < CLASSES);
                self.labels
                    .push(known.ok_or_else(|| out_of_range(CLASSES as u32 - 1))?);
            }
        }
        Ok(())
    }
}

/// At most 32 characters of a cell, so that a damaged file cannot fill a log line.
fn shortened(cell: &str) -> String {
    cell.chars().take(32).collect()
}

fn decompress(file: &str, bytes: &[u8]) -> Result<Vec<u8>, DataError> {
    if !bytes.starts_with(&[0x1f, 0x8b]) && !bytes.is_empty() {
        return Err(DataError::NotGzip {
            file: file.to_owned(),
        });
    }
    let mut text = Vec::new();
    let read = MultiGzDecoder::new(bytes)
        .take(TEXT_BYTES_MAX + 1)
        .read_to_end(&mut text);
    read.map_err(|error| DataError::Truncated {
        file: file.to_owned(),
        line: text.iter().filter(|byte| **byte == b'\n').count() + 1,
        reason: error.to_string(),
    })?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good_line(label: &str) -> String {
        format!("{}{label}\n", "3,".repeat(FEATURES))
    }

    #[test]
    fn the_embedded_digits_load() {
        let digits = Dataset::digits().unwrap();
        assert_eq!((digits.len(), digits.images.len()), (1797, 1797 * FEATURES));
        assert_eq!(digits.labels[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(
            digits.image(0)[2..6],
            [5.0 / 16.0, 13.0 / 16.0, 9.0 / 16.0, 1.0 / 16.0]
        );
        assert_eq!(
            digits.digest,
            blake3::hash(EMBEDDED_DIGITS).to_hex().as_str()
        );
        assert_eq!(digits, Dataset::load(DIGITS).unwrap().clone());
    }

    #[test]
    fn bad_input_names_file_and_line() {
        let two = good_line("1") + &good_line("2");
        let cases = [
            (String::new(), "a.csv holds no samples"),
            ("\n".into(), "a.csv holds no samples"),
            (format!("{two}1,2\n"), "a.csv:3: 2 columns where 65"),
            (format!("{two}\n{two}"), "a.csv:3: 0 columns where 65"),
            (format!("{two}4,{}", good_line("1")), "a.csv:3: 66 columns"),
            (
                two.replacen('3', "x", 1),
                "a.csv:1: column 1 is \"x\", not a number",
            ),
            (
                format!("{two}{}", good_line("seven")),
                "a.csv:3: column 65 is \"seven\", not a whole",
            ),
            (
                good_line("1.5"),
                "a.csv:1: column 65 is \"1.5\", not a whole number",
            ),
            (good_line("10"), "a.csv:1: column 65 is 10, outside 0 to 9"),
            (
                two.replacen('3', "17", 1),
                "a.csv:1: column 1 is 17, outside 0 to 16",
            ),
            (
                two.replacen('3', "-1", 1),
                "a.csv:1: column 1 is -1, outside 0 to 16",
            ),
            (
                two.replacen('3', "NaN", 1),
                "a.csv:1: column 1 is NaN, outside 0 to 16",
            ),
        ];
        for (text, expected) in cases {
            let error = Dataset::from_bytes("a.csv", text.as_bytes())
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let error = Dataset::from_bytes("a.csv", b"3,\xff\n")
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("a.csv:1: not text"), "{error}");
    }

    #[test]
    fn absent_truncated_and_mislabelled_files_are_named() {
        let missing = Dataset::load("/nonexistent/digits.csv")
            .unwrap_err()
            .to_string();
        assert!(
            missing.starts_with("cannot read data file /nonexistent/digits.csv: "),
            "{missing}"
        );
        let cut = &EMBEDDED_DIGITS[..EMBEDDED_DIGITS.len() / 2];
        let error = Dataset::from_bytes("cut.csv.gz", cut).unwrap_err();
        let DataError::Truncated { line, .. } = &error else {
            panic!("{error}")
        };
        assert!((400..1797).contains(line), "{error}");
        let mut flipped = EMBEDDED_DIGITS.to_vec();
        let last = flipped.len() - 6;
        flipped[last] ^= 1;
        let error = Dataset::from_bytes("flipped.csv.gz", &flipped).unwrap_err();
        assert!(matches!(error, DataError::Truncated { .. }), "{error}");
        let error = Dataset::from_bytes("plain.csv.gz", good_line("1").as_bytes()).unwrap_err();
        assert!(matches!(error, DataError::NotGzip { .. }), "{error}");
        let error = Dataset::from_bytes("none.csv.gz", b"").unwrap_err();
        assert!(error.to_string().contains("none.csv.gz"), "{error}");
    }

    #[test]
    fn plain_text_with_or_without_a_final_newline_loads() {
        let text = good_line("1") + &good_line("2");
        let with = Dataset::from_bytes("a.csv", text.as_bytes()).unwrap();
        let without = Dataset::from_bytes("a.csv", text.trim_end().as_bytes()).unwrap();
        let windows = Dataset::from_bytes("a.csv", text.replace('\n', "\r\n").as_bytes()).unwrap();
        assert_eq!(with.labels, [1, 2]);
        assert_eq!(
            (&with.images, &with.images),
            (&without.images, &windows.images)
        );
    }

    #[test]
    fn the_split_is_seeded_and_covers_each_sample_once() {
        let digits = Dataset::digits().unwrap();
        let split = digits.split(7, 0.2);
        assert_eq!((split.train.len(), split.held_out.len()), (1438, 359));
        assert_eq!(split, digits.split(7, 0.2));
        assert_ne!(split.held_out, digits.split(8, 0.2).held_out);
        let count = |set: &Dataset, label| set.labels.iter().filter(|l| **l == label).count();
        for label in 0..10 {
            let parts = count(&split.train, label) + count(&split.held_out, label);
            assert_eq!(parts, count(&digits, label));
        }
    }
}
