//! What is where, who reads it, and what goes when memory is short.
//!
//! Everything here happens at once: what takes time is an [`Action`] for the service to perform,
//! which reports back with [`Table::spilled`] or [`Table::loaded`].
//!
//! Invariants:
//! 1. A block that is pinned, or on its way to or from disk or another node, is not given back.
//! 2. Every request is answered once: at once, or when its object or memory has come, or when its
//!    time is over.
//! 3. What waits for memory is served in the order in which it came.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use mobula_core::arena::Arena as Blocks;
use mobula_core::id::JobId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_wire::store::{StoreReply, StoreRequest};
use tokio::sync::{mpsc, oneshot};

use super::link::{Answer, Linked};
use super::memory::{Block, Memory};
use super::metrics::ObjectStoreMetrics;

/// How long a request waits for memory: much longer than moving an arena to disk takes.
pub(crate) const MEMORY_WAIT: Duration = Duration::from_secs(10);

/// Requests that wait for memory at a time.
const NEEDS_MAX: usize = 4096;

/// How often hosts are asked to give back empty arenas while something waits.
const PRESSURE_INTERVAL: Duration = Duration::from_millis(20);

/// How long the writers of objects that have just gone to disk may take to use, or to give back,
/// the memory, before more is moved.
const SETTLE_WAIT: Duration = Duration::from_millis(50);

/// Objects of a job that has had no process on this node, and was not asked for, for so long are
/// dropped: nobody tells an agent that a job has ended elsewhere.
const JOB_IDLE_MAX: Duration = Duration::from_secs(600);

/// The smallest arena that the agent makes for what it loads itself.
const OWN_ARENA_BYTES: u64 = 8 << 20;

const PAGE_BYTES: u64 = 4096;

/// The pins of other agents, which have no link.
pub(crate) const PEERS: u64 = u64::MAX;

/// What the service is to do.
#[derive(Debug)]
pub(crate) enum Action {
    /// Write an object to disk, then report with [`Table::spilled`].
    Spill(ObjectId, Block),
    /// Read an object from disk, then report with [`Table::loaded`].
    Restore(ObjectId, Block, blake3::Hash),
    /// Get an object from the agent at an address, then report with [`Table::loaded`].
    Fetch(ObjectId, JobId, Block, String),
    /// Remove an object's file.
    Remove(ObjectId),
    /// Tell the agent at an address that an object is not needed any more.
    FreeAt(String, ObjectId, JobId),
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

#[derive(Debug)]
enum Writer {
    Host(u64),
    /// Its host has ended: what is in it stays, what is free in it is not used again.
    Gone,
    Agent(Blocks),
}

#[derive(Debug)]
struct Arena {
    job: JobId,
    memory: Memory,
    size_bytes: u64,
    writer: Writer,
    objects: BTreeSet<ObjectId>,
    /// Links that have a descriptor of it.
    known: BTreeSet<u64>,
}

#[derive(Debug, Clone)]
enum Source {
    Disk(blake3::Hash),
    Peer(String),
}

#[derive(Debug)]
enum Place {
    Memory {
        arena: u64,
        offset: u64,
    },
    Spilling {
        arena: u64,
        offset: u64,
    },
    Disk(blake3::Hash),
    Waiting(Source),
    Loading {
        arena: u64,
        offset: u64,
        source: Source,
    },
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

#[derive(Debug)]
struct Need {
    size_bytes: u64,
    deadline: Instant,
    what: Needed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needed {
    Arena { link: u64, request: u64 },
    Load(ObjectId),
}

/// The tables of one node's object store.
#[derive(Debug)]
pub(crate) struct Table {
    limits: Limits,
    links: BTreeMap<u64, Link>,
    arenas: BTreeMap<u64, Arena>,
    last_arena: u64,
    objects: BTreeMap<ObjectId, Object>,
    /// By last use.
    by_use: BTreeMap<u64, ObjectId>,
    last_use: u64,
    needs: VecDeque<Need>,
    /// What is on its way to disk, in bytes.
    spilling_bytes: u64,
    pressed_at: Option<Instant>,
    /// When an object was last moved to disk: its writer may not have said yet what that leaves.
    spilled_at: Option<Instant>,
    /// Why the last attempt to move something to disk failed.
    disk_problem: Option<String>,
    seen: BTreeMap<JobId, Instant>,
    metrics: ObjectStoreMetrics,
    actions: Vec<Action>,
}

impl Table {
    pub(crate) fn new(limits: Limits) -> Table {
        let metrics = ObjectStoreMetrics {
            limit_bytes: limits.memory_bytes,
            ..ObjectStoreMetrics::default()
        };
        Table {
            limits,
            links: BTreeMap::new(),
            arenas: BTreeMap::new(),
            last_arena: 0,
            objects: BTreeMap::new(),
            by_use: BTreeMap::new(),
            last_use: 0,
            needs: VecDeque::new(),
            spilling_bytes: 0,
            pressed_at: None,
            spilled_at: None,
            disk_problem: None,
            seen: BTreeMap::new(),
            metrics,
            actions: Vec::new(),
        }
    }

