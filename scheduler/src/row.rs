//! The scheduler's tables and counters. How a row looks as bytes is in [`mobula_core::row`].
//!
//! Invariants:
//! 1. A table's tag never changes meaning.
//! 2. A table from whose beginning rows are taken away is read from where that has come to (a counter
//!    says where), never from its beginning: the store walks over what was deleted there.
//! 3. Enums inside rows and commands are append-only: their position is their tag.

use mobula_core::control::{ModuleId, Reader, Table, Txn};
pub(crate) use mobula_core::row::{all, from_bytes, get, number_at, pair, put, scan};

const fn table(tag: u8) -> Table {
    Table {
        module: ModuleId::SCHEDULER,
        tag,
    }
}

/// Counters: ids that were given out, rows that are there.
pub(crate) const COUNTERS: Table = table(1);
/// Node id → `NodeRow`.
pub(crate) const NODES: Table = table(2);
/// Node name → node id.
pub(crate) const NODES_BY_NAME: Table = table(3);
/// Job id → `JobRow`.
pub(crate) const JOBS: Table = table(4);
/// Job id → `JobSpec`, which never changes.
pub(crate) const JOB_SPECS: Table = table(5);
/// Idempotency key → job id, as long as the job is kept.
pub(crate) const JOBS_BY_KEY: Table = table(6);
/// Counter, job id → nothing: ended jobs, oldest first.
pub(crate) const JOBS_FINISHED: Table = table(7);
/// Actor id → `ActorRow`.
pub(crate) const ACTORS: Table = table(8);
/// Actor id → `ActorSpec`, which only loses its constructor argument when the actor has ended.
pub(crate) const ACTOR_SPECS: Table = table(9);
/// Job id, actor id → nothing.
pub(crate) const ACTORS_BY_JOB: Table = table(10);
/// Job id, name → actor id, while the actor has not ended; of jobs in no namespace.
pub(crate) const ACTORS_BY_NAME: Table = table(11);
/// Node id, actor id → `Lease`: what each node has given to whom.
pub(crate) const LEASES: Table = table(12);
/// Time from which it may be placed, actor id → nothing.
pub(crate) const PENDING: Table = table(13);
/// Counter, actor id → nothing: ended actors, oldest first.
pub(crate) const ACTORS_FINISHED: Table = table(14);
/// Group id → `GroupRow`.
pub(crate) const GROUPS: Table = table(15);
/// Session id → `SessionRow`.
pub(crate) const SESSIONS: Table = table(16);
/// Session id, sequence number → response.
pub(crate) const SESSION_RESPONSES: Table = table(17);
/// Last use, session id → nothing.
pub(crate) const SESSIONS_BY_AGE: Table = table(18);
/// Token id → `TokenRow`.
pub(crate) const TOKENS: Table = table(19);
/// Hash of the secret → token id.
pub(crate) const TOKENS_BY_HASH: Table = table(20);
/// Node id → `Usage`: the sum of the node's leases.
pub(crate) const USAGE: Table = table(21);
/// Node id, kind, job id, placement key → how many of the node's actors have it.
pub(crate) const USAGE_BY_KEY: Table = table(22);
/// Name → `NamespaceRow`, while a job in it is not over.
pub(crate) const NAMESPACES: Table = table(23);
/// Incarnation of a namespace, name → actor id: what [`ACTORS_BY_NAME`] is to jobs in none.
pub(crate) const ACTORS_BY_NAMESPACE: Table = table(24);
/// Job id → the principal in whose name it was submitted, as long as the job is kept.
pub(crate) const JOB_SUBMITTERS: Table = table(25);
/// In whose name sessions are open → how many; no row where there is none.
pub(crate) const SESSION_HOLDERS: Table = table(26);

/// Counts and number sources, each one row in [`COUNTERS`]. Numbers are persisted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Counter {
    LastNode = 1,
    LastJob = 2,
    LastActor = 3,
    LastGroup = 4,
    LastSession = 5,
    LastFinished = 6,
    Nodes = 7,
    LiveJobs = 8,
    FinishedJobs = 9,
    LiveActors = 10,
    FinishedActors = 11,
    Sessions = 12,
    Tokens = 13,
    PendingActors = 14,
    /// No actor is pending from an earlier time, in milliseconds: where to begin to look.
    PendingFrom = 15,
    /// Ended jobs up to this number have been forgotten: where the oldest that is kept follows.
    ForgottenJobs = 16,
    /// The same of ended actors.
    ForgottenActors = 17,
    Namespaces = 18,
    /// What jobs that are not over and actors that have not ended hold, in bytes ([`crate::state::held`]).
    LivingBytes = 19,
    /// The same of jobs that are over.
    EndedJobBytes = 20,
    /// The same of ended actors.
    EndedActorBytes = 21,
}

impl Counter {
    pub(crate) fn value(self, reader: &dyn Reader) -> u64 {
        get(reader, COUNTERS, &[self as u8]).unwrap_or(0)
    }

    pub(crate) fn set(self, txn: &mut dyn Txn, value: u64) {
        put(txn, COUNTERS, &[self as u8], &value);
    }

    /// One more; returns the new value.
    pub(crate) fn increment(self, txn: &mut dyn Txn) -> u64 {
        self.add(txn, 1)
    }

    /// One less; returns the new value.
    pub(crate) fn decrement(self, txn: &mut dyn Txn) -> u64 {
        self.subtract(txn, 1)
    }

    /// So many more; returns the new value.
    pub(crate) fn add(self, txn: &mut dyn Txn, count: u64) -> u64 {
        let value = self.value(txn) + count;
        self.set(txn, value);
        value
    }

    /// So many less; returns the new value.
    pub(crate) fn subtract(self, txn: &mut dyn Txn, count: u64) -> u64 {
        let value = self
            .value(txn)
            .checked_sub(count)
            .expect("what is removed was counted before");
        self.set(txn, value);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_txn::MemoryTables;

    #[test]
    fn a_long_scan_pages_through_everything_once() {
        let mut tables = MemoryTables::default();
        for number in 0..1000u64 {
            put(&mut tables, JOBS, &pair(number % 2, number), &number);
        }
        let odd: Vec<u64> = scan(&tables, JOBS, &1u64.to_be_bytes())
            .map(|(key, _)| number_at(&key, 1))
            .collect();
        assert_eq!(odd, (0..1000).filter(|n| n % 2 == 1).collect::<Vec<_>>());
    }

    #[test]
    fn a_row_begins_with_its_version() {
        let mut tables = MemoryTables::default();
        put(&mut tables, JOBS, b"k", &7u8);
        assert_eq!(tables.get(JOBS, b"k").unwrap(), [2, 7]);
        assert_eq!(get::<u8>(&tables, JOBS, b"k"), Some(7));
    }

    #[test]
    #[should_panic(expected = "row of version 9")]
    fn a_row_of_another_version_aborts() {
        from_bytes::<u8>(JOBS, &[9, 7]);
    }
}
