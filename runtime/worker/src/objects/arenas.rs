//! The node's memory for objects, in arenas: who writes in each, what lies in it, who can see it.
//!
//! An arena is one file in memory. A host writes in arenas that it was granted and keeps the books
//! of their blocks itself; the agent does so for the arenas that it fills with what it loads.
//!
//! Invariants:
//! 1. Memory is counted in whole arenas, as it is taken from the system, and never exceeds the
//!    limit.
//! 2. An arena that a host writes in goes when the host returns it; any other with its last object.
//! 3. A link gets a descriptor of an arena once.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;

use mobula_core::arena::Arena as Blocks;
use mobula_core::id::JobId;
use mobula_core::object::ObjectId;

use super::memory::{Block, Memory};

const PAGE_BYTES: u64 = 4096;

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) arena: u64,
    pub(crate) offset: u64,
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

/// An arena that is gone, and the links that have it mapped.
#[derive(Debug)]
pub(crate) struct Dropped {
    pub(crate) arena: u64,
    pub(crate) known: BTreeSet<u64>,
}

/// What became of a block that was given back.
#[derive(Debug)]
pub(crate) enum GivenBack {
    /// The host behind this link may use it again.
    ToHost(u64),
    /// Its arena has other objects.
    Kept,
    /// It was the last of its arena.
    Last(Dropped),
}

/// A new arena for a host to write in.
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) arena: u64,
    pub(crate) size_bytes: u64,
    pub(crate) descriptor: OwnedFd,
}

/// All arenas of a node.
#[derive(Debug)]
pub(crate) struct Arenas {
    limit_bytes: u64,
    used_bytes: u64,
    arenas: BTreeMap<u64, Arena>,
    last_arena: u64,
}

impl Arenas {
    pub(crate) fn new(limit_bytes: u64) -> Arenas {
        Arenas {
            limit_bytes,
            used_bytes: 0,
            arenas: BTreeMap::new(),
            last_arena: 0,
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.arenas.len()
    }

    pub(crate) fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        self.limit_bytes - self.used_bytes
    }

    /// An arena for the host behind `link`: of `usual_bytes`, or of what it needs where that is
    /// more, or where there is no more; `None` if there is not that much either.
    pub(crate) fn grant(
        &mut self,
        job: JobId,
        link: u64,
        needed_bytes: u64,
        usual_bytes: u64,
    ) -> Option<Granted> {
        let arena = self.make(job, needed_bytes, usual_bytes, |_| Writer::Host(link))?;
        let entry = &self.arenas[&arena];
        match entry.memory.writable() {
            Ok(descriptor) => Some(Granted {
                arena,
                size_bytes: entry.size_bytes,
                descriptor,
            }),
            Err(error) => {
                tracing::error!(%error, "cannot hand out shared memory");
                self.remove(arena);
                None
            }
        }
    }

    /// A block for `object` in one of the agent's own arenas.
    pub(crate) fn allocate(
        &mut self,
        job: JobId,
        object: ObjectId,
        size_bytes: u64,
        usual_bytes: u64,
    ) -> Option<Spot> {
        let in_use = self.arenas.iter_mut().find_map(|(name, arena)| {
            let Writer::Agent(blocks) = &mut arena.writer else {
                return None;
            };
            let offset = (arena.job == job).then(|| blocks.allocate(size_bytes))??;
            Some(Spot {
                arena: *name,
                offset,
            })
        });
        let spot = match in_use {
            Some(spot) => spot,
            None => {
                let arena = self.make(job, size_bytes, usual_bytes, |arena_bytes| {
                    Writer::Agent(Blocks::new(arena_bytes))
                })?;
                let Writer::Agent(blocks) = &mut self.arenas.get_mut(&arena)?.writer else {
                    unreachable!("it was made for the agent just now");
                };
                let offset = blocks.allocate(size_bytes)?;
                Spot { arena, offset }
            }
        };
        self.arenas.get_mut(&spot.arena)?.objects.insert(object);
        Some(spot)
    }

