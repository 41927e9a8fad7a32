//! All objects of one process: those it owns, those it borrows.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use mobula_core::codec;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::NodeId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_wire::object::{
    Changes, Format, INLINE_BYTES_MAX, METHOD_CHANGE, METHOD_NEXT, Next, Reference, WireValue,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::cell::{Cell, Outcome, Value};
use super::handle::{Object, Side, capture_contained, held};
use super::link::Link;
use super::owner::{Aftermath, Entry, OwnerTable};
use super::payload::Payload;
use super::store::StoreClient;
use crate::client::CallClient;
use crate::mailbox::IncomingCall;

/// How long a question of a holder waits for something to happen.
pub const NEXT_WAIT: Duration = Duration::from_secs(10);

/// How long a holder may be silent before what it holds is released. It asks at least every
/// [`NEXT_WAIT`], so this is many lost questions in a row.
pub const HOLDER_LEASE: Duration = Duration::from_secs(60);

/// How long a sent reference keeps its object although nobody has taken it in.
pub const TRANSIT_MAX: Duration = Duration::from_secs(600);

/// How often a value is looked for again when its bytes turn out to be lost; each time its owner
/// has said that they are somewhere.
const READ_ATTEMPTS_MAX: usize = 5;

/// How often old questions, holders and holds are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Creates the value of an object anew when its bytes are lost.
pub trait Lineage: Send + Sync {
    /// Starts to produce the value again, for `completer`, because of `reason`. Dropping the
    /// completer says that it cannot be done.
    fn recreate(&self, completer: Completer, reason: &str);
}

/// A finished value on its way from whoever produced it to the object's owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectValue {
    value: WireValue,
    /// References inside the value, each held for the owner.
    contains: Vec<Reference>,
}

impl ObjectValue {
    fn inline(payload: &Payload, contains: &[Object]) -> Self {
        ObjectValue {
            value: WireValue::Inline {
                format: payload.format,
                bytes: payload.bytes.to_vec(),
            },
            contains: contains.iter().map(Object::export).collect(),
        }
    }
}

/// Why a value is not put.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// It cannot be encoded.
    #[error(transparent)]
    Encode(#[from] codec::EncodeError),
    /// There is no room for it.
    #[error(transparent)]
    Store(#[from] ObjectError),
}

/// The objects of a process.
pub struct ObjectTable {
    process: ProcessId,
    call_address: String,
    calls: CallClient,
    runtime: tokio::runtime::Handle,
    next_sequence: AtomicU64,
    next_transit: AtomicU64,
    /// The node's shared memory, once the process is connected to it.
    store: OnceLock<Arc<StoreClient>>,
    owned: OwnerTable,
    links: Mutex<HashMap<ProcessId, Arc<Link>>>,
    /// Everything that runs for the table; ends with it.
    tasks: Mutex<JoinSet<()>>,
}

impl ObjectValue {
    /// Whether its bytes are in a node's memory, and so can be lost with it.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        matches!(self.value, WireValue::Stored(_))
    }
}

impl ObjectTable {
    /// The objects of a process that takes calls at `call_address`. Must be called inside a tokio
    /// runtime.
    #[must_use]
    pub fn start(call_address: String, calls: CallClient) -> Arc<Self> {
        let table = Arc::new(ObjectTable {
            process: ProcessId(RandomState::new().hash_one(std::process::id())),
            call_address,
            calls,
            runtime: tokio::runtime::Handle::current(),
            next_sequence: AtomicU64::new(1),
            next_transit: AtomicU64::new(RandomState::new().hash_one("transit") | 1),
            store: OnceLock::new(),
            owned: OwnerTable::default(),
            links: Mutex::default(),
            tasks: Mutex::new(JoinSet::new()),
        });
        let sweeping = sweep(Arc::downgrade(&table));
        table.tasks.lock().spawn(sweeping);
        table
    }

    /// This process.
    #[must_use]
    pub fn process(&self) -> ProcessId {
        self.process
    }

    pub(crate) fn call_address(&self) -> &str {
        &self.call_address
    }

