//! Who computes which shards of the present step: pure planning, without calls or time.
//!
//! Invariants:
//! 1. A missing shard that nobody is computing is handed out as long as anybody can take it.
//! 2. An order is a run of neighbouring shards, so that its answer holds few sums.
//! 3. A shard may be computed twice (its first worker was slow): both give the same bits, and the
//!    reduction counts it once.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::reduction::shard_map;

/// One order to one worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Its number, unique among the orders of a job.
    pub number: u64,
    /// The worker's slot.
    pub worker: usize,
    /// The shards.
    pub shards: Range<u32>,
}

/// The orders of one step.
#[derive(Debug)]
pub struct Assignment {
    next_number: u64,
    outstanding: BTreeMap<u64, Order>,
    slow: BTreeSet<u64>,
}

impl Assignment {
    /// A step of which nothing is ordered. Orders are numbered from `next_number`.
    #[must_use]
    pub fn new(next_number: u64) -> Self {
        Assignment {
            next_number,
            outstanding: BTreeMap::new(),
            slow: BTreeSet::new(),
        }
    }

    /// The number that the next order gets.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.next_number
    }

    /// Whether nothing was ordered yet.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.outstanding.is_empty()
    }

    /// Orders what is missing (ascending) and not being computed by anyone quick, in equal parts
    /// from `workers`. Workers that are slow with an earlier order get nothing.
    pub fn plan(&mut self, missing: &[u32], workers: &[usize]) -> Vec<Order> {
        let free: Vec<u32> = missing
            .iter()
            .copied()
            .filter(|shard| !self.is_covered(*shard))
            .collect();
        let able: Vec<usize> = workers
            .iter()
            .copied()
            .filter(|worker| !self.is_slow(*worker))
            .collect();
        let count = able.len().min(free.len());
        if count == 0 {
            return Vec::new();
        }
        let mut orders = Vec::new();
        for (worker, part) in able
            .into_iter()
            .zip(shard_map(free.len() as u32, count as u32))
        {
            for shards in runs(&free[part.start as usize..part.end as usize]) {
                let order = Order {
                    number: self.next_number,
                    worker,
                    shards,
                };
                self.next_number += 1;
                self.outstanding.insert(order.number, order.clone());
                orders.push(order);
            }
        }
        orders
    }

    /// An order was answered.
    pub fn answered(&mut self, number: u64) {
        self.outstanding.remove(&number);
        self.slow.remove(&number);
    }

    /// A worker is gone, or what it says cannot be used: its shards are free again. Answers how
    /// many.
    pub fn lost(&mut self, worker: usize) -> usize {
        let its = |order: &Order| order.worker == worker;
        let count = self
            .outstanding
            .values()
            .filter(|order| its(order))
            .map(|o| o.shards.len());
        let count = count.sum();
        self.outstanding.retain(|_, order| !its(order));
        self.slow
            .retain(|number| self.outstanding.contains_key(number));
        count
    }

    /// An order takes too long: others may compute its shards too. Answers its worker the first
    /// time.
    pub fn mark_slow(&mut self, number: u64) -> Option<usize> {
        let order = self.outstanding.get(&number)?;
        self.slow.insert(number).then_some(order.worker)
    }

    /// Whether an order of this step is awaited, and not yet slow.
    #[must_use]
    pub fn is_under_way(&self, number: u64) -> bool {
        self.outstanding.contains_key(&number) && !self.slow.contains(&number)
    }

    fn is_slow(&self, worker: usize) -> bool {
        self.slow
            .iter()
            .any(|number| self.outstanding[number].worker == worker)
    }

    fn is_covered(&self, shard: u32) -> bool {
        self.outstanding
            .values()
            .any(|order| order.shards.contains(&shard) && !self.slow.contains(&order.number))
    }
}

