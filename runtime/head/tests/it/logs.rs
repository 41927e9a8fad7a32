//! Readers of logs: bounded, and forgotten when they go.

use std::time::Duration;

use mobula_wire::control as api;
use tonic::{Status, Streaming};

use crate::one_head::{Api, BOUND, OneHead, code, job, open_session, submit};

/// As many as a head serves at the same time.
const LOG_STREAMS_MAX: usize = 128;

async fn follow(client: &mut Api, job: u64) -> Result<Streaming<api::LogChunk>, Status> {
    let request = api::JobLogsRequest {
        job,
        follow: true,
        ..Default::default()
    };
    Ok(client.job_logs(request).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_of_a_quiet_log_that_goes_away_frees_its_slot() {
    let head = OneHead::start().await;
    let mut client = head.client().await;
    let session = open_session(&mut client).await;
    // There is no worker, so that it waits and prints nothing.
    let quiet = submit(&mut client, session, 1, job("quiet", 100))
        .await
        .unwrap()
        .job;
    let mut followers = Vec::new();
    for _ in 0..LOG_STREAMS_MAX {
        followers.push(follow(&mut client, quiet).await.unwrap());
    }
    let refused = follow(&mut client, quiet).await.unwrap_err();
    assert_eq!(code(&refused), "overloaded", "{refused}");

    drop(followers.pop());
    let again = async {
        loop {
            match follow(&mut client, quiet).await {
                Ok(stream) => return stream,
                Err(status) => assert_eq!(code(&status), "overloaded", "{status}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let another = tokio::time::timeout(BOUND, again)
        .await
        .expect("the head noticed that a follower went away");
    // One slot was freed, not all of them.
    let refused = follow(&mut client, quiet).await.unwrap_err();
    assert_eq!(code(&refused), "overloaded", "{refused}");
    drop((followers, another));
    head.stop().await;
}
