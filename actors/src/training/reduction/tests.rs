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
