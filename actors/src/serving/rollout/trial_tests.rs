use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// Steps of a canary that are judged.
const STEPS: u32 = 4;
const MIN_SAMPLES: u64 = 200;

/// Requests between two looks: more often than a router looks at a busy endpoint.
const LOOK_EVERY: u64 = 8;

/// How a version behaves.
#[derive(Clone, Copy)]
struct Version {
    errors: f64,
    /// The median latency.
    latency_us: f64,
    /// How often an answer takes so many times as long.
    slow: (f64, f64),
}

const GOOD: Version = Version {
    errors: 0.01,
    latency_us: 2_000.0,
    slow: (0.0, 1.0),
};

/// Requests of the candidate in a minute, of 200 a second of which it has five percent.
const IN_A_MINUTE: u64 = 600;

/// More requests of the candidate than any step takes.
const LONGEST: u64 = 100 * MIN_SAMPLES;

/// A latency around the median, log-normal with a standard deviation of 0.4: a 95th percentile of
/// twice the median.
fn latency(rng: &mut StdRng, version: Version) -> Duration {
    let (often, times) = version.slow;
    let is_slow = often > 0.0 && rng.random_bool(often);
    let median_us = version.latency_us * if is_slow { times } else { 1.0 };
    let (first, second): (f64, f64) = (rng.random_range(1e-12..1.0), rng.random());
    let normal = (-2.0 * first.ln()).sqrt() * (std::f64::consts::TAU * second).cos();
    Duration::from_secs_f64(median_us * (0.4 * normal).exp() / 1e6)
}

/// Sends requests to both, judging now and then, until the step is decided; how many the candidate had.
fn run(rng: &mut StdRng, trial: &mut Trial, candidate: Version, most: u64) -> (u64, Judgement) {
    let (mut of_candidate, mut requests) = (0, 0);
    loop {
        let (side, version) = if rng.random_bool(0.5) {
            of_candidate += 1;
            (Side::Candidate, candidate)
        } else {
            (Side::Baseline, GOOD)
        };
        if rng.random_bool(version.errors) {
            trial.record(side, Outcome::Failed("no"));
        } else {
            trial.record(side, Outcome::Answered(latency(rng, version)));
        }
        requests += 1;
        if requests % LOOK_EVERY != 0 {
            continue;
        }
        let judgement = trial.judge();
        if !matches!(judgement, Judgement::Hold(_)) || of_candidate >= most {
            return (of_candidate, judgement);
        }
    }
}

/// What becomes of a rollout whose steps go on until they are decided; how many requests the candidate had at the last.
fn roll_out(seed: u64, candidate: Version) -> (u64, Judgement) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut last = None;
    for _ in 0..STEPS {
        let mut trial = Trial::new(Guardrails::STANDARD, MIN_SAMPLES, STEPS);
        let (requests, judgement) = run(&mut rng, &mut trial, candidate, LONGEST);
        let is_passed = matches!(judgement, Judgement::Pass(_));
        last = Some((requests, judgement));
        if !is_passed {
            break;
        }
    }
    last.expect("a rollout has steps")
}

fn is_promoted(seed: u64, candidate: Version) -> bool {
    matches!(roll_out(seed, candidate), (_, Judgement::Pass(_)))
}

#[test]
fn an_equal_version_is_promoted() {
    const RUNS: u64 = 300;
    let not: Vec<u64> = (0..RUNS).filter(|seed| !is_promoted(*seed, GOOD)).collect();
    println!(
        "A/A: {} of {RUNS} not promoted (seeds 0..{RUNS})",
        not.len()
    );
    assert!(
        not.len() as u64 * 100 <= RUNS,
        "not promoted: seeds {not:?}"
    );
}

/// Only the tail is slower: the means differ by less than they may.
#[test]
fn a_version_whose_slowest_answers_alone_are_slower_is_not_promoted() {
    const RUNS: u64 = 100;
    // 95th percentiles that are longer by 21, 30 and 52 percent.
    for times in [2.0, 2.28, 2.84] {
        let slow = Version {
            slow: (0.1, times),
            ..GOOD
        };
        let ends: Vec<(u64, Judgement)> = (0..RUNS).map(|seed| roll_out(seed, slow)).collect();
        let promoted: Vec<usize> = ends
            .iter()
            .enumerate()
            .filter(|(_, (_, end))| matches!(end, Judgement::Pass(_)))
            .map(|(seed, _)| seed)
            .collect();
        let mut needed: Vec<u64> = ends
            .iter()
            .filter(|(_, end)| matches!(end, Judgement::RollBack(_)))
            .map(|(requests, _)| *requests)
            .collect();
        needed.sort_unstable();
        println!(
            "a tenth of the answers {times} times as slow: {} of {RUNS} promoted, {} rolled back, after {:?} requests of \
             the candidate in the median, {:?} at the most (seeds 0..{RUNS})",
            promoted.len(),
            needed.len(),
            needed.get(needed.len() / 2),
            needed.last()
        );
        assert!(
            promoted.len() as u64 * 100 <= 5 * RUNS,
            "{times}: promoted with the seeds {promoted:?}"
        );
    }
}

