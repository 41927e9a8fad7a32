//! An actor's method called within its process, over a Unix socket, and over QUIC with mutual TLS,
//! between two endpoints. Beside it a datagram that goes there and back over the loopback device.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use mobula_benches::measure::{Samples, Settings, repeat, repeat_async};
use mobula_benches::report::Report;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId};
use mobula_core::order::{ActorAddress, StartActor};
use mobula_core::spec::{ActorSpec, Program};
use mobula_host::calls::serve_calls;
use mobula_host::client::{CallClient, OutgoingCall, Paths};
use mobula_host::registry::ConstructError;
use mobula_host::supervision::{ActorEvent, ActorTable};
use mobula_host::{
    ActorBody, ActorContext, ActorType, DynActor, HostInfo, HostRuntime, MethodCall, MethodError,
    Registry,
};
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{ClusterCa, Identity, Role, Validity};
use mobula_wire::host::HostRole;
use mobula_wire::session::StorageLocation;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const JOB: JobId = JobId(1);
const ECHO: ActorId = ActorId(1);
const FIRST: Incarnation = Incarnation(1);

/// Arguments and answer of each call.
static ARGUMENT: [u8; 16] = [7; 16];

/// Calls in flight where calls are not made one after the other.
const IN_FLIGHT: usize = 64;

/// As many as a mailbox holds by default.
const MANY_IN_FLIGHT: usize = 1000;

/// How long the certificates of this run are good.
const VALID: Duration = Duration::from_secs(3600);

/// Answers with what it is told.
struct Echo;

impl DynActor for Echo {
    fn dispatch<'a>(
        &'a mut self,
        call: MethodCall<'a>,
    ) -> BoxFuture<'a, Result<Vec<u8>, MethodError>> {
        Box::pin(std::future::ready(Ok(call.arguments.to_vec())))
    }
}

fn construct(
    _init: Vec<u8>,
    _context: ActorContext,
) -> BoxFuture<'static, Result<ActorBody, ConstructError>> {
    Box::pin(std::future::ready(Ok(ActorBody::serial(Echo))))
}

/// A table in which the echo runs.
async fn table() -> Result<Arc<ActorTable>, Failure> {
    let storage = StorageLocation {
        url: "file:///nowhere".into(),
        endpoint: None,
        region: None,
        allow_http: false,
        access_key_env: String::new(),
        secret_key_env: String::new(),
    };
    let runtime = HostRuntime::new(HostInfo {
        cluster_id: "bench".into(),
        job: JOB,
        node: NodeId(1),
        node_name: "one".into(),
        host: HostId(1),
        role: HostRole::Actors,
        api_addresses: Vec::new(),
        storage,
    });
    let registry = Registry::new([ActorType {
        name: "echo",
        constructor: construct,
        durable: false,
    }])?;
    let (table, mut events) = ActorTable::start(runtime, registry).await?;
    let order = StartActor {
        actor: ECHO,
        incarnation: FIRST,
        job: JOB,
        program: Program::Builtin,
        spec: ActorSpec::of_type("echo"),
        args: Vec::new(),
        env: Default::default(),
        files: Vec::new(),
        secrets: Default::default(),
    };
    table.start_actor(order).await;
    match events.recv().await {
        Some(ActorEvent::Started { .. }) => Ok(table),
        other => Err(format!("the echo did not start: {other:?}").into()),
    }
}

fn address(at: SocketAddr) -> ActorAddress {
    ActorAddress {
        actor: ECHO,
        incarnation: FIRST,
        node: NodeId(1),
        call_address: at.to_string(),
    }
}

async fn calls(
    settings: Settings,
    client: &CallClient,
    target: &ActorAddress,
    callers: usize,
) -> Samples {
    let call = async || {
        let call = OutgoingCall::new("echo", &ARGUMENT[..]);
        let answer = client.call(target, call).await;
        assert_eq!(answer.expect("the echo is there")[..], ARGUMENT);
    };
    repeat_async(settings, callers, call).await
}

/// A datagram there and back, by a thread that waits for it.
fn datagrams(settings: Settings) -> std::io::Result<Samples> {
    let bind = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
    let (near, far) = (bind()?, bind()?);
    near.connect(far.local_addr()?)?;
    far.connect(near.local_addr()?)?;
    let echo = std::thread::spawn(move || {
        let mut buffer = [0; ARGUMENT.len()];
        // An empty datagram is the end.
        while matches!(far.recv(&mut buffer), Ok(count) if count > 0) {
            if far.send(&buffer).is_err() {
                return;
            }
        }
    });
    let mut buffer = [0; ARGUMENT.len()];
    let samples = repeat(settings, || {
        near.send(&ARGUMENT).expect("loopback takes datagrams");
        near.recv(&mut buffer)
            .expect("one caller at a time loses none");
    });
    near.send(&[])?;
    echo.join().expect("the echo does not panic");
    Ok(samples)
}

fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
}

fn main() -> Result<(), Failure> {
    let Some(settings) = Settings::from_args() else {
        return Ok(());
    };
    let ca = ClusterCa::create("bench")?;
    let issue = |identity| ca.issue_with_new_key(&identity, Validity::for_ttl(VALID));
    let host = issue(Identity::new("bench", Role::Host, "host-1", 1).with_job(JOB.0))?;
    let caller = issue(Identity::new("bench", Role::Client, "caller", 1))?;
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    // Each side has threads of its own, as two processes would.
    let (server_runtime, client_runtime) = (runtime()?, runtime()?);
    let mut report = Report::new("actor calls with 16 bytes each way");

    let (sender, receiver) = oneshot::channel();
    let server = server_runtime.spawn(async move {
        let table = table().await?;
        let endpoint = Endpoint::bind(any_port, &host)?;
        let weak = Arc::downgrade(&table);
        let local = CallClient::new(endpoint.clone(), Some((endpoint.local_address(), weak)));
        let target = address(endpoint.local_address());
        let alone = calls(settings, &local, &target, 1).await;
        let together = calls(settings, &local, &target, IN_FLIGHT).await;
        if sender
            .send((endpoint.local_address(), alone, together))
            .is_ok()
        {
            serve_calls(endpoint, table).await;
        }
        Ok::<_, Failure>(())
    });
    let Ok((at, alone, together)) = receiver.blocking_recv() else {
        return server_runtime.block_on(server)?;
    };
    report.add("same process, one at a time", alone);
    report.add(format!("same process, {IN_FLIGHT} in flight"), together);

    client_runtime.block_on(async {
        let target = address(at);
        for (name, paths) in [("Unix", Paths::Any), ("QUIC", Paths::QuicOnly)] {
            let endpoint = Endpoint::bind(any_port, &caller)?;
            let client = CallClient::with_paths(endpoint, None, paths);
            let alone = calls(settings, &client, &target, 1).await;
            report.add(format!("{name}, one at a time"), alone);
            for callers in [IN_FLIGHT, MANY_IN_FLIGHT] {
                let together = calls(settings, &client, &target, callers).await;
                report.add(format!("{name}, {callers} in flight"), together);
            }
        }
        Ok::<_, Failure>(())
    })?;
    server.abort();
    report.add("limit: UDP loopback, one at a time", datagrams(settings)?);
    report.print();
    Ok(())
}
