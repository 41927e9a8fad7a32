//! Between the protocol's gRPC messages and its values.

use std::collections::BTreeMap;

use super::super::oip::{
    CLASSIFICATION, Datatype, DecodeError, EncodeError, InferRequest, InferResponse, ModelMetadata,
    Parameter, Parameters, RepositoryEntry, RequestedOutput, Tensor, TensorData, TensorMetadata,
    tensor_bytes, tensor_of_bytes,
};
use super::super::statistics::{BatchTimes, DurationCount, ModelStatistics};
use super::proto;
use super::proto::infer_parameter::ParameterChoice;
use super::proto::model_infer_request::InferInputTensor;

/// A request's values.
pub(super) fn request(message: proto::ModelInferRequest) -> Result<InferRequest, DecodeError> {
    let raw = message.raw_input_contents;
    let inputs = if raw.is_empty() {
        let typed = message.inputs.into_iter().map(typed_tensor);
        typed.collect::<Result<_, _>>()?
    } else {
        let count = (raw.len(), message.inputs.len());
        if count.0 != count.1 {
            return Err(DecodeError::Parameter {
                name: "raw_input_contents".to_owned(),
                expected: format!("one for each of the {} inputs, or none", count.1),
                got: count.0.to_string(),
            });
        }
        let both = message.inputs.into_iter().zip(raw);
        both.map(|(input, bytes)| raw_tensor(&input, &bytes))
            .collect::<Result<_, _>>()?
    };
    let outputs = message.outputs.into_iter().map(|mut output| {
        Ok(RequestedOutput {
            name: output.name,
            binary_data: Some(true),
            classes: classes(&mut output.parameters)?,
            parameters: parameters(output.parameters)?,
        })
    });
    Ok(InferRequest {
        id: (!message.id.is_empty()).then_some(message.id),
        parameters: parameters(message.parameters)?,
        inputs,
        outputs: outputs.collect::<Result<_, _>>()?,
        binary_data_output: true,
        routing_key: None,
        explain: false,
        token: None,
        headers: BTreeMap::new(),
        low_priority: false,
    })
}

/// How many classes of an output are wanted.
fn classes(
    parameters: &mut BTreeMap<String, proto::InferParameter>,
) -> Result<Option<u64>, DecodeError> {
    let Some(asked) = parameters.remove(CLASSIFICATION) else {
        return Ok(None);
    };
    let classes = match &asked.parameter_choice {
        Some(ParameterChoice::Int64Param(classes)) => u64::try_from(*classes).ok(),
        Some(ParameterChoice::Uint64Param(classes)) => Some(*classes),
        _ => None,
    };
    let wrong = || DecodeError::Parameter {
        name: CLASSIFICATION.to_owned(),
        expected: "a whole number from 1 on".to_owned(),
        got: format!("{:?}", asked.parameter_choice),
    };
    classes
        .filter(|classes| *classes > 0)
        .map(Some)
        .ok_or_else(wrong)
}

fn parameters(
    message: impl IntoIterator<Item = (String, proto::InferParameter)>,
) -> Result<Parameters, DecodeError> {
    let read = |(name, value): (String, proto::InferParameter)| {
        let value = match value.parameter_choice {
            Some(ParameterChoice::BoolParam(value)) => Parameter::Bool(value),
            Some(ParameterChoice::Int64Param(value)) => Parameter::Int(value),
            Some(ParameterChoice::Uint64Param(value)) => match i64::try_from(value) {
                Ok(value) => Parameter::Int(value),
                Err(_) => Parameter::Float(value as f64),
            },
            Some(ParameterChoice::DoubleParam(value)) => Parameter::Float(value),
            Some(ParameterChoice::StringParam(value)) => Parameter::String(value),
            None => {
                return Err(DecodeError::Parameter {
                    name,
                    expected: "a value".to_owned(),
                    got: "none".to_owned(),
                });
            }
        };
        Ok((name, value))
    };
    message.into_iter().map(read).collect()
}