#[test]
fn a_95th_percentile_is_judged_also_where_a_step_needs_few_requests() {
    let mut trial = Trial::new(Guardrails::STANDARD, 40, 1);
    // Five answers of forty take longer, and two of the baseline's.
    for round in 0..40 {
        let slow = Duration::from_millis(if round % 8 == 0 { 3 } else { 2 });
        trial.record(Side::Candidate, Outcome::Answered(slow));
        let usual = Duration::from_millis(if round % 20 == 0 { 3 } else { 2 });
        trial.record(Side::Baseline, Outcome::Answered(usual));
    }
    let Judgement::Hold(evidence) = trial.judge() else {
        panic!("{:?}", trial.judge())
    };
    let of = |name: &str| {
        let mut rows = evidence.guardrails.iter();
        rows.any(|row| row.guardrail == name)
    };
    assert!(of("latency_p95"), "{evidence:?}");
    assert!(
        evidence.reason.contains("95th percentile"),
        "{}",
        evidence.reason
    );
}

#[test]
fn a_version_that_is_no_worse_is_rolled_back_in_at_most_one_of_a_hundred_rollouts() {
    const RUNS: u64 = 1_000;
    let mut rolled_back = 0;
    for seed in 0..RUNS {
        let mut rng = StdRng::seed_from_u64(seed);
        // As long as it takes, and longer than it should: the samples that pass a step are many more
        // than the default.
        let is_bad = (0..STEPS).any(|_| {
            let mut trial = Trial::new(Guardrails::STANDARD, 2 * MIN_SAMPLES, STEPS);
            let (_, judgement) = run(&mut rng, &mut trial, GOOD, 1_000);
            matches!(judgement, Judgement::RollBack(_))
        });
        rolled_back += u64::from(is_bad);
    }
    println!("A/A: {rolled_back} of {RUNS} rolled back (seeds 0..{RUNS})");
    assert!(rolled_back * 100 <= RUNS, "{rolled_back} of {RUNS}");
}

#[test]
fn five_percent_errors_and_a_third_more_latency_are_found_soon() {
    const RUNS: u64 = 100;
    let no_errors = Version {
        errors: 0.0,
        ..GOOD
    };
    let failing = Version {
        errors: 0.06,
        ..GOOD
    };
    let slow = Version {
        latency_us: 1.3 * GOOD.latency_us,
        ..no_errors
    };
    for (name, version, bound) in [("5 % more errors", failing, 1_500), ("+30 %", slow, 1_500)] {
        let mut needed = Vec::new();
        for seed in 0..RUNS {
            let mut rng = StdRng::seed_from_u64(1_000 + seed);
            let mut trial = Trial::new(Guardrails::STANDARD, MIN_SAMPLES, STEPS);
            let (requests, judgement) = run(&mut rng, &mut trial, version, bound);
            let Judgement::RollBack(evidence) = judgement else {
                panic!("{name}, seed {seed}: {judgement:?} after {requests} requests")
            };
            assert!(evidence.is_bounded(), "{evidence:?}");
            needed.push(requests);
        }
        needed.sort_unstable();
        if version.latency_us > GOOD.latency_us {
            let latest = needed[needed.len() - 1];
            assert!(latest <= IN_A_MINUTE, "{name}: {latest} requests");
            let median = needed[needed.len() / 2];
            assert!(median <= IN_A_MINUTE / 2, "{name}: {median} requests");
        }
        println!(
            "{name}: rolled back after {} requests of the candidate in the median, {} at the most \
             (seeds 1000..{})",
            needed[needed.len() / 2],
            needed[needed.len() - 1],
            1_000 + RUNS
        );
    }
}

