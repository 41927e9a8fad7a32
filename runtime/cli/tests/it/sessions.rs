//! The SDK's exactly-once session against a real head whose time the test can move.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mobula_core::clock::Clock;

use crate::in_process::InProcessHead;

/// What a session may be idle for, and a little: the head forgets it.
const TOO_LONG_MS: u64 = 61 * 60 * 1000;

/// It stands still until it is moved.
struct ManualClock(AtomicU64);

impl Clock for ManualClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_in_a_forgotten_session_takes_effect_once_in_a_new_one() {
    let clock = Arc::new(ManualClock(AtomicU64::new(1_800_000_000_000)));
    let head = InProcessHead::start(clock.clone(), |_| {}).await;
    let cluster = head.client().await;

    let first = cluster.new_job("before").submit().await.unwrap();
    clock.0.fetch_add(TOO_LONG_MS, Ordering::SeqCst);
    // The SDK has no reason to think that its session is gone: its own clock went on as ever.
    let second = cluster.new_job("after").submit().await.unwrap();
    let third = cluster.new_job("later").submit().await.unwrap();
    let jobs = cluster.list_jobs().await.unwrap();
    let there: BTreeMap<u64, &str> = jobs.iter().map(|job| (job.id, job.name.as_str())).collect();
    let submitted = [(first, "before"), (second, "after"), (third, "later")];
    let expected: BTreeMap<u64, &str> = submitted
        .iter()
        .map(|(job, name)| (job.id().0, *name))
        .collect();
    assert_eq!(there, expected, "each was submitted once");
    assert_eq!(jobs.len(), 3);
    head.stop().await;
}
