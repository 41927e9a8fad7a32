//! Actors of one process: order, admission, and every way in which they end.

use std::time::Duration;

use crate::support::{
    FIRST, PATIENCE, call, exited, gate, next, open, order, table, table_with, told,
};
use mobula_core::error::{CallError, Executed};
use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, Incarnation};
use mobula_host::Notice;
use mobula_host::mailbox::IncomingCall;
use mobula_host::reply::Reply;
use mobula_host::supervision::ActorEvent;

#[tokio::test]
async fn calls_run_in_the_order_in_which_they_were_admitted() {
    let actor = ActorId(100);
    let (table, _events) = table_with(actor).await;
    let waiting = call(&table, actor, "wait", "a");
    open("actor-100 began").await;
    let answers = ["b", "c"].map(|text| call(&table, actor, "tell", text));
    gate("actor-100").add_permits(1);
    assert_eq!(told(waiting.await), ["started", "a"]);
    let [b, c] = answers;
    assert_eq!(told(b.await), ["started", "a", "b"]);
    assert_eq!(told(c.await), ["started", "a", "b", "c"]);
}

#[tokio::test]
async fn past_its_capacity_a_mailbox_refuses() {
    let actor = ActorId(101);
    let (table, _events) = table_with(actor).await;
    let running = call(&table, actor, "wait", "a");
    open("actor-101 began").await;
    let waiting = ["b", "c"].map(|text| call(&table, actor, "tell", text));
    let error = call(&table, actor, "tell", "d").await.unwrap_err();
    assert_eq!(
        error,
        CallError::Overloaded {
            actor: "actor-101".into(),
            capacity: 2
        }
    );
    assert_eq!(error.executed(), Executed::No);
    gate("actor-101").add_permits(1);
    running.await.unwrap();
    for answer in waiting {
        answer.await.unwrap();
    }
    assert_eq!(
        told(call(&table, actor, "tell", "e").await).last().unwrap(),
        "e"
    );
}

#[tokio::test]
async fn a_panic_ends_its_actor_only_and_says_what_ran() {
    let (actor, other) = (ActorId(102), ActorId(103));
    let (table, mut events) = table_with(actor).await;
    table.start_actor(order(other, FIRST, b"")).await;
    next(&mut events).await;

    let running = call(&table, actor, "wait", "a");
    open("actor-102 began").await;
    let panicking = call(&table, actor, "panic", "boom");
    let behind = call(&table, actor, "tell", "never");
    gate("actor-102").add_permits(1);
    running.await.unwrap();
    let error = panicking.await.unwrap_err();
    assert_eq!(error, CallError::Panicked("told to: boom".into()));
    assert_eq!(error.executed(), Executed::Unknown);
    assert_eq!(behind.await.unwrap_err().executed(), Executed::No);
    assert_eq!(
        next(&mut events).await,
        exited(actor, ExitReason::Panicked("told to: boom".into()))
    );

    let gone = call(&table, actor, "tell", "x").await.unwrap_err();
    assert!(
        matches!(
            gone,
            CallError::ActorUnavailable {
                executed: Executed::No,
                ..
            }
        ),
        "{gone}"
    );
    call(&table, other, "tell", "still here").await.unwrap();

    // A second panic: the supervisor has survived the first.
    call(&table, other, "panic", "too").await.unwrap_err();
    assert_eq!(
        next(&mut events).await,
        exited(other, ExitReason::Panicked("told to: too".into()))
    );
    table.start_actor(order(actor, Incarnation(12), b"")).await;
    let started = ActorEvent::Started {
        actor,
        incarnation: Incarnation(12),
    };
    assert_eq!(next(&mut events).await, started);
}

#[tokio::test]
async fn users_errors_bad_calls_and_large_values_are_told_apart() {
    let actor = ActorId(104);
    let (table, _events) = table_with(actor).await;
    let user = call(&table, actor, "refuse", "no").await.unwrap_err();
    assert!(matches!(user, CallError::User { .. }), "{user}");
    let bad = call(&table, actor, "fly", "").await.unwrap_err();
    assert_eq!(bad, CallError::BadCall("no method `fly`".into()));
    let large = call(&table, actor, "large", "").await.unwrap_err();
    assert_eq!(large.executed(), Executed::Yes);
    assert!(large.to_string().contains("return it in parts"), "{large}");
}

#[tokio::test]
async fn a_stop_lets_the_method_finish_and_the_actor_tidy_up() {
    let actor = ActorId(105);
    let (table, mut events) = table_with(actor).await;
    let running = call(&table, actor, "wait", "a");
    open("actor-105 began").await;
    let behind = call(&table, actor, "tell", "b");
    table.stop_actor(actor, FIRST, PATIENCE).await;
    gate("actor-105").add_permits(1);
    running.await.unwrap();
    assert_eq!(behind.await.unwrap_err().executed(), Executed::No);
    open("actor-105 stopped").await;
    assert_eq!(next(&mut events).await, exited(actor, ExitReason::Stopped));
    // Said again, since the agent may have missed it.
    table.stop_actor(actor, FIRST, PATIENCE).await;
    assert_eq!(next(&mut events).await, exited(actor, ExitReason::Stopped));
}

