use super::*;
use crate::drift::statistics::testing::Lcg;

/// A thousand zeros, then a thousand ones.
fn step() -> Vec<f64> {
    [vec![0.0; 1000], vec![1.0; 1000]].concat()
}

/// Uniform numbers, from index 2000 on larger by `shift`.
fn uniform(shift: f64) -> Vec<f64> {
    let mut random = Lcg::new(12_345);
    (0..4000)
        .map(|index| random.next_unit() + if index >= 2000 { shift } else { 0.0 })
        .collect()
}

/// Errors with these probabilities, the second from index 2000 on.
fn errors(count: usize, before: f64, after: f64) -> Vec<f64> {
    let mut random = Lcg::new(12_345);
    (0..count)
        .map(|index| {
            let probability = if index >= 2000 { after } else { before };
            f64::from(u8::from(random.next_unit() < probability))
        })
        .collect()
}

/// The stream of the examples in river's documentation: Python's `random.Random(42)`, 1000 fair bits and then 1000
/// that are one with probability 0.7.
fn example_of_river() -> Vec<f64> {
    const HEX: &str = concat!(
        "8e136c8fdf80874fc1a8b318f746b6f1cc65334459360e205be053cf74cb74931cfac5a61b1f1e35f5eb486ba8b57c980f46",
        "19b8252c65fff1e0991f1dc10940b1be1b6c6b762ded9692595d2aa0c702eb0a4ae9bc826fde33c07e5b0d7178ed66cb6bd7",
        "32c6bb9ea97ce79b47341c643b756ff993eb2fd5f1cc44e8237cfa535094fdbef93fbebba9fbfe9ffb3babf1babb457d3f3e",
        "bf5f8effe675fff1e75f2fdffffcc5daeebffbe76ad96f363cbb4daff3fb7d87af7ffbdfbb7d9fff3cdbdeff17dfbfdc3f6e",
        "bf3fde37ef0d7fbafffadbf67f6f7fbfba97e3dfe51f3f3aeddafdefaff57e27bd23d9fa8fe6d765f7f5affff70f5bc3657f",
    );
    HEX.chars()
        .flat_map(|digit| {
            let bits = digit.to_digit(16).unwrap();
            (0..4).rev().map(move |bit| f64::from(bits >> bit & 1))
        })
        .collect()
}

/// Where a detector fires.
fn fires(mut update: impl FnMut(f64) -> Option<Change>, stream: &[f64]) -> Vec<usize> {
    stream
        .iter()
        .enumerate()
        .filter_map(|(index, value)| update(*value).map(|_| index))
        .collect()
}

fn first(update: impl FnMut(f64) -> Option<Change>, stream: &[f64]) -> Option<usize> {
    fires(update, stream).first().copied()
}

#[test]
fn adwin_and_page_hinkley_fire_where_the_reference_values_say() {
    for (stream, adwin, page_hinkley) in [
        (step(), Some(1023), Some(1051)),
        (uniform(0.2), Some(2111), Some(2275)),
        (uniform(0.0), None, None),
    ] {
        let (mut a, mut p) = (Adwin::new(), PageHinkley::new());
        assert_eq!(first(|value| a.update(value), &stream), adwin);
        assert_eq!(first(|value| p.update(value), &stream), page_hinkley);
    }
}

/// What river 0.26.1 finds in the same streams; the indices of the example are printed in its documentation.
#[test]
fn hddm_fires_where_river_does() {
    for (stream, by_average, by_forgetting) in [
        (example_of_river(), vec![1206], vec![1077]),
        (step(), vec![1003], vec![1010]),
        (errors(4000, 0.1, 0.3), vec![2074], vec![2037]),
        (errors(6000, 0.1, 0.2), vec![2401], vec![4477]),
        (errors(4000, 0.1, 0.1), vec![], vec![]),
    ] {
        let (mut a, mut w) = (HddmA::new(), HddmW::new());
        assert_eq!(fires(|value| a.update(value), &stream), by_average);
        assert_eq!(fires(|value| w.update(value), &stream), by_forgetting);
    }
}

#[test]
fn a_change_says_from_what_to_what() {
    let find = |update: &mut dyn FnMut(f64) -> Option<Change>| {
        step().into_iter().find_map(update).unwrap()
    };
    let (mut adwin, mut page_hinkley) = (Adwin::new(), PageHinkley::new());
    let (mut hddm_a, mut hddm_w) = (HddmA::new(), HddmW::new());
    for change in [
        find(&mut |value| adwin.update(value)),
        find(&mut |value| page_hinkley.update(value)),
        find(&mut |value| hddm_a.update(value)),
        find(&mut |value| hddm_w.update(value)),
    ] {
        assert!(change.before < 0.1 && change.after > 0.3, "{change:?}");
        assert!(change.statistic >= change.threshold, "{change:?}");
        assert!((1001..=1052).contains(&change.observations), "{change:?}");
    }
}

#[test]
fn what_was_found_is_found_once() {
    let mut back_and_forth = step();
    back_and_forth.extend(step());
    let (mut adwin, mut page_hinkley) = (Adwin::new(), PageHinkley::new());
    assert_eq!(fires(|value| adwin.update(value), &back_and_forth).len(), 3);
    let found = fires(|value| page_hinkley.update(value), &back_and_forth);
    assert_eq!(found.len(), 3, "{found:?}");
}

#[test]
fn a_window_takes_few_buckets_however_long_it_is() {
    let mut adwin = Adwin::new();
    let mut random = Lcg::new(3);
    for _ in 0..200_000 {
        assert_eq!(adwin.update(random.next_unit()), None);
    }
    assert_eq!(adwin.width(), 200_000);
    assert!(adwin.buckets() <= 6 * 17, "{}", adwin.buckets());
}

#[test]
fn numbers_that_are_none_change_nothing() {
    let mut stream = step();
    for index in (0..stream.len()).step_by(7).rev() {
        stream.insert(index, [f64::NAN, f64::INFINITY][index % 2]);
    }
    let finite = |stream: &[f64], index: usize| {
        stream[..index]
            .iter()
            .filter(|value| value.is_finite())
            .count()
    };
    let (mut adwin, mut page_hinkley) = (Adwin::new(), PageHinkley::new());
    let found = first(|value| adwin.update(value), &stream).unwrap();
    assert_eq!(finite(&stream, found), 1023);
    let found = first(|value| page_hinkley.update(value), &stream).unwrap();
    assert_eq!(finite(&stream, found), 1051);
    let (mut a, mut w) = (HddmA::new(), HddmW::new());
    let found = first(|value| a.update(value), &stream).unwrap();
    assert_eq!(finite(&stream, found), 1003);
    let found = first(|value| w.update(value), &stream).unwrap();
    assert_eq!(finite(&stream, found), 1010);
}

#[test]
fn hddm_is_asked_of_errors_only() {
    let fired = |mut bank: Bank| -> Vec<Detector> {
        let mut found: Vec<Detector> = step()
            .into_iter()
            .flat_map(|value| bank.update(value).collect::<Vec<_>>())
            .map(|(detector, _)| detector)
            .collect();
        found.dedup();
        found
    };
    assert_eq!(
        fired(Bank::of_values()),
        [Detector::Adwin, Detector::PageHinkley]
    );
    assert_eq!(
        fired(Bank::of_errors()),
        [
            Detector::HddmA,
            Detector::HddmW,
            Detector::Adwin,
            Detector::PageHinkley
        ]
    );
}
