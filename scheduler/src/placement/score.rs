//! Which of the nodes that fit is best.
//!
//! In this order: where its affinity group already is; where fewest of its spread group are; not
//! on GPUs it does not use; then by strategy: `Pack` takes the node that is fullest afterwards,
//! `Spread` the one that is emptiest. Integers only, so every replica agrees.

use std::cmp::Reverse;

use mobula_core::Resources;
use mobula_core::spec::Strategy;

use super::{NodeSnapshot, Request};

/// Smaller is better; compared field by field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Score {
    affinity: Reverse<u32>,
    spread: u32,
    wastes_gpu: bool,
    strategy: i64,
    neighbours: i64,
}

/// How good `node` is for `request`, given that it fits.
pub(crate) fn score(node: &NodeSnapshot, request: &Request) -> Score {
    let leftover = leftover_permille(node, &request.resources);
    let neighbours = i64::from(node.actor_count);
    let (strategy, neighbours) = match request.placement.strategy {
        Strategy::Pack => (leftover, -neighbours),
        Strategy::Spread => (-leftover, neighbours),
    };
    Score {
        affinity: Reverse(node.affinity_count(request)),
        spread: node.spread_count(request),
        wastes_gpu: request.placement.strategy == Strategy::Pack
            && request.resources.gpu_milli == 0
            && node.capacity.gpu_milli > 0,
        strategy,
        neighbours,
    }
}

/// What stays free of the resources that are asked for, as the mean of their shares of the node's
/// capacity, in thousandths. With nothing asked for, every node is alike.
fn leftover_permille(node: &NodeSnapshot, asked: &Resources) -> i64 {
    let custom = asked.custom.iter().map(|(name, asked)| {
        let amount = |of: &Resources| of.custom.get(name).copied().unwrap_or(0);
        (*asked, amount(&node.free), amount(&node.capacity))
    });
    let fixed = [
        (
            asked.cpu_milli,
            node.free.cpu_milli,
            node.capacity.cpu_milli,
        ),
        (
            asked.memory_bytes,
            node.free.memory_bytes,
            node.capacity.memory_bytes,
        ),
        (
            asked.gpu_milli,
            node.free.gpu_milli,
            node.capacity.gpu_milli,
        ),
    ];
    let (mut sum, mut count) = (0, 0);
    for (asked, free, capacity) in fixed.into_iter().chain(custom) {
        if asked == 0 || capacity == 0 {
            continue;
        }
        let left = u128::from(free.saturating_sub(asked)) * 1000 / u128::from(capacity);
        sum += i64::try_from(left).expect("what is left is at most the capacity");
        count += 1;
    }
    if count == 0 { 0 } else { sum / count }
}
