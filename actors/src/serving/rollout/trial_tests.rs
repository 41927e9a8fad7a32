use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// The candidate's part in the steps of a canary that are judged, in percent.
const WEIGHTS: [u32; 4] = [5, 10, 25, 50];
const STEPS: u32 = WEIGHTS.len() as u32;
const MIN_SAMPLES: u64 = 200;

/// Requests of the candidate between two looks: a router looks twice a second.
const LOOK_EVERY: u64 = 4;

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

/// Requests a second to both.
const RATE: f64 = 200.0;

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

/// A step that needs so many samples.
fn step_of(weight_percent: u32, min_samples: u64) -> Trial {
    Trial::new(Guardrails::STANDARD, min_samples, STEPS, weight_percent)
}

/// The part of the requests that a candidate gets whose keys are so many percent, if all keys have as many.
fn part_of(weight_percent: u32) -> f64 {
    f64::from(weight_percent) / 100.0
}

/// Sends requests to both, this part of them to the candidate, judging now and then, until the step is decided; how many
/// the candidate had.
fn run(
    rng: &mut StdRng,
    mut trial: Trial,
    part: f64,
    [stable, candidate]: [Version; 2],
    most: u64,
) -> (u64, Judgement) {
    let mut of_candidate = 0;
    loop {
        let is_candidate = rng.random_bool(part);
        let (side, version) = if is_candidate {
            of_candidate += 1;
            (Side::Candidate, candidate)
        } else {
            (Side::Baseline, stable)
        };
        if rng.random_bool(version.errors) {
            trial.record(side, Outcome::Failed("no"));
        } else {
            trial.record(side, Outcome::Answered(latency(rng, version)));
        }
        if !is_candidate || of_candidate % LOOK_EVERY != 0 {
            continue;
        }
        let judgement = trial.judge();
        if !matches!(judgement, Judgement::Hold(_)) || of_candidate >= most {
            return (of_candidate, judgement);
        }
    }
}

/// The end of a rollout.
struct End {
    judgement: Judgement,
    /// Requests that the candidate had in the last step.
    requests: u64,
    /// How long all of it took, in seconds, at [`RATE`].
    seconds: f64,
}

/// What becomes of a rollout whose steps go on until they are decided.
fn roll_out(seed: u64, candidate: Version) -> End {
    roll_out_beside(GOOD, seed, candidate)
}

/// The same beside another stable version.
fn roll_out_beside(stable: Version, seed: u64, candidate: Version) -> End {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut seconds = 0.0;
    let mut end = None;
    for weight_percent in WEIGHTS {
        let (step, part) = (
            step_of(weight_percent, MIN_SAMPLES),
            part_of(weight_percent),
        );
        let (requests, judgement) = run(&mut rng, step, part, [stable, candidate], LONGEST);
        seconds += requests as f64 / (RATE * f64::from(weight_percent) / 100.0);
        let is_passed = matches!(judgement, Judgement::Pass(_));
        end = Some(End {
            judgement,
            requests,
            seconds,
        });
        if !is_passed {
            break;
        }
    }
    end.expect("a rollout has steps")
}

fn is_promoted(seed: u64, candidate: Version) -> bool {
    matches!(roll_out(seed, candidate).judgement, Judgement::Pass(_))
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
        let ends: Vec<End> = (0..RUNS).map(|seed| roll_out(seed, slow)).collect();
        let promoted: Vec<usize> = ends
            .iter()
            .enumerate()
            .filter(|(_, end)| matches!(end.judgement, Judgement::Pass(_)))
            .map(|(seed, _)| seed)
            .collect();
        let mut needed: Vec<u64> = ends
            .iter()
            .filter(|end| matches!(end.judgement, Judgement::RollBack(_)))
            .map(|end| end.requests)
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
    let mut trial = Trial::new(Guardrails::STANDARD, 40, 1, 50);
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
        let is_bad = WEIGHTS.iter().any(|weight_percent| {
            let (step, part) = (
                step_of(*weight_percent, 2 * MIN_SAMPLES),
                part_of(*weight_percent),
            );
            let (_, judgement) = run(&mut rng, step, part, [GOOD; 2], 1_000);
            matches!(judgement, Judgement::RollBack(_))
        });
        rolled_back += u64::from(is_bad);
    }
    println!("A/A: {rolled_back} of {RUNS} rolled back (seeds 0..{RUNS})");
    assert!(rolled_back * 100 <= RUNS, "{rolled_back} of {RUNS}");
}

/// One client with one key, who sends many requests and whom the candidate meets.
#[test]
fn a_key_with_many_requests_has_no_version_rolled_back_that_is_no_worse() {
    const RUNS: u64 = 300;
    for (weight_percent, part) in [(1, 0.1), (5, 0.3), (50, 0.9)] {
        let is_rolled_back = |seed: &u64| {
            let mut rng = StdRng::seed_from_u64(*seed);
            let step = step_of(weight_percent, 2 * MIN_SAMPLES);
            let (_, judgement) = run(&mut rng, step, part, [GOOD; 2], 1_000);
            matches!(judgement, Judgement::RollBack(_))
        };
        let rolled_back: Vec<u64> = (0..RUNS).filter(is_rolled_back).collect();
        assert!(
            rolled_back.len() as u64 * 100 <= RUNS,
            "{part} of the requests at {weight_percent} percent, seeds {rolled_back:?}"
        );
    }
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
    let five_percent = Version {
        errors: 0.05,
        ..GOOD
    };
    for (name, stable, version) in [
        ("5 % errors beside none", no_errors, five_percent),
        ("5 % more errors than 1 %", GOOD, failing),
        ("+30 %", GOOD, slow),
    ] {
        let mut needed = Vec::new();
        for seed in 1_000..1_000 + RUNS {
            let end = roll_out_beside(stable, seed, version);
            let Judgement::RollBack(evidence) = end.judgement else {
                panic!("{name}, seed {seed}: {:?}", end.judgement)
            };
            assert!(evidence.is_bounded(), "{evidence:?}");
            needed.push(end.seconds);
        }
        needed.sort_by(f64::total_cmp);
        let (median, last, longest) = (needed[49], needed[98], needed[99]);
        println!(
            "{name}: rolled back after {median:.0} s at {RATE} requests a second in the median, {last:.0} s in 99 of {RUNS}, \
             {longest:.0} s at the most (seeds 1000..{})",
            1_000 + RUNS
        );
        assert!(last <= 60.0, "{name}: {last} s");
        assert!(median <= 30.0, "{name}: {median} s");
    }
}

#[test]
fn a_version_that_always_fails_is_found_within_a_few_requests() {
    let mut trial = step_of(50, MIN_SAMPLES);
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
    let mut trial = step_of(50, 10);
    let held = |trial: &Trial| match trial.judge() {
        Judgement::Hold(evidence) => evidence.reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(held(&trial), "0 of 10 requests");
    for _ in 0..50 {
        trial.record(Side::Candidate, answered);
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
    let mut trial = step_of(50, 20);
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
    let mut trial = step_of(50, 20);
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

    let mut trial = step_of(50, 20);
    let count = (1..200).find(|_| {
        trial.record(Side::Candidate, Outcome::Refused);
        trial.record(Side::Candidate, answered);
        trial.record(Side::Baseline, answered);
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
