//! What is where, who reads it, and what goes when memory is short.
//!
//! Everything here happens at once: what takes time is an [`Action`] for the service to perform,
//! which reports back with [`Table::spilled`] or [`Table::loaded`].
//!
//! * This file: the tables, and the hosts behind links. `life`: an object from its publication to
//!   its end. `room`: requests for memory, and what makes room for them. `moving`: objects on their
//!   way to and from disk and other nodes. `watch`: who is told when which process ends.
//!
//! Invariants:
//! 1. A block that is pinned, or on its way to or from disk or another node, is not given back.
//! 2. Every request is answered once: at once, or when its object or memory has come, or when its
//!    time is over.
//! 3. What waits for memory is served in the order in which it came.

mod life;
mod moving;
mod room;
mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::time::Instant;

use mobula_core::id::JobId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_wire::store::{StoreReply, StoreRequest};
use tokio::sync::{mpsc, oneshot};

use super::arenas::{Arenas, Dropped, Spot};
use super::link::{Answer, Linked};
use super::memory::Block;
use super::metrics::ObjectStoreMetrics;
use super::spill::OnDisk;
use life::Early;
use room::{Need, Needed};
use watch::Watches;

/// The pins of other agents, which have no link.
pub(crate) const PEERS: u64 = u64::MAX;

/// What the service is to do.
#[derive(Debug)]
pub(crate) enum Action {
    /// Write an object to disk, then report with [`Table::spilled`].
    Spill(ObjectId, Block),
    /// Read an object from disk, then report with [`Table::loaded`].
    Restore(ObjectId, Block, OnDisk),
    /// Get an object from the agent at an address, then report with [`Table::loaded`].
    Fetch(ObjectId, JobId, Block, String),
    /// Give the disk back what an object takes there.
    Remove(OnDisk),
    /// Tell the agent at an address that an object is not needed any more.
    FreeAt(String, ObjectId, JobId),
    /// Have the agent at an address say when a process of its node has ended.
    Watch(String, ProcessId, JobId),
    /// It need not.
    Unwatch(String, ProcessId, JobId),
}

/// What an agent offers.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) node: String,
    /// Where this agent serves objects.
    pub(crate) agent: String,
    pub(crate) memory_bytes: u64,
    pub(crate) arena_bytes: u64,
    pub(crate) spill_bytes: u64,
}

/// Who wants to read an object.
#[derive(Debug)]
pub(crate) enum Opener {
    Host { link: u64, request: u64 },
    Peer(oneshot::Sender<Result<Block, ObjectError>>),
}

#[derive(Debug)]
struct Link {
    job: JobId,
    process: ProcessId,
    answers: mpsc::Sender<Answer>,
}

#[derive(Debug, Clone)]
enum Source {
    Disk(OnDisk),
    Peer(String),
}

#[derive(Debug)]
enum Place {
    Memory(Spot),
    Spilling(Spot),
    Disk(OnDisk),
    Waiting(Source),
    Loading(Spot, Source),
}

#[derive(Debug)]
struct Object {
    job: JobId,
    size_bytes: u64,
    /// Another node has it too, so it may be dropped.
    is_copy: bool,
    is_owned_here: bool,
    is_freed: bool,
    last_use: u64,
    pins: BTreeMap<u64, u32>,
    openers: Vec<Opener>,
    place: Place,
}

impl Object {
    fn new(job: JobId, size_bytes: u64, place: Place) -> Object {
        Object {
            job,
            size_bytes,
            is_copy: false,
            is_owned_here: false,
            is_freed: false,
            last_use: 0,
            pins: BTreeMap::new(),
            openers: Vec::new(),
            place,
        }
    }
}

/// The tables of one node's object store.
#[derive(Debug)]
pub(crate) struct Table {
    limits: Limits,
    links: BTreeMap<u64, Link>,
    arenas: Arenas,
    objects: BTreeMap<ObjectId, Object>,
    /// By last use.
    by_use: BTreeMap<u64, ObjectId>,
    last_use: u64,
    needs: VecDeque<Need>,
    /// In the order of their deadlines.
    early: Vec<Early>,
    /// What is on its way to disk, in bytes.
    spilling_bytes: u64,
    pressed_at: Option<Instant>,
    /// When an object was last moved to disk: its writer may not have said yet what that leaves.
    spilled_at: Option<Instant>,
    /// Why the last attempt to move something to disk failed.
    disk_problem: Option<String>,
    seen: BTreeMap<JobId, Instant>,
    /// Jobs that are over and have processes here that have not ended yet.
    ended: BTreeSet<JobId>,
    watches: Watches,
    metrics: ObjectStoreMetrics,
    actions: Vec<Action>,
}

impl Table {
    pub(crate) fn new(limits: Limits) -> Table {
        Table {
            arenas: Arenas::new(limits.memory_bytes),
            limits,
            links: BTreeMap::new(),
            objects: BTreeMap::new(),
            by_use: BTreeMap::new(),
            last_use: 0,
            needs: VecDeque::new(),
            early: Vec::new(),
            spilling_bytes: 0,
            pressed_at: None,
            spilled_at: None,
            disk_problem: None,
            seen: BTreeMap::new(),
            ended: BTreeSet::new(),
            watches: Watches::default(),
            metrics: ObjectStoreMetrics::default(),
            actions: Vec::new(),
        }
    }

