//! The canonical reduction: a fixed binary tree over virtual shards, whoever computed them.
//!
//! Invariants:
//! 1. The sum of a subtree is always `left + right` of its two halves, elementwise. Position in the tree
//!    decides, never the order of arrival nor the number of workers; so the root has the same bits for
//!    every division of the shards.
//! 2. A [`ShardFolder`] yields one [`Partial`] for each maximal aligned subtree of the shards it was fed.
//! 3. A [`TreeReducer`] counts each shard once: what overlaps something already taken is refused.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::value_bytes::packed;
use crate::kernels::{Execution, elementwise::add_to};

/// An aligned subtree: the shards `[index << level, (index + 1) << level)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Subtree {
    /// Height above the shards; a single shard is level 0.
    pub level: u32,
    /// Position among the subtrees of its level.
    pub index: u32,
}

impl Subtree {
    /// The subtree of one shard.
    pub fn shard(shard: u32) -> Self {
        Self {
            level: 0,
            index: shard,
        }
    }

    /// The shards below, if there are `shard_count` in all and they exist.
    pub fn shards(&self, shard_count: u32) -> Option<Range<u32>> {
        let width = 1u64
            .checked_shl(self.level)
            .filter(|width| *width <= u64::from(shard_count))?;
        let start = u64::from(self.index) * width;
        let end = start + width;
        (end <= u64::from(shard_count)).then_some(start as u32..end as u32)
    }

    pub(super) fn parent(&self) -> Self {
        Self {
            level: self.level + 1,
            index: self.index / 2,
        }
    }

    pub(super) fn sibling(&self) -> Self {
        Self {
            level: self.level,
            index: self.index ^ 1,
        }
    }

    pub(super) fn is_left(&self) -> bool {
        self.index.is_multiple_of(2)
    }

    /// Whether all shards of `other` are in this one.
    pub(super) fn contains(&self, other: Self) -> bool {
        other.level <= self.level && other.index >> (self.level - other.level) == self.index
    }
}

/// The sums of one subtree.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Partial {
    /// Which shards are in it.
    pub subtree: Subtree,
    /// Sum of the samples' losses.
    pub loss_sum: f64,
    /// Number of samples.
    pub count: u64,
    /// Sum of the samples' gradients, flat.
    #[serde(with = "packed")]
    pub grads: Vec<f32>,
}

impl Partial {
    /// One computed shard's sums.
    #[must_use]
    pub fn of_shard(shard: u32, loss_sum: f64, count: u64, grads: Vec<f32>) -> Self {
        Partial {
            subtree: Subtree::shard(shard),
            loss_sum,
            count,
            grads,
        }
    }

    /// `left + right`, into the left one's buffer.
    pub(super) fn join(mut left: Self, right: &Self) -> Self {
        left.subtree = left.subtree.parent();
        left.loss_sum += right.loss_sum;
        left.count += right.count;
        add_to(Execution::current(), &mut left.grads, &right.grads);
        left
    }

    /// The same sums of some of the values only.
    pub(super) fn slice(&self, values: Range<usize>) -> Self {
        Self {
            subtree: self.subtree,
            loss_sum: self.loss_sum,
            count: self.count,
            grads: self.grads[values].to_vec(),
        }
    }
}

