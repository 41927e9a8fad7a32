//! A head in this process, and its clients and workers: they come in by the same doors as others.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mobula_core::clock::Clock;
use mobula_core::config::Config;
use mobula_core::id::{HostId, Incarnation, JobId};
use mobula_core::label::Labels;
use mobula_core::order::{Order, StartActor};
use mobula_core::resource::Resources;
use mobula_head::{CLIENT_TOKEN_FILE, Head, HeadError, HeadOptions, WORKER_TOKEN_FILE};
use mobula_net::endpoint::{Connection, Endpoint, LaneClass};
use mobula_net::identity::{Credentials, PrivateKey, Role, Token};
use mobula_net::lane::FramedStream;
use mobula_net::tcp::{ClientTls, connect_channel};
use mobula_wire::control as api;
use mobula_wire::control::control_client::ControlClient;
use mobula_wire::hello::Lane;
use mobula_wire::session::{HeadMessage, Welcome, WorkerHello, WorkerMessage};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// Far above what anything here needs; a test that waits this long has failed.
pub(crate) const BOUND: Duration = Duration::from_secs(60);

struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        u64::try_from(now.as_millis()).unwrap()
    }
}

/// Puts a bearer token into each request, or nothing.
#[derive(Clone)]
pub(crate) struct Bearer(Option<String>);

impl tonic::service::Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            let value = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

pub(crate) type Api = ControlClient<InterceptedService<Channel, Bearer>>;

/// The head.
pub(crate) struct OneHead {
    dir: tempfile::TempDir,
    api_address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    running: Option<JoinHandle<Result<(), HeadError>>>,
}

impl OneHead {
    pub(crate) async fn start() -> OneHead {
        OneHead::start_with(Arc::new(SystemClock)).await
    }

    /// One that goes by this clock.
    pub(crate) async fn start_with(clock: Arc<dyn Clock>) -> OneHead {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.head.data_dir = dir.path().join("head").display().to_string();
        config.head.api_listen = "127.0.0.1:0".into();
        config.head.cluster_listen = "127.0.0.1:0".into();
        config.storage.url = format!("file://{}", dir.path().join("store").display());
        let options = HeadOptions::from_config(&config, clock).unwrap();
        let head = Head::start(options).await.unwrap();
        let api_address = head.api_address();
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(head.run(async move {
            // A dropped sender is a stop as well.
            let _ = stopped.await;
        }));
        OneHead {
            dir,
            api_address,
            stop: Some(stop),
            running: Some(running),
        }
    }

