//! What a caller may ask of a call: an end before its time, several values, more than one try,
//! exactly one execution.

use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::support::stage;
use futures::stream::{self, Stream};
use futures::{FutureExt, StreamExt};
use mobula::Error;
use mobula::prelude::*;
use tokio::sync::Semaphore;

const PATIENCE: Duration = Duration::from_secs(20);

/// What a method does goes through here to the test, by the test's own number.
struct Signals {
    began: Semaphore,
    go_on: Semaphore,
    dropped: Semaphore,
    made: AtomicU32,
}

fn signals(test: u32) -> Arc<Signals> {
    static ALL: std::sync::Mutex<Vec<(u32, Arc<Signals>)>> = std::sync::Mutex::new(Vec::new());
    let mut all = ALL.lock().expect("nobody panics while it is held");
    if let Some((_, signals)) = all.iter().find(|(known, _)| *known == test) {
        return Arc::clone(signals);
    }
    let signals = Arc::new(Signals {
        began: Semaphore::new(0),
        go_on: Semaphore::new(0),
        dropped: Semaphore::new(0),
        made: AtomicU32::new(0),
    });
    all.push((test, Arc::clone(&signals)));
    signals
}

async fn happened(semaphore: &Semaphore) {
    tokio::time::timeout(PATIENCE, semaphore.acquire())
        .await
        .expect("it happens in time")
        .expect("it is never closed")
        .forget();
}

struct TellsWhenDropped(Arc<Signals>);

impl Drop for TellsWhenDropped {
    fn drop(&mut self) {
        self.0.dropped.add_permits(1);
    }
}

struct Worker {
    test: u32,
    done: Vec<u32>,
}

#[mobula::actor(name = "test.worker")]
impl Worker {
    fn new(test: u32) -> Self {
        let done = Vec::new();
        Worker { test, done }
    }

    async fn note(&mut self, number: u32) -> Vec<u32> {
        self.done.push(number);
        self.done.clone()
    }

    /// Runs until the test lets it go on.
    async fn wait(&mut self, number: u32) -> u32 {
        let signals = signals(self.test);
        let _told = TellsWhenDropped(Arc::clone(&signals));
        signals.began.add_permits(1);
        happened(&signals.go_on).await;
        self.done.push(number);
        number
    }

    /// Waits for another actor's method.
    async fn wait_for(&self, ctx: &ActorContext, other: ActorRef<Worker>) -> Result<u32, Error> {
        // Through the stage's host: this process is no host otherwise.
        let other = ActorRef::<Worker>::from_id(&ctx.cluster(), other.actor_id());
        other.wait(1).await
    }

    /// Ends early when it is told to.
    async fn polite(&self) -> String {
        signals(self.test).began.add_permits(1);
        let scope = CallScope::current().expect("a method runs in one");
        tokio::select! {
            () = scope.cancelled() => "told to end".to_owned(),
            () = tokio::time::sleep(PATIENCE) => "never told".to_owned(),
        }
    }

    async fn time_left_ms(&self) -> Option<u64> {
        let left = CallScope::current()?.time_left()?;
        Some(left.as_millis() as u64)
    }

    /// Panics as often as the test has not let it go on.
    async fn fragile(&mut self) -> u32 {
        let signals = signals(self.test);
        let tries = signals.made.fetch_add(1, Ordering::SeqCst) + 1;
        match signals.go_on.try_acquire() {
            Ok(permit) => permit.forget(),
            Err(_) => panic!("try {tries}"),
        }
        tries
    }

    /// Counts what it makes, not what is read.
    fn count(&mut self, to: u32) -> impl Stream<Item = u32> {
        let signals = signals(self.test);
        let told = TellsWhenDropped(Arc::clone(&signals));
        stream::iter(1..=to).map(move |number| {
            let _told = &told;
            signals.made.store(number, Ordering::SeqCst);
            number
        })
    }

    async fn checked(&self, to: u32) -> StreamOf<Result<u32, String>> {
        Box::pin(stream::iter((1..=to).map(|number| match number {
            3 => Err("three".to_owned()),
            other => Ok(other),
        })))
    }

    async fn broken(&self) -> StreamOf<u32> {
        Box::pin(stream::iter(1..5).map(|number| match number {
            3 => panic!("at three"),
            other => other,
        }))
    }
}

