//! The process's side of its node's shared memory: it writes objects into arenas that the agent
//! has granted, and reads those of others in place.
//!
//! ```text
//! put: allocate (no round trip while an arena has room) ── copy ── Publish
//! get: written here and still there: at once; otherwise Open ── Opened ── a view ── Close
//! ```
//!
//! Invariants:
//! 1. A block's memory is used again only after the agent has said `Reclaimed` and no view of it
//!    is left here.
//! 2. Each `Open` that was answered has one `Close`, when the last view of it is dropped.
//! 3. Messages to the agent go out in the order in which they were made: a `Free` after its
//!    `Publish`, a `Close` before an `Open` that was asked for later.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use mobula_core::arena::{Arena, block_bytes};
use mobula_core::codec;
use mobula_core::id::NodeId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_net::descriptor::{DescriptorReceiver, DescriptorSender, connect_descriptors};
use mobula_wire::object::{Format, Stored};
use mobula_wire::store::{STORE_MESSAGE_BYTES_MAX, StoreReply, StoreRequest};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::mapping::{Mapping, View};

/// How often one write may be granted memory and find it taken by another write of this process:
/// each grant is an arena, so this is memory, not patience.
const GRANTS_MAX: u32 = 16;

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
    arenas: BTreeMap<u64, OwnArena>,
    blocks: HashMap<ObjectId, Block>,
    /// Arenas of others that something was read in.
    foreign: HashMap<u64, Arc<Mapping>>,
    opened: HashMap<ObjectId, Weak<Opened>>,
    waiting: HashMap<u64, Waiting>,
    last_request: u64,
    /// Bounded by what this process does: one for each call under way, and one for each block,
    /// view or object that it lets go.
    queue: VecDeque<StoreRequest>,
    /// Why there is no agent any more.
    ended: Option<String>,
}

struct OwnArena {
    mapping: Arc<Mapping>,
    blocks: Arena,
}

/// An answer of the agent: what it opened, or nothing beside that it did what it was asked.
type Answer = Result<Option<Arc<Opened>>, ObjectError>;

struct Waiting {
    /// What is to be opened, if anything.
    object: Option<ObjectId>,
    answer: oneshot::Sender<Answer>,
}

/// Where bytes are, and in which mapping.
struct Range {
    mapping: Arc<Mapping>,
    arena: u64,
    offset: u64,
    size_bytes: u64,
}

struct Block {
    arena: u64,
    offset: u64,
    size_bytes: u64,
    views: usize,
    /// The agent has given it back, and views of it are left.
    is_reclaimed: bool,
}

/// The tasks that carry messages between a process and its agent.
pub(crate) struct StoreLink {
    sender: DescriptorSender,
    receiver: DescriptorReceiver,
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
    /// this process. Waits, within the agent's bound, for memory.
    pub(crate) async fn write(
        &self,
        object: ObjectId,
        format: Format,
        bytes: &[u8],
        is_owned_here: bool,
    ) -> Result<Stored, ObjectError> {
        let size_bytes = bytes.len() as u64;
        let range = self.allocate(size_bytes).await?;
        let offset = usize::try_from(range.offset).expect("a mapped offset fits");
        // SAFETY: own arenas are mapped writable, and the range was allocated here just now: it is
        // in no published block.
        unsafe { range.mapping.write(offset, bytes) };
        let mut state = self.state.lock();
        state.blocks.insert(
            object,
            Block {
                arena: range.arena,
                offset: range.offset,
                size_bytes,
                views: 0,
                is_reclaimed: false,
            },
        );
        self.push(
            &mut state,
            StoreRequest::Publish {
                object,
                arena: range.arena,
                offset: range.offset,
                size_bytes,
                is_owned_here,
            },
        );
        Ok(Stored {
            object,
            format,
            size_bytes,
            node: self.node,
            agent: self.agent.clone(),
        })
    }