#[test]
fn a_version_that_always_fails_is_found_within_a_few_requests() {
    let mut trial = Trial::new(Guardrails::STANDARD, MIN_SAMPLES, STEPS);
    let answered = Outcome::Answered(Duration::from_millis(2));
    let count = (1..100).find(|_| {
        trial.record(Side::Candidate, Outcome::Failed("probabilities[0] is NaN"));
        trial.record(Side::Baseline, answered);
        matches!(trial.judge(), Judgement::RollBack(_))
    });
    assert!((10..20).contains(&count.unwrap()), "{count:?}");
    let Judgement::RollBack(evidence) = trial.judge() else {
        panic!("it stays violated")
    };
    assert_eq!(evidence.candidate.errors, evidence.candidate.requests);
    assert_eq!(evidence.candidate.last_error, "probabilities[0] is NaN");
    assert_eq!(evidence.reason, "worse than the stable version: errors");
}

#[test]
fn without_requests_of_both_sides_nothing_is_decided() {
    let answered = Outcome::Answered(Duration::from_millis(2));
    let mut trial = Trial::new(Guardrails::STANDARD, 10, STEPS);
    let held = |trial: &Trial| match trial.judge() {
        Judgement::Hold(evidence) => evidence.reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(held(&trial), "0 of 10 requests");
    for _ in 0..50 {
        trial.record(Side::Candidate, answered);
        trial.record(Side::Stable, answered);
        trial.record(Side::CandidateUncompared, answered);
    }
    assert_eq!(held(&trial), "0 of 10 requests");
    for _ in 0..9 {
        trial.record(Side::Baseline, answered);
    }
    assert_eq!(held(&trial), "9 of 10 requests");
    trial.record(Side::Baseline, answered);
    let Judgement::Pass(evidence) = trial.judge() else {
        panic!("enough requests, all well")
    };
    assert_eq!(evidence.baseline.requests, 10);
    let p95 = evidence.candidate.latency_p95_us;
    assert!((2_000..2_100).contains(&p95), "{p95}");
    assert_eq!(evidence.candidate.latency_mean_us, 2_000);
}

#[test]
fn numbers_beyond_the_guardrails_hold_a_step_until_they_are_no_chance() {
    let answered = Outcome::Answered(Duration::from_millis(2));
    let mut trial = Trial::new(Guardrails::STANDARD, 20, STEPS);
    trial.record(Side::Candidate, Outcome::Failed("once"));
    for _ in 0..40 {
        trial.record(Side::Candidate, answered);
        trial.record(Side::Baseline, answered);
    }
    assert!(matches!(trial.judge(), Judgement::Hold(_)));
    for _ in 0..300 {
        trial.record(Side::Candidate, answered);
        trial.record(Side::Baseline, answered);
    }
    assert!(matches!(trial.judge(), Judgement::Pass(_)));
}

#[test]
fn refusals_say_nothing_of_answers_but_more_of_them_than_the_stable_versions_do() {
    let answered = Outcome::Answered(Duration::from_millis(2));
    let mut trial = Trial::new(Guardrails::STANDARD, 20, STEPS);
    // Both are overloaded alike: that is no fault of the candidate.
    for _ in 0..200 {
        for side in [Side::Candidate, Side::Baseline] {
            trial.record(side, answered);
            trial.record(side, Outcome::Refused);
        }
    }
    let Judgement::Pass(evidence) = trial.judge() else {
        panic!("{:?}", trial.judge())
    };
    assert_eq!(evidence.candidate.requests, 200);
    assert_eq!(
        (evidence.candidate.errors, evidence.baseline.errors),
        (0, 0)
    );

    let mut trial = Trial::new(Guardrails::STANDARD, 20, STEPS);
    let count = (1..200).find(|_| {
        trial.record(Side::Candidate, Outcome::Refused);
        trial.record(Side::Candidate, answered);
        trial.record(Side::Baseline, answered);
        matches!(trial.judge(), Judgement::RollBack(_))
    });
    assert!((10..20).contains(&count.unwrap()), "{count:?}");
    let Judgement::RollBack(evidence) = trial.judge() else {
        panic!("it stays violated")
    };
    assert!(evidence.is_bounded());
    assert_eq!(evidence.candidate.errors, 0);
    assert!(
        evidence
            .reason
            .starts_with("worse than the stable version: refusals (of the candidate's"),
        "{}",
        evidence.reason
    );
}

#[test]
fn texts_of_others_are_cut_where_a_character_ends() {
    let cut = shortened(&"ä".repeat(EVIDENCE_TEXT_BYTES_MAX));
    assert!(cut.len() <= EVIDENCE_TEXT_BYTES_MAX && cut.ends_with('ä'));
}