/// Why a shard or a partial was refused. Nothing is changed by a refusal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReductionError {
    /// Shard ids must ascend, so that the folder can join neighbours as they come.
    #[error("shard {shard} was fed after shard {last}; feed shards in ascending order, each once")]
    NotAscending {
        /// The shard fed.
        shard: u32,
        /// The shard fed before it.
        last: u32,
    },
    /// A subtree that does not exist.
    #[error("subtree (level {level}, index {index}) is outside the tree over {shard_count} shards")]
    OutOfRange {
        /// Level of the subtree.
        level: u32,
        /// Index of the subtree.
        index: u32,
        /// Shards of the tree.
        shard_count: u32,
    },
    /// Some of its shards were counted before: a duplicate, or a late result of an old assignment.
    #[error(
        "subtree (level {level}, index {index}) contains shard {shard}, which is counted already; drop it"
    )]
    Overlap {
        /// Level of the subtree.
        level: u32,
        /// Index of the subtree.
        index: u32,
        /// The first shard that is there already.
        shard: u32,
    },
    /// A gradient of the wrong size.
    #[error(
        "{found} gradient values where the model has {expected}; the sender runs another model"
    )]
    Length {
        /// Values needed.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A count that does not fit the subtree.
    #[error(
        "{found} samples in a subtree that holds {expected}; the sender runs another batch size"
    )]
    Count {
        /// Samples needed.
        expected: u64,
        /// Samples given.
        found: u64,
    },
    /// The tree was already completed and its root taken.
    #[error("the reduction is complete; drop what comes late")]
    Complete,
}

/// Folds one worker's shards as it computes them, like a binary counter.
///
/// For `n` neighbouring shards at most `2 log2(n)` buffers are live.
#[derive(Debug, Default)]
pub struct ShardFolder {
    /// Partials in shard order, no two of them siblings.
    partials: Vec<Partial>,
    last: Option<u32>,
}

impl ShardFolder {
    /// A folder that has seen no shard.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one shard's sums. Shards must come in ascending order; gaps are allowed.
    pub fn feed(
        &mut self,
        shard: u32,
        loss_sum: f64,
        count: u64,
        grads: Vec<f32>,
    ) -> Result<(), ReductionError> {
        if let Some(last) = self.last.filter(|last| shard <= *last) {
            return Err(ReductionError::NotAscending { shard, last });
        }
        let expected = self
            .partials
            .first()
            .map_or(grads.len(), |first| first.grads.len());
        if grads.len() != expected {
            return Err(ReductionError::Length {
                expected,
                found: grads.len(),
            });
        }
        self.last = Some(shard);
        let mut newest = Partial {
            subtree: Subtree::shard(shard),
            loss_sum,
            count,
            grads,
        };
        while let Some(left) = self
            .partials
            .pop_if(|left| !newest.subtree.is_left() && left.subtree == newest.subtree.sibling())
        {
            newest = Partial::join(left, &newest);
        }
        self.partials.push(newest);
        Ok(())
    }

    /// One partial for each maximal aligned subtree of the shards fed, in shard order.
    pub fn finish(self) -> Vec<Partial> {
        self.partials
    }
}

/// Collects the partials of one step from all workers, in any order.
///
/// Holds at most one buffer a shard, and joins siblings as soon as both are there.
#[derive(Debug)]
pub struct TreeReducer {
    shard_count: u32,
    samples_per_shard: u64,
    grads_len: usize,
    pending: BTreeMap<Subtree, Partial>,
    counted: Vec<bool>,
    complete: bool,
}

impl TreeReducer {
    /// A reducer for `shard_count` shards of `samples_per_shard` samples and `grads_len` parameters.
    ///
    /// # Panics
    /// If `shard_count` is not a power of two.
    pub fn new(shard_count: u32, samples_per_shard: u64, grads_len: usize) -> Self {
        assert!(
            shard_count.is_power_of_two(),
            "a tree over {shard_count} shards"
        );
        Self {
            shard_count,
            samples_per_shard,
            grads_len,
            pending: BTreeMap::new(),
            counted: vec![false; shard_count as usize],
            complete: false,
        }
    }

    /// Takes a partial; returns the root once every shard is counted.
    pub fn offer(&mut self, partial: Partial) -> Result<Option<Partial>, ReductionError> {
        let shards = self.check(&partial)?;
        self.counted[shards.start as usize..shards.end as usize].fill(true);
        let mut joined = partial;
        while let Some(sibling) = self.pending.remove(&joined.subtree.sibling()) {
            joined = if joined.subtree.is_left() {
                Partial::join(joined, &sibling)
            } else {
                Partial::join(sibling, &joined)
            };
        }
        if 1 << joined.subtree.level == self.shard_count {
            self.complete = true;
            return Ok(Some(joined));
        }
        self.pending.insert(joined.subtree, joined);
        Ok(None)
    }

