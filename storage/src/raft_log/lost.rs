//! What a member's log was found to lack, noted beside the log for good.

use super::{RaftLog, RaftLogError, key};
use crate::engine::Engine;

/// The log of a member ends before an entry that the member has acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "its log ends at entry {last_index}, and it has acknowledged entry {acknowledged_index} to head \
     {leader}"
)]
pub struct LostEntries {
    /// The last entry that the log holds.
    pub last_index: u64,
    /// An entry behind it that the member has acknowledged.
    pub acknowledged_index: u64,
    /// The Raft id of the leader to which it has.
    pub leader: u64,
}

impl LostEntries {
    /// Persisted: the order of the numbers never changes.
    fn numbers(self) -> [u64; 3] {
        [self.last_index, self.acknowledged_index, self.leader]
    }

    fn from_numbers([last_index, acknowledged_index, leader]: [u64; 3]) -> Self {
        LostEntries {
            last_index,
            acknowledged_index,
            leader,
        }
    }
}

impl<E: Engine> RaftLog<E> {
    /// What this log was once found to lack; such a member must not serve again.
    pub fn lost_entries(&self) -> Result<Option<LostEntries>, RaftLogError> {
        let noted = self.note(key::LOST, "the note of lost entries")?;
        Ok(noted.map(LostEntries::from_numbers))
    }

    /// Notes for good that this log lacks what its member has acknowledged.
    pub fn note_lost_entries(&self, lost: LostEntries) -> Result<(), RaftLogError> {
        self.write_note(key::LOST, lost.numbers())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Column, Durability, MemoryEngine, WriteBatch};

    #[test]
    fn lost_entries_are_noted_for_good_and_a_damaged_note_is_no_log_without_one() {
        let engine = MemoryEngine::new();
        let log = RaftLog::open(engine.clone()).unwrap();
        assert_eq!(log.lost_entries().unwrap(), None);
        let lost = LostEntries {
            last_index: 7,
            acknowledged_index: 9,
            leader: 2,
        };
        log.note_lost_entries(lost).unwrap();
        engine.crash();
        let again = RaftLog::open(engine.clone()).unwrap();
        assert_eq!(again.lost_entries().unwrap(), Some(lost));

        let mut batch = WriteBatch::new();
        batch.put(Column::Meta, key::LOST, vec![0; 23]);
        engine.write(batch, Durability::Synced).unwrap();
        let said = again.lost_entries().unwrap_err().to_string();
        assert!(said.contains("has 23 bytes and not 24"), "{said}");
    }
}
