//! A slot on its own: what it runs, when, and what its callers are told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId};
use mobula_core::resource::Resources;
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{ClusterCa, Identity, Role, Validity};
use mobula_wire::host::HostRole;
use mobula_wire::session::StorageLocation;
use mobula_wire::task::TaskHead;
use serde::{Serialize, Serializer};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::context::while_blocked;
use super::outcome::EncodedValue;
use super::registry::{TaskCall, TaskRegistry, TaskType};
use super::slot::{END_METHOD, RETURN_METHOD, SlotRunner, WATCH_METHOD};
use crate::actor::MethodError;
use crate::client::CallClient;
use crate::context::{ActorContext, HostInfo, HostRuntime};
use crate::mailbox::{Deadline, IncomingCall};
use crate::objects::{Object, ObjectTable};
use crate::reply::{CallResult, CancelLevel, LocalCall, Reply};

type Ran = futures::future::BoxFuture<'static, Result<Vec<u8>, MethodError>>;

static GATE: AtomicBool = AtomicBool::new(false);
static OTHER_GATE: AtomicBool = AtomicBool::new(false);
static BEGUN: [Semaphore; 8] = [const { Semaphore::const_new(0) }; 8];
/// For [`refers`], by place.
static REFERS_GATES: [AtomicBool; 8] = [const { AtomicBool::new(false) }; 8];
static ORDER: AtomicU32 = AtomicU32::new(0);

fn echo(call: TaskCall) -> Ran {
    Box::pin(async move { Ok(call.arguments.to_vec()) })
}

fn attempt(call: TaskCall) -> Ran {
    Box::pin(async move { Ok(call.context.attempt().to_le_bytes().to_vec()) })
}

fn panics(_: TaskCall) -> Ran {
    Box::pin(async { panic!("oh") })
}

/// Waits for ever, as a task waits for an object.
fn waits(_: TaskCall) -> Ran {
    Box::pin(while_blocked(std::future::pending()))
}

fn awaits(call: TaskCall) -> Ran {
    Box::pin(async move {
        say_begun(&call);
        std::future::pending().await
    })
}

/// Keeps its thread until the gate opens.
fn spins(call: TaskCall) -> Ran {
    Box::pin(async move {
        say_begun(&call);
        while !GATE.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Vec::new())
    })
}

/// The same with a gate of its own; says so again when it has ended.
fn spins_apart(call: TaskCall) -> Ran {
    Box::pin(async move {
        say_begun(&call);
        while !OTHER_GATE.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        say_begun(&call);
        Ok(Vec::new())
    })
}

/// Keeps its thread until the gate of its place opens, and then brings a value with a reference in it;
/// says so before it ends.
fn refers(call: TaskCall) -> Ran {
    struct Refers(Object);
    impl Serialize for Refers {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            self.0.export().serialize(serializer)
        }
    }
    Box::pin(async move {
        say_begun(&call);
        while !REFERS_GATES[usize::from(call.arguments[0])].load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let context = &call.context;
        let objects = context.slot().runtime().objects().unwrap();
        let value = Refers(objects.put(&1_u8).unwrap());
        let outcome = EncodedValue::of(context, &value)?
            .into_outcome(context)
            .await;
        say_begun(&call);
        outcome
    })
}

fn say_begun(call: &TaskCall) {
    if let Some(place) = call.arguments.first() {
        BEGUN[usize::from(*place)].add_permits(1);
    }
}

/// Arguments that name a place in [`BEGUN`].
fn at(place: u8) -> Bytes {
    TaskHead { attempt: 1 }.join(&[], &[place]).into()
}

async fn begun(place: usize) {
    let permit = BEGUN[place].acquire();
    let waited = tokio::time::timeout(Duration::from_secs(60), permit).await;
    waited.expect("it does not begin").unwrap().forget();
}

/// Its place in the order of all that run.
fn counts(_: TaskCall) -> Ran {
    Box::pin(async {
        tokio::task::yield_now().await;
        Ok(vec![ORDER.fetch_add(1, Ordering::AcqRel) as u8])
    })
}