    /// Connects to the node's object store: from then on large values go there.
    pub async fn connect_store(
        self: &Arc<Self>,
        socket: &Path,
        key: &str,
        node: NodeId,
    ) -> io::Result<()> {
        let (store, link) =
            StoreClient::connect(socket, key.to_owned(), self.process, node).await?;
        if self.store.set(Arc::clone(&store)).is_ok() {
            let table = Arc::downgrade(self);
            self.spawn(link.run(store, move |process| {
                if let Some(table) = table.upgrade() {
                    table.process_gone(process);
                }
            }));
        }
        Ok(())
    }

    /// Puts a value: small ones into this process's memory, large ones into the node's.
    pub async fn put_value<T: Serialize + ?Sized>(
        self: &Arc<Self>,
        value: &T,
    ) -> Result<Object, PutError> {
        let (payload, contains) = capture_contained(|| Payload::encoded(value));
        let payload = payload?;
        let object = match self.store_for(payload.bytes.len()) {
            None => self.create_entry(Cell::settled(Ok(Value::Inline(payload)))),
            Some(store) => self.write(store, payload.format, &payload.bytes).await?,
        };
        let (object, entry) = object;
        if !contains.is_empty() {
            *entry.contains.lock() = contains;
        }
        Ok(object)
    }

    /// Puts bytes that are to be read as `format`; they are copied once.
    pub async fn put_slice(
        self: &Arc<Self>,
        format: Format,
        bytes: &[u8],
    ) -> Result<Object, ObjectError> {
        match self.store_for(bytes.len()) {
            None => Ok(self.put_bytes(format, Bytes::copy_from_slice(bytes))),
            Some(store) => Ok(self.write(store, format, bytes).await?.0),
        }
    }

    /// Whether a value of this size goes into shared memory, and into which.
    fn store_for(&self, size_bytes: usize) -> Option<&Arc<StoreClient>> {
        self.store.get().filter(|_| size_bytes > INLINE_BYTES_MAX)
    }

    async fn write(
        self: &Arc<Self>,
        store: &StoreClient,
        format: Format,
        bytes: &[u8],
    ) -> Result<(Object, Arc<Entry>), ObjectError> {
        // Under the object's handle: when this is given up, dropping it frees what is written.
        let (object, entry) = self.create_entry(Cell::default());
        let stored = store.write(object.id(), format, bytes, true).await?;
        entry.cell.settle(Ok(Value::Stored(stored)));
        Ok((object, entry))
    }

    /// The bytes of a settled value: in place, where they are in shared memory. They may be
    /// [missing](ObjectTable::report_missing) there.
    pub async fn open(&self, value: &Value) -> Result<Payload, ObjectError> {
        match value {
            Value::Inline(payload) => Ok(payload.clone()),
            Value::Stored(stored) => {
                let store = self.store.get().ok_or_else(|| ObjectError::Unavailable {
                    reason: "this process has no access to a node's shared memory".to_owned(),
                })?;
                Ok(Payload {
                    format: stored.format,
                    bytes: store.open(stored).await?,
                })
            }
        }
    }

    /// Waits for an object and opens its value. Where the bytes are gone its owner is told, and
    /// the value that it then produces, if it can, is waited for.
    pub async fn read(self: &Arc<Self>, object: &Object) -> Result<Payload, ObjectError> {
        for _ in 0..READ_ATTEMPTS_MAX {
            let outcome = match object.outcome() {
                Some(outcome) => outcome,
                None => object.wait().await,
            };
            let value = outcome.clone()?;
            match self.open(&value).await {
                Err(ObjectError::Lost { reason, .. }) => {
                    self.report_missing(object, &outcome, &reason);
                }
                opened => return opened,
            }
        }
        Err(ObjectError::Lost {
            object: object.id(),
            reason: format!("it was lost {READ_ATTEMPTS_MAX} times while it was read"),
        })
    }

    /// Puts an encoded value into this process's memory, whatever its size.
    pub fn put<T: Serialize + ?Sized>(
        self: &Arc<Self>,
        value: &T,
    ) -> Result<Object, codec::EncodeError> {
        let (payload, contains) = capture_contained(|| Payload::encoded(value));
        let (object, entry) = self.create_entry(Cell::settled(Ok(Value::Inline(payload?))));
        if !contains.is_empty() {
            *entry.contains.lock() = contains;
        }
        Ok(object)
    }

    /// Puts bytes that are to be read as `format`.
    pub fn put_bytes(self: &Arc<Self>, format: Format, bytes: Bytes) -> Object {
        self.create(Cell::settled(Ok(Value::Inline(Payload { format, bytes }))))
    }

