//! All objects of one process: those it owns, those it borrows, and what other processes ask about
//! them. Where their values are is a matter of `values`.
//!
//! Invariants:
//! 1. Whatever is freed is dropped without any lock: a value may contain handles of other objects.
//! 2. Everything that runs for the table ends with it.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use mobula_core::codec;
use mobula_core::error::{CallError, Executed};
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_wire::object::{Changes, METHOD_CHANGE, METHOD_NEXT, Next, Reference};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::brought;
use super::cell::{Cell, Outcome};
use super::completer::{Completer, Lineage};
use super::handle::{Object, Side, held};
use super::link::{Ending, Link};
use super::owner::{Aftermath, Entry, OwnerTable};
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

/// How often old questions, holders and holds are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The objects of a process.
pub struct ObjectTable {
    process: ProcessId,
    call_address: String,
    calls: CallClient,
    runtime: tokio::runtime::Handle,
    next_sequence: AtomicU64,
    next_transit: AtomicU64,
    /// The node's shared memory, once the process is connected to it.
    pub(crate) store: OnceLock<Arc<StoreClient>>,
    owned: OwnerTable,
    links: Mutex<HashMap<ProcessId, Arc<Link>>>,
    /// Everything that runs for the table; ends with it.
    tasks: Mutex<JoinSet<()>>,
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

    /// An object whose value will come later, or never.
    pub fn create_pending(self: &Arc<Self>) -> (Object, Completer) {
        let (object, entry) = self.create_entry(Cell::default());
        let completer = Completer::new(self, object.id(), &entry);
        (object, completer)
    }

    /// As [`create_pending`](ObjectTable::create_pending), with a way to produce the value again
    /// should its bytes be lost.
    pub fn create_pending_with(self: &Arc<Self>, lineage: Arc<dyn Lineage>) -> (Object, Completer) {
        let (object, completer) = self.create_pending();
        completer.set_lineage(lineage);
        (object, completer)
    }

    /// Takes in a reference that was sent to this process.
    #[must_use]
    pub fn import(self: &Arc<Self>, reference: &Reference) -> Object {
        let Reference {
            object: id,
            owner,
            transit,
            agent,
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
        let link = Link::new(id.owner, owner.clone(), agent.clone());
        let cell = link
            .borrow(id.sequence, *transit, held())
            .expect("a new link has not ended");
        links.insert(id.owner, Arc::clone(&link));
        if let Some(store) = self.store.get().filter(|_| !agent.is_empty()) {
            store.watch(id.owner, agent);
        }
        drop(links);
        let running = run_link(Arc::downgrade(self), Arc::clone(&link));
        self.spawn(running);
        self.borrowed(*id, link, cell)
    }

    fn borrowed(self: &Arc<Self>, id: ObjectId, link: Arc<Link>, cell: Arc<Cell>) -> Object {
        if let Some(value) = brought::value_of(id) {
            cell.settle(Ok(value));
        }
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
        let link = self.links.lock().get(&process).map(Arc::clone);
        if let Some(link) = link
            && link.said_gone()
        {
            let mut links = self.links.lock();
            // Another one may have taken its place meanwhile.
            if links
                .get(&process)
                .is_some_and(|now| Arc::ptr_eq(now, &link))
            {
                links.remove(&process);
            }
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

    pub(crate) fn create(self: &Arc<Self>, cell: Cell) -> Object {
        self.create_entry(cell).0
    }

    pub(crate) fn next_id(&self) -> ObjectId {
        ObjectId {
            owner: self.process,
            sequence: self.next_sequence.fetch_add(1, Ordering::Relaxed),
        }
    }

    pub(crate) fn create_entry(self: &Arc<Self>, cell: Cell) -> (Object, Arc<Entry>) {
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

    pub(crate) fn is_wanted(&self, entry: &Entry) -> bool {
        match entry.is_sent.load(Ordering::Acquire) {
            true => self.owned.contains(entry.sequence),
            false => entry.handles.load(Ordering::Acquire) > 0,
        }
    }

    pub(crate) fn settle(self: &Arc<Self>, id: ObjectId, entry: &Entry, outcome: Outcome) {
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
            Side::Borrowed { link, cell } => link.missing(object.id().sequence, cell, seen),
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
                    lineage.recreate(Completer::new(self, id, entry), reason);
                }
            }
            None => {
                let lost = ObjectError::Lost {
                    object: id,
                    reason: reason.to_owned(),
                };
                if entry.cell.replace(seen, Err(lost)) {
                    self.finish(self.owned.settled(id));
                }
            }
        }
    }

    fn finish(self: &Arc<Self>, mut aftermath: Aftermath) {
        aftermath.send_answers();
        for (entry, seen) in aftermath.missing.drain(..) {
            self.recreate(
                &entry,
                &seen,
                "its bytes are gone from the node that held them",
            );
        }
        for entry in &aftermath.freed {
            self.free_bytes(entry);
        }
        // Dropped here, without any lock: a freed value may contain handles of other objects.
        drop(aftermath);
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &self.runtime);
    }

    /// Ends everything that runs for the table.
    pub fn close(&self) {
        self.tasks.lock().abort_all();
        let links = std::mem::take(&mut *self.links.lock());
        for link in links.into_values() {
            link.end(&Ending::Lost("this process ends".to_owned()));
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
        let ending = link.run(own, &calls).await;
        let Some(table) = table.upgrade() else {
            return;
        };
        let mut links = table.links.lock();
        let is_ended = match &ending {
            Some(_) => true,
            None => link.end_if_idle(),
        };
        if is_ended {
            let current = links.get(&link.owner());
            if current.is_some_and(|current| Arc::ptr_eq(current, &link)) {
                links.remove(&link.owner());
                // Under the lock: a new link's `Watch` is not to be taken back.
                if let Some(store) = table.store.get() {
                    store.unwatch(link.owner());
                }
            }
            drop(links);
            if let Some(ending) = ending {
                link.end(&ending);
            }
            return;
        }
    }
}
