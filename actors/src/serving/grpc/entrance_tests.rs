use std::io::Write;

use axum::Router;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::stream;
use prost::Message;
use tonic::codegen::Service;
use tonic::{Code, Status};

use super::super::tests::raw;
use super::*;
use crate::serving::auth::{BearerAuth, Caller};
use crate::serving::http::fixture::routes;

/// A body of which these bytes come, and then nothing.
fn stalled(bytes: &'static [u8]) -> Body {
    let begun = stream::once(async move { Ok::<_, BoxError>(bytes) });
    Body::from_stream(begun.chain(stream::pending()))
}

/// A call with this token and body.
fn request(method: &str, token: &str, body: Body) -> HttpRequest {
    axum::http::Request::builder()
        .method("POST")
        .uri(format!("/inference.GRPCInferenceService/{method}"))
        .header("content-type", "application/grpc")
        .header("authorization", format!("Bearer {token}"))
        .body(body)
        .unwrap()
}

/// The answer to a call with this token and body, without a connection.
async fn call(routes: &mut Router, method: &str, token: &str, body: Body) -> HttpResponse {
    answered(routes, request(method, token, body)).await
}

/// The answer to a call, without a connection.
async fn answered(routes: &mut Router, request: HttpRequest) -> HttpResponse {
    let answering = Service::call(routes, request);
    let answered = tokio::time::timeout(Duration::from_secs(30), answering).await;
    answered.expect("it is answered").unwrap()
}

/// The status of an answer that is one alone.
fn refused(answer: &HttpResponse) -> (Code, String) {
    let status = Status::from_header_map(answer.headers()).expect("a status and no message");
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn nothing_of_a_call_is_read_before_its_token() {
    let gate = BearerAuth::with_token("secret");
    let mut routes = routes(gate, Duration::from_secs(3_600));
    // A message that is compressed, and of which the first bytes have come.
    let head: &[u8] = &[1, 0, 0, 4, 0, 0x1f];
    for method in [
        "ModelInfer",
        "ServerMetadata",
        "ModelStreamInfer",
        "ServerLive",
        "Other",
    ] {
        let answer = call(&mut routes, method, "wrong", stalled(head)).await;
        let (code, message) = refused(&answer);
        assert_eq!(code, Code::Unauthenticated, "{method}");
        assert!(message.contains("Authorization"), "{message}");
    }
    let answer = call(&mut routes, "Other", "secret", stalled(head)).await;
    assert_eq!(refused(&answer).0, Code::Unimplemented);
}

/// Tells anybody how the server is, and takes a token for `double` alone.
struct OneModel;

impl Gate for OneModel {
    fn admit(
        &self,
        authorization: Option<&[u8]>,
        subject: Subject<'_>,
    ) -> Result<Caller, OipError> {
        let is_known = authorization == Some(&b"Bearer secret"[..]);
        match subject {
            Subject::Health => Ok(Caller::default()),
            Subject::Server | Subject::Model("double") if is_known => Ok(Caller::default()),
            Subject::Server | Subject::Model(_) => Err(OipError::Unauthorized),
        }
    }
}

/// A message as it travels.
fn framed(message: &impl prost::Message) -> Body {
    in_frame(0, &message.encode_to_vec())
}

/// The bytes of a message as they travel, with the flag that says whether they are compressed.
fn in_frame(flag: u8, message: &[u8]) -> Body {
    let mut bytes = vec![flag];
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend(message);
    Body::from(bytes)
}

#[tokio::test]
async fn an_answer_is_compressed_for_those_whose_messages_are_and_not_for_those_who_could_read_it()
{
    let mut routes = routes(BearerAuth::with_token("secret"), Duration::from_secs(60));
    let message = raw("double", &[1.0, 2.0]).encode_to_vec();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&message).unwrap();
    let packed = encoder.finish().unwrap();
    for (encoding, body, expected) in [
        (None, in_frame(0, &message), None),
        (Some("identity"), in_frame(0, &message), None),
        (Some("gzip"), in_frame(1, &packed), Some("gzip")),
    ] {
        let mut request = request("ModelInfer", "secret", body);
        let headers = request.headers_mut();
        // As libraries do.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity, gzip"));
        if let Some(encoding) = encoding {
            headers.insert(ENCODING, HeaderValue::from_static(encoding));
        }
        let answer = answered(&mut routes, request).await;
        let found = answer.headers().get(ENCODING);
        assert_eq!(found.map(|found| found.to_str().unwrap()), expected);
        let bytes = axum::body::to_bytes(answer.into_body(), usize::MAX).await;
        assert_eq!(bytes.unwrap()[0], u8::from(expected.is_some()));
    }
}

#[tokio::test]
async fn a_token_of_one_model_passes_and_opens_no_other() {
    let mut routes = routes(OneModel, Duration::from_secs(60));
    // Its message has no fields, so nobody waits for it.
    let answer = call(&mut routes, "ServerLive", "none", stalled(&[])).await;
    assert!(Status::from_header_map(answer.headers()).is_none());
    let values = [1.0, 2.0];
    let answer = call(
        &mut routes,
        "ModelInfer",
        "secret",
        framed(&raw("double", &values)),
    )
    .await;
    assert!(Status::from_header_map(answer.headers()).is_none());
    let answer = call(
        &mut routes,
        "ModelInfer",
        "secret",
        framed(&raw("slow", &values)),
    )
    .await;
    assert_eq!(refused(&answer).0, Code::Unauthenticated);
}

#[tokio::test]
async fn a_message_that_stalls_ends_its_call_and_a_stream_may_rest() {
    let gate = BearerAuth::with_token("secret");
    let mut routes = routes(gate, Duration::from_millis(50));
    for begun in [&b""[..], b"\0\0\0\x01\0\x07"] {
        let answer = call(&mut routes, "ModelInfer", "secret", stalled(begun)).await;
        let (code, message) = refused(&answer);
        assert_eq!(code, Code::DeadlineExceeded, "{message}");
        assert!(message.contains("did not arrive within 50 ms"), "{message}");
    }
    let answer = call(&mut routes, STREAM, "secret", stalled(&[])).await;
    let mut frames = answer.into_body().into_data_stream();
    let rests = tokio::time::timeout(Duration::from_millis(200), frames.next()).await;
    assert!(rests.is_err(), "the stream has ended: {rests:?}");
}
