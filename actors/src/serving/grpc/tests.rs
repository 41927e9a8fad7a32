use futures::stream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};

use super::super::http::fixture::{BODY_LIMIT, Server, start};
use super::fixture::with_token;
use super::proto::grpc_inference_service_client::GrpcInferenceServiceClient;
use super::proto::infer_parameter::ParameterChoice;
use super::proto::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use super::proto::{
    InferTensorContents, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
};
use super::*;

type Client = GrpcInferenceServiceClient<Channel>;

async fn connect(server: &Server) -> Client {
    let endpoint = Endpoint::from_shared(server.base.clone()).unwrap();
    GrpcInferenceServiceClient::connect(endpoint).await.unwrap()
}

fn input(shape: &[i64], datatype: &str) -> InferInputTensor {
    InferInputTensor {
        name: "x".to_owned(),
        datatype: datatype.to_owned(),
        shape: shape.to_vec(),
        ..Default::default()
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

pub(super) fn raw(model: &str, values: &[f32]) -> ModelInferRequest {
    ModelInferRequest {
        model_name: model.to_owned(),
        id: "r1".to_owned(),
        inputs: vec![input(&[values.len() as i64 / 2, 2], "FP32")],
        raw_input_contents: vec![bytes_of(values).into()],
        ..Default::default()
    }
}

fn typed(values: &[f32]) -> ModelInferRequest {
    let mut request = raw("double", values);
    request.raw_input_contents.clear();
    request.inputs[0].contents = Some(InferTensorContents {
        fp32_contents: values.to_vec(),
        ..Default::default()
    });
    request
}

async fn infer(client: &mut Client, request: ModelInferRequest) -> ModelInferResponse {
    let answer = client.model_infer(with_token(request)).await;
    answer.unwrap().into_inner()
}

async fn refusal(client: &mut Client, request: ModelInferRequest) -> (Code, String) {
    let answer = client.model_infer(with_token(request)).await;
    let status = answer.expect_err("it is refused");
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn raw_and_typed_inputs_get_the_same_raw_outputs() {
    let server = start().await;
    let mut client = connect(&server).await;
    let values = [0.5, -1.0, 3.0, 4.0];
    let answer = infer(&mut client, raw("double", &values)).await;
    assert_eq!(
        (answer.model_name.as_str(), answer.model_version.as_str()),
        ("double", "1")
    );
    assert_eq!(answer.id, "r1");
    let shapes: Vec<(&str, &str, &[i64])> = answer
        .outputs
        .iter()
        .map(|output| (&*output.name, &*output.datatype, &*output.shape))
        .collect();
    assert_eq!(
        shapes,
        [("y", "FP32", &[2, 2][..]), ("text", "BYTES", &[2][..])]
    );
    assert_eq!(
        answer.raw_output_contents[0],
        bytes_of(&values.map(|v| v * 2.0))
    );
    assert!(answer.raw_output_contents[1].starts_with(&[7, 0, 0, 0]));
    assert_eq!(infer(&mut client, typed(&values)).await, answer);

    let mut one = raw("double", &values);
    one.outputs = vec![InferRequestedOutputTensor {
        name: "text".to_owned(),
        ..Default::default()
    }];
    let answer = infer(&mut client, one).await;
    assert_eq!(
        (answer.outputs.len(), &*answer.outputs[0].name),
        (1, "text")
    );
}

#[tokio::test]
async fn the_key_by_which_versions_are_chosen_is_a_header_here_too() {
    let server = start().await;
    let mut client = connect(&server).await;
    let mut request = with_token(raw("double", &[1.0, 2.0]));
    let key = MetadataValue::from_static("ann");
    request.metadata_mut().insert("x-mobula-key", key);
    let answer = client.model_infer(request).await.unwrap();
    // The service of these tests says it back as its version.
    assert_eq!(answer.get_ref().model_version, "ann");
}

#[tokio::test]
async fn the_descriptions_are_those_of_http() {
    let server = start().await;
    let mut client = connect(&server).await;
    let live = proto::ServerLiveRequest::default();
    assert!(
        client
            .server_live(with_token(live))
            .await
            .unwrap()
            .get_ref()
            .live
    );
    let ready = proto::ServerReadyRequest::default();
    assert!(
        client
            .server_ready(with_token(ready))
            .await
            .unwrap()
            .get_ref()
            .ready
    );
    let name = |name: &str| name.to_owned();
    for (model, expected) in [("double", true), ("down", false)] {
        let asked = proto::ModelReadyRequest {
            name: name(model),
            ..Default::default()
        };
        let answer = client.model_ready(with_token(asked)).await.unwrap();
        assert_eq!(answer.get_ref().ready, expected, "{model}");
    }
    let about = client
        .server_metadata(with_token(proto::ServerMetadataRequest::default()))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(about.extensions, ["binary_tensor_data"]);

    let asked = proto::ModelMetadataRequest {
        name: name("double"),
        ..Default::default()
    };
    let metadata = client.model_metadata(with_token(asked)).await.unwrap();
    let input = &metadata.get_ref().inputs[0];
    assert_eq!((&*input.datatype, &*input.shape), ("FP32", &[-1, 2][..]));
    let asked = proto::ModelConfigRequest {
        name: name("double"),
        ..Default::default()
    };
    let config = client.model_config(with_token(asked)).await.unwrap();
    let config = config.into_inner().config.unwrap();
    assert_eq!(config.max_batch_size, 4096);
    assert_eq!(config.input[0].dims, [2], "without the batch dimension");
    assert_eq!(config.input[0].data_type(), proto::DataType::TypeFp32);
    assert_eq!(config.output[1].data_type(), proto::DataType::TypeString);

    infer(&mut client, raw("double", &[1.0, 2.0])).await;
    let asked = proto::ModelStatisticsRequest {
        name: name("double"),
        ..Default::default()
    };
    let statistics = client.model_statistics(with_token(asked)).await.unwrap();
    let model = &statistics.get_ref().model_stats[0];
    assert_eq!((&*model.version, model.inference_count), ("1", 1));
    assert_eq!(model.inference_stats.unwrap().success.unwrap().count, 1);
}

#[tokio::test]
async fn what_http_refuses_is_refused_with_the_same_words_and_the_code_that_belongs() {
    let server = start().await;
    let mut client = connect(&server).await;
    let values = [1.0, 2.0];
    let changed = |change: fn(&mut ModelInferRequest)| {
        let mut request = raw("double", &values);
        change(&mut request);
        request
    };
    let cases = [
        (
            changed(|r| r.model_name = "none".into()),
            Code::NotFound,
            "unknown model",
        ),
        (
            changed(|r| r.model_version = "7".into()),
            Code::NotFound,
            "does not serve version",
        ),
        (
            changed(|r| r.inputs[0].name = "z".into()),
            Code::InvalidArgument,
            "unexpected input",
        ),
        (
            changed(|r| r.inputs[0].datatype = "FP64".into()),
            Code::InvalidArgument,
            "takes 16 bytes",
        ),
        (
            changed(|r| r.inputs[0].datatype = "F".into()),
            Code::InvalidArgument,
            "unknown datatype",
        ),
        (
            changed(|r| r.inputs[0].shape = vec![-1, 2]),
            Code::InvalidArgument,
            "sizes from 0 on",
        ),
        (
            changed(|r| r.inputs[0].shape = vec![2, 2]),
            Code::InvalidArgument,
            "takes 16 bytes",
        ),
        (
            changed(|r| r.raw_input_contents.clear()),
            Code::InvalidArgument,
            "got neither",
        ),
        (
            changed(|r| r.raw_input_contents.push(Default::default())),
            Code::InvalidArgument,
            "one for each of the 1 inputs",
        ),
        (
            changed(|r| r.inputs[0].contents = Some(Default::default())),
            Code::InvalidArgument,
            "got both",
        ),
        (
            changed(|r| r.model_name = "full".into()),
            Code::Unavailable,
            "overloaded",
        ),
    ];
    for (request, code, words) in cases {
        let (found, message) = refusal(&mut client, request).await;
        assert_eq!(found, code, "{message}");
        assert!(message.contains(words), "{message}");
    }
    let mut narrow = typed(&values);
    narrow.inputs[0].datatype = "INT8".to_owned();
    narrow.inputs[0].contents = Some(InferTensorContents {
        int_contents: vec![1, 200],
        ..Default::default()
    });
    let (_, message) = refusal(&mut client, narrow).await;
    assert!(
        message.contains("element 1 is 200, expected INT8"),
        "{message}"
    );
    let large = vec![0.0; BODY_LIMIT / 4 + 1];
    let (code, message) = refusal(&mut client, raw("double", &large)).await;
    assert_eq!(code, Code::OutOfRange, "{message}");

    let without = client
        .model_infer(raw("double", &values))
        .await
        .unwrap_err();
    assert_eq!(without.code(), Code::Unauthenticated);
    assert!(without.message().contains("Authorization"), "{without}");
}

#[tokio::test]
async fn a_stream_outlives_the_failure_of_a_request_and_keeps_their_order() {
    let server = start().await;
    let mut client = connect(&server).await;
    let mut requests: Vec<ModelInferRequest> = (0..40)
        .map(|number| {
            let mut request = raw("double", &[number as f32, 0.0]);
            request.id = number.to_string();
            request
        })
        .collect();
    requests[7].model_name = "none".to_owned();
    let answers = client
        .model_stream_infer(with_token(stream::iter(requests)))
        .await
        .unwrap()
        .into_inner();
    let answers: Vec<ModelStreamInferResponse> =
        answers.map(|answer| answer.unwrap()).collect().await;
    assert_eq!(answers.len(), 40);
    for (number, answer) in answers.into_iter().enumerate() {
        let response = answer.infer_response.unwrap();
        assert_eq!(response.id, number.to_string());
        let last = response.parameters.get(FINAL_RESPONSE);
        let last = last.and_then(|last| last.parameter_choice.clone());
        if number == 7 {
            assert_eq!(last, None);
            assert!(answer.error_message.contains("unknown model"));
            assert!(response.outputs.is_empty());
        } else {
            assert_eq!(last, Some(ParameterChoice::BoolParam(true)));
            assert_eq!(answer.error_message, "");
            let doubled = bytes_of(&[number as f32 * 2.0, 0.0]);
            assert_eq!(response.raw_output_contents[0], doubled);
        }
    }
}

#[tokio::test]
async fn the_repository_classes_and_explanations_are_those_of_http() {
    let server = start().await;
    let mut client = connect(&server).await;
    let index = proto::RepositoryIndexRequest {
        ready: true,
        ..Default::default()
    };
    let index = client.repository_index(with_token(index)).await.unwrap();
    let models = &index.get_ref().models;
    assert_eq!(models.len(), 1);
    assert_eq!((&*models[0].name, &*models[0].state), ("double", "READY"));
    let load = |model: &str| {
        with_token(proto::RepositoryModelLoadRequest {
            model_name: model.to_owned(),
            ..Default::default()
        })
    };
    client.repository_model_load(load("double")).await.unwrap();
    let status = client
        .repository_model_load(load("down"))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);

    let mut request = raw("double", &[1.0, 2.0]);
    let classes = |count| proto::InferParameter {
        parameter_choice: Some(proto::infer_parameter::ParameterChoice::Int64Param(count)),
    };
    let mut output = InferRequestedOutputTensor {
        name: "y".to_owned(),
        ..Default::default()
    };
    output
        .parameters
        .insert("classification".to_owned(), classes(1));
    request.outputs = vec![output];
    let mut call = with_token(request.clone());
    let wish = MetadataValue::from_static("true");
    call.metadata_mut().insert("x-mobula-explain", wish);
    let answer = client.model_infer(call).await.unwrap();
    assert_eq!(answer.metadata().get("x-mobula-digest").unwrap(), "d1");
    assert!(answer.metadata().contains_key("x-mobula-times-us"));
    assert_eq!(
        &answer.get_ref().raw_output_contents[0][..],
        b"\x0a\0\0\x004.000000:1"
    );
    let negative = classes(-1);
    request.outputs[0]
        .parameters
        .insert("classification".to_owned(), negative);
    let (code, words) = refusal(&mut client, request).await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(words.contains("classification"), "{words}");
}

#[tokio::test]
async fn an_id_is_bounded_here_too() {
    let server = start().await;
    let mut client = connect(&server).await;
    let mut request = raw("double", &[1.0, 2.0]);
    request.id = "i".repeat(2_000);
    let (code, message) = refusal(&mut client, request).await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.contains("the limit is 1024"), "{message}");
}

#[tokio::test]
async fn an_answer_may_be_larger_than_any_request() {
    let server = start().await;
    let mut client = connect(&server).await;
    // Four bytes become a text of fifteen.
    let values: Vec<f32> = (0..8_192).map(|value| value as f32 + 1e5).collect();
    let mut request = raw("double", &values);
    let classes = proto::InferParameter {
        parameter_choice: Some(ParameterChoice::Int64Param(2)),
    };
    request.outputs = vec![InferRequestedOutputTensor {
        name: "y".to_owned(),
        parameters: [("classification".to_owned(), classes)].into(),
    }];
    let answer = infer(&mut client, request.clone()).await;
    let bytes = answer.raw_output_contents[0].len();
    assert!(bytes > BODY_LIMIT, "{bytes}");

    let answers = client
        .model_stream_infer(with_token(stream::iter([request])))
        .await
        .unwrap()
        .into_inner();
    let answers: Vec<ModelStreamInferResponse> =
        answers.map(|answer| answer.unwrap()).collect().await;
    let response = answers[0].infer_response.as_ref().unwrap();
    assert_eq!(response.raw_output_contents, answer.raw_output_contents);
}
