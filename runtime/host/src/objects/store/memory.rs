//! The arenas that this process writes in, and the blocks that it has written.
//!
//! Invariants:
//! 1. A block is free again once the agent has given it back and no view of it is left here; never
//!    before.
//! 2. Only an arena without blocks is returned to the agent.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mobula_core::arena::Arena;
use mobula_core::object::ObjectId;

use super::super::mapping::Mapping;

/// Where bytes are, and in which mapping.
pub(super) struct Range {
    pub(super) mapping: Arc<Mapping>,
    pub(super) arena: u64,
    pub(super) offset: u64,
    pub(super) size_bytes: u64,
}

struct OwnArena {
    mapping: Arc<Mapping>,
    blocks: Arena,
}

struct Block {
    arena: u64,
    offset: u64,
    size_bytes: u64,
    views: usize,
    /// Nobody refers to the object any more: the agent gives it back as soon as nobody reads it.
    is_freed: bool,
    /// The agent has given it back, and views of it are left.
    is_reclaimed: bool,
}

/// The memory of a process that it writes in itself.
#[derive(Default)]
pub(super) struct OwnMemory {
    arenas: BTreeMap<u64, OwnArena>,
    blocks: HashMap<ObjectId, Block>,
}

impl OwnMemory {
    /// Takes in an arena that the agent has granted.
    pub(super) fn add(&mut self, arena: u64, mapping: Arc<Mapping>, size_bytes: u64) {
        let blocks = Arena::new(size_bytes);
        self.arenas.insert(arena, OwnArena { mapping, blocks });
    }

    /// The mapping of an arena of this process.
    pub(super) fn mapping(&self, arena: u64) -> Option<Arc<Mapping>> {
        self.arenas.get(&arena).map(|own| Arc::clone(&own.mapping))
    }

    /// Room for a new block, if an arena has it.
    pub(super) fn allocate(&mut self, size_bytes: u64) -> Option<Range> {
        self.arenas.iter_mut().find_map(|(arena, own)| {
            let offset = own.blocks.allocate(size_bytes)?;
            Some(Range {
                mapping: Arc::clone(&own.mapping),
                arena: *arena,
                offset,
                size_bytes,
            })
        })
    }

    /// An allocated range becomes no object after all.
    pub(super) fn give_back(&mut self, range: &Range) {
        self.free(range.arena, range.offset, range.size_bytes);
    }

    /// An allocated range is `object` from now on.
    pub(super) fn publish(&mut self, object: ObjectId, range: &Range) {
        let block = Block {
            arena: range.arena,
            offset: range.offset,
            size_bytes: range.size_bytes,
            views: 0,
            is_freed: false,
            is_reclaimed: false,
        };
        self.blocks.insert(object, block);
    }

    /// Where an object is that was written here and is still there; it stays until
    /// [`view_dropped`](OwnMemory::view_dropped).
    pub(super) fn view(&mut self, object: ObjectId) -> Option<Range> {
        let block = self.blocks.get_mut(&object)?;
        if block.is_reclaimed {
            return None;
        }
        let mapping = Arc::clone(&self.arenas.get(&block.arena)?.mapping);
        block.views += 1;
        Some(Range {
            mapping,
            arena: block.arena,
            offset: block.offset,
            size_bytes: block.size_bytes,
        })
    }

    /// Nobody refers to an object any more, of which the agent is told.
    pub(super) fn freed(&mut self, object: ObjectId) {
        if let Some(block) = self.blocks.get_mut(&object) {
            block.is_freed = true;
        }
    }

    /// Whether room for a block is on its way: one of its size is freed, nobody looks at it here,
    /// and the agent has only to say so.
    pub(super) fn is_room_coming(&self, size_bytes: u64) -> bool {
        self.blocks
            .values()
            .any(|block| block.is_freed && block.views == 0 && block.size_bytes >= size_bytes)
    }

    /// One view of an object is over; true if its memory is free now.
    pub(super) fn view_dropped(&mut self, object: ObjectId) -> bool {
        let Some(block) = self.blocks.get_mut(&object) else {
            return false;
        };
        block.views -= 1;
        let is_over = block.views == 0 && block.is_reclaimed;
        is_over && self.release(object)
    }

    /// The agent has given an object's block back; true if its memory is free now.
    pub(super) fn reclaimed(&mut self, object: ObjectId) -> bool {
        let Some(block) = self.blocks.get_mut(&object) else {
            return false;
        };
        block.is_reclaimed = true;
        block.views == 0 && self.release(object)
    }

    fn release(&mut self, object: ObjectId) -> bool {
        let Some(block) = self.blocks.remove(&object) else {
            return false;
        };
        self.free(block.arena, block.offset, block.size_bytes);
        true
    }

    fn free(&mut self, arena: u64, offset: u64, size_bytes: u64) {
        if let Some(own) = self.arenas.get_mut(&arena)
            && let Err(error) = own.blocks.release(offset, size_bytes)
        {
            tracing::error!(arena, offset, %error, "a block of shared memory is lost");
        }
    }

    /// Lets go of arenas without blocks; answers which.
    pub(super) fn take_empty(&mut self) -> Vec<u64> {
        let empty: Vec<u64> = self
            .arenas
            .iter()
            .filter(|(_, own)| own.blocks.is_empty())
            .map(|(arena, _)| *arena)
            .collect();
        for arena in &empty {
            self.arenas.remove(arena);
        }
        empty
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::object::ProcessId;

    #[test]
    fn a_block_is_free_once_it_is_given_back_and_nobody_looks_at_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mapping = Mapping::writable(&file.into(), 4096).unwrap();
        let mut memory = OwnMemory::default();
        memory.add(5, mapping, 4096);
        let object = |sequence| ObjectId {
            owner: ProcessId(1),
            sequence,
        };
        let unwanted = memory.allocate(4096).unwrap();
        assert!(memory.allocate(1).is_none());
        memory.give_back(&unwanted);
        let range = memory.allocate(4096).unwrap();
        memory.publish(object(1), &range);
        assert!(memory.allocate(1).is_none());
        assert!(memory.take_empty().is_empty());
        assert!(!memory.is_room_coming(1));
        memory.freed(object(1));
        assert!(memory.is_room_coming(4096) && !memory.is_room_coming(4097));
        assert_eq!(memory.view(object(1)).unwrap().offset, range.offset);
        assert!(!memory.is_room_coming(1), "it is looked at");
        assert!(!memory.reclaimed(object(1)), "it is looked at");
        assert!(
            memory.view(object(1)).is_none(),
            "it is the agent's no more"
        );
        assert!(memory.allocate(1).is_none());
        assert!(memory.view_dropped(object(1)));
        assert!(!memory.view_dropped(object(1)));
        assert_eq!(memory.take_empty(), [5]);
        assert!(memory.mapping(5).is_none());
    }
}