#[tokio::test]
async fn a_cancelled_call_ends_and_one_that_waits_never_runs() {
    let stage = stage().await;
    for (test, cluster) in [(1, &stage.inside), (2, &stage.outside)] {
        let worker = cluster.actor(Worker::new(test)).spawn().await.unwrap();
        let signals = signals(test);
        let running = worker.wait(1).start().await.unwrap();
        happened(&signals.began).await;
        let waiting = worker.note(2).start().await.unwrap();
        waiting.cancel();
        let error = waiting.await.unwrap_err();
        assert!(
            matches!(error, Error::Call(CallError::Cancelled { .. })),
            "{error}"
        );
        assert_eq!(error.executed(), Executed::No);

        running.cancel();
        let error = running.await.unwrap_err();
        assert!(
            matches!(error, Error::Call(CallError::Cancelled { .. })),
            "{error}"
        );
        assert_eq!(error.executed(), Executed::Unknown);
        happened(&signals.dropped).await;
        assert_eq!(worker.note(3).await.unwrap(), [3], "the actor goes on");
    }
}

#[tokio::test]
async fn a_call_may_end_with_whoever_waits_for_it() {
    let stage = stage().await;
    for (test, cluster) in [(21, &stage.inside), (22, &stage.outside)] {
        let worker = cluster.actor(Worker::new(test)).spawn().await.unwrap();
        let signals = signals(test);
        // One that runs, and one that waits behind it.
        let running = tokio::spawn(worker.wait(1).cancel_on_drop().into_future());
        happened(&signals.began).await;
        {
            let waiting = worker.note(2).cancel_on_drop().into_future();
            tokio::pin!(waiting);
            assert!(waiting.as_mut().now_or_never().is_none());
        }
        running.abort();
        happened(&signals.dropped).await;
        assert_eq!(worker.note(3).await.unwrap(), [3], "the actor goes on");
        // One that is answered is over.
        assert_eq!(worker.note(4).cancel_on_drop().await.unwrap(), [3, 4]);
    }
}

#[tokio::test]
async fn a_method_may_look_whether_it_is_wanted() {
    let stage = stage().await;
    let worker = stage.outside.actor(Worker::new(3)).spawn().await.unwrap();
    let running = worker.polite().start().await.unwrap();
    happened(&signals(3).began).await;
    running.request_cancel();
    assert_eq!(running.await.unwrap(), "told to end");
}

#[tokio::test]
async fn cancellation_reaches_the_calls_that_a_method_waits_for() {
    let stage = stage().await;
    for test in [4, 5] {
        let inner = stage
            .outside
            .actor(Worker::new(test))
            .spawn()
            .await
            .unwrap();
        let outer = stage.outside.actor(Worker::new(0)).spawn().await.unwrap();
        let running = outer.wait_for(inner.clone()).start().await.unwrap();
        happened(&signals(test).began).await;
        match test {
            4 => running.cancel(),
            _ => running.request_cancel(),
        }
        if test == 4 {
            happened(&signals(test).dropped).await;
            running.await.unwrap_err();
            assert_eq!(inner.note(9).await.unwrap(), [9]);
        } else {
            // Only told: the inner method does not look, and ends when it ends.
            signals(test).go_on.add_permits(1);
            assert_eq!(running.await.unwrap(), 1);
        }
    }
}

#[tokio::test]
async fn a_deadline_travels_with_the_calls_that_a_method_makes() {
    let stage = stage().await;
    let inner = stage.outside.actor(Worker::new(6)).spawn().await.unwrap();
    let outer = stage.outside.actor(Worker::new(0)).spawn().await.unwrap();
    let left = outer.time_left_ms().timeout(PATIENCE).await.unwrap();
    assert!(left.is_some_and(|left| left <= PATIENCE.as_millis() as u64));
    assert_eq!(outer.time_left_ms().await.unwrap(), None);

    // The inner call has no timeout of its own.
    let short = Duration::from_millis(300);
    let error = outer
        .wait_for(inner.clone())
        .timeout(short)
        .await
        .unwrap_err();
    // Whoever notices first: the caller itself, or the method on behalf of its own call.
    let noticed = match error {
        CallFailure::User(inner) => inner,
        CallFailure::System(own) => own,
    };
    assert!(
        matches!(noticed, Error::Call(CallError::DeadlineExceeded { .. })),
        "{noticed}"
    );
    // The outer method has ended, though nobody let the inner one go on.
    assert_eq!(outer.note(1).timeout(PATIENCE).await.unwrap(), [1]);
    signals(6).go_on.add_permits(1);
}

#[tokio::test]
async fn a_stream_brings_its_values_in_order_and_then_ends() {
    let stage = stage().await;
    for cluster in [&stage.inside, &stage.outside] {
        let worker = cluster.actor(Worker::new(7)).spawn().await.unwrap();
        let stream = worker.count(1000).window(8).await.unwrap();
        let values: Vec<u32> = stream.map(Result::unwrap).collect().await;
        assert_eq!(values, (1..=1000).collect::<Vec<_>>());
        let mut stream = worker.checked(4).await.unwrap();
        let mut values = Vec::new();
        while let Some(value) = stream.next().await {
            values.push(value.unwrap());
        }
        assert_eq!(values, [Ok(1), Ok(2), Err("three".to_owned()), Ok(4)]);
    }
}

