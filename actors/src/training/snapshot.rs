//! A state as it was after some step, while training goes on: what a checkpoint is made of.
//!
//! Invariants:
//! 1. Taking one copies no values ([`FlatVector::snapshot`](super::flat_vector::FlatVector::snapshot)).
//! 2. Its bytes are those of [`TrainState::to_bytes`], whatever pieces they are read in.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use mobula_storage::checkpoint::CheckpointSource;

use super::state::TrainState;
use super::value_bytes::bytes_of;

const VALUE_BYTES: u64 = 4;

/// The state.
#[derive(Debug, Clone)]
pub struct StateSnapshot {
    header: Vec<u8>,
    /// The parameters, then each moment.
    vectors: Vec<Arc<Vec<f32>>>,
}

impl StateSnapshot {
    /// The state as it is now.
    #[must_use]
    pub fn of(state: &TrainState) -> Self {
        StateSnapshot {
            header: state.header(),
            vectors: state.vectors().map(|vector| vector.snapshot()).collect(),
        }
    }
}

impl CheckpointSource for StateSnapshot {
    fn length_bytes(&self) -> u64 {
        let values: usize = self.vectors.iter().map(|vector| vector.len()).sum();
        self.header.len() as u64 + values as u64 * VALUE_BYTES
    }

    fn read(&self, range: Range<u64>) -> Bytes {
        let mut bytes = Vec::with_capacity(index(range.end - range.start));
        let header_bytes = self.header.len() as u64;
        let part = within(&range, 0, header_bytes);
        bytes.extend_from_slice(&self.header[index(part.start)..index(part.end)]);
        let mut start = header_bytes;
        for vector in &self.vectors {
            let length = vector.len() as u64 * VALUE_BYTES;
            append(&mut bytes, vector, within(&range, start, length));
            start += length;
        }
        bytes.into()
    }
}

/// What of `range` lies in the part that begins at `start`, counted from there.
fn within(range: &Range<u64>, start: u64, length: u64) -> Range<u64> {
    let at = |offset: u64| offset.saturating_sub(start).min(length);
    at(range.start)..at(range.end)
}

/// Appends the bytes `range` of a vector's little-endian values.
fn append(bytes: &mut Vec<u8>, vector: &[f32], range: Range<u64>) {
    let first = range.start / VALUE_BYTES;
    let values = &vector[index(first)..index(range.end.div_ceil(VALUE_BYTES))];
    // A piece may begin or end within a value.
    let skipped = index(range.start - first * VALUE_BYTES);
    let count = index(range.end - range.start);
    bytes.extend_from_slice(&bytes_of(values)[skipped..skipped + count]);
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("the state is in memory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::spec::TrainSpec;
    use crate::training::workload::Workload;

    #[test]
    fn pieces_of_any_length_join_to_the_state_as_it_was() {
        let mut state = TrainState::initial(&Workload::of(&TrainSpec::digits_mlp("a")));
        state.step = 12;
        state.moments[1][3] = f32::MIN_POSITIVE;
        let expected = state.to_bytes();
        let snapshot = StateSnapshot::of(&state);
        state.step = 13;
        state.params[0] = 7.0;
        state.moments[0][1] = 7.0;
        let length = snapshot.length_bytes();
        assert_eq!(length, expected.len() as u64);
        for piece in [1, 3, 63, 64, 65, 1000, 4096, length] {
            let mut joined = Vec::new();
            let mut at = 0;
            while at < length {
                let end = length.min(at + piece);
                let bytes = snapshot.read(at..end);
                assert_eq!(bytes.len() as u64, end - at);
                joined.extend_from_slice(&bytes);
                at = end;
            }
            assert!(joined == expected, "pieces of {piece} bytes");
        }
        assert!(snapshot.read(5..5).is_empty());
    }
}
