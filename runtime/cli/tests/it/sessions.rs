//! The SDK's exactly-once session against a real head whose time the test can move.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mobula::Cluster;
use mobula_core::clock::Clock;
use mobula_core::config::Config;
use mobula_head::{CLIENT_TOKEN_FILE, Head, HeadOptions};
use tokio::sync::oneshot;

use crate::support::LIMIT;

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
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock(AtomicU64::new(1_800_000_000_000)));
    let mut config = Config::default();
    config.head.data_dir = dir.path().join("head").display().to_string();
    config.head.api_listen = "127.0.0.1:0".into();
    config.head.cluster_listen = "127.0.0.1:0".into();
    config.storage.url = format!("file://{}", dir.path().join("store").display());
    let options = HeadOptions::from_config(&config, clock.clone()).unwrap();
    let head = Head::start(options).await.unwrap();
    let address = head.api_address().to_string();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(head.run(async move {
        let _ = stopped.await;
    }));
    let token_path = dir.path().join("head").join(CLIENT_TOKEN_FILE);
    let token = tokio::time::timeout(LIMIT, async {
        loop {
            if let Ok(text) = std::fs::read_to_string(&token_path) {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let token = token.await.unwrap();
    let cluster = Cluster::connect(&address, token.trim()).await.unwrap();

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

    drop(stop);
    tokio::time::timeout(LIMIT, running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}
