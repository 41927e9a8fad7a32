//! An object from its publication to its end: who reads it, and when it is gone.

use std::time::{Duration, Instant};

use mobula_core::id::JobId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_wire::store::StoreReply;

use super::super::arenas::{GivenBack, Spot};
use super::room::Needed;
use super::{Object, Opener, PEERS, Place, Source, Table};

/// Objects of a job that has had no process on this node, and was not asked for, for so long are
/// dropped. Only for what an agent that was not connected missed: it is told when a job ends.
const JOB_IDLE_MAX: Duration = Duration::from_secs(600);

/// How long an object may be asked for before its writer's word of it has arrived: the word and the
/// question come on sockets of two processes, on a machine that may be busy. Whoever asks for what is
/// gone although its writer lives waits as long.
const PUBLISH_WAIT: Duration = Duration::from_secs(2);

/// Questions that wait for such a word.
const EARLY_MAX: usize = 4096;

/// A question for an object that is not here yet.
#[derive(Debug)]
pub(super) struct Early {
    object: ObjectId,
    job: JobId,
    opener: Opener,
    deadline: Instant,
}

impl Table {
    /// A host says that it has written an object; false if that cannot be.
    pub(super) fn publish(
        &mut self,
        link: u64,
        id: ObjectId,
        spot: Spot,
        size_bytes: u64,
        is_owned_here: bool,
    ) -> bool {
        let Some(host) = self.links.get(&link) else {
            return true;
        };
        let job = host.job;
        let is_new = id.owner == host.process && !self.objects.contains_key(&id);
        if !is_new || !self.arenas.publish(link, id, spot, size_bytes) {
            return false;
        }
        let mut object = Object::new(job, size_bytes, Place::Memory(spot));
        object.is_owned_here = is_owned_here;
        self.insert(id, object);
        let (now_here, others) = std::mem::take(&mut self.early)
            .into_iter()
            .partition(|early: &Early| early.object == id && early.job == job);
        self.early = others;
        for early in now_here {
            self.give(early.opener, id);
        }
        true
    }

    /// Whether an object may be on its way: its writer lives here.
    fn may_come(&self, id: ObjectId, job: JobId) -> bool {
        self.early.len() < EARLY_MAX
            && self
                .links
                .values()
                .any(|link| link.process == id.owner && link.job == job)
    }

    /// Refuses those whose object has not come in time, or will not, for its writer has ended.
    pub(super) fn refuse_early(&mut self, now: Option<Instant>, ended: Option<ProcessId>) {
        let (over, others) =
            std::mem::take(&mut self.early)
                .into_iter()
                .partition(|early: &Early| {
                    now.is_some_and(|now| now >= early.deadline)
                        || ended == Some(early.object.owner)
                });
        self.early = others;
        for early in over {
            let lost = self.not_here(early.object);
            self.refuse(early.opener, lost);
        }
    }

    /// Nobody behind `link` waits any more.
    pub(super) fn forget_early(&mut self, link: u64) {
        self.early.retain(
            |early| !matches!(early.opener, Opener::Host { link: other, .. } if other == link),
        );
    }