    pub(crate) fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    pub(crate) fn metrics(&self) -> ObjectStoreMetrics {
        ObjectStoreMetrics {
            arenas: self.arenas.len() as u64,
            objects: self.objects.len() as u64,
            hosts: self.links.len() as u64,
            waiting_requests: self.needs.len() as u64,
            ..self.metrics
        }
    }

    pub(crate) fn needs_memory(&self) -> bool {
        !self.needs.is_empty()
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
        let mut empty = Vec::new();
        for (name, arena) in &mut self.arenas {
            arena.known.remove(&link);
            if matches!(arena.writer, Writer::Host(other) if other == link) {
                arena.writer = Writer::Gone;
                if arena.objects.is_empty() {
                    empty.push(*name);
                }
            }
        }
        for arena in empty {
            self.drop_arena(arena);
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
        let others: Vec<u64> = self.links.keys().copied().collect();
        for other in others {
            let process = ended.process;
            self.answer(other, StoreReply::ProcessGone { process }, None);
        }
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
                let is_right = self.arenas.get(&arena).is_some_and(|arena| {
                    matches!(arena.writer, Writer::Host(writer) if writer == link)
                        && arena.objects.is_empty()
                });
                if !is_right {
                    return false;
                }
                self.drop_arena(arena);
            }
            StoreRequest::Publish {
                object,
                arena,
                offset,
                size_bytes,
                is_owned_here,
            } => {
                let place = (arena, offset);
                return self.publish(link, object, place, size_bytes, is_owned_here);
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

    fn publish(
        &mut self,
        link: u64,
        id: ObjectId,
        (arena, offset): (u64, u64),
        size_bytes: u64,
        is_owned_here: bool,
    ) -> bool {
        let Some(host) = self.links.get(&link) else {
            return true;
        };
        let Some(entry) = self.arenas.get_mut(&arena) else {
            return false;
        };
        let is_inside = offset
            .checked_add(size_bytes)
            .is_some_and(|end| end <= entry.size_bytes);
        let is_writer = matches!(entry.writer, Writer::Host(writer) if writer == link);
        if !is_inside || !is_writer || id.owner != host.process || self.objects.contains_key(&id) {
            return false;
        }
        entry.objects.insert(id);
        let job = host.job;
        self.insert(
            id,
            Object {
                job,
                size_bytes,
                is_copy: false,
                is_owned_here,
                is_freed: false,
                last_use: 0,
                pins: BTreeMap::new(),
                openers: Vec::new(),
                place: Place::Memory { arena, offset },
            },
        );
        true
    }

    fn insert(&mut self, id: ObjectId, object: Object) {
        self.metrics.objects_bytes += object.size_bytes;
        self.objects.insert(id, object);
        self.used_now(id);
    }

    fn used_now(&mut self, id: ObjectId) {
        if let Some(object) = self.objects.get_mut(&id) {
            self.by_use.remove(&object.last_use);
            self.last_use += 1;
            object.last_use = self.last_use;
            self.by_use.insert(self.last_use, id);
        }
    }

    /// Somebody of `job` wants to read an object, which the agent at `agent` should have.
    pub(crate) fn open(
        &mut self,
        opener: Opener,
        id: ObjectId,
        job: JobId,
        size_bytes: u64,
        agent: &str,
        now: Instant,
    ) {
        self.seen.insert(job, now);
        self.used_now(id);
        let Some(object) = self.objects.get_mut(&id) else {
            if agent == self.limits.agent || agent.is_empty() {
                let error = ObjectError::Lost {
                    object: id,
                    reason: format!("{} does not have it any more", self.limits.node),
                };
                return self.refuse(opener, error);
            }
            let source = Source::Peer(agent.to_owned());
            self.insert(
                id,
                Object {
                    job,
                    size_bytes,
                    is_copy: true,
                    is_owned_here: false,
                    is_freed: false,
                    last_use: 0,
                    pins: BTreeMap::new(),
                    openers: vec![opener],
                    place: Place::Waiting(source),
                },
            );
            return self.need(size_bytes, Needed::Load(id), now);
        };
        // Another job is told no more than that there is no such object for it.
        if object.job != job || object.is_freed {
            return self.refuse(opener, ObjectError::Freed { object: id });
        }
        match object.place {
            Place::Memory { .. } | Place::Spilling { .. } => self.give(opener, id),
            Place::Waiting(_) | Place::Loading { .. } => object.openers.push(opener),
            Place::Disk(digest) => {
                object.place = Place::Waiting(Source::Disk(digest));
                object.openers.push(opener);
                let size_bytes = object.size_bytes;
                self.need(size_bytes, Needed::Load(id), now);
            }
        }
    }

    /// Pins an object in memory, and says where it is.
    fn give(&mut self, opener: Opener, id: ObjectId) {
        let Some(object) = self.objects.get_mut(&id) else {
            return self.refuse(opener, ObjectError::Freed { object: id });
        };
        let (Place::Memory { arena, offset } | Place::Spilling { arena, offset }) = object.place
        else {
            unreachable!("only what is in memory is given");
        };
        let entry = self.arenas.get_mut(&arena).expect("objects lie in arenas");
        let size_bytes = object.size_bytes;
        match opener {
            Opener::Peer(answer) => {
                let block = Block {
                    memory: entry.memory.clone(),
                    offset,
                    size_bytes,
                };
                if answer.send(Ok(block)).is_ok() {
                    *object.pins.entry(PEERS).or_default() += 1;
                    self.metrics.serves_total += 1;
                }
            }
            Opener::Host { link, request } => {
                if !self.links.contains_key(&link) {
                    return;
                }
                // A writer has its own arenas mapped.
                let is_writer = matches!(entry.writer, Writer::Host(writer) if writer == link);
                let is_known = is_writer || entry.known.contains(&link);
                let descriptor = match (!is_known).then(|| entry.memory.readable()).transpose() {
                    Ok(descriptor) => descriptor,
                    Err(error) => {
                        let reason = format!("no descriptor for its memory: {error}");
                        let error = ObjectError::Unavailable { reason };
                        return self.answer(link, StoreReply::Refused { request, error }, None);
                    }
                };
                entry.known.insert(link);
                *object.pins.entry(link).or_default() += 1;
                let answer = StoreReply::Opened {
                    request,
                    arena,
                    offset,
                    size_bytes,
                    arena_bytes: descriptor.is_some().then_some(entry.size_bytes),
                };
                self.answer(link, answer, descriptor);
            }
        }
    }

    /// One reader of an object is done.
    pub(crate) fn close(&mut self, link: u64, id: ObjectId) {
        if let Some(object) = self.objects.get_mut(&id)
            && let Some(count) = object.pins.get_mut(&link)
        {
            *count -= 1;
            if *count == 0 {
                object.pins.remove(&link);
            }
            self.settle_freed(id);
        }
    }

    /// The owner of an object does not need it any more.
    pub(crate) fn free(&mut self, id: ObjectId, job: JobId) {
        if let Some(object) = self.objects.get_mut(&id)
            && object.job == job
        {
            object.is_freed = true;
            self.settle_freed(id);
        }
    }

    /// Removes an object that is freed and that nothing holds any more.
    fn settle_freed(&mut self, id: ObjectId) {
        let Some(object) = self.objects.get_mut(&id) else {
            return;
        };
        if !object.is_freed {
            return;
        }
        for opener in std::mem::take(&mut object.openers) {
            self.refuse(opener, ObjectError::Freed { object: id });
        }
        let Some(object) = self.objects.get(&id) else {
            return;
        };
        let is_held = !object.pins.is_empty()
            || matches!(object.place, Place::Spilling { .. } | Place::Loading { .. });
        if !is_held {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: ObjectId) {
        let Some(object) = self.objects.remove(&id) else {
            return;
        };
        self.by_use.remove(&object.last_use);
        self.metrics.objects_bytes -= object.size_bytes;
        match object.place {
            Place::Memory { arena, offset }
            | Place::Spilling { arena, offset }
            | Place::Loading { arena, offset, .. } => {
                self.give_back(arena, offset, id, object.size_bytes);
            }
            Place::Disk(_) | Place::Waiting(Source::Disk(_)) => {
                self.off_disk(object.size_bytes);
                self.actions.push(Action::Remove(id));
            }
            Place::Waiting(Source::Peer(_)) => {}
        }
    }

    fn off_disk(&mut self, size_bytes: u64) {
        self.metrics.spilled_objects -= 1;
        self.metrics.spilled_bytes -= size_bytes;
    }

    /// A block is its writer's again.
    fn give_back(&mut self, name: u64, offset: u64, id: ObjectId, size_bytes: u64) {
        let Some(arena) = self.arenas.get_mut(&name) else {
            return;
        };
        arena.objects.remove(&id);
        match &mut arena.writer {
            Writer::Host(link) => {
                let link = *link;
                return self.answer(link, StoreReply::Reclaimed { object: id }, None);
            }
            Writer::Agent(blocks) => {
                if let Err(error) = blocks.release(offset, size_bytes) {
                    tracing::error!(%id, %error, "a block of shared memory is lost");
                }
            }
            Writer::Gone => {}
        }
        if arena.objects.is_empty() {
            self.drop_arena(name);
        }
    }

    fn drop_arena(&mut self, name: u64) {
        let Some(arena) = self.arenas.remove(&name) else {
            return;
        };
        self.metrics.used_bytes -= arena.size_bytes;
        for link in arena.known {
            self.answer(link, StoreReply::Forget { arena: name }, None);
        }
    }

    fn need(&mut self, size_bytes: u64, what: Needed, now: Instant) {
        let need = Need {
            size_bytes,
            deadline: now + MEMORY_WAIT,
            what,
        };
        if size_bytes > self.limits.memory_bytes || self.needs.len() >= NEEDS_MAX {
            return self.fail(&need);
        }
        self.needs.push_back(need);
        self.pump(now);
    }

    /// Serves what waits for memory, as far as there is some, and makes room.
    pub(crate) fn pump(&mut self, now: Instant) {
        while let Some(need) = self.needs.pop_front() {
            if self.satisfy(&need) {
                continue;
            }
            self.make_room(need.size_bytes, now);
            if self.satisfy(&need) {
                continue;
            }
            if now >= need.deadline {
                self.fail(&need);
                continue;
            }
            self.needs.push_front(need);
            break;
        }
    }

    /// Gives a need its memory; false if there is none.
    fn satisfy(&mut self, need: &Need) -> bool {
        match need.what {
            Needed::Arena { link, request } => {
                let Some(job) = self.links.get(&link).map(|link| link.job) else {
                    return true;
                };
                let Some((arena, descriptor)) = self.new_arena(
                    job,
                    need.size_bytes,
                    self.limits.arena_bytes,
                    Writer::Host(link),
                ) else {
                    return false;
                };
                let size_bytes = self.arenas[&arena].size_bytes;
                let granted = StoreReply::Granted {
                    request,
                    arena,
                    size_bytes,
                };
                self.answer(link, granted, Some(descriptor));
                true
            }
            Needed::Load(id) => self.start_loading(id),
        }
    }

    fn start_loading(&mut self, id: ObjectId) -> bool {
        let Some(object) = self.objects.get(&id) else {
            return true;
        };
        let Place::Waiting(source) = &object.place else {
            return true;
        };
        let (source, job, size_bytes) = (source.clone(), object.job, object.size_bytes);
        let Some((arena, offset)) = self.allocate(job, size_bytes) else {
            return false;
        };
        let entry = self.arenas.get_mut(&arena).expect("it was found just now");
        entry.objects.insert(id);
        let block = Block {
            memory: entry.memory.clone(),
            offset,
            size_bytes,
        };
        self.actions.push(match &source {
            Source::Disk(digest) => Action::Restore(id, block, *digest),
            Source::Peer(agent) => Action::Fetch(id, job, block, agent.clone()),
        });
        if let Some(object) = self.objects.get_mut(&id) {
            object.place = Place::Loading {
                arena,
                offset,
                source,
            };
        }
        true
    }

    /// A block in one of the agent's own arenas.
    fn allocate(&mut self, job: JobId, size_bytes: u64) -> Option<(u64, u64)> {
        for (name, arena) in &mut self.arenas {
            if arena.job == job
                && let Writer::Agent(blocks) = &mut arena.writer
                && let Some(offset) = blocks.allocate(size_bytes)
            {
                return Some((*name, offset));
            }
        }
        let usual = OWN_ARENA_BYTES.min(self.limits.arena_bytes);
        // Its blocks are made for the size it turns out to have.
        let (name, _) = self.new_arena(job, size_bytes, usual, Writer::Gone)?;
        let arena = self.arenas.get_mut(&name)?;
        let mut blocks = Blocks::new(arena.size_bytes);
        let offset = blocks.allocate(size_bytes);
        arena.writer = Writer::Agent(blocks);
        Some((name, offset?))
    }

    /// An arena of `usual_bytes`, or of what is needed where that is more, or all there is.
    fn new_arena(
        &mut self,
        job: JobId,
        needed_bytes: u64,
        usual_bytes: u64,
        writer: Writer,
    ) -> Option<(u64, OwnedFd)> {
        let needed_bytes = needed_bytes.max(1).checked_next_multiple_of(PAGE_BYTES)?;
        let free_bytes = self.free_bytes();
        let size_bytes = match needed_bytes.max(usual_bytes) {
            wanted if wanted <= free_bytes => wanted,
            _ if needed_bytes <= free_bytes => needed_bytes,
            _ => return None,
        };
        let made = Memory::new(size_bytes).and_then(|memory| Ok((memory.writable()?, memory)));
        let (descriptor, memory) = match made {
            Ok(made) => made,
            Err(error) => {
                tracing::error!(%error, size_bytes, "cannot make shared memory");
                return None;
            }
        };
        self.last_arena += 1;
        self.metrics.used_bytes += size_bytes;
        self.arenas.insert(
            self.last_arena,
            Arena {
                job,
                memory,
                size_bytes,
                writer,
                objects: BTreeSet::new(),
                known: BTreeSet::new(),
            },
        );
        Some((self.last_arena, descriptor))
    }

    fn free_bytes(&self) -> u64 {
        self.limits.memory_bytes - self.metrics.used_bytes
    }

    /// Drops copies, asks hosts for empty arenas, and moves objects to disk.
    fn make_room(&mut self, size_bytes: u64, now: Instant) {
        let mut candidates: VecDeque<ObjectId> = self.by_use.values().copied().collect();
        candidates.retain(|id| {
            let object = &self.objects[id];
            object.pins.is_empty() && matches!(object.place, Place::Memory { .. })
        });
        for id in &candidates {
            if self.free_bytes() >= size_bytes {
                return;
            }
            if self.objects[id].is_copy {
                self.metrics.evictions_total += 1;
                self.remove(*id);
            }
        }
        if self
            .pressed_at
            .is_none_or(|at| now.duration_since(at) >= PRESSURE_INTERVAL)
        {
            self.pressed_at = Some(now);
            let links: Vec<u64> = self.links.keys().copied().collect();
            for link in links {
                self.answer(link, StoreReply::Pressure, None);
            }
        }
        let is_settling = self
            .spilled_at
            .is_some_and(|at| now.duration_since(at) < SETTLE_WAIT);
        if self.spilling_bytes == 0 && is_settling {
            return;
        }
        while self.free_bytes() + self.spilling_bytes < size_bytes.max(1)
            || self.spilling_bytes == 0
        {
            let Some(id) = candidates.pop_front() else {
                return;
            };
            let Some(Object {
                place: Place::Memory { arena, .. },
                ..
            }) = self.objects.get(&id)
            else {
                continue;
            };
            // With all of its neighbours, so that the whole arena becomes free.
            let together: Vec<ObjectId> = self.arenas[arena].objects.iter().copied().collect();
            for id in together {
                self.spill(id);
            }
        }
    }

    fn spill(&mut self, id: ObjectId) {
        let Some(object) = self.objects.get_mut(&id) else {
            return;
        };
        let Place::Memory { arena, offset } = object.place else {
            return;
        };
        if !object.pins.is_empty() {
            return;
        }
        let on_disk = self.metrics.spilled_bytes + self.spilling_bytes + object.size_bytes;
        if on_disk > self.limits.spill_bytes {
            let limit = self.limits.spill_bytes;
            self.disk_problem = Some(format!(
                "{on_disk} bytes would be there, the limit is {limit}"
            ));
            return;
        }
        object.place = Place::Spilling { arena, offset };
        self.spilling_bytes += object.size_bytes;
        let block = Block {
            memory: self.arenas[&arena].memory.clone(),
            offset,
            size_bytes: object.size_bytes,
        };
        self.actions.push(Action::Spill(id, block));
    }

    /// An object is on disk now, or is not.
    pub(crate) fn spilled(
        &mut self,
        id: ObjectId,
        result: Result<blake3::Hash, String>,
        now: Instant,
    ) {
        let Some(object) = self.objects.get_mut(&id) else {
            return;
        };
        let Place::Spilling { arena, offset } = object.place else {
            return;
        };
        let size_bytes = object.size_bytes;
        self.spilling_bytes -= size_bytes;
        match result {
            Ok(digest) if object.pins.is_empty() && !object.is_freed => {
                object.place = Place::Disk(digest);
                self.spilled_at = Some(now);
                self.disk_problem = None;
                self.metrics.spills_total += 1;
                self.metrics.spilled_objects += 1;
                self.metrics.spilled_bytes += size_bytes;
                self.give_back(arena, offset, id, size_bytes);
            }
            // Somebody reads it again, or nobody ever will.
            Ok(_) => {
                object.place = Place::Memory { arena, offset };
                self.actions.push(Action::Remove(id));
                self.settle_freed(id);
            }
            Err(reason) => {
                tracing::warn!(%id, reason, "cannot move an object to disk");
                object.place = Place::Memory { arena, offset };
                self.disk_problem = Some(reason);
                self.settle_freed(id);
            }
        }
    }

    /// An object has come from disk or from another node, or will not.
    pub(crate) fn loaded(&mut self, id: ObjectId, result: Result<(), ObjectError>) {
        let Some(object) = self.objects.get_mut(&id) else {
            return;
        };
        let size_bytes = object.size_bytes;
        let Place::Loading {
            arena,
            offset,
            source,
        } = &object.place
        else {
            return;
        };
        let (arena, offset, source) = (*arena, *offset, source.clone());
        if let Source::Disk(_) = source {
            self.off_disk(size_bytes);
            self.actions.push(Action::Remove(id));
        }
        let Some(object) = self.objects.get_mut(&id) else {
            return;
        };
        object.place = Place::Memory { arena, offset };
        let openers = std::mem::take(&mut object.openers);
        match result {
            Ok(()) => {
                match source {
                    Source::Disk(_) => self.metrics.restores_total += 1,
                    Source::Peer(_) => {
                        self.metrics.fetches_total += 1;
                        self.metrics.fetched_bytes_total += size_bytes;
                    }
                }
                for opener in openers {
                    self.give(opener, id);
                }
                self.settle_freed(id);
            }
            Err(error) => {
                if let Source::Disk(_) = source {
                    self.metrics.corrupt_total += 1;
                }
                for opener in openers {
                    self.refuse(opener, error.clone());
                }
                self.remove(id);
            }
        }
    }

    fn fail(&mut self, need: &Need) {
        self.metrics.refusals_total += 1;
        let node = self.limits.node.clone();
        let error = match &self.disk_problem {
            Some(reason) => ObjectError::DiskFull {
                node,
                reason: reason.clone(),
            },
            None => ObjectError::StoreFull {
                node,
                needed_bytes: need.size_bytes,
                used_bytes: self.metrics.used_bytes,
                limit_bytes: self.limits.memory_bytes,
            },
        };
        match need.what {
            Needed::Arena { link, request } => {
                self.answer(link, StoreReply::Refused { request, error }, None);
            }
            Needed::Load(id) => {
                let Some(object) = self.objects.get_mut(&id) else {
                    return;
                };
                let openers = std::mem::take(&mut object.openers);
                match &object.place {
                    // It stays where it is, for who asks later.
                    Place::Waiting(Source::Disk(digest)) => object.place = Place::Disk(*digest),
                    _ => self.remove(id),
                }
                for opener in openers {
                    self.refuse(opener, error.clone());
                }
            }
        }
    }

    /// Drops what jobs left behind that ended elsewhere.
    pub(crate) fn sweep(&mut self, now: Instant) {
        for link in self.links.values() {
            self.seen.insert(link.job, now);
        }
        let ended: Vec<JobId> = self
            .seen
            .iter()
            .filter(|(_, seen)| now.duration_since(**seen) > JOB_IDLE_MAX)
            .map(|(job, _)| *job)
            .collect();
        for job in ended {
            self.seen.remove(&job);
            let objects: Vec<ObjectId> = self
                .objects
                .iter()
                .filter(|(_, object)| object.job == job)
                .map(|(id, _)| *id)
                .collect();
            for id in objects {
                self.free(id, job);
            }
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
