//! What can go wrong with a request, and the HTTP status each of it has.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use super::decode_error::DecodeError;
use super::tensor::Datatype;

/// Why a response has no JSON form.
#[derive(Clone, Debug, Error, PartialEq, Serialize, Deserialize)]
pub enum EncodeError {
    /// JSON has no NaN or infinity.
    #[error(
        "tensor {tensor:?}: element {index} is {got}, which JSON cannot carry: ask for binary_data"
    )]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The element's place.
        index: u64,
        /// The value.
        got: String,
    },
    /// JSON strings are UTF-8.
    #[error(
        "tensor {tensor:?}: BYTES element {index} is not UTF-8, which JSON cannot carry: ask for binary_data"
    )]
    NotUtf8 {
        /// The tensor.
        tensor: String,
        /// The element's place.
        index: u64,
    },
    /// The datatype has no JSON form.
    #[error("tensor {tensor:?}: {datatype} data travels only in binary form: ask for binary_data")]
    BinaryOnly {
        /// The tensor.
        tensor: String,
        /// The datatype.
        datatype: Datatype,
    },
    /// The output's values cannot be ordered.
    #[error(
        "tensor {tensor:?}: {datatype} has no classes, they are for integers, FP32 and FP64: leave parameters.classification \
         out"
    )]
    NoClasses {
        /// The tensor.
        tensor: String,
        /// The datatype.
        datatype: Datatype,
    },
    /// The model did not give an output its metadata promises.
    #[error("output {output:?} was asked for but the model did not produce it")]
    MissingOutput {
        /// The output.
        output: String,
    },
}

/// Why a request does not fit a model. All of it is the client's to mend (400).
#[derive(Clone, Debug, Error, PartialEq, Serialize, Deserialize)]
pub enum ValidateError {
    /// The number of inputs is wrong; names say which are missing.
    #[error("model {model:?}: input {input:?} is missing, expected {expected:?}")]
    MissingInput {
        /// The model.
        model: String,
        /// The missing input.
        input: String,
        /// All inputs of the model.
        expected: Vec<String>,
    },
    /// The model has no input of that name.
    #[error("model {model:?}: unexpected input {input:?}, expected {expected:?}")]
    UnknownInput {
        /// The model.
        model: String,
        /// The name given.
        input: String,
        /// All inputs of the model.
        expected: Vec<String>,
    },
    /// An input or output is given twice.
    #[error("model {model:?}: tensor {tensor:?} is given twice")]
    Duplicate {
        /// The model.
        model: String,
        /// The name given twice.
        tensor: String,
    },
    /// The model has no output of that name.
    #[error("model {model:?}: unexpected output {output:?}, expected one of {expected:?}")]
    UnknownOutput {
        /// The model.
        model: String,
        /// The name given.
        output: String,
        /// All outputs of the model.
        expected: Vec<String>,
    },
    /// The element type is another.
    #[error("model {model:?}: input {input:?} has datatype {got}, expected {expected}")]
    Datatype {
        /// The model.
        model: String,
        /// The input.
        input: String,
        /// The model's type.
        expected: Datatype,
        /// The request's type.
        got: Datatype,
    },
    /// A dimension differs or their number does.
    #[error(
        "model {model:?}: input {input:?} has shape {got:?}, expected {expected:?} (-1 is any size)"
    )]
    Shape {
        /// The model.
        model: String,
        /// The input.
        input: String,
        /// The model's shape.
        expected: Vec<i64>,
        /// The request's shape.
        got: Vec<u64>,
    },
    /// The batch is empty or too large.
    #[error(
        "model {model:?}: input {input:?} has batch size {got}, expected 1 to {max_batch_size}"
    )]
    BatchSize {
        /// The model.
        model: String,
        /// The input.
        input: String,
        /// The model's limit.
        max_batch_size: u32,
        /// The request's rows.
        got: u64,
    },
    /// Two inputs have different batch sizes.
    #[error(
        "model {model:?}: input {input:?} has batch size {got}, expected {expected} as in the other inputs"
    )]
    UnequalBatch {
        /// The model.
        model: String,
        /// The input.
        input: String,
        /// The first input's rows.
        expected: u64,
        /// This input's rows.
        got: u64,
    },
    /// The client's name for the request is too long.
    #[error(
        "the request's id has {got_bytes} bytes, the limit is {limit_bytes}: send a shorter one"
    )]
    IdTooLong {
        /// Bytes of the id.
        got_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
}

