//! Objects between processes: who owns, who borrows, what is on its way, and what happens when a
//! side is gone.

use std::sync::Arc;

use crate::support::{self, Certificates, PATIENCE, listen};
use mobula_core::codec;
use mobula_core::error::CallError;
use mobula_core::object::ObjectError;
use mobula_host::client::CallClient;
use mobula_host::objects::{
    Completer, Lineage, Object, ObjectTable, Value, bring, brought, holding, wait_for,
};
use mobula_host::supervision::{ActorEvent, ActorTable};
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::Credentials;
use mobula_wire::object::{Element, Format};
use mobula_wire::store::{StoreReply, StoreRequest};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A process as far as objects go: it takes calls, and has an object table.
struct Process {
    objects: Arc<ObjectTable>,
    endpoint: Endpoint,
    server: JoinHandle<()>,
    _actors: (Arc<ActorTable>, mpsc::Receiver<ActorEvent>),
}

impl Process {
    async fn start(certificates: &Certificates) -> Process {
        Process::start_as(&certificates.host(support::JOB.0)).await
    }

    async fn start_as(credentials: &Credentials) -> Process {
        let endpoint = listen(credentials);
        let (actors, events) = support::table().await;
        let local = (endpoint.local_address(), Arc::downgrade(&actors));
        let calls = CallClient::new(endpoint.clone(), Some(local));
        let objects = ObjectTable::start(endpoint.local_address().to_string(), calls);
        actors.runtime().set_objects(Arc::clone(&objects));
        let serving = mobula_host::calls::serve_calls(endpoint.clone(), Arc::clone(&actors));
        Process {
            objects,
            endpoint,
            server: tokio::spawn(serving),
            _actors: (actors, events),
        }
    }

    fn receive(&self, object: &Object) -> Object {
        self.objects.import(&object.export())
    }

    async fn kill(self) {
        self.objects.close();
        self.server.abort();
        self.endpoint.close("killed").await;
    }
}

async fn two() -> (Process, Process) {
    let certificates = Certificates::new();
    let one = Process::start(&certificates).await;
    (one, Process::start(&certificates).await)
}

async fn value(object: &Object) -> Result<String, ObjectError> {
    match tokio::time::timeout(PATIENCE, object.wait())
        .await
        .unwrap()?
    {
        Value::Inline(payload) => Ok(codec::decode(&payload.bytes, 1 << 20).unwrap()),
        Value::Stored(stored) => panic!("{stored:?} is not inline"),
    }
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect(what);
}

#[tokio::test]
async fn a_value_is_read_elsewhere_and_freed_with_its_last_reference() {
    let (owner, holder) = two().await;
    let object = owner.objects.put("here").unwrap();
    let reference = object.export();
    let borrowed = holder.objects.import(&reference);
    assert_eq!(value(&borrowed).await.unwrap(), "here");
    drop(object);
    assert_eq!(owner.objects.sent_counts(), (1, 1), "the holder keeps it");
    let again = holder.objects.import(&reference);
    drop(borrowed);
    assert_eq!(value(&again).await.unwrap(), "here");
    drop(again);
    until("the object is freed", || owner.objects.sent_counts().0 == 0).await;
    let late = holder.objects.import(&reference);
    let error = value(&late).await.unwrap_err();
    assert!(matches!(error, ObjectError::Freed { .. }), "{error}");
    let at_home = owner.objects.import(&reference);
    assert!(matches!(
        value(&at_home).await.unwrap_err(),
        ObjectError::Freed { .. }
    ));
}

#[tokio::test]
async fn a_value_that_is_brought_with_its_reference_is_there_at_once() {
    let (owner, holder) = two().await;
    let small = owner.objects.put("small").unwrap();
    let large = owner.objects.put(&"l".repeat(1000)).unwrap();
    let (pending, _completer) = owner.objects.create_pending();
    let objects = [small, large, pending];
    let values = bring(&objects, 500);
    let borrowed = brought(&values, || {
        objects.each_ref().map(|object| holder.receive(object))
    });
    assert!(borrowed[0].is_settled(), "nobody was asked for it");
    assert_eq!(value(&borrowed[0]).await.unwrap(), "small");
    assert!(!borrowed[2].is_settled());
    assert_eq!(value(&borrowed[1]).await.unwrap().len(), 1000, "asked for");
    // The owner knows of its holder all the same.
    drop(objects);
    until("the holder is known", || {
        owner.objects.sent_counts() == (3, 1)
    })
    .await;
    drop(borrowed);
    until("all are freed", || owner.objects.sent_counts().0 == 0).await;
}

