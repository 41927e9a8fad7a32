//! Requests for memory, and what makes room for them.
//!
//! Invariants:
//! 1. What can never fit is refused at once; everything else after [`MEMORY_WAIT`].
//! 2. Copies are dropped before anything is moved to disk.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mobula_core::object::{ObjectError, ObjectId};
use mobula_wire::store::StoreReply;

use super::super::arenas::Granted;
use super::{Object, Place, Source, Table};

/// How long a request waits for memory: much longer than moving an arena to disk takes.
pub(crate) const MEMORY_WAIT: Duration = Duration::from_secs(10);

/// Requests that wait for memory at a time.
const NEEDS_MAX: usize = 4096;

/// How often hosts are asked to give back empty arenas while something waits.
const PRESSURE_INTERVAL: Duration = Duration::from_millis(20);

/// How long the writers of objects that have just gone to disk may take to use, or to give back,
/// the memory, before more is moved.
const SETTLE_WAIT: Duration = Duration::from_millis(50);

/// A request for memory that waits.
#[derive(Debug)]
pub(super) struct Need {
    pub(super) size_bytes: u64,
    deadline: Instant,
    pub(super) what: Needed,
}

/// What the memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needed {
    Arena { link: u64, request: u64 },
    Load(ObjectId),
}

impl Table {
    /// Whether something waits for what only time may bring.
    pub(crate) fn is_waited_for(&self) -> bool {
        !self.needs.is_empty() || !self.early.is_empty()
    }

    pub(super) fn need(&mut self, size_bytes: u64, what: Needed, now: Instant) {
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
        if !self.early.is_empty() {
            self.refuse_early(Some(now), None);
        }
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
                let usual_bytes = self.limits.arena_bytes;
                let Some(granted) = self.arenas.grant(job, link, need.size_bytes, usual_bytes)
                else {
                    return false;
                };
                let Granted {
                    arena,
                    size_bytes,
                    descriptor,
                } = granted;
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

    /// Drops copies, asks hosts for empty arenas, and moves objects to disk.
    fn make_room(&mut self, size_bytes: u64, now: Instant) {
        let mut candidates: VecDeque<ObjectId> = self.by_use.values().copied().collect();
        candidates.retain(|id| {
            let object = &self.objects[id];
            object.pins.is_empty() && matches!(object.place, Place::Memory(_))
        });
        for id in &candidates {
            if self.arenas.free_bytes() >= size_bytes {
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
        while self.arenas.free_bytes() + self.spilling_bytes < size_bytes.max(1)
            || self.spilling_bytes == 0
        {
            let Some(id) = candidates.pop_front() else {
                return;
            };
            let Some(Object {
                place: Place::Memory(spot),
                ..
            }) = self.objects.get(&id)
            else {
                continue;
            };
            // With all of its neighbours, so that the whole arena becomes free.
            for id in self.arenas.objects_in(spot.arena) {
                self.spill(id);
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
                used_bytes: self.arenas.used_bytes(),
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
                    Place::Waiting(Source::Disk(on_disk)) => object.place = Place::Disk(*on_disk),
                    _ => self.remove(id),
                }
                for opener in openers {
                    self.refuse(opener, error.clone());
                }
            }
        }
    }
}
