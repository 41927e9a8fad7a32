//! That a leader's log was found to be another one than what is committed in a member's, noted beside
//! the log.

use std::fmt::{self, Display};

use super::{RaftLog, RaftLogError, key};
use crate::engine::Engine;

/// A leader has another entry, or none, where a member's log holds a committed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommittedConflict {
    /// The index of the member's committed entry, the first one known of.
    pub index: u64,
    /// The term of that entry.
    pub own_term: u64,
    /// The Raft id of the leader.
    pub leader: u64,
    /// The term in which it leads.
    pub term: u64,
    /// The term of the leader's entry at the same index; 0 where its log does not reach so far.
    pub leaders_entry_term: u64,
    /// All that the member knew to be committed, which the note is about.
    pub committed: u64,
}

impl Display for CommittedConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "entry {} is committed in its log with term {}, and head {}, the leader of term {}, has ",
            self.index, self.own_term, self.leader, self.term
        )?;
        match self.leaders_entry_term {
            0 => f.write_str("none there"),
            term => write!(f, "one of term {term} there"),
        }
    }
}

impl std::error::Error for CommittedConflict {}

impl CommittedConflict {
    /// Persisted: the order of the numbers never changes.
    fn numbers(self) -> [u64; 6] {
        [
            self.index,
            self.own_term,
            self.leader,
            self.term,
            self.leaders_entry_term,
            self.committed,
        ]
    }

    fn from_numbers(numbers: [u64; 6]) -> Self {
        let [index, own_term, leader, term, leaders_entry_term, committed] = numbers;
        CommittedConflict {
            index,
            own_term,
            leader,
            term,
            leaders_entry_term,
            committed,
        }
    }
}

impl<E: Engine> RaftLog<E> {
    /// The last leader that was found to have another log than what is committed in this one. It is
    /// about [`CommittedConflict::committed`]: a log in which more is committed since then has followed
    /// a leader that holds all of that, and the note says nothing any more.
    pub fn committed_conflict(&self) -> Result<Option<CommittedConflict>, RaftLogError> {
        let noted = self.note(key::CONFLICT, "the note of a conflict with a leader")?;
        Ok(noted.map(CommittedConflict::from_numbers))
    }

    /// Notes that a leader has another log than what is committed in this one.
    pub fn note_committed_conflict(&self, conflict: CommittedConflict) -> Result<(), RaftLogError> {
        self.write_note(key::CONFLICT, conflict.numbers())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Column, Durability, MemoryEngine, WriteBatch};

    const CONFLICT: CommittedConflict = CommittedConflict {
        index: 21,
        own_term: 5,
        leader: 2,
        term: 9,
        leaders_entry_term: 8,
        committed: 50,
    };

    #[test]
    fn a_conflict_is_noted_across_a_crash_and_a_damaged_note_is_no_log_without_one() {
        let engine = MemoryEngine::new();
        let log = RaftLog::open(engine.clone()).unwrap();
        assert_eq!(log.committed_conflict().unwrap(), None);
        log.note_committed_conflict(CONFLICT).unwrap();
        engine.crash();
        let again = RaftLog::open(engine.clone()).unwrap();
        assert_eq!(again.committed_conflict().unwrap(), Some(CONFLICT));

        let mut batch = WriteBatch::new();
        batch.put(Column::Meta, key::CONFLICT, vec![0; 47]);
        engine.write(batch, Durability::Synced).unwrap();
        let said = again.committed_conflict().unwrap_err().to_string();
        assert!(said.contains("has 47 bytes and not 48"), "{said}");
    }

    #[test]
    fn it_says_whether_the_leader_has_another_entry_or_none() {
        assert_eq!(
            CONFLICT.to_string(),
            "entry 21 is committed in its log with term 5, and head 2, the leader of term 9, has one of \
             term 8 there"
        );
        let none = CommittedConflict {
            leaders_entry_term: 0,
            ..CONFLICT
        };
        assert!(none.to_string().ends_with("has none there"), "{none}");
    }
}
