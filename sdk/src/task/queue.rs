//! What waits in a pool: in the order in which it was submitted, and when its time runs out.
//!
//! Invariants:
//! 1. The order is that of the objects' numbers, which count up with the submissions: what is put
//!    back stands in front of all that came after it.
//! 2. A limit is known exactly as long as what it belongs to waits here.
//! 3. Nothing is looked through: with a million that wait, ending one costs little more than with ten.

use std::collections::{BTreeMap, BTreeSet};

use mobula_core::object::ObjectId;
use tokio::time::Instant;

/// A queue of `T`s, each with the time when it is to be taken out at the latest, if there is one.
pub(super) struct WaitingQueue<T> {
    entries: BTreeMap<ObjectId, (Option<Instant>, T)>,
    limits: BTreeSet<(Instant, ObjectId)>,
}

impl<T> Default for WaitingQueue<T> {
    fn default() -> Self {
        WaitingQueue {
            entries: BTreeMap::new(),
            limits: BTreeSet::new(),
        }
    }
}

impl<T> WaitingQueue<T> {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn insert(&mut self, id: ObjectId, limit: Option<Instant>, waiting: T) {
        self.limits.extend(limit.map(|limit| (limit, id)));
        self.entries.insert(id, (limit, waiting));
    }

    pub(super) fn remove(&mut self, id: ObjectId) -> Option<T> {
        let (limit, waiting) = self.entries.remove(&id)?;
        self.forget(id, limit);
        Some(waiting)
    }

    /// The one that is next.
    pub(super) fn first(&self) -> Option<&T> {
        self.entries
            .first_key_value()
            .map(|(_, (_, waiting))| waiting)
    }

    /// Takes that one out.
    pub(super) fn pop_first(&mut self) -> Option<T> {
        let (id, (limit, waiting)) = self.entries.pop_first()?;
        self.forget(id, limit);
        Some(waiting)
    }

    /// When the next limit is reached.
    pub(super) fn next_limit(&self) -> Option<Instant> {
        self.limits.first().map(|(limit, _)| *limit)
    }

    /// Takes out those whose limit is reached by `now`.
    pub(super) fn take_late(&mut self, now: Instant) -> Vec<T> {
        let mut late = Vec::new();
        while let Some(&(limit, id)) = self.limits.first()
            && limit <= now
        {
            self.limits.pop_first();
            late.extend(self.entries.remove(&id).map(|(_, waiting)| waiting));
        }
        late
    }

    /// All that wait, in their order.
    pub(super) fn into_values(self) -> impl Iterator<Item = T> {
        self.entries.into_values().map(|(_, waiting)| waiting)
    }

    fn forget(&mut self, id: ObjectId, limit: Option<Instant>) {
        if let Some(limit) = limit {
            self.limits.remove(&(limit, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use mobula_core::object::ProcessId;

    fn id(sequence: u64) -> ObjectId {
        ObjectId {
            owner: ProcessId(1),
            sequence,
        }
    }

    #[test]
    fn what_is_put_back_stands_where_it_stood() {
        let mut queue = WaitingQueue::default();
        for n in 1..=4 {
            queue.insert(id(n), None, n);
        }
        assert_eq!((queue.pop_first(), queue.pop_first()), (Some(1), Some(2)));
        queue.insert(id(5), None, 5);
        queue.insert(id(2), None, 2);
        assert_eq!(queue.first(), Some(&2));
        assert_eq!(queue.remove(id(4)), Some(4));
        assert_eq!(queue.remove(id(4)), None);
        assert_eq!(queue.len(), 3);
        assert_eq!(queue.into_values().collect::<Vec<_>>(), [2, 3, 5]);
    }

    #[test]
    fn limits_are_known_as_long_as_somebody_waits() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut queue = WaitingQueue::default();
        // The later ones have the shorter limits; two have the same one.
        for (n, limit) in [(1, 9), (2, 5), (3, 3), (4, 3)] {
            queue.insert(id(n), Some(at(limit)), n);
        }
        queue.insert(id(5), None, 5);
        assert_eq!(queue.next_limit(), Some(at(3)));
        assert!(queue.take_late(at(2)).is_empty());
        assert_eq!(queue.take_late(at(3)), [3, 4]);
        assert_eq!(queue.next_limit(), Some(at(5)));
        assert_eq!(queue.remove(id(2)), Some(2));
        assert_eq!(queue.next_limit(), Some(at(9)));
        assert_eq!(queue.pop_first(), Some(1));
        assert_eq!(queue.next_limit(), None);
        assert!(queue.take_late(at(100)).is_empty());
        assert_eq!(queue.pop_first(), Some(5));
        assert!(queue.is_empty());
    }
}