/// The failure of a call, with its HTTP status.
#[derive(Clone, Debug, Error, PartialEq, Serialize, Deserialize)]
pub enum OipError {
    /// The body is not a request.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The request does not fit the model.
    #[error(transparent)]
    Validate(#[from] ValidateError),
    /// The response cannot take the form asked for.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The token is absent or wrong.
    #[error("missing or wrong token: send the header Authorization: Bearer <token>")]
    Unauthorized,
    /// No endpoint serves that model.
    #[error("unknown model {model:?}: `mobula serve list` shows the endpoints that exist")]
    UnknownModel {
        /// The name asked for.
        model: String,
    },
    /// The model does not serve that version.
    #[error("model {model:?} does not serve version {version:?}, it serves {served:?}")]
    UnknownVersion {
        /// The model.
        model: String,
        /// The version asked for.
        version: String,
        /// The versions served.
        served: Vec<String>,
    },
    /// No such address.
    #[error("nothing is served at {path}: GET /v2 describes this server")]
    UnknownPath {
        /// The path asked for.
        path: String,
    },
    /// The address exists but not with this verb.
    #[error("{method} is not allowed on {path}")]
    MethodNotAllowed {
        /// The verb.
        method: String,
        /// The path.
        path: String,
    },
    /// The repository is not changed by way of an endpoint.
    #[error("a repository's models are not changed through an endpoint: {instead}")]
    RepositoryFixed {
        /// What to do instead.
        instead: String,
    },
    /// The body, or what it inflates to, is too large.
    #[error("the request body exceeds the limit of {limit_bytes} bytes: send smaller batches")]
    BodyTooLarge {
        /// The limit.
        limit_bytes: u64,
    },
    /// The body did not arrive whole.
    #[error("the request body could not be read: {reason}")]
    BodyUnreadable {
        /// What the connection said.
        reason: String,
    },
    /// The body is compressed in an unknown way.
    #[error("content encoding {encoding:?} is not supported, expected gzip, deflate or identity")]
    UnsupportedEncoding {
        /// The encoding named.
        encoding: String,
    },
    /// The model is known but nothing can answer for it now; retrying later can help.
    #[error("model {model:?} is not ready: {reason}")]
    NotReady {
        /// The model.
        model: String,
        /// Why, and what is awaited.
        reason: String,
    },
    /// The server answers but cannot serve yet; retrying later can help.
    #[error("the server is not ready: {reason}")]
    ServerNotReady {
        /// Why, and what is awaited.
        reason: String,
    },
    /// The queue is full: the request was not executed and may be sent again.
    #[error(
        "overloaded: {queued} requests wait, the queue holds {limit}; retry after a pause or add replicas"
    )]
    Overloaded {
        /// Requests waiting.
        queued: u64,
        /// The queue's bound.
        limit: u64,
    },
    /// The server stops: the request was not executed and may be sent again.
    #[error("shutting down: the request was not executed, send it again")]
    ShuttingDown,
    /// The replica was lost after it got the request: whether it was executed is unknown; inference can be repeated.
    #[error("the replica was lost while it held the request, the outcome is unknown: {reason}")]
    ReplicaLost {
        /// What is known.
        reason: String,
    },
    /// The model failed on the request.
    #[error("inference failed: {reason}")]
    Failed {
        /// The model's words.
        reason: String,
    },
    /// The body did not arrive in time.
    #[error(
        "the request body did not arrive within {limit_ms} ms: send smaller batches, or look at the connection"
    )]
    BodyTimeout {
        /// The limit, in milliseconds.
        limit_ms: u64,
    },
    /// More requests a second than the endpoint takes: not executed.
    #[error(
        "the endpoint takes {per_second} requests a second: send the request again in {retry_after_ms} ms, or raise the limit with `mobula serve scale --rate-limit`"
    )]
    RateLimited {
        /// The limit.
        per_second: u32,
        /// When the next request is taken, in milliseconds.
        retry_after_ms: u64,
    },
    /// The queue would take longer than the request waits: not executed, so it may be sent again.
    #[error(
        "the queue would take {wait_ms} ms and the request waits {limit_ms} ms: it was not executed; retry after a pause, allow more time, or add replicas"
    )]
    WouldBeLate {
        /// How long it would take, in milliseconds.
        wait_ms: u64,
        /// How long the request waits, in milliseconds.
        limit_ms: u64,
    },
    /// The request's own deadline has passed: whether it was executed is unknown.
    #[error(
        "no answer within the {limit_ms} ms that the request allows: allow more, or add replicas"
    )]
    DeadlineExceeded {
        /// What the request allows, in milliseconds.
        limit_ms: u64,
    },
    /// The inputs are more than a call to a replica carries, however few rows they are.
    #[error(
        "the inputs have {size_bytes} bytes, the limit is {limit_bytes}: send fewer rows, or smaller ones"
    )]
    InputTooLarge {
        /// What the inputs take, in bytes.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// More requests a second than are taken with the caller's token: not executed.
    #[error(
        "{per_second} requests a second are taken with token {token:?}: send the request again in {retry_after_ms} ms, or ask for a token with a higher rate"
    )]
    TokenRateLimited {
        /// The token's name.
        token: String,
        /// The limit.
        per_second: u32,
        /// When the next request is taken, in milliseconds.
        retry_after_ms: u64,
    },
    /// A node of a graph failed on the request.
    #[error("graph {graph:?}, node {node:?}: {error}")]
    Node {
        /// The graph.
        graph: String,
        /// The node.
        node: String,
        /// What it said.
        error: Box<OipError>,
    },
    /// The endpoints of a graph do not fit together.
    #[error(
        "graph {graph:?} does not fit together: {reason}; mend it with `mobula serve graph change`"
    )]
    GraphMisfit {
        /// The graph.
        graph: String,
        /// What does not fit.
        reason: String,
    },
    /// No such request is kept: it came to another server, is too old, or never was.
    #[error(
        "no request {id:?} is kept here: answers are kept for ten minutes, send the request again"
    )]
    UnknownResult {
        /// The id asked for.
        id: String,
    },
    /// There is no room to keep an answer: the request was executed, and may be sent again.
    #[error(
        "the answers that nobody has fetched take {limit_bytes} bytes, the limit: fetch some, or send the request again later"
    )]
    ResultsFull {
        /// The limit.
        limit_bytes: u64,
    },
    /// A row of the request is no input for the model: not executed.
    #[error("row {row} of the request is refused: {reason}")]
    RowRefused {
        /// Which one, from 0.
        row: u64,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The time of a request to a graph has passed: whether what has not answered was executed is unknown.
    #[error(
        "graph {graph:?}: no answer from nodes {nodes:?} within {limit_ms} ms: allow more with the parameter `timeout`, or add replicas to their endpoints"
    )]
    NodesLate {
        /// The graph.
        graph: String,
        /// The nodes that have not answered, whether they were asked or wait for one that was.
        nodes: Vec<String>,
        /// What the request allows, or what one takes that does not say, in milliseconds.
        limit_ms: u64,
    },
}

