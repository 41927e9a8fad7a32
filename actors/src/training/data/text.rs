//! Text, byte by byte: each byte is a token, so every text can be read and none needs a vocabulary.
//!
//! Invariant: windows are read from the files as they are needed. A file that was written to since the data set was
//! loaded is not read any more.

use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::opened::Bytes;
use super::rows::Rows;
use super::shape::SampleShape;
use super::table::checked_shape;

/// Tokens of a text: the values of a byte.
pub const BYTE_VOCABULARY: usize = 256;

/// Text files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextSpec {
    /// The files, read one after the other as one text: paths, or `store:` and the path of a blob.
    pub files: Vec<String>,
    /// How many bytes a model sees at a time.
    pub context: usize,
}

/// Files that are one text, one after the other.
#[derive(Debug, Default)]
pub(super) struct Text {
    files: Vec<Part>,
    size_bytes: u64,
}

/// A file of a text.
#[derive(Debug)]
struct Part {
    file: String,
    bytes: Bytes,
    /// Where it begins in the text.
    first: u64,
}

impl Text {
    /// Adds a file at the end.
    pub(super) fn push(&mut self, file: &str, bytes: Bytes) {
        let first = self.size_bytes;
        self.size_bytes += bytes.size_bytes();
        self.files.push(Part {
            file: file.to_owned(),
            bytes,
            first,
        });
    }

    /// Whether windows are read from a file each time.
    pub(super) fn is_read_late(&self) -> bool {
        self.files.iter().any(|part| part.bytes.is_file())
    }

    /// How many windows there are, each with `context` bytes and the one after them.
    pub(super) fn window_count(&self, context: usize) -> usize {
        (self.size_bytes.saturating_sub(1) / context as u64) as usize
    }

    /// The windows of these numbers, each of which must exist.
    pub(super) fn windows(&self, numbers: &[u64], context: usize) -> Result<Vec<u32>, DataError> {
        let mut windows = Vec::with_capacity(numbers.len() * (context + 1));
        let mut window = vec![0; context + 1];
        for number in numbers {
            self.read_at(&mut window, number * context as u64)?;
            windows.extend(window.iter().copied().map(u32::from));
        }
        Ok(windows)
    }

    /// Fills `buffer` from `offset` on, from as many files as it takes.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DataError> {
        let (mut rest, mut at) = (buffer, offset);
        // Of files that begin here all but the last are empty.
        let first = self.files.partition_point(|part| part.first <= at);
        for part in &self.files[first.saturating_sub(1)..] {
            let within = at - part.first;
            let there = part.bytes.size_bytes().saturating_sub(within);
            let count = there.min(rest.len() as u64) as usize;
            let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
            if !now.is_empty() {
                part.bytes.read_at(&part.file, now, within)?;
            }
            (rest, at) = (later, at + count as u64);
            if rest.is_empty() {
                break;
            }
        }
        Ok(())
    }
}

/// The windows of a text.
pub(super) fn cut(
    source: &str,
    text: Text,
    context: usize,
) -> Result<(SampleShape, Rows), DataError> {
    let shape = SampleShape::Tokens {
        context,
        vocabulary: BYTE_VOCABULARY,
    };
    let shape = checked_shape(source, shape)?;
    if text.size_bytes <= context as u64 {
        return Err(DataError::Misfit {
            file: source.to_owned(),
            reason: format!(
                "its {} bytes do not fill one window of {context} and the byte after it; give \
                 more text or a smaller `context`",
                text.size_bytes
            ),
        });
    }
    Ok((shape, Rows::Tokens { text, context }))
}
