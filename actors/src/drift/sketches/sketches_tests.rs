//! The guarantees on streams of every kind, of one sketch and of merged ones. Seeds are constants: a failure repeats.

use super::ddsketch::{BINS_MAX, RELATIVE_ACCURACY};
use super::kll::RETAINED_MAX;
use super::*;
use crate::drift::statistics::testing::{Lcg, assert_close};
use crate::drift::statistics::wasserstein_distance_of_points;
use crate::training::random::{Purpose, Stream};

const COUNT: usize = 50_000;

/// Room for the rounding of a logarithm at a bin's end.
const ROUNDING: f64 = 1e-9;

fn coins(part: u64) -> Stream {
    Stream::new(17, Purpose::Compaction, "0", part)
}

/// Named streams of all kinds, in the order in which they come.
fn streams() -> Vec<(&'static str, Vec<f32>)> {
    let normals = Stream::new(3, Purpose::Initialise, "normal", 0);
    let normal = |index: usize| normals.normal(index as u64, 0);
    let mut random = Lcg::new(12_345);
    let uniform: Vec<f32> = (0..COUNT).map(|_| random.next_unit() as f32).collect();
    let of = |value: &dyn Fn(usize) -> f64| (0..COUNT).map(|i| value(i) as f32).collect();
    let mut ascending = uniform.clone();
    ascending.sort_by(f32::total_cmp);
    let descending = ascending.iter().rev().copied().collect();
    // The smallest and the largest in turn, towards the middle.
    let zigzag = (0..COUNT).map(|i| ascending[if i % 2 == 0 { i / 2 } else { COUNT - 1 - i / 2 }]);
    vec![
        ("normal", of(&normal)),
        ("lognormal", of(&|i| (2.0 * normal(i)).exp())),
        ("far from zero", of(&|i| 2000.0 + 5.0 * normal(i))),
        ("constant", vec![-7.25; COUNT]),
        (
            "mostly zero",
            of(&|i| if i % 10 == 0 { normal(i) } else { 0.0 }),
        ),
        ("two points", of(&|i| f64::from(u8::from(i % 3 == 0)))),
        ("ascending", ascending.clone()),
        ("descending", descending),
        ("zigzag", zigzag.collect()),
        ("uniform", uniform),
    ]
}

fn sorted(values: &[f32]) -> Vec<f32> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted
}

fn ddsketch_of(center: f64, values: &[f32]) -> DdSketch {
    let mut sketch = DdSketch::new(center);
    for value in values {
        sketch.add(f64::from(*value));
    }
    sketch
}

fn kll_of(part: u64, values: &[f32]) -> Kll {
    let mut sketch = Kll::new(coins(part));
    for value in values {
        sketch.add(*value);
    }
    sketch
}

/// Merged pairwise, as a tree would.
fn merged_in_pairs(mut sketches: Vec<Kll>) -> Kll {
    while sketches.len() > 1 {
        sketches = sketches
            .chunks(2)
            .map(|pair| {
                let mut merged = pair[0].clone();
                pair[1..].iter().for_each(|other| merged.merge(other));
                merged
            })
            .collect();
    }
    sketches.remove(0)
}

fn check_quantiles(name: &str, sketch: &DdSketch, center: f64, sorted: &[f32]) {
    for percent in 0..=100 {
        let q = f64::from(percent) / 100.0;
        let exact = f64::from(sorted[(q * (sorted.len() - 1) as f64) as usize]);
        let found = sketch.quantile(q).unwrap();
        let allowed = (exact - center).abs() * (RELATIVE_ACCURACY + ROUNDING);
        assert!(
            (found - exact).abs() <= allowed,
            "{name} {q}: {found} for {exact}"
        );
    }
}

#[test]
fn quantiles_are_as_close_as_promised() {
    for (name, values) in streams() {
        let sorted = sorted(&values);
        for center in [0.0, f64::from(values[0])] {
            let sketch = ddsketch_of(center, &values);
            assert_eq!(sketch.count(), COUNT as u64, "{name}");
            check_quantiles(name, &sketch, center, &sorted);
        }
    }
}

