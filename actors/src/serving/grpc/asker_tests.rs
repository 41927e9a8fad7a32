use std::sync::Arc;

use axum::Router;
use futures::{StreamExt, stream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::{Code, Request};

use super::super::fixture::{row_for_digits, with_token};
use super::super::oip_routes;
use super::super::proto::grpc_inference_service_client::GrpcInferenceServiceClient;
use super::super::proto::infer_parameter::ParameterChoice;
use super::*;
use crate::serving::about::TIMEOUT;
use crate::serving::arm::{Arm, Origin, Routes};
use crate::serving::auth::BearerAuth;
use crate::serving::endpoint_service::EndpointService;
use crate::serving::feed::feed;
use crate::serving::fleet::{Backend, BackendFailure, Fleet};
use crate::serving::replica::Inference;
use crate::serving::rows::Batch;
use crate::serving::shadow::mirror::mirror;
use crate::serving::signature::{BODY_LIMITS_MAX, Signature};

/// Never answers.
#[derive(Clone)]
struct Hangs;

impl Backend for Hangs {
    async fn infer(&self, _rows: Batch) -> Result<Inference, BackendFailure> {
        std::future::pending().await
    }
}

/// A client of an endpoint whose only replica hangs. Both are in this process, and no transport between them has a deadline of
/// its own.
fn client() -> GrpcInferenceServiceClient<Router> {
    let (_, origin) = watch::channel(Origin::default());
    let (active, _) = Arm::new(1, origin, Fleet::new(1), feed().0, JoinSet::new());
    let (_, berth) = active.fleet().berths().next().unwrap();
    berth.open(Hangs);
    let routes = Routes {
        active: Arc::new(active),
        tried: None,
        compared: None,
        shadowed: None,
    };
    let (_, routes) = watch::channel(Arc::new(routes));
    let signature = Signature::classifier(2, 2, Vec::new());
    let service = EndpointService::new("digits", signature, routes, mirror().0);
    let gate = BearerAuth::with_token("secret");
    let routes = oip_routes(service.shared(), gate, BODY_LIMITS_MAX);
    GrpcInferenceServiceClient::new(routes)
}

/// A call that allows so many milliseconds, as gRPC's clients say it.
fn within<T>(message: T, limit_ms: u64) -> Request<T> {
    let mut request = with_token(message);
    request.set_timeout(Duration::from_millis(limit_ms));
    request
}

#[tokio::test(start_paused = true)]
async fn the_deadline_of_a_call_is_that_of_its_request() {
    let mut client = client();
    let began = Instant::now();
    let status = client
        .model_infer(within(row_for_digits(), 300))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    let text = status.message();
    assert!(
        text.contains("no answer within the 300 ms that the request allows"),
        "{text}"
    );
    let took = began.elapsed().as_millis();
    assert!((300..400).contains(&took), "{took} ms");

    // What the request says itself counts before what its call says.
    let mut hasty = row_for_digits();
    let limit = proto::InferParameter {
        parameter_choice: Some(ParameterChoice::Int64Param(100_000)),
    };
    hasty.parameters.insert(TIMEOUT.to_owned(), limit);
    let status = client.model_infer(within(hasty, 300)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(status.message().contains("the 100 ms"), "{status}");
}

#[tokio::test(start_paused = true)]
async fn the_deadline_of_a_stream_is_that_of_all_its_requests() {
    let mut client = client();
    let began = Instant::now();
    // More than are answered at once: the last ones begin when nothing is left.
    let requests = stream::iter((0..40).map(|_| row_for_digits()));
    let answers = client.model_stream_infer(within(requests, 300)).await;
    let answers = answers.unwrap().into_inner().map(Result::unwrap);
    let errors: Vec<String> = answers.map(|answer| answer.error_message).collect().await;
    assert_eq!(errors.len(), 40);
    for error in errors {
        assert!(
            error.contains("within the 300 ms that the request allows"),
            "{error}"
        );
    }
    let took = began.elapsed().as_millis();
    assert!((300..400).contains(&took), "{took} ms");
}
