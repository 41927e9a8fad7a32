//! Sums that come in from several members, some of them twice or in larger pieces: the tree they make.
//!
//! Unlike [`TreeReducer`](crate::training::reduction::TreeReducer) it takes sums that overlap: the sum of
//! a subtree is always the same bits, so a larger one takes the place of its parts. That makes backup
//! copies, late answers and repetitions harmless.
//!
//! Invariants:
//! 1. No two sums that it holds overlap, and no two are siblings.
//! 2. A node is always `left + right`; position decides, never arrival.

use std::collections::BTreeMap;

use crate::training::reduction::{Partial, ReductionError, Subtree};

/// What the sums must fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeShape {
    /// Shards of a step: a power of two.
    pub shard_count: u32,
    /// Samples of a shard.
    pub samples_per_shard: u64,
}

impl TreeShape {
    /// The subtree of all shards.
    #[must_use]
    pub fn root(&self) -> Subtree {
        Subtree {
            level: self.shard_count.ilog2(),
            index: 0,
        }
    }
}

/// The sums of one bucket, or of the whole vector, as far as they are there.
#[derive(Debug, Clone)]
pub struct Gather {
    shape: TreeShape,
    value_count: usize,
    held: BTreeMap<Subtree, Partial>,
}

impl Gather {
    /// Nothing of a vector of `value_count` values.
    #[must_use]
    pub fn new(shape: TreeShape, value_count: usize) -> Self {
        Gather {
            shape,
            value_count,
            held: BTreeMap::new(),
        }
    }

    /// Takes a sum, and answers whether it brought anything new.
    pub fn offer(&mut self, partial: Partial) -> Result<bool, ReductionError> {
        self.check(&partial)?;
        if self.covers(partial.subtree) {
            return Ok(false);
        }
        self.held
            .retain(|subtree, _| !partial.subtree.contains(*subtree));
        let mut joined = partial;
        while let Some(sibling) = self.held.remove(&joined.subtree.sibling()) {
            joined = if joined.subtree.is_left() {
                Partial::join(joined, &sibling)
            } else {
                Partial::join(sibling, &joined)
            };
        }
        self.held.insert(joined.subtree, joined);
        Ok(true)
    }

    /// Whether the sum of `subtree` is here, by itself or within a larger one.
    #[must_use]
    pub fn covers(&self, subtree: Subtree) -> bool {
        self.covering(subtree).is_some()
    }

    /// The sum of `subtree`, or the larger one that it is within.
    #[must_use]
    pub fn covering(&self, subtree: Subtree) -> Option<&Partial> {
        let mut node = subtree;
        loop {
            if let Some(held) = self.held.get(&node) {
                return Some(held);
            }
            if node.level >= self.shape.root().level {
                return None;
            }
            node = node.parent();
        }
    }

    /// The sum of exactly this subtree.
    #[must_use]
    pub fn get(&self, subtree: Subtree) -> Option<&Partial> {
        self.held.get(&subtree)
    }

    /// The sum of all shards, once it is there.
    #[must_use]
    pub fn root(&self) -> Option<&Partial> {
        self.held.get(&self.shape.root())
    }

    /// Shards that are in none of the sums, ascending.
    #[must_use]
    pub fn missing(&self) -> Vec<u32> {
        (0..self.shape.shard_count)
            .filter(|shard| !self.covers(Subtree::shard(*shard)))
            .collect()
    }

    fn check(&self, partial: &Partial) -> Result<(), ReductionError> {
        let Subtree { level, index } = partial.subtree;
        let shard_count = self.shape.shard_count;
        let Some(shards) = partial.subtree.shards(shard_count) else {
            return Err(ReductionError::OutOfRange {
                level,
                index,
                shard_count,
            });
        };
        if partial.grads.len() != self.value_count {
            let (expected, found) = (self.value_count, partial.grads.len());
            return Err(ReductionError::Length { expected, found });
        }
        let expected = self.shape.samples_per_shard * shards.len() as u64;
        if partial.count != expected {
            let found = partial.count;
            return Err(ReductionError::Count { expected, found });
        }
        Ok(())
    }
}

/// The fewest subtrees that make up `shards` (ascending, each once), in shard order.
#[must_use]
pub fn maximal_subtrees(shards: impl IntoIterator<Item = u32>) -> Vec<Subtree> {
    let mut subtrees: Vec<Subtree> = Vec::new();
    for shard in shards {
        let mut newest = Subtree::shard(shard);
        while subtrees
            .pop_if(|left| !newest.is_left() && *left == newest.sibling())
            .is_some()
        {
            newest = newest.parent();
        }
        subtrees.push(newest);
    }
    subtrees
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::random::{Purpose, Stream};
    use crate::training::reduction::ShardFolder;
    use proptest::prelude::*;

    const SHAPE: TreeShape = TreeShape {
        shard_count: 16,
        samples_per_shard: 3,
    };

    /// Sums whose addition rounds, so that another order would show.
    fn sums(subtree: Subtree) -> Partial {
        let mut folder = ShardFolder::new();
        for shard in subtree.shards(16).unwrap() {
            let stream = Stream::new(5, Purpose::Initialise, "gather", u64::from(shard));
            let scale = 10f64.powi((shard % 5) as i32);
            let grads = (0..4).map(|i| (stream.normal(i, 0) * scale) as f32);
            folder
                .feed(shard, stream.normal(9, 0), 3, grads.collect())
                .unwrap();
        }
        folder.finish().pop().unwrap()
    }

    fn subtree(level: u32, index: u32) -> Subtree {
        Subtree { level, index }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut gather = Gather::new(SHAPE, 4);
        let good = sums(subtree(0, 1));
        let with = |change: &dyn Fn(&mut Partial)| {
            let mut partial = good.clone();
            change(&mut partial);
            partial
        };
        assert!(gather.offer(with(&|p| p.subtree = subtree(5, 0))).is_err());
        assert!(gather.offer(with(&|p| p.subtree = subtree(0, 16))).is_err());
        assert!(gather.offer(with(&|p| p.grads.push(0.0))).is_err());
        assert!(gather.offer(with(&|p| p.count = 4)).is_err());
        assert_eq!(gather.missing().len(), 16);
        assert!(gather.offer(good.clone()).unwrap());
        assert!(!gather.offer(good).unwrap());
        assert_eq!(gather.missing().len(), 15);
    }

    #[test]
    fn neighbours_make_few_subtrees() {
        assert_eq!(maximal_subtrees(0..16), [subtree(4, 0)]);
        assert_eq!(maximal_subtrees([]), []);
        assert_eq!(
            maximal_subtrees([1, 2, 3, 6, 7, 8]),
            [subtree(0, 1), subtree(1, 1), subtree(1, 3), subtree(0, 8)]
        );
    }

    proptest! {
        #[test]
        fn any_pieces_in_any_order_and_number_give_the_same_bits(
            pieces in prop::collection::vec((0u32..5, 0u32..16), 0..40),
            last in Just((0..16u32).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let mut gather = Gather::new(SHAPE, 4);
            let pieces = pieces.into_iter().map(|(level, index)| subtree(level, index >> level));
            for piece in pieces.chain(last.into_iter().map(Subtree::shard)) {
                let news = !gather.covers(piece);
                prop_assert_eq!(gather.offer(sums(piece)).unwrap(), news);
                let held = gather.covering(piece);
                prop_assert!(held.is_some_and(|held| held.subtree.contains(piece)));
            }
            prop_assert_eq!(gather.root(), Some(&sums(subtree(4, 0))));
            prop_assert!(gather.missing().is_empty());
        }
    }
}