fn slot(capacity: u32) -> Arc<SlotRunner> {
    slot_and_runtime(capacity).0
}

fn slot_and_runtime(capacity: u32) -> (Arc<SlotRunner>, Arc<HostRuntime>) {
    let types = [
        ("echo", echo as super::registry::TaskFunction),
        ("attempt", attempt),
        ("panics", panics),
        ("waits", waits),
        ("awaits", awaits),
        ("spins", spins),
        ("spins_apart", spins_apart),
        ("counts", counts),
        ("refers", refers),
    ];
    let tasks = TaskRegistry::new(types.map(|(name, run)| TaskType { name, run })).unwrap();
    let runtime = HostRuntime::new(HostInfo {
        cluster_id: "test".into(),
        job: JobId(1),
        node: NodeId(1),
        node_name: "one".into(),
        host: HostId(1),
        role: HostRole::Actors,
        api_addresses: Vec::new(),
        storage: StorageLocation {
            url: "file:///nowhere".into(),
            endpoint: None,
            region: None,
            allow_http: false,
            access_key_env: String::new(),
            secret_key_env: String::new(),
        },
    });
    let context = ActorContext::new(ActorId(7), Incarnation(1), None, Arc::clone(&runtime));
    let slot = SlotRunner::start(context, Resources::cpu_milli(1000), tasks, capacity);
    (slot.unwrap(), runtime)
}

/// The same in a process that has objects.
fn slot_with_objects() -> (Arc<SlotRunner>, Arc<ObjectTable>) {
    let (slot, runtime) = slot_and_runtime(16);
    let ca = ClusterCa::create("test").unwrap();
    let identity = Identity::new("test", Role::Host, "host-1", 1).with_job(1);
    let validity = Validity::for_ttl(Duration::from_secs(3600));
    let credentials = ca.issue_with_new_key(&identity, validity).unwrap();
    let endpoint = Endpoint::bind("127.0.0.1:0".parse().unwrap(), &credentials).unwrap();
    let address = endpoint.local_address().to_string();
    let objects = ObjectTable::start(address, CallClient::new(endpoint, None));
    runtime.set_objects(Arc::clone(&objects));
    (slot, objects)
}

/// Waits until nothing refers to any object, which a value on its way does for ten minutes.
async fn all_let_go(objects: &ObjectTable) {
    let let_go = async {
        while objects.sent_counts() != (0, 0) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), let_go).await;
    waited.expect("a value that nobody will ask for is kept");
}

fn push_with(
    slot: &SlotRunner,
    name: &str,
    arguments: Bytes,
    deadline: Option<Deadline>,
) -> (LocalCall, crate::reply::Cancellation) {
    let (reply, call) = Reply::same_process(ActorId(7), None);
    let cancellation = reply.cancellation();
    slot.admit(IncomingCall {
        method: name.to_owned().into(),
        arguments,
        deadline,
        key: None,
        reply,
    });
    (call, cancellation)
}

fn push(slot: &SlotRunner, name: &str) -> LocalCall {
    let arguments = TaskHead { attempt: 1 }.join(&[], b"abc").into();
    push_with(slot, name, arguments, None).0
}

/// An answer, which must come.
async fn answer(call: LocalCall) -> CallResult {
    tokio::time::timeout(Duration::from_secs(60), call)
        .await
        .expect("no answer within 60 s")
}

#[tokio::test]
async fn tasks_run_one_after_another_and_know_their_attempt() {
    let slot = slot(16);
    assert_eq!(answer(push(&slot, "echo")).await.unwrap(), "abc");
    let calls: Vec<_> = (0..3).map(|_| push(&slot, "counts")).collect();
    let mut places = Vec::new();
    for call in calls {
        places.push(answer(call).await.unwrap()[0]);
    }
    assert!(
        places.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{places:?}"
    );
    let third = TaskHead { attempt: 3 }.join(&[], &[]).into();
    let (call, _) = push_with(&slot, "attempt", third, None);
    assert_eq!(answer(call).await.unwrap()[..], 3u32.to_le_bytes());
}

