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
mod tests;