    pub(crate) fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    pub(crate) fn metrics(&self) -> ObjectStoreMetrics {
        ObjectStoreMetrics {
            limit_bytes: self.arenas.limit_bytes(),
            used_bytes: self.arenas.used_bytes(),
            arenas: self.arenas.count() as u64,
            objects: self.objects.len() as u64,
            hosts: self.links.len() as u64,
            waiting_requests: (self.needs.len() + self.early.len()) as u64,
            ..self.metrics
        }
    }

    pub(crate) fn linked(&mut self, linked: Linked, now: Instant) {
        let Linked {
            link,
            job,
            process,
            answers,
        } = linked;
        self.seen.insert(job, now);
        self.links.insert(
            link,
            Link {
                job,
                process,
                answers,
            },
        );
        let agent = self.limits.agent.clone();
        let arena_bytes = self.limits.arena_bytes;
        self.answer(link, StoreReply::Welcome { agent, arena_bytes }, None);
    }

    /// A host's process has ended, or broke the protocol.
    pub(crate) fn unlinked(&mut self, link: u64) {
        let Some(ended) = self.links.remove(&link) else {
            return;
        };
        self.needs.retain(
            |need| !matches!(need.what, Needed::Arena { link: other, .. } if other == link),
        );
        self.forget_early(link);
        self.refuse_early(None, Some(ended.process));
        for dropped in self.arenas.unlinked(link) {
            self.forget(dropped);
        }
        let mut touched = Vec::new();
        for (id, object) in &mut self.objects {
            let is_over = object.is_owned_here && id.owner == ended.process;
            object.is_freed |= is_over;
            object.openers.retain(
                |opener| !matches!(opener, Opener::Host { link: other, .. } if *other == link),
            );
            if object.pins.remove(&link).is_some() || is_over {
                touched.push(*id);
            }
        }
        for object in touched {
            self.settle_freed(object);
        }
        self.unlinked_from(ended.job);
        self.end_watches(link, ended.process, ended.job);
    }

    /// Takes in a host's request; false if it breaks the protocol.
    pub(crate) fn request(&mut self, link: u64, request: StoreRequest, now: Instant) -> bool {
        let Some(job) = self.links.get(&link).map(|link| link.job) else {
            return true;
        };
        match request {
            StoreRequest::Hello { .. } => return false,
            StoreRequest::Grant {
                request,
                size_bytes,
            } => {
                let what = Needed::Arena { link, request };
                self.need(size_bytes, what, now);
            }
            StoreRequest::Withdraw { request } => {
                let withdrawn = Needed::Arena { link, request };
                self.needs.retain(|need| need.what != withdrawn);
            }
            StoreRequest::ReturnArena { arena } => {
                let Some(dropped) = self.arenas.take_back(link, arena) else {
                    return false;
                };
                self.forget(dropped);
            }
            StoreRequest::Publish {
                object,
                arena,
                offset,
                size_bytes,
                is_owned_here,
            } => {
                let spot = Spot { arena, offset };
                return self.publish(link, object, spot, size_bytes, is_owned_here);
            }
            StoreRequest::Open {
                request,
                object,
                agent,
                size_bytes,
            } => {
                let opener = Opener::Host { link, request };
                self.open(opener, object, job, size_bytes, &agent, now);
            }
            StoreRequest::Close { object } => self.close(link, object),
            StoreRequest::Watch { process, agent } => self.watch(link, process, agent),
            StoreRequest::Unwatch { process } => self.unwatch(link, job, process),
            StoreRequest::Free { object, agent } if agent == self.limits.agent => {
                self.free(object, job);
            }
            StoreRequest::Free { object, agent } => {
                self.free(object, job);
                self.actions.push(Action::FreeAt(agent, object, job));
            }
        }
        true
    }

    /// An arena is gone: who has it mapped lets go.
    fn forget(&mut self, dropped: Dropped) {
        let Dropped { arena, known } = dropped;
        for link in known {
            self.answer(link, StoreReply::Forget { arena }, None);
        }
    }

    fn refuse(&mut self, opener: Opener, error: ObjectError) {
        match opener {
            Opener::Host { link, request } => {
                self.answer(link, StoreReply::Refused { request, error }, None);
            }
            // An agent that is gone does not wait any more.
            Opener::Peer(answer) => drop(answer.send(Err(error))),
        }
    }

    fn answer(&mut self, link: u64, reply: StoreReply, descriptor: Option<OwnedFd>) {
        let Some(host) = self.links.get(&link) else {
            return;
        };
        if let Err(mpsc::error::TrySendError::Full(_)) = host.answers.try_send((reply, descriptor))
        {
            // It ends for lack of a sender, which the host sees as the agent's end.
            tracing::error!(process = %host.process, "a host reads no answers of the object store");
            self.unlinked(link);
        }
    }
}
