use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::plan::{Direction, Metric};
use super::*;
use crate::serving::rollout::plan::Served;

fn served(version: u64) -> Served {
    Served {
        version,
        digest: "d".repeat(64),
        size_bytes: 1,
    }
}

fn metric(measure: Measure, direction: Direction) -> Metric {
    Metric { measure, direction }
}

fn outcome(name: &str) -> Measure {
    Measure::Outcome(name.to_owned())
}

fn plan(primary: Metric, effect_min: f64) -> Plan {
    Plan {
        endpoint: "digits".into(),
        model: "digits".into(),
        control: served(1),
        treatment: served(2),
        control_share_bp: 5_000,
        treatment_share_bp: 5_000,
        seed: "exp".into(),
        primary,
        effect_min,
        guardrails: Vec::new(),
        alpha_bp: 500,
        samples_max: SAMPLES_MAX,
    }
}

fn clicks() -> Plan {
    plan(metric(outcome("clicks"), Direction::Up), 0.05)
}

const ALPHA: f64 = 0.05;

const ANSWERED: Outcome<'static> = Outcome::Answered(Duration::from_millis(2));

fn seen(tally: &mut Tally, key: &str, variant: Variant) {
    tally.record(Unit::of(key), variant, ANSWERED);
}

#[test]
fn keys_meet_versions_by_the_known_buckets() {
    // Of the seed "exp": "a" is in bucket 559, "b" in 460, "user-1" in 3004.
    let plan = Plan {
        control_share_bp: 6_500,
        treatment_share_bp: 500,
        ..clicks()
    };
    assert_eq!(variant(&plan, "a"), None);
    assert_eq!(variant(&plan, "b"), Some(Variant::Treatment));
    let wide = Plan {
        control_share_bp: 6_997,
        ..plan
    };
    assert_eq!(variant(&wide, "user-1"), Some(Variant::Control));
    let narrow = Plan {
        control_share_bp: 6_995,
        ..wide
    };
    assert_eq!(variant(&narrow, "user-1"), None);
}

#[test]
fn a_key_counts_once_with_its_first_request_and_its_first_value() {
    let plan = Plan {
        guardrails: vec![Guardrail {
            metric: metric(Measure::ErrorRate, Direction::Down),
            worsening_max: 0.01,
        }],
        ..clicks()
    };
    let mut tally = Tally::new(plan, ALPHA);
    assert_eq!(tally.report("a", None, 1.0), Err(NotCounted::NotExposed));
    // What a full queue refuses says nothing of the version, but the key has met it.
    tally.record(Unit::of("a"), Variant::Treatment, Outcome::Refused);
    tally.record(Unit::of("a"), Variant::Treatment, Outcome::Failed("no"));
    for _ in 0..5 {
        seen(&mut tally, "a", Variant::Treatment);
        seen(&mut tally, "b", Variant::Control);
    }
    tally.record(Unit::Request, Variant::Control, ANSWERED);
    tally.record(Unit::Request, Variant::Control, ANSWERED);
    assert_eq!(
        tally.report("a", Some("clicks"), 1.0),
        Ok(Variant::Treatment)
    );
    let twice = tally.report("a", None, 3.0).unwrap_err();
    assert!(twice.to_string().contains("a key counts once"), "{twice}");
    assert_eq!(tally.report("b", None, -2.5), Ok(Variant::Control));
    let (_, findings) = tally.judge();
    let keys = &findings.ratios[0];
    assert_eq!(
        (keys.of.as_str(), keys.control, keys.treatment),
        ("keys", 3, 1)
    );
    let [clicks, errors] = &findings.measured[..] else {
        panic!("{findings:?}")
    };
    assert_eq!((clicks.control.count, clicks.control.mean), (1, -2.5));
    assert_eq!((clicks.treatment.count, clicks.treatment.mean), (1, 1.0));
    assert_eq!((errors.control.count, errors.control.mean), (3, 0.0));
    assert_eq!((errors.treatment.count, errors.treatment.mean), (1, 1.0));
    assert!(findings.is_bounded());
}