    async fn allocate(&self, size_bytes: u64) -> Result<Range, ObjectError> {
        // Asked for as what it will take: an arena of just the value's size may be too small.
        let needed_bytes = block_bytes(size_bytes).ok_or_else(|| ObjectError::Unavailable {
            reason: format!("{size_bytes} bytes are more than any memory has"),
        })?;
        let mut grant: Option<Grant<'_>> = None;
        let mut grants = 0;
        loop {
            // Registered before the look, so that no room is missed in between.
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if let Some(range) = self.try_allocate(size_bytes) {
                return Ok(range);
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

    fn try_allocate(&self, size_bytes: u64) -> Option<Range> {
        let mut state = self.state.lock();
        state.arenas.iter_mut().find_map(|(arena, own)| {
            let offset = own.blocks.allocate(size_bytes)?;
            Some(Range {
                mapping: Arc::clone(&own.mapping),
                arena: *arena,
                offset,
                size_bytes,
            })
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
        let State { blocks, arenas, .. } = &mut *state;
        let block = blocks
            .get_mut(&object)
            .filter(|block| !block.is_reclaimed)?;
        let mapping = Arc::clone(&arenas.get(&block.arena)?.mapping);
        block.views += 1;
        let (offset, size_bytes) = (block.offset, block.size_bytes);
        drop(state);
        let pin = OwnView {
            store: self.weak.clone(),
            object,
        };
        // SAFETY: the block is published, and not released while it has views.
        unsafe { View::bytes(mapping, offset, size_bytes, pin) }
    }

    /// Nobody refers to the object any more.
    pub(crate) fn free(&self, stored: &Stored) {
        self.push(
            &mut self.state.lock(),
            StoreRequest::Free {
                object: stored.object,
                agent: stored.agent.clone(),
            },
        );
    }

    fn ask(
        &self,
        object: Option<ObjectId>,
        request: impl FnOnce(u64) -> StoreRequest,
    ) -> Result<(u64, oneshot::Receiver<Answer>), ObjectError> {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            drop(state);
            return Err(self.gone());
        }
        state.last_request += 1;
        let number = state.last_request;
        let (answer, waiting) = oneshot::channel();
        state.waiting.insert(number, Waiting { object, answer });
        self.push(&mut state, request(number));
        Ok((number, waiting))
    }

    fn push(&self, state: &mut State, request: StoreRequest) {
        if state.ended.is_none() {
            state.queue.push_back(request);
            self.outgoing.notify_one();
        }
    }

    fn gone(&self) -> ObjectError {
        let reason = self.state.lock().ended.clone();
        ObjectError::Unavailable {
            reason: reason.unwrap_or_else(|| "the agent does not answer".to_owned()),
        }
    }

    fn end(&self, reason: &str) {
        let mut state = self.state.lock();
        state.ended.get_or_insert_with(|| reason.to_owned());
        let waiting = std::mem::take(&mut state.waiting);
        state.queue.clear();
        drop(state);
        drop(waiting);
    }

    async fn handle(&self, reply: StoreReply, descriptor: Option<OwnedFd>) -> io::Result<()> {
        match (reply, descriptor) {
            (
                StoreReply::Granted {
                    request,
                    arena,
                    size_bytes,
                },
                Some(descriptor),
            ) => {
                // Filling it with pages takes the kernel some milliseconds.
                let mapped = tokio::task::spawn_blocking(move || {
                    Mapping::writable(&descriptor, mapped_size(size_bytes)?)
                });
                let mapping = mapped.await??;
                let mut state = self.state.lock();
                let blocks = Arena::new(size_bytes);
                state.arenas.insert(arena, OwnArena { mapping, blocks });
                if let Some(waiting) = state.waiting.remove(&request) {
                    // Who does not wait any more leaves the room to others.
                    let _ = waiting.answer.send(Ok(None));
                }
                drop(state);
                self.room.notify_waiters();
            }
            (
                StoreReply::Opened {
                    request,
                    arena,
                    offset,
                    size_bytes,
                    arena_bytes,
                },
                descriptor,
            ) => {
                if let (Some(arena_bytes), Some(descriptor)) = (arena_bytes, descriptor) {
                    let mapping = Mapping::readable(&descriptor, mapped_size(arena_bytes)?)?;
                    self.state.lock().foreign.insert(arena, mapping);
                }
                self.opened(request, arena, offset, size_bytes);
            }
            (StoreReply::Refused { request, error }, _) => {
                if let Some(waiting) = self.state.lock().waiting.remove(&request) {
                    let _ = waiting.answer.send(Err(error));
                }
            }
            (StoreReply::Reclaimed { object }, _) => {
                let mut state = self.state.lock();
                if let Some(block) = state.blocks.get_mut(&object) {
                    block.is_reclaimed = true;
                    if block.views == 0 {
                        self.release(&mut state, object);
                    }
                }
            }
            (StoreReply::Forget { arena }, _) => {
                self.state.lock().foreign.remove(&arena);
            }
            (StoreReply::Pressure, _) => self.return_empty_arenas(),
            (
                StoreReply::ProcessGone { .. }
                | StoreReply::Welcome { .. }
                | StoreReply::Granted { .. },
                _,
            ) => {}
        }
        Ok(())
    }

    fn opened(&self, request: u64, arena: u64, offset: u64, size_bytes: u64) {
        let mut state = self.state.lock();
        let mapping = match state.foreign.get(&arena) {
            Some(mapping) => Some(Arc::clone(mapping)),
            None => state.arenas.get(&arena).map(|own| Arc::clone(&own.mapping)),
        };
        let Some(Waiting {
            object: Some(object),
            answer,
        }) = state.waiting.remove(&request)
        else {
            return;
        };
        let opened = mapping.map(|mapping| {
            Arc::new(Opened {
                store: self.weak.clone(),
                object,
                range: Range {
                    mapping,
                    arena,
                    offset,
                    size_bytes,
                },
            })
        });
        if let Some(opened) = &opened {
            state.opened.insert(object, Arc::downgrade(opened));
        }
        drop(state);
        // Without the lock: where nobody waits, dropping it closes it.
        drop(answer.send(Ok(opened)));
    }

    /// The memory of a reclaimed block without views is free.
    fn release(&self, state: &mut State, object: ObjectId) {
        let Some(block) = state.blocks.remove(&object) else {
            return;
        };
        if let Some(own) = state.arenas.get_mut(&block.arena)
            && let Err(error) = own.blocks.release(block.offset, block.size_bytes)
        {
            tracing::error!(%object, %error, "a block of shared memory is lost");
        }
        self.room.notify_waiters();
    }

    fn return_empty_arenas(&self) {
        let mut state = self.state.lock();
        let empty: Vec<u64> = state
            .arenas
            .iter()
            .filter(|(_, own)| own.blocks.is_empty())
            .map(|(arena, _)| *arena)
            .collect();
        for arena in empty {
            state.arenas.remove(&arena);
            self.push(&mut state, StoreRequest::ReturnArena { arena });
        }
    }

    fn view_dropped(&self, object: ObjectId) {
        let mut state = self.state.lock();
        let Some(block) = state.blocks.get_mut(&object) else {
            return;
        };
        block.views -= 1;
        if block.views == 0 && block.is_reclaimed {
            self.release(&mut state, object);
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

fn mapped_size(size_bytes: u64) -> io::Result<usize> {
    usize::try_from(size_bytes).map_err(|_| io::Error::other("an arena beyond all addresses"))
}

impl std::fmt::Debug for StoreClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreClient")
            .field("node", &self.node)
            .field("agent", &self.agent)
            .finish_non_exhaustive()
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

impl StoreLink {
    /// Carries messages until the agent is gone. `process_gone` is told of ended processes.
    pub(crate) async fn run(self, store: Arc<StoreClient>, process_gone: impl Fn(ProcessId)) {
        let StoreLink {
            mut sender,
            mut receiver,
        } = self;
        let sending = async {
            loop {
                let next = store.state.lock().queue.pop_front();
                match next {
                    Some(request) => sender.send(&codec::encode_plain(&request), None).await?,
                    None => store.outgoing.notified().await,
                }
            }
        };
        let receiving = async {
            while let Some((reply, descriptor)) = next_reply(&mut receiver).await? {
                if let StoreReply::ProcessGone { process } = reply {
                    process_gone(process);
                } else {
                    store.handle(reply, descriptor).await?;
                }
            }
            Ok(())
        };
        let ended: io::Result<()> = tokio::select! {
            ended = sending => ended,
            ended = receiving => ended,
        };
        let reason = match ended {
            Ok(()) => "the agent closed the socket".to_owned(),
            Err(error) => error.to_string(),
        };
        store.end(&reason);
    }
}

async fn next_reply(
    receiver: &mut DescriptorReceiver,
) -> io::Result<Option<(StoreReply, Option<OwnedFd>)>> {
    let Some((payload, descriptor)) = receiver.receive().await? else {
        return Ok(None);
    };
    let reply = codec::decode(&payload, STORE_MESSAGE_BYTES_MAX)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((reply, descriptor)))
}
