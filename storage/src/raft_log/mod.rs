//! The Raft log on an [`Engine`]: what raft reads through its `Storage` trait, and batches by which
//! the driver writes it.
//!
//! Invariants:
//! 1. Stored entries are exactly `first_index..=last_index`, without gaps; an append removes what
//!    lies above its own last entry in the same batch.
//! 2. `applied <= commit <= last_index`, on disk, after every batch: a [`LogWrite`] raises the
//!    stored commit with the applied index, and [`RaftLog::open`] refuses a store that breaks it.
//! 3. The term of `first_index - 1` is known after every compaction and snapshot.
//! 4. There is one writer: the Raft driver. Others may read through clones.
//! 5. `snapshot` never builds anything: it hands out a prepared snapshot or asks for one.

mod codec;
mod conflict;
mod lost;
mod note;
mod position;
mod storage;
mod view;
mod write;

#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard};

use raft::StorageError;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};

pub use codec::{RaftDecodeError, RaftMessage, decode_raft, encode_raft};
pub use conflict::CommittedConflict;
pub use lost::LostEntries;
pub use position::LogPoint;
pub use view::LogView;
pub use write::LogWrite;

use self::position::{Position, read_position};
use crate::engine::{Column, Durability, Engine, EngineError, WriteBatch};

/// The single keys of [`Column::Meta`]; persisted, never changed.
mod key {
    pub(super) const HARD_STATE: &[u8] = b"raft/hard_state";
    pub(super) const CONF_STATE: &[u8] = b"raft/conf_state";
    pub(super) const APPLIED: &[u8] = b"raft/applied";
    pub(super) const TRUNCATED: &[u8] = b"raft/truncated";
    pub(super) const MEMBER: &[u8] = b"raft/member";
    pub(super) const DIVERGED: &[u8] = b"raft/diverged";
    pub(super) const LOST: &[u8] = b"raft/lost";
    pub(super) const CONFLICT: &[u8] = b"raft/conflict";
}

/// Index and term that a fresh group starts from, as if everything up to there were compacted:
/// whoever joins later has an older log and so needs a snapshot, which carries the membership.
pub const BOOTSTRAP_INDEX: u64 = 1;

/// Why the log cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RaftLogError {
    /// The store below failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A stored value is not what was written there.
    #[error(
        "the raft log is damaged: {what} {reason}; do not start on it again: restore a backup, or, \
         with other heads alive, join again with an empty data directory"
    )]
    Damaged {
        /// Which value.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An append would leave a hole, or rewrite what is compacted. A defect of the caller.
    #[error("entry {index} cannot follow a log that holds {first_index}..={last_index}")]
    Gap {
        /// The first appended entry.
        index: u64,
        /// The first index that is stored.
        first_index: u64,
        /// The last index that is stored.
        last_index: u64,
    },
    /// The store belongs to another member of the group.
    #[error(
        "this raft log is member {stored}'s, and member {asked} was to be started on it: a log \
         and the identity beside it belong together; give this head its own data directory"
    )]
    OtherMember {
        /// Whose log it is.
        stored: u64,
        /// Who was to be started.
        asked: u64,
    },
    /// A compaction above the applied index, or of what is already gone. A defect of the caller.
    #[error("cannot compact up to {index}: {truncated_index} is compacted, {applied} is applied")]
    Compaction {
        /// The index that was asked for.
        index: u64,
        /// What is already compacted.
        truncated_index: u64,
        /// What is applied.
        applied: u64,
    },
}

impl From<RaftLogError> for raft::Error {
    fn from(error: RaftLogError) -> Self {
        raft::Error::Store(StorageError::Other(Box::new(error)))
    }
}

/// A follower needs a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// The snapshot's index must be at least this.
    pub index_min: u64,
    /// The Raft id of the follower.
    pub follower: u64,
}

#[derive(Debug, Default)]
struct SnapshotSlot {
    prepared: Option<Snapshot>,
    request: Option<SnapshotRequest>,
}

#[derive(Debug)]
struct Shared<E> {
    engine: E,
    position: Mutex<Position>,
    snapshots: Mutex<SnapshotSlot>,
}

/// The log. Clones are the same log: raft owns one, the driver keeps another.
#[derive(Debug)]
pub struct RaftLog<E> {
    shared: Arc<Shared<E>>,
}