    /// The shards that are not counted yet, ascending: what a lost worker leaves to be computed again.
    pub fn missing(&self) -> Vec<u32> {
        (0..self.shard_count)
            .filter(|shard| !self.counted[*shard as usize])
            .collect()
    }

    fn check(&self, partial: &Partial) -> Result<Range<u32>, ReductionError> {
        if self.complete {
            return Err(ReductionError::Complete);
        }
        let Subtree { level, index } = partial.subtree;
        let shards =
            partial
                .subtree
                .shards(self.shard_count)
                .ok_or(ReductionError::OutOfRange {
                    level,
                    index,
                    shard_count: self.shard_count,
                })?;
        if partial.grads.len() != self.grads_len {
            let (expected, found) = (self.grads_len, partial.grads.len());
            return Err(ReductionError::Length { expected, found });
        }
        let expected = self.samples_per_shard * shards.len() as u64;
        if partial.count != expected {
            return Err(ReductionError::Count {
                expected,
                found: partial.count,
            });
        }
        match shards.clone().find(|shard| self.counted[*shard as usize]) {
            Some(shard) => Err(ReductionError::Overlap {
                level,
                index,
                shard,
            }),
            None => Ok(shards),
        }
    }
}

/// Divides `shard_count` shards among `worker_count` workers: neighbouring ranges in worker order, whose
/// sizes differ by at most one.
///
/// # Panics
/// Unless `1 <= worker_count <= shard_count`.
pub fn shard_map(shard_count: u32, worker_count: u32) -> Vec<Range<u32>> {
    assert!(
        (1..=shard_count).contains(&worker_count),
        "{worker_count} for {shard_count} shards"
    );
    let edge =
        |worker: u32| (u64::from(shard_count) * u64::from(worker) / u64::from(worker_count)) as u32;
    (0..worker_count)
        .map(|worker| edge(worker)..edge(worker + 1))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::random::{Purpose, Stream};
    use proptest::prelude::*;

    const GRADS: usize = 5;

    /// Sums whose addition rounds, so that another order would show.
    fn shard_values(seed: u64, shard: u32) -> (f64, Vec<f32>) {
        let stream = Stream::new(seed, Purpose::Initialise, "shard", u64::from(shard));
        let scale = 10f64.powi((shard % 5) as i32);
        let grads = (0..GRADS as u64)
            .map(|i| (stream.normal(i, 0) * scale) as f32)
            .collect();
        (stream.normal(99, 0) * scale, grads)
    }

    fn fold(seed: u64, shards: impl IntoIterator<Item = u32>) -> Vec<Partial> {
        let mut folder = ShardFolder::new();
        for shard in shards {
            let (loss_sum, grads) = shard_values(seed, shard);
            folder.feed(shard, loss_sum, 8, grads).unwrap();
        }
        folder.finish()
    }

    fn bits(partial: &Partial) -> (u64, u64, Vec<u32>) {
        let grads = partial.grads.iter().map(|value| value.to_bits()).collect();
        (partial.loss_sum.to_bits(), partial.count, grads)
    }

    fn leaf(level: u32, index: u32) -> Partial {
        let count = 8u64.saturating_mul(1 << level.min(40));
        Partial {
            subtree: Subtree { level, index },
            loss_sum: 0.0,
            count,
            grads: vec![0.0; GRADS],
        }
    }

    proptest! {
        #[test]
        fn the_root_does_not_depend_on_who_computed_what_or_when(
            seed: u64,
            height in 0u32..7,
            owners in prop::collection::vec(0usize..64, 64),
            workers in 1usize..64,
            order: u64,
        ) {
            let shard_count = 1u32 << height;
            let alone = fold(seed, 0..shard_count);
            prop_assert_eq!(alone.len(), 1);
            // Any assignment at all, not only neighbouring ranges.
            let mut partials: Vec<Partial> = (0..workers)
                .flat_map(|worker| {
                    fold(seed, (0..shard_count).filter(|v| owners[*v as usize] % workers == worker))
                })
                .collect();
            let arrival = Stream::new(order, Purpose::DataOrder, "arrival", 0);
            partials.sort_by_cached_key(|partial| {
                arrival.bits(u64::from(partial.subtree.index), partial.subtree.level)
            });
            let mut reducer = TreeReducer::new(shard_count, 8, GRADS);
            let mut root = None;
            for partial in partials {
                prop_assert!(root.is_none());
                root = reducer.offer(partial).unwrap();
            }
            prop_assert_eq!(bits(&root.unwrap()), bits(&alone[0]));
            prop_assert!(reducer.missing().is_empty());
        }

        #[test]
        fn a_map_covers_each_shard_once(height in 0u32..9, worker in 0u32..256) {
            let shard_count = 1u32 << height;
            let worker_count = worker % shard_count + 1;
            let map = shard_map(shard_count, worker_count);
            prop_assert_eq!(map.len() as u32, worker_count);
            let (least, most) = (shard_count / worker_count, shard_count.div_ceil(worker_count));
            prop_assert!(map.iter().all(|range| (least..=most).contains(&(range.len() as u32))));
            prop_assert!(map.into_iter().flatten().eq(0..shard_count));
        }
    }

    #[test]
    fn a_folder_yields_maximal_aligned_subtrees() {
        let subtrees = |shards: Range<u32>| {
            let partials = fold(1, shards);
            partials
                .iter()
                .map(|p| (p.subtree.level, p.subtree.index))
                .collect::<Vec<_>>()
        };
        assert_eq!(subtrees(0..16), [(4, 0)]);
        assert_eq!(subtrees(5..16), [(0, 5), (1, 3), (3, 1)]);
        assert_eq!(subtrees(1..4), [(0, 1), (1, 1)]);
        assert_eq!(subtrees(3..3), []);
        let mut folder = ShardFolder::new();
        folder.feed(4, 0.0, 8, vec![0.0]).unwrap();
        let error = folder.feed(4, 0.0, 8, vec![0.0]).unwrap_err();
        assert_eq!(error, ReductionError::NotAscending { shard: 4, last: 4 });
        let error = folder.feed(5, 0.0, 8, vec![0.0; 2]).unwrap_err();
        assert_eq!(
            error,
            ReductionError::Length {
                expected: 1,
                found: 2
            }
        );
    }

    #[test]
    fn a_reducer_refuses_what_does_not_belong_and_goes_on() {
        let mut reducer = TreeReducer::new(4, 8, GRADS);
        assert_eq!(reducer.offer(leaf(1, 0)), Ok(None));
        for level_index in [(1, 0), (0, 1), (2, 0)] {
            let error = reducer
                .offer(leaf(level_index.0, level_index.1))
                .unwrap_err();
            assert!(matches!(error, ReductionError::Overlap { .. }), "{error}");
        }
        for level_index in [(1, 2), (0, 4), (3, 0), (64, 0), (0, u32::MAX)] {
            let error = reducer
                .offer(leaf(level_index.0, level_index.1))
                .unwrap_err();
            assert!(
                matches!(error, ReductionError::OutOfRange { .. }),
                "{error}"
            );
        }
        let short = Partial {
            grads: vec![0.0],
            ..leaf(0, 2)
        };
        assert!(matches!(
            reducer.offer(short),
            Err(ReductionError::Length { .. })
        ));
        let wrong = Partial {
            count: 9,
            ..leaf(0, 2)
        };
        assert!(matches!(
            reducer.offer(wrong),
            Err(ReductionError::Count {
                expected: 8,
                found: 9
            })
        ));
        assert_eq!(reducer.missing(), [2, 3]);
        assert_eq!(reducer.offer(leaf(0, 3)), Ok(None));
        assert_eq!(reducer.offer(leaf(0, 2)).unwrap().unwrap().count, 32);
        assert_eq!(reducer.offer(leaf(0, 2)), Err(ReductionError::Complete));
    }
}
