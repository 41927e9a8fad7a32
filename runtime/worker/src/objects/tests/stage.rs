//! Nodes with real stores, and hosts that the test plays: each puts every object into an arena of its
//! own, and does what the agent says about memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use mobula_core::codec;
use mobula_core::id::{HostId, JobId};
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_net::descriptor::{DescriptorReceiver, DescriptorSender, connect_descriptors};
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{ClusterCa, Identity, Role, Validity};
use mobula_wire::store::{STORE_MESSAGE_BYTES_MAX, StoreReply, StoreRequest};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::super::{Keys, ObjectStore, ObjectStoreMetrics, Service, ServiceParts};

pub(super) const MIB: u64 = 1 << 20;

/// Long enough for any machine; only a failing test waits for it.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Node {
    pub(super) keys: Keys,
    endpoint: Endpoint,
    pub(super) directory: TempDir,
    pub(super) store: ObjectStore,
    pub(super) metrics: watch::Receiver<ObjectStoreMetrics>,
    pub(super) agent: String,
    pub(super) service: JoinHandle<()>,
}

impl Node {
    pub(super) fn start(ca: &ClusterCa, name: &str, memory_bytes: u64, spill_bytes: u64) -> Node {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("spill")).unwrap();
        let credentials = ca
            .issue_with_new_key(
                &Identity::new("test", Role::Node, name, 1),
                Validity::for_ttl(Duration::from_secs(3600)),
            )
            .unwrap();
        let endpoint = Endpoint::bind("127.0.0.1:0".parse().unwrap(), &credentials).unwrap();
        let agent = endpoint.local_address().to_string();
        let keys = Keys::default();
        let (service, store, metrics) = Service::open(ServiceParts {
            spans: Default::default(),
            node: name.to_owned(),
            socket: directory.path().join("objects.sock"),
            spill_dir: directory.path().join("spill"),
            memory_bytes,
            spill_bytes: Some(spill_bytes),
            endpoint: endpoint.clone(),
            keys: keys.clone(),
        })
        .unwrap();
        Node {
            keys,
            endpoint,
            directory,
            store,
            metrics,
            agent,
            service: tokio::spawn(service.run()),
        }
    }

    pub(super) async fn host(&self, number: u64, job: u64) -> Host {
        let key = self.keys.issue(HostId(number), JobId(job));
        let socket = self.directory.path().join("objects.sock");
        let (mut sender, receiver) = connect_descriptors(&socket, STORE_MESSAGE_BYTES_MAX)
            .await
            .unwrap();
        let process = ProcessId(number);
        let hello = StoreRequest::Hello { key, process };
        sender
            .send(&codec::encode_plain(&hello), None)
            .await
            .unwrap();
        let mut host = Host {
            process,
            agent: self.agent.clone(),
            sender,
            receiver,
            arenas: BTreeMap::new(),
            blocks: BTreeMap::new(),
            heard: Vec::new(),
            requests: 0,
        };
        assert!(matches!(
            host.reply().await.unwrap(),
            StoreReply::Welcome { .. }
        ));
        host
    }

    pub(super) async fn until(&self, what: &str, is_so: impl Fn(&ObjectStoreMetrics) -> bool) {
        let mut metrics = self.metrics.clone();
        let waiting = metrics.wait_for(is_so);
        if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
            panic!("{what}: {:?}", *self.metrics.borrow());
        }
    }

    /// The file of its objects on disk, by the only name that it has.
    pub(super) fn spill_file(&self) -> File {
        let directory = self.directory.path().join("spill");
        let mut files = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let file = files
            .find(|file| std::fs::read_link(file.path()).is_ok_and(|to| to.starts_with(&directory)))
            .expect("it is open");
        File::options()
            .read(true)
            .write(true)
            .open(file.path())
            .unwrap()
    }
}

impl Node {
    /// Ends it as its process's end would: nobody listens at its address any more.
    pub(super) async fn stop(self) {
        self.service.abort();
        self.endpoint.close("stopped").await;
        let address = self.endpoint.local_address();
        drop(self);
        let closing = async {
            while !mobula_net::probe::nobody_listens(address).await {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, closing)
            .await
            .expect("the last clone of the endpoint is dropped");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.service.abort();
    }
}

/// A host that puts each object into an arena of its own.
pub(super) struct Host {
    pub(super) process: ProcessId,
    pub(super) agent: String,
    pub(super) sender: DescriptorSender,
    pub(super) receiver: DescriptorReceiver,
    pub(super) arenas: BTreeMap<u64, File>,
    pub(super) blocks: BTreeMap<ObjectId, u64>,
    pub(super) heard: Vec<StoreReply>,
    pub(super) requests: u64,
}

pub(super) struct Opened {
    pub(super) inode: u64,
    pub(super) bytes: Vec<u8>,
}

impl Host {
    pub(super) fn id(&self, sequence: u64) -> ObjectId {
        ObjectId {
            owner: self.process,
            sequence,
        }
    }

