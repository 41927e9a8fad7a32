use std::path::{Path, PathBuf};

use raft::{GetEntriesContext, Storage};

use super::*;
use crate::engine::{MemoryEngine, Read, RocksEngine, RocksOptions};

fn entry(index: u64, term: u64) -> Entry {
    Entry {
        index,
        term,
        data: vec![b'x'; 100],
        ..Entry::default()
    }
}

fn entries(range: std::ops::RangeInclusive<u64>, term: u64) -> Vec<Entry> {
    range.map(|index| entry(index, term)).collect()
}

fn group<E: Engine>(engine: E) -> RaftLog<E> {
    let log = RaftLog::open(engine).unwrap();
    log.bootstrap(&[1]).unwrap();
    log
}

fn append<E: Engine>(log: &RaftLog<E>, entries: &[Entry], commit: u64) {
    let mut write = log.begin();
    write.append(entries).unwrap();
    let term = entries.last().unwrap().term;
    write.set_hard_state(&HardState {
        term,
        vote: 1,
        commit,
    });
    log.commit(write, Durability::Synced).unwrap();
}

fn read<E: Engine>(log: &RaftLog<E>, low: u64, high: u64, max: u64) -> raft::Result<Vec<Entry>> {
    log.entries(low, high, max, GetEntriesContext::empty(false))
}

fn terms<E: Engine>(log: &RaftLog<E>) -> Vec<(u64, u64)> {
    let (first, last) = (log.first_index().unwrap(), log.last_index().unwrap());
    let all = read(log, first, last + 1, u64::MAX).unwrap();
    all.iter().map(|entry| (entry.index, entry.term)).collect()
}

#[test]
fn a_fresh_log_has_no_members_and_a_born_group_starts_compacted() {
    let engine = MemoryEngine::new();
    let log = RaftLog::open(engine.clone()).unwrap();
    assert!(log.is_empty());
    assert!(!log.initial_state().unwrap().initialized());
    assert_eq!(
        (log.first_index().unwrap(), log.last_index().unwrap()),
        (1, 0)
    );
    assert_eq!(log.term(0).unwrap(), 0);
    log.bootstrap(&[7]).unwrap();
    engine.crash();
    let log = RaftLog::open(engine).unwrap();
    assert!(!log.is_empty());
    let state = log.initial_state().unwrap();
    assert_eq!(
        (state.conf_state.voters, state.hard_state.commit),
        (vec![7], 1)
    );
    assert_eq!(
        (log.first_index().unwrap(), log.last_index().unwrap()),
        (2, 1)
    );
    assert_eq!(log.term(1).unwrap(), 1, "invariant 3");
}

#[test]
fn a_conflicting_append_removes_what_lies_above_it() {
    let engine = MemoryEngine::new();
    let log = group(engine.clone());
    append(&log, &entries(2..=6, 1), 2);
    append(&log, &entries(4..=5, 2), 2);
    let expected = [(2, 1), (3, 1), (4, 2), (5, 2)];
    assert_eq!(terms(&log), expected);
    let reopened = RaftLog::open(engine).unwrap();
    assert_eq!(terms(&reopened), expected, "invariant 1 holds on disk");
    assert_eq!(reopened.last(), LogPoint { index: 5, term: 2 });
}

#[test]
fn an_append_may_not_leave_a_hole_or_touch_what_is_compacted() {
    let log = group(MemoryEngine::new());
    append(&log, &entries(2..=3, 1), 2);
    let mut write = log.begin();
    assert!(matches!(
        write.append(&[entry(5, 1)]),
        Err(RaftLogError::Gap { index: 5, .. })
    ));
    assert!(matches!(
        write.append(&[entry(1, 1)]),
        Err(RaftLogError::Gap { index: 1, .. })
    ));
    assert!(write.append(&[entry(4, 1), entry(6, 1)]).is_err());
    assert!(write.append(&[]).is_ok());
    assert!(write.is_empty());
}

#[test]
fn reads_keep_to_the_size_limit_but_give_at_least_one() {
    let log = group(MemoryEngine::new());
    append(&log, &entries(2..=9, 1), 2);
    let size = encode_raft(&entry(2, 1)).len() as u64;
    assert_eq!(read(&log, 2, 10, 0).unwrap().len(), 1);
    assert_eq!(read(&log, 2, 10, size * 3).unwrap().len(), 3);
    assert_eq!(read(&log, 2, 10, size * 4 - 1).unwrap().len(), 3);
    assert_eq!(read(&log, 5, 7, u64::MAX).unwrap().len(), 2);
    assert_eq!(read(&log, 5, 5, u64::MAX).unwrap().len(), 0);
}

