//! What the tests of this crate share: an actor that does as it is told, and a host for it.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use mobula_core::codec;
use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId};
use mobula_core::namespace::Namespace;
use mobula_core::order::{ActorAddress, StartActor};
use mobula_core::spec::{ActorSpec, Program};
use mobula_host::calls::serve_calls;
use mobula_host::client::CallClient;
use mobula_host::mailbox::IncomingCall;
use mobula_host::registry::ConstructError;
use mobula_host::reply::{CallResult, LocalCall, Reply};
use mobula_host::supervision::{ActorEvent, ActorTable};
use mobula_host::{
    ActorBody, ActorContext, ActorType, DynActor, HostInfo, HostRuntime, MethodCall, MethodError,
    Registry,
};
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{ClusterCa, Credentials, Identity, Role, Validity};
use mobula_wire::host::HostRole;
use mobula_wire::session::StorageLocation;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

pub(crate) const JOB: JobId = JobId(3);
pub(crate) const FIRST: Incarnation = Incarnation(11);

/// Long enough for any machine; only a failing test waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Opened by a test to let `wait` go on; one gate for each probe's name.
pub(crate) static GATES: std::sync::Mutex<Vec<(String, Arc<Semaphore>)>> =
    std::sync::Mutex::new(Vec::new());

pub(crate) fn exited(actor: ActorId, reason: ExitReason) -> ActorEvent {
    ActorEvent::Exited {
        actor,
        incarnation: FIRST,
        reason,
    }
}

pub(crate) fn gate(name: &str) -> Arc<Semaphore> {
    let mut gates = GATES.lock().unwrap();
    if let Some((_, gate)) = gates.iter().find(|(known, _)| known == name) {
        return Arc::clone(gate);
    }
    let gate = Arc::new(Semaphore::new(0));
    gates.push((name.to_owned(), Arc::clone(&gate)));
    gate
}

/// Remembers what it was told, and says so.
pub(crate) struct Probe {
    told: Vec<String>,
    gate: Arc<Semaphore>,
}

impl DynActor for Probe {
    fn dispatch<'a>(
        &'a mut self,
        call: MethodCall<'a>,
    ) -> BoxFuture<'a, Result<Vec<u8>, MethodError>> {
        let MethodCall {
            method,
            arguments,
            context,
            ..
        } = call;
        Box::pin(async move {
            let text: String = codec::decode(arguments, 1 << 20)
                .map_err(|error| MethodError::BadCall(error.to_string()))?;
            match method {
                "tell" => {
                    self.told.push(text);
                    Ok(codec::encode_plain(&self.told))
                }
                // Says that it runs by taking the first permit, and goes on with the second.
                "wait" => {
                    self.told.push(text);
                    let started = gate(&format!("{} began", context.actor()));
                    started.add_permits(1);
                    self.gate.acquire().await.expect("gates stay open").forget();
                    Ok(codec::encode_plain(&self.told))
                }
                "large" => Ok(vec![0; 9 << 20]),
                "refuse" => Err(MethodError::User {
                    payload: codec::encode_plain(&text),
                    message: text,
                }),
                "panic" => panic!("told to: {text}"),
                "complete" => {
                    context.complete();
                    Ok(Vec::new())
                }
                "fail" => {
                    context.fail(text);
                    Ok(Vec::new())
                }
                _ => Err(MethodError::BadCall(format!("no method `{method}`"))),
            }
        })
    }

    fn started<'a>(&'a mut self, _: &'a ActorContext) -> BoxFuture<'a, ()> {
        self.told.push("started".to_owned());
        Box::pin(std::future::ready(()))
    }

    fn on_notice<'a>(&'a mut self, deadline_ms: u64, _: &'a ActorContext) -> BoxFuture<'a, ()> {
        self.told.push(format!("notice {deadline_ms}"));
        Box::pin(std::future::ready(()))
    }

    fn on_stop<'a>(&'a mut self, context: &'a ActorContext) -> BoxFuture<'a, ()> {
        gate(&format!("{} stopped", context.actor())).add_permits(1);
        Box::pin(std::future::ready(()))
    }
}

fn construct(
    init: Vec<u8>,
    context: ActorContext,
) -> BoxFuture<'static, Result<ActorBody, ConstructError>> {
    Box::pin(async move {
        match init.as_slice() {
            b"fail" => Err(ConstructError::Failed("told to".to_owned())),
            b"bad" => Err(ConstructError::BadArguments("not these".to_owned())),
            b"panic" => panic!("in the constructor"),
            b"never" => std::future::pending().await,
            _ => {
                let gate = gate(&context.actor().to_string());
                Ok(ActorBody::serial(Probe {
                    told: Vec::new(),
                    gate,
                }))
            }
        }
    })
}

pub(crate) fn registry() -> Registry {
    Registry::new([ActorType {
        name: "probe",
        constructor: construct,
        durable: false,
    }])
    .unwrap()
}

pub(crate) fn storage() -> StorageLocation {
    StorageLocation {
        url: "file:///nowhere".into(),
        endpoint: None,
        region: None,
        allow_http: false,
        access_key_env: String::new(),
        secret_key_env: String::new(),
    }
}

pub(crate) fn runtime() -> Arc<HostRuntime> {
    HostRuntime::new(HostInfo {
        cluster_id: "test".into(),
        job: JOB,
        node: NodeId(1),
        node_name: "one".into(),
        host: HostId(5),
        role: HostRole::Actors,
        api_addresses: Vec::new(),
        storage: storage(),
    })
}