    /// An object whose value will come later, or never.
    pub fn create_pending(self: &Arc<Self>) -> (Object, Completer) {
        let (object, entry) = self.create_entry(Cell::default());
        let completer = self.completer(object.id(), &entry);
        (object, completer)
    }

    /// As [`create_pending`](ObjectTable::create_pending), with a way to produce the value again
    /// should its bytes be lost.
    pub fn create_pending_with(self: &Arc<Self>, lineage: Arc<dyn Lineage>) -> (Object, Completer) {
        let (object, completer) = self.create_pending();
        *completer.entry.lineage.lock() = Some(lineage);
        (object, completer)
    }

    /// Prepares a small value that another process will own, which travels in the answer.
    pub fn encode_result<T: Serialize + ?Sized>(
        self: &Arc<Self>,
        value: &T,
    ) -> Result<ObjectValue, codec::EncodeError> {
        let (payload, contains) = capture_contained(|| Payload::encoded(value));
        Ok(ObjectValue::inline(&payload?, &contains))
    }

    /// Prepares a value that another process will own, a task's result: a large one goes into this
    /// node's shared memory, where it outlives this process.
    pub async fn store_result<T: Serialize + ?Sized>(
        self: &Arc<Self>,
        value: &T,
    ) -> Result<ObjectValue, PutError> {
        let (payload, contains) = capture_contained(|| Payload::encoded(value));
        let payload = payload?;
        let Some(store) = self.store_for(payload.bytes.len()) else {
            return Ok(ObjectValue::inline(&payload, &contains));
        };
        let id = self.next_id();
        let stored = store
            .write(id, payload.format, &payload.bytes, false)
            .await?;
        Ok(ObjectValue {
            value: WireValue::Stored(stored),
            contains: contains.iter().map(Object::export).collect(),
        })
    }

    /// Takes in a reference that was sent to this process.
    #[must_use]
    pub fn import(self: &Arc<Self>, reference: &Reference) -> Object {
        let Reference {
            object: id,
            owner,
            transit,
        } = reference;
        if id.owner == self.process {
            return self.import_own(*id, *transit);
        }
        let mut links = self.links.lock();
        if let Some(link) = links.get(&id.owner)
            && let Some(cell) = link.borrow(id.sequence, *transit, held())
        {
            let link = Arc::clone(link);
            drop(links);
            return self.borrowed(*id, link, cell);
        }
        let link = Link::new(id.owner, owner.clone());
        let cell = link
            .borrow(id.sequence, *transit, held())
            .expect("a new link has not ended");
        links.insert(id.owner, Arc::clone(&link));
        drop(links);
        let running = run_link(Arc::downgrade(self), Arc::clone(&link));
        self.spawn(running);
        self.borrowed(*id, link, cell)
    }

    fn borrowed(self: &Arc<Self>, id: ObjectId, link: Arc<Link>, cell: Arc<Cell>) -> Object {
        Object::new(id, Arc::clone(self), Side::Borrowed { link, cell })
    }

    fn import_own(self: &Arc<Self>, id: ObjectId, transit: u64) -> Object {
        let entry = self.owned.receive(id.sequence, transit).unwrap_or_else(|| {
            Arc::new(Entry {
                sequence: id.sequence,
                cell: Cell::settled(Err(ObjectError::Freed { object: id })),
                handles: 1.into(),
                ..Entry::default()
            })
        });
        Object::new(id, Arc::clone(self), Side::Owned(entry))
    }

    /// Answers a call of [`OBJECTS_ACTOR`](mobula_wire::object::OBJECTS_ACTOR).
    pub fn serve(self: &Arc<Self>, call: IncomingCall) {
        let IncomingCall {
            method,
            arguments,
            reply,
            ..
        } = call;
        let bad = |reason: String| CallError::BadCall(format!("objects, `{method}`: {reason}"));
        let aftermath = match &*method {
            METHOD_CHANGE => match codec::decode::<Changes>(&arguments, arguments.len()) {
                Ok(changes) if changes.owner == self.process => {
                    let aftermath =
                        self.owned
                            .change(self.process, changes.holder, &changes.changes);
                    reply.send(Ok(Bytes::new()));
                    aftermath
                }
                Ok(changes) => return reply.send(Err(replaced(changes.owner))),
                Err(error) => return reply.send(Err(bad(error.to_string()))),
            },
            METHOD_NEXT => match codec::decode::<Next>(&arguments, arguments.len()) {
                Ok(next) if next.owner == self.process => {
                    self.owned.next(self.process, &next, reply)
                }
                Ok(next) => return reply.send(Err(replaced(next.owner))),
                Err(error) => return reply.send(Err(bad(error.to_string()))),
            },
            _ => return reply.send(Err(bad("there is no such method".to_owned()))),
        };
        self.finish(aftermath);
    }

