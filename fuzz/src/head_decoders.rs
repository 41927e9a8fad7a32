//! The decoders of a head's disk and of snapshots: as [`decoders`](super::decoders), for builds with
//! RocksDB.

#![allow(
    unreachable_pub,
    reason = "a test of the workspace includes this file as a private module"
)]

use super::decoders::{Decoder, no_seeds, one_of};

/// All of them.
pub const HEAD_DECODERS: &[Decoder] = &[
    Decoder {
        name: "raft_log",
        run: raft_log,
        seeds: raft_log_seeds,
    },
    Decoder {
        name: "snapshot",
        run: snapshot,
        seeds: no_seeds,
    },
];

fn raft_log(bytes: &[u8]) {
    use mobula_storage::raft_log::{RaftMessage, decode_raft, encode_raft};
    use raft::eraftpb::{ConfChangeV2, ConfState, Entry, HardState, Message};
    fn record<M: RaftMessage + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
        if let Ok(value) = decode_raft::<M>(bytes) {
            let again: M =
                decode_raft(&encode_raft(&value)).expect("what was written is read again");
            assert_eq!(again, value);
        }
    }
    one_of(
        bytes,
        &[
            record::<Entry>,
            record::<HardState>,
            record::<ConfState>,
            record::<ConfChangeV2>,
            record::<Message>,
        ],
    );
}

fn raft_log_seeds() -> Vec<Vec<u8>> {
    use mobula_storage::raft_log::encode_raft;
    let entry = raft::eraftpb::Entry {
        index: 3,
        term: 2,
        data: b"command".to_vec(),
        ..Default::default()
    };
    vec![[vec![0], encode_raft(&entry)].concat()]
}

/// Frames as a sender cuts them: each is preceded by its length, two bytes, and followed by its
/// checksum, which is made right here, as no fuzzer finds one.
fn snapshot(bytes: &[u8]) {
    use mobula_storage::snapshot::SnapshotInstall;
    let mut install = SnapshotInstall::new(1 << 20);
    let mut rest = bytes;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(after.len());
        let (content, after) = after.split_at(length);
        let mut frame = content.to_vec();
        frame.extend(crc32fast::hash(content).to_le_bytes());
        if install.push_frame(&frame).is_err() {
            return;
        }
        rest = after;
    }
}
