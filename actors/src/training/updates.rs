//! The latest updates of a job, for trainers that were late by a few steps. Who is further behind
//! gets the whole state.

use std::collections::VecDeque;

use super::reduction::Partial;

/// Updates that are kept.
const UPDATES_MAX: usize = 8;
/// Bytes of those: they travel with one order, which must fit a frame.
const UPDATE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The reduced sums of the latest steps, oldest first.
#[derive(Debug, Default)]
pub(super) struct RecentUpdates(VecDeque<Partial>);

impl RecentUpdates {
    /// Takes the sums of the step that was just made. At least one is kept, however large.
    pub(super) fn push(&mut self, root: Partial) {
        let root_bytes = root.grads.len() * 4;
        self.0.push_back(root);
        let fitting = (UPDATE_BYTES_MAX / root_bytes.max(1)).clamp(1, UPDATES_MAX);
        while self.0.len() > fitting {
            self.0.pop_front();
        }
    }

    /// The last `count` of them; `None` if they are not all here.
    pub(super) fn last(&self, count: u64) -> Option<Vec<Partial>> {
        let from = self.0.len().checked_sub(usize::try_from(count).ok()?)?;
        Some(self.0.range(from..).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::reduction::Subtree;

    fn update(number: u64, values: usize) -> Partial {
        Partial {
            subtree: Subtree { level: 0, index: 0 },
            loss_sum: 0.0,
            count: number,
            grads: vec![0.0; values],
        }
    }

    fn numbers(updates: &RecentUpdates, count: u64) -> Option<Vec<u64>> {
        let last = updates.last(count)?;
        Some(last.iter().map(|update| update.count).collect())
    }

    #[test]
    fn as_many_are_kept_as_one_order_may_carry() {
        let mut updates = RecentUpdates::default();
        assert_eq!(numbers(&updates, 0), Some(vec![]));
        assert_eq!(numbers(&updates, 1), None);
        for number in 0..12 {
            updates.push(update(number, 10));
        }
        assert_eq!(numbers(&updates, 2), Some(vec![10, 11]));
        assert_eq!(numbers(&updates, 8).unwrap().len(), 8);
        assert_eq!(numbers(&updates, 9), None);
        // Three of more than a mebibyte fit, and one that is larger than all is kept too.
        for number in 12..20 {
            updates.push(update(number, 300 << 10));
        }
        assert_eq!(numbers(&updates, 3), Some(vec![17, 18, 19]));
        assert_eq!(numbers(&updates, 4), None);
        updates.push(update(20, 2 << 20));
        assert_eq!(numbers(&updates, 1), Some(vec![20]));
        assert_eq!(numbers(&updates, 2), None);
    }
}
