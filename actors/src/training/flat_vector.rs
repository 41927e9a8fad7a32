//! A vector of values that goes on changing while a snapshot holds what it was.
//!
//! Two halves of a double buffer. Taking a snapshot shares the present half and copies nothing. An update
//! of a shared half goes into the other one, and what is not overwritten is copied on the way: block by
//! block, just before a block is written, so that it is in the cache anyway
//! ([`update_blocks`]). When the snapshot is dropped its half is free for the next one.
//!
//! Invariants:
//! 1. A snapshot never changes.
//! 2. With one snapshot open at a time there are two halves and no allocation after the first; more open
//!    snapshots cost memory, and nothing else.

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Values that are copied and updated together while a snapshot is open: 64 KiB, so that those of
/// parameters and two moments stay in a core's second cache between the copy and the update.
const BLOCK_VALUES: usize = 16 * 1024;

/// The vector; it is used as a slice.
#[derive(Debug, Default)]
pub struct FlatVector {
    current: Arc<Vec<f32>>,
    /// The half that an earlier snapshot holds, or held.
    other: Option<Arc<Vec<f32>>>,
}

impl FlatVector {
    /// The values as they are now, at no cost.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Vec<f32>> {
        Arc::clone(&self.current)
    }

    /// Whether a snapshot holds the present values.
    fn is_shared(&mut self) -> bool {
        Arc::get_mut(&mut self.current).is_none()
    }

    /// The values to write, and those to copy from first if they are held by a snapshot.
    fn begin_update(&mut self) -> Update<'_> {
        let mut held = None;
        if self.is_shared() {
            let length = self.current.len();
            let free = self
                .other
                .take()
                .filter(|other| other.len() == length && Arc::strong_count(other) == 1)
                .unwrap_or_else(|| Arc::new(vec![0.0; length]));
            let before = std::mem::replace(&mut self.current, free);
            self.other = Some(Arc::clone(&before));
            held = Some(before);
        }
        Update {
            held,
            values: Arc::get_mut(&mut self.current).expect("it is not shared, or was exchanged"),
        }
    }
}

/// A vector that is being updated.
struct Update<'a> {
    held: Option<Arc<Vec<f32>>>,
    values: &'a mut [f32],
}

impl Update<'_> {
    fn block(&mut self, range: Range<usize>) -> &mut [f32] {
        let block = &mut self.values[range.clone()];
        if let Some(held) = &self.held {
            block.copy_from_slice(&held[range]);
        }
        block
    }
}

/// Lets `update` change all vectors in place, in blocks: it gets the block's range and that block of each
/// vector. It is called once, with everything, where no snapshot is open. All vectors have the length of
/// the first.
pub fn update_blocks(
    vectors: &mut [&mut FlatVector],
    mut update: impl FnMut(Range<usize>, &mut [&mut [f32]]),
) {
    let length = vectors.first().map_or(0, |vector| vector.len());
    let block_values = if vectors.iter_mut().any(|vector| vector.is_shared()) {
        BLOCK_VALUES
    } else {
        length.max(1)
    };
    let mut updates: Vec<Update<'_>> = vectors
        .iter_mut()
        .map(|vector| vector.begin_update())
        .collect();
    for start in (0..length).step_by(block_values) {
        let range = start..length.min(start + block_values);
        let mut blocks: Vec<&mut [f32]> = updates
            .iter_mut()
            .map(|update| update.block(range.clone()))
            .collect();
        update(range, &mut blocks);
    }
}

impl From<Vec<f32>> for FlatVector {
    fn from(values: Vec<f32>) -> Self {
        FlatVector {
            current: Arc::new(values),
            other: None,
        }
    }
}

impl Clone for FlatVector {
    /// Shares the values until one of the two changes.
    fn clone(&self) -> Self {
        FlatVector {
            current: self.snapshot(),
            other: None,
        }
    }
}

impl Deref for FlatVector {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.current
    }
}

impl DerefMut for FlatVector {
    /// Copies everything first if a snapshot is open: [`update_blocks`] is for those who change all of it.
    fn deref_mut(&mut self) -> &mut [f32] {
        let update = self.begin_update();
        if let Some(held) = update.held {
            update.values.copy_from_slice(&held);
        }
        update.values
    }
}

impl PartialEq for FlatVector {
    fn eq(&self, other: &Self) -> bool {
        self[..] == other[..]
    }
}

impl<'a> IntoIterator for &'a FlatVector {
    type Item = &'a f32;
    type IntoIter = std::slice::Iter<'a, f32>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl Serialize for FlatVector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self[..].serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for FlatVector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::deserialize(deserializer).map(FlatVector::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(length: usize, from: f32) -> FlatVector {
        let values: Vec<f32> = (0..length).map(|at| from + at as f32).collect();
        values.into()
    }

    /// Adds one to each value; how often it was called.
    fn add_one(vectors: &mut [&mut FlatVector]) -> usize {
        let mut calls = 0;
        update_blocks(vectors, |_, blocks| {
            calls += 1;
            for block in blocks {
                block.iter_mut().for_each(|value| *value += 1.0);
            }
        });
        calls
    }

    #[test]
    fn a_snapshot_never_changes_and_the_vector_goes_on() {
        for length in [0, 1, BLOCK_VALUES, 3 * BLOCK_VALUES + 5] {
            let (mut a, mut b) = (vector(length, 0.0), vector(length, 9.0));
            let before = [a.to_vec(), b.to_vec()];
            let open = a.snapshot();
            let calls = add_one(&mut [&mut a, &mut b]);
            assert_eq!(calls, length.div_ceil(BLOCK_VALUES));
            assert_eq!(*open, before[0]);
            let add = |values: &[f32]| values.iter().map(|v| v + 1.0).collect::<Vec<f32>>();
            assert_eq!([a.to_vec(), b.to_vec()], [add(&before[0]), add(&before[1])]);
            // Not shared any more: one call with all of it.
            assert_eq!(add_one(&mut [&mut a, &mut b]), usize::from(length > 0));
            assert_eq!(*open, before[0]);
        }
    }

    #[test]
    fn two_halves_serve_one_open_snapshot_at_a_time() {
        let mut a = vector(100, 0.0);
        let mut places = std::collections::BTreeSet::new();
        for _ in 0..10 {
            let open = a.snapshot();
            add_one(&mut [&mut a]);
            places.insert(a.as_ptr() as usize);
            assert_eq!(open[0] + 1.0, a[0]);
        }
        assert_eq!(places.len(), 2);
        // One that stays open costs a third buffer and is not touched.
        let (first, kept) = (a.snapshot(), a.to_vec());
        for _ in 0..5 {
            let _second = a.snapshot();
            add_one(&mut [&mut a]);
        }
        assert_eq!(*first, kept);
    }

    #[test]
    fn a_clone_and_a_single_change_do_not_touch_each_other() {
        let mut a = vector(5, 0.0);
        let b = a.clone();
        assert_eq!(a, b);
        a[3] = 70.0;
        assert_eq!((a[3], b[3]), (70.0, 3.0));
        assert_eq!((a[2], b[2]), (2.0, 2.0));
        let text = serde_json::to_string(&a).unwrap();
        assert_eq!(text, "[0.0,1.0,2.0,70.0,4.0]");
        assert_eq!(serde_json::from_str::<FlatVector>(&text).unwrap(), a);
    }
}
