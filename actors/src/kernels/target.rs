//! Values that an elementwise update changes: in place, or on their way from where somebody still reads them.

use std::marker::PhantomData;
use std::ops::Range;

use super::lanes::{LANES, Lanes};

/// The values before an update, and where those after it go: the same memory, or other memory of the same length.
///
/// Both are read and written only through this, sixteen at a time, so it makes no difference which it is.
#[derive(Debug)]
pub struct Target<'a> {
    before: *const f32,
    after: *mut f32,
    length: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a `&mut [f32]`, and perhaps a `&[f32]`, with another way to get at the values.
unsafe impl Send for Target<'_> {}
// SAFETY: as above; through a shared one nothing is read or written but by `part`, whose caller answers for it.
unsafe impl Sync for Target<'_> {}

impl<'a> From<&'a mut [f32]> for Target<'a> {
    /// In place.
    fn from(values: &'a mut [f32]) -> Self {
        let after = values.as_mut_ptr();
        Target {
            before: after,
            after,
            length: values.len(),
            borrowed: PhantomData,
        }
    }
}

impl<'a> From<&'a mut Vec<f32>> for Target<'a> {
    fn from(values: &'a mut Vec<f32>) -> Self {
        values.as_mut_slice().into()
    }
}

impl<'a> Target<'a> {
    /// From `before` to `after`, which holds nothing yet that is read.
    ///
    /// # Panics
    /// If the lengths differ.
    #[must_use]
    pub fn between(before: &'a [f32], after: &'a mut [f32]) -> Self {
        assert_eq!(before.len(), after.len(), "vectors of different lengths");
        Target {
            before: before.as_ptr(),
            after: after.as_mut_ptr(),
            length: after.len(),
            borrowed: PhantomData,
        }
    }

    /// How many values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Some of them.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn range(&mut self, range: Range<usize>) -> Target<'_> {
        // SAFETY: this one cannot be used while the part is.
        unsafe { self.part(range) }
    }

    /// Safety: no two parts that are used at the same time overlap.
    pub(super) unsafe fn part(&self, range: Range<usize>) -> Target<'_> {
        assert!(range.start <= range.end && range.end <= self.length);
        Target {
            // SAFETY: within the borrowed vectors.
            before: unsafe { self.before.add(range.start) },
            // SAFETY: as above.
            after: unsafe { self.after.add(range.start) },
            length: range.len(),
            borrowed: PhantomData,
        }
    }

    /// The old values of sixteen number `index`; zeros behind the last.
    #[inline(always)]
    pub(super) fn load<L: Lanes>(&self, index: usize) -> L {
        let start = index * LANES;
        if start + LANES <= self.length {
            // SAFETY: within the vector, which nobody changes while this is borrowed; values and arrays of them are
            // aligned alike.
            L::load(unsafe { &*self.before.add(start).cast() })
        } else {
            let count = self.rest(start);
            // SAFETY: as above.
            L::load_part(unsafe { std::slice::from_raw_parts(self.before.add(start), count) })
        }
    }

    /// The new values of sixteen number `index`, as many as there are.
    #[inline(always)]
    pub(super) fn store<L: Lanes>(&mut self, index: usize, new: L) {
        let start = index * LANES;
        if start + LANES <= self.length {
            // SAFETY: within the vector, which is borrowed to be changed, and no value of it is borrowed otherwise.
            new.store(unsafe { &mut *self.after.add(start).cast() });
        } else {
            let count = self.rest(start);
            // SAFETY: as above.
            new.store_part(unsafe { std::slice::from_raw_parts_mut(self.after.add(start), count) });
        }
    }

    fn rest(&self, start: usize) -> usize {
        assert!(start < self.length, "nothing is there");
        self.length - start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Execution;
    use crate::kernels::lanes::{LaneOperation, dispatch};

    struct AddOne<'a>(Target<'a>);

    impl LaneOperation for AddOne<'_> {
        type Output = ();

        #[inline(always)]
        fn run<L: Lanes>(mut self) {
            for index in 0..self.0.len().div_ceil(LANES) {
                let old: L = self.0.load(index);
                self.0.store(index, old.add(L::splat(1.0)));
            }
        }
    }

    fn add_one(target: Target<'_>) {
        dispatch(Execution::current().instructions(), AddOne(target));
    }

    #[test]
    fn an_update_in_place_and_one_between_two_vectors_are_the_same() {
        for count in [0, 1, 16, 37] {
            let before: Vec<f32> = (0..count).map(|at| at as f32).collect();
            let expected: Vec<f32> = before.iter().map(|value| value + 1.0).collect();
            let mut in_place = before.clone();
            add_one(Target::from(&mut in_place));
            let mut after = vec![f32::NAN; count];
            add_one(Target::between(&before, &mut after));
            assert_eq!((&in_place, &after), (&expected, &expected));
        }
    }

    #[test]
    fn a_range_is_changed_and_nothing_beside_it() {
        let before = vec![1.0; 50];
        let mut after = vec![9.0; 50];
        add_one(Target::between(&before, &mut after).range(3..41));
        assert!(
            after[..3]
                .iter()
                .chain(&after[41..])
                .all(|value| *value == 9.0)
        );
        assert!(after[3..41].iter().all(|value| *value == 2.0));
    }
}