    fn make(
        &mut self,
        job: JobId,
        needed_bytes: u64,
        usual_bytes: u64,
        writer: impl FnOnce(u64) -> Writer,
    ) -> Option<u64> {
        let needed_bytes = needed_bytes.max(1).checked_next_multiple_of(PAGE_BYTES)?;
        let free_bytes = self.free_bytes();
        let size_bytes = match needed_bytes.max(usual_bytes) {
            wanted if wanted <= free_bytes => wanted,
            _ if needed_bytes <= free_bytes => needed_bytes,
            _ => return None,
        };
        let memory = match Memory::new(size_bytes) {
            Ok(memory) => memory,
            Err(error) => {
                tracing::error!(%error, size_bytes, "cannot make shared memory");
                return None;
            }
        };
        self.last_arena += 1;
        self.used_bytes += size_bytes;
        self.arenas.insert(
            self.last_arena,
            Arena {
                job,
                memory,
                size_bytes,
                writer: writer(size_bytes),
                objects: BTreeSet::new(),
                known: BTreeSet::new(),
            },
        );
        Some(self.last_arena)
    }

    /// Enters an object that the host behind `link` says it has written; false if it may not have.
    pub(crate) fn publish(
        &mut self,
        link: u64,
        object: ObjectId,
        spot: Spot,
        size_bytes: u64,
    ) -> bool {
        let Some(arena) = self.arenas.get_mut(&spot.arena) else {
            return false;
        };
        let end = spot.offset.checked_add(size_bytes);
        let is_inside = end.is_some_and(|end| end <= arena.size_bytes);
        let is_writer = matches!(arena.writer, Writer::Host(writer) if writer == link);
        is_inside && is_writer && arena.objects.insert(object)
    }

    /// The memory of a block.
    pub(crate) fn block(&self, spot: Spot, size_bytes: u64) -> Block {
        Block {
            memory: self.arenas[&spot.arena].memory.clone(),
            offset: spot.offset,
            size_bytes,
        }
    }

    /// What lies in an arena.
    pub(crate) fn objects_in(&self, arena: u64) -> Vec<ObjectId> {
        self.arenas[&arena].objects.iter().copied().collect()
    }

    /// Lets a link read in an arena: its size and a descriptor, if the link has none yet.
    pub(crate) fn show(&mut self, arena: u64, link: u64) -> io::Result<Option<(u64, OwnedFd)>> {
        let arena = self.arenas.get_mut(&arena).expect("objects lie in arenas");
        // A writer has its own arenas mapped.
        let is_writer = matches!(arena.writer, Writer::Host(writer) if writer == link);
        let is_new = !is_writer && !arena.known.contains(&link);
        let shown = match is_new {
            true => Some((arena.size_bytes, arena.memory.readable()?)),
            false => None,
        };
        arena.known.insert(link);
        Ok(shown)
    }

    /// A block is its writer's again.
    pub(crate) fn give_back(&mut self, spot: Spot, object: ObjectId, size_bytes: u64) -> GivenBack {
        let Some(arena) = self.arenas.get_mut(&spot.arena) else {
            return GivenBack::Kept;
        };
        arena.objects.remove(&object);
        match &mut arena.writer {
            Writer::Host(link) => return GivenBack::ToHost(*link),
            Writer::Agent(blocks) => {
                if let Err(error) = blocks.release(spot.offset, size_bytes) {
                    tracing::error!(%object, %error, "a block of shared memory is lost");
                }
            }
            Writer::Gone => {}
        }
        if !arena.objects.is_empty() {
            return GivenBack::Kept;
        }
        self.remove(spot.arena)
            .map_or(GivenBack::Kept, GivenBack::Last)
    }

    /// The host behind `link` does not want an arena any more; `None` if it may not say so.
    pub(crate) fn take_back(&mut self, link: u64, arena: u64) -> Option<Dropped> {
        let entry = self.arenas.get(&arena)?;
        let is_writer = matches!(entry.writer, Writer::Host(writer) if writer == link);
        match is_writer && entry.objects.is_empty() {
            true => self.remove(arena),
            false => None,
        }
    }

    /// The host behind `link` has ended: its empty arenas go.
    pub(crate) fn unlinked(&mut self, link: u64) -> Vec<Dropped> {
        let mut empty = Vec::new();
        for (name, arena) in &mut self.arenas {
            arena.known.remove(&link);
            if matches!(arena.writer, Writer::Host(writer) if writer == link) {
                arena.writer = Writer::Gone;
                if arena.objects.is_empty() {
                    empty.push(*name);
                }
            }
        }
        empty
            .into_iter()
            .filter_map(|arena| self.remove(arena))
            .collect()
    }

