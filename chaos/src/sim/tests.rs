use std::collections::BTreeSet;

use super::*;

/// Seeds of the smoke set, bounded in number and not in time: some seconds on one core.
const SMOKE_SEEDS: u64 = 200;

/// Seeds that failed once, each with what it found.
const CORPUS: &str = include_str!("corpus.txt");

fn corpus() -> impl Iterator<Item = (u64, &'static str)> {
    let lines = CORPUS.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| {
        let (seed, found) = line.split_once(' ').expect("a seed, and what it found");
        (seed.parse().expect("a number"), found)
    })
}

fn assert_kept(report: &Report) {
    if let Some(violation) = &report.violation {
        panic!(
            "seed {}: {violation}\n  {}\n  {}",
            report.seed,
            report.swarm,
            report.replay()
        );
    }
}

#[test]
fn the_smoke_set_keeps_every_promise_and_meets_every_kind_of_fault() {
    let campaign = Campaign {
        first_seed: 1,
        seeds: Some(SMOKE_SEEDS),
        time_max: None,
        events_max: EVENTS_MAX,
        threads: 2,
        stops_at_failure: true,
    };
    let summary = run_many(&campaign, || {}, |_| {});
    for report in &summary.failures {
        assert_kept(report);
    }
    assert_eq!(summary.seeds, SMOKE_SEEDS);
    // A run in which little happens shows little.
    let seeds = SMOKE_SEEDS;
    let counts = summary.counts;
    assert_eq!(counts.missing(seeds), Vec::<&str>::new(), "{counts:?}");
    assert!(counts.crashes > seeds, "{counts:?}");
    assert!(counts.snapshots > seeds, "{counts:?}");
    assert!(counts.leaders > 2 * seeds, "{counts:?}");
    assert!(counts.answers > 20 * seeds, "{counts:?}");
    assert!(counts.entries > 100 * seeds, "{counts:?}");
}

#[test]
fn a_seed_is_a_run() {
    let mut traces = BTreeSet::new();
    for seed in 1_000..1_012 {
        let first = run(seed, EVENTS_MAX, false);
        let again = run(seed, EVENTS_MAX, false);
        assert_eq!(first, again, "seed {seed}");
        traces.insert(first.trace);
    }
    assert_eq!(traces.len(), 12, "seeds differ from each other");
}

#[test]
fn what_failed_once_is_kept_now() {
    for (seed, found) in corpus() {
        println!("seed {seed}: {found}");
        assert_kept(&run(seed, EVENTS_MAX, false));
    }
}
