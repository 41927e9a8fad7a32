//! What a worker may have certified.

use mobula_core::id::JobId;

use crate::one_head::{OneHead, job, open_session, submit};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_certifies_hosts_of_the_jobs_it_was_told_to_run_only() {
    let head = OneHead::start().await;
    let mut worker = head.worker("w-1").await;
    let mut client = head.client().await;
    let session = open_session(&mut client).await;
    let submitted = submit(&mut client, session, 1, job("here", 100)).await;
    let here = JobId(submitted.unwrap().job);
    assert_eq!(worker.start_order().await.job, here);
    // Larger than the worker: it exists, and waits.
    let submitted = submit(&mut client, session, 2, job("nowhere", 64_000)).await;
    let nowhere = JobId(submitted.unwrap().job);

    let credentials = worker.sign_host(here).await.unwrap();
    let identity = credentials.identity();
    assert_eq!(identity.job, Some(here.0));
    assert!(identity.id.starts_with(&worker.welcome.node.to_string()));
    for other in [nowhere, JobId(900), JobId::SYSTEM] {
        let reason = worker.sign_host(other).await.unwrap_err();
        assert!(reason.contains("has no order to run"), "{other}: {reason}");
    }
    // A refusal does not cost the session.
    worker.sign_host(here).await.unwrap();
    head.stop().await;
}
