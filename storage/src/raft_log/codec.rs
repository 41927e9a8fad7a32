//! Raft's own messages as bytes: the only place that knows they are prost 0.11 inside.
//!
//! raft 0.7 is older than the prost of the rest of the workspace, so its types never appear in our
//! protos or tables; they are stored and sent as these bytes.

pub use raft_prost::Message as RaftMessage;

/// Bytes that are not the Raft message they should be.
#[derive(Debug, thiserror::Error)]
#[error("{size_bytes} bytes do not decode as a raft {type_name}: {reason}")]
pub struct RaftDecodeError {
    type_name: &'static str,
    size_bytes: usize,
    reason: String,
}

/// Encodes a Raft message, entry or state.
#[must_use]
pub fn encode_raft<M: RaftMessage>(message: &M) -> Vec<u8> {
    message.encode_to_vec()
}

/// Decodes what [`encode_raft`] wrote. The input bounds what is allocated, so the caller bounds
/// the input.
pub fn decode_raft<M: RaftMessage + Default>(bytes: &[u8]) -> Result<M, RaftDecodeError> {
    M::decode(bytes).map_err(|error| RaftDecodeError {
        type_name: std::any::type_name::<M>(),
        size_bytes: bytes.len(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use raft::eraftpb::{ConfState, Entry, EntryType, HardState};

    #[test]
    fn raft_types_survive_the_round_trip() {
        let entry = Entry {
            entry_type: EntryType::EntryConfChangeV2 as i32,
            term: 3,
            index: 9,
            data: vec![1, 2, 3],
            ..Entry::default()
        };
        assert_eq!(decode_raft::<Entry>(&encode_raft(&entry)).unwrap(), entry);
        let hard_state = HardState {
            term: 3,
            vote: 1,
            commit: 8,
        };
        assert_eq!(
            decode_raft::<HardState>(&encode_raft(&hard_state)).unwrap(),
            hard_state
        );
        let conf_state = ConfState {
            voters: vec![1, 2],
            learners: vec![3],
            ..ConfState::default()
        };
        assert_eq!(
            decode_raft::<ConfState>(&encode_raft(&conf_state)).unwrap(),
            conf_state
        );
    }

    #[test]
    fn other_bytes_are_an_error() {
        let error = decode_raft::<Entry>(&[0xff; 5]).unwrap_err();
        assert!(error.to_string().contains("Entry"), "{error}");
    }
}
