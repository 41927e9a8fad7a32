//! What raft itself asks of the log. An error from here makes a `RawNode` useless, so each but the
//! expected ones (compacted, unavailable, no snapshot yet) must end the process.

use raft::eraftpb::{Entry, Snapshot};
use raft::{GetEntriesContext, RaftState, StorageError};

use super::{RaftLog, SnapshotRequest, locked};
use crate::engine::Engine;

impl<E: Engine> raft::Storage for RaftLog<E> {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let position = self.position();
        Ok(RaftState::new(position.hard_state, position.conf_state))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        let position = self.position();
        if low < position.first_index() {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        assert!(
            high <= position.last.index + 1,
            "raft asks for entries below {high}, the last one is {}",
            position.last.index
        );
        Ok(self.read_entries(low, high, max_size.into().unwrap_or(u64::MAX))?)
    }

    fn term(&self, idx: u64) -> raft::Result<u64> {
        let position = self.position();
        if idx == position.last.index {
            return Ok(position.last.term);
        }
        if idx == position.truncated.index {
            return Ok(position.truncated.term);
        }
        if idx < position.truncated.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if idx > position.last.index {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        Ok(self.entry(idx)?.term)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(locked(&self.shared.position).first_index())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(locked(&self.shared.position).last.index)
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let truncated = self.truncated();
        let mut slot = locked(&self.shared.snapshots);
        if let Some(snapshot) = &slot.prepared {
            // Older than the log's start, it would leave the follower with a hole; and a follower
            // throws away one from before it became a member.
            let metadata = snapshot.get_metadata();
            let (index, members) = (metadata.index, metadata.get_conf_state());
            let knows_follower = members.voters.contains(&to) || members.learners.contains(&to);
            if index >= request_index && index >= truncated.index && knows_follower {
                return Ok(snapshot.clone());
            }
        }
        slot.request = Some(SnapshotRequest {
            index_min: request_index,
            follower: to,
        });
        Err(raft::Error::Store(
            StorageError::SnapshotTemporarilyUnavailable,
        ))
    }
}
