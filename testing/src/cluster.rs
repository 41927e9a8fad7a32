//! A head and one host, in the process of a test.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use mobula_core::id::HostId;
use mobula_host::calls::serve_calls;
use mobula_host::client::CallClient;
use mobula_host::objects::ObjectTable;
use mobula_host::supervision::{ActorEvent, ActorTable};
use mobula_host::{HostInfo, HostRuntime, Registry};
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{ClusterCa, Identity, Role, Token};
use mobula_net::tcp::{ApiListener, CountRequests};
use mobula_wire::control::control_server::ControlServer;
use mobula_wire::host::HostRole;
use mobula_wire::session::StorageLocation;
use tokio::sync::mpsc;

use crate::actors::{Actors, JOB, NODE};
use crate::head::{Api, CLUSTER, ScriptedHead, credentials};

/// A head that does as its test says, and a host whose actors it knows.
pub struct ScriptedCluster<H> {
    /// The head.
    pub head: Arc<H>,
    /// What the host's actors share: a cluster as they see it is made of it.
    pub runtime: Arc<HostRuntime>,
    /// Where the head answers, `ip:port`.
    pub api_address: String,
    /// A client's token.
    pub token: String,
    /// Its object store: gone with it.
    _directory: tempfile::TempDir,
}

impl<H: ScriptedHead> ScriptedCluster<H> {
    /// Starts a host of actors of these types, and the head that `head` makes for it.
    ///
    /// # Panics
    /// If this machine lacks something that they need: a port of its own address, a temporary folder.
    pub async fn start(registry: Registry, head: impl FnOnce(Actors) -> H) -> Self {
        let directory = tempfile::tempdir().expect("a temporary folder can be made");
        let ca = ClusterCa::create(CLUSTER).expect("a CA can be made");
        let identity = Identity::new(CLUSTER, Role::Head, "head-1", 1);
        let listener = ApiListener::bind(loopback(), &credentials(&ca, &identity)).await;
        let listener = listener.expect("a port is free for the head");
        let api_address = listener.local_address().to_string();
        let token = Token::generate(Role::Client, ca.key_hash()).to_text();

        let runtime = runtime(&api_address, directory.path());
        let (actors, mut events) = host(&ca, &runtime, registry).await;
        let head = Arc::new(head(actors));
        let hearing = Arc::clone(&head);
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if let Some(id) = hearing.actors().heard(event) {
                    hearing.start(id).await;
                }
            }
        });
        let api = Api {
            head: Arc::clone(&head),
            ca,
        };
        let server = tonic::transport::Server::builder()
            .layer(CountRequests)
            .add_service(ControlServer::new(api));
        tokio::spawn(server.serve_with_incoming(listener));
        ScriptedCluster {
            head,
            runtime,
            api_address,
            token,
            _directory: directory,
        }
    }
}

/// Any free port of this machine.
fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn runtime(api_address: &str, directory: &Path) -> Arc<HostRuntime> {
    HostRuntime::new(HostInfo {
        cluster_id: CLUSTER.into(),
        job: JOB,
        node: NODE,
        node_name: "one".into(),
        host: HostId(5),
        role: HostRole::Actors,
        api_addresses: vec![api_address.to_owned()],
        storage: StorageLocation {
            url: format!("file://{}", directory.display()),
            endpoint: None,
            region: None,
            allow_http: false,
            access_key_env: String::new(),
            secret_key_env: String::new(),
        },
    })
}

/// A host that answers calls to its actors, and what becomes of these.
async fn host(
    ca: &ClusterCa,
    runtime: &Arc<HostRuntime>,
    registry: Registry,
) -> (Actors, mpsc::Receiver<ActorEvent>) {
    let identity = Identity::new(CLUSTER, Role::Host, "host-5", 1).with_job(JOB.0);
    let credentials = credentials(ca, &identity);
    let endpoint = Endpoint::bind(loopback(), &credentials).expect("a port is free for the host");
    let table = ActorTable::start(Arc::clone(runtime), registry).await;
    let (table, events) = table.expect("the supervisor of the host's actors starts");
    runtime.set_credentials(credentials);
    let address = endpoint.local_address();
    let calls = CallClient::new(endpoint.clone(), Some((address, Arc::downgrade(&table))));
    runtime.set_objects(ObjectTable::start(address.to_string(), calls.clone()));
    runtime.set_calls(calls);
    tokio::spawn(serve_calls(endpoint, Arc::clone(&table)));
    (Actors::new(table, address.to_string()), events)
}