impl<E> Clone for RaftLog<E> {
    fn clone(&self) -> Self {
        RaftLog {
            shared: Arc::clone(&self.shared),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .expect("no code panics while it holds this lock")
}

pub(crate) fn entry_key(index: u64) -> [u8; 8] {
    index.to_be_bytes()
}

fn decode_stored<M: RaftMessage + Default>(what: &str, bytes: &[u8]) -> Result<M, RaftLogError> {
    decode_raft(bytes).map_err(|error| RaftLogError::Damaged {
        what: what.to_owned(),
        reason: error.to_string(),
    })
}

impl<E: Engine> RaftLog<E> {
    /// Reads where the log in `engine` stands, and checks that it is consistent. An empty engine
    /// is an empty log without members.
    pub fn open(engine: E) -> Result<Self, RaftLogError> {
        let position = read_position(&engine)?;
        let shared = Shared {
            engine,
            position: Mutex::new(position),
            snapshots: Mutex::new(SnapshotSlot::default()),
        };
        Ok(RaftLog {
            shared: Arc::new(shared),
        })
    }

    /// Makes this the log of a fresh group with these `voters`, at [`BOOTSTRAP_INDEX`].
    ///
    /// # Panics
    /// If the log is not empty: a group is born once.
    pub fn bootstrap(&self, voters: &[u64]) -> Result<(), RaftLogError> {
        assert!(self.is_empty(), "a group can only be born on an empty log");
        let conf_state = ConfState {
            voters: voters.to_vec(),
            ..ConfState::default()
        };
        let mut write = self.begin();
        write.reset_to(
            LogPoint {
                index: BOOTSTRAP_INDEX,
                term: 1,
            },
            &conf_state,
        );
        write.set_hard_state(&HardState {
            term: 1,
            vote: 0,
            commit: BOOTSTRAP_INDEX,
        });
        self.commit(write, Durability::Synced)
    }

    /// Whether nothing was ever written here: no member, no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let position = self.position();
        position.last.index == 0 && position.conf_state == ConfState::default()
    }

    /// The Raft id of the member whose log this is, where one was bound to it.
    pub fn member(&self) -> Result<Option<u64>, RaftLogError> {
        let Some(bytes) = self.shared.engine.get(Column::Meta, key::MEMBER)? else {
            return Ok(None);
        };
        let bytes: [u8; 8] = bytes.try_into().map_err(|_| RaftLogError::Damaged {
            what: "the member's id".to_owned(),
            reason: "is not 8 bytes".to_owned(),
        })?;
        Ok(Some(u64::from_be_bytes(bytes)))
    }

    /// Makes this the log of member `raft_id`, for good: a store votes under one id only.
    pub fn bind_member(&self, raft_id: u64) -> Result<(), RaftLogError> {
        match self.member()? {
            Some(stored) if stored != raft_id => Err(RaftLogError::OtherMember {
                stored,
                asked: raft_id,
            }),
            Some(_) => Ok(()),
            None => {
                let mut batch = WriteBatch::new();
                batch.put(Column::Meta, key::MEMBER, raft_id.to_be_bytes());
                Ok(self.shared.engine.write(batch, Durability::Synced)?)
            }
        }
    }

    /// The entry at which this replica's state was found to be another one than that of a majority;
    /// such a replica must not serve again.
    pub fn diverged_at(&self) -> Result<Option<u64>, RaftLogError> {
        let Some(bytes) = self.shared.engine.get(Column::Meta, key::DIVERGED)? else {
            return Ok(None);
        };
        let bytes: [u8; 8] = bytes.try_into().map_err(|_| RaftLogError::Damaged {
            what: "the note of a divergence".to_owned(),
            reason: "is not 8 bytes".to_owned(),
        })?;
        Ok(Some(u64::from_be_bytes(bytes)))
    }

    /// Notes for good that this replica's state is another one than that of a majority.
    pub fn note_divergence(&self, index: u64) -> Result<(), RaftLogError> {
        let mut batch = WriteBatch::new();
        batch.put(Column::Meta, key::DIVERGED, index.to_be_bytes());
        Ok(self.shared.engine.write(batch, Durability::Synced)?)
    }

    /// The engine, for reads of the tables.
    #[must_use]
    pub fn engine(&self) -> &E {
        &self.shared.engine
    }

    /// The last applied entry.
    #[must_use]
    pub fn applied(&self) -> LogPoint {
        locked(&self.shared.position).applied
    }

    /// The last entry.
    #[must_use]
    pub fn last(&self) -> LogPoint {
        locked(&self.shared.position).last
    }

    /// The last entry that is compacted away: entries begin after it.
    #[must_use]
    pub fn truncated(&self) -> LogPoint {
        locked(&self.shared.position).truncated
    }

    /// The stored term, vote and commit.
    #[must_use]
    pub fn hard_state(&self) -> HardState {
        locked(&self.shared.position).hard_state.clone()
    }

    /// The stored membership.
    #[must_use]
    pub fn conf_state(&self) -> ConfState {
        locked(&self.shared.position).conf_state.clone()
    }

    pub(crate) fn position(&self) -> Position {
        locked(&self.shared.position).clone()
    }

    /// Starts a batch; nothing is written before [`RaftLog::commit`].
    #[must_use]
    pub fn begin(&self) -> LogWrite {
        LogWrite::new(self.position())
    }

    /// Writes a batch, and makes it what readers of this log see. After an error the process must
    /// end: what is on disk is then unknown.
    ///
    /// # Panics
    /// If another batch was committed since this one began, or the batch breaks invariant 2.
    pub fn commit(&self, write: LogWrite, durability: Durability) -> Result<(), RaftLogError> {
        let (batch, mut position) = write.finish();
        assert_eq!(
            position.version,
            locked(&self.shared.position).version,
            "two batches of one log were open at once"
        );
        self.shared.engine.write(batch, durability)?;
        position.version += 1;
        *locked(&self.shared.position) = position;
        Ok(())
    }

    /// Removes entries up to and with `index` from the batch's view of the log. `index` must be
    /// applied; followers that are further behind will need a snapshot.
    pub fn compact_to(&self, write: &mut LogWrite, index: u64) -> Result<(), RaftLogError> {
        let position = self.position();
        if index <= position.truncated.index || index > position.applied.index {
            return Err(RaftLogError::Compaction {
                index,
                truncated_index: position.truncated.index,
                applied: position.applied.index,
            });
        }
        write.truncate_to(LogPoint {
            index,
            term: self.entry(index)?.term,
        });
        Ok(())
    }

    /// The stored entry at `index`, which must be in the log.
    pub fn entry(&self, index: u64) -> Result<Entry, RaftLogError> {
        let what = || format!("entry {index}");
        let bytes = self
            .shared
            .engine
            .get(Column::Log, &entry_key(index))?
            .ok_or_else(|| RaftLogError::Damaged {
                what: what(),
                reason: "is missing".to_owned(),
            })?;
        decode_stored(&what(), &bytes)
    }

    /// Makes `snapshot` what followers get that are too far behind, until it is compacted over or
    /// replaced. Its data is whatever the transport needs in order to find the bytes.
    pub fn set_prepared_snapshot(&self, snapshot: Snapshot) {
        locked(&self.shared.snapshots).prepared = Some(snapshot);
    }

    /// Takes back the prepared snapshot: its bytes are gone.
    pub fn clear_prepared_snapshot(&self) {
        locked(&self.shared.snapshots).prepared = None;
    }

    /// The latest request for a snapshot that could not be served, once.
    #[must_use]
    pub fn take_snapshot_request(&self) -> Option<SnapshotRequest> {
        locked(&self.shared.snapshots).request.take()
    }

    fn read_entries(
        &self,
        low: u64,
        high: u64,
        size_bytes_max: u64,
    ) -> Result<Vec<Entry>, RaftLogError> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut size_bytes = 0_u64;
        let mut full = false;
        let mut fault = None;
        self.shared
            .engine
            .visit(Column::Log, &entry_key(low), &mut |key, value| {
                let expected = low + entries.len() as u64;
                if expected == high {
                    return ControlFlow::Break(());
                }
                if key != entry_key(expected) {
                    return ControlFlow::Break(()); // The hole is reported below.
                }
                size_bytes += value.len() as u64;
                if size_bytes > size_bytes_max && !entries.is_empty() {
                    full = true;
                    return ControlFlow::Break(());
                }
                match decode_stored(&format!("entry {expected}"), value) {
                    Ok(entry) => entries.push(entry),
                    Err(error) => {
                        fault = Some(error);
                        return ControlFlow::Break(());
                    }
                }
                ControlFlow::Continue(())
            })?;
        if let Some(error) = fault {
            return Err(error);
        }
        let next = low + entries.len() as u64;
        if next < high && !full {
            return Err(RaftLogError::Damaged {
                what: format!("entry {next}"),
                reason: "is missing".to_owned(),
            });
        }
        Ok(entries)
    }
}
