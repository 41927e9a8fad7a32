use std::sync::atomic::AtomicBool;

use super::super::lane::Deadline;
use super::super::oip::{OipError, TensorData};
use super::super::replica::{Inference, classified};
use super::super::rows::{Batch, Row};
use super::answering::{HELD_REQUESTS_MAX, OPEN_TIMEOUT};

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
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
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
        let TensorData::Fp32(values) = &rows.cells[0].data else {
            unreachable!("the rows are numbers")
        };
        let classes: Vec<u32> = values.chunks_exact(2).map(|row| row[0] as u32).collect();
        Ok(Inference {
            outputs: classified(vec![0.1; classes.len() * 10], classes),
            computed_ns: 1,
            memory_percent: None,
            energies: Vec::new(),
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

fn rows(values: &[f32]) -> Vec<Row> {
    let row = |value: &f32| Row::numbers(vec![*value, 0.0], BATCH_ROWS_MAX);
    values.iter().map(row).collect()
}

/// The class that a row of an answer says.
fn class(row: &Row) -> u32 {
    match &row.cells[1].data {
        TensorData::Int64(class) => class[0] as u32,
        other => unreachable!("classes are whole numbers, not {other:?}"),
    }
}

async fn classes(fleet: &Fleet<Fake>, values: &[f32]) -> Result<Vec<u32>, OipError> {
    let answer = fleet.infer("digits", rows(values)).await?;
    Ok(answer.outputs.iter().map(class).collect())
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
async fn callers_who_hang_up_on_a_replica_that_hangs_speak_against_it() {
    let (fleet, fakes) = fleet(2);
    fakes[0].hangs.store(true, Ordering::Relaxed);
    for _ in 0..40 {
        // Shorter than what a batch may take, so that nobody finds out before the caller is gone.
        let impatient = tokio::time::timeout(Duration::from_secs(1), classes(&fleet, &[4.0]));
        let _ = impatient.await;
    }
    assert_eq!(fleet.traffic().counts().ejections, 1);
    let asked = fakes[0].calls.load(Ordering::Relaxed);
    assert!(asked <= 6, "{asked}");
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
    fleet.lanes()[0]
        .rows_in_flight
        .fetch_add(500, Ordering::Relaxed);
    for _ in 0..20 {
        classes(&fleet, &[1.0]).await.unwrap();
    }
    assert_eq!(fakes[0].calls.load(Ordering::Relaxed), 0);
}

/// The choices follow from their numbers alone: every run makes the same.
#[tokio::test]
async fn idle_replicas_are_chosen_equally_and_others_the_less_the_busier_they_are() {
    const CHOICES: usize = 8_000;
    let (fleet, _fakes) = fleet(8);
    let choices_at = |loads: [usize; 8]| {
        for (lane, rows) in fleet.lanes().iter().zip(loads) {
            lane.rows_in_flight.store(rows, Ordering::Relaxed);
        }
        let mut chosen = [0usize; 8];
        for _ in 0..CHOICES {
            let lane = fleet.choose(None).unwrap();
            chosen[lane.number as usize - 1] += 1;
        }
        chosen
    };
    let assert_near = |chosen: [usize; 8], expected: [usize; 8]| {
        for (found, expected) in chosen.into_iter().zip(expected) {
            let is_near = found.abs_diff(expected) <= expected / 5;
            assert!(is_near, "{chosen:?} have {found} instead of {expected}");
        }
    };

    assert_near(choices_at([0; 8]), [CHOICES / 8; 8]);
    // The busiest loses each comparison, and the others share what it would have got.
    let share = CHOICES / 7;
    assert_near(
        choices_at([0, 0, 0, 500, 0, 0, 0, 0]),
        [share, share, share, 0, share, share, share, share],
    );
    // Any two are compared as often: one that is idler than `n` others wins `n` of the 28 pairs.
    let loads = [30, 0, 70, 10, 60, 20, 50, 40];
    let won = |rows: usize| CHOICES * (7 - rows / 10) / 28;
    assert_near(choices_at(loads), loads.map(won));
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
    fleet.lanes()[1]
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

#[tokio::test(start_paused = true)]
async fn a_fleet_without_replicas_holds_requests_until_the_first_answers() {
    let fleet: Fleet<Fake> = Fleet::new(0);
    assert!(fleet.is_asleep());
    fleet.traffic().load.alarm_above(0);
    let waking = async {
        fleet.traffic().load.alarmed().await;
        let (number, berth) = fleet.resize(1).remove(0);
        assert_eq!(number, 1);
        // Longer than a request waits where replicas only are away for a moment.
        tokio::time::sleep(OPEN_TIMEOUT * 5).await;
        berth.open(Fake::default());
    };
    let (answer, ()) = tokio::join!(classes(&fleet, &[5.0]), waking);
    assert_eq!(answer.unwrap(), [5]);
    assert!(!fleet.is_asleep());
}

#[tokio::test(start_paused = true)]
async fn those_that_wait_for_a_first_replica_are_bounded_by_number_and_deadline() {
    let fleet: Arc<Fleet<Fake>> = Arc::new(Fleet::new(0));
    let limit = Duration::from_millis(300);
    let waiting = (0..=HELD_REQUESTS_MAX).map(|_| {
        let fleet = Arc::clone(&fleet);
        async move {
            let answer = fleet
                .infer_within("digits", rows(&[1.0]), Some(limit))
                .await;
            answer.map(drop).unwrap_err().status()
        }
    });
    let statuses = futures::future::join_all(waiting).await;
    let count = |status| statuses.iter().filter(|found| **found == status).count();
    assert_eq!((count(503), count(504)), (1, HELD_REQUESTS_MAX));
    assert_eq!(fleet.traffic().load.read().in_flight, 0);
}

#[tokio::test]
async fn a_replica_that_is_wanted_no_more_answers_what_it_has_and_gets_nothing_new() {
    let (fleet, fakes) = fleet(2);
    fakes[1].hangs.store(true, Ordering::Relaxed);
    fleet.lanes()[0]
        .rows_in_flight
        .fetch_add(500, Ordering::Relaxed);
    let (_, berth) = fleet.berths().nth(1).unwrap();
    let resizing = async {
        while fakes[1].calls.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        assert!(fleet.resize(1).is_empty());
        assert!(!fleet.is_drained());
        berth.close();
    };
    let (answer, ()) = tokio::join!(classes(&fleet, &[6.0]), resizing);
    assert_eq!(answer.unwrap(), [6]);
    berth.retired().await;
    assert!(fleet.is_drained());
    assert_eq!(fleet.replica_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_with_a_deadline_goes_to_another_replica_while_there_is_time() {
    let (fleet, fakes) = fleet(2);
    fakes[0].hangs.store(true, Ordering::Relaxed);
    let limit = Some(Duration::from_millis(400));
    for round in 0..30 {
        let answer = fleet.infer_within("digits", rows(&[4.0]), limit).await;
        assert_eq!(class(&answer.unwrap().outputs[0]), 4, "{round}");
    }
    // It never came near the time after which a replica is given up, and still gets nothing any more.
    assert_eq!(fleet.open_count(), 2);
    assert_eq!(fakes[0].calls.load(Ordering::Relaxed), 5);
    assert_eq!(fleet.traffic().counts().ejections, 1);
}

#[tokio::test(start_paused = true)]
async fn a_deadline_reaches_the_replica_and_whoever_goes_away_takes_the_call_back() {
    #[derive(Clone, Default)]
    struct Slow {
        limits: Arc<Mutex<Vec<Duration>>>,
        dropped: Arc<AtomicUsize>,
    }
    struct Dropped(Arc<AtomicUsize>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    impl Backend for Slow {
        async fn infer(&self, _: Batch) -> Result<Inference, BackendFailure> {
            unreachable!("every call has a limit")
        }
        async fn infer_within(
            &self,
            _: Batch,
            limit: Duration,
        ) -> Result<Inference, BackendFailure> {
            lock(&self.limits).push(limit);
            let _dropped = Dropped(Arc::clone(&self.dropped));
            std::future::pending().await
        }
    }
    let fleet: Fleet<Slow> = Fleet::new(1);
    let slow = Slow::default();
    fleet.berths().next().unwrap().1.open(slow.clone());
    let limit = Duration::from_millis(300);
    let error = fleet
        .infer_within("digits", rows(&[1.0]), Some(limit))
        .await;
    assert_eq!(error.unwrap_err().status(), 504);
    assert!(lock(&slow.limits)[0] <= limit);
    let going = fleet.infer("digits", rows(&[1.0]));
    assert!(tokio::time::timeout(limit, going).await.is_err());
    while slow.dropped.load(Ordering::Relaxed) < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fleet.open_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_would_outlast_the_deadline_is_not_joined() {
    let (fleet, _) = fleet(1);
    // One answer, so that its pace is known.
    classes(&fleet, &[1.0]).await.unwrap();
    let lanes = fleet.lanes();
    lanes[0].set_batch_time(Duration::from_millis(50));
    let limit = Some(Duration::from_millis(140));
    lanes[0].rows_in_flight.store(256, Ordering::Relaxed);
    let error = fleet.infer_within("digits", rows(&[1.0]), limit).await;
    let error = error.unwrap_err();
    assert_eq!(
        error,
        OipError::WouldBeLate {
            wait_ms: 200,
            limit_ms: 140
        }
    );
    assert_eq!(error.status(), 503);
    // An idle replica is asked whatever it was like before.
    lanes[0].set_batch_time(Duration::from_secs(9));
    lanes[0].rows_in_flight.store(0, Ordering::Relaxed);
    assert!(
        fleet
            .infer_within("digits", rows(&[1.0]), limit)
            .await
            .is_ok()
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_for_which_one_replica_is_too_slow_goes_to_another() {
    let (fleet, _) = fleet(2);
    let lanes = fleet.lanes();
    let limit = Some(Duration::from_millis(100));
    for (slow, fast) in [(0, 1), (1, 0)] {
        // The slow one has fewer rows in flight, so it is the one that is chosen.
        lanes[slow].set_batch_time(Duration::from_secs(1));
        lanes[slow].rows_in_flight.store(1, Ordering::Relaxed);
        lanes[fast].set_batch_time(Duration::from_millis(1));
        lanes[fast].rows_in_flight.store(5, Ordering::Relaxed);
        let answer = fleet.infer_within("digits", rows(&[4.0]), limit).await;
        assert_eq!(class(&answer.unwrap().outputs[0]), 4);
    }
    for lane in &lanes {
        lane.set_batch_time(Duration::from_secs(1));
    }
    let late = fleet.infer_within("digits", rows(&[4.0]), limit).await;
    assert!(matches!(late, Err(OipError::WouldBeLate { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_router_that_is_late_takes_less_than_one_that_is_not() {
    let (fleet, _) = fleet(1);
    let lanes = fleet.lanes();
    lanes[0].set_batch_time(Duration::from_millis(10));
    // The batch that runs, and one's own.
    lanes[0].rows_in_flight.store(1, Ordering::Relaxed);
    let deadline = || Deadline::of(Duration::from_millis(30));
    let asked = rows(&[1.0]);
    for (lag_ms, expected_ms) in [(0, None), (5, None), (6, Some(32))] {
        let late = deadline().behind(Duration::from_millis(lag_ms));
        let tried = lanes[0].first_try(&late, &asked, false);
        let expected = expected_ms.map(Duration::from_millis);
        assert_eq!(tried.err(), expected, "{lag_ms} ms late");
    }
    // Nobody else could know of an idle replica's pace.
    lanes[0].rows_in_flight.store(0, Ordering::Relaxed);
    let late = deadline().behind(Duration::from_secs(1));
    assert!(lanes[0].first_try(&late, &asked, false).is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_is_known_to_take_more_than_half_of_the_time_gets_all_of_it() {
    const TAKES: Duration = Duration::from_millis(100);
    #[derive(Clone)]
    struct Slow(Fake);
    impl Backend for Slow {
        async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
            tokio::time::sleep(TAKES).await;
            self.0.infer(rows).await
        }
    }
    let fleet: Fleet<Slow> = Fleet::new(2);
    let fake = Fake::default();
    for (_, berth) in fleet.berths() {
        berth.open(Slow(fake.clone()));
    }
    // Idle ones that take so long by themselves, and ones that do with their queue.
    for (number, (batch, queued)) in [(TAKES, 0), (TAKES / 3, BATCH_ROWS_MAX)]
        .into_iter()
        .enumerate()
    {
        for lane in fleet.lanes() {
            lane.set_batch_time(batch);
            lane.rows_in_flight.store(queued, Ordering::Relaxed);
        }
        let limit = Some(Duration::from_millis(140));
        let answer = fleet.infer_within("digits", rows(&[4.0]), limit).await;
        assert_eq!(class(&answer.unwrap().outputs[0]), 4, "{queued} rows queue");
        assert_eq!(fake.calls.load(Ordering::Relaxed), number + 1);
    }
}

#[tokio::test]
async fn where_every_replica_fails_second_tries_end_with_the_budget() {
    let (fleet, fakes) = fleet(2);
    let calls = || -> usize {
        fakes
            .iter()
            .map(|fake| fake.calls.load(Ordering::Relaxed))
            .sum()
    };
    for fake in &fakes {
        fake.lost.store(true, Ordering::Relaxed);
    }
    let requests = 3_000;
    for _ in 0..requests {
        for ((_, berth), fake) in fleet.berths().zip(&fakes) {
            berth.open(fake.clone());
        }
        classes(&fleet, &[1.0]).await.unwrap_err();
    }
    let counts = fleet.traffic().counts();
    let second_tries = calls() - requests;
    assert_eq!(second_tries as u64, counts.retries);
    assert!(counts.retries_refused > 0, "{counts:?}");
}
