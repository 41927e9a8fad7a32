//! Several methods of one actor at once: who runs beside whom, and every way in which it ends.

use std::sync::Arc;

use crate::support::{FIRST, PATIENCE, call, exited, gate, next, open, order, runtime};
use futures::future::BoxFuture;
use mobula_core::codec;
use mobula_core::error::{CallError, Executed};
use mobula_core::exit::ExitReason;
use mobula_core::id::ActorId;
use mobula_host::actor::{Concurrency, Dispatching};
use mobula_host::registry::ConstructError;
use mobula_host::supervision::{ActorEvent, ActorTable};
use mobula_host::{
    Access, ActorBody, ActorContext, ActorType, ConcurrentActor, DynActor, MethodCall, MethodError,
    Registry,
};
use tokio::sync::mpsc;

/// Says what begins through gates, and waits for its own gate where told.
struct Crowd {
    log: Vec<String>,
}

async fn shared(call: MethodCall<'_>) -> Result<Vec<u8>, MethodError> {
    let text: String = codec::decode(call.arguments, 1 << 10).unwrap();
    let actor = call.context.actor();
    gate(&format!("{actor} {text} began")).add_permits(1);
    if call.method == "panic" {
        panic!("in {text}");
    }
    let go_on = gate(&format!("{actor} {text}"));
    go_on.acquire().await.expect("gates stay open").forget();
    Ok(codec::encode_plain(&text))
}

impl DynActor for Crowd {
    fn dispatch<'a>(&'a mut self, call: MethodCall<'a>) -> Dispatching<'a> {
        Box::pin(async move {
            let text = codec::decode(call.arguments, 1 << 10).unwrap();
            self.log.push(text);
            let actor = call.context.actor();
            gate(&format!("{actor} {} began", self.log.join(","))).add_permits(1);
            Ok(codec::encode_plain(&self.log))
        })
    }

    fn started<'a>(&'a mut self, _: &'a ActorContext) -> BoxFuture<'a, ()> {
        self.log.push("started".to_owned());
        Box::pin(std::future::ready(()))
    }

    fn on_notice<'a>(&'a mut self, deadline_ms: u64, _: &'a ActorContext) -> BoxFuture<'a, ()> {
        self.log.push(format!("notice {deadline_ms}"));
        Box::pin(std::future::ready(()))
    }

    fn on_stop<'a>(&'a mut self, context: &'a ActorContext) -> BoxFuture<'a, ()> {
        gate(&format!("{} stopped", context.actor())).add_permits(1);
        Box::pin(std::future::ready(()))
    }
}

impl ConcurrentActor for Crowd {
    fn dispatch_shared<'a>(&'a self, call: MethodCall<'a>) -> Dispatching<'a> {
        Box::pin(shared(call))
    }
}

fn construct(
    initial: Vec<u8>,
    _: ActorContext,
) -> BoxFuture<'static, Result<ActorBody, ConstructError>> {
    let crowd = Crowd { log: Vec::new() };
    let concurrency = Concurrency {
        limits: &[2, 1],
        access: |method| match method {
            "write" => Access::Exclusive,
            "io" => Access::Shared { group: 1 },
            _ => Access::Shared { group: 0 },
        },
        heeds_notices: initial != b"heedless",
    };
    Box::pin(std::future::ready(Ok(ActorBody::concurrent(
        crowd,
        concurrency,
    ))))
}

/// A table in which a crowd runs; three calls may wait.
async fn crowd(actor: ActorId) -> (Arc<ActorTable>, mpsc::Receiver<ActorEvent>) {
    crowd_from(actor, b"").await
}

async fn crowd_from(
    actor: ActorId,
    initial: &[u8],
) -> (Arc<ActorTable>, mpsc::Receiver<ActorEvent>) {
    let registry = Registry::new([ActorType {
        name: "probe",
        constructor: construct,
        durable: false,
    }]);
    let (table, mut events) = ActorTable::start(runtime(), registry.unwrap())
        .await
        .unwrap();
    let mut order = order(actor, FIRST, initial);
    order.spec.mailbox_capacity = 3;
    table.start_actor(order).await;
    assert!(matches!(
        next(&mut events).await,
        ActorEvent::Started { .. }
    ));
    (table, events)
}

