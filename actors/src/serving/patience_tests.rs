use std::collections::VecDeque;

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

fn micros(value: f64) -> Duration {
    Duration::from_secs_f64(value.max(0.0) / 1e6)
}

/// A fit of batches of 1 to 32 rows that take `a·n + b` microseconds, `noise` more or less.
fn fitted(a: f64, b: f64, noise: f64, seed: u64) -> BatchCost {
    let mut random = StdRng::seed_from_u64(seed);
    let mut cost = BatchCost::default();
    for _ in 0..300 {
        let rows = random.random_range(1..=32usize);
        let factor = 1.0 + noise * random.random_range(-1.0..1.0);
        cost.record(rows, micros((a * rows as f64 + b) * factor));
    }
    cost
}

fn arrivals(gap_us: f64, rows: usize) -> Arrivals {
    let mut arrivals = Arrivals::default();
    for _ in 0..100 {
        arrivals.record(micros(gap_us), rows);
    }
    arrivals
}

#[test]
fn both_costs_are_found_among_noise_and_outliers() {
    let mut cost = fitted(20.0, 500.0, 0.05, 1);
    let near = |cost: &BatchCost| {
        for rows in [1, 16, 32] {
            let expected = 20.0 * rows as f64 + 500.0;
            let found = cost.expected(rows).as_secs_f64() * 1e6;
            assert!((found - expected).abs() < 0.1 * expected, "{rows}: {found}");
        }
    };
    near(&cost);
    // A batch that met a pause of the whole machine, now and then.
    for rows in 1..=32 {
        if rows % 16 == 0 {
            cost.record(rows, Duration::from_secs(2));
        }
        cost.record(rows, micros(20.0 * rows as f64 + 500.0));
    }
    near(&cost);
    // It follows a model that has become slower for good.
    for _ in 0..20 {
        for rows in 1..=32 {
            cost.record(rows, micros(40.0 * rows as f64 + 900.0));
        }
    }
    let found = cost.expected(10).as_secs_f64() * 1e6;
    assert!((found - 1300.0).abs() < 130.0, "{found}");
}

#[test]
fn nothing_is_waited_for_before_the_costs_are_told_apart() {
    let soon = arrivals(1.0, 1);
    let waits = |cost: &BatchCost, arrivals: &Arrivals| patience(cost, arrivals, 1, Duration::ZERO);
    assert_eq!(waits(&BatchCost::default(), &soon), Duration::ZERO);
    let mut cost = BatchCost::default();
    for _ in 0..100 {
        cost.record(4, micros(600.0));
    }
    assert_eq!(waits(&cost, &soon), Duration::ZERO);
    assert_eq!(cost.expected(4), micros(600.0));
    let cost = fitted(20.0, 500.0, 0.0, 2);
    let nobody = Arrivals::default();
    assert_eq!(waits(&cost, &nobody), Duration::ZERO);
    assert!(waits(&cost, &soon) > Duration::ZERO);
}

#[test]
fn it_waits_for_those_who_come_soon_and_for_nobody_else() {
    let cost = fitted(20.0, 500.0, 0.0, 3);
    let waits = |gap: f64, requests, since: f64| {
        patience(&cost, &arrivals(gap, 1), requests, micros(since)).as_secs_f64() * 1e6
    };
    // To the end of the range that they come in.
    assert!(
        (waits(100.0, 1, 0.0) - 128.0).abs() < 0.1,
        "{}",
        waits(100.0, 1, 0.0)
    );
    assert!((waits(100.0, 1, 28.0) - 100.0).abs() < 0.1);
    // (500 − 1·20) / 2 is what one more is worth to one, and (500 − 4·20) / 5 to four.
    assert!(waits(230.0, 1, 200.0) > 0.0);
    assert_eq!((waits(260.0, 1, 0.0), waits(100.0, 4, 0.0)), (0.0, 0.0));
    assert!(waits(60.0, 4, 0.0) > 0.0);
    // Whoever should have come by now is not waited for.
    assert_eq!(waits(100.0, 1, 130.0), 0.0);
    // Nor is anybody where a batch costs what its rows do.
    let by_row = fitted(20.0, 0.0, 0.0, 4);
    assert_eq!(
        patience(&by_row, &arrivals(1.0, 1), 1, Duration::ZERO),
        Duration::ZERO
    );
}

