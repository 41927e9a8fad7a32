//! The Open Inference Protocol (KServe V2) as values and bytes, without any transport.
//!
//! 1. Decoding is total: any bytes give a value or a typed error that names the tensor, what was expected and what came.
//! 2. A [`Tensor`] that left this module's decoders or [`Tensor::new`] has exactly as many elements as its shape says.
//! 3. Nothing is allocated from a size a client merely claims; only bytes that are there are copied.
//!
//! Reading order: `tensor` (types and data), `message` (requests, responses, metadata), `json` and `binary` (the two
//! forms of tensor data), `codec` (whole bodies), `validate` (against a model), `classify`, `repository`, `explain`, `decode_error`, `error`.

mod binary;
mod classify;
mod codec;
mod decode_error;
mod error;
mod explain;
mod json;
mod message;
mod repository;
mod tensor;
mod validate;

pub use binary::{tensor_bytes, tensor_of_bytes};
pub use classify::classify;
pub(super) use codec::wrong_parameter;
pub use codec::{
    CLASSIFICATION, EncodedBody, decode_raw_request, decode_request, decode_response,
    encode_request, encode_response,
};
pub use error::{DecodeError, EncodeError, OipError, ValidateError};
pub use explain::{EXPLAIN, Explanation, is_asked};
pub use message::{
    InferRequest, InferResponse, ModelMetadata, Parameter, Parameters, RequestedOutput,
    ServerMetadata, TensorMetadata,
};
pub use repository::{IndexRequest, ModelState, RepositoryEntry};
pub use tensor::{Datatype, Tensor, TensorData};
pub use validate::{ID_BYTES_MAX, validate_request};

#[cfg(test)]
#[path = "property_tests.rs"]
mod property_tests;