#[tokio::test]
async fn shared_methods_run_beside_each_other_and_exclusive_ones_alone() {
    let actor = ActorId(300);
    let (table, _events) = crowd(actor).await;
    let (a, b) = (
        call(&table, actor, "read", "a"),
        call(&table, actor, "read", "b"),
    );
    open("actor-300 a began").await;
    open("actor-300 b began").await;
    // A full group does not hold up another one.
    let waits = call(&table, actor, "read", "c");
    let io = call(&table, actor, "io", "d");
    open("actor-300 d began").await;
    let write = call(&table, actor, "write", "w");
    let behind = call(&table, actor, "io", "e");
    // Three wait: c, w and e.
    let error = call(&table, actor, "read", "f").await.unwrap_err();
    assert!(
        matches!(error, CallError::Overloaded { capacity: 3, .. }),
        "{error}"
    );
    for name in ["a", "b", "c", "d"] {
        gate(&format!("actor-300 {name}")).add_permits(1);
    }
    let log: Vec<String> = codec::decode(&write.await.unwrap(), 1 << 10).unwrap();
    assert_eq!(log, ["started", "w"]);
    for answer in [a, b, waits, io] {
        answer.await.unwrap();
    }
    gate("actor-300 e").add_permits(1);
    behind.await.unwrap();
}

#[tokio::test]
async fn a_panic_ends_the_actor_and_all_that_runs_in_it() {
    let actor = ActorId(301);
    let (table, mut events) = crowd(actor).await;
    let beside = call(&table, actor, "read", "a");
    open("actor-301 a began").await;
    let waiting = call(&table, actor, "write", "w");
    let panicking = call(&table, actor, "panic", "p");
    // It came after the exclusive one, which waits for `a`: let that go.
    gate("actor-301 a").add_permits(1);
    beside.await.unwrap();
    waiting.await.unwrap();
    let error = panicking.await.unwrap_err();
    assert_eq!(error, CallError::Panicked("in p".into()));
    let reason = ExitReason::Panicked("in p".into());
    assert_eq!(next(&mut events).await, exited(actor, reason));
}

#[tokio::test]
async fn what_runs_beside_a_panic_is_unknown_and_what_waits_did_not_run() {
    let actor = ActorId(302);
    let (table, mut events) = crowd(actor).await;
    let beside = call(&table, actor, "read", "a");
    open("actor-302 a began").await;
    let panicking = call(&table, actor, "panic", "p");
    let waiting = call(&table, actor, "write", "w");
    panicking.await.unwrap_err();
    let error = beside.await.unwrap_err();
    assert_eq!(error.executed(), Executed::Unknown, "{error}");
    let error = waiting.await.unwrap_err();
    assert_eq!(error.executed(), Executed::No, "{error}");
    let reason = ExitReason::Panicked("in p".into());
    assert_eq!(next(&mut events).await, exited(actor, reason));
    assert_eq!(table.count(), 0);
}

#[tokio::test]
async fn a_stop_waits_for_what_runs_and_kills_after_the_grace() {
    let actor = ActorId(303);
    let (table, mut events) = crowd(actor).await;
    let running = call(&table, actor, "read", "a");
    open("actor-303 a began").await;
    table.stop_actor(actor, FIRST, PATIENCE).await;
    gate("actor-303 a").add_permits(1);
    running.await.unwrap();
    open("actor-303 stopped").await;
    assert_eq!(next(&mut events).await, exited(actor, ExitReason::Stopped));

    let actor = ActorId(304);
    let (table, mut events) = crowd(actor).await;
    let running = call(&table, actor, "read", "a");
    open("actor-304 a began").await;
    table
        .stop_actor(actor, FIRST, std::time::Duration::ZERO)
        .await;
    let error = running.await.unwrap_err();
    assert_eq!(error.executed(), Executed::Unknown, "{error}");
    assert_eq!(next(&mut events).await, exited(actor, ExitReason::Stopped));
}

#[tokio::test]
async fn a_notice_comes_in_its_turn() {
    let actor = ActorId(305);
    let (table, _events) = crowd(actor).await;
    table.notify(Some(mobula_host::Notice { deadline_ms: 7 }));
    let log = call(&table, actor, "write", "w").await.unwrap();
    let log: Vec<String> = codec::decode(&log, 1 << 10).unwrap();
    assert_eq!(log, ["started", "notice 7", "w"]);
}

#[tokio::test]
async fn a_notice_without_a_hook_holds_nothing_up() {
    let actor = ActorId(306);
    let (table, _events) = crowd_from(actor, b"heedless").await;
    let running = call(&table, actor, "read", "a");
    open("actor-306 a began").await;
    table.notify(Some(mobula_host::Notice { deadline_ms: 7 }));
    // What runs may wait for this one.
    let behind = call(&table, actor, "read", "b");
    open("actor-306 b began").await;
    gate("actor-306 b").add_permits(1);
    behind.await.unwrap();
    gate("actor-306 a").add_permits(1);
    running.await.unwrap();
    let log = call(&table, actor, "write", "w").await.unwrap();
    let log: Vec<String> = codec::decode(&log, 1 << 10).unwrap();
    assert_eq!(log, ["started", "w"]);
}
