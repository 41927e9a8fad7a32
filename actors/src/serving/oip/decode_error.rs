//! What can be wrong with the bytes of a request or response.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::tensor::Datatype;

/// Why bytes are not a request or response. All of it is the sender's to mend (400).
#[derive(Clone, Debug, Error, PartialEq, Serialize, Deserialize)]
pub enum DecodeError {
    /// The JSON part does not parse or lacks a field.
    #[error("malformed inference JSON: {reason}")]
    Json {
        /// The parser's words, with line and column.
        reason: String,
    },
    /// `Inference-Header-Content-Length` is no number or points past the body.
    #[error(
        "Inference-Header-Content-Length {got:?} must be a number of bytes up to the body's {body_bytes}"
    )]
    HeaderLength {
        /// The value of the header.
        got: String,
        /// The length of the (uncompressed) body.
        body_bytes: u64,
    },
    /// The datatype has no such name.
    #[error(
        "tensor {tensor:?}: unknown datatype {got:?}, expected one of BOOL, UINT8-64, INT8-64, FP16, BF16, FP32, FP64, BYTES"
    )]
    UnknownDatatype {
        /// The tensor.
        tensor: String,
        /// The name given.
        got: String,
    },
    /// The shape's dimensions overflow.
    #[error("tensor {tensor:?}: shape {shape:?} has more elements than can be counted")]
    ShapeTooLarge {
        /// The tensor.
        tensor: String,
        /// The shape given.
        shape: Vec<u64>,
    },
    /// The shape and the number of elements disagree.
    #[error("tensor {tensor:?}: shape {shape:?} holds {expected} elements, got {got}")]
    ElementCount {
        /// The tensor.
        tensor: String,
        /// The shape given.
        shape: Vec<u64>,
        /// Elements by the shape.
        expected: u64,
        /// Elements found.
        got: u64,
    },
    /// An element is not of the datatype or out of its range.
    #[error("tensor {tensor:?}: element {index} is {got}, expected {datatype}")]
    Element {
        /// The tensor.
        tensor: String,
        /// The element's place, row-major.
        index: u64,
        /// The element.
        got: String,
        /// The datatype declared.
        datatype: Datatype,
    },
    /// BF16 has no JSON form.
    #[error(
        "tensor {tensor:?}: {datatype} data travels only in binary form, set parameters.binary_data_size"
    )]
    BinaryOnly {
        /// The tensor.
        tensor: String,
        /// The datatype declared.
        datatype: Datatype,
    },
    /// A tensor has neither `data` nor `binary_data_size`.
    #[error("tensor {tensor:?}: expected either data or parameters.binary_data_size, got neither")]
    NoData {
        /// The tensor.
        tensor: String,
    },
    /// A tensor has both.
    #[error("tensor {tensor:?}: expected either data or parameters.binary_data_size, got both")]
    TwoKindsOfData {
        /// The tensor.
        tensor: String,
    },
    /// The declared size is not what the shape takes.
    #[error(
        "tensor {tensor:?}: {datatype} of shape {shape:?} takes {expected} bytes, binary_data_size is {got}"
    )]
    BinarySize {
        /// The tensor.
        tensor: String,
        /// The datatype declared.
        datatype: Datatype,
        /// The shape declared.
        shape: Vec<u64>,
        /// Bytes by datatype and shape.
        expected: u64,
        /// Bytes declared.
        got: u64,
    },
    /// The body ends before the tensor does.
    #[error("tensor {tensor:?}: binary_data_size is {expected} bytes, the body has {got} left")]
    BodyTooShort {
        /// The tensor.
        tensor: String,
        /// Bytes declared.
        expected: u64,
        /// Bytes left.
        got: u64,
    },
    /// Bytes are left after the last tensor.
    #[error("{got} bytes are left after the last binary tensor, expected none")]
    BodyTooLong {
        /// Bytes left.
        got: u64,
    },
    /// A BYTES element claims more than there is.
    #[error("tensor {tensor:?}: BYTES element {index} claims {expected} bytes, {got} are left")]
    BytesElement {
        /// The tensor.
        tensor: String,
        /// The element's place.
        index: u64,
        /// Bytes claimed, the length prefix included where it is cut off.
        expected: u64,
        /// Bytes left.
        got: u64,
    },
    /// A parameter has a type the protocol does not allow there.
    #[error("parameter {name:?}: expected {expected}, got {got}")]
    Parameter {
        /// The parameter.
        name: String,
        /// The type expected.
        expected: String,
        /// The JSON found.
        got: String,
    },
    /// The request uses an extension this server does not advertise.
    #[error("{feature} is not supported here: see extensions of GET /v2")]
    Unsupported {
        /// The extension.
        feature: String,
    },
    /// A raw request (header length 0) does not determine the input.
    #[error(
        "a raw binary body needs a model with one input of at most one open dimension that {got} bytes fill: {reason}"
    )]
    RawInput {
        /// Bytes in the body.
        got: u64,
        /// What stands against it.
        reason: String,
    },
}