#[test]
fn after_compaction_the_boundary_term_still_answers() {
    let engine = MemoryEngine::new();
    let log = group(engine.clone());
    append(&log, &entries(2..=5, 1), 2);
    append(&log, &entries(6..=9, 3), 9);
    let mut write = log.begin();
    let refused = log.compact_to(&mut write, 6);
    assert!(
        matches!(refused, Err(RaftLogError::Compaction { applied: 1, .. })),
        "not applied yet"
    );
    write.set_applied(LogPoint { index: 8, term: 3 });
    log.commit(write, Durability::Buffered).unwrap();
    let mut write = log.begin();
    log.compact_to(&mut write, 6).unwrap();
    log.commit(write, Durability::Synced).unwrap();
    for log in [log, RaftLog::open(engine).unwrap()] {
        assert_eq!(log.first_index().unwrap(), 7);
        assert_eq!(log.term(6).unwrap(), 3);
        assert_eq!(
            log.term(5),
            Err(raft::Error::Store(StorageError::Compacted))
        );
        assert_eq!(
            log.term(10),
            Err(raft::Error::Store(StorageError::Unavailable))
        );
        assert_eq!(
            read(&log, 6, 8, 0),
            Err(raft::Error::Store(StorageError::Compacted))
        );
        assert_eq!(terms(&log), [(7, 3), (8, 3), (9, 3)]);
        assert!(log.compact_to(&mut log.begin(), 6).is_err(), "twice");
    }
}

#[test]
fn everything_compacted_leaves_a_log_that_can_grow_again() {
    let engine = MemoryEngine::new();
    let log = group(engine.clone());
    append(&log, &entries(2..=4, 2), 4);
    let mut write = log.begin();
    write.set_applied(LogPoint { index: 4, term: 2 });
    log.commit(write, Durability::Buffered).unwrap();
    let mut write = log.begin();
    log.compact_to(&mut write, 4).unwrap();
    log.commit(write, Durability::Synced).unwrap();
    let log = RaftLog::open(engine).unwrap();
    assert_eq!(
        (log.first_index().unwrap(), log.last_index().unwrap()),
        (5, 4)
    );
    assert_eq!(log.last(), LogPoint { index: 4, term: 2 });
    append(&log, &[entry(5, 2)], 5);
    assert_eq!(terms(&log), [(5, 2)]);
}

#[test]
fn a_crash_between_apply_and_the_next_hard_state_leaves_commit_at_applied() {
    let engine = MemoryEngine::new();
    let log = group(engine.clone());
    append(&log, &entries(2..=5, 1), 2);
    // Applied up to 4 by a light ready, whose commit index is not in any written hard state yet.
    let mut write = log.begin();
    write.set_applied(LogPoint { index: 4, term: 1 });
    write.batch_mut().put(Column::State, b"row", b"of entry 4");
    log.commit(write, Durability::Buffered).unwrap();
    engine.crash_keeping(1);
    let kept = RaftLog::open(engine.clone()).unwrap();
    assert_eq!(
        (kept.applied().index, kept.hard_state().commit),
        (4, 4),
        "invariant 2"
    );
    assert!(engine.get(Column::State, b"row").unwrap().is_some());
}

#[test]
fn a_lost_apply_is_lost_as_a_whole() {
    let engine = MemoryEngine::new();
    let log = group(engine.clone());
    append(&log, &entries(2..=5, 1), 3);
    let mut write = log.begin();
    write.set_applied(LogPoint { index: 3, term: 1 });
    write.batch_mut().put(Column::State, b"row", b"");
    log.commit(write, Durability::Buffered).unwrap();
    engine.crash();
    let log = RaftLog::open(engine.clone()).unwrap();
    assert_eq!((log.applied().index, log.hard_state().commit), (1, 3));
    assert_eq!(engine.get(Column::State, b"row").unwrap(), None);
    assert_eq!(terms(&log).len(), 4, "the log itself was synced");
}

#[test]
#[should_panic(expected = "out of order")]
fn a_batch_that_applies_beyond_the_log_is_refused() {
    let log = group(MemoryEngine::new());
    let mut write = log.begin();
    write.set_applied(LogPoint { index: 9, term: 1 });
    log.commit(write, Durability::Synced).unwrap();
}