#[tokio::test]
async fn a_reference_on_its_way_keeps_its_object() {
    let certificates = Certificates::new();
    let owner = Process::start(&certificates).await;
    let middle = Process::start(&certificates).await;
    let last = Process::start(&certificates).await;
    let object = owner.objects.put("held").unwrap();
    let on_its_way = object.export();
    drop(object);
    assert_eq!(owner.objects.sent_counts(), (1, 0));
    let borrowed = middle.objects.import(&on_its_way);
    let passed_on = borrowed.export();
    // The middle lets go before the last one has registered, and before it has itself said so.
    drop(borrowed);
    until("only the hold is left", || {
        owner.objects.sent_counts() == (1, 1)
    })
    .await;
    let arrived = last.objects.import(&passed_on);
    assert_eq!(value(&arrived).await.unwrap(), "held");
    let returned = owner.receive(&arrived);
    assert!(returned.is_owned());
    drop(arrived);
    assert_eq!(value(&returned).await.unwrap(), "held");
    drop(returned);
    until("the object is freed", || owner.objects.sent_counts().0 == 0).await;
}

#[tokio::test]
async fn a_pending_object_settles_everywhere() {
    let (owner, holder) = two().await;
    let (object, completer) = owner.objects.create_pending();
    let borrowed = holder.receive(&object);
    let (failing, failed) = owner.objects.create_pending();
    let borrowed_failing = holder.receive(&failing);
    let (abandoned, gone) = owner.objects.create_pending();
    let waiting = tokio::spawn({
        let borrowed = borrowed.clone();
        async move { value(&borrowed).await }
    });
    assert!(!borrowed.is_settled());
    completer.complete(holder.objects.encode_result("done").unwrap());
    assert_eq!(waiting.await.unwrap().unwrap(), "done");
    assert_eq!(value(&object).await.unwrap(), "done");
    let user = CallError::User {
        payload: vec![1],
        message: "no".into(),
    };
    failed.fail(ObjectError::Failed(user.clone()));
    assert_eq!(
        value(&borrowed_failing).await.unwrap_err(),
        ObjectError::Failed(user)
    );
    drop(gone);
    assert!(matches!(
        value(&abandoned).await.unwrap_err(),
        ObjectError::Lost { .. }
    ));
    tokio::time::timeout(PATIENCE, wait_for(&[&object, &failing, &abandoned], 3))
        .await
        .unwrap();
    let (unwanted, completer) = owner.objects.create_pending();
    assert!(completer.is_wanted());
    drop(unwanted);
    assert!(!completer.is_wanted());
}

#[tokio::test]
async fn an_object_keeps_those_that_its_value_refers_to() {
    let (owner, holder) = two().await;
    let inner = owner.objects.put("inside").unwrap();
    let outer = {
        let (reference, _) = mobula_host::objects::capture(|| inner.export());
        // A value that refers to another: what a serializer of references does.
        struct Refers<'a>(&'a Object);
        impl serde::Serialize for Refers<'_> {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.export().serialize(serializer)
            }
        }
        drop(owner.objects.import(&reference));
        owner.objects.put(&Refers(&inner)).unwrap()
    };
    drop(inner);
    let borrowed = holder.receive(&outer);
    drop(outer);
    let read = |borrowed: &Object| match borrowed.outcome().unwrap().unwrap() {
        Value::Inline(payload) => {
            let reference = codec::decode(&payload.bytes, 1 << 20).unwrap();
            holding(borrowed, || holder.objects.import(&reference))
        }
        Value::Stored(_) => panic!("it is small"),
    };
    tokio::time::timeout(PATIENCE, borrowed.wait())
        .await
        .unwrap()
        .unwrap();
    let first = read(&borrowed);
    assert_eq!(value(&first).await.unwrap(), "inside");
    drop(first);
    let second = read(&borrowed);
    drop(borrowed);
    assert_eq!(value(&second).await.unwrap(), "inside");
    drop(second);
    until("both are freed", || owner.objects.sent_counts().0 == 0).await;
}

