//! Actors written with the macro, called through references: from their own process, and from
//! another over QUIC.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::support::{self, JOB, stage};
use mobula::Error;
use mobula::prelude::*;
use mobula_core::error::ErrorCode;
use serde::{Deserialize, Serialize};

struct Counter {
    n: u64,
    started: bool,
    starts: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct OutOfRange {
    wanted: u64,
}

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is out of range", self.wanted)
    }
}

#[mobula::actor(name = "test.counter")]
impl Counter {
    async fn new(ctx: &ActorContext, start: u64) -> Result<Self, OutOfRange> {
        if start > 100 {
            return Err(OutOfRange { wanted: start });
        }
        Ok(Counter {
            n: start,
            started: false,
            starts: ctx.incarnation().0,
        })
    }

    #[mobula(started)]
    async fn note_start(&mut self) {
        self.started = true;
    }

    /// Adds.
    async fn add(&mut self, by: u64) -> u64 {
        self.n += by;
        self.bounded()
    }

    async fn checked(&mut self, wanted: u64) -> Result<u64, OutOfRange> {
        if wanted > 100 {
            return Err(OutOfRange { wanted });
        }
        Ok(wanted)
    }

    fn describe(&self, ctx: &ActorContext, mut prefix: String, _unused: Option<Vec<u8>>) -> String {
        prefix.push_str(&format!(
            " {} in {} {}",
            ctx.name().unwrap_or("-"),
            ctx.job(),
            self.started
        ));
        prefix
    }

    async fn crash(&mut self) {
        panic!("at {}", self.n)
    }

    async fn quit(&self, ctx: &ActorContext) {
        ctx.complete();
    }

    /// Calls another actor, given as an argument, through this process's cluster.
    async fn ask(
        &self,
        ctx: &ActorContext,
        other: ActorRef<Counter>,
        by: u64,
    ) -> Result<u64, Error> {
        let other = ActorRef::<Counter>::from_id(&ctx.cluster(), other.actor_id());
        other.add(by).await
    }

    #[mobula(local)]
    fn bounded(&self) -> u64 {
        self.n.min(1_000)
    }

    fn generation(&self) -> u64 {
        self.starts
    }
}

#[tokio::test]
async fn the_constructor_is_still_a_function() {
    let stage = stage().await;
    let context = ActorContext::new(
        ActorId(1),
        Incarnation(4),
        None,
        mobula_host::HostRuntime::new(support_info(&stage)),
    );
    let mut counter = Counter::construct(&context, 5).await.unwrap();
    assert_eq!((counter.add(3).await, counter.generation()), (8, 4));
}

fn support_info(stage: &support::Stage) -> mobula_host::HostInfo {
    mobula_host::HostInfo {
        cluster_id: "test".into(),
        job: JOB,
        node: mobula_core::id::NodeId(1),
        node_name: "one".into(),
        host: mobula_core::id::HostId(1),
        role: mobula_wire::host::HostRole::Actors,
        api_addresses: Vec::new(),
        storage: stage.inside.storage().unwrap().clone(),
    }
}

#[tokio::test]
async fn calls_are_typed_from_inside_and_outside() {
    let stage = stage().await;
    for cluster in [&stage.inside, &stage.outside] {
        let counter = cluster
            .actor(Counter::new(5))
            .name("c")
            .spawn()
            .await
            .unwrap();
        assert_eq!(counter.add(3).await.unwrap(), 8);
        assert_eq!(counter.checked(7).await.unwrap(), 7);
        let failure = counter.checked(700).await.unwrap_err();
        assert_eq!(failure.executed(), Executed::Yes);
        assert_eq!(failure.user(), Some(OutOfRange { wanted: 700 }));
        let text = counter.describe("I am".into(), None).await.unwrap();
        assert_eq!(text, "I am c in job-3 true");
    }
}

