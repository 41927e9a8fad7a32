//! A head that does what the test tells it.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId, Term};
use mobula_core::order::{Order, StartActor, WorkerEvent};
use mobula_core::spec::{ActorKind, ActorSpec, Program};
use mobula_net::endpoint::{ConnectError, Connection, Endpoint, LaneClass};
use mobula_net::identity::{ClusterCa, Identity, Role, Validity};
use mobula_net::lane::FramedStream;
use mobula_wire::session::{HeadMessage, StorageLocation, Welcome, WorkerHello, WorkerMessage};
use mobula_worker::{Handle, Worker, WorkerOptions};

/// Far above what anything here needs; a test that waits this long has failed.
pub(crate) const BOUND: Duration = Duration::from_secs(60);

pub(crate) const CLUSTER: &str = "test";

pub(crate) struct FakeHead {
    ca: ClusterCa,
    /// How long the certificates of hosts live.
    pub(crate) host_ttl: Duration,
    endpoint: Endpoint,
    pub(crate) dir: tempfile::TempDir,
}

/// One session, from the head's side.
pub(crate) struct Talk {
    pub(crate) hello: WorkerHello,
    stream: FramedStream,
    connection: Connection,
    ca: ClusterCa,
    host_ttl: Duration,
    /// Where the last actor that was started takes calls.
    pub(crate) call_address: String,
    /// How many certificates of hosts were asked for.
    pub(crate) signed: u32,
    /// How many of the next ones are refused.
    pub(crate) refuse_to_sign: u32,
}