#[tokio::test]
async fn a_dead_owner_is_an_error_and_a_dead_holder_lets_go() {
    let (owner, holder) = two().await;
    let (pending, completer) = owner.objects.create_pending();
    let borrowed = holder.receive(&pending);
    let object = owner.objects.put("kept").unwrap();
    let kept = holder.receive(&object);
    assert_eq!(value(&kept).await.unwrap(), "kept");
    let lent = holder.objects.put("lent").unwrap();
    let back = owner.receive(&lent);
    assert_eq!(value(&back).await.unwrap(), "lent");
    drop(lent);
    assert_eq!(holder.objects.sent_counts(), (1, 1));
    holder.objects.process_gone(owner.objects.process());
    assert_eq!(holder.objects.sent_counts(), (0, 0));
    std::mem::forget(completer);
    owner.kill().await;
    // Far sooner than a connection is given up: its machine says that nobody listens any more.
    let lost = tokio::time::timeout(PATIENCE, borrowed.wait())
        .await
        .unwrap();
    assert!(
        matches!(lost, Err(ObjectError::OwnerDied { .. })),
        "{lost:?}"
    );
    assert_eq!(value(&kept).await.unwrap(), "kept", "what arrived stays");
}

#[tokio::test]
async fn an_object_of_another_job_is_refused_and_not_called_lost() {
    let certificates = Certificates::new();
    let job = support::JOB.0;
    let inside = |job| certificates.host_in_shop(job, 7);
    for (owner, reader) in [
        (certificates.host(job), certificates.host(job + 1)),
        // Not within one namespace either.
        (inside(job), inside(job + 1)),
    ] {
        let owner = Process::start_as(&owner).await;
        let reader = Process::start_as(&reader).await;
        let object = owner.objects.put("x").unwrap();
        let foreign = reader.receive(&object);
        // The agent of a node says so of every process that is not of the job that asks.
        reader.objects.process_gone(owner.objects.process());
        let error = value(&foreign).await.unwrap_err();
        assert!(matches!(error, ObjectError::NotPermitted { .. }), "{error}");
        assert_eq!(value(&object).await.unwrap(), "x");
    }
}

#[tokio::test]
async fn garbage_and_another_process_at_the_address_are_refused() {
    let (owner, holder) = two().await;
    let mut reference = owner.objects.put("x").unwrap().export();
    reference.object.owner.0 ^= 1;
    let stray = holder.objects.import(&reference);
    let error = value(&stray).await.unwrap_err();
    assert!(
        error.to_string().contains("another process takes calls"),
        "{error}"
    );
    for method in ["change", "next", "other"] {
        let (reply, answer) =
            mobula_host::reply::Reply::same_process(mobula_wire::object::OBJECTS_ACTOR, None);
        owner.objects.serve(mobula_host::mailbox::IncomingCall {
            method: method.into(),
            arguments: vec![250; 9].into(),
            deadline: None,
            key: None,
            reply,
        });
        assert!(matches!(answer.await, Err(CallError::BadCall(_))));
    }
}

#[tokio::test]
async fn what_is_lost_is_created_anew_where_that_is_possible() {
    struct Again(mpsc::Sender<Completer>);
    impl Lineage for Again {
        fn recreate(&self, completer: Completer, _: &str) {
            assert!(self.0.try_send(completer).is_ok(), "the test expects one");
        }
    }
    let (owner, holder) = two().await;
    let (sender, mut recreations) = mpsc::channel(2);
    let (object, completer) = owner.objects.create_pending_with(Arc::new(Again(sender)));
    completer.complete(owner.objects.encode_result("first").unwrap());
    let borrowed = holder.receive(&object);
    assert_eq!(value(&borrowed).await.unwrap(), "first");
    let seen = object.outcome().unwrap();
    owner
        .objects
        .report_missing(&object, &seen, "a test says so");
    let completer = recreations.recv().await.unwrap();
    assert!(!object.is_settled());
    owner.objects.report_missing(&object, &seen, "said twice");
    completer.complete(owner.objects.encode_result("again").unwrap());
    assert_eq!(value(&object).await.unwrap(), "again");
    assert!(recreations.try_recv().is_err(), "once for one loss");
    let without = owner.objects.put("y").unwrap();
    let seen = without.outcome().unwrap();
    owner.objects.report_missing(&without, &seen, "gone");
    assert!(matches!(
        value(&without).await.unwrap_err(),
        ObjectError::Lost { .. }
    ));
}

