//! Object stores with real sockets, files in memory and QUIC between them; hosts are played by the
//! tests, which read through the descriptors that they are given.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
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

use super::{Keys, ObjectStoreMetrics, Service, ServiceParts};

const MIB: u64 = 1 << 20;

/// Long enough for any machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(30);

struct Node {
    keys: Keys,
    directory: TempDir,
    metrics: watch::Receiver<ObjectStoreMetrics>,
    agent: String,
    service: JoinHandle<()>,
}

impl Node {
    fn start(ca: &ClusterCa, name: &str, memory_bytes: u64, spill_bytes: u64) -> Node {
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
        let (service, metrics) = Service::open(ServiceParts {
            node: name.to_owned(),
            socket: directory.path().join("objects.sock"),
            spill_dir: directory.path().join("spill"),
            memory_bytes,
            spill_bytes: Some(spill_bytes),
            endpoint,
            keys: keys.clone(),
        })
        .unwrap();
        Node {
            keys,
            directory,
            metrics,
            agent,
            service: tokio::spawn(service.run()),
        }
    }

    async fn host(&self, number: u64, job: u64) -> Host {
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

    async fn until(&self, what: &str, is_so: impl Fn(&ObjectStoreMetrics) -> bool) {
        let mut metrics = self.metrics.clone();
        let waiting = metrics.wait_for(is_so);
        if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
            panic!("{what}: {:?}", *self.metrics.borrow());
        }
    }

    fn spilled_files(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.directory.path().join("spill"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.service.abort();
    }
}

/// A host that puts each object into an arena of its own.
struct Host {
    process: ProcessId,
    agent: String,
    sender: DescriptorSender,
    receiver: DescriptorReceiver,
    arenas: BTreeMap<u64, File>,
    blocks: BTreeMap<ObjectId, u64>,
    heard: Vec<StoreReply>,
    requests: u64,
}

struct Opened {
    inode: u64,
    bytes: Vec<u8>,
}

impl Host {
    fn id(&self, sequence: u64) -> ObjectId {
        ObjectId {
            owner: self.process,
            sequence,
        }
    }

    async fn send(&mut self, request: StoreRequest) {
        let message = codec::encode_plain(&request);
        self.sender.send(&message, None).await.unwrap();
    }

    /// The next answer; what it says about memory is acted on, as a host does.
    async fn reply(&mut self) -> Option<StoreReply> {
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

    async fn answer(&mut self) -> StoreReply {
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

    async fn hear(&mut self, expected: StoreReply) {
        while !self.heard.contains(&expected) {
            let reply = self.reply().await.expect("the agent goes on");
            self.heard.push(reply);
        }
    }

    async fn put(&mut self, sequence: u64, bytes: &[u8]) -> Result<ObjectId, ObjectError> {
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
                self.publish(object, arena, bytes.len() as u64).await;
                Ok(object)
            }
            StoreReply::Refused { error, .. } => Err(error),
            other => panic!("{other:?}"),
        }
    }

    async fn publish(&mut self, object: ObjectId, arena: u64, size_bytes: u64) {
        self.send(StoreRequest::Publish {
            object,
            arena,
            offset: 0,
            size_bytes,
            is_owned_here: true,
        })
        .await;
    }