    pub(super) async fn send(&mut self, request: StoreRequest) {
        let message = codec::encode_plain(&request);
        self.sender.send(&message, None).await.unwrap();
    }

    /// The next answer; what it says about memory is acted on, as a host does.
    pub(super) async fn reply(&mut self) -> Option<StoreReply> {
        let received = tokio::time::timeout(PATIENCE, self.receiver.receive()).await;
        let (payload, descriptor) = received.expect("an answer in time").unwrap()?;
        let reply: StoreReply = codec::decode(&payload, STORE_MESSAGE_BYTES_MAX).unwrap();
        match &reply {
            StoreReply::Granted { arena, .. }
            | StoreReply::Opened {
                arena,
                arena_bytes: Some(_),
                ..
            } => {
                let file = File::from(descriptor.expect("it comes with a descriptor"));
                self.arenas.insert(*arena, file);
            }
            StoreReply::Reclaimed { object } => {
                let arena = self.blocks.remove(object).unwrap();
                self.arenas.remove(&arena);
                self.send(StoreRequest::ReturnArena { arena }).await;
            }
            _ => assert!(descriptor.is_none()),
        }
        Some(reply)
    }

    pub(super) async fn answer(&mut self) -> StoreReply {
        loop {
            match self.reply().await.expect("the agent goes on") {
                reply @ (StoreReply::Reclaimed { .. }
                | StoreReply::Forget { .. }
                | StoreReply::ProcessGone { .. }) => self.heard.push(reply),
                StoreReply::Pressure => {}
                reply => return reply,
            }
        }
    }

    pub(super) async fn hear(&mut self, expected: StoreReply) {
        while !self.heard.contains(&expected) {
            let reply = self.reply().await.expect("the agent goes on");
            self.heard.push(reply);
        }
    }

    /// Puts an object that ends with this host.
    pub(super) async fn put(
        &mut self,
        sequence: u64,
        bytes: &[u8],
    ) -> Result<ObjectId, ObjectError> {
        self.write(sequence, bytes, true).await
    }

    /// Writes a result, which somebody else will own.
    pub(super) async fn put_result(&mut self, sequence: u64, bytes: &[u8]) -> ObjectId {
        self.write(sequence, bytes, false).await.unwrap()
    }

    async fn write(
        &mut self,
        sequence: u64,
        bytes: &[u8],
        is_owned_here: bool,
    ) -> Result<ObjectId, ObjectError> {
        self.requests += 1;
        let (request, size_bytes) = (self.requests, bytes.len() as u64);
        self.send(StoreRequest::Grant {
            request,
            size_bytes,
        })
        .await;
        match self.answer().await {
            StoreReply::Granted {
                request: answered,
                arena,
                size_bytes,
            } => {
                assert_eq!(answered, request);
                assert!(size_bytes >= bytes.len() as u64);
                self.arenas[&arena].write_all_at(bytes, 0).unwrap();
                let object = self.id(sequence);
                self.blocks.insert(object, arena);
                self.send(StoreRequest::Publish {
                    object,
                    arena,
                    offset: 0,
                    size_bytes: bytes.len() as u64,
                    is_owned_here,
                })
                .await;
                Ok(object)
            }
            StoreReply::Refused { error, .. } => Err(error),
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn open_at(
        &mut self,
        object: ObjectId,
        agent: &str,
        size_bytes: u64,
    ) -> Result<Opened, ObjectError> {
        self.requests += 1;
        let request = self.requests;
        self.send(StoreRequest::Open {
            request,
            object,
            agent: agent.to_owned(),
            size_bytes,
        })
        .await;
        match self.answer().await {
            StoreReply::Opened {
                arena,
                offset,
                size_bytes,
                ..
            } => {
                let file = &self.arenas[&arena];
                let mut bytes = vec![0; size_bytes as usize];
                file.read_exact_at(&mut bytes, offset).unwrap();
                let inode = file.metadata().unwrap().ino();
                Ok(Opened { inode, bytes })
            }
            StoreReply::Refused { error, .. } => Err(error),
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn open(&mut self, object: ObjectId) -> Result<Opened, ObjectError> {
        let agent = self.agent.clone();
        self.open_at(object, &agent, 0).await
    }

    pub(super) async fn watch(&mut self, process: ProcessId, agent: &str) {
        let agent = agent.to_owned();
        self.send(StoreRequest::Watch { process, agent }).await;
    }

    pub(super) async fn close(&mut self, object: ObjectId) {
        self.send(StoreRequest::Close { object }).await;
    }

    pub(super) async fn free(&mut self, object: ObjectId) {
        let agent = self.agent.clone();
        self.send(StoreRequest::Free { object, agent }).await;
    }
}

pub(super) fn ca() -> ClusterCa {
    ClusterCa::create("test").unwrap()
}

/// Bytes that differ from object to object.
pub(super) fn content(sequence: u64, size_bytes: u64) -> Vec<u8> {
    (0..size_bytes)
        .map(|n| (n.wrapping_mul(31).wrapping_add(sequence * 7) % 251) as u8)
        .collect()
}
