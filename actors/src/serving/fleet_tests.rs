use std::sync::atomic::AtomicBool;

use super::*;

/// Answers each row with its first value as the class.
#[derive(Clone, Default)]
struct Fake {
    calls: Arc<AtomicUsize>,
    lost: Arc<AtomicBool>,
    hangs: Arc<AtomicBool>,
    refuses: Arc<AtomicBool>,
}

impl Backend for Fake {
    async fn infer(&self, rows: Vec<f32>) -> Result<Inference, BackendFailure> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if self.refuses.load(Ordering::Relaxed) {
            return Err(BackendFailure::Refused("no such row".into()));
        }
        if self.lost.load(Ordering::Relaxed) {
            return Err(BackendFailure::Lost("connection lost".into()));
        }
        let classes: Vec<u32> = rows.chunks_exact(2).map(|row| row[0] as u32).collect();
        let probabilities = vec![0.1; classes.len() * 10];
        Ok(Inference {
            probabilities,
            classes,
            computed_ns: 1,
        })
    }
}

fn fleet(count: u32) -> (Fleet<Fake>, Vec<Fake>) {
    let fleet = Fleet::new(count);
    let fakes: Vec<Fake> = (0..count).map(|_| Fake::default()).collect();
    for ((_, berth), fake) in fleet.berths().zip(&fakes) {
        berth.open(fake.clone());
    }
    (fleet, fakes)
}

fn rows(values: &[f32]) -> Vec<Vec<f32>> {
    values.iter().map(|value| vec![*value, 0.0]).collect()
}

async fn classes(fleet: &Fleet<Fake>, values: &[f32]) -> Result<Vec<u32>, OipError> {
    let answer = fleet.infer("digits", rows(values)).await?;
    Ok(answer
        .outputs
        .iter()
        .map(|prediction| prediction.class)
        .collect())
}

#[tokio::test]
async fn every_request_gets_its_own_rows_back_from_either_replica() {
    let (fleet, fakes) = fleet(2);
    for value in 0..40u8 {
        let value = f32::from(value);
        assert_eq!(
            classes(&fleet, &[value, 3.0]).await.unwrap(),
            [value as u32, 3]
        );
    }
    for fake in fakes {
        assert!(fake.calls.load(Ordering::Relaxed) > 5);
    }
}

#[tokio::test]
async fn a_lost_replica_costs_no_answer_and_gets_nothing_until_it_is_back() {
    let (fleet, fakes) = fleet(2);
    fakes[0].lost.store(true, Ordering::Relaxed);
    for _ in 0..20 {
        assert_eq!(classes(&fleet, &[7.0]).await.unwrap(), [7]);
    }
    assert_eq!(fakes[0].calls.load(Ordering::Relaxed), 1);
    assert_eq!(fleet.open_count(), 1);
    let (_, berth) = fleet.berths().next().unwrap();
    berth.failed().await;
    berth.open(Fake::default());
    assert_eq!(fleet.open_count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_hangs_is_given_up_and_the_request_sent_elsewhere() {
    let (fleet, fakes) = fleet(2);
    fakes[0].hangs.store(true, Ordering::Relaxed);
    for _ in 0..10 {
        assert_eq!(classes(&fleet, &[4.0]).await.unwrap(), [4]);
    }
    assert_eq!(fakes[0].calls.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn without_any_replica_the_refusal_says_so() {
    let fleet: Fleet<Fake> = Fleet::new(3);
    let error = classes(&fleet, &[1.0]).await.unwrap_err();
    assert_eq!(error.status(), 503);
    assert!(
        error
            .to_string()
            .contains("none of its 3 replicas is running"),
        "{error}"
    );
}

#[tokio::test]
async fn when_all_are_lost_the_caller_learns_that_it_may_retry() {
    let (fleet, fakes) = fleet(2);
    for fake in &fakes {
        fake.lost.store(true, Ordering::Relaxed);
    }
    let error = classes(&fleet, &[1.0]).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert!(error.to_string().contains("connection lost"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn the_less_busy_replica_is_chosen() {
    let (fleet, fakes) = fleet(2);
    fakes[0].hangs.store(true, Ordering::Relaxed);
    fleet.lanes[0]
        .rows_in_flight
        .fetch_add(500, Ordering::Relaxed);
    for _ in 0..20 {
        classes(&fleet, &[1.0]).await.unwrap();
    }
    assert_eq!(fakes[0].calls.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_refusal_is_the_models_and_is_not_tried_elsewhere() {
    let (fleet, fakes) = fleet(2);
    for fake in &fakes {
        fake.refuses.store(true, Ordering::Relaxed);
    }
    let error = classes(&fleet, &[1.0]).await.unwrap_err();
    assert_eq!(
        (error.status(), error.to_string().as_str()),
        (500, "inference failed: no such row")
    );
    let calls: usize = fakes
        .iter()
        .map(|fake| fake.calls.load(Ordering::Relaxed))
        .sum();
    assert_eq!((calls, fleet.open_count()), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_a_little_for_the_first_replica() {
    let fleet: Fleet<Fake> = Fleet::new(1);
    let (_, berth) = fleet.berths().next().unwrap();
    let opening = async {
        tokio::time::sleep(OPEN_TIMEOUT / 2).await;
        berth.open(Fake::default());
    };
    let (answer, ()) = tokio::join!(classes(&fleet, &[5.0]), opening);
    assert_eq!(answer.unwrap(), [5]);
}

#[tokio::test]
async fn what_a_replica_held_when_its_end_was_seen_is_sent_elsewhere_at_once() {
    let (fleet, fakes) = fleet(2);
    fakes[0].hangs.store(true, Ordering::Relaxed);
    fleet.lanes[1]
        .rows_in_flight
        .fetch_add(500, Ordering::Relaxed);
    let (_, berth) = fleet.berths().next().unwrap();
    let closing = async {
        while fakes[0].calls.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        berth.close();
    };
    let (answer, ()) = tokio::join!(classes(&fleet, &[6.0]), closing);
    assert_eq!(answer.unwrap(), [6]);
}