    async fn open_at(
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

    async fn open(&mut self, object: ObjectId) -> Result<Opened, ObjectError> {
        let agent = self.agent.clone();
        self.open_at(object, &agent, 0).await
    }

    async fn close(&mut self, object: ObjectId) {
        self.send(StoreRequest::Close { object }).await;
    }

    async fn free(&mut self, object: ObjectId) {
        let agent = self.agent.clone();
        self.send(StoreRequest::Free { object, agent }).await;
    }
}

fn ca() -> ClusterCa {
    ClusterCa::create("test").unwrap()
}

/// Bytes that differ from object to object.
fn content(sequence: u64, size_bytes: u64) -> Vec<u8> {
    (0..size_bytes)
        .map(|n| (n.wrapping_mul(31).wrapping_add(sequence * 7) % 251) as u8)
        .collect()
}

#[tokio::test]
async fn hosts_of_one_node_read_the_same_memory() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut writer = node.host(1, 3).await;
    let object = writer.put(1, b"in place").await.unwrap();
    let arena = writer.blocks[&object];
    let written_in = writer.arenas[&arena].metadata().unwrap().ino();
    for number in 2..4 {
        let mut reader = node.host(number, 3).await;
        let opened = reader.open(object).await.unwrap();
        assert_eq!(opened.bytes, b"in place");
        assert_eq!(opened.inode, written_in, "one file, no copy");
        let file = reader.arenas.last_key_value().unwrap().1;
        assert!(file.write_at(b"x", 0).is_err(), "readers cannot write");
        let again = reader.open(object).await.unwrap();
        assert_eq!(again.inode, written_in);
    }
    let metrics = *node.metrics.borrow();
    assert_eq!((metrics.objects, metrics.arenas), (1, 1));
}

#[tokio::test]
async fn another_job_gets_nothing() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut writer = node.host(1, 3).await;
    let object = writer.put(1, b"secret").await.unwrap();
    let mut stranger = node.host(2, 4).await;
    let Err(error) = stranger.open(object).await else {
        panic!("it was given away");
    };
    assert_eq!(error, ObjectError::Freed { object });
    stranger.free(object).await;
    let opened = writer.open(object).await.unwrap();
    assert_eq!(opened.bytes, b"secret", "nor can it free it");
}

#[tokio::test]
async fn freed_memory_comes_back_once_nobody_reads_it() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut writer = node.host(1, 3).await;
    let mut reader = node.host(2, 3).await;
    let object = writer.put(1, b"read").await.unwrap();
    reader.open(object).await.unwrap();
    reader.open(object).await.unwrap();
    writer.free(object).await;
    // By an answer on the same socket we know that it has been taken in.
    assert!(writer.open(object).await.is_err());
    reader.close(object).await;
    let Err(error) = reader.open(object).await else {
        panic!("a freed object was opened");
    };
    assert_eq!(error, ObjectError::Freed { object });
    assert_eq!(node.metrics.borrow().objects, 1, "it is still read");
    reader.close(object).await;
    writer.hear(StoreReply::Reclaimed { object }).await;
    node.until("the arena is returned", |metrics| metrics.used_bytes == 0)
        .await;
    reader
        .hear(StoreReply::Forget {
            arena: *reader.arenas.keys().next().unwrap(),
        })
        .await;
    // A reader that is killed lets go too.
    let object = writer.put(2, b"more").await.unwrap();
    reader.open(object).await.unwrap();
    writer.free(object).await;
    drop(reader);
    writer.hear(StoreReply::Reclaimed { object }).await;
    let process = ProcessId(2);
    writer.hear(StoreReply::ProcessGone { process }).await;
}

#[tokio::test]
async fn an_ended_owner_leaves_nothing_and_a_result_outlives_its_writer() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    let mut reader = node.host(1, 3).await;
    let mut writer = node.host(2, 3).await;
    let owned = writer.put(1, b"owned").await.unwrap();
    writer.requests += 1;
    let request = writer.requests;
    writer
        .send(StoreRequest::Grant {
            request,
            size_bytes: 6,
        })
        .await;
    let StoreReply::Granted { arena, .. } = writer.answer().await else {
        panic!("there is memory");
    };
    writer.arenas[&arena].write_all_at(b"result", 0).unwrap();
    let result = writer.id(2);
    writer
        .send(StoreRequest::Publish {
            object: result,
            arena,
            offset: 0,
            size_bytes: 6,
            is_owned_here: false,
        })
        .await;
    assert_eq!(writer.open(result).await.unwrap().bytes, b"result");
    drop(writer);
    let process = ProcessId(2);
    reader.hear(StoreReply::ProcessGone { process }).await;
    let Err(error) = reader.open(owned).await else {
        panic!("its owner has ended");
    };
    assert!(matches!(error, ObjectError::Lost { .. }), "{error}");
    assert_eq!(reader.open(result).await.unwrap().bytes, b"result");
    reader.close(result).await;
    reader.free(result).await;
    node.until("nothing is left", |metrics| metrics.used_bytes == 0)
        .await;
}

