//! Whole bodies: a JSON part, then the raw bytes of the binary tensors in the JSON's order.
//!
//! The header `Inference-Header-Content-Length` gives the length of the JSON part and is present only if a tensor is
//! binary. Its value 0 means that the body is the bytes of the model's single input and there is no JSON at all.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::binary;
use super::error::{DecodeError, EncodeError};
use super::json::{FlatData, JsonData, check_encodable, to_tensor_data};
use super::message::{
    InferRequest, InferResponse, ModelMetadata, Parameter, Parameters, RequestedOutput,
};
use super::tensor::{Datatype, Tensor, TensorData};

/// Of an output: how many classes are wanted instead of its values.
pub const CLASSIFICATION: &str = "classification";

/// A body ready to send.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedBody {
    /// The value of `Inference-Header-Content-Length`; `None` when the body is JSON and nothing else.
    pub json_length: Option<usize>,
    /// The bytes.
    pub bytes: Vec<u8>,
}

#[derive(Deserialize)]
struct RequestJson {
    id: Option<String>,
    parameters: Option<BTreeMap<String, Value>>,
    inputs: Vec<TensorJson>,
    outputs: Option<Vec<OutputJson>>,
}

#[derive(Deserialize)]
struct ResponseJson {
    model_name: String,
    #[serde(default)]
    model_version: String,
    id: Option<String>,
    parameters: Option<BTreeMap<String, Value>>,
    outputs: Vec<TensorJson>,
}

#[derive(Deserialize)]
struct TensorJson {
    name: String,
    shape: Vec<u64>,
    datatype: String,
    parameters: Option<BTreeMap<String, Value>>,
    data: Option<FlatData>,
}

#[derive(Deserialize)]
struct OutputJson {
    name: String,
    parameters: Option<BTreeMap<String, Value>>,
}

/// Reads a request body; `json_length` is the header's value, if present and not 0 (see [`decode_raw_request`]).
///
/// # Errors
/// [`DecodeError`] for any body that is not exactly one request.
pub fn decode_request(
    body: &[u8],
    json_length: Option<usize>,
) -> Result<InferRequest, DecodeError> {
    let (json, tail) = split(body, json_length)?;
    let request: RequestJson = parse(json)?;
    let mut parameters = Params::read(request.parameters)?;
    let binary_data_output = parameters.take_bool("binary_data_output")?.unwrap_or(false);
    let inputs = decode_tensors(request.inputs, tail)?;
    let mut outputs = Vec::new();
    for output in request.outputs.unwrap_or_default() {
        let mut parameters = Params::read(output.parameters)?;
        let binary_data = parameters.take_bool("binary_data")?;
        let classes = parameters.take_size(CLASSIFICATION)?;
        let parameters = parameters.rest;
        outputs.push(RequestedOutput {
            name: output.name,
            binary_data,
            classes: classes.filter(|classes| *classes > 0),
            parameters,
        });
    }
    // An empty id is none, as in gRPC, whose texts are never absent.
    let id = request.id.filter(|id| !id.is_empty());
    let parameters = parameters.rest;
    Ok(InferRequest {
        id,
        parameters,
        inputs,
        outputs,
        binary_data_output,
        routing_key: None,
        explain: false,
        token: None,
        headers: BTreeMap::new(),
        low_priority: false,
    })
}

/// Reads a body without JSON (header value 0): the bytes of the model's only input. Its open dimension, if it has one,
/// is what the bytes fill; a BYTES input is one element, without a length. Outputs are wanted in binary form.
///
/// # Errors
/// [`DecodeError::RawInput`] when the model or the number of bytes leaves the shape open.
pub fn decode_raw_request(body: &[u8], model: &ModelMetadata) -> Result<InferRequest, DecodeError> {
    let refuse = |reason: String| DecodeError::RawInput {
        got: body.len() as u64,
        reason,
    };
    let [input] = model.inputs.as_slice() else {
        return Err(refuse(format!(
            "model {:?} has {} inputs",
            model.name,
            model.inputs.len()
        )));
    };
    let open = input
        .shape
        .iter()
        .filter(|dimension| **dimension < 0)
        .count();
    let fixed = |dimension: &i64| u64::try_from(*dimension).ok();
    let (shape, data) = match input.datatype.size_bytes() {
        None => {
            let shape = input
                .shape
                .iter()
                .map(|dimension| fixed(dimension).unwrap_or(1))
                .collect();
            (shape, TensorData::Bytes(vec![body.to_vec()]))
        }
        Some(size_bytes) => {
            if open > 1 {
                return Err(refuse(format!(
                    "input {:?} has {open} open dimensions",
                    input.name
                )));
            }
            let row_bytes = input
                .shape
                .iter()
                .filter_map(fixed)
                .try_fold(size_bytes as u64, |bytes, dimension| {
                    bytes.checked_mul(dimension)
                })
                .filter(|bytes| *bytes > 0);
            let rows = row_bytes.filter(|bytes| (body.len() as u64).is_multiple_of(*bytes));
            let Some(rows) = rows.map(|bytes| body.len() as u64 / bytes) else {
                let (name, shape) = (&input.name, &input.shape);
                return Err(refuse(format!(
                    "input {name:?} is {} of shape {shape:?}",
                    input.datatype
                )));
            };
            let shape: Vec<u64> = input
                .shape
                .iter()
                .map(|dimension| fixed(dimension).unwrap_or(rows))
                .collect();
            let data = binary::decode(&input.name, input.datatype, &shape, body)?;
            (shape, data)
        }
    };
    let inputs = vec![Tensor::new(&input.name, shape, data)?];
    Ok(InferRequest {
        inputs,
        binary_data_output: true,
        ..InferRequest::default()
    })
}

