//! Metrics over plain HTTP, on the API's own port.

use mobula_wire::control as api;

use crate::one_head::{OneHead, code};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_clients_and_metrics_tokens_read_metrics() {
    let head = OneHead::start().await;
    let mut client = head.client().await;
    let request = api::CreateTokenRequest {
        role: "metrics".into(),
        ttl_ms: 60_000,
        ..Default::default()
    };
    let made = client.create_token(request).await.unwrap().into_inner();
    let (status, text) = head.get("/metrics", Some(&made.token)).await;
    assert_eq!(status, 200, "{text}");
    assert!(text.contains("mobula_raft_is_leader 1"), "{text}");
    assert!(text.ends_with("# EOF\n"));

    // The token opens nothing else.
    let mut scraper = head.client_with(&made.token).await;
    let refused = scraper
        .list_jobs(api::ListJobsRequest::default())
        .await
        .unwrap_err();
    assert_eq!(code(&refused), "permission_denied", "{refused}");
    assert!(refused.message().contains("metrics token"), "{refused}");

    let (status, _) = head.get("/metrics", None).await;
    assert_eq!(status, 401);
    let worker = head.worker_token().await;
    let (status, text) = head.get("/metrics", Some(&worker)).await;
    assert_eq!(status, 403, "{text}");
    let (status, text) = head.get("/metrics/nobody", Some(&made.token)).await;
    assert_eq!(status, 404, "{text}");
    head.stop().await;
}