#[tokio::test]
async fn an_object_goes_from_node_to_node_once_and_is_checked() {
    let ca = ca();
    let one = Node::start(&ca, "one", 16 * MIB, MIB);
    let two = Node::start(&ca, "two", 16 * MIB, MIB);
    let mut writer = one.host(1, 3).await;
    let size_bytes = 3 * MIB + 77;
    let bytes = content(1, size_bytes);
    let object = writer.put(1, &bytes).await.unwrap();
    let mut readers = Vec::new();
    for number in 2..6 {
        readers.push(two.host(number, 3).await);
    }
    let opens = readers
        .iter_mut()
        .map(|reader| reader.open_at(object, &one.agent, size_bytes));
    let mut inodes = Vec::new();
    for opened in futures::future::join_all(opens).await {
        let opened = opened.unwrap();
        assert!(opened.bytes == bytes);
        inodes.push(opened.inode);
    }
    inodes.dedup();
    assert_eq!(inodes.len(), 1, "one copy on the node");
    let metrics = *two.metrics.borrow();
    assert_eq!(
        (metrics.fetches_total, metrics.fetched_bytes_total),
        (1, size_bytes)
    );
    let unknown = writer.id(99);
    let mut stranger = two.host(9, 4).await;
    for (host, id) in [(&mut readers[0], unknown), (&mut stranger, object)] {
        let Err(error) = host.open_at(id, &one.agent, size_bytes).await else {
            panic!("{id} was opened");
        };
        assert!(
            matches!(error, ObjectError::Lost { .. } | ObjectError::Freed { .. }),
            "{error}"
        );
    }
    // The owner's word goes to the node that has it.
    readers[0]
        .send(StoreRequest::Free {
            object,
            agent: one.agent.clone(),
        })
        .await;
    writer.hear(StoreReply::Reclaimed { object }).await;
    drop(one);
    let gone = readers[1]
        .open_at(writer.id(98), "127.0.0.1:1", size_bytes)
        .await;
    assert!(matches!(gone, Err(ObjectError::Lost { .. })));
}