#[test]
#[should_panic(expected = "two batches")]
fn two_open_batches_are_noticed() {
    let log = group(MemoryEngine::new());
    let (first, second) = (log.begin(), log.begin());
    log.commit(first, Durability::Synced).unwrap();
    log.commit(second, Durability::Synced).unwrap();
}

#[test]
fn a_store_whose_parts_disagree_does_not_open() {
    let engine = MemoryEngine::new();
    let log = group(engine.clone());
    append(&log, &entries(2..=5, 1), 5);
    let mut batch = crate::engine::WriteBatch::new();
    batch.delete(Column::Log, entry_key(5));
    engine.write(batch, Durability::Synced).unwrap();
    let error = RaftLog::open(engine.clone()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("committed index 5 is above its last index 4"),
        "{error}"
    );
    let mut batch = crate::engine::WriteBatch::new();
    batch.put(Column::Log, entry_key(5), [0xff; 7]);
    engine.write(batch, Durability::Synced).unwrap();
    assert!(matches!(
        RaftLog::open(engine),
        Err(RaftLogError::Damaged { .. })
    ));
}

#[test]
fn a_hole_in_the_log_is_damage_and_not_a_short_answer() {
    let engine = MemoryEngine::new();
    let log = group(engine.clone());
    append(&log, &entries(2..=9, 1), 2);
    let mut batch = crate::engine::WriteBatch::new();
    batch.delete(Column::Log, entry_key(5));
    engine.write(batch, Durability::Synced).unwrap();
    let error = read(&log, 2, 10, u64::MAX).unwrap_err();
    assert!(error.to_string().contains("entry 5 is missing"), "{error}");
}

#[test]
fn a_snapshot_is_handed_out_only_while_it_fits_the_log() {
    let log = group(MemoryEngine::new());
    let unavailable = Err(raft::Error::Store(
        StorageError::SnapshotTemporarilyUnavailable,
    ));
    assert_eq!(log.snapshot(0, 2), unavailable);
    assert_eq!(
        log.take_snapshot_request(),
        Some(SnapshotRequest {
            index_min: 0,
            follower: 2
        })
    );
    assert_eq!(log.take_snapshot_request(), None);
    append(&log, &entries(2..=9, 1), 9);
    let mut snapshot = Snapshot::default();
    snapshot.mut_metadata().index = 5;
    snapshot.mut_metadata().mut_conf_state().voters = vec![1];
    log.set_prepared_snapshot(snapshot.clone());
    assert_eq!(
        log.snapshot(5, 2),
        unavailable,
        "member 2 came after it, and would throw it away"
    );
    snapshot.mut_metadata().mut_conf_state().learners = vec![2];
    log.set_prepared_snapshot(snapshot.clone());
    assert_eq!(log.snapshot(5, 2).unwrap(), snapshot);
    assert_eq!(log.snapshot(6, 2), unavailable);
    let mut write = log.begin();
    write.set_applied(LogPoint { index: 9, term: 1 });
    log.commit(write, Durability::Buffered).unwrap();
    let mut write = log.begin();
    log.compact_to(&mut write, 6).unwrap();
    log.commit(write, Durability::Synced).unwrap();
    assert_eq!(
        log.snapshot(0, 2),
        unavailable,
        "entry 6 would be missing behind it"
    );
    log.clear_prepared_snapshot();
    assert_eq!(log.snapshot(0, 2), unavailable);
}

#[test]
fn an_installed_snapshot_replaces_log_and_membership_in_one_batch() {
    let engine = MemoryEngine::new();
    let log = group(engine.clone());
    append(&log, &entries(2..=9, 1), 3);
    let conf_state = ConfState {
        voters: vec![1, 2, 3],
        ..ConfState::default()
    };
    let mut write = log.begin();
    write.reset_to(LogPoint { index: 20, term: 4 }, &conf_state);
    log.commit(write, Durability::Synced).unwrap();
    engine.crash();
    let log = RaftLog::open(engine).unwrap();
    assert_eq!(
        (log.first_index().unwrap(), log.last_index().unwrap()),
        (21, 20)
    );
    assert_eq!(log.term(20).unwrap(), 4);
    assert_eq!(log.applied(), LogPoint { index: 20, term: 4 });
    let hard_state = log.hard_state();
    assert_eq!(
        (hard_state.commit, hard_state.term, hard_state.vote),
        (20, 4, 0)
    );
    assert_eq!(log.conf_state().voters, [1, 2, 3]);
    append(&log, &[entry(21, 4)], 21);
    assert_eq!(terms(&log), [(21, 4)]);
}