#[tokio::test]
async fn actors_are_found_by_name_and_passed_as_arguments() {
    let stage = stage().await;
    let first = stage
        .outside
        .actor(Counter::new(1))
        .name("first")
        .spawn()
        .await
        .unwrap();
    let second = stage
        .outside
        .actor(Counter::new(10))
        .name("second")
        .spawn()
        .await
        .unwrap();
    assert_eq!(first.ask(second.clone(), 5).await.unwrap(), 15);
    let found = stage.inside.get_actor::<Counter>("second").await.unwrap();
    assert_eq!(
        (found.actor_id(), found.add(0).await.unwrap()),
        (second.actor_id(), 15)
    );
    let error = stage
        .inside
        .get_actor::<Counter>("third")
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NotFound));

    let group = [1, 2, 3].map(|n| stage.outside.actor(Counter::new(n)).spread("group"));
    let group = stage.outside.group(group).spawn().await.unwrap();
    for (expected, member) in (1..).zip(group) {
        assert_eq!(member.add(0).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn after_a_panic_the_next_call_meets_the_restarted_actor() {
    let stage = stage().await;
    let counter = stage
        .outside
        .actor(Counter::new(5))
        .max_restarts(1)
        .spawn()
        .await
        .unwrap();
    counter.add(3).await.unwrap();
    let before = counter.generation().await.unwrap();
    let error = counter.crash().await.unwrap_err();
    assert_eq!(error, Error::Call(CallError::Panicked("at 8".into())));
    assert_eq!(error.executed(), Executed::Unknown);
    let patient = Duration::from_secs(20);
    assert_eq!(
        counter.add(1).timeout(patient).await.unwrap(),
        6,
        "state is new"
    );
    assert!(counter.generation().await.unwrap() > before);

    // Its budget is used up: the next panic is the last.
    counter.crash().await.unwrap_err();
    let error = counter.add(1).timeout(patient).await.unwrap_err();
    let Error::Call(CallError::ActorDied {
        executed, reason, ..
    }) = &error
    else {
        panic!("{error}")
    };
    assert_eq!(
        (*executed, reason.as_str()),
        (Executed::No, "panicked: at 6")
    );
}

#[tokio::test]
async fn an_actor_that_ends_itself_is_gone() {
    let stage = stage().await;
    let counter = stage
        .inside
        .actor(Counter::new(5))
        .max_restarts(9)
        .spawn()
        .await
        .unwrap();
    counter.quit().await.unwrap();
    let error = counter
        .add(1)
        .timeout(Duration::from_secs(20))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("has ended: completed"),
        "{error}"
    );
}

#[tokio::test]
async fn a_constructors_error_is_the_reason_of_the_end() {
    let stage = stage().await;
    let counter = stage
        .outside
        .actor(Counter::new(101))
        .spawn()
        .await
        .unwrap();
    let error = counter.add(1).await.unwrap_err();
    assert!(
        error.to_string().contains("failed: 101 is out of range"),
        "{error}"
    );
}

#[tokio::test]
async fn a_lost_reply_creates_one_actor() {
    let stage = stage().await;
    stage.head.lose_replies.store(2, Ordering::SeqCst);
    let counter = stage.outside.actor(Counter::new(5)).spawn().await.unwrap();
    assert_eq!(counter.actor_id(), ActorId(100));
    let next = stage.outside.actor(Counter::new(5)).spawn().await.unwrap();
    assert_eq!(next.actor_id(), ActorId(101));
    assert_eq!(
        *stage.head.stamps.lock().unwrap(),
        [(9, 1), (9, 1), (9, 1), (9, 2)]
    );
}

#[tokio::test]
async fn a_client_that_goes_closes_its_sessions() {
    let stage = stage().await;
    stage.outside.actor(Counter::new(5)).spawn().await.unwrap();
    drop(stage.outside);
    let mut closed = stage.head.closed.subscribe();
    let told = closed.wait_for(|closed| *closed == [9]);
    tokio::time::timeout(Duration::from_secs(20), told)
        .await
        .expect("it is closed in time")
        .unwrap();
}

#[tokio::test]
async fn actors_that_are_created_at_the_same_time_share_requests() {
    let stage = stage().await;
    let spawning = (0..40).map(|n| stage.outside.actor(Counter::new(n)).spawn());
    let counters = futures::future::try_join_all(spawning).await.unwrap();
    // Each got its own, in the order in which they were asked for.
    for (n, counter) in (0..).zip(&counters) {
        assert_eq!(counter.add(0).await.unwrap(), n);
    }
    let requests = stage.head.stamps.lock().unwrap().len();
    assert!(
        requests <= 2,
        "{requests} requests for {} actors",
        counters.len()
    );
}

#[tokio::test]
async fn a_change_in_a_forgotten_session_is_sent_once_more_in_a_new_one() {
    let stage = stage().await;
    let first = stage.outside.actor(Counter::new(5)).spawn().await.unwrap();
    stage.head.first_known_session.store(10, Ordering::SeqCst);
    let second = stage.outside.actor(Counter::new(5)).spawn().await.unwrap();
    assert_eq!(
        (first.actor_id(), second.actor_id()),
        (ActorId(100), ActorId(101))
    );
    assert_eq!(
        *stage.head.stamps.lock().unwrap(),
        [(9, 1), (9, 2), (10, 1)]
    );
    // A head that knows no session at all is not asked for ever.
    stage.head.first_known_session.store(90, Ordering::SeqCst);
    let refused = stage.outside.actor(Counter::new(5)).spawn().await;
    let error = refused.err().unwrap();
    assert_eq!(
        (error.code(), error.executed()),
        (Some(ErrorCode::SessionExpired), Executed::No)
    );
    assert_eq!(stage.head.stamps.lock().unwrap().len(), 5);
}

#[tokio::test]
async fn what_a_forgotten_session_may_have_done_is_not_done_again() {
    let stage = stage().await;
    stage.head.lose_replies.store(1, Ordering::SeqCst);
    stage.head.forgets_with_reply.store(true, Ordering::SeqCst);
    let unknown = stage.outside.actor(Counter::new(5)).spawn().await;
    let error = unknown.err().unwrap();
    assert_eq!(
        (error.code(), error.executed()),
        (Some(ErrorCode::SessionExpired), Executed::Unknown)
    );
    assert_eq!(*stage.head.stamps.lock().unwrap(), [(9, 1), (9, 1)]);
}

#[tokio::test]
async fn without_a_job_or_an_actor_the_error_says_what_to_do() {
    let stage = stage().await;
    let error = stage.outside.set_result("x").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "only a job's driver can store its result"
    );
    let nobody = ActorRef::<Counter>::from_id(&stage.outside, ActorId(1));
    let error = nobody.add(1).await.unwrap_err();
    assert_eq!(
        (error.code(), error.executed()),
        (Some(ErrorCode::NotFound), Executed::No)
    );
}
