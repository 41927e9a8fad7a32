//! What a request of the protocol asks an endpoint's model: rows, and for how long.

use std::time::Duration;

use super::endpoint_service::{INPUT, TIMEOUT};
use super::oip::{Datatype, DecodeError, InferRequest, OipError, Parameter, Tensor, TensorData};

/// How long the caller waits: the parameter `timeout`, in microseconds as Triton has it; 0 is for ever.
pub(super) fn time_limit(request: &InferRequest) -> Result<Option<Duration>, OipError> {
    match request.parameters.get(TIMEOUT) {
        None | Some(Parameter::Int(0)) => Ok(None),
        Some(Parameter::Int(micros)) if *micros > 0 => {
            Ok(Some(Duration::from_micros(micros.unsigned_abs())))
        }
        Some(other) => Err(OipError::Decode(DecodeError::Parameter {
            name: TIMEOUT.to_owned(),
            got: other.to_json().to_string(),
            expected: "a number of microseconds".to_owned(),
        })),
    }
}

/// The rows of a request that fits the metadata.
pub(super) fn rows_of(request: InferRequest, row_values: usize) -> Result<Vec<Vec<f32>>, OipError> {
    let input = request.inputs.into_iter().next().map(Tensor::into_data);
    let Some(TensorData::Fp32(values)) = input else {
        return Err(OipError::Failed {
            reason: format!("the input {INPUT:?} is not FP32"),
        });
    };
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        // Only binary data can hold such values; the answer would be no number either.
        return Err(OipError::Decode(DecodeError::Element {
            tensor: INPUT.to_owned(),
            index: index as u64,
            got: values[index].to_string(),
            datatype: Datatype::Fp32,
        }));
    }
    Ok(values
        .chunks_exact(row_values)
        .map(<[f32]>::to_vec)
        .collect())
}