    fn not_here(&self, object: ObjectId) -> ObjectError {
        ObjectError::Lost {
            object,
            reason: format!("{} does not have it any more", self.limits.node),
        }
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
                if self.may_come(id, job) {
                    self.early.push(Early {
                        object: id,
                        job,
                        opener,
                        deadline: now + PUBLISH_WAIT,
                    });
                    return;
                }
                let lost = self.not_here(id);
                return self.refuse(opener, lost);
            }
            let source = Source::Peer(agent.to_owned());
            let mut object = Object::new(job, size_bytes, Place::Waiting(source));
            object.is_copy = true;
            object.openers.push(opener);
            self.insert(id, object);
            return self.need(size_bytes, Needed::Load(id), now);
        };
        // Another job is told no more than that there is no such object for it.
        if object.job != job || object.is_freed {
            return self.refuse(opener, ObjectError::Freed { object: id });
        }
        match object.place {
            Place::Memory(_) | Place::Spilling(_) => self.give(opener, id),
            Place::Waiting(_) | Place::Loading(..) => object.openers.push(opener),
            Place::Disk(on_disk) => {
                object.place = Place::Waiting(Source::Disk(on_disk));
                object.openers.push(opener);
                let size_bytes = object.size_bytes;
                self.need(size_bytes, Needed::Load(id), now);
            }
        }
    }

    /// Pins an object in memory, and says where it is.
    pub(super) fn give(&mut self, opener: Opener, id: ObjectId) {
        let Some(object) = self.objects.get_mut(&id) else {
            return self.refuse(opener, ObjectError::Freed { object: id });
        };
        let (Place::Memory(spot) | Place::Spilling(spot)) = object.place else {
            unreachable!("only what is in memory is given");
        };
        let size_bytes = object.size_bytes;
        match opener {
            Opener::Peer(answer) => {
                let block = self.arenas.block(spot, size_bytes);
                if answer.send(Ok(block)).is_ok() {
                    *object.pins.entry(PEERS).or_default() += 1;
                    self.metrics.serves_total += 1;
                }
            }
            Opener::Host { link, request } => {
                if !self.links.contains_key(&link) {
                    return;
                }
                let shown = match self.arenas.show(spot.arena, link) {
                    Ok(shown) => shown,
                    Err(error) => {
                        let reason = format!("no descriptor for its memory: {error}");
                        let error = ObjectError::Unavailable { reason };
                        return self.answer(link, StoreReply::Refused { request, error }, None);
                    }
                };
                *object.pins.entry(link).or_default() += 1;
                let (arena_bytes, descriptor) = shown.unzip();
                let answer = StoreReply::Opened {
                    request,
                    arena: spot.arena,
                    offset: spot.offset,
                    size_bytes,
                    arena_bytes,
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
    pub(super) fn settle_freed(&mut self, id: ObjectId) {
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
        let is_moving = matches!(object.place, Place::Spilling(_) | Place::Loading(..));
        if object.pins.is_empty() && !is_moving {
            self.remove(id);
        }
    }

    pub(super) fn remove(&mut self, id: ObjectId) {
        let Some(object) = self.objects.remove(&id) else {
            return;
        };
        self.by_use.remove(&object.last_use);
        self.metrics.objects_bytes -= object.size_bytes;
        match object.place {
            Place::Memory(spot) | Place::Spilling(spot) | Place::Loading(spot, _) => {
                self.give_back(spot, id, object.size_bytes);
            }
            Place::Disk(on_disk) | Place::Waiting(Source::Disk(on_disk)) => {
                self.off_disk(object.size_bytes, on_disk);
            }
            Place::Waiting(Source::Peer(_)) => {}
        }
    }

    /// A block is its writer's again.
    pub(super) fn give_back(&mut self, spot: Spot, id: ObjectId, size_bytes: u64) {
        match self.arenas.give_back(spot, id, size_bytes) {
            GivenBack::ToHost(link) => {
                self.answer(link, StoreReply::Reclaimed { object: id }, None);
            }
            GivenBack::Kept => {}
            GivenBack::Last(dropped) => self.forget(dropped),
        }
    }

    /// A job is over everywhere: its objects go at once, but for those that a process of it still
    /// reads or may still publish; these with its last process.
    pub(crate) fn job_ended(&mut self, job: JobId) {
        self.free_all_of(job);
        if self.links.values().any(|link| link.job == job) {
            self.ended.insert(job);
        } else {
            self.seen.remove(&job);
        }
    }

    /// A link of a job was the last, perhaps.
    pub(super) fn unlinked_from(&mut self, job: JobId) {
        if self.ended.contains(&job) && !self.links.values().any(|link| link.job == job) {
            self.ended.remove(&job);
            self.seen.remove(&job);
            self.free_all_of(job);
        }
    }

    /// Drops what jobs left behind of whose end nobody told.
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
            self.free_all_of(job);
        }
    }

    fn free_all_of(&mut self, job: JobId) {
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