impl OipError {
    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::Encode(EncodeError::MissingOutput { .. })
            | Self::Failed { .. }
            | Self::GraphMisfit { .. } => 500,
            // The model that was asked for is there, and one that it is made of is not.
            Self::Node { error, .. } if error.status() == 404 => 503,
            Self::Node { error, .. } => error.status(),
            Self::Decode(_)
            | Self::Validate(_)
            | Self::Encode(_)
            | Self::BodyUnreadable { .. }
            | Self::RowRefused { .. }
            | Self::RepositoryFixed { .. } => 400,
            Self::Unauthorized => 401,
            Self::UnknownModel { .. }
            | Self::UnknownVersion { .. }
            | Self::UnknownPath { .. }
            | Self::UnknownResult { .. } => 404,
            Self::MethodNotAllowed { .. } => 405,
            Self::BodyTimeout { .. } => 408,
            Self::BodyTooLarge { .. } | Self::InputTooLarge { .. } => 413,
            Self::UnsupportedEncoding { .. } => 415,
            Self::RateLimited { .. } | Self::TokenRateLimited { .. } => 429,
            Self::DeadlineExceeded { .. } | Self::NodesLate { .. } => 504,
            Self::NotReady { .. }
            | Self::ServerNotReady { .. }
            | Self::Overloaded { .. }
            | Self::WouldBeLate { .. }
            | Self::ShuttingDown
            | Self::ResultsFull { .. }
            | Self::ReplicaLost { .. } => 503,
        }
    }

    /// Whether the same request may succeed later without being changed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.status(), 429 | 503)
    }

    /// Where there was no room for a request: after how long there may be.
    #[must_use]
    pub fn want_of_room(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after_ms, .. }
            | Self::TokenRateLimited { retry_after_ms, .. } => {
                Some(Duration::from_millis(*retry_after_ms))
            }
            Self::Overloaded { .. } | Self::WouldBeLate { .. } => {
                Some(Duration::from_secs(self.retry_after_s()))
            }
            Self::Node { error, .. } => error.want_of_room(),
            _ => None,
        }
    }

    /// After how many whole seconds the same request may succeed.
    #[must_use]
    pub fn retry_after_s(&self) -> u64 {
        match self {
            Self::RateLimited { retry_after_ms, .. }
            | Self::TokenRateLimited { retry_after_ms, .. } => {
                retry_after_ms.div_ceil(1_000).max(1)
            }
            _ => 1,
        }
    }
}
