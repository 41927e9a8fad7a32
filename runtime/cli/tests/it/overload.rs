//! Ten times as many commands at once as the head lets wait: what it cannot take it refuses by name,
//! what it took is done once, and afterwards it is as before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mobula_chaos::tally::{self, Tally};
use mobula_core::clock::Clock;
use mobula_core::error::{ErrorCode, Executed};
use mobula_core::id::SessionId;
use tokio::task::JoinSet;

use crate::in_process::InProcessHead;

/// Ten times the requests that may wait in front of the log (4096).
const AT_ONCE: u64 = 40_960;

/// How long after the end of an overload everything must be as before.
const RECOVERY_MAX: Duration = Duration::from_secs(10);

struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        let since = std::time::UNIX_EPOCH.elapsed().unwrap();
        u64::try_from(since.as_millis()).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_overload_is_refused_by_name_and_passes() {
    let head = InProcessHead::start(Arc::new(SystemClock), |options| {
        options.modules.push(Arc::new(Tally));
    })
    .await;
    let client = head.client().await;
    let mut commands = JoinSet::new();
    for _ in 0..AT_ONCE {
        let raft = head.raft().clone();
        commands.spawn(async move {
            // As large as a small report of a worker.
            let payload = vec![7; 128];
            raft.propose(SessionId::INTERNAL, 0, tally::ID, payload)
                .await
        });
    }
    // Readers are not made to wait until it is over: what they ask is answered or refused too.
    let during = tokio::time::timeout(RECOVERY_MAX, client.status()).await;
    assert!(
        during.is_ok(),
        "a question hangs while the head is overloaded"
    );

    let mut ends: BTreeMap<&str, u64> = BTreeMap::new();
    while let Some(ended) = commands.join_next().await {
        let end = match ended.unwrap() {
            Ok(outcome) => {
                outcome.result.unwrap();
                "done"
            }
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::Overloaded, "{error}");
                assert_eq!(error.executed(), Executed::No, "{error}");
                assert!(error.to_string().contains("try again later"), "{error}");
                "refused"
            }
        };
        *ends.entry(end).or_default() += 1;
    }
    println!("{ends:?}");
    let of = |end: &str| ends.get(end).copied().unwrap_or(0);
    assert!(of("done") > 0, "{ends:?}");
    assert!(of("refused") > 0, "this was no overload: {ends:?}");
    assert_eq!(of("done") + of("refused"), AT_ONCE);

    let after = tokio::time::timeout(RECOVERY_MAX, async {
        let payload = vec![7; 128];
        let proposed = head
            .raft()
            .propose(SessionId::INTERNAL, 0, tally::ID, payload);
        proposed.await.unwrap().result.unwrap();
        // And the API, which changes something in a session of its own.
        client.new_job("after").submit().await.unwrap();
        tally::count(&head.raft().read().await.unwrap())
    });
    let counted = after.await.expect("the head is as before within its time");
    assert_eq!(
        counted,
        of("done") + 1,
        "each took effect once, refused ones never"
    );
    head.stop().await;
}