/// What an agent says, played: it grants files, and notes what it is told.
async fn play_agent(
    listener: mobula_net::descriptor::DescriptorListener,
    told: mpsc::Sender<StoreRequest>,
) {
    use std::os::fd::AsFd;
    let (mut sender, mut receiver) = listener.accept().await.unwrap();
    let mut arenas = Vec::new();
    while let Some((payload, _)) = receiver.receive().await.unwrap() {
        let request: StoreRequest = codec::decode(&payload, 1 << 16).unwrap();
        let (reply, file) = match &request {
            StoreRequest::Hello { .. } => (
                Some(StoreReply::Welcome {
                    agent: "here".into(),
                    arena_bytes: 1 << 20,
                }),
                None,
            ),
            StoreRequest::Grant {
                request,
                size_bytes,
            } => {
                let file = tempfile::tempfile().unwrap();
                file.set_len(*size_bytes).unwrap();
                arenas.push(file);
                let granted = StoreReply::Granted {
                    request: *request,
                    arena: arenas.len() as u64,
                    size_bytes: *size_bytes,
                };
                (Some(granted), arenas.last())
            }
            StoreRequest::Free { object, .. } => {
                (Some(StoreReply::Reclaimed { object: *object }), None)
            }
            StoreRequest::Open {
                request, object, ..
            } => (
                Some(StoreReply::Refused {
                    request: *request,
                    error: ObjectError::Lost {
                        object: *object,
                        reason: "a test says so".into(),
                    },
                }),
                None,
            ),
            _ => (None, None),
        };
        if let Some(reply) = reply {
            let message = codec::encode_plain(&reply);
            let descriptor = file.map(AsFd::as_fd);
            sender.send(&message, descriptor).await.unwrap();
        }
        told.send(request).await.unwrap();
    }
}

#[tokio::test]
async fn large_values_are_read_in_place_and_their_memory_is_used_again() {
    let owner = Process::start(&Certificates::new()).await;
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("objects.sock");
    let listener = mobula_net::descriptor::DescriptorListener::bind(&socket, 1 << 16).unwrap();
    // More requests than the test makes.
    let (told, mut requests) = mpsc::channel(64);
    let agent = tokio::spawn(play_agent(listener, told));
    owner
        .objects
        .connect_store(&socket, "key", mobula_core::id::NodeId(1))
        .await
        .unwrap();
    let mut next = async || {
        tokio::time::timeout(PATIENCE, requests.recv())
            .await
            .unwrap()
            .unwrap()
    };
    assert!(matches!(next().await, StoreRequest::Hello { .. }));
    let format = Format::Plain(Element::U8);
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let object = owner.objects.put_slice(format, &bytes).await.unwrap();
    assert!(matches!(next().await, StoreRequest::Grant { .. }));
    assert!(matches!(
        next().await,
        StoreRequest::Publish { offset: 0, .. }
    ));
    let view = owner.objects.read(&object).await.unwrap();
    let again = owner.objects.read(&object).await.unwrap();
    assert!(view.bytes == bytes);
    assert_eq!(
        view.bytes.as_ptr(),
        again.bytes.as_ptr(),
        "nothing is copied"
    );
    assert_eq!(view.bytes.as_ptr() as usize % 64, 0);
    drop(object);
    assert!(matches!(next().await, StoreRequest::Free { .. }));
    // Its memory stays as it is while somebody looks at it: the next value needs other memory.
    let second = owner.objects.put_slice(format, &bytes[1..]).await.unwrap();
    assert!(matches!(next().await, StoreRequest::Grant { .. }));
    assert!(matches!(next().await, StoreRequest::Publish { .. }));
    assert!(view.bytes == bytes);
    drop((view, again, second));
    assert!(matches!(next().await, StoreRequest::Free { .. }));
    // That of the first is free again: no more is asked for.
    let third = owner.objects.put_slice(format, &bytes).await.unwrap();
    let request = next().await;
    assert!(
        matches!(request, StoreRequest::Publish { .. }),
        "{request:?}"
    );
    let Some(Ok(Value::Stored(stored))) = third.outcome() else {
        panic!("it is large");
    };
    assert_eq!(stored.size_bytes, 300_000);
    agent.abort();
}