/// Reads a response body, as a client does.
///
/// # Errors
/// [`DecodeError`] for any body that is not exactly one response.
pub fn decode_response(
    body: &[u8],
    json_length: Option<usize>,
) -> Result<InferResponse, DecodeError> {
    let (json, tail) = split(body, json_length)?;
    let response: ResponseJson = parse(json)?;
    Ok(InferResponse {
        model_name: response.model_name,
        model_version: response.model_version,
        id: response.id,
        parameters: Params::read(response.parameters)?.rest,
        outputs: decode_tensors(response.outputs, tail)?,
        explanation: None,
    })
}

fn split(body: &[u8], json_length: Option<usize>) -> Result<(&[u8], &[u8]), DecodeError> {
    let length = json_length.unwrap_or(body.len());
    body.split_at_checked(length)
        .ok_or_else(|| DecodeError::HeaderLength {
            got: length.to_string(),
            body_bytes: body.len() as u64,
        })
}

fn parse<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, DecodeError> {
    serde_json::from_slice(json).map_err(|error| DecodeError::Json {
        reason: error.to_string(),
    })
}

fn decode_tensors(tensors: Vec<TensorJson>, mut tail: &[u8]) -> Result<Vec<Tensor>, DecodeError> {
    let mut decoded = Vec::with_capacity(tensors.len());
    for TensorJson {
        name,
        shape,
        datatype,
        parameters,
        data,
    } in tensors
    {
        let Some(datatype) = Datatype::from_name(&datatype) else {
            return Err(DecodeError::UnknownDatatype {
                tensor: name,
                got: datatype,
            });
        };
        let binary_size = Params::read(parameters)?.take_size("binary_data_size")?;
        let data = match (data, binary_size) {
            (None, None) => return Err(DecodeError::NoData { tensor: name }),
            (Some(_), Some(_)) => return Err(DecodeError::TwoKindsOfData { tensor: name }),
            (Some(flat), None) => to_tensor_data(&name, datatype, flat)?,
            (None, Some(size)) => {
                let at = usize::try_from(size).ok();
                let Some((bytes, rest)) = at.and_then(|at| tail.split_at_checked(at)) else {
                    let got = tail.len() as u64;
                    return Err(DecodeError::BodyTooShort {
                        tensor: name,
                        expected: size,
                        got,
                    });
                };
                tail = rest;
                binary::decode(&name, datatype, &shape, bytes)?
            }
        };
        decoded.push(Tensor::new(name, shape, data)?);
    }
    if !tail.is_empty() {
        return Err(DecodeError::BodyTooLong {
            got: tail.len() as u64,
        });
    }
    Ok(decoded)
}

/// A `parameters` object of which this codec takes what concerns it.
struct Params {
    rest: Parameters,
}

impl Params {
    fn read(json: Option<BTreeMap<String, Value>>) -> Result<Self, DecodeError> {
        let mut rest = Parameters::new();
        for (name, value) in json.unwrap_or_default() {
            // Ignoring these would answer something else than was asked.
            if name.starts_with("shared_memory_") {
                return Err(DecodeError::Unsupported {
                    feature: format!("parameter {name:?}"),
                });
            }
            let Some(parameter) = Parameter::from_json(&value) else {
                return Err(wrong_parameter(
                    &name,
                    "a string, number or boolean",
                    &value,
                ));
            };
            rest.insert(name, parameter);
        }
        Ok(Self { rest })
    }

    fn take_bool(&mut self, name: &str) -> Result<Option<bool>, DecodeError> {
        match self.rest.remove(name) {
            None => Ok(None),
            Some(Parameter::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_parameter(name, "a boolean", &other.to_json())),
        }
    }

    fn take_size(&mut self, name: &str) -> Result<Option<u64>, DecodeError> {
        let Some(parameter) = self.rest.remove(name) else {
            return Ok(None);
        };
        let size = match parameter {
            Parameter::Int(value) => u64::try_from(value).ok(),
            Parameter::Bool(_) | Parameter::Float(_) | Parameter::String(_) => None,
        };
        let size = size
            .ok_or_else(|| wrong_parameter(name, "a whole number from 0 on", &parameter.to_json()));
        size.map(Some)
    }
}

/// A parameter of another type, or with another value, than it may have.
pub(in crate::serving) fn wrong_parameter(name: &str, expected: &str, got: &Value) -> DecodeError {
    let mut got = got.to_string();
    // An error repeats enough to find the place, not a whole body.
    if let Some((at, _)) = got.char_indices().nth(60) {
        got.truncate(at);
        got.push('…');
    }
    DecodeError::Parameter {
        name: name.to_owned(),
        expected: expected.to_owned(),
        got,
    }
}