#[tokio::test]
async fn what_is_no_task_is_refused_and_a_panic_ends_its_task_only() {
    let slot = slot(16);
    let error = answer(push(&slot, "nothing")).await.unwrap_err();
    assert!(error.to_string().contains("no task `nothing`"), "{error}");
    let (call, _) = push_with(&slot, "echo", Bytes::from_static(b"x"), None);
    let error = answer(call).await.unwrap_err();
    assert!(matches!(error, CallError::BadCall(_)), "{error}");
    let error = answer(push(&slot, "panics")).await.unwrap_err();
    assert_eq!(error, CallError::Panicked("oh".into()));
    assert!(answer(push(&slot, "echo")).await.is_ok());
}

#[tokio::test]
async fn a_task_that_waits_for_an_object_lets_others_run() {
    let slot = slot(16);
    let watching = push(&slot, WATCH_METHOD);
    let waiting: Vec<_> = (0..5).map(|_| push(&slot, "waits")).collect();
    assert!(answer(push(&slot, "echo")).await.is_ok());
    assert!(answer(watching).await.is_ok(), "all of them wait");
    // One that only awaits keeps the slot.
    let (awaiting, _) = push_with(
        &slot,
        "awaits",
        TaskHead { attempt: 1 }.join(&[], &[]).into(),
        None,
    );
    let mut behind = push(&slot, "echo");
    let early = tokio::time::timeout(Duration::from_millis(50), &mut behind).await;
    assert!(early.is_err());
    drop((waiting, awaiting));
}

#[tokio::test]
async fn limits_and_cancellation_end_what_awaits() {
    let slot = slot(16);
    let arguments = || Bytes::from(TaskHead { attempt: 1 }.join(&[], &[]));
    let deadline = Deadline {
        at: Instant::now() + Duration::from_millis(500),
        limit_ms: 500,
    };
    let (late, _) = push_with(&slot, "awaits", at(0), Some(deadline));
    begun(0).await;
    let (behind, _) = push_with(&slot, "echo", arguments(), Some(deadline));
    let error = answer(late).await.unwrap_err();
    let has_begun = matches!(
        error,
        CallError::DeadlineExceeded {
            executed: Executed::Unknown,
            ..
        }
    );
    assert!(has_begun, "{error}");
    assert_eq!(answer(behind).await.unwrap_err().executed(), Executed::No);

    let (running, cancel_running) = push_with(&slot, "awaits", at(0), None);
    begun(0).await;
    let (waiting, cancel_waiting) = push_with(&slot, "echo", arguments(), None);
    cancel_waiting.cancel(CancelLevel::Requested);
    assert_eq!(answer(waiting).await.unwrap_err().executed(), Executed::No);
    cancel_running.cancel(CancelLevel::Requested);
    let error = answer(running).await.unwrap_err();
    let cancelled = matches!(
        error,
        CallError::Cancelled {
            executed: Executed::Unknown,
            ..
        }
    );
    assert!(cancelled, "{error}");
    assert!(answer(push(&slot, "echo")).await.is_ok());
}

#[tokio::test]
async fn a_thread_that_does_not_let_go_is_left_behind() {
    let slot = slot(16);
    let (stuck, cancellation) = push_with(&slot, "spins", at(1), None);
    begun(1).await;
    let behind = push(&slot, "echo");
    cancellation.cancel(CancelLevel::Forced);
    let error = answer(stuck).await.unwrap_err();
    let cancelled = matches!(
        error,
        CallError::Cancelled {
            executed: Executed::Unknown,
            ..
        }
    );
    assert!(cancelled, "{error}");
    assert!(answer(behind).await.is_ok(), "the slot goes on");
    GATE.store(true, Ordering::Release);
}

