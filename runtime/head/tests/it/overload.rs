//! Ten times as much at once as the log takes, over the API: each request ends, refusals say so by type,
//! and afterwards everything is as before.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mobula_wire::control as api;
use tokio::task::JoinSet;

use crate::one_head::{BOUND, OneHead, code, job, open_session, submit};

/// 8 MiB of commands may be not committed yet; ten times that is sent at once.
const UNCOMMITTED_BYTES_MAX: usize = 8 << 20;

/// What one job's specification has: near to the most that it may have.
const SPEC_BYTES: usize = 48 << 10;

/// Connections, each with a session that has so many requests under way as its window allows.
const CONNECTIONS: usize = 32;

/// How long after the end of an overload everything must be as before.
const RECOVERY_MAX: Duration = Duration::from_secs(10);

fn spec(name: String) -> api::JobSpec {
    let mut spec = job(&name, 1_000);
    spec.args = vec!["x".repeat(SPEC_BYTES)];
    spec
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_times_what_the_log_takes_is_done_or_refused_by_type_and_passes() {
    let head = OneHead::start().await;
    let each = (10 * UNCOMMITTED_BYTES_MAX / SPEC_BYTES).div_ceil(CONNECTIONS);
    assert!(each <= 64, "a session answers for its last 64 numbers");
    let mut requests = JoinSet::new();
    for connection in 0..CONNECTIONS {
        let mut client = head.client().await;
        let session = open_session(&mut client).await;
        for number in 1..=each as u64 {
            let mut client = client.clone();
            requests.spawn(async move {
                let name = format!("job-{connection}-{number}");
                let reply = submit(&mut client, session, number, spec(name.clone())).await;
                (name, reply)
            });
        }
    }
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    let mut acknowledged = BTreeSet::new();
    let all = async {
        while let Some(ended) = requests.join_next().await {
            let (name, reply) = ended.unwrap();
            let end = match reply {
                Ok(_) => {
                    acknowledged.insert(name);
                    "done".to_owned()
                }
                Err(status) => {
                    // Nothing was done, and the message says what to do; anything else would leave the
                    // caller in doubt.
                    assert_eq!(code(&status), "overloaded", "{status}");
                    assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status}");
                    assert!(status.message().contains("try again later"), "{status}");
                    "refused".to_owned()
                }
            };
            *ends.entry(end).or_default() += 1;
        }
    };
    tokio::time::timeout(BOUND, all).await.expect("each ends");
    println!("{ends:?}");
    assert_eq!(ends.values().sum::<u64>(), (CONNECTIONS * each) as u64);
    assert!(!acknowledged.is_empty(), "{ends:?}");

    let after = async {
        let mut client = head.client().await;
        let session = open_session(&mut client).await;
        let last = spec("after".to_owned());
        submit(&mut client, session, 1, last).await.unwrap();
        acknowledged.insert("after".to_owned());
        let mut there = BTreeSet::new();
        let mut page = api::ListJobsRequest::default();
        loop {
            let listed = client.list_jobs(page).await.unwrap().into_inner();
            there.extend(listed.jobs.into_iter().map(|job| job.name));
            if listed.next_page_token.is_empty() {
                return there;
            }
            page = api::ListJobsRequest {
                page_token: listed.next_page_token,
                ..Default::default()
            };
        }
    };
    let there = tokio::time::timeout(RECOVERY_MAX, after)
        .await
        .expect("the head is as before within its time");
    assert_eq!(there, acknowledged, "what was refused was not done");
    head.stop().await;
}
