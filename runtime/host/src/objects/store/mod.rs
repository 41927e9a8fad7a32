//! The process's side of its node's shared memory: it writes objects into arenas that the agent
//! has granted, and reads those of others in place.
//!
//! ```text
//! put: allocate (no round trip while an arena has room) ── copy ── Publish
//! get: written here and still there: at once; otherwise Open ── Opened ── a view ── Close
//! ```
//!
//! * This file: writing and reading. `memory`: the arenas that the process writes in. `link`: its
//!   messages to and from the agent.
//!
//! Invariants:
//! 1. A block's memory is used again only after the agent has said `Reclaimed` and no view of it
//!    is left here.
//! 2. What is not published, because whoever wrote it gave up, is free again at once.
//! 3. Each `Open` that was answered has one `Close`, when the last view of it is dropped.

mod link;
mod memory;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use mobula_core::arena::block_bytes;
use mobula_core::codec;
use mobula_core::id::NodeId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_net::descriptor::connect_descriptors;
use mobula_wire::object::{Format, Stored};
use mobula_wire::store::{STORE_MESSAGE_BYTES_MAX, StoreReply, StoreRequest};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::mapping::{Mapping, View};
use crate::actor::run_blocking;
pub(crate) use link::StoreLink;
use link::{Answer, Waiting, next_reply};
use memory::{OwnMemory, Range};

/// How often one write may be granted memory and find it taken by another write of this process:
/// each grant is an arena, so this is memory, not patience.
const GRANTS_MAX: u32 = 16;

/// How long a write waits for memory of a value that was freed just now before it asks for more:
/// many round trips to the agent, and less than making the pages of some MiB takes. A reader in
/// another process may hold it longer.
const RECLAIM_WAIT: Duration = Duration::from_millis(5);

/// What is copied without giving the thread's other tasks to another one first: some hundred
/// microseconds' worth, about what handing them over can cost.
pub const COPY_IN_PLACE_BYTES_MAX: usize = 4 << 20;

/// The node's shared memory, as one process sees it.
pub struct StoreClient {
    /// To this very value, for what outlives a call.
    weak: Weak<StoreClient>,
    node: NodeId,
    agent: String,
    arena_bytes: u64,
    state: Mutex<State>,
    /// There are messages to send.
    outgoing: Notify,
    /// Memory has become free, or was granted.
    room: Notify,
}

#[derive(Default)]
struct State {
    own: OwnMemory,
    /// Arenas of others that something was read in.
    foreign: HashMap<u64, Arc<Mapping>>,
    opened: HashMap<ObjectId, Weak<Opened>>,
    waiting: HashMap<u64, Waiting>,
    last_request: u64,
    /// Bounded by what this process does: one for each call under way, and one for each block,
    /// view, object or owner that it lets go.
    queue: VecDeque<StoreRequest>,
    /// Why there is no agent any more.
    ended: Option<String>,
}

