//! Messages between a process and its agent: requests in the order in which they were made, answers
//! to whoever waits for them.
//!
//! Invariants:
//! 1. Messages to the agent go out in the order in which they were made: a `Free` after its
//!    `Publish`, a `Close` before an `Open` that was asked for later.
//! 2. When the socket breaks everything that waits is told; nothing waits from then on.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use mobula_core::codec;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_net::descriptor::{DescriptorReceiver, DescriptorSender};
use mobula_wire::store::{STORE_MESSAGE_BYTES_MAX, StoreReply, StoreRequest};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::super::mapping::Mapping;
use super::memory::Range;
use super::{Opened, State, StoreClient};

/// An answer of the agent: what it opened, or nothing beside that it did what it was asked.
pub(super) type Answer = Result<Option<Arc<Opened>>, ObjectError>;

/// Somebody who waits for an answer.
pub(super) struct Waiting {
    /// What is to be opened, if anything.
    object: Option<ObjectId>,
    answer: oneshot::Sender<Answer>,
}

/// The tasks that carry messages between a process and its agent.
pub(crate) struct StoreLink {
    pub(super) sender: DescriptorSender,
    pub(super) receiver: DescriptorReceiver,
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
            let mut mappings = JoinSet::new();
            loop {
                tokio::select! {
                    received = next_reply(&mut receiver) => match received? {
                        Some((StoreReply::ProcessGone { process }, _)) => process_gone(process),
                        Some((StoreReply::Granted { request, arena, size_bytes }, Some(descriptor))) => {
                            // Filling a large one with pages takes the kernel long; others need not
                            // wait for their answers meanwhile.
                            mappings.spawn_blocking(move || {
                                let mapping =
                                    Mapping::writable(&descriptor, mapped_size(size_bytes)?)?;
                                Ok::<_, io::Error>((request, arena, size_bytes, mapping))
                            });
                        }
                        Some((reply, descriptor)) => store.handle(reply, descriptor)?,
                        None => return Ok(()),
                    },
                    Some(mapped) = mappings.join_next() => {
                        let (request, arena, size_bytes, mapping) = mapped??;
                        store.granted(request, arena, size_bytes, mapping);
                    }
                }
            }
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

impl StoreClient {
    pub(super) fn ask(
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

    pub(super) fn push(&self, state: &mut State, request: StoreRequest) {
        if state.ended.is_none() {
            state.queue.push_back(request);
            self.outgoing.notify_one();
        }
    }

    /// Why nothing is answered any more.
    pub(super) fn gone(&self) -> ObjectError {
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

    fn handle(&self, reply: StoreReply, descriptor: Option<OwnedFd>) -> io::Result<()> {
        match (reply, descriptor) {
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
                if self.state.lock().own.reclaimed(object) {
                    self.room.notify_waiters();
                }
            }
            (StoreReply::Forget { arena }, _) => {
                self.state.lock().foreign.remove(&arena);
            }
            (StoreReply::Pressure, _) => {
                let mut state = self.state.lock();
                for arena in state.own.take_empty() {
                    self.push(&mut state, StoreRequest::ReturnArena { arena });
                }
            }
            (
                StoreReply::ProcessGone { .. }
                | StoreReply::Welcome { .. }
                | StoreReply::Granted { .. },
                _,
            ) => {}
        }
        Ok(())
    }

    /// An arena to write in has come, with all of its pages.
    fn granted(&self, request: u64, arena: u64, size_bytes: u64, mapping: Arc<Mapping>) {
        let mut state = self.state.lock();
        state.own.add(arena, mapping, size_bytes);
        if let Some(waiting) = state.waiting.remove(&request) {
            // Who does not wait any more leaves the room to others.
            let _ = waiting.answer.send(Ok(None));
        }
        drop(state);
        self.room.notify_waiters();
    }

    fn opened(&self, request: u64, arena: u64, offset: u64, size_bytes: u64) {
        let mut state = self.state.lock();
        let mapping = match state.foreign.get(&arena) {
            Some(mapping) => Some(Arc::clone(mapping)),
            None => state.own.mapping(arena),
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
}

fn mapped_size(size_bytes: u64) -> io::Result<usize> {
    usize::try_from(size_bytes).map_err(|_| io::Error::other("an arena beyond all addresses"))
}

/// The agent's next message, with its descriptor; `None` when it has closed the socket.
pub(super) async fn next_reply(
    receiver: &mut DescriptorReceiver,
) -> io::Result<Option<(StoreReply, Option<OwnedFd>)>> {
    let Some((payload, descriptor)) = receiver.receive().await? else {
        return Ok(None);
    };
    let reply = codec::decode(&payload, STORE_MESSAGE_BYTES_MAX)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((reply, descriptor)))
}
