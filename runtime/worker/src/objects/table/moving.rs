//! Objects on their way to disk, and from disk or another node into memory.
//!
//! Invariants:
//! 1. An object is in memory until all of it is on disk, and on disk until all of it is in memory:
//!    a move that fails loses nothing but the time.
//! 2. What is read again while it goes to disk stays in memory.

use std::time::Instant;

use mobula_core::object::{ObjectError, ObjectId};

use super::super::spill::OnDisk;
use super::{Action, Place, Source, Table};

/// The smallest arena that the agent makes for what it loads itself.
const OWN_ARENA_BYTES: u64 = 8 << 20;

impl Table {
    /// Makes a block for an object that waits and has it loaded; false if there is no memory.
    pub(super) fn start_loading(&mut self, id: ObjectId) -> bool {
        let Some(object) = self.objects.get_mut(&id) else {
            return true;
        };
        let Place::Waiting(source) = &object.place else {
            return true;
        };
        let (source, job, size_bytes) = (source.clone(), object.job, object.size_bytes);
        let usual_bytes = OWN_ARENA_BYTES.min(self.limits.arena_bytes);
        let Some(spot) = self.arenas.allocate(job, id, size_bytes, usual_bytes) else {
            return false;
        };
        let block = self.arenas.block(spot, size_bytes);
        self.actions.push(match &source {
            Source::Disk(on_disk) => Action::Restore(id, block, *on_disk),
            Source::Peer(agent) => Action::Fetch(id, job, block, agent.clone()),
        });
        object.place = Place::Loading(spot, source);
        true
    }

    /// Moves an object to disk, if nobody reads it and the disk may take it.
    pub(super) fn spill(&mut self, id: ObjectId) {
        let Some(object) = self.objects.get_mut(&id) else {
            return;
        };
        let Place::Memory(spot) = object.place else {
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
        object.place = Place::Spilling(spot);
        self.spilling_bytes += object.size_bytes;
        let block = self.arenas.block(spot, object.size_bytes);
        self.actions.push(Action::Spill(id, block));
    }

    /// An object is on disk now, or is not.
    pub(crate) fn spilled(&mut self, id: ObjectId, result: Result<OnDisk, String>, now: Instant) {
        let Some(object) = self.objects.get_mut(&id) else {
            return;
        };
        let Place::Spilling(spot) = object.place else {
            return;
        };
        let size_bytes = object.size_bytes;
        self.spilling_bytes -= size_bytes;
        match result {
            Ok(on_disk) if object.pins.is_empty() && !object.is_freed => {
                object.place = Place::Disk(on_disk);
                self.spilled_at = Some(now);
                self.disk_problem = None;
                self.metrics.spills_total += 1;
                self.metrics.spilled_objects += 1;
                self.metrics.spilled_bytes += size_bytes;
                self.give_back(spot, id, size_bytes);
            }
            // Somebody reads it again, or nobody ever will.
            Ok(on_disk) => {
                object.place = Place::Memory(spot);
                self.actions.push(Action::Remove(on_disk));
                self.settle_freed(id);
            }
            Err(reason) => {
                tracing::warn!(%id, reason, "cannot move an object to disk");
                object.place = Place::Memory(spot);
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
        let Place::Loading(spot, source) = &object.place else {
            return;
        };
        let (spot, on_disk) = match source {
            Source::Disk(on_disk) => (*spot, Some(*on_disk)),
            Source::Peer(_) => (*spot, None),
        };
        object.place = Place::Memory(spot);
        let openers = std::mem::take(&mut object.openers);
        if let Some(on_disk) = on_disk {
            self.off_disk(size_bytes, on_disk);
        }
        match result {
            Ok(()) => {
                if on_disk.is_some() {
                    self.metrics.restores_total += 1;
                } else {
                    self.metrics.fetches_total += 1;
                    self.metrics.fetched_bytes_total += size_bytes;
                }
                for opener in openers {
                    self.give(opener, id);
                }
                self.settle_freed(id);
            }
            Err(error) => {
                if on_disk.is_some() {
                    self.metrics.corrupt_total += 1;
                }
                for opener in openers {
                    self.refuse(opener, error.clone());
                }
                self.remove(id);
            }
        }
    }

    pub(super) fn off_disk(&mut self, size_bytes: u64, on_disk: OnDisk) {
        self.actions.push(Action::Remove(on_disk));
        self.metrics.spilled_objects -= 1;
        self.metrics.spilled_bytes -= size_bytes;
    }
}
