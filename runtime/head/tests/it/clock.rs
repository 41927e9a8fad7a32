//! A machine whose clock jumps: what the head does in the order of the log stays in that order, and no
//! command is done twice for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use mobula_core::clock::Clock;
use mobula_wire::control as api;

use crate::one_head::{Api, OneHead, code, job, open_session, submit};

const HOUR_MS: u64 = 60 * 60 * 1000;

/// It stands still until it is set.
struct SetClock(AtomicU64);

impl Clock for SetClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

async fn submitted_ms(client: &mut Api, job: u64) -> u64 {
    let request = api::GetJobRequest { job };
    client
        .get_job(request)
        .await
        .unwrap()
        .into_inner()
        .submitted_ms
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_jumps_forth_and_back_ends_sessions_and_repeats_nothing() {
    // Certificates are checked against the machine's own clock.
    let start_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let start_ms = u64::try_from(start_ms.as_millis()).unwrap();
    let clock = Arc::new(SetClock(AtomicU64::new(start_ms)));
    let head = OneHead::start_with(clock.clone()).await;
    let mut client = head.client().await;

    let old = open_session(&mut client).await;
    let first = submit(&mut client, old, 1, job("first", 1)).await.unwrap();
    // Its answer is known, also when it is asked for again.
    let again = submit(&mut client, old, 1, job("first", 1)).await.unwrap();
    assert_eq!(again.job, first.job);

    // Two hours forth: sessions that were idle are over, and what they did is not done again.
    clock.0.store(start_ms + 2 * HOUR_MS, Ordering::SeqCst);
    for number in [1, 2] {
        let refused = submit(&mut client, old, number, job("first", 1)).await;
        assert_eq!(code(&refused.unwrap_err()), "session_expired");
    }
    let new = open_session(&mut client).await;
    let second = submit(&mut client, new, 1, job("second", 1)).await.unwrap();

    // Three hours back: time in the log stays where it was, goes on with the clock, and the session lives.
    clock.0.store(start_ms - HOUR_MS, Ordering::SeqCst);
    let third = submit(&mut client, new, 2, job("third", 1)).await.unwrap();
    clock.0.fetch_add(10_000, Ordering::SeqCst);
    let fourth = submit(&mut client, new, 3, job("fourth", 1)).await.unwrap();
    let mut times = Vec::new();
    for reply in [first, second, third, fourth] {
        times.push(submitted_ms(&mut client, reply.job).await);
    }
    assert!(times.is_sorted(), "{times:?}");
    assert_eq!(times[1], start_ms + 2 * HOUR_MS);
    assert!(
        times[3] > times[2],
        "time in the log stands still: {times:?}"
    );
    let listed = client.list_jobs(api::ListJobsRequest::default()).await;
    assert_eq!(listed.unwrap().into_inner().jobs.len(), 4);
    head.stop().await;
}