proptest! {
    #[test]
    fn it_is_finite_and_never_more_than_what_a_batch_costs(
        batches in proptest::collection::vec((1usize..200, 0u64..10_000_000), 0..80),
        gaps in proptest::collection::vec((0u64..10_000_000_000, 1usize..200), 0..80),
        requests in 1usize..300,
        since in 0u64..20_000_000_000,
    ) {
        let mut cost = BatchCost::default();
        let longest = batches.iter().map(|(_, taken)| *taken).max().unwrap_or(0);
        for (rows, taken) in batches {
            cost.record(rows, Duration::from_micros(taken));
        }
        let mut arrivals = Arrivals::default();
        for (gap, rows) in gaps {
            arrivals.record(Duration::from_micros(gap), rows);
        }
        let waits = patience(&cost, &arrivals, requests, Duration::from_micros(since));
        // Whatever the fit is, it lies between its observations: a batch costs no more than the longest.
        prop_assert!(waits <= Duration::from_micros(longest + 1));
        prop_assert!(cost.expected(requests) < Duration::from_secs(100_000));
    }
}

/// One server that computes batches of at most 32; the mean latency of requests that come at these times, in
/// microseconds.
fn simulated(arrivals_us: &[f64], (a, b): (f64, f64), rule: Rule) -> f64 {
    let mut waiting: VecDeque<f64> = VecDeque::new();
    let mut coming = arrivals_us.iter().copied().peekable();
    let (mut cost, mut seen) = (BatchCost::default(), Arrivals::default());
    let (mut now, mut last, mut sum) = (0.0f64, 0.0f64, 0.0f64);
    let mut take = |now: f64, waiting: &mut VecDeque<f64>, seen: &mut Arrivals, last: &mut f64| {
        while let Some(at) = coming.next_if(|at| *at <= now) {
            seen.record(micros(at - *last), 1);
            *last = at;
            waiting.push_back(at);
        }
        coming.peek().copied()
    };
    loop {
        let next = take(now, &mut waiting, &mut seen, &mut last);
        let Some(&oldest) = waiting.front() else {
            match next {
                Some(at) => now = at,
                None => return sum / arrivals_us.len() as f64,
            }
            continue;
        };
        let until = match rule {
            Rule::Fixed(delay) => oldest + delay,
            Rule::Adaptive => {
                let waits = patience(&cost, &seen, waiting.len(), micros(now - last));
                now + waits.as_secs_f64() * 1e6
            }
        };
        if waiting.len() < 32 && now < until {
            match next {
                Some(next) if next < until => {
                    now = next;
                    continue;
                }
                _ => now = until,
            }
        }
        let count = waiting.len().min(32);
        let taken = a * count as f64 + b;
        cost.record(count, micros(taken));
        now += taken;
        sum += waiting.drain(..count).map(|at| now - at).sum::<f64>();
    }
}

#[derive(Clone, Copy)]
enum Rule {
    Fixed(f64),
    Adaptive,
}

/// Requests at random, or in bursts of eight that come together.
fn times(rate_per_us: f64, burst: usize, seed: u64) -> Vec<f64> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut at = 0.0;
    let mut times = Vec::new();
    while times.len() < 20_000 {
        at += -random.random_range(f64::EPSILON..1.0f64).ln() / rate_per_us * burst as f64;
        // Those of a burst follow each other within some microseconds, as those of one caller do.
        times.extend((0..burst).map(|number| at + 5.0 * number as f64));
    }
    times.sort_by(f64::total_cmp);
    times
}

/// The rule is used where it is asked for: this is what it is worth, against sending at once and against a fixed delay.
#[test]
fn mean_latencies_against_sending_at_once() {
    // What a batch costs by itself and for each row: little, as a small network; much, as a call to a GPU.
    for (a, b) in [(5.0, 100.0), (20.0, 1_000.0), (50.0, 50.0)] {
        for load in [0.05, 0.3, 0.7, 0.9] {
            for burst in [1, 8] {
                // As a share of what full batches of 32 would take.
                let rate = load * 32.0 / (a * 32.0 + b);
                let times = times(rate, burst, 7);
                let at_once = simulated(&times, (a, b), Rule::Fixed(0.0));
                let delayed = simulated(&times, (a, b), Rule::Fixed(1_000.0));
                let adaptive = simulated(&times, (a, b), Rule::Adaptive);
                println!(
                    "a {a:>3} b {b:>5} load {load:.2} bursts of {burst}: at once {at_once:>7.0} us, \
                     1 ms delay {delayed:>7.0} us, adaptive {adaptive:>7.0} us"
                );
                assert!(adaptive <= 1.05 * at_once, "{a} {b} {load} {burst}");
            }
        }
    }
    // Where requests come in bursts and a batch costs much by itself, the rule is worth having.
    let times = times(0.3 * 32.0 / 1_640.0, 8, 7);
    let at_once = simulated(&times, (20.0, 1_000.0), Rule::Fixed(0.0));
    let adaptive = simulated(&times, (20.0, 1_000.0), Rule::Adaptive);
    assert!(adaptive < 0.9 * at_once, "{adaptive} {at_once}");
}
