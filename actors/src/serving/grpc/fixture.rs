//! What the callers of tests send by gRPC.

use tonic::Request;
use tonic::metadata::MetadataValue;

use super::proto::ModelInferRequest;
use super::proto::model_infer_request::InferInputTensor;
use crate::serving::signature::INPUT;

/// A call with the token `secret`.
pub(in crate::serving) fn with_token<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let token = MetadataValue::from_static("Bearer secret");
    request.metadata_mut().insert("authorization", token);
    request
}

/// A row of two features for the endpoint `digits`.
pub(in crate::serving) fn row_for_digits() -> ModelInferRequest {
    ModelInferRequest {
        model_name: "digits".to_owned(),
        inputs: vec![InferInputTensor {
            name: INPUT.to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 2],
            ..Default::default()
        }],
        raw_input_contents: vec![vec![0_u8; 8].into()],
        ..Default::default()
    }
}