#[test]
fn a_log_belongs_to_one_member_for_ever() {
    let engine = MemoryEngine::new();
    let log = RaftLog::open(engine.clone()).unwrap();
    assert_eq!(log.member().unwrap(), None);
    log.bind_member(7).unwrap();
    log.bind_member(7).unwrap();
    engine.crash();
    let log = RaftLog::open(engine).unwrap();
    assert_eq!(log.member().unwrap(), Some(7));
    assert!(matches!(
        log.bind_member(8),
        Err(RaftLogError::OtherMember {
            stored: 7,
            asked: 8
        })
    ));
    assert!(log.is_empty(), "an owner is not yet a history");
}

fn open_rocks(path: &Path) -> Result<RaftLog<RocksEngine>, RaftLogError> {
    RaftLog::open(RocksEngine::open(path, &RocksOptions::small())?)
}

fn write_ahead_log(path: &Path) -> PathBuf {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(path)
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|file| file.extension().is_some_and(|extension| extension == "log"))
        .collect();
    logs.sort();
    logs.pop().unwrap()
}

/// A power cut in the middle of the last record: for every place it may be cut at, the log opens
/// and holds exactly the batches before it.
#[test]
fn a_torn_tail_loses_the_last_batch_only() {
    let dir = tempfile::tempdir().unwrap();
    let live = dir.path().join("live");
    let log = group(RocksEngine::open(&live, &RocksOptions::small()).unwrap());
    append(&log, &entries(2..=4, 1), 3);
    let intact_bytes = std::fs::metadata(write_ahead_log(&live)).unwrap().len();
    append(&log, &entries(5..=7, 2), 4);
    drop(log);
    let full_bytes = std::fs::metadata(write_ahead_log(&live)).unwrap().len();
    assert!(full_bytes > intact_bytes + 300);
    for cut in [
        intact_bytes,
        intact_bytes + 3,
        intact_bytes + 40,
        full_bytes - 1,
    ] {
        let torn = dir.path().join(format!("torn-{cut}"));
        std::fs::create_dir(&torn).unwrap();
        for file in std::fs::read_dir(&live).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), torn.join(file.file_name())).unwrap();
        }
        let wal = std::fs::File::options()
            .write(true)
            .open(write_ahead_log(&torn))
            .unwrap();
        wal.set_len(cut).unwrap();
        let log = open_rocks(&torn).unwrap();
        assert_eq!(
            terms(&log),
            [(2, 1), (3, 1), (4, 1)],
            "cut at {cut} of {full_bytes}"
        );
        assert_eq!(log.hard_state().commit, 3);
        append(&log, &[entry(5, 3)], 5);
        drop(log);
        assert_eq!(terms(&open_rocks(&torn).unwrap()).last(), Some(&(5, 3)));
    }
    assert_eq!(terms(&open_rocks(&live).unwrap()).len(), 6);
}

/// Damage with intact records behind it is not a torn tail: opening quietly without them would
/// forget acknowledged entries.
#[test]
fn damage_in_the_middle_of_the_log_does_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let log = group(RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap());
    append(&log, &entries(2..=4, 1), 3);
    let middle = std::fs::metadata(write_ahead_log(dir.path()))
        .unwrap()
        .len()
        - 50;
    append(&log, &entries(5..=7, 2), 4);
    drop(log);
    let wal = write_ahead_log(dir.path());
    let mut bytes = std::fs::read(&wal).unwrap();
    bytes[usize::try_from(middle).unwrap()] ^= 1;
    std::fs::write(&wal, bytes).unwrap();
    let error = open_rocks(dir.path()).unwrap_err();
    assert!(
        matches!(error, RaftLogError::Engine(EngineError::Corrupted { .. })),
        "{error}"
    );
}

#[test]
fn a_log_on_disk_survives_flushes_and_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let log = group(RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap());
    for start in (2..200).step_by(10) {
        append(&log, &entries(start..=start + 9, 1), start);
    }
    let mut write = log.begin();
    write.set_applied(LogPoint {
        index: 150,
        term: 1,
    });
    log.commit(write, Durability::Buffered).unwrap();
    let mut write = log.begin();
    log.compact_to(&mut write, 140).unwrap();
    log.commit(write, Durability::Synced).unwrap();
    drop(log);
    let log = open_rocks(dir.path()).unwrap();
    assert_eq!(
        (log.first_index().unwrap(), log.last_index().unwrap()),
        (141, 201)
    );
    assert_eq!(terms(&log).len(), 61);
}
