//! What can be wrong with an encoder, and with a text.

use crate::serving::limited::Unready;
use crate::serving::replica::RefusedRow;

/// Why files are no encoder that can be served, or why one gives no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncoderError {
    /// Larger than what is allowed.
    #[error("{file} has {size_bytes} bytes, the limit is {limit_bytes}: {remedy}")]
    TooLarge {
        /// Which file.
        file: &'static str,
        /// Its size.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// The file with the description of the network cannot be used.
    #[error("config.json {0}")]
    Config(String),
    /// The bytes are no weights.
    #[error("model.safetensors is cut off or no file of tensors: {0}; copy or save it again")]
    Malformed(String),
    /// A tensor that the network needs is not there.
    #[error("model.safetensors has no tensor {name:?}, which the network of config.json needs")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A tensor is not what the network needs.
    #[error("the tensor {name:?} {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer cannot be used.
    #[error("tokenizer.json {0}")]
    Tokenizer(String),
    /// A library panicked on the files.
    #[error("reading the files failed unexpectedly: {0}")]
    Panicked(String),
    /// It was not ready in time.
    #[error(transparent)]
    Unready(Unready),
    /// It failed on values.
    #[error("the encoder failed: {0}")]
    Run(String),
    /// Some texts are no input for it; the others would be answered.
    #[error("{}", listed(.0))]
    Rows(Vec<RefusedRow>),
    /// What the version's description says is not what the files are.
    #[error(
        "the version says that it takes and gives {said}, the encoder has {found}: register the model again"
    )]
    Described {
        /// What the description says.
        said: String,
        /// What was found.
        found: String,
    },
}

fn listed(rows: &[RefusedRow]) -> String {
    let one = |row: &RefusedRow| format!("row {}: {}", row.row, row.reason);
    rows.iter().map(one).collect::<Vec<_>>().join("; ")
}

impl From<Unready> for EncoderError {
    fn from(unready: Unready) -> Self {
        match unready {
            Unready::Panicked(text) => EncoderError::Panicked(text),
            unready => EncoderError::Unready(unready),
        }
    }
}
