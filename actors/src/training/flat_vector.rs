//! A vector of values that goes on changing while a snapshot holds what it was.
//!
//! Two halves of a double buffer. Taking a snapshot shares the present half and copies nothing. An update
//! of a shared half reads it and writes into the other one ([`FlatVector::target`]), which costs no more than
//! the memory that it touches beside. When the snapshot is dropped its half is free for the next one.
//!
//! Invariants:
//! 1. A snapshot never changes.
//! 2. With one snapshot open at a time there are two halves and no allocation after the first; more open
//!    snapshots cost memory, and nothing else.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::kernels::target::Target;

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

    /// The values to change, all of them: what is not written is lost where a snapshot is open.
    pub fn target(&mut self) -> Target<'_> {
        match self.exchange() {
            (Some(before), after) => Target::between(before, after),
            (None, values) => values.into(),
        }
    }

    /// The values to write, and where they are to be read if a snapshot holds them.
    fn exchange(&mut self) -> (Option<&[f32]>, &mut [f32]) {
        let is_shared = Arc::get_mut(&mut self.current).is_none();
        if is_shared {
            let length = self.current.len();
            let free = self
                .other
                .take()
                .filter(|other| other.len() == length && Arc::strong_count(other) == 1)
                .unwrap_or_else(|| Arc::new(vec![0.0; length]));
            self.other = Some(std::mem::replace(&mut self.current, free));
        }
        let before = self.other.as_deref().filter(|_| is_shared);
        let after = Arc::get_mut(&mut self.current).expect("it is not shared, or was exchanged");
        (before.map(Vec::as_slice), after)
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
    /// Copies everything first if a snapshot is open: [`FlatVector::target`] is for those who change all of it.
    fn deref_mut(&mut self) -> &mut [f32] {
        let (before, after) = self.exchange();
        if let Some(before) = before {
            after.copy_from_slice(before);
        }
        after
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
    use crate::kernels::Execution;
    use crate::kernels::update::SgdUpdate;

    fn vector(length: usize, from: f32) -> FlatVector {
        let values: Vec<f32> = (0..length).map(|at| from + at as f32).collect();
        values.into()
    }

    /// Takes one from each value.
    fn take_one(vector: &mut FlatVector) {
        let update = SgdUpdate {
            scale: 1.0,
            momentum: 0.0,
            keep: 1.0,
            rate: 1.0,
        };
        let ones = vec![1.0; vector.len()];
        let mut moments = ones.clone();
        update.apply(Execution::current(), vector.target(), &mut moments, &ones);
    }

    #[test]
    fn a_snapshot_never_changes_and_the_vector_goes_on() {
        for length in [0, 1, 16, 100_005] {
            let mut a = vector(length, 0.0);
            let before = a.to_vec();
            let less = |by: f32| before.iter().map(|v| v - by).collect::<Vec<f32>>();
            let open = a.snapshot();
            take_one(&mut a);
            assert_eq!(*open, before);
            assert_eq!(a.to_vec(), less(1.0));
            // Not shared any more: in place.
            let place = a.as_ptr();
            take_one(&mut a);
            assert_eq!((a.as_ptr(), a.to_vec()), (place, less(2.0)));
            assert_eq!(*open, before);
        }
    }

    #[test]
    fn two_halves_serve_one_open_snapshot_at_a_time() {
        let mut a = vector(100, 0.0);
        let mut places = std::collections::BTreeSet::new();
        for _ in 0..10 {
            let open = a.snapshot();
            take_one(&mut a);
            places.insert(a.as_ptr() as usize);
            assert_eq!(open[0] - 1.0, a[0]);
        }
        assert_eq!(places.len(), 2);
        // One that stays open costs a third buffer and is not touched.
        let (first, kept) = (a.snapshot(), a.to_vec());
        for _ in 0..5 {
            let _second = a.snapshot();
            take_one(&mut a);
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