#[tokio::test]
async fn a_reader_that_waits_holds_the_method_up_and_one_that_leaves_ends_it() {
    let stage = stage().await;
    for (test, cluster) in [(8, &stage.inside), (9, &stage.outside)] {
        let worker = cluster.actor(Worker::new(test)).spawn().await.unwrap();
        let signals = signals(test);
        let mut stream = worker.count(1_000_000).window(4).await.unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap(), 1);
        // One read, four under way or waiting here, one in the method's hand.
        let made = signals.made.load(Ordering::SeqCst);
        assert!(made <= 6, "{made} values were made for one that was read");
        drop(stream);
        happened(&signals.dropped).await;
        assert_eq!(worker.note(1).await.unwrap(), [1], "the actor goes on");
        assert!(signals.made.load(Ordering::SeqCst) <= 6);
    }
}

#[tokio::test]
async fn an_error_is_the_last_thing_of_a_stream() {
    let stage = stage().await;
    let worker = stage.outside.actor(Worker::new(10)).spawn().await.unwrap();
    let mut stream = worker.broken().await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), 1);
    assert_eq!(stream.next().await.unwrap().unwrap(), 2);
    let error = stream.next().await.unwrap().unwrap_err();
    assert_eq!(error, Error::Call(CallError::Panicked("at three".into())));
    assert!(stream.next().await.is_none());
    // A stream of an actor that has ended says so.
    let error = match worker.count(1).timeout(PATIENCE).await {
        Ok(mut stream) => stream.next().await.unwrap().unwrap_err(),
        Err(error) => error,
    };
    let Error::Call(CallError::ActorDied { executed, .. }) = &error else {
        panic!("{error}");
    };
    assert_eq!(*executed, Executed::No);
}

#[tokio::test]
async fn what_may_run_twice_is_sent_again() {
    let stage = stage().await;
    let fragile = |test: u32| {
        stage
            .outside
            .actor(Worker::new(test))
            .max_restarts(9)
            .spawn()
    };
    let worker = fragile(11).await.unwrap();
    let error = worker.fragile().await.unwrap_err();
    assert_eq!(error, Error::Call(CallError::Panicked("try 1".into())));
    let error = worker.fragile().max_retries(2).await.unwrap_err();
    assert_eq!(error, Error::Call(CallError::Panicked("try 4".into())));

    let worker = fragile(12).await.unwrap();
    let running = worker.fragile().max_retries(9).start().await.unwrap();
    while signals(12).made.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    signals(12).go_on.add_permits(1);
    assert!(running.await.unwrap() >= 3);
}

struct Account {
    balance: u64,
}

#[mobula::actor(name = "test.account", durable)]
impl Account {
    fn new(ctx: &ActorContext) -> Result<Self, StateError> {
        let balance = ctx.state().load("balance")?.unwrap_or(0);
        Ok(Account { balance })
    }

    async fn deposit(&mut self, ctx: &ActorContext, amount: u64) -> Result<u64, StateError> {
        self.balance += amount;
        ctx.state().save("balance", &self.balance)?;
        Ok(self.balance)
    }

    async fn crash(&mut self, ctx: &ActorContext) -> Result<u64, StateError> {
        ctx.state().save("balance", &1_000_000_u64)?;
        panic!("before it returned")
    }
}

#[tokio::test]
async fn a_durable_actor_goes_on_where_its_last_answer_was() {
    let stage = stage().await;
    let account = stage
        .outside
        .actor(Account::new())
        .max_restarts(9)
        .spawn()
        .await
        .unwrap();
    assert_eq!(account.deposit(5).await.unwrap(), 5);
    assert_eq!(account.deposit(1).exactly_once().await.unwrap(), 6);
    for balance in [7, 8] {
        account.crash().await.unwrap_err();
        let found = account
            .deposit(1)
            .exactly_once()
            .timeout(PATIENCE)
            .await
            .unwrap();
        assert_eq!(found, balance, "what the crashed method saved is gone");
    }
}

#[tokio::test]
async fn exactly_once_is_refused_by_what_keeps_nothing() {
    let stage = stage().await;
    let worker = stage.outside.actor(Worker::new(13)).spawn().await.unwrap();
    let error = worker.note(1).exactly_once().await.unwrap_err();
    assert!(
        matches!(error, Error::Call(CallError::BadCall(_))),
        "{error}"
    );
    assert!(error.to_string().contains("durable"), "{error}");
    assert_eq!(error.executed(), Executed::No);
    assert_eq!(worker.note(2).await.unwrap(), [2]);
}