#[tokio::test]
async fn after_its_grace_an_actor_is_killed() {
    let actor = ActorId(106);
    let (table, mut events) = table_with(actor).await;
    let running = call(&table, actor, "wait", "a");
    open("actor-106 began").await;
    table
        .stop_actor(actor, FIRST, Duration::from_millis(10))
        .await;
    assert_eq!(running.await.unwrap_err().executed(), Executed::Unknown);
    assert_eq!(next(&mut events).await, exited(actor, ExitReason::Stopped));
    assert_eq!(table.count(), 0);
}

#[tokio::test]
async fn an_actor_may_end_itself() {
    let (table, mut events) = table_with(ActorId(107)).await;
    call(&table, ActorId(107), "complete", "").await.unwrap();
    assert_eq!(
        next(&mut events).await,
        exited(ActorId(107), ExitReason::Completed)
    );
    table.start_actor(order(ActorId(108), FIRST, b"")).await;
    next(&mut events).await;
    call(&table, ActorId(108), "fail", "tired").await.unwrap();
    assert_eq!(
        next(&mut events).await,
        exited(ActorId(108), ExitReason::Failed("tired".into()))
    );
}

#[tokio::test]
async fn a_failed_start_is_an_end_with_its_reason() {
    let (table, mut events) = table().await;
    let mut unknown = order(ActorId(113), FIRST, b"");
    unknown.spec.kind = mobula_core::spec::ActorKind::Actor {
        type_name: "elsewhere::Thing".into(),
    };
    let cases = [
        (
            order(ActorId(110), FIRST, b"fail"),
            ExitReason::Failed("told to".into()),
        ),
        (
            order(ActorId(111), FIRST, b"bad"),
            ExitReason::StartFailed("constructor arguments: not these".into()),
        ),
        (
            order(ActorId(112), FIRST, b"panic"),
            ExitReason::Panicked("in the constructor".into()),
        ),
        (
            unknown,
            ExitReason::StartFailed(
                "this program has no actor type `elsewhere::Thing`; it has: probe; was the job \
                 submitted with an older binary?"
                    .into(),
            ),
        ),
    ];
    for (start, reason) in cases {
        let actor = start.actor;
        table.start_actor(start).await;
        assert_eq!(next(&mut events).await, exited(actor, reason));
    }
    assert_eq!(table.count(), 0);
}

#[tokio::test]
async fn a_constructor_that_never_ends_can_be_stopped() {
    let (table, mut events) = table().await;
    let actor = ActorId(114);
    table.start_actor(order(actor, FIRST, b"never")).await;
    let early = call(&table, actor, "tell", "x").await.unwrap_err();
    assert!(
        early.to_string().contains("it is starting (not executed)"),
        "{early}"
    );
    table.stop_actor(actor, FIRST, PATIENCE).await;
    assert_eq!(next(&mut events).await, exited(actor, ExitReason::Stopped));
}

#[tokio::test]
async fn each_incarnation_starts_once_and_the_newest_wins() {
    let actor = ActorId(115);
    let (table, mut events) = table_with(actor).await;
    table.start_actor(order(actor, FIRST, b"")).await;
    table.start_actor(order(actor, Incarnation(10), b"")).await;
    table.start_actor(order(actor, Incarnation(12), b"")).await;
    let mut seen = [next(&mut events).await, next(&mut events).await];
    seen.sort_by_key(|event| matches!(event, ActorEvent::Exited { .. }));
    let started = ActorEvent::Started {
        actor,
        incarnation: Incarnation(12),
    };
    assert_eq!(seen, [started, exited(actor, ExitReason::Stopped)]);
    // `call` means the first start, which is fenced now.
    let error = call(&table, actor, "tell", "x").await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("meant for start #11, here runs #12"),
        "{error}"
    );
}

#[tokio::test]
async fn a_notice_reaches_actors_and_watchers() {
    let actor = ActorId(116);
    let (table, _events) = table_with(actor).await;
    table.notify(Some(Notice { deadline_ms: 42 }));
    let heard = told(call(&table, actor, "tell", "x").await);
    assert_eq!(heard, ["started", "notice 42", "x"]);
    table.notify(None);
    table.stop_all(PATIENCE).await;
    assert_eq!(table.count(), 0);
}

#[tokio::test]
async fn a_call_past_its_deadline_is_not_begun() {
    let actor = ActorId(117);
    let (table, _events) = table_with(actor).await;
    let (reply, answer) = Reply::same_process(actor, None);
    let deadline = mobula_host::mailbox::Deadline {
        at: tokio::time::Instant::now(),
        limit_ms: 1,
    };
    let call = IncomingCall {
        method: "tell".into(),
        arguments: bytes::Bytes::new(),
        deadline: Some(deadline),
        key: None,
        reply,
    };
    table.admit(actor, FIRST, call);
    let error = answer.await.unwrap_err();
    assert!(
        matches!(
            error,
            CallError::DeadlineExceeded {
                executed: Executed::No,
                ..
            }
        ),
        "{error}"
    );
}
