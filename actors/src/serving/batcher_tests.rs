//! The batching rule on tokio's paused clock: time moves only when everyone waits.

use std::sync::{Arc, Mutex};

use super::line::WAIT_MIN;
use super::*;

/// Doubles each row, takes 10 ms a batch, and remembers the batches. Row 13 fails, 14 loses an output, 15 panics.
struct Doubler {
    batches: Arc<Mutex<Vec<Vec<u32>>>>,
}

const COMPUTE: Duration = Duration::from_millis(10);

impl BatchRunner for Doubler {
    type Row = u32;
    type Output = u32;

    async fn run(&mut self, rows: Vec<u32>) -> Result<Computed<u32>, String> {
        self.batches.lock().unwrap().push(rows.clone());
        tokio::time::sleep(COMPUTE).await;
        assert!(!rows.contains(&15), "row 15");
        if rows.contains(&13) {
            return Err("row 13".to_owned());
        }
        let kept = rows.into_iter().filter(|row| *row != 14);
        Ok(kept.map(|row| row * 2).collect::<Vec<u32>>().into())
    }
}

type Handle = BatcherHandle<u32, u32>;
type Batches = Arc<Mutex<Vec<Vec<u32>>>>;

fn start(
    max_batch_rows: usize,
    max_delay_ms: u64,
    max_queued_requests: usize,
) -> (Batcher, Handle, Batches) {
    let batches = Batches::default();
    let config = BatcherConfig {
        max_batch_rows,
        preferred_rows: Vec::new(),
        delay: Delay::Fixed(Duration::from_millis(max_delay_ms)),
        max_queued_requests,
    };
    let (batcher, handle) = Batcher::start(
        config,
        Doubler {
            batches: Arc::clone(&batches),
        },
    );
    (batcher, handle, batches)
}

fn spawn(handle: &Handle, rows: &[u32]) -> JoinHandle<Result<BatchAnswer<u32>, BatchError>> {
    let (handle, rows) = (handle.clone(), rows.to_vec());
    tokio::spawn(async move { handle.submit(rows).await })
}

#[tokio::test(start_paused = true)]
async fn requests_join_in_order_and_get_their_own_outputs() {
    let (_batcher, handle, batches) = start(8, 5, 100);
    let calls = [
        spawn(&handle, &[1]),
        spawn(&handle, &[2, 3]),
        spawn(&handle, &[4]),
    ];
    let mut outputs = Vec::new();
    for call in calls {
        let answer = call.await.unwrap().unwrap();
        assert_eq!(answer.batch_rows, 4);
        assert_eq!(
            (answer.queued, answer.computed),
            (Duration::from_millis(5), COMPUTE)
        );
        assert_eq!(answer.is_first_in_batch, answer.outputs == [2]);
        outputs.push(answer.outputs);
    }
    assert_eq!(outputs, [vec![2], vec![4, 6], vec![8]]);
    assert_eq!(*batches.lock().unwrap(), [[1, 2, 3, 4]]);
}

#[tokio::test(start_paused = true)]
async fn a_full_batch_leaves_at_once_and_no_request_is_split() {
    let (_batcher, handle, batches) = start(4, 1_000, 100);
    let calls = [
        spawn(&handle, &[1, 2, 3]),
        spawn(&handle, &[4, 5]),
        spawn(&handle, &[6, 7]),
        spawn(&handle, &[8, 9, 10, 11]),
    ];
    let started = Instant::now();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(
        *batches.lock().unwrap(),
        [vec![1, 2, 3], vec![4, 5, 6, 7], vec![8, 9, 10, 11]]
    );
    assert_eq!(
        started.elapsed(),
        3 * COMPUTE,
        "nobody waited for the delay"
    );
}