pub(crate) async fn table() -> (Arc<ActorTable>, mpsc::Receiver<ActorEvent>) {
    ActorTable::start(runtime(), registry()).await.unwrap()
}

pub(crate) fn order(actor: ActorId, incarnation: Incarnation, init: &[u8]) -> StartActor {
    StartActor {
        actor,
        incarnation,
        job: JOB,
        program: Program::Builtin,
        spec: ActorSpec {
            init: init.to_vec(),
            mailbox_capacity: 2,
            ..ActorSpec::of_type("probe")
        },
        args: Vec::new(),
        env: Default::default(),
        files: Vec::new(),
        secrets: Default::default(),
    }
}

/// A table in which the probe `actor` runs.
pub(crate) async fn table_with(actor: ActorId) -> (Arc<ActorTable>, mpsc::Receiver<ActorEvent>) {
    let (table, mut events) = table().await;
    table.start_actor(order(actor, FIRST, b"")).await;
    let started = ActorEvent::Started {
        actor,
        incarnation: FIRST,
    };
    assert_eq!(next(&mut events).await, started);
    (table, events)
}

pub(crate) async fn next(events: &mut mpsc::Receiver<ActorEvent>) -> ActorEvent {
    tokio::time::timeout(PATIENCE, events.recv())
        .await
        .expect("an event in time")
        .unwrap()
}

/// Calls an actor of the table.
pub(crate) fn call(table: &ActorTable, actor: ActorId, method: &str, text: &str) -> LocalCall {
    let (reply, answer) = Reply::same_process(actor, None);
    let call = IncomingCall {
        method: method.to_owned().into(),
        arguments: codec::encode_plain(text).into(),
        deadline: None,
        key: None,
        reply,
    };
    table.admit(actor, FIRST, call);
    answer
}

pub(crate) fn told(result: CallResult) -> Vec<String> {
    codec::decode(&result.unwrap(), 1 << 20).unwrap()
}

pub(crate) async fn open(gate_name: &str) {
    let gate = gate(gate_name);
    tokio::time::timeout(PATIENCE, gate.acquire())
        .await
        .expect("in time")
        .unwrap()
        .forget();
}

/// Certificates of one test cluster.
pub(crate) struct Certificates(ClusterCa);

impl Certificates {
    pub(crate) fn new() -> Self {
        Certificates(ClusterCa::create("test").unwrap())
    }

    /// What an agent gets for a host that shows `credentials`: their next certificate.
    pub(crate) fn next_for(&self, credentials: &Credentials, ttl: Duration) -> String {
        let request = credentials.private_key().certificate_request().unwrap();
        self.0
            .issue(&request, credentials.identity(), Validity::for_ttl(ttl))
            .unwrap()
    }

    /// A host's, which ends soon.
    pub(crate) fn short_lived_host(&self, job: u64, ttl: Duration) -> Credentials {
        let identity = Identity::new("test", Role::Host, format!("host-{job}"), 1).with_job(job);
        self.0
            .issue_with_new_key(&identity, Validity::for_ttl(ttl))
            .unwrap()
    }

    pub(crate) fn issue(&self, identity: &Identity) -> Credentials {
        self.0
            .issue_with_new_key(identity, Validity::for_ttl(Duration::from_secs(3600)))
            .unwrap()
    }

    pub(crate) fn host(&self, job: u64) -> Credentials {
        self.issue(&Identity::new("test", Role::Host, format!("host-{job}"), 1).with_job(job))
    }

    /// A host's whose job is in the namespace `shop`, in that life of it.
    pub(crate) fn host_in_shop(&self, job: u64, life: u64) -> Credentials {
        let namespace = Namespace {
            name: "shop".to_owned(),
            incarnation: Incarnation(life),
        };
        let identity = Identity::new("test", Role::Host, format!("host-{job}"), 1).with_job(job);
        self.issue(&identity.with_namespace(Some(namespace)))
    }

    pub(crate) fn client(&self) -> Credentials {
        self.issue(&Identity::new("test", Role::Client, "me", 1))
    }
}

pub(crate) fn listen(credentials: &Credentials) -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().unwrap(), credentials).unwrap()
}

pub(crate) fn address(endpoint: &Endpoint, actor: ActorId) -> ActorAddress {
    ActorAddress {
        actor,
        incarnation: FIRST,
        node: NodeId(1),
        call_address: endpoint.local_address().to_string(),
    }
}

/// A host that answers calls of one actor.
pub(crate) struct Host {
    pub(crate) endpoint: Endpoint,
    pub(crate) server: JoinHandle<()>,
}

/// A host of the job in which the probe `actor` runs.
pub(crate) async fn serve(certificates: &Certificates, actor: ActorId) -> Host {
    let (table, _events) = table_with(actor).await;
    let endpoint = listen(&certificates.host(JOB.0));
    let server = tokio::spawn(serve_calls(endpoint.clone(), table));
    Host { endpoint, server }
}

/// A caller of its own, by whichever path.
pub(crate) fn client(credentials: &Credentials) -> CallClient {
    CallClient::new(listen(credentials), None)
}

/// What a probe's methods take.
pub(crate) fn text(value: &str) -> Vec<u8> {
    codec::encode_plain(value)
}
