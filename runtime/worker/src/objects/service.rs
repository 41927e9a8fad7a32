//! The task that owns the object store's table, and performs what it decides.
//!
//! Invariants:
//! 1. Disk and network are never waited for here: they have tasks of their own, which report back.
//! 2. At most [`DISK_TASKS_MAX`] and [`FETCHES_MAX`] of those run at a time.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mobula_core::id::JobId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_core::span::Span;
use mobula_net::descriptor::DescriptorListener;
use mobula_net::endpoint::Endpoint;
use mobula_wire::store::{STORE_MESSAGE_BYTES_MAX, StoreRequest};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::link::{self, Keys, Linked};
use super::memory::Block;
use super::metrics::ObjectStoreMetrics;
use super::spill::{OnDisk, SpillFile};
use super::table::{Action, Limits, Opener, PEERS, Table};
use super::transfer::Transfers;
use super::watch::Watchers;
use crate::spans::{Spans, now_us};

/// Inputs that wait; who sends more waits, each takes the service microseconds.
const INPUTS: usize = 4096;

/// Files that are written or read at a time: what keeps a disk busy.
const DISK_TASKS_MAX: usize = 4;

/// Objects that are fetched at a time: what keeps a network busy.
const FETCHES_MAX: usize = 8;

/// While something waits for memory or for an object, and otherwise.
const TICK: Duration = Duration::from_millis(20);
const IDLE_TICK: Duration = Duration::from_secs(5);

/// Something for the service to take in.
#[derive(Debug)]
pub(crate) enum Input {
    /// A host's process said hello.
    Linked(Linked),
    /// It asks for something.
    Request(u64, StoreRequest),
    /// It is gone.
    Unlinked(u64),
    /// Another agent asks for an object.
    PeerOpen(ObjectId, JobId, oneshot::Sender<Result<Block, ObjectError>>),
    /// It has it.
    PeerClose(ObjectId),
    /// Another agent's host says that an object of this node is not needed any more.
    PeerFree(ObjectId, JobId),
    /// An object is on disk.
    Spilled(ObjectId, Result<OnDisk, String>),
    /// An object has come.
    Loaded(ObjectId, Result<(), ObjectError>),
    /// A job is over everywhere.
    JobEnded(JobId),
    /// Another agent wants to know when a process of this node ends.
    PeerWatch(ProcessId, JobId, mpsc::Sender<(ProcessId, JobId)>),
    /// A process of another node has ended.
    ProcessGone(ProcessId, JobId),
}

/// The way to a node's object store for the rest of the agent.
#[derive(Debug, Clone)]
pub(crate) struct ObjectStore(mpsc::Sender<Input>);

impl ObjectStore {
    /// A job is over on all nodes: its objects go as soon as nobody reads them.
    pub(crate) fn job_ended(&self, job: JobId) {
        // The agent waits for nobody: what is not said now the store finds out by the job's silence.
        if self.0.try_send(Input::JobEnded(job)).is_err() {
            tracing::debug!(%job, "the object store is too busy to hear of a job's end");
        }
    }
}

/// What the service is made of.
pub(crate) struct ServiceParts {
    pub(crate) node: String,
    pub(crate) socket: PathBuf,
    pub(crate) spill_dir: PathBuf,
    /// Memory for objects, in bytes.
    pub(crate) memory_bytes: u64,
    /// Disk for objects, in bytes; absent: half of what is free at the start.
    pub(crate) spill_bytes: Option<u64>,
    pub(crate) endpoint: Endpoint,
    pub(crate) keys: Keys,
    /// Where fetches are recorded.
    pub(crate) spans: Spans,
}

/// The object store of a node.
pub(crate) struct Service {
    inputs: mpsc::Receiver<Input>,
    to_self: mpsc::Sender<Input>,
    table: Table,
    spill: SpillFile,
    transfers: Transfers,
    watchers: Watchers,
    disk: Arc<Semaphore>,
    fetches: Arc<Semaphore>,
    metrics: watch::Sender<ObjectStoreMetrics>,
    spans: Spans,
    tasks: JoinSet<()>,
}

impl Service {
    /// Opens the socket and the directory; serves once it is run.
    pub(crate) fn open(
        parts: ServiceParts,
    ) -> io::Result<(Service, ObjectStore, watch::Receiver<ObjectStoreMetrics>)> {
        let listener = DescriptorListener::bind(&parts.socket, STORE_MESSAGE_BYTES_MAX)?;
        let spill = SpillFile::open(&parts.spill_dir)?;
        let (to_self, inputs) = mpsc::channel(INPUTS);
        let agent: SocketAddr = parts.endpoint.local_address();
        let limits = Limits {
            node: parts.node,
            agent: agent.to_string(),
            memory_bytes: parts.memory_bytes,
            arena_bytes: arena_bytes(parts.memory_bytes),
            spill_bytes: parts.spill_bytes.unwrap_or_else(|| spill.free_bytes() / 2),
        };
        let table = Table::new(limits);
        let (metrics, receiver) = watch::channel(table.metrics());
        let mut tasks = JoinSet::new();
        tasks.spawn(link::serve(listener, parts.keys, to_self.clone()));
        let transfers = Transfers::new(parts.endpoint);
        tasks.spawn(transfers.clone().serve(to_self.clone()));
        let watchers = Watchers::new(transfers.clone(), to_self.clone());
        let service = Service {
            watchers,
            inputs,
            to_self,
            table,
            spill,
            transfers,
            disk: Arc::new(Semaphore::new(DISK_TASKS_MAX)),
            fetches: Arc::new(Semaphore::new(FETCHES_MAX)),
            metrics,
            spans: parts.spans,
            tasks,
        };
        let store = ObjectStore(service.to_self.clone());
        Ok((service, store, receiver))
    }

