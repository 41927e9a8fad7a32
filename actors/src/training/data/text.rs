//! Text, byte by byte: each byte is a token, so every text can be read and none needs a vocabulary.

use serde::{Deserialize, Serialize};

use super::error::DataError;
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

/// The windows of a text.
pub(super) fn cut(
    source: &str,
    text: Vec<u8>,
    context: usize,
) -> Result<(SampleShape, Rows), DataError> {
    let shape = SampleShape::Tokens {
        context,
        vocabulary: BYTE_VOCABULARY,
    };
    let shape = checked_shape(source, shape)?;
    if text.len() <= context {
        return Err(DataError::Misfit {
            file: source.to_owned(),
            reason: format!(
                "its {} bytes do not fill one window of {context} and the byte after it; give \
                 more text or a smaller `context`",
                text.len()
            ),
        });
    }
    Ok((shape, Rows::Tokens { text, context }))
}