#[test]
fn merged_sketches_of_values_are_the_sketch_of_all() {
    for (name, values) in streams() {
        let whole = ddsketch_of(0.5, &values);
        let parts: Vec<DdSketch> = values
            .chunks(777)
            .map(|part| ddsketch_of(0.5, part))
            .collect();
        let merge = |parts: &mut dyn Iterator<Item = &DdSketch>| {
            parts.fold(DdSketch::new(0.5), |mut merged, part| {
                merged.merge(part).unwrap();
                merged
            })
        };
        assert_eq!(merge(&mut parts.iter()), whole, "{name}");
        assert_eq!(merge(&mut parts.iter().rev()), whole, "{name}");
        assert!(whole.is_sound(), "{name}");
    }
    let error = DdSketch::new(0.0).merge(&DdSketch::new(1.0)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("around 0 cannot take in one around 1"),
        "{error}"
    );
}

#[test]
fn ranks_are_as_close_as_promised_merged_or_not() {
    for (name, values) in streams() {
        let sorted = sorted(&values);
        let parts: Vec<Kll> = values
            .chunks(1_111)
            .zip(1..)
            .map(|(values, part)| kll_of(part, values))
            .collect();
        let mut in_turn = Kll::new(coins(0));
        parts.iter().for_each(|part| in_turn.merge(part));
        for sketch in [kll_of(0, &values), in_turn, merged_in_pairs(parts)] {
            assert!(
                sketch.is_sound() && sketch.retained() <= RETAINED_MAX,
                "{name}"
            );
            assert_eq!(
                sketch.ends(),
                Some((sorted[0], sorted[COUNT - 1])),
                "{name}"
            );
            let points = sketch.points();
            assert_eq!(
                points.iter().map(|(_, n)| n).sum::<u64>(),
                COUNT as u64,
                "{name}"
            );
            let error = sketch.rank_error();
            assert!(error > 0.0 && error < 0.02, "{name}: {error}");
            for at in (0..COUNT).step_by(COUNT / 100) {
                let value = sorted[at];
                let exact = sorted.partition_point(|known| *known <= value) as f64;
                let up_to = points
                    .iter()
                    .take_while(|(known, _)| *known <= f64::from(value));
                let found = up_to.map(|(_, n)| *n).sum::<u64>() as f64;
                let off = (found - exact).abs() / COUNT as f64;
                assert!(
                    off <= error,
                    "{name}: {value} is off by {off}, at most {error}"
                );
            }
        }
    }
}

#[test]
fn few_values_are_kept_as_they_are() {
    let values: Vec<f32> = (0..CAPACITY_BELOW).map(|i| (i * 37 % 101) as f32).collect();
    let sketch = kll_of(0, &values);
    assert_eq!(sketch.rank_error(), 0.0);
    let kept: Vec<f64> = sketch
        .points()
        .into_iter()
        .map(|(value, _)| value)
        .collect();
    let exact: Vec<f64> = sorted(&values).into_iter().map(f64::from).collect();
    assert_eq!(kept, exact);
    assert_eq!(DdSketch::new(3.0).quantile(0.5), None);
    assert_eq!(DdSketch::new(3.0).points(), []);
}

const CAPACITY_BELOW: usize = super::kll::CAPACITY - 1;

#[test]
fn coins_fall_by_position() {
    let values = &streams()[0].1;
    assert_eq!(kll_of(1, values), kll_of(1, values));
    assert_ne!(kll_of(1, values).points(), kll_of(2, values).points());
}

#[test]
fn distances_to_a_sketch_are_as_close_as_it_says() {
    for (name, values) in streams() {
        let exact: Vec<(f64, u64)> = sorted(&values)
            .into_iter()
            .map(|value| (f64::from(value), 1))
            .collect();
        let mean = exact.iter().map(|(value, _)| value).sum::<f64>() / COUNT as f64;
        let sketch = ddsketch_of(mean, &values);
        let error = wasserstein_distance_of_points(&sketch.points(), &exact).unwrap();
        let allowed = sketch.distance_error_max();
        assert!(
            error <= allowed * (1.0 + ROUNDING),
            "{name}: {error}, at most {allowed}"
        );
        let deviation =
            (exact.iter().map(|(x, _)| (x - mean).powi(2)).sum::<f64>() / COUNT as f64).sqrt();
        // Around the mean the mean distance is no more than a standard deviation.
        assert!(
            allowed <= 1.03 * RELATIVE_ACCURACY * deviation + ROUNDING,
            "{name}: {allowed}"
        );
    }
}