/// Writes a response as a request wants it: the outputs it names, in its order, each in its form.
///
/// # Errors
/// [`EncodeError`] when JSON cannot carry an output, or the response lacks one that was asked for.
pub fn encode_response(
    response: &InferResponse,
    request: &InferRequest,
) -> Result<EncodedBody, EncodeError> {
    let outputs: Vec<&Tensor> = if request.outputs.is_empty() {
        response.outputs.iter().collect()
    } else {
        let find = |requested: &RequestedOutput| {
            let tensor = response
                .outputs
                .iter()
                .find(|tensor| tensor.name() == requested.name);
            tensor.ok_or_else(|| EncodeError::MissingOutput {
                output: requested.name.clone(),
            })
        };
        request.outputs.iter().map(find).collect::<Result<_, _>>()?
    };
    let (tensors, tail) = encode_tensors(&outputs, |name| request.wants_binary(name))?;
    let envelope = ResponseEnvelope {
        model_name: &response.model_name,
        model_version: &response.model_version,
        id: response.id.as_deref(),
        parameters: json_parameters(&response.parameters),
        outputs: tensors,
    };
    Ok(assemble(&envelope, tail))
}

/// Writes a request as a client does, with every input in binary form or every input as JSON.
///
/// # Errors
/// [`EncodeError`] when JSON cannot carry an input.
pub fn encode_request(request: &InferRequest, binary: bool) -> Result<EncodedBody, EncodeError> {
    let inputs: Vec<&Tensor> = request.inputs.iter().collect();
    let (tensors, tail) = encode_tensors(&inputs, |_| binary)?;
    let mut parameters = json_parameters(&request.parameters).unwrap_or_default();
    if request.binary_data_output {
        parameters.insert("binary_data_output".to_owned(), Value::Bool(true));
    }
    let outputs = request.outputs.iter().map(|output| {
        let mut parameters = json_parameters(&output.parameters).unwrap_or_default();
        if let Some(binary_data) = output.binary_data {
            parameters.insert("binary_data".to_owned(), Value::Bool(binary_data));
        }
        if let Some(classes) = output.classes {
            parameters.insert(CLASSIFICATION.to_owned(), Value::from(classes));
        }
        OutputEnvelope {
            name: &output.name,
            parameters,
        }
    });
    let envelope = RequestEnvelope {
        id: request.id.as_deref(),
        parameters,
        inputs: tensors,
        outputs: outputs.collect(),
    };
    Ok(assemble(&envelope, tail))
}

#[derive(Serialize)]
struct ResponseEnvelope<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BTreeMap<String, Value>>,
    outputs: Vec<TensorEnvelope<'a>>,
}

#[derive(Serialize)]
struct RequestEnvelope<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    parameters: BTreeMap<String, Value>,
    inputs: Vec<TensorEnvelope<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    outputs: Vec<OutputEnvelope<'a>>,
}

#[derive(Serialize)]
struct TensorEnvelope<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: &'a [u64],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<JsonData<'a>>,
}

#[derive(Serialize)]
struct BinarySize {
    binary_data_size: usize,
}

#[derive(Serialize)]
struct OutputEnvelope<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    parameters: BTreeMap<String, Value>,
}

fn json_parameters(parameters: &Parameters) -> Option<BTreeMap<String, Value>> {
    let json = |(name, value): (&String, &Parameter)| (name.clone(), value.to_json());
    (!parameters.is_empty()).then(|| parameters.iter().map(json).collect())
}

/// The tail is `None` when no tensor is binary: a binary tensor may have no bytes and still needs the header.
fn encode_tensors<'a>(
    tensors: &[&'a Tensor],
    is_binary: impl Fn(&str) -> bool,
) -> Result<(Vec<TensorEnvelope<'a>>, Option<Vec<u8>>), EncodeError> {
    let mut tail: Option<Vec<u8>> = None;
    let mut envelopes = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let (parameters, data) = if is_binary(tensor.name()) {
            binary::encode(tensor.data(), tail.get_or_insert_default());
            let binary_data_size = binary::size_bytes(tensor.data());
            (Some(BinarySize { binary_data_size }), None)
        } else {
            check_encodable(tensor)?;
            (None, Some(JsonData(tensor.data())))
        };
        envelopes.push(TensorEnvelope {
            name: tensor.name(),
            datatype: tensor.datatype().name(),
            shape: tensor.shape(),
            parameters,
            data,
        });
    }
    Ok((envelopes, tail))
}

fn assemble(envelope: &impl Serialize, tail: Option<Vec<u8>>) -> EncodedBody {
    let mut bytes = serde_json::to_vec(envelope)
        .expect("string keys, and tensor data that was checked to be encodable");
    let json_length = tail.as_ref().map(|_| bytes.len());
    // One buffer, so that the whole body can leave in one write.
    bytes.extend(tail.unwrap_or_default());
    EncodedBody { json_length, bytes }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