impl FakeHead {
    pub(crate) fn start() -> FakeHead {
        let ca = ClusterCa::create(CLUSTER).unwrap();
        let validity = Validity::for_ttl(Duration::from_secs(3600));
        let identity = Identity::new(CLUSTER, Role::Head, "1", 1);
        let credentials = ca.issue_with_new_key(&identity, validity).unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let endpoint = Endpoint::bind(address, &credentials).unwrap();
        FakeHead {
            ca,
            host_ttl: Duration::from_secs(3600),
            endpoint,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// Options of a worker that has joined already.
    pub(crate) fn worker_options(&self) -> WorkerOptions {
        let identity_dir = self.dir.path().join("identity");
        let identity = Identity::new(CLUSTER, Role::Node, "w-1", 1);
        let validity = Validity::for_ttl(Duration::from_secs(3600));
        self.ca
            .issue_with_new_key(&identity, validity)
            .unwrap()
            .save(&identity_dir)
            .unwrap();
        let cluster = serde_json::json!({
            "cluster_id": CLUSTER,
            "cluster_address": self.endpoint.local_address().to_string(),
        });
        std::fs::write(identity_dir.join("cluster.json"), cluster.to_string()).unwrap();
        // Nobody serves the control API here: the discard port refuses at once.
        let mut options = WorkerOptions::new("w-1", self.dir.path(), vec!["127.0.0.1:9".into()]);
        options.sigterm_is_notice = false;
        options.notice_poll_ms = 10;
        options
    }

    pub(crate) async fn start_worker(&self) -> Handle {
        Worker::start(self.worker_options()).await.unwrap()
    }

    /// The next session, up to its hello.
    pub(crate) async fn accept(&self) -> Talk {
        let accept = async {
            let connection = self.endpoint.accept().await.unwrap();
            let (_, mut stream) = connection.accept().await.unwrap();
            let hello = match stream.receiver.receive_message().await.unwrap() {
                Some(WorkerMessage::Hello(hello)) => hello,
                other => panic!("expected a hello, got {other:?}"),
            };
            let ca = ClusterCa::from_pem(self.ca.certificate_pem(), self.ca.key_pem()).unwrap();
            Talk {
                hello,
                stream,
                connection,
                ca,
                host_ttl: self.host_ttl,
                call_address: String::new(),
                signed: 0,
                refuse_to_sign: 0,
            }
        };
        tokio::time::timeout(BOUND, accept).await.unwrap()
    }

    /// Calls what listens at `address`, as if it were a host.
    pub(crate) async fn call(&self, address: &str) -> Result<Connection, ConnectError> {
        self.endpoint
            .connect(address.parse().unwrap(), LaneClass::Control, Role::Host)
            .await
    }

    /// The next session, welcomed.
    pub(crate) async fn welcome(&self, incarnation: u64) -> Talk {
        let mut talk = self.accept().await;
        talk.send(&HeadMessage::Welcome(welcome(incarnation, 5)))
            .await;
        talk
    }
}

pub(crate) fn welcome(incarnation: u64, term: u64) -> Welcome {
    Welcome {
        term: Term(term),
        node: NodeId(1),
        incarnation: Incarnation(incarnation),
        lease_ms: 30_000,
        renew_ms: 100,
        storage: StorageLocation {
            url: "file:///nowhere".into(),
            endpoint: None,
            region: None,
            allow_http: false,
            access_key_env: String::new(),
            secret_key_env: String::new(),
        },
        api_addresses: Vec::new(),
    }
}

impl Talk {
    pub(crate) async fn send(&mut self, message: &HeadMessage) {
        self.stream.sender.send_message(message).await.unwrap();
    }

    pub(crate) async fn order(&mut self, order: Order) {
        self.send(&HeadMessage::Order {
            term: Term(5),
            order,
        })
        .await;
    }

    /// The next message that is not about renewals or certificates; those are answered.
    pub(crate) async fn next(&mut self) -> Option<WorkerMessage> {
        loop {
            let message = self.receive().await?;
            if let Some(other) = self.answer(message).await? {
                return Some(other);
            }
        }
    }

    /// Answers until so many certificates were asked for; nothing else may happen meanwhile.
    pub(crate) async fn until_signed(&mut self, count: u32) {
        while self.signed < count {
            let message = self.receive().await.expect("the session goes on");
            let other = self.answer(message).await.expect("the session goes on");
            assert_eq!(other, None);
        }
    }

    async fn receive(&mut self) -> Option<WorkerMessage> {
        let received = self.stream.receiver.receive_message::<WorkerMessage>();
        tokio::time::timeout(BOUND, received)
            .await
            .unwrap()
            .ok()
            .flatten()
    }

    /// Answers what is about renewals or certificates, and gives anything else back; `None` when
    /// the session is over.
    async fn answer(&mut self, message: WorkerMessage) -> Option<Option<WorkerMessage>> {
        match message {
            WorkerMessage::Renew { sequence } => {
                let renewed = HeadMessage::Renewed {
                    term: Term(5),
                    sequence,
                };
                // The worker may have hung up meanwhile.
                self.stream.sender.send_message(&renewed).await.ok()?;
            }
            WorkerMessage::SignHost {
                request,
                csr_pem,
                job,
                host,
            } => {
                self.signed += 1;
                let result = if self.refuse_to_sign > 0 {
                    self.refuse_to_sign -= 1;
                    Err("not now".to_owned())
                } else {
                    Ok(self.sign(&csr_pem, job, host))
                };
                self.send(&HeadMessage::HostSigned { request, result })
                    .await;
            }
            other => return Some(Some(other)),
        }
        Some(None)
    }

    fn sign(&self, csr_pem: &str, job: JobId, host: HostId) -> String {
        let identity =
            Identity::new(CLUSTER, Role::Host, format!("node-1.{host}"), 1).with_job(job.0);
        let validity = Validity::for_ttl(self.host_ttl);
        self.ca.issue(csr_pem, &identity, validity).unwrap()
    }

    /// The next event, not yet acknowledged.
    pub(crate) async fn event(&mut self) -> (u64, WorkerEvent) {
        match self.next().await {
            Some(WorkerMessage::Event { sequence, event }) => (sequence, event),
            other => panic!("expected an event, got {other:?}"),
        }
    }

    /// The next event, acknowledged.
    pub(crate) async fn acknowledged_event(&mut self) -> WorkerEvent {
        let (sequence, event) = self.event().await;
        self.send(&HeadMessage::EventAcknowledged { sequence })
            .await;
        event
    }

    /// Starts an actor and returns its host's process id.
    pub(crate) async fn start_actor(&mut self, actor: u64, incarnation: u64) -> u32 {
        self.order(Order::Start(Box::new(plain(actor, incarnation))))
            .await;
        loop {
            match self.acknowledged_event().await {
                WorkerEvent::ActorStarted {
                    actor: started,
                    pid,
                    call_address,
                    ..
                } if started == ActorId(actor) => {
                    self.call_address = call_address;
                    return pid;
                }
                // Repeated, because its acknowledgement went down with a connection.
                WorkerEvent::ActorStarted { .. } => {}
                other => panic!("expected a start, got {other:?}"),
            }
        }
    }

    /// Breaks the connection.
    pub(crate) fn drop_connection(self) {
        self.connection.close("test");
    }
}

pub(crate) fn plain(actor: u64, incarnation: u64) -> StartActor {
    StartActor {
        actor: ActorId(actor),
        incarnation: Incarnation(incarnation),
        job: JobId(1),
        program: Program::Builtin,
        spec: ActorSpec::of_type("plain"),
        args: Vec::new(),
        env: BTreeMap::new(),
        files: Vec::new(),
        secrets: Default::default(),
    }
}

pub(crate) fn driver(actor: u64, args: &[&str]) -> StartActor {
    let mut start = plain(actor, 1);
    start.spec.kind = ActorKind::Driver;
    start.args = args.iter().map(|arg| (*arg).to_owned()).collect();
    start
}

/// Whether a process is there at all.
pub(crate) fn is_alive(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}
