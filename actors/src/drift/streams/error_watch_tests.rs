//! How often a share of errors that stays as it was is taken for another one, and how soon another one is found: simulations with
//! seeds, which are printed.

use super::*;
use crate::drift::statistics::testing::Lcg;

/// Labels after which a share of errors that went from 10 to 20 % is found; `docs/drift.md` says so.
const LABELS_TO_FIND: usize = 1_500;

/// Gives a watch so many labels, wrong with this probability; where it finds what.
fn given(
    watch: &mut ErrorWatch,
    random: &mut Lcg,
    labels: usize,
    probability: f64,
) -> Vec<(usize, Change)> {
    (1..=labels)
        .filter_map(|label| {
            let (_, change) = watch.update(random.next_unit() < probability)?;
            Some((label, change))
        })
        .collect()
}

#[test]
fn errors_that_stay_as_frequent_as_they_were_are_no_finding_though_detectors_alarm() {
    let (mut found, mut alarms) = (0, 0);
    for (seed, probability) in [(1, 0.1), (2, 0.2), (3, 0.3)] {
        println!("seed {seed}, {probability} of the labels are errors");
        let mut random = Lcg::new(seed);
        let mut watch = ErrorWatch::new();
        let mut detectors = Bank::of_errors();
        for _ in 0..FAMILY_LABELS {
            let is_wrong = random.next_unit() < probability;
            found += u32::from(watch.update(is_wrong).is_some());
            alarms += detectors.update(f64::from(u8::from(is_wrong))).count();
        }
    }
    assert!(found <= 1, "{found} findings");
    // What the test is for.
    assert!(alarms > 300, "{alarms} alarms");
}

#[test]
fn errors_that_double_are_found_soon_and_once() {
    for seed in 1..=20 {
        println!("seed {seed}");
        let mut random = Lcg::new(seed);
        let mut watch = ErrorWatch::new();
        assert_eq!(given(&mut watch, &mut random, 2_000, 0.1), []);
        let found = given(&mut watch, &mut random, 20_000, 0.2);
        let [(label, change)] = found.as_slice() else {
            panic!("seed {seed}: {found:?}");
        };
        assert!(*label <= LABELS_TO_FIND, "seed {seed}: {label} labels");
        assert!(
            change.before < 0.15 && change.after > change.before,
            "seed {seed}: {change:?}"
        );
    }
}

#[test]
fn errors_that_become_fewer_again_are_found_too() {
    let mut random = Lcg::new(5);
    let mut watch = ErrorWatch::new();
    let shares = [0.05, 0.5, 0.05, 0.5];
    let mut found = Vec::new();
    for probability in shares {
        let of_part = given(&mut watch, &mut random, 3_000, probability);
        found.extend(
            of_part
                .iter()
                .map(|(_, change)| change.after > change.before),
        );
    }
    assert_eq!(found, [true, false, true]);
}

#[test]
fn answers_that_are_all_wrong_at_once_are_found_within_two_looks() {
    let mut random = Lcg::new(6);
    let mut watch = ErrorWatch::new();
    assert_eq!(given(&mut watch, &mut random, 300, 0.05), []);
    let found = given(&mut watch, &mut random, 200, 0.95);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].0 <= 2 * BLOCK_LABELS as usize, "{found:?}");
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut random = Lcg::new(7);
    let mut watch = ErrorWatch::new();
    let labels = 3 * BLOCKS_MAX * BLOCK_LABELS as usize;
    given(&mut watch, &mut random, labels, 0.2);
    assert_eq!(watch.blocks.len(), BLOCKS_MAX);
    assert_eq!(watch.known.of, labels as u64);
    let latest: u64 = watch.blocks.iter().sum();
    assert!(latest < watch.known.hits);
}