#[tokio::test]
async fn what_memory_has_no_room_for_goes_to_disk_and_comes_back_checked() {
    let node = Node::start(&ca(), "one", 4 * MIB, 64 * MIB);
    let mut writer = node.host(1, 3).await;
    let mut objects = Vec::new();
    for sequence in 1..=10 {
        let bytes = content(sequence, MIB);
        objects.push(writer.put(sequence, &bytes).await.unwrap());
    }
    let metrics = *node.metrics.borrow();
    assert!(metrics.used_bytes <= 4 * MIB, "{metrics:?}");
    assert!(metrics.spills_total >= 6, "{metrics:?}");
    assert!(
        writer
            .heard
            .contains(&StoreReply::Reclaimed { object: objects[0] }),
        "the least recently used goes first"
    );
    let mut reader = node.host(2, 3).await;
    for (index, object) in objects.iter().enumerate() {
        let opening = reader.open(*object);
        // The writer is a process of its own: it gives memory back meanwhile.
        let opened = tokio::select! {
            opened = opening => opened.unwrap(),
            never = async { loop { let reply = writer.reply().await; writer.heard.extend(reply); } } => never,
        };
        assert!(opened.bytes == content(index as u64 + 1, MIB), "{object}");
        reader.close(*object).await;
    }
    assert!(node.metrics.borrow().restores_total > 0);

    // A byte on the disk turns over.
    node.until("moves are over", |metrics| {
        metrics.waiting_requests == 0 && metrics.spilled_objects > 0
    })
    .await;
    let victim = objects
        .iter()
        .copied()
        .find(|object| {
            let name = object.to_string();
            node.spilled_files()
                .iter()
                .any(|file| file.ends_with(&name) && file.metadata().unwrap().len() == MIB)
        })
        .expect("something is on disk");
    let file = node.directory.path().join("spill").join(victim.to_string());
    let mut flipped = std::fs::read(&file).unwrap();
    flipped[777] ^= 4;
    std::fs::write(&file, flipped).unwrap();
    let opening = reader.open(victim);
    let opened = tokio::select! {
        opened = opening => opened,
        never = async { loop { let reply = writer.reply().await; writer.heard.extend(reply); } } => never,
    };
    let Err(error) = opened else {
        panic!("a damaged object was given out");
    };
    assert!(error.to_string().contains("digest differs"), "{error}");
    assert_eq!(node.metrics.borrow().corrupt_total, 1);
    for object in objects {
        writer.free(object).await;
    }
    node.until("the disk is empty", |metrics| {
        metrics.objects == 0 && metrics.spilled_bytes == 0
    })
    .await;
    assert_eq!(node.spilled_files(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn full_memory_and_a_full_disk_are_told_apart() {
    let node = Node::start(&ca(), "one", 2 * MIB, MIB);
    let mut writer = node.host(1, 3).await;
    let error = writer.put(1, &content(1, 3 * MIB)).await.unwrap_err();
    let expected = ObjectError::StoreFull {
        node: "one".into(),
        needed_bytes: 3 * MIB,
        used_bytes: 0,
        limit_bytes: 2 * MIB,
    };
    assert_eq!(error, expected, "at once: it can never fit");
    assert!(error.to_string().contains("worker.object_store_bytes"));
    let mut reader = node.host(2, 3).await;
    for sequence in 1..=2 {
        let object = writer.put(sequence, &content(sequence, MIB)).await.unwrap();
        reader.open(object).await.unwrap();
    }
    // Both are read, so that neither may go.
    let error = writer.put(3, &content(3, MIB)).await.unwrap_err();
    assert!(matches!(error, ObjectError::StoreFull { .. }), "{error}");
    drop(reader);
    // One may go to disk, and no more.
    writer.put(4, &content(4, MIB)).await.unwrap();
    let error = writer.put(5, &content(5, MIB)).await.unwrap_err();
    assert!(matches!(error, ObjectError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("free space"), "{error}");
}

#[tokio::test]
async fn who_breaks_the_protocol_is_cut_off() {
    let node = Node::start(&ca(), "one", 16 * MIB, MIB);
    for bad in 0..5u64 {
        let mut host = node.host(10 + bad, 3).await;
        let mine = host.put(1, b"x").await.unwrap();
        let arena = host.blocks[&mine];
        let object = host.id(2);
        let publish = |arena, offset, object| StoreRequest::Publish {
            object,
            arena,
            offset,
            size_bytes: 1,
            is_owned_here: true,
        };
        let request = match bad {
            0 => publish(arena, u64::MAX, object),
            1 => publish(arena + 1000, 0, object),
            2 => publish(arena, 0, mine),
            3 => publish(
                arena,
                0,
                ObjectId {
                    owner: ProcessId(999),
                    sequence: 1,
                },
            ),
            _ => StoreRequest::ReturnArena { arena },
        };
        host.send(request).await;
        while let Some(reply) = host.reply().await {
            assert!(
                matches!(reply, StoreReply::ProcessGone { .. }),
                "case {bad}: {reply:?}"
            );
        }
    }
    node.until("nothing is left of them", |metrics| metrics.used_bytes == 0)
        .await;
    let socket = node.directory.path().join("objects.sock");
    let (mut sender, mut receiver) = connect_descriptors(&socket, STORE_MESSAGE_BYTES_MAX)
        .await
        .unwrap();
    let hello = StoreRequest::Hello {
        key: "guessed".into(),
        process: ProcessId(1),
    };
    sender
        .send(&codec::encode_plain(&hello), None)
        .await
        .unwrap();
    assert!(receiver.receive().await.unwrap().is_none());
}