fn shape_and_type(input: &InferInputTensor) -> Result<(Vec<u64>, Datatype), DecodeError> {
    let size = |size: &i64| {
        u64::try_from(*size).map_err(|_| DecodeError::Parameter {
            name: format!("shape of tensor {:?}", input.name),
            expected: "sizes from 0 on".to_owned(),
            got: size.to_string(),
        })
    };
    let datatype = Datatype::from_name(&input.datatype);
    let datatype = datatype.ok_or_else(|| DecodeError::UnknownDatatype {
        tensor: input.name.clone(),
        got: input.datatype.clone(),
    })?;
    let shape: Result<Vec<u64>, DecodeError> = input.shape.iter().map(size).collect();
    Ok((shape?, datatype))
}

fn raw_tensor(input: &InferInputTensor, bytes: &[u8]) -> Result<Tensor, DecodeError> {
    if input.contents.is_some() {
        return Err(DecodeError::TwoKindsOfData {
            tensor: input.name.clone(),
        });
    }
    let (shape, datatype) = shape_and_type(input)?;
    tensor_of_bytes(&input.name, datatype, shape, bytes)
}

fn typed_tensor(input: InferInputTensor) -> Result<Tensor, DecodeError> {
    let (shape, datatype) = shape_and_type(&input)?;
    let name = input.name;
    let contents = input.contents.ok_or_else(|| DecodeError::NoData {
        tensor: name.clone(),
    })?;
    let proto::InferTensorContents {
        bool_contents,
        int_contents,
        int64_contents,
        uint_contents,
        uint64_contents,
        fp32_contents,
        fp64_contents,
        bytes_contents,
    } = contents;
    let data = match datatype {
        Datatype::Bool => TensorData::Bool(bool_contents),
        Datatype::Int8 => TensorData::Int8(narrowed(&name, datatype, int_contents)?),
        Datatype::Int16 => TensorData::Int16(narrowed(&name, datatype, int_contents)?),
        Datatype::Int32 => TensorData::Int32(int_contents),
        Datatype::Int64 => TensorData::Int64(int64_contents),
        Datatype::Uint8 => TensorData::Uint8(narrowed(&name, datatype, uint_contents)?),
        Datatype::Uint16 => TensorData::Uint16(narrowed(&name, datatype, uint_contents)?),
        Datatype::Uint32 => TensorData::Uint32(uint_contents),
        Datatype::Uint64 => TensorData::Uint64(uint64_contents),
        Datatype::Fp32 => TensorData::Fp32(fp32_contents),
        Datatype::Fp64 => TensorData::Fp64(fp64_contents),
        Datatype::Bytes => TensorData::Bytes(bytes_contents),
        Datatype::Fp16 | Datatype::Bf16 => {
            let tensor = name;
            return Err(DecodeError::BinaryOnly { tensor, datatype });
        }
    };
    Tensor::new(name, shape, data)
}

/// Numbers of a type that has no field of its own.
fn narrowed<W, N>(tensor: &str, datatype: Datatype, wide: Vec<W>) -> Result<Vec<N>, DecodeError>
where
    W: Copy + std::fmt::Display,
    N: TryFrom<W>,
{
    let narrow = |(index, value): (usize, W)| {
        N::try_from(value).map_err(|_| DecodeError::Element {
            tensor: tensor.to_owned(),
            index: index as u64,
            got: value.to_string(),
            datatype,
        })
    };
    wide.into_iter().enumerate().map(narrow).collect()
}

/// The message of an answer with the outputs that were `wanted`, all of them if none was named.
pub(super) fn response(
    response: InferResponse,
    id: String,
    wanted: &[RequestedOutput],
) -> Result<proto::ModelInferResponse, EncodeError> {
    let InferResponse {
        model_name,
        model_version,
        parameters,
        outputs,
        ..
    } = response;
    let outputs: Vec<&Tensor> = if wanted.is_empty() {
        outputs.iter().collect()
    } else {
        let find = |wanted: &RequestedOutput| {
            let found = outputs.iter().find(|output| output.name() == wanted.name);
            found.ok_or_else(|| EncodeError::MissingOutput {
                output: wanted.name.clone(),
            })
        };
        wanted.iter().map(find).collect::<Result<_, _>>()?
    };
    let described = outputs
        .iter()
        .map(|output| proto::model_infer_response::InferOutputTensor {
            name: output.name().to_owned(),
            datatype: output.datatype().name().to_owned(),
            shape: output.shape().iter().map(|size| *size as i64).collect(),
            ..Default::default()
        });
    Ok(proto::ModelInferResponse {
        model_name,
        model_version,
        id,
        parameters: parameters.into_iter().map(parameter).collect(),
        outputs: described.collect(),
        raw_output_contents: outputs
            .iter()
            .map(|output| tensor_bytes(output.data()))
            .collect(),
    })
}