#[test]
fn what_cannot_be_counted_is_refused_with_what_could_be() {
    let two = Plan {
        guardrails: vec![Guardrail {
            metric: metric(outcome("refunds"), Direction::Down),
            worsening_max: 0.01,
        }],
        ..clicks()
    };
    let mut tally = Tally::new(two, ALPHA);
    seen(&mut tally, "a", Variant::Control);
    for (name, value, expected) in [
        (None, 1.0, "measures clicks, refunds: say which"),
        (Some("sales"), 1.0, "does not measure an outcome `sales`"),
        (Some("clicks"), f64::NAN, "NaN cannot be counted"),
        (Some("clicks"), 2e12, "at most 1e12"),
    ] {
        let error = tally.report("a", name, value).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    // One of each name.
    assert!(tally.report("a", Some("clicks"), 1.0).is_ok());
    assert!(tally.report("a", Some("refunds"), 0.0).is_ok());
    let mut none = Tally::new(plan(metric(Measure::Latency, Direction::Down), 0.05), ALPHA);
    seen(&mut none, "a", Variant::Control);
    let error = none.report("a", None, 1.0).unwrap_err();
    assert!(error.to_string().contains("it measures none"), "{error}");
}

#[test]
fn without_requests_or_with_too_few_nothing_is_concluded() {
    let mut tally = Tally::new(
        plan(metric(Measure::ErrorRate, Direction::Down), 0.05),
        ALPHA,
    );
    let (ending, findings) = tally.judge();
    assert_eq!((ending, findings.decision), (None, Decision::Undecided));
    assert!(findings.reason.starts_with("0 samples"), "{findings:?}");
    assert!(findings.is_bounded());
    // No failure on either side is not known to be equal: none of a thousand may be chance.
    for at in 0..1_000 {
        seen(&mut tally, &format!("c{at}"), Variant::Control);
        seen(&mut tally, &format!("t{at}"), Variant::Treatment);
    }
    let (ending, findings) = tally.judge();
    assert_eq!(ending, None);
    assert_eq!(findings.measured[0].effect, None);
}

#[test]
fn groups_of_the_wrong_sizes_conclude_nothing_but_guardrails_hold() {
    let plan = Plan {
        guardrails: vec![Guardrail {
            metric: metric(Measure::ErrorRate, Direction::Down),
            worsening_max: 0.01,
        }],
        ..clicks()
    };
    let mut rng = StdRng::seed_from_u64(1);
    let mut tally = Tally::new(plan, ALPHA);
    for at in 0..2_000 {
        let variant = if at % 5 < 3 {
            Variant::Control
        } else {
            Variant::Treatment
        };
        let key = format!("user-{at}");
        seen(&mut tally, &key, variant);
        // Far better, were it not for the sizes.
        let better = f64::from(u8::from(variant == Variant::Treatment));
        let value = better + rng.random_range(-1.0..1.0);
        tally.report(&key, None, value).unwrap();
    }
    let (ending, findings) = tally.judge();
    assert_eq!((ending, findings.decision), (None, Decision::Undecided));
    assert!(
        findings
            .reason
            .starts_with("sample ratio mismatch: 1200 of the control and 800"),
        "{}",
        findings.reason
    );
    let count = (0..100).find(|at| {
        let key = format!("late-{at}");
        tally.record(Unit::of(&key), Variant::Treatment, Outcome::Failed("no"));
        tally.judge().0.is_some()
    });
    assert!((5..30).contains(&count.unwrap()), "{count:?}");
    let (ending, findings) = tally.judge();
    assert_eq!(
        (ending, findings.decision),
        (Some(Ending::Guardrail), Decision::Control)
    );
    assert!(
        findings.reason.ends_with("a guardrail: error-rate"),
        "{findings:?}"
    );
}

#[test]
fn values_that_only_one_side_reports_conclude_nothing() {
    let mut tally = Tally::new(clicks(), ALPHA);
    for at in 0..1_000 {
        let (control, treatment) = (format!("c{at}"), format!("t{at}"));
        seen(&mut tally, &control, Variant::Control);
        seen(&mut tally, &treatment, Variant::Treatment);
        tally.report(&treatment, None, f64::from(at % 3)).unwrap();
        if at % 2 == 0 {
            tally.report(&control, None, f64::from(at % 3)).unwrap();
        }
    }
    let (ending, findings) = tally.judge();
    assert_eq!(ending, None);
    assert!(!findings.ratios[0].is_mismatch && findings.ratios[1].is_mismatch);
    assert!(
        findings.reason.contains("(outcome:clicks)"),
        "{}",
        findings.reason
    );
}

#[test]
fn a_slower_treatment_ends_by_its_guardrail_and_a_faster_one_is_better() {
    let plan = Plan {
        guardrails: vec![Guardrail {
            metric: metric(Measure::Latency, Direction::Down),
            worsening_max: 0.1,
        }],
        ..plan(metric(Measure::Latency, Direction::Down), 0.05)
    };
    for (factor, decision) in [(1.5, Decision::Control), (0.7, Decision::Treatment)] {
        let mut rng = StdRng::seed_from_u64(2);
        let mut tally = Tally::new(plan.clone(), ALPHA);
        let ended = (0..5_000).find_map(|_| {
            for (variant, factor) in [(Variant::Control, 1.0), (Variant::Treatment, factor)] {
                let latency = 2e-3 * factor * rng.random_range(0.8..1.25);
                let answered = Outcome::Answered(Duration::from_secs_f64(latency));
                tally.record(Unit::Request, variant, answered);
            }
            let (ending, findings) = tally.judge();
            ending.map(|_| findings)
        });
        let findings = ended.unwrap();
        assert_eq!(findings.decision, decision, "{findings:?}");
        let effect = findings.measured[0].effect.unwrap();
        assert!(
            effect.lower <= factor - 1.0 && factor - 1.0 <= effect.upper,
            "{effect:?}"
        );
        let mean = findings.measured[0].control.mean;
        assert!((1_900.0..2_100.0).contains(&mean), "{mean}");
    }
}

#[test]
fn more_keys_than_are_held_are_not_counted_and_said() {
    let mut tally = Tally::new(clicks(), ALPHA);
    for at in 0..SAMPLES_MAX + 3 {
        tally.record(Unit::Key(at), Variant::Control, ANSWERED);
    }
    assert_eq!(tally.exposed(), SAMPLES_MAX);
    assert_eq!(tally.judge().1.uncounted, 3);
}

/// What the values of a version look like.
#[derive(Debug, Clone, Copy)]
enum Values {
    /// 1 with this chance, else 0.
    Rate(f64),
    /// Log-normal with a standard deviation of 1 in the logarithm, times this: a long tail, as of revenues.
    LongTail(f64),
    /// Normal with a standard deviation of 1 around this.
    Normal(f64),
}

fn normal(rng: &mut StdRng) -> f64 {
    let (first, second): (f64, f64) = (rng.random_range(1e-12..1.0), rng.random());
    (-2.0 * first.ln()).sqrt() * (std::f64::consts::TAU * second).cos()
}

impl Values {
    fn draw(self, rng: &mut StdRng) -> f64 {
        match self {
            Values::Rate(chance) => f64::from(u8::from(rng.random_bool(chance))),
            Values::LongTail(scale) => scale * normal(rng).exp(),
            Values::Normal(mean) => mean + normal(rng),
        }
    }
}

/// Keys between two looks.
const LOOK_EVERY: u64 = 20;

/// Simulates an experiment with a look after each [`LOOK_EVERY`] keys, until `stop` says so or there were
/// `most` keys; how many there were, and what was found last.
fn simulate(
    seed: u64,
    plan: &Plan,
    (control, treatment): (Values, Values),
    most: u64,
    stop: impl Fn(Option<Ending>, &Findings) -> bool,
) -> (u64, Findings) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tally = Tally::new(plan.clone(), ALPHA);
    let mut keys = 0;
    loop {
        let (variant, values) = if rng.random_bool(0.5) {
            (Variant::Treatment, treatment)
        } else {
            (Variant::Control, control)
        };
        let key = keys.to_string();
        seen(&mut tally, &key, variant);
        tally.report(&key, None, values.draw(&mut rng)).unwrap();
        keys += 1;
        if keys % LOOK_EVERY == 0 {
            let (ending, findings) = tally.judge();
            if stop(ending, &findings) || keys >= most {
                return (keys, findings);
            }
        }
    }
}

