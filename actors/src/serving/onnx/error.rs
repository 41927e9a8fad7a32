//! What can be wrong with a model.

use super::ONNX_BYTES_MAX;
use crate::serving::limited::Unready;

/// Why a file is no model that can be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OnnxError {
    /// Larger than what is allowed.
    #[error(
        "the ONNX file has {size_bytes} bytes, the limit is {ONNX_BYTES_MAX}: use a smaller model"
    )]
    TooLarge {
        /// Its size.
        size_bytes: u64,
    },
    /// The bytes are no model.
    #[error("not an ONNX model: {0}; export it again")]
    Malformed(String),
    /// More nodes than are looked at.
    #[error("the graph has more than {limit} nodes: use a smaller model")]
    TooManyNodes {
        /// The limit.
        limit: usize,
    },
    /// Operators that the engine does not have.
    #[error(
        "the graph uses operators that are not supported: {}; export it with others, or with another opset",
        operators.join(", ")
    )]
    Operators {
        /// Their names.
        operators: Vec<String>,
    },
    /// A constant is not what it claims.
    #[error("the constant {name:?} {reason}; export the model again")]
    Constant {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A constant lies in another file.
    #[error(
        "the constant {name:?} lies in another file, and a version has one: export the model with its weights inside"
    )]
    ExternalData {
        /// Its name.
        name: String,
    },
    /// An input or output that cannot be served.
    #[error("the {kind} {name:?} {reason}")]
    Tensor {
        /// `input` or `output`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The graph does not fit together.
    #[error("the graph cannot be computed: {0}")]
    Graph(String),
    /// It failed on values.
    #[error("the model failed: {0}")]
    Run(String),
    /// The engine panicked.
    #[error("the engine gave up on the model: {0}")]
    Panicked(String),
    /// It was not ready in time.
    #[error(transparent)]
    Unready(Unready),
    /// What the file's description says is not what the graph computes.
    #[error(
        "the version says that it takes and gives {said}, the graph has {found}: register the model again"
    )]
    Described {
        /// What the description says.
        said: String,
        /// What was found.
        found: String,
    },
}

impl From<Unready> for OnnxError {
    fn from(unready: Unready) -> Self {
        match unready {
            Unready::Panicked(text) => OnnxError::Panicked(text),
            unready => OnnxError::Unready(unready),
        }
    }
}