    fn remove(&mut self, name: u64) -> Option<Dropped> {
        let arena = self.arenas.remove(&name)?;
        self.used_bytes -= arena.size_bytes;
        Some(Dropped {
            arena: name,
            known: arena.known,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::object::ProcessId;

    const JOB: JobId = JobId(1);

    fn id(sequence: u64) -> ObjectId {
        ObjectId {
            owner: ProcessId(1),
            sequence,
        }
    }

    #[test]
    fn memory_is_granted_within_the_limit_and_comes_back() {
        let mut arenas = Arenas::new(3 * PAGE_BYTES);
        let usual = arenas.grant(JOB, 7, 1, 2 * PAGE_BYTES).unwrap();
        assert_eq!(usual.size_bytes, 2 * PAGE_BYTES);
        let less = arenas.grant(JOB, 7, 1, 2 * PAGE_BYTES).unwrap();
        assert_eq!(less.size_bytes, PAGE_BYTES, "what is left will do");
        assert!(arenas.grant(JOB, 7, 1, 1).is_none());
        assert!(arenas.take_back(8, less.arena).is_none(), "another's");
        assert!(arenas.take_back(7, less.arena).is_some());
        let spot = Spot {
            arena: usual.arena,
            offset: 64,
        };
        assert!(arenas.publish(7, id(1), spot, 64));
        assert!(arenas.take_back(7, usual.arena).is_none(), "not empty");
        assert!(arenas.unlinked(7).is_empty(), "what is in it stays");
        let GivenBack::Last(dropped) = arenas.give_back(spot, id(1), 64) else {
            panic!("nobody writes in it any more");
        };
        assert_eq!(dropped.arena, usual.arena);
        assert_eq!((arenas.used_bytes(), arenas.count()), (0, 0));
    }

    #[test]
    fn only_a_writer_publishes_and_only_within_its_arena() {
        let mut arenas = Arenas::new(4 * PAGE_BYTES);
        let arena = arenas.grant(JOB, 7, 1, PAGE_BYTES).unwrap().arena;
        let spot = |arena, offset| Spot { arena, offset };
        assert!(!arenas.publish(7, id(1), spot(arena, PAGE_BYTES), 1));
        assert!(!arenas.publish(7, id(1), spot(arena, u64::MAX), 1));
        assert!(!arenas.publish(7, id(1), spot(arena + 1, 0), 1));
        assert!(!arenas.publish(8, id(1), spot(arena, 0), 1));
        assert!(arenas.publish(7, id(1), spot(arena, 0), PAGE_BYTES));
        assert!(arenas.show(arena, 7).unwrap().is_none(), "its own");
        assert!(arenas.show(arena, 8).unwrap().is_some());
        assert!(arenas.show(arena, 8).unwrap().is_none(), "once");
        assert!(matches!(
            arenas.give_back(spot(arena, 0), id(1), PAGE_BYTES),
            GivenBack::ToHost(7)
        ));
    }

    #[test]
    fn the_agents_own_arenas_are_of_one_job_and_go_when_they_are_empty() {
        let mut arenas = Arenas::new(16 * PAGE_BYTES);
        let first = arenas.allocate(JOB, id(1), 100, 2 * PAGE_BYTES).unwrap();
        let second = arenas.allocate(JOB, id(2), 100, 2 * PAGE_BYTES).unwrap();
        assert_eq!(first.arena, second.arena);
        let other = arenas
            .allocate(JobId(2), id(3), 100, 2 * PAGE_BYTES)
            .unwrap();
        assert_ne!(first.arena, other.arena, "another job sees nothing of it");
        assert_eq!(arenas.objects_in(first.arena), [id(1), id(2)]);
        assert!(matches!(
            arenas.give_back(first, id(1), 100),
            GivenBack::Kept
        ));
        assert!(matches!(
            arenas.give_back(second, id(2), 100),
            GivenBack::Last(_)
        ));
        assert_eq!(arenas.used_bytes(), 2 * PAGE_BYTES);
    }
}