pub(super) fn parameter((name, value): (String, Parameter)) -> (String, proto::InferParameter) {
    let choice = match value {
        Parameter::Bool(value) => ParameterChoice::BoolParam(value),
        Parameter::Int(value) => ParameterChoice::Int64Param(value),
        Parameter::Float(value) => ParameterChoice::DoubleParam(value),
        Parameter::String(value) => ParameterChoice::StringParam(value),
    };
    let value = proto::InferParameter {
        parameter_choice: Some(choice),
    };
    (name, value)
}

/// The entry of a model in the repository's index.
pub(super) fn entry(entry: RepositoryEntry) -> proto::repository_index_response::ModelIndex {
    proto::repository_index_response::ModelIndex {
        name: entry.name,
        version: entry.version,
        state: entry.state.name().to_owned(),
        reason: entry.reason,
    }
}

/// The answer to a metadata request.
pub(super) fn metadata(metadata: ModelMetadata) -> proto::ModelMetadataResponse {
    let tensor = |tensor: TensorMetadata| proto::model_metadata_response::TensorMetadata {
        name: tensor.name,
        datatype: tensor.datatype.name().to_owned(),
        shape: tensor.shape,
    };
    proto::ModelMetadataResponse {
        name: metadata.name,
        versions: metadata.versions,
        platform: metadata.platform,
        inputs: metadata.inputs.into_iter().map(tensor).collect(),
        outputs: metadata.outputs.into_iter().map(tensor).collect(),
    }
}

/// The answer to a configuration request; its `dims` leave the batch dimension out.
pub(super) fn config(metadata: &ModelMetadata) -> proto::ModelConfig {
    let batch_dimensions = usize::from(metadata.max_batch_size > 0);
    let dims = |tensor: &TensorMetadata| {
        let dims = tensor.shape.get(batch_dimensions..);
        dims.unwrap_or_default().to_vec()
    };
    let data_type = |tensor: &TensorMetadata| {
        let name = tensor.datatype.config_name();
        let found = proto::DataType::from_str_name(&name);
        found.unwrap_or(proto::DataType::TypeInvalid).into()
    };
    let inputs = metadata.inputs.iter().map(|tensor| proto::ModelInput {
        name: tensor.name.clone(),
        data_type: data_type(tensor),
        dims: dims(tensor),
    });
    let outputs = metadata.outputs.iter().map(|tensor| proto::ModelOutput {
        name: tensor.name.clone(),
        data_type: data_type(tensor),
        dims: dims(tensor),
    });
    proto::ModelConfig {
        name: metadata.name.clone(),
        platform: metadata.platform.clone(),
        backend: "mobula".to_owned(),
        max_batch_size: i32::try_from(metadata.max_batch_size).unwrap_or(i32::MAX),
        input: inputs.collect(),
        output: outputs.collect(),
    }
}

fn duration(counted: DurationCount) -> Option<proto::StatisticDuration> {
    Some(proto::StatisticDuration {
        count: counted.count,
        ns: counted.ns,
    })
}

impl ModelStatistics {
    /// The same for gRPC.
    pub(super) fn to_proto(&self, name: String, version: String) -> proto::ModelStatistics {
        let batch = |(rows, times): (&u64, &BatchTimes)| proto::InferBatchStatistics {
            batch_size: *rows,
            compute_input: duration(times.compute_input),
            compute_infer: duration(times.compute_infer),
            compute_output: duration(times.compute_output),
        };
        proto::ModelStatistics {
            name,
            version,
            last_inference: self.last_inference_unix_ms,
            inference_count: self.inference_count,
            execution_count: self.execution_count,
            inference_stats: Some(proto::InferStatistics {
                success: duration(self.success),
                fail: duration(self.fail),
                queue: duration(self.queue),
                compute_input: duration(self.compute_input),
                compute_infer: duration(self.compute_infer),
                compute_output: duration(self.compute_output),
                cache_hit: duration(self.cache_hit),
                cache_miss: duration(self.cache_miss),
            }),
            batch_stats: self.batches.iter().map(batch).collect(),
        }
    }
}
