//! Tasks written with the macro, in slots of one host process that also submits them.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crate::support::stage;
use futures::{Stream, StreamExt};
use mobula::Error;
use mobula::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Odd(u64);

impl fmt::Display for Odd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is odd", self.0)
    }
}

static FLAKY: AtomicU32 = AtomicU32::new(0);
static BEGUN: AtomicU32 = AtomicU32::new(0);

#[mobula::task(cpus = 0.5)]
async fn square(x: u64) -> u64 {
    x * x
}

#[mobula::task]
async fn half(x: u64) -> Result<u64, Odd> {
    if x % 2 == 1 { Err(Odd(x)) } else { Ok(x / 2) }
}

#[mobula::task(max_retries = 0)]
fn panics(text: String) -> u64 {
    panic!("{text}")
}

/// Fails at its first two executions.
#[mobula::task(max_retries = 2, retry_errors = true)]
async fn flaky(ctx: &TaskContext) -> Result<u32, Odd> {
    let before = FLAKY.fetch_add(1, Ordering::SeqCst);
    if before < 2 {
        return Err(Odd(u64::from(before)));
    }
    Ok(ctx.attempt())
}

#[mobula::task]
async fn never() -> u64 {
    BEGUN.fetch_add(1, Ordering::SeqCst);
    std::future::pending().await
}

#[mobula::task]
async fn add(a: ObjectRef<u64>, b: ObjectRef<u64>) -> Result<u64, Error> {
    Ok(a.get().await? + b.get().await?)
}

/// Computed by tasks that submit tasks and wait for them.
#[mobula::task]
async fn fibonacci(ctx: &TaskContext, n: u64) -> Result<u64, Error> {
    if n < 2 {
        return Ok(n);
    }
    let cluster = ctx.cluster();
    let parts = [n - 1, n - 2].map(|n| cluster.task(fibonacci(n)).submit());
    Ok(parts[0].get().await? + parts[1].get().await?)
}

#[mobula::task]
async fn with_child(ctx: &TaskContext) -> Result<u64, Error> {
    ctx.cluster().task(never()).submit().get().await
}

static LINGERING: AtomicU32 = AtomicU32::new(0);
static HAS_HEARD: AtomicBool = AtomicBool::new(false);
static MAY_END: AtomicBool = AtomicBool::new(false);

/// Hears that it is cancelled and computes on, until it may end; says which attempt it was.
#[mobula::task]
async fn lingers(ctx: &TaskContext) -> u32 {
    LINGERING.fetch_add(1, Ordering::SeqCst);
    let moment = Duration::from_millis(1);
    while ctx.attempt() == 1 && !ctx.is_cancelled() {
        std::thread::sleep(moment);
    }
    HAS_HEARD.store(true, Ordering::SeqCst);
    while ctx.attempt() == 1 && !MAY_END.load(Ordering::SeqCst) {
        std::thread::sleep(moment);
    }
    ctx.attempt()
}

static GATE: Semaphore = Semaphore::const_new(0);

/// Quick, or as long as the gate is closed.
#[mobula::task]
async fn passes(is_held: bool) -> u64 {
    if is_held {
        BEGUN.fetch_add(1, Ordering::SeqCst);
        GATE.acquire().await.expect("it is never closed").forget();
    }
    1
}

/// Numbers, one after another, and how many of them were made at all.
#[mobula::task]
fn numbers(up_to: u64) -> impl Stream<Item = u64> {
    futures::stream::iter(0..up_to).inspect(|_| {
        MADE.fetch_add(1, Ordering::SeqCst);
    })
}

static MADE: AtomicU32 = AtomicU32::new(0);

/// Brings so many numbers and panics, unless this is the second attempt: then it brings all.
#[mobula::task(max_retries = 1, retry_errors = true)]
fn breaks_off(ctx: &TaskContext, after: u64, up_to: u64) -> StreamOf<u64> {
    let is_first = ctx.attempt() == 1;
    Box::pin(futures::stream::iter(0..up_to).map(move |n| {
        assert!(!is_first || n < after, "broken off at {n}");
        n
    }))
}