/// More orders of magnitude than there are bins for, in the order that is worst: what is kept shrinks as larger ones come.
#[test]
fn bins_collapse_towards_the_center_and_their_number_is_bounded() {
    let values: Vec<f64> = (-1500..1500).map(|power| 1.2f64.powi(power)).collect();
    let mut up = DdSketch::new(0.0);
    let mut down = DdSketch::new(0.0);
    for value in &values {
        for value in [*value, -value] {
            up.add(value);
            assert!(up.bin_count() <= 2 * BINS_MAX);
        }
    }
    for value in values.iter().rev() {
        for value in [*value, -value] {
            down.add(value);
        }
    }
    assert_eq!(up, down);
    assert_eq!(up.count(), 6000);
    let largest = values[2999];
    let found = up.quantile(0.999).unwrap();
    assert!(
        (found / values[2993] - 1.0).abs() <= 2.0 * RELATIVE_ACCURACY,
        "{found}"
    );
    // All that collapsed lies close to the centre, and the error says so.
    let mean = values.iter().sum::<f64>() / 3000.0;
    let allowed = RELATIVE_ACCURACY * mean * 1.03 + 2.0 * largest * (-20.0f64).exp();
    assert!(
        up.distance_error_max() <= allowed,
        "{}",
        up.distance_error_max()
    );
    for value in [f64::MAX, f64::MIN, f64::MIN_POSITIVE, 5e-324, 0.0] {
        up.add(value);
    }
    assert!(up.is_sound() && up.bin_count() <= 2 * BINS_MAX);
    assert_eq!(
        (up.quantile(0.0), up.quantile(1.0)),
        (Some(f64::MIN), Some(f64::MAX))
    );
}

#[test]
fn what_is_no_number_is_counted_apart() {
    let mut values = DdSketch::new(0.0);
    let mut ranks = Kll::new(coins(0));
    for value in [f32::NAN, f32::INFINITY, 1.5, f32::NEG_INFINITY] {
        values.add(f64::from(value));
        ranks.add(value);
    }
    assert_eq!((values.count(), values.not_finite()), (1, 3));
    assert_eq!((ranks.count(), ranks.not_finite()), (1, 3));
    assert_eq!(ranks.ends(), Some((1.5, 1.5)));
    assert_eq!(values.quantile(0.5), Some(1.5));
}

#[test]
fn a_population_is_the_same_from_parts_and_knows_damage() {
    let rows: Vec<f32> = {
        let mut random = Lcg::new(5);
        (0..9_000 * 2)
            .map(|_| 100.0 + random.next_unit() as f32)
            .collect()
    };
    let centers = [100.5, 100.0];
    let mut whole = Population::new(&centers, 7, 0);
    whole.add_rows(&rows);
    let mut merged = Population::new(&centers, 7, 0);
    for (part, rows) in rows.chunks(2 * 1_000).enumerate() {
        let mut population = Population::new(&centers, 7, 1 + part as u64);
        population.add_rows(rows);
        merged.merge(&population);
    }
    assert_eq!((whole.rows(), merged.rows()), (9_000, 9_000));
    for (one, other) in whole.features().iter().zip(merged.features()) {
        assert_eq!(one.values(), other.values());
        assert_close(one.deviation(), other.deviation());
        // That of numbers between zero and one.
        assert!((one.deviation() - (1.0f64 / 12.0).sqrt()).abs() < 0.01);
    }
    assert_eq!(
        (whole.damaged_feature(), merged.damaged_feature()),
        (None, None)
    );
    assert_eq!(Population::from_bytes(&merged.to_bytes()).unwrap(), merged);
    let stored = serde_json::to_string(&merged).unwrap();
    let damaged = stored.replacen("\"at_center\":0", "\"at_center\":1", 1);
    assert_ne!(stored, damaged);
    let read: Population = serde_json::from_str(&damaged).unwrap();
    assert_eq!(read.damaged_feature(), Some(0));
}

/// Wide rows of values that fill all bins: each count takes a byte, and eight when it is read.
#[test]
fn a_wide_population_can_be_read_again() {
    const WIDTH: usize = 1500;
    let mut population = Population::new(&[0.0; WIDTH], 7, 0);
    for power in 0..1024 {
        let value = 1.0204f32.powi(power - 512);
        population.add_rows(&[value; WIDTH]);
        population.add_rows(&[-value; WIDTH]);
    }
    let bytes = population.to_bytes();
    assert_eq!(Population::from_bytes(&bytes).unwrap(), population);
    assert!(population.features()[0].values().bin_count() > 2000);
    for cut in [3, 11, bytes.len() / 2] {
        let error = Population::from_bytes(&bytes[..cut]).unwrap_err();
        assert!(error.contains("cut off"), "{error}");
    }
}