    /// A process is known to be gone: what it held is released, what it owned is lost.
    pub fn process_gone(self: &Arc<Self>, process: ProcessId) {
        let link = self.links.lock().remove(&process);
        if let Some(link) = link {
            link.end("its owner has ended");
        }
        self.finish(self.owned.holder_gone(process));
    }

    /// How many of its objects others may refer to, and how many processes do.
    #[must_use]
    pub fn sent_counts(&self) -> (usize, usize) {
        self.owned.counts()
    }

    pub(crate) fn export(&self, entry: &Arc<Entry>, is_held: bool) -> u64 {
        let transit = if is_held { self.next_transit() } else { 0 };
        self.owned.send(entry, transit);
        transit
    }

    pub(crate) fn next_transit(&self) -> u64 {
        // An odd number plus an even one is never 0.
        self.next_transit.fetch_add(2, Ordering::Relaxed)
    }

    pub(crate) fn dropped(self: &Arc<Self>, entry: &Arc<Entry>) {
        if entry.is_sent.load(Ordering::Acquire) {
            self.finish(self.owned.dropped(entry));
        } else if entry.handles.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.free_bytes(entry);
        }
    }

    /// Nobody refers to an object any more: what it takes in shared memory is free.
    fn free_bytes(&self, entry: &Entry) {
        if let (Some(store), Some(Ok(Value::Stored(stored)))) =
            (self.store.get(), entry.cell.outcome())
        {
            store.free(&stored);
        }
    }

    fn create(self: &Arc<Self>, cell: Cell) -> Object {
        self.create_entry(cell).0
    }

    fn next_id(&self) -> ObjectId {
        ObjectId {
            owner: self.process,
            sequence: self.next_sequence.fetch_add(1, Ordering::Relaxed),
        }
    }

    fn create_entry(self: &Arc<Self>, cell: Cell) -> (Object, Arc<Entry>) {
        let id = self.next_id();
        let entry = Entry {
            sequence: id.sequence,
            cell,
            handles: 1.into(),
            ..Entry::default()
        };
        let entry = Arc::new(entry);
        let object = Object::new(id, Arc::clone(self), Side::Owned(Arc::clone(&entry)));
        (object, entry)
    }

    fn completer(self: &Arc<Self>, id: ObjectId, entry: &Arc<Entry>) -> Completer {
        Completer {
            id,
            table: Arc::clone(self),
            entry: Arc::clone(entry),
            is_done: false,
        }
    }

    fn is_wanted(&self, entry: &Entry) -> bool {
        match entry.is_sent.load(Ordering::Acquire) {
            true => self.owned.contains(entry.sequence),
            false => entry.handles.load(Ordering::Acquire) > 0,
        }
    }

    fn settle(self: &Arc<Self>, id: ObjectId, entry: &Entry, outcome: Outcome) {
        if !entry.cell.settle(outcome) {
            return;
        }
        if entry.is_sent.load(Ordering::Acquire) {
            self.finish(self.owned.settled(id));
        }
        if !self.is_wanted(entry) {
            self.free_bytes(entry);
        }
    }

    /// The bytes of `object` are not where `seen` says: its owner produces them again, or settles
    /// it as lost. Wait for it once more.
    pub fn report_missing(self: &Arc<Self>, object: &Object, seen: &Outcome, reason: &str) {
        match object.side() {
            Side::Owned(entry) => self.recreate(entry, seen, reason),
            Side::Borrowed { link, .. } => link.missing(object.id().sequence, seen),
        }
    }

    fn recreate(self: &Arc<Self>, entry: &Arc<Entry>, seen: &Outcome, reason: &str) {
        let id = ObjectId {
            owner: self.process,
            sequence: entry.sequence,
        };
        let lineage = entry.lineage.lock().clone();
        match lineage {
            Some(lineage) => {
                if entry.cell.reset(seen) {
                    lineage.recreate(self.completer(id, entry), reason);
                }
            }
            None => {
                let lost = ObjectError::Lost {
                    object: id,
                    reason: reason.to_owned(),
                };
                entry.cell.replace(Err(lost));
                self.finish(self.owned.settled(id));
            }
        }
    }

    fn finish(self: &Arc<Self>, mut aftermath: Aftermath) {
        aftermath.send_answers();
        for entry in aftermath.missing.drain(..) {
            if let Some(seen) = entry.cell.outcome() {
                self.recreate(
                    &entry,
                    &seen,
                    "its bytes are gone from the node that held them",
                );
            }
        }
        for entry in &aftermath.freed {
            self.free_bytes(entry);
        }
        // Dropped here, without any lock: a freed value may contain handles of other objects.
        drop(aftermath);
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &self.runtime);
    }

    /// Ends everything that runs for the table.
    pub fn close(&self) {
        self.tasks.lock().abort_all();
        let links = std::mem::take(&mut *self.links.lock());
        for link in links.into_values() {
            link.end("this process ends");
        }
    }
}

