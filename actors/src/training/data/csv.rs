//! Numbers in text, a sample a line, separated by commas; the last columns are what to predict.
//!
//! Invariant: a file is taken whole, or refused with file, line (counted from 1) and column.

use std::io::Read;

use flate2::read::MultiGzDecoder;
use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::files::FILE_BYTES_MAX;
use super::table::{Table, TableSpec, Wanted};

/// CSV files: numbers only, and what is to be predicted in the last column (or columns).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CsvSpec {
    /// The files, in order: paths, or `store:` and the path of a blob. `.gz` is read too.
    pub files: Vec<String>,
    /// Whether the first line of each file names its columns.
    #[serde(default)]
    pub header: bool,
    /// The dimensions of a sample's numbers, whose product is the number of columns before the
    /// last; absent: just so many numbers.
    #[serde(default)]
    pub shape: Option<Vec<usize>>,
    /// How many classes there are; absent: one more than the largest label.
    #[serde(default)]
    pub classes: Option<usize>,
    /// How many columns at the end are numbers to be predicted; absent: the last one is a class.
    #[serde(default)]
    pub targets: Option<usize>,
    /// The numbers of a sample are divided by this; absent: 1.
    #[serde(default)]
    pub scale: Option<f64>,
}

impl CsvSpec {
    /// The table that such files hold.
    pub(super) fn table(&self) -> TableSpec {
        TableSpec {
            shape: self.shape.clone(),
            classes: self.classes,
            targets: self.targets,
            scale: self.scale,
        }
    }
}

/// Adds the lines of a file to `table`.
pub(super) fn read(
    file: &str,
    bytes: &[u8],
    header: bool,
    table: &mut Table,
) -> Result<(), DataError> {
    let decompressed;
    let text = if file.ends_with(".gz") {
        decompressed = decompress(file, bytes)?;
        &decompressed[..]
    } else {
        bytes
    };
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(DataError::TooLarge {
            file: file.to_owned(),
            limit: FILE_BYTES_MAX,
        });
    }
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let lines = body.split(|byte| *byte == b'\n').enumerate();
    let mut found = false;
    for (index, line) in lines.skip(usize::from(header)) {
        if body.is_empty() {
            break;
        }
        found = true;
        push_line(file, index + 1, line, table)?;
    }
    if !found {
        return Err(DataError::Empty {
            file: file.to_owned(),
            wanted: "each line is a sample: its numbers, then its label",
        });
    }
    Ok(())
}

fn push_line(file: &str, line: usize, bytes: &[u8], table: &mut Table) -> Result<(), DataError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| DataError::NotText {
            file: file.to_owned(),
            line,
        })?
        .trim_end_matches('\r');
    let columns = match text {
        "" => 0,
        _ => text.split(',').count(),
    };
    table.begin_row(file, line, columns)?;
    for (index, cell) in text.split(',').map(str::trim).enumerate() {
        let not = |wanted| DataError::NotANumber {
            file: file.to_owned(),
            line,
            column: index + 1,
            text: shortened(cell),
            wanted,
        };
        match table.wanted(index) {
            Wanted::Number => {
                let value: f32 = cell.parse().map_err(|_| not("number"))?;
                table.push_number(file, line, index, value)?;
            }
            Wanted::Label => {
                let label: i64 = cell.parse().map_err(|_| not("whole number"))?;
                table.push_label(file, line, label)?;
            }
        }
    }
    Ok(())
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
        .take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut text);
    read.map_err(|error| DataError::Truncated {
        file: file.to_owned(),
        line: text.iter().filter(|byte| **byte == b'\n').count() + 1,
        reason: error.to_string(),
    })?;
    Ok(text)
}
