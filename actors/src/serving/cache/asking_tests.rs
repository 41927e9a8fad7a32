use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::super::CacheSetting;
use super::*;
use crate::serving::arm::Origin;
use crate::serving::feed::feed;
use crate::serving::fleet::{BATCH_ROWS_MAX, BackendFailure, Fleet, Terms};
use crate::serving::replica::Inference;
use crate::serving::rows::Batch;

/// Answers with what it is asked, and counts how often.
#[derive(Clone, Default)]
struct Echo {
    calls: Arc<AtomicUsize>,
}

impl Backend for Echo {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(Inference {
            outputs: rows,
            computed_ns: 1,
            memory_percent: None,
            energies: Vec::new(),
        })
    }
}

/// A version that keeps its answers, and has no replica before somebody asks.
fn asleep() -> Arm<Echo> {
    let (_, origin) = watch::channel(Origin::default());
    let (arm, _) = Arm::new(1, origin, Fleet::new(0), feed().0, JoinSet::new());
    arm.responses().set(Some(CacheSetting {
        bytes: 1 << 20,
        ttl_ms: 60_000,
    }));
    arm
}

/// Asks always the same; what it got, whether that was known, and after how many whole seconds.
async fn asked(arm: &Arm<Echo>, limit_s: Option<u64>) -> (Result<(Vec<Row>, bool), OipError>, u64) {
    let began = Instant::now();
    let rows = vec![Row::numbers(vec![1.0, 2.0], BATCH_ROWS_MAX)];
    let terms = Terms {
        limit: limit_s.map(Duration::from_secs),
        ..Terms::default()
    };
    let found = ask(arm, "digits", rows, terms).await;
    let found = found.map(|asked| {
        let (answer, cached) = asked.keep();
        (answer.outputs, matches!(cached, Some(Cached::Hit(_))))
    });
    (found, began.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn who_asks_the_same_while_it_wakes_waits_as_long_as_the_first() {
    let (arm, echo) = (asleep(), Echo::default());
    let waking = async {
        tokio::time::sleep(Duration::from_secs(20)).await;
        let berths = arm.fleet().resize(1);
        berths[0].1.open(echo.clone());
    };
    let (first, second, hasty, ()) = tokio::join!(
        asked(&arm, None),
        asked(&arm, None),
        asked(&arm, Some(3)),
        waking
    );
    let (rows, was_known) = first.0.unwrap();
    assert!(!was_known && !rows.is_empty());
    assert_eq!(second, (Ok((rows, true)), 20));
    // Whoever says how long does not wait longer.
    let late = OipError::DeadlineExceeded { limit_ms: 3_000 };
    assert_eq!(hasty, (Err(late), 3));
    assert_eq!(echo.calls.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn where_nobody_answers_the_error_is_not_about_a_limit_that_was_not_given() {
    let arm = asleep();
    let (first, second) = tokio::join!(asked(&arm, None), asked(&arm, None));
    assert!(matches!(first.0, Err(OipError::NotReady { .. })));
    assert_eq!(first.1, WAKE_TIMEOUT.as_secs());
    // It takes the place of the first, with the time that is left.
    let reason = "no answer within 35000 ms".to_owned();
    assert_eq!(second, (Err(OipError::ReplicaLost { reason }), 35));
}

#[tokio::test(start_paused = true)]
async fn who_takes_the_place_of_another_has_only_the_rest_of_its_own_time() {
    let arm = asleep();
    let (first, second) = tokio::join!(asked(&arm, Some(2)), asked(&arm, Some(3)));
    let late = |limit_ms| OipError::DeadlineExceeded { limit_ms };
    assert_eq!(first, (Err(late(2_000)), 2));
    assert_eq!(second, (Err(late(3_000)), 3));
}