#[tokio::test(start_paused = true)]
async fn a_lone_request_waits_for_the_delay_only() {
    let (_batcher, handle, _) = start(4, 20, 100);
    let answer = handle.submit(vec![21]).await.unwrap();
    assert_eq!(
        (answer.outputs, answer.queued),
        (vec![42], Duration::from_millis(20))
    );
}

#[tokio::test(start_paused = true)]
async fn without_delay_batches_form_while_one_runs() {
    let (_batcher, handle, batches) = start(8, 0, 100);
    let first = spawn(&handle, &[1]);
    tokio::time::sleep(COMPUTE / 2).await;
    let rest = [spawn(&handle, &[2]), spawn(&handle, &[3])];
    first.await.unwrap().unwrap();
    for call in rest {
        call.await.unwrap().unwrap();
    }
    assert_eq!(*batches.lock().unwrap(), [vec![1], vec![2, 3]]);
}

/// Joins rows with the same last digit, at most as many as that digit.
struct Alike(Batches);

impl BatchRunner for Alike {
    type Row = u32;
    type Output = u32;

    fn joins(first: &u32, rows: usize, next: &u32) -> bool {
        first % 10 == next % 10 && rows < (first % 10) as usize
    }

    async fn run(&mut self, rows: Vec<u32>) -> Result<Computed<u32>, String> {
        self.0.lock().unwrap().push(rows.clone());
        tokio::time::sleep(COMPUTE).await;
        Ok(rows.into())
    }
}

fn start_alike() -> (Batcher, Handle, Batches) {
    let batches = Batches::default();
    let config = BatcherConfig {
        max_batch_rows: 8,
        preferred_rows: Vec::new(),
        delay: Delay::Fixed(Duration::ZERO),
        max_queued_requests: 100,
    };
    let (batcher, handle) = Batcher::start(config, Alike(Arc::clone(&batches)));
    (batcher, handle, batches)
}