impl StoreClient {
    /// Says hello to the agent that listens at `socket`.
    pub(crate) async fn connect(
        socket: &Path,
        key: String,
        process: ProcessId,
        node: NodeId,
    ) -> io::Result<(Arc<Self>, StoreLink)> {
        let (mut sender, mut receiver) =
            connect_descriptors(socket, STORE_MESSAGE_BYTES_MAX).await?;
        let hello = codec::encode_plain(&StoreRequest::Hello { key, process });
        sender.send(&hello, None).await?;
        match next_reply(&mut receiver).await? {
            Some((StoreReply::Welcome { agent, arena_bytes }, _)) => {
                let client = Arc::new_cyclic(|weak| StoreClient {
                    weak: weak.clone(),
                    node,
                    agent,
                    arena_bytes,
                    state: Mutex::default(),
                    outgoing: Notify::new(),
                    room: Notify::new(),
                });
                Ok((client, StoreLink { sender, receiver }))
            }
            _ => Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                "the agent does not take this process in",
            )),
        }
    }

    /// Copies `bytes` into shared memory, as `object`. `is_owned_here` says that it is to end with
    /// this process.
    pub(crate) async fn write(
        &self,
        object: ObjectId,
        format: Format,
        bytes: &[u8],
        is_owned_here: bool,
    ) -> Result<Stored, ObjectError> {
        let mut block = self.begin(bytes.len() as u64).await?;
        block.write(bytes);
        Ok(block.publish(object, format, is_owned_here))
    }

    /// Memory for `size_bytes` that are then written. Waits, within the agent's bound, for it.
    pub(crate) async fn begin(&self, size_bytes: u64) -> Result<NewBlock<'_>, ObjectError> {
        Ok(NewBlock {
            range: self.allocate(size_bytes).await?,
            written_bytes: 0,
            is_published: false,
            store: self,
        })
    }

    async fn allocate(&self, size_bytes: u64) -> Result<Range, ObjectError> {
        // Asked for as what it will take: an arena of just the value's size may be too small.
        let needed_bytes = block_bytes(size_bytes).ok_or_else(|| ObjectError::Unavailable {
            reason: format!("{size_bytes} bytes are more than any memory has"),
        })?;
        let mut grant: Option<Grant<'_>> = None;
        let mut grants = 0;
        let reclaim_deadline = Instant::now() + RECLAIM_WAIT;
        loop {
            // Registered before the look, so that no room is missed in between.
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if let Some(range) = self.state.lock().own.allocate(size_bytes) {
                return Ok(range);
            }
            let may_wait = grant.is_none() && Instant::now() < reclaim_deadline;
            if may_wait && self.state.lock().own.is_room_coming(size_bytes) {
                // Sooner here than new memory, whose pages would have to be made first.
                let _ = tokio::time::timeout_at(reclaim_deadline, room).await;
                continue;
            }
            let waiting = match &mut grant {
                Some(waiting) => waiting,
                none => none.insert(self.ask_for_memory(needed_bytes)?),
            };
            tokio::select! {
                // A grant brings both: its answer is not to be taken for withdrawn.
                biased;
                granted = &mut waiting.answer => {
                    waiting.is_answered = true;
                    granted.unwrap_or_else(|_| Err(self.gone()))?;
                    grant = None;
                    grants += 1;
                    if grants > GRANTS_MAX {
                        return Err(ObjectError::Unavailable {
                            reason: format!(
                                "memory for {size_bytes} bytes was granted {GRANTS_MAX} times and \
                                 taken by other writers of this process each time: write less at \
                                 once"
                            ),
                        });
                    }
                }
                () = room => {}
            }
        }
    }

    fn ask_for_memory(&self, size_bytes: u64) -> Result<Grant<'_>, ObjectError> {
        let (request, answer) = self.ask(None, |request| StoreRequest::Grant {
            request,
            size_bytes,
        })?;
        Ok(Grant {
            store: self,
            request,
            answer,
            is_answered: false,
        })
    }

    /// The bytes of an object, in place. At once if this process reads or has written it, and
    /// otherwise after asking the agent, which may have to fetch or restore it.
    pub(crate) async fn open(&self, stored: &Stored) -> Result<Bytes, ObjectError> {
        if let Some(bytes) = self.open_here(stored.object) {
            return Ok(bytes);
        }
        let (_, answer) = self.ask(Some(stored.object), |request| StoreRequest::Open {
            request,
            object: stored.object,
            agent: stored.agent.clone(),
            size_bytes: stored.size_bytes,
        })?;
        // An answer that comes when nobody waits any more is dropped, and so closed.
        let opened = answer.await.unwrap_or_else(|_| Err(self.gone()))?;
        let opened = opened.ok_or_else(|| self.gone())?;
        opened.bytes().ok_or_else(|| ObjectError::Unavailable {
            reason: format!("its agent says that {} is where no arena is", stored.object),
        })
    }

    fn open_here(&self, object: ObjectId) -> Option<Bytes> {
        let mut state = self.state.lock();
        if let Some(opened) = state.opened.get(&object).and_then(Weak::upgrade) {
            drop(state);
            return opened.bytes();
        }
        let Range {
            mapping,
            offset,
            size_bytes,
            ..
        } = state.own.view(object)?;
        drop(state);
        let pin = OwnView {
            store: self.weak.clone(),
            object,
        };
        // SAFETY: the block is published, and not released while it has views.
        unsafe { View::bytes(mapping, offset, size_bytes, pin) }
    }

    /// Where the agent answers others.
    pub(crate) fn agent(&self) -> &str {
        &self.agent
    }

    /// Asks to be told when `process` ends, whose node's agent is at `agent`.
    pub(crate) fn watch(&self, process: ProcessId, agent: &str) {
        let agent = agent.to_owned();
        self.push(
            &mut self.state.lock(),
            StoreRequest::Watch { process, agent },
        );
    }

    /// It need not be told any more.
    pub(crate) fn unwatch(&self, process: ProcessId) {
        self.push(&mut self.state.lock(), StoreRequest::Unwatch { process });
    }

    /// Nobody refers to the object any more.
    pub(crate) fn free(&self, stored: &Stored) {
        let mut state = self.state.lock();
        state.own.freed(stored.object);
        self.push(
            &mut state,
            StoreRequest::Free {
                object: stored.object,
                agent: stored.agent.clone(),
            },
        );
    }

    fn view_dropped(&self, object: ObjectId) {
        if self.state.lock().own.view_dropped(object) {
            self.room.notify_waiters();
        }
    }

    fn closed(&self, object: ObjectId) {
        let mut state = self.state.lock();
        if state
            .opened
            .get(&object)
            .is_some_and(|opened| opened.strong_count() == 0)
        {
            state.opened.remove(&object);
        }
        self.push(&mut state, StoreRequest::Close { object });
    }

    /// The size of an arena, in bytes, unless one object needs more.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        self.arena_bytes
    }
}

