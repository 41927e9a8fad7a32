use raft::eraftpb::ConfState;

use super::*;
use crate::engine::{Column, Durability, Engine, MemoryEngine, WriteBatch};
use crate::raft_log::RaftLog;
use crate::tables::state_hash;

const LIMIT: u64 = 64 << 20;

fn place(index: u64) -> SnapshotPlace {
    let conf_state = ConfState {
        voters: vec![1, 2, 3],
        ..ConfState::default()
    };
    SnapshotPlace {
        applied: LogPoint { index, term: 4 },
        conf_state,
    }
}

/// Rows of many sizes, some larger than a frame, some empty.
fn filled() -> MemoryEngine {
    let engine = MemoryEngine::new();
    let mut batch = WriteBatch::new();
    for number in 0..3000_u32 {
        let value = vec![number as u8; (number as usize * 7919) % 2000];
        batch.put(Column::State, number.to_be_bytes(), value);
    }
    // A pattern whose period does not divide a frame: no two frames are equal.
    let large: Vec<u8> = (0..FRAME_LIMIT_BYTES * 2 + 5)
        .map(|at| (at % 251) as u8)
        .collect();
    batch.put(Column::State, b"large", large);
    batch.put(Column::State, b"empty", b"");
    engine.write(batch, Durability::Synced).unwrap();
    engine
}

fn frames(engine: &MemoryEngine, index: u64) -> Vec<Vec<u8>> {
    let mut export = SnapshotExport::new(engine.snapshot(), place(index));
    let mut frames = Vec::new();
    while let Some(frame) = export.next_frame().unwrap() {
        assert!(frame.len() <= FRAME_LIMIT_BYTES + FRAME_HEAD_BYTES + FRAME_TAIL_BYTES);
        frames.push(frame);
    }
    frames
}

#[test]
fn what_is_exported_is_installed_with_its_place_in_the_log() {
    let source = filled();
    let mut bytes = Vec::new();
    SnapshotExport::new(source.snapshot(), place(9))
        .write_to(&mut bytes)
        .unwrap();
    let target = MemoryEngine::new();
    let mut batch = WriteBatch::new();
    batch.put(Column::State, b"what was here before", b"");
    batch.put(Column::State, [0xff; 3], b"");
    target.write(batch, Durability::Synced).unwrap();
    let log = RaftLog::open(target.clone()).unwrap();
    let mut install = SnapshotInstall::new(LIMIT);
    install.read_from(&mut bytes.as_slice()).unwrap();
    assert_eq!(install.install(&log).unwrap(), place(9));
    target.crash();
    assert_eq!(state_hash(&target).unwrap(), state_hash(&source).unwrap());
    let log = RaftLog::open(target).unwrap();
    assert_eq!(log.applied(), place(9).applied);
    assert_eq!(log.conf_state(), place(9).conf_state);
}

#[test]
fn an_export_shows_the_moment_it_began() {
    let engine = filled();
    let log = RaftLog::open(engine.clone()).unwrap();
    let export = log.export();
    let before = state_hash(&engine).unwrap();
    let mut batch = WriteBatch::new();
    batch.delete(Column::State, b"large");
    engine.write(batch, Durability::Synced).unwrap();
    let mut bytes = Vec::new();
    export.write_to(&mut bytes).unwrap();
    let mut install = SnapshotInstall::new(LIMIT);
    install.read_from(&mut bytes.as_slice()).unwrap();
    assert_eq!(install.scan.state_hash(), before);
}

#[test]
fn an_empty_state_is_a_snapshot_too() {
    let frames = frames(&MemoryEngine::new(), 3);
    assert_eq!(frames.len(), 2);
    let mut install = SnapshotInstall::new(LIMIT);
    for frame in &frames {
        install.push_frame(frame).unwrap();
    }
    install
        .install(&RaftLog::open(MemoryEngine::new()).unwrap())
        .unwrap();
}

#[test]
fn a_flipped_bit_in_any_frame_is_noticed() {
    let frames = frames(&filled(), 9);
    for damaged in 0..frames.len() {
        for at in [0, 2, FRAME_HEAD_BYTES, frames[damaged].len() - 1] {
            let mut install = SnapshotInstall::new(LIMIT);
            let result = frames.iter().enumerate().try_for_each(|(number, frame)| {
                let mut frame = frame.clone();
                if number == damaged {
                    frame[at] ^= 0x10;
                }
                install.push_frame(&frame)
            });
            assert!(
                matches!(result, Err(SnapshotError::Damaged { .. })),
                "{damaged} {at}"
            );
            assert!(!install.is_complete());
        }
    }
}

#[test]
fn a_lost_repeated_or_swapped_frame_is_noticed() {
    let original = frames(&filled(), 9);
    for number in 0..original.len() {
        let mut lost = original.clone();
        lost.remove(number);
        let mut repeated = original.clone();
        repeated.insert(number, original[number].clone());
        let mut swapped = original.clone();
        swapped.swap(number, (number + 1) % original.len());
        for stream in [lost, repeated, swapped] {
            let mut install = SnapshotInstall::new(LIMIT);
            let all = stream
                .iter()
                .try_for_each(|frame| install.push_frame(frame));
            assert!(all.is_err() || !install.is_complete(), "frame {number}");
        }
    }
}

#[test]
fn a_cut_stream_says_where_it_ends() {
    let mut bytes = Vec::new();
    SnapshotExport::new(filled().snapshot(), place(9))
        .write_to(&mut bytes)
        .unwrap();
    for length in [0, 3, 40, bytes.len() / 2, bytes.len() - 1] {
        let error = SnapshotInstall::new(LIMIT)
            .read_from(&mut &bytes[..length])
            .unwrap_err();
        assert!(
            error.to_string().contains("the stream ends here"),
            "{error}"
        );
    }
}

#[test]
fn a_snapshot_over_the_limit_or_behind_the_log_is_refused() {
    let mut bytes = Vec::new();
    SnapshotExport::new(filled().snapshot(), place(9))
        .write_to(&mut bytes)
        .unwrap();
    let small = SnapshotInstall::new(1000).read_from(&mut bytes.as_slice());
    assert!(matches!(
        small,
        Err(SnapshotError::TooLarge { limit_bytes: 1000 })
    ));
    let log = RaftLog::open(MemoryEngine::new()).unwrap();
    for expect_stale in [false, true] {
        let mut install = SnapshotInstall::new(LIMIT);
        install.read_from(&mut bytes.as_slice()).unwrap();
        let result = install.install(&log);
        assert_eq!(
            matches!(result, Err(SnapshotError::Stale { .. })),
            expect_stale
        );
    }
}
