//! Numbers in text, a sample a line, separated by commas; the last columns are what to predict.
//!
//! Invariants:
//! 1. A file is taken whole, or refused with file, line (counted from 1) and column.
//! 2. No more of it than a line is in memory at a time, beside the table.

use std::io::{self, BufRead, BufReader, Read};

use flate2::read::MultiGzDecoder;
use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::opened::data_error;
use super::table::{Table, TableSpec, Wanted};

/// Bytes that are read at once.
const READ_BYTES: usize = 1 << 17;

/// How a gzip file begins.
const MAGIC: [u8; 2] = [0x1f, 0x8b];

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

/// Adds the lines of a file to `table`: all that `stored` has, as it is stored.
pub(super) fn read(
    file: &str,
    mut stored: impl Read,
    header: bool,
    line_bytes_max: u64,
    table: &mut Table,
) -> Result<(), DataError> {
    if !is_gzip(file) {
        let text = BufReader::with_capacity(READ_BYTES, stored);
        return read_lines(file, text, header, line_bytes_max, table);
    }
    let mut start = Vec::new();
    stored
        .by_ref()
        .take(MAGIC.len() as u64)
        .read_to_end(&mut start)
        .map_err(|error| data_error(file, error))?;
    if start != MAGIC && !start.is_empty() {
        return Err(DataError::NotGzip {
            file: file.to_owned(),
        });
    }
    let text = MultiGzDecoder::new(start.as_slice().chain(stored));
    let text = BufReader::with_capacity(READ_BYTES, text);
    read_lines(file, text, header, line_bytes_max, table)
}

fn is_gzip(file: &str) -> bool {
    file.ends_with(".gz")
}

fn read_lines(
    file: &str,
    mut text: impl BufRead,
    header: bool,
    line_bytes_max: u64,
    table: &mut Table,
) -> Result<(), DataError> {
    let mut bytes = Vec::new();
    let mut found = false;
    for line in 1.. {
        let failed = |error| broken(file, line, error);
        bytes.clear();
        // One more, which is the end of the longest line.
        let mut limited = text.by_ref().take(line_bytes_max.saturating_add(1));
        if limited.read_until(b'\n', &mut bytes).map_err(failed)? == 0 {
            break;
        }
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        if bytes.len() as u64 > line_bytes_max {
            return Err(DataError::LongLine {
                file: file.to_owned(),
                line,
                limit: line_bytes_max,
            });
        }
        // The end of a line alone is a text without lines.
        if line == 1 && bytes.is_empty() && text.fill_buf().map_err(failed)?.is_empty() {
            break;
        }
        if line == 1 && header {
            continue;
        }
        found = true;
        push_line(file, line, &bytes, table)?;
    }
    if !found {
        return Err(DataError::Empty {
            file: file.to_owned(),
            wanted: "each line is a sample: its numbers, then its label",
        });
    }
    Ok(())
}

/// Why a line cannot be read: what is below says what is wrong with the file, the decoder what with its bytes.
fn broken(file: &str, line: usize, error: io::Error) -> DataError {
    match error.downcast::<DataError>() {
        Ok(known) => known,
        Err(error) if is_gzip(file) => DataError::Truncated {
            file: file.to_owned(),
            line,
            reason: error.to_string(),
        },
        Err(error) => data_error(file, error),
    }
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