/// As many as a chance of `chance` gives in `runs`, and three standard deviations.
fn most_of(runs: u64, chance: f64) -> f64 {
    let runs = runs as f64;
    chance * runs + 3.0 * (chance * (1.0 - chance) * runs).sqrt()
}

#[test]
fn equal_versions_are_seldom_told_apart_however_often_one_looks() {
    const RUNS: u64 = 400;
    const KEYS: u64 = 4_000;
    for values in [
        Values::Rate(0.05),
        Values::LongTail(1.0),
        Values::Normal(3.0),
    ] {
        let excludes_zero = |findings: &Findings| {
            findings.measured[0]
                .effect
                .is_some_and(|effect| effect.lower > 0.0 || effect.upper < 0.0)
        };
        let found = (0..RUNS).filter(|seed| {
            // Beyond every conclusion: no look at all may find a difference.
            let (_, findings) = simulate(*seed, &clicks(), (values, values), KEYS, |_, found| {
                excludes_zero(found)
            });
            excludes_zero(&findings)
        });
        let found = found.count();
        println!(
            "A/A of {values:?}: {found} of {RUNS} told apart within {KEYS} keys, looked at every \
             {LOOK_EVERY} (seeds 0..{RUNS}), bound {ALPHA}"
        );
        assert!(found as f64 <= most_of(RUNS, ALPHA), "{values:?}: {found}");
    }
}

