//! What can be wrong with data: each error names the file, the place, what is there, the limit and
//! what to do.

use std::io;
use std::path::PathBuf;

use mobula_storage::blob::BlobError;

/// Why a data set could not be loaded or read.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file is absent or cannot be read.
    #[error(
        "cannot read data file {file}: {source}; give a path that exists on every worker, ship it \
         with the job, or name a blob of the cluster's store as store:<path>"
    )]
    Unreadable {
        /// The file.
        file: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file was written to while it was in use.
    #[error(
        "data file {file} was changed after it had been loaded: what it holds is not what the job began with; put \
         the old bytes back and start the job again, or train another job on a file of another name"
    )]
    Changed {
        /// The file.
        file: String,
    },
    /// A file of the object store cannot be read.
    #[error("cannot read data file store:{file}: {source}")]
    Store {
        /// The blob.
        file: String,
        /// What the store said.
        source: BlobError,
    },
    /// There is no object store here.
    #[error(
        "store:{file} names a blob, and this process knows no object store; train on a cluster"
    )]
    NoStore {
        /// The blob.
        file: String,
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
    /// More bytes than a data set may have on a trainer's disk.
    #[error(
        "with {file} the data set takes more than {limit} bytes of each trainer's disk, the limit for what is unpacked or \
         copied there; train on fewer rows, or give .npy or .safetensors files that every worker has, which are read \
         where they lie"
    )]
    TooLarge {
        /// The file.
        file: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// What is unpacked or copied cannot be written to this machine's disk, or not be read again.
    #[error(
        "the {bytes} bytes of {file} that go to a file in {} cannot be kept there: {source}; free space there, or name \
         a folder with more of it by TMPDIR",
        folder.display()
    )]
    Scratch {
        /// The data file, or the data set.
        file: String,
        /// Where its copy is.
        folder: PathBuf,
        /// Bytes of the copy, as far as they are known.
        bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// A line that is longer than a sample can be.
    #[error(
        "{file}:{line}: the line has more than {limit} bytes, the limit; put each sample on a line of its own, or give \
         larger ones as .npy or .safetensors files"
    )]
    LongLine {
        /// The file.
        file: String,
        /// The line.
        line: usize,
        /// The limit in bytes.
        limit: u64,
    },
    /// No sample at all.
    #[error("{file} holds no samples; {wanted}")]
    Empty {
        /// The file.
        file: String,
        /// What it should hold.
        wanted: &'static str,
    },
    /// A line that is not UTF-8 text.
    #[error("{file}:{line}: not text; each line needs numbers separated by commas")]
    NotText {
        /// The file.
        file: String,
        /// The line.
        line: usize,
    },
    /// A line with too few or too many columns.
    #[error(
        "{file}:{line}: {found} columns where {expected} are needed{why}; mend the line or say \
         what the columns are with `shape`"
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
        /// Where that number comes from.
        why: String,
    },
    /// A value that is not a number, or a label that is not a whole one.
    #[error("{file}:{line}: column {column} is {text:?}, not a {wanted}")]
    NotANumber {
        /// The file.
        file: String,
        /// The line, or the row of a table, from 1.
        line: usize,
        /// The column, counted from 1.
        column: usize,
        /// The text found.
        text: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A value that is no number to compute with.
    #[error(
        "{file}: row {row}, value {column}: {value} is not finite; remove the row or fill the \
         value in"
    )]
    NotFinite {
        /// The file.
        file: String,
        /// The row, or the line of a text, from 1.
        row: usize,
        /// The value in it, from 1.
        column: usize,
        /// What is there.
        value: f32,
    },
    /// A label that no class has.
    #[error(
        "{file}: row {row}: label {label} is outside 0 to {high}; correct the label, or raise \
         `classes` above it"
    )]
    Label {
        /// The file.
        file: String,
        /// The row, or the line of a text, from 1.
        row: usize,
        /// What is there.
        label: i64,
        /// The largest label allowed.
        high: u64,
    },
    /// The description does not fit the data.
    #[error("{file}: {reason}")]
    Misfit {
        /// The file.
        file: String,
        /// What does not fit, and what to do.
        reason: String,
    },
}

impl DataError {
    /// Whether the same may succeed later without anybody changing job or data.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, DataError::Store { source, .. } if source.retry_may_help())
    }
}