#[tokio::test]
async fn a_thread_that_was_left_behind_takes_nothing_more_when_it_comes_back() {
    let slot = slot(16);
    let (stuck, cancellation) = push_with(&slot, "spins_apart", at(4), None);
    begun(4).await;
    cancellation.cancel(CancelLevel::Forced);
    assert!(answer(stuck).await.is_err());
    // The other thread is busy, and one more task waits for it.
    let (running, cancellation) = push_with(&slot, "awaits", at(5), None);
    begun(5).await;
    let waiting = push(&slot, "echo");
    OTHER_GATE.store(true, Ordering::Release);
    begun(4).await;
    // As long as it takes to look for another task.
    tokio::time::sleep(Duration::from_millis(100)).await;
    cancellation.cancel(CancelLevel::Requested);
    assert!(answer(running).await.is_err());
    assert!(answer(waiting).await.is_ok());
}

#[tokio::test]
async fn what_a_thread_brings_that_was_left_behind_is_let_go() {
    let (slot, objects) = slot_with_objects();
    let (stuck, cancellation) = push_with(&slot, "refers", at(6), None);
    begun(6).await;
    cancellation.cancel(CancelLevel::Forced);
    assert!(answer(stuck).await.is_err());
    REFERS_GATES[6].store(true, Ordering::Release);
    begun(6).await;
    all_let_go(&objects).await;
}

#[tokio::test]
async fn what_a_task_brings_after_its_time_is_let_go() {
    let (slot, objects) = slot_with_objects();
    let deadline = Deadline {
        at: Instant::now() + Duration::from_secs(2),
        limit_ms: 2000,
    };
    let (late, _) = push_with(&slot, "refers", at(7), Some(deadline));
    begun(7).await;
    tokio::time::sleep_until(deadline.at).await;
    REFERS_GATES[7].store(true, Ordering::Release);
    begun(7).await;
    let error = answer(late).await.unwrap_err();
    let is_late = matches!(
        error,
        CallError::DeadlineExceeded {
            executed: Executed::Yes,
            ..
        }
    );
    assert!(is_late, "{error}");
    all_let_go(&objects).await;
}

#[tokio::test]
async fn tasks_that_have_not_begun_are_given_back_on_request() {
    let slot = slot(16);
    let (running, cancellation) = push_with(&slot, "awaits", at(3), None);
    begun(3).await;
    let mut calls: Vec<_> = (0..4).map(|_| push(&slot, "echo")).collect();
    let count: Bytes = mobula_core::codec::encode_plain(&3_u32).into();
    let (returned, _) = push_with(&slot, RETURN_METHOD, count, None);
    assert!(answer(returned).await.is_ok());
    for call in calls.drain(1..) {
        let error = answer(call).await.unwrap_err();
        assert!(matches!(error, CallError::Overloaded { .. }), "{error}");
    }
    cancellation.cancel(CancelLevel::Requested);
    assert!(answer(running).await.is_err());
    let first = calls.remove(0);
    assert!(answer(first).await.is_ok(), "it was to stay");
}

#[tokio::test]
async fn a_full_slot_says_so_and_one_that_is_given_back_finishes_what_it_has() {
    let slot = slot(2);
    let (running, cancellation) = push_with(&slot, "awaits", at(2), None);
    begun(2).await;
    let calls: Vec<_> = (0..8).map(|_| push(&slot, "echo")).collect();
    cancellation.cancel(CancelLevel::Requested);
    let mut refused = 0;
    for call in calls {
        match answer(call).await {
            Ok(_) => {}
            Err(CallError::Overloaded { capacity: 2, .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(refused, 6);
    assert!(answer(running).await.is_err());
    let (last, _) = push_with(&slot, "awaits", at(2), None);
    begun(2).await;
    assert!(answer(push(&slot, END_METHOD)).await.is_ok());
    let error = answer(push(&slot, "echo")).await.unwrap_err();
    assert_eq!(error.executed(), Executed::No);
    assert!(error.to_string().contains("given back"), "{error}");
    slot.kill();
    assert_eq!(
        answer(last).await.unwrap_err().executed(),
        Executed::Unknown
    );
    slot.ended().await;
}