/// Ascending shards as runs of neighbours.
fn runs(shards: &[u32]) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for &shard in shards {
        match runs.last_mut() {
            Some(last) if last.end == shard => last.end = shard + 1,
            _ => runs.push(shard..shard + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all() -> Vec<u32> {
        (0..16).collect()
    }

    fn told(orders: &[Order]) -> Vec<(usize, Range<u32>)> {
        orders
            .iter()
            .map(|order| (order.worker, order.shards.clone()))
            .collect()
    }

    #[test]
    fn a_step_is_divided_evenly_and_only_once() {
        let mut assignment = Assignment::new(100);
        let orders = assignment.plan(&all(), &[0, 2, 5]);
        assert_eq!(told(&orders), [(0, 0..5), (2, 5..10), (5, 10..16)]);
        assert_eq!((orders[0].number, assignment.next_number()), (100, 103));
        assert!(assignment.plan(&all(), &[0, 2, 5]).is_empty());
    }

    #[test]
    fn only_the_lost_workers_shards_go_to_the_survivors() {
        let mut assignment = Assignment::new(0);
        let orders = assignment.plan(&all(), &[0, 1, 2]);
        assignment.answered(orders[0].number);
        assert_eq!(assignment.lost(1), 5);
        let missing: Vec<u32> = (5..16).collect();
        let again = assignment.plan(&missing, &[0, 2]);
        assert_eq!(told(&again), [(0, 5..7), (2, 7..10)]);
        // With nobody left they wait for whoever comes next.
        assignment.lost(0);
        assignment.lost(2);
        assert!(assignment.plan(&missing, &[]).is_empty());
        assert_eq!(told(&assignment.plan(&missing, &[1])), [(1, 5..16)]);
    }

    #[test]
    fn a_slow_workers_shards_are_computed_twice_and_it_gets_no_more() {
        let mut assignment = Assignment::new(0);
        let orders = assignment.plan(&all(), &[0, 1]);
        assert_eq!(assignment.mark_slow(orders[1].number), Some(1));
        assert_eq!(assignment.mark_slow(orders[1].number), None);
        assert!(assignment.is_slow(1) && !assignment.is_slow(0));
        assert_eq!(told(&assignment.plan(&all(), &[0, 1])), [(0, 8..16)]);
        assignment.answered(orders[1].number);
        assert!(!assignment.is_slow(1));
        // The only worker there is may be slow: nobody else can help.
        let mut alone = Assignment::new(0);
        let orders = alone.plan(&all(), &[0]);
        alone.mark_slow(orders[0].number);
        assert!(alone.plan(&all(), &[0]).is_empty());
    }

    #[test]
    fn shards_that_are_apart_become_orders_of_their_own() {
        let mut assignment = Assignment::new(0);
        let orders = assignment.plan(&[0, 1, 5, 9, 10, 11], &[3]);
        assert_eq!(told(&orders), [(3, 0..2), (3, 5..6), (3, 9..12)]);
    }

    proptest! {
        #[test]
        fn whatever_happens_every_missing_shard_is_under_way(
            happenings in prop::collection::vec((0usize..4, 0usize..5), 0..40),
        ) {
            let mut assignment = Assignment::new(0);
            let mut missing = all();
            let mut present = vec![0usize, 1, 2, 3, 4];
            for (what, worker) in happenings {
                assignment.plan(&missing, &present);
                let order = assignment.outstanding.values().find(|o| o.worker == worker).cloned();
                match (what, order) {
                    (0, Some(order)) => {
                        assignment.answered(order.number);
                        missing.retain(|shard| !order.shards.contains(shard));
                    }
                    (1, Some(order)) => drop(assignment.mark_slow(order.number)),
                    (2, _) => {
                        let _ = assignment.lost(worker);
                        present.retain(|other| *other != worker);
                    }
                    (3, _) if !present.contains(&worker) => present.push(worker),
                    _ => {}
                }
                present.sort_unstable();
                assignment.plan(&missing, &present);
                let able = present.iter().any(|worker| !assignment.is_slow(*worker));
                let idle = missing.iter().find(|shard| !assignment.is_covered(**shard));
                prop_assert!(!able || idle.is_none(), "shard {:?} waits for nobody", idle);
            }
        }
    }
}