impl std::fmt::Debug for ObjectTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ObjectTable")
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}

fn replaced(owner: ProcessId) -> CallError {
    CallError::ActorDied {
        actor: owner.to_string(),
        reason: "another process takes calls at its address".to_owned(),
        executed: Executed::No,
    }
}

async fn sweep(table: Weak<ObjectTable>) {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(table) = table.upgrade() else {
            return;
        };
        table.finish(table.owned.sweep(Instant::now()));
    }
}

async fn run_link(table: Weak<ObjectTable>, link: Arc<Link>) {
    loop {
        let Some((own, calls)) = table
            .upgrade()
            .map(|table| (table.process, table.calls.clone()))
        else {
            return;
        };
        let reason = link.run(own, &calls).await;
        let Some(table) = table.upgrade() else {
            return;
        };
        let mut links = table.links.lock();
        let is_ended = match &reason {
            Some(_) => true,
            None => link.end_if_idle(),
        };
        if is_ended {
            links.retain(|_, other| !Arc::ptr_eq(other, &link));
            drop(links);
            if let Some(reason) = reason {
                link.end(&reason);
            }
            return;
        }
    }
}

/// The duty to bring one pending object to a value or an error. Dropped unfulfilled, the object
/// is lost.
#[must_use = "dropping it loses the object"]
pub struct Completer {
    id: ObjectId,
    table: Arc<ObjectTable>,
    entry: Arc<Entry>,
    is_done: bool,
}

impl Completer {
    /// Which object.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Whether anybody still refers to the object, here or elsewhere, or may soon.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.table.is_wanted(&self.entry)
    }

    /// The object has this value.
    pub fn complete(mut self, value: ObjectValue) {
        self.is_done = true;
        let ObjectValue { value, contains } = value;
        let contains: Vec<Object> = contains
            .iter()
            .map(|reference| self.table.import(reference))
            .collect();
        *self.entry.contains.lock() = contains;
        let value = match value {
            WireValue::Inline { format, bytes } => Value::Inline(Payload {
                format,
                bytes: bytes.into(),
            }),
            WireValue::Stored(stored) => Value::Stored(stored),
        };
        self.table.settle(self.id, &self.entry, Ok(value));
    }

    /// The object has this encoded value, in which there are no references.
    pub fn complete_encoded(mut self, bytes: Bytes) {
        self.is_done = true;
        let format = Format::Encoded;
        let value = Value::Inline(Payload { format, bytes });
        self.table.settle(self.id, &self.entry, Ok(value));
    }

    /// The object has this value; should its bytes be lost, `lineage` produces it again.
    pub fn complete_recreatable(self, value: ObjectValue, lineage: Arc<dyn Lineage>) {
        *self.entry.lineage.lock() = Some(lineage);
        self.complete(value);
    }

    /// The object will never have a value.
    pub fn fail(mut self, error: ObjectError) {
        self.is_done = true;
        self.table.settle(self.id, &self.entry, Err(error));
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        if !self.is_done {
            let error = ObjectError::Lost {
                object: self.id,
                reason: "whoever was to produce it gave up".to_owned(),
            };
            self.table.settle(self.id, &self.entry, Err(error));
        }
    }
}

impl std::fmt::Debug for Completer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Completer")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