    /// Works until it is dropped.
    pub(crate) async fn run(mut self) {
        loop {
            let tick = match self.table.is_waited_for() {
                true => TICK,
                false => IDLE_TICK,
            };
            tokio::select! {
                Some(input) = self.inputs.recv() => {
                    self.handle(input);
                    // What came together is looked at together.
                    while let Ok(input) = self.inputs.try_recv() {
                        self.handle(input);
                    }
                }
                Some(_) = self.tasks.join_next() => {}
                () = tokio::time::sleep(tick) => self.table.sweep(Instant::now()),
            }
            self.table.pump(Instant::now());
            self.perform();
            self.metrics.send_replace(self.table.metrics());
        }
    }

    fn handle(&mut self, input: Input) {
        let now = Instant::now();
        match input {
            Input::Linked(linked) => self.table.linked(linked, now),
            Input::Request(link, request) => {
                if !self.table.request(link, request, now) {
                    tracing::error!(link, "a host broke the object store's protocol; cut off");
                    self.table.unlinked(link);
                }
            }
            Input::Unlinked(link) => self.table.unlinked(link),
            Input::PeerOpen(object, job, answer) => {
                self.table
                    .open(Opener::Peer(answer), object, job, 0, "", now);
            }
            Input::PeerClose(object) => self.table.close(PEERS, object),
            Input::PeerFree(object, job) => self.table.free(object, job),
            Input::Spilled(object, result) => self.table.spilled(object, result, now),
            Input::Loaded(object, result) => self.table.loaded(object, result),
            Input::JobEnded(job) => self.table.job_ended(job),
            Input::PeerWatch(process, job, gone) => self.table.peer_watch(process, job, gone),
            Input::ProcessGone(process, job) => self.table.process_gone(process, job),
        }
    }

    fn perform(&mut self) {
        for action in self.table.take_actions() {
            match action {
                Action::Spill(object, block) => {
                    let spill = self.spill.clone();
                    self.on_disk(
                        move || spill.write(&block).map_err(|e| e.to_string()),
                        move |written| Input::Spilled(object, written),
                    );
                }
                Action::Restore(object, block, on_disk) => {
                    let spill = self.spill.clone();
                    let lost = move |error: String| ObjectError::Lost {
                        object,
                        reason: error,
                    };
                    self.on_disk(
                        move || {
                            spill
                                .read(on_disk, &block)
                                .map_err(|error| error.to_string())
                        },
                        move |read| Input::Loaded(object, read.map_err(lost)),
                    );
                }
                Action::Remove(on_disk) => {
                    let spill = self.spill.clone();
                    self.tasks.spawn(async move {
                        // It fails with the runtime, and then the file goes as a whole.
                        let _ = tokio::task::spawn_blocking(move || spill.remove(on_disk)).await;
                    });
                }
                Action::Fetch(object, job, block, agent) => {
                    let (transfers, to_self) = (self.transfers.clone(), self.to_self.clone());
                    let fetches = Arc::clone(&self.fetches);
                    let spans = self.spans.clone();
                    self.tasks.spawn(async move {
                        let _permit = fetches.acquire().await;
                        let start_us = now_us();
                        let fetched = transfers.fetch(object, job, &block, &agent).await;
                        let end = if fetched.is_ok() { "done" } else { "failed" };
                        let span =
                            Span::new("fetch an object", "transfer", job, start_us, now_us())
                                .with("object", object.to_string())
                                .with("bytes", block.size_bytes.to_string())
                                .with("from", agent)
                                .with("end", end);
                        spans.push(span);
                        let _ = to_self.send(Input::Loaded(object, fetched)).await;
                    });
                }
                Action::Watch(agent, process, job) => self.watchers.watch(agent, process, job),
                Action::Unwatch(agent, process, job) => self.watchers.unwatch(&agent, process, job),
                Action::FreeAt(agent, object, job) => {
                    let transfers = self.transfers.clone();
                    self.tasks
                        .spawn(async move { transfers.free(object, job, &agent).await });
                }
            }
        }
    }

    fn on_disk<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> T + Send + 'static,
        input: impl FnOnce(T) -> Input + Send + 'static,
    ) {
        let (to_self, disk) = (self.to_self.clone(), Arc::clone(&self.disk));
        self.tasks.spawn(async move {
            let _permit = disk.acquire().await;
            if let Ok(done) = tokio::task::spawn_blocking(work).await {
                // Nobody is left to tell when the agent is ending.
                let _ = to_self.send(input(done)).await;
            }
        });
    }
}

/// A sixteenth of the memory, so that many processes get some, within what is worth a round trip
/// and what is mapped in a few milliseconds.
fn arena_bytes(memory_bytes: u64) -> u64 {
    (memory_bytes / 16).clamp(1 << 20, 64 << 20) / 4096 * 4096
}