/// Waits until something becomes true, for at most a minute.
async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let limit = tokio::time::Instant::now() + Duration::from_secs(60);
    while !reached() {
        assert!(
            tokio::time::Instant::now() < limit,
            "{what}: not within 60 s"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_bring_their_values() {
    let cluster = stage().await.inside;
    let squares: Vec<_> = (0..5000)
        .map(|x| cluster.task(square(x)).submit())
        .collect();
    let some = cluster
        .wait(&squares, 10, Duration::from_secs(60))
        .await
        .unwrap();
    assert!(some.ready.len() >= 10);
    for (x, square) in (0..).zip(squares) {
        assert_eq!(square.get().await.unwrap(), x * x);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_say_what_happened() {
    let cluster = stage().await.inside;
    let half_of = |x| cluster.task(half(x)).submit();
    assert_eq!(half_of(8).get().await.unwrap(), 4);
    let error = half_of(7).get().await.unwrap_err();
    assert_eq!(error.user_error::<Odd>(), Some(Odd(7)));
    assert_eq!(
        (error.executed(), error.to_string().as_str()),
        (Executed::Yes, "7 is odd")
    );
    let error = cluster.task(panics("oh".into())).submit().get().await;
    assert_eq!(error, Err(Error::Call(CallError::Panicked("oh".into()))));
    assert_eq!(half_of(2).get().await.unwrap(), 1, "the slot goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_errors_are_a_reason_to_retry_on_request_only() {
    let cluster = stage().await.inside;
    let third = cluster.task(flaky()).submit().get().await.unwrap();
    assert_eq!(third, 3);
    FLAKY.store(0, Ordering::SeqCst);
    let failed = cluster.task(flaky()).retry_errors(false).submit();
    assert!(failed.get().await.is_err());
    assert_eq!(FLAKY.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeout_counts_from_the_submission() {
    let cluster = stage().await.inside;
    let slow = cluster
        .task(never())
        .timeout(Duration::from_millis(200))
        .submit();
    let error = slow.get().await.unwrap_err();
    let late = matches!(
        error,
        Error::Call(CallError::DeadlineExceeded { limit_ms: 200, .. })
    );
    assert!(late, "{error}");
    assert!(
        error.to_string().contains("task `it::tasks::never`"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_wait_for_what_they_need() {
    let cluster = stage().await.inside;
    let (a, b) = (
        cluster.task(half(10)).submit(),
        cluster.task(square(3)).submit(),
    );
    let sum = cluster.task(add(a.clone(), b)).submit();
    let sum = cluster.task(add(sum.clone(), sum)).submit();
    assert_eq!(sum.get().await.unwrap(), 28);
    let put = cluster.put(5u64).await.unwrap();
    let failed = cluster.task(half(7)).submit();
    let error = cluster
        .task(add(put, failed))
        .submit()
        .get()
        .await
        .unwrap_err();
    assert_eq!(error.user_error::<Odd>(), Some(Odd(7)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_that_wait_for_tasks_need_one_slot_only() {
    let stage = stage().await;
    stage.head.slots_max.store(1, Ordering::SeqCst);
    let cluster = stage.inside;
    let value = cluster.task(fibonacci(12)).submit();
    let value = tokio::time::timeout(Duration::from_secs(60), value.get())
        .await
        .expect("they stand in each other's way");
    assert_eq!(value.unwrap(), 144);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_a_task_cancels_what_it_submitted() {
    let stage = stage().await;
    stage.head.slots_max.store(1, Ordering::SeqCst);
    let cluster = stage.inside;
    let parent = cluster.task(with_child()).submit();
    until("the child begins", || BEGUN.load(Ordering::SeqCst) == 1).await;
    let waiting = cluster.task(never()).submit();
    cluster.cancel_task(&waiting, false);
    let error = waiting.get().await.unwrap_err();
    assert_eq!(error.executed(), Executed::No, "{error}");
    cluster.cancel_task(&parent, false);
    let error = parent.get().await.unwrap_err();
    assert!(
        matches!(error, Error::Call(CallError::Cancelled { .. })),
        "{error}"
    );
    // The one slot is free again only if the child has ended too.
    assert_eq!(cluster.task(half(2)).submit().get().await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_task_is_not_executed_again_though_its_slot_is_lost() {
    let stage = stage().await;
    let cluster = stage.inside.clone();
    let value = cluster.task(lingers()).submit();
    until("it begins", || LINGERING.load(Ordering::SeqCst) == 1).await;
    cluster.cancel_task(&value, false);
    until("it hears of it", || HAS_HEARD.load(Ordering::SeqCst)).await;
    // Its answer never comes.
    stage.head.kill_slots().await;
    let ended = tokio::time::timeout(Duration::from_secs(60), value.get());
    let error = ended.await.expect("it ends with its slot").unwrap_err();
    let is_cancelled = matches!(
        error,
        Error::Call(CallError::Cancelled {
            executed: Executed::Unknown,
            ..
        })
    );
    assert!(is_cancelled, "{error}");
    MAY_END.store(true, Ordering::SeqCst);
    // By now another attempt would have run in front of this one.
    assert_eq!(cluster.task(half(2)).submit().get().await.unwrap(), 1);
    assert_eq!(LINGERING.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn timeouts_of_many_tasks_that_wait_are_kept_by_one() {
    let stage = stage().await;
    stage.head.slots_max.store(1, Ordering::SeqCst);
    let cluster = stage.inside.clone();
    let held = cluster.task(passes(true)).submit();
    until("the slot is taken", || BEGUN.load(Ordering::SeqCst) == 1).await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.num_alive_tasks();
    let patient: Vec<_> = (0..10_000)
        .map(|x| cluster.task(square(x)).timeout(Duration::from_secs(3600)))
        .map(|task| task.submit())
        .collect();
    let more = metrics.num_alive_tasks().saturating_sub(before);
    assert!(more < 100, "{more} sleep for {} timeouts", patient.len());
    // Those that came last have the least time.
    let hasty: Vec<_> = (0..100)
        .map(|x| cluster.task(square(x)).timeout(Duration::from_millis(50)))
        .map(|task| task.submit())
        .collect();
    for value in hasty {
        let ended = tokio::time::timeout(Duration::from_secs(60), value.get());
        let error = ended.await.expect("it waits for the others").unwrap_err();
        let is_late = matches!(
            error,
            Error::Call(CallError::DeadlineExceeded {
                limit_ms: 50,
                executed: Executed::No,
                ..
            })
        );
        assert!(is_late, "{error}");
    }
    assert!(patient.iter().all(|value| !value.is_ready()));
    GATE.add_permits(1);
    assert_eq!(held.get().await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_behind_a_long_one_go_to_a_slot_that_is_idle() {
    let stage = stage().await;
    stage.head.slots_max.store(2, Ordering::SeqCst);
    let cluster = stage.inside;
    // From these the pool learns that such a task is quick, and gives slots many ahead.
    let quick: Vec<_> = (0..2000)
        .map(|_| cluster.task(passes(false)).submit())
        .collect();
    for value in quick {
        assert_eq!(value.get().await.unwrap(), 1);
    }
    let mixed: Vec<_> = (0..100)
        .map(|n| cluster.task(passes(n == 0)).submit())
        .collect();
    until("the long one begins", || BEGUN.load(Ordering::SeqCst) == 1).await;
    for value in &mixed[1..] {
        let value = tokio::time::timeout(Duration::from_secs(60), value.get());
        let value = value.await.expect("it stands behind the long one");
        assert_eq!(value.unwrap(), 1);
    }
    assert!(!mixed[0].is_ready());
    GATE.add_permits(1);
    assert_eq!(mixed[0].get().await.unwrap(), 1);
}

/// On one thread, so that a slot's driver that finds no end keeps the others from running.
#[tokio::test]
async fn a_slot_without_room_leaves_new_tasks_to_one_that_is_idle() {
    let stage = stage().await;
    stage.head.slots_max.store(2, Ordering::SeqCst);
    let cluster = stage.inside;
    let held = cluster.task(passes(true)).submit();
    until("a slot is taken", || BEGUN.load(Ordering::SeqCst) == 1).await;
    // Done by the other slot, which is idle then.
    assert_eq!(cluster.task(half(2)).submit().get().await.unwrap(), 1);
    // Both drivers are told at once; the busy one, which has waited longer, looks first.
    let both = [4, 6].map(|x| cluster.task(half(x)).submit());
    for (value, half) in both.iter().zip([2, 3]) {
        assert_eq!(value.get().await.unwrap(), half);
    }
    assert!(!held.is_ready());
    GATE.add_permits(1);
    assert_eq!(held.get().await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_brings_several_values_as_fast_as_they_are_read() {
    let stage = stage().await;
    stage.head.slots_max.store(1, Ordering::SeqCst);
    let cluster = stage.inside;
    let mut stream = cluster.task(numbers(1000)).window(4).submit();
    assert_eq!(stream.next().await, Some(Ok(0)));
    // While it waits for its reader its slot runs others: there is no other slot.
    assert_eq!(cluster.task(half(2)).submit().get().await.unwrap(), 1);
    let ahead = MADE.load(Ordering::SeqCst);
    assert!(ahead <= 1 + 4 + 2 + 1, "{ahead} made for one that was read");
    let rest: Vec<u64> = stream.map(|n| n.unwrap()).collect().await;
    assert_eq!(rest, (1..1000).collect::<Vec<_>>());

    // Dropped before its end, it ends.
    MADE.store(0, Ordering::SeqCst);
    let mut stream = cluster.task(numbers(1_000_000)).submit();
    assert_eq!(stream.next().await, Some(Ok(0)));
    drop(stream);
    assert_eq!(cluster.task(half(4)).submit().get().await.unwrap(), 2);
    assert!(MADE.load(Ordering::SeqCst) < 1_000_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_made_again_goes_on_where_it_broke_off() {
    let cluster = stage().await.inside;
    let stream = cluster.task(breaks_off(10, 30)).window(3).submit();
    let all: Vec<u64> = stream.map(|n| n.unwrap()).collect().await;
    assert_eq!(all, (0..30).collect::<Vec<_>>());
    let broken = cluster.task(breaks_off(5, 30)).max_retries(0).submit();
    let all: Vec<_> = broken.collect().await;
    assert_eq!(all.len(), 6);
    let error = all[5].as_ref().unwrap_err();
    assert!(error.to_string().contains("broken off at 5"), "{error}");
}