#[tokio::test(start_paused = true)]
async fn what_comes_in_turns_is_joined_with_its_kind() {
    let (_batcher, handle, batches) = start_alike();
    let running = spawn(&handle, &[9]);
    tokio::time::sleep(COMPUTE / 2).await;
    let calls: Vec<_> = [5, 7, 15, 17, 25, 27, 35]
        .map(|row| spawn(&handle, &[row]))
        .into();
    for call in calls.into_iter().chain([running]) {
        call.await.unwrap().unwrap();
    }
    assert_eq!(
        *batches.lock().unwrap(),
        [vec![9], vec![5, 15, 25, 35], vec![7, 17, 27]]
    );
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_nothing_can_join_waits_for_nobody_and_nobody_is_overtaken_by_their_kind() {
    let batches = Batches::default();
    let config = BatcherConfig {
        max_batch_rows: 8,
        preferred_rows: Vec::new(),
        delay: Delay::Fixed(Duration::from_secs(1)),
        max_queued_requests: 100,
    };
    let (_batcher, handle) = Batcher::start(config, Alike(Arc::clone(&batches)));
    // At most one row with this digit is computed at a time.
    assert_eq!(handle.submit(vec![1]).await.unwrap().queued, Duration::ZERO);
    // At most six with this one: the last would fit with the first, and is behind one that does not.
    let calls = [&[6, 16, 26, 36][..], &[46, 56, 66], &[76]].map(|rows| spawn(&handle, rows));
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(
        *batches.lock().unwrap(),
        [vec![1], vec![6, 16, 26, 36], vec![46, 56, 66, 76]]
    );
}

#[tokio::test(start_paused = true)]
async fn a_preferred_size_leaves_at_once_and_the_rest_waits_for_its_delay() {
    let batches = Batches::default();
    let config = BatcherConfig {
        max_batch_rows: 8,
        preferred_rows: vec![2, 4],
        delay: Delay::Fixed(Duration::from_millis(100)),
        max_queued_requests: 100,
    };
    let runner = Doubler {
        batches: Arc::clone(&batches),
    };
    let (_batcher, handle) = Batcher::start(config, runner);
    let calls = [&[1][..], &[2], &[3, 4], &[5]].map(|rows| spawn(&handle, rows));
    let answers = futures::future::join_all(calls).await;
    let queued = answers
        .into_iter()
        .map(|call| call.unwrap().unwrap().queued);
    let queued: Vec<u128> = queued.map(|queued| queued.as_millis()).collect();
    assert_eq!(queued, [0, 0, 0, 100]);
    assert_eq!(*batches.lock().unwrap(), [vec![1, 2, 3, 4], vec![5]]);
}

#[tokio::test(start_paused = true)]
async fn rows_that_do_not_fit_each_other_wait_for_the_next_batch() {
    let (_batcher, handle, batches) = start_alike();
    let requests = [&[9][..], &[3], &[13], &[2, 12], &[23, 33], &[43, 53]];
    let calls = requests.map(|rows| spawn(&handle, rows));
    for (call, rows) in calls.into_iter().zip(requests) {
        assert_eq!(call.await.unwrap().unwrap().outputs, rows);
    }
    assert_eq!(
        *batches.lock().unwrap(),
        [
            vec![9],
            vec![3, 13],
            vec![2, 12],
            vec![23, 33],
            vec![43, 53]
        ]
    );
}

/// Has a batcher learn that a batch takes 40 ms however many rows it has, and that requests come in pairs, 2 ms apart.
async fn adaptive(max_ms: u64) -> (Batcher, Handle, Batches) {
    const COST: Duration = Duration::from_millis(40);
    struct Constant(Batches);
    impl BatchRunner for Constant {
        type Row = u32;
        type Output = u32;
        async fn run(&mut self, rows: Vec<u32>) -> Result<Computed<u32>, String> {
            self.0.lock().unwrap().push(rows.clone());
            tokio::time::sleep(COST).await;
            Ok(rows.into())
        }
    }
    let batches = Batches::default();
    let config = BatcherConfig {
        max_batch_rows: 8,
        preferred_rows: Vec::new(),
        delay: Delay::Adaptive {
            max: Duration::from_millis(max_ms),
        },
        max_queued_requests: 100,
    };
    let (batcher, handle) = Batcher::start(config, Constant(Arc::clone(&batches)));
    for round in 0..40 {
        let rows: &[u32] = if round % 2 == 0 { &[1] } else { &[1, 2, 3] };
        let first = spawn(&handle, rows);
        tokio::time::sleep(Duration::from_millis(2)).await;
        let second = spawn(&handle, &[4]);
        first.await.unwrap().unwrap();
        second.await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    batches.lock().unwrap().clear();
    (batcher, handle, batches)
}

#[tokio::test(start_paused = true)]
async fn who_comes_soon_is_waited_for_and_nobody_for_longer_than_that() {
    let (_batcher, handle, batches) = adaptive(1_000).await;
    let first = spawn(&handle, &[1]);
    tokio::time::sleep(Duration::from_millis(2)).await;
    let second = spawn(&handle, &[2]);
    let first = first.await.unwrap().unwrap();
    assert_eq!(first.batch_rows, 2);
    // Nor for a third one.
    assert!(
        first.queued <= Duration::from_millis(7),
        "{:?}",
        first.queued
    );
    second.await.unwrap().unwrap();
    assert_eq!(*batches.lock().unwrap(), [[1, 2]]);
    // One whose companion does not come is sent after the time in which they come.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let alone = handle.submit(vec![3]).await.unwrap();
    assert!(
        alone.queued <= Duration::from_millis(5),
        "{:?}",
        alone.queued
    );
    assert!(alone.queued >= WAIT_MIN, "{:?}", alone.queued);
}

#[tokio::test(start_paused = true)]
async fn neither_the_bound_nor_a_deadline_is_waited_past() {
    let (_batcher, handle, _) = adaptive(1).await;
    let answer = handle.submit(vec![1]).await.unwrap();
    assert_eq!(answer.queued, WAIT_MIN);
    let (_batcher, handle, _) = adaptive(1_000).await;
    // Twice what a batch takes, and nothing more to wait.
    let until = Instant::now() + Duration::from_millis(80);
    let answer = handle.submit_until(vec![1], until).await.unwrap();
    assert!(answer.queued <= WAIT_MIN, "{:?}", answer.queued);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_at_once() {
    let (_batcher, handle, batches) = start(1, 0, 2);
    let running = spawn(&handle, &[1]);
    tokio::time::sleep(COMPUTE / 2).await;
    let queued = [spawn(&handle, &[2]), spawn(&handle, &[3])];
    tokio::task::yield_now().await;
    assert_eq!(handle.queued_requests(), 2);
    let refused = handle.submit(vec![4]).await.unwrap_err();
    assert_eq!(refused, BatchError::Overloaded { limit: 2 });
    running.await.unwrap().unwrap();
    for call in queued {
        call.await.unwrap().unwrap();
    }
    assert_eq!(
        batches.lock().unwrap().concat(),
        [1, 2, 3],
        "what was refused was not executed"
    );
}

#[tokio::test(start_paused = true)]
async fn row_counts_are_checked() {
    let (_batcher, handle, _) = start(4, 0, 2);
    let error = handle.submit(vec![0; 5]).await.unwrap_err();
    assert_eq!(error.to_string(), "a request of 5 rows, expected 1 to 4");
    assert!(handle.submit(Vec::new()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_has_gone_is_left_out() {
    let (_batcher, handle, batches) = start(8, 50, 100);
    let gone = spawn(&handle, &[1]);
    let stays = spawn(&handle, &[2]);
    tokio::time::sleep(Duration::from_millis(10)).await;
    gone.abort();
    assert_eq!(stays.await.unwrap().unwrap().outputs, [4]);
    assert_eq!(*batches.lock().unwrap(), [[2]]);
}

#[tokio::test(start_paused = true)]
async fn failures_reach_every_request_of_the_batch_and_the_next_batch_runs() {
    let (_batcher, handle, _) = start(2, 0, 100);
    let calls = [spawn(&handle, &[13]), spawn(&handle, &[1])];
    for call in calls {
        let error = call.await.unwrap().unwrap_err();
        assert_eq!(
            error,
            BatchError::Failed {
                reason: "row 13".to_owned()
            }
        );
    }
    let error = handle.submit(vec![14, 1]).await.unwrap_err();
    assert_eq!(
        error,
        BatchError::OutputCount {
            rows: 2,
            outputs: 1
        }
    );
    assert_eq!(handle.submit(vec![3]).await.unwrap().outputs, [6]);
}

#[tokio::test(start_paused = true)]
async fn a_panicking_runner_leaves_the_outcome_unknown() {
    let (batcher, handle, _) = start(2, 0, 100);
    assert_eq!(handle.submit(vec![15]).await, Err(BatchError::Lost));
    assert_eq!(handle.submit(vec![1]).await, Err(BatchError::ShuttingDown));
    batcher.shut_down().await;
}

#[tokio::test(start_paused = true)]
async fn shutting_down_finishes_what_runs_and_refuses_what_waits() {
    let (batcher, handle, batches) = start(1, 0, 100);
    let running = spawn(&handle, &[1]);
    tokio::time::sleep(COMPUTE / 2).await;
    let waiting = spawn(&handle, &[2]);
    tokio::task::yield_now().await;
    batcher.shut_down().await;
    assert_eq!(running.await.unwrap().unwrap().outputs, [2]);
    assert_eq!(waiting.await.unwrap(), Err(BatchError::ShuttingDown));
    assert_eq!(handle.submit(vec![3]).await, Err(BatchError::ShuttingDown));
    assert_eq!(*batches.lock().unwrap(), [[1]]);
}