#[test]
fn a_difference_of_the_minimum_effect_is_found() {
    const RUNS: u64 = 200;
    const KEYS: u64 = 20_000;
    for (control, treatment, effect_min) in [
        (Values::Normal(3.0), Values::Normal(3.2), 0.2),
        (Values::Rate(0.20), Values::Rate(0.24), 0.04),
    ] {
        let plan = Plan {
            effect_min,
            ..clicks()
        };
        let mut needed = Vec::new();
        let mut wrong = 0;
        for seed in 0..RUNS {
            let sides = (control, treatment);
            let (keys, findings) = simulate(seed, &plan, sides, KEYS, |ending, _| ending.is_some());
            match findings.decision {
                Decision::Treatment => needed.push(keys),
                Decision::Control => wrong += 1,
                Decision::Undecided => {}
            }
        }
        needed.sort_unstable();
        let found = needed.len() as u64;
        println!(
            "{control:?} against {treatment:?}, minimum effect {effect_min}: {found} of {RUNS} decided for the \
             treatment within {KEYS} keys, after {} in the median; {wrong} for the control (seeds 0..{RUNS})",
            needed[needed.len() / 2]
        );
        assert!(found * 10 >= RUNS * 8, "{found} of {RUNS}");
        assert!(f64::from(wrong) <= most_of(RUNS, ALPHA), "{wrong}");
    }
}

#[test]
fn equal_versions_end_with_the_control() {
    const RUNS: u64 = 100;
    let plan = Plan {
        effect_min: 0.2,
        ..clicks()
    };
    let sides = (Values::Normal(3.0), Values::Normal(3.0));
    let decided = (0..RUNS).filter(|seed| {
        let (_, findings) = simulate(*seed, &plan, sides, 10_000, |ending, _| ending.is_some());
        findings.decision == Decision::Control
    });
    let decided = decided.count() as u64;
    println!("equal versions: {decided} of {RUNS} decided for the control (seeds 0..{RUNS})");
    assert!(decided * 10 >= RUNS * 9, "{decided} of {RUNS}");
}

#[test]
fn as_many_samples_as_the_plan_allows_end_it_undecided() {
    let plan = Plan {
        samples_max: 100,
        effect_min: 0.001,
        ..clicks()
    };
    let sides = (Values::Normal(3.0), Values::Normal(3.0));
    let (keys, findings) = simulate(3, &plan, sides, 1_000, |ending, _| {
        ending == Some(Ending::Exhausted)
    });
    assert_eq!((keys, findings.decision), (100, Decision::Undecided));
}
