//! Between heads: how a stream of the Raft lane begins, and how a snapshot crosses the bulk lane.
//!
//! Raft's own messages travel as opaque bytes, one a frame, behind the [`RaftHello`]; this crate
//! does not know what is in them.
//!
//! Invariants:
//! 1. Who opens a stream says as which member, and whom it means: an address that now belongs to
//!    another head is noticed before a message is believed.
//! 2. A snapshot's chunks are frames that check themselves (`mobula-storage`'s snapshot stream: at
//!    most 1 MiB and a checksum each, the last with counts and hash of the whole).

use serde::{Deserialize, Serialize};

/// The first message of a stream on the Raft lane. The frames behind it are one Raft message each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftHello {
    /// The Raft id of the head that opens the stream; its certificate must name the same.
    pub from: u64,
    /// The Raft id of the head that is meant.
    pub to: u64,
    /// Where the opener takes QUIC connections now (`ip:port`).
    pub cluster_address: String,
    /// Drawn by lot when the opener's process was started: two processes that run on copies of one
    /// disk are told apart by it.
    pub life: u64,
}

/// What a head says of its own state, between Raft's messages as a frame of kind
/// [`Aside`](crate::frame::FrameKind::Aside), so that replicas that differ are found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateClaim {
    /// The last entry that it has applied.
    pub index: u64,
    /// Its hash over what all entries up to there wrote.
    pub state_hash: [u8; 32],
    /// The other heads whose state was found to be the same as its own when it last compared them, and
    /// at which entry that was.
    pub agrees_with: Vec<(u64, u64)>,
}

impl StateClaim {
    /// The longest encoded claim: far more heads than a group may have.
    pub const BYTES_MAX: usize = 1024;
}

/// What may come back on a stream of the Raft lane: nothing, or why it is of no use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RaftRefusal {
    /// The head at this address is another one.
    OtherMember {
        /// Its Raft id.
        found: u64,
    },
    /// The opener is no member of the group any more: it must not come back under that id.
    Removed,
    /// The opener's certificate is another member's.
    OtherCertificate,
    /// Another process has said since that it is this member: one of the two must not be.
    Replaced,
}

/// The first message of a snapshot's stream on the bulk lane. Chunks follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOffer {
    /// The Raft id of the sender.
    pub from: u64,
    /// The Raft id of the head that is meant.
    pub to: u64,
    /// The Raft message that announces the snapshot: where it was taken, and the membership then.
    pub message: Vec<u8>,
}

/// The answer to a snapshot, once all of it has arrived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotAnswer {
    /// It was verified and handed to Raft, which installed it or had no use for it.
    Taken,
    /// It was not; the reason is for people.
    Refused {
        /// Why.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::codec;
    use proptest::prelude::*;

    #[test]
    fn variant_numbers_are_what_they_always_were() {
        assert_eq!(codec::encode_plain(&RaftRefusal::Removed)[0], 1);
        assert_eq!(codec::encode_plain(&RaftRefusal::OtherCertificate)[0], 2);
        assert_eq!(codec::encode_plain(&RaftRefusal::Replaced)[0], 3);
        assert_eq!(codec::encode_plain(&SnapshotAnswer::Taken)[0], 0);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = codec::decode::<RaftHello>(&bytes, 256);
            let _ = codec::decode::<RaftRefusal>(&bytes, 256);
            let _ = codec::decode::<SnapshotOffer>(&bytes, 256);
            let _ = codec::decode::<StateClaim>(&bytes, 256);
            let _ = codec::decode::<SnapshotAnswer>(&bytes, 256);
        }
    }
}