    /// Ends it, in order.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        let running = self.running.take().unwrap();
        tokio::time::timeout(BOUND, running)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    /// A token that the leader left in the data directory.
    async fn token(&self, file: &str) -> String {
        let path = self.dir.path().join("head").join(file);
        let there = async {
            loop {
                // It is renamed into place, so that what is there is whole.
                if let Ok(text) = std::fs::read_to_string(&path) {
                    return text.trim().to_owned();
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(BOUND, there).await.unwrap()
    }

    /// A token for workers.
    pub(crate) async fn worker_token(&self) -> String {
        self.token(WORKER_TOKEN_FILE).await
    }

    /// Gets a page by plain HTTP; the status and the text.
    pub(crate) async fn get(&self, path: &str, token: Option<&str>) -> (u16, String) {
        use tonic::codegen::{Service, http};
        let client = self.token(CLIENT_TOKEN_FILE).await;
        let pinned = ClientTls::Pinned(Token::parse(&client).unwrap().ca_key_hash());
        let mut channel = connect_channel(self.api_address, pinned).await.unwrap();
        let mut request = http::Request::get(path);
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(tonic::body::Body::empty()).unwrap();
        std::future::poll_fn(|context| channel.poll_ready(context))
            .await
            .unwrap();
        let (parts, body) = channel.call(request).await.unwrap().into_parts();
        let body = axum::body::Body::new(body);
        let bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        (
            parts.status.as_u16(),
            String::from_utf8(bytes.to_vec()).unwrap(),
        )
    }

    /// A person with a client token, on a connection of their own.
    pub(crate) async fn client(&self) -> Api {
        let token = self.token(CLIENT_TOKEN_FILE).await;
        self.client_with(&token).await
    }

    /// Somebody with this token, on a connection of their own.
    pub(crate) async fn client_with(&self, token: &str) -> Api {
        let pinned = ClientTls::Pinned(Token::parse(token).unwrap().ca_key_hash());
        self.api(pinned, Some(token.to_owned())).await
    }

    /// What `token` is exchanged for; the CA's certificate; where the cluster is.
    pub(crate) async fn join(
        &self,
        token: String,
        name: &str,
    ) -> Result<(Credentials, api::JoinReply), Status> {
        let pinned = ClientTls::Pinned(Token::parse(&token).unwrap().ca_key_hash());
        let key = PrivateKey::generate().unwrap();
        let request = api::JoinRequest {
            token,
            csr_pem: key.certificate_request().unwrap(),
            name: name.to_owned(),
        };
        let mut door = self.api(pinned, None).await;
        let joined = door.join(request).await?.into_inner();
        let credentials = Credentials::new(&joined.certificate_pem, key, &joined.ca_pem).unwrap();
        Ok((credentials, joined))
    }

    /// Somebody with a certificate.
    pub(crate) async fn with_certificate(&self, credentials: Credentials) -> Api {
        self.api(ClientTls::Mutual(credentials), None).await
    }

    async fn api(&self, tls: ClientTls, token: Option<String>) -> Api {
        let channel = connect_channel(self.api_address, tls).await.unwrap();
        ControlClient::with_interceptor(channel, Bearer(token))
    }

    /// A worker that has joined, has said hello and was welcomed.
    pub(crate) async fn worker(&self, name: &str) -> TestWorker {
        let token = self.token(WORKER_TOKEN_FILE).await;
        let (credentials, joined) = self.join(token, name).await.unwrap();
        let endpoint = Endpoint::bind_client("127.0.0.1:0".parse().unwrap(), &credentials).unwrap();
        let address = joined.cluster_address.parse().unwrap();
        let connection = endpoint
            .connect(address, LaneClass::Control, Role::Head)
            .await
            .unwrap();
        let mut stream = connection.open(Lane::Control).await.unwrap();
        let hello = WorkerHello {
            name: name.to_owned(),
            boot_id: format!("boot of {name}"),
            version: "test".into(),
            capacity: Resources {
                cpu_milli: 4_000,
                ..Resources::default()
            },
            labels: Labels::default(),
        };
        stream
            .sender
            .send_message(&WorkerMessage::Hello(hello))
            .await
            .unwrap();
        let HeadMessage::Welcome(welcome) = receive(&mut stream).await else {
            panic!("a worker's hello is answered with a welcome");
        };
        TestWorker {
            welcome,
            ca_pem: joined.ca_pem,
            stream,
            _connection: connection,
            _endpoint: endpoint,
        }
    }
}

async fn receive(stream: &mut FramedStream) -> HeadMessage {
    let message = stream.receiver.receive_message();
    tokio::time::timeout(BOUND, message)
        .await
        .unwrap()
        .unwrap()
        .expect("the head keeps the session")
}

/// A worker's end of a session, without anything behind it.
pub(crate) struct TestWorker {
    pub(crate) welcome: Welcome,
    ca_pem: String,
    stream: FramedStream,
    _connection: Connection,
    _endpoint: Endpoint,
}

impl TestWorker {
    /// The next order to start something.
    pub(crate) async fn start_order(&mut self) -> Box<StartActor> {
        loop {
            if let HeadMessage::Order {
                order: Order::Start(start),
                ..
            } = receive(&mut self.stream).await
            {
                return start;
            }
        }
    }

    /// Asks for a certificate of a host that runs `job`.
    pub(crate) async fn sign_host(&mut self, job: JobId) -> Result<Credentials, String> {
        const REQUEST: u64 = 41;
        let key = PrivateKey::generate().unwrap();
        let question = WorkerMessage::SignHost {
            request: REQUEST,
            csr_pem: key.certificate_request().unwrap(),
            job,
            host: HostId(7),
        };
        self.stream.sender.send_message(&question).await.unwrap();
        loop {
            if let HeadMessage::HostSigned { request, result } = receive(&mut self.stream).await {
                assert_eq!(request, REQUEST);
                return result.map(|pem| Credentials::new(&pem, key, &self.ca_pem).unwrap());
            }
        }
    }
}

/// A job of the platform's own program that wants `cpu_milli` for its driver.
pub(crate) fn job(name: &str, cpu_milli: u64) -> api::JobSpec {
    api::JobSpec {
        name: name.to_owned(),
        resources: Some(api::Resources {
            cpu_milli,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Opens a session; its id.
pub(crate) async fn open_session(api: &mut Api) -> u64 {
    let request = api::OpenSessionRequest {
        client: "a test".into(),
    };
    api.open_session(request)
        .await
        .unwrap()
        .into_inner()
        .session
}

/// Submits `spec`; what the head said.
pub(crate) async fn submit(
    api: &mut Api,
    session: u64,
    sequence: u64,
    spec: api::JobSpec,
) -> Result<api::SubmitJobReply, Status> {
    let request = api::SubmitJobRequest {
        stamp: Some(api::Stamp { session, sequence }),
        spec: Some(spec),
    };
    Ok(api.submit_job(request).await?.into_inner())
}

/// The finer kind of a refusal.
pub(crate) fn code(status: &Status) -> &str {
    status
        .metadata()
        .get("mobula-code")
        .map_or("", |value| value.to_str().unwrap())
}

/// What a driver that was told to start stores as its result.
pub(crate) fn result_of(
    start: &StartActor,
    incarnation: Incarnation,
    session: u64,
) -> api::SetJobResultRequest {
    api::SetJobResultRequest {
        stamp: Some(api::Stamp {
            session,
            sequence: 1,
        }),
        job: start.job.0,
        driver: start.actor.0,
        incarnation: incarnation.0,
        result_json: "1".into(),
    }
}