impl std::fmt::Debug for StoreClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreClient")
            .field("node", &self.node)
            .field("agent", &self.agent)
            .finish_non_exhaustive()
    }
}

/// Memory that is being written, and nobody else knows of; it is free again when this is dropped
/// before it is published.
pub(crate) struct NewBlock<'a> {
    range: Range,
    written_bytes: u64,
    is_published: bool,
    store: &'a StoreClient,
}

impl NewBlock<'_> {
    /// Writes `bytes` behind what was written before.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let begin = self.written_bytes;
        self.written_bytes += bytes.len() as u64;
        assert!(self.written_bytes <= self.range.size_bytes, "it has room");
        let offset = usize::try_from(self.range.offset + begin).expect("a mapped offset fits");
        let mapping = &self.range.mapping;
        let copy = || {
            // SAFETY: own arenas are mapped writable, and the range was allocated for this value
            // alone: it is in no published block.
            unsafe { mapping.write(offset, bytes) }
        };
        match bytes.len() {
            0..=COPY_IN_PLACE_BYTES_MAX => copy(),
            _ => run_blocking(copy),
        }
    }

    /// What was written is `object` from now on.
    pub(crate) fn publish(
        mut self,
        object: ObjectId,
        format: Format,
        is_owned_here: bool,
    ) -> Stored {
        let Range {
            arena,
            offset,
            size_bytes,
            ..
        } = self.range;
        // The rest may hold what another object had there.
        assert_eq!(self.written_bytes, size_bytes, "all of it was written");
        self.is_published = true;
        let mut state = self.store.state.lock();
        state.own.publish(object, &self.range);
        self.store.push(
            &mut state,
            StoreRequest::Publish {
                object,
                arena,
                offset,
                size_bytes,
                is_owned_here,
            },
        );
        Stored {
            object,
            format,
            size_bytes,
            node: self.store.node,
            agent: self.store.agent.clone(),
        }
    }
}

impl Drop for NewBlock<'_> {
    fn drop(&mut self) {
        if !self.is_published {
            self.store.state.lock().own.give_back(&self.range);
            self.store.room.notify_waiters();
        }
    }
}

/// A request for memory, withdrawn when it is dropped before its answer: what is granted all the
/// same is kept for what is written next.
struct Grant<'a> {
    store: &'a StoreClient,
    request: u64,
    answer: oneshot::Receiver<Answer>,
    is_answered: bool,
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        if !self.is_answered {
            let request = self.request;
            let mut state = self.store.state.lock();
            self.store
                .push(&mut state, StoreRequest::Withdraw { request });
        }
    }
}

/// Keeps a block of this process from being used again.
struct OwnView {
    store: Weak<StoreClient>,
    object: ObjectId,
}

impl Drop for OwnView {
    fn drop(&mut self) {
        if let Some(store) = self.store.upgrade() {
            store.view_dropped(self.object);
        }
    }
}

/// One answered `Open`.
struct Opened {
    store: Weak<StoreClient>,
    object: ObjectId,
    range: Range,
}

impl Opened {
    fn bytes(self: Arc<Self>) -> Option<Bytes> {
        let Range {
            mapping,
            offset,
            size_bytes,
            ..
        } = &self.range;
        let (mapping, offset, size_bytes) = (Arc::clone(mapping), *offset, *size_bytes);
        // SAFETY: the agent answers only for published blocks, and leaves them alone until the
        // `Close` that dropping the last clone of `self` sends.
        unsafe { View::bytes(mapping, offset, size_bytes, self) }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(store) = self.store.upgrade() {
            store.closed(self.object);
        }
    }
}
