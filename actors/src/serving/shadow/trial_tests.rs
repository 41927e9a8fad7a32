use super::super::Rule;
use super::*;
use crate::serving::rollout::plan::Strategy;
use crate::serving::rollout::plan::tests::begun;

fn plan() -> Plan {
    Plan {
        percent: 100,
        samples: 50,
        mismatch_max_bp: 200,
        rule: Rule::Ulps(0),
        outputs: Vec::new(),
    }
}

fn trial() -> ShadowTrial {
    let rollout = begun(Strategy::Canary, &[0, 50, 100]);
    ShadowTrial::new(plan(), &rollout)
}

const WAITED: Duration = Duration::from_millis(2);
const SAME: Copied<'static> = Copied::Same(Duration::from_millis(3));
const OTHER: Copied<'static> = Copied::Different(
    Duration::from_millis(3),
    "\"class\" at index 0 is 4 instead of 3",
);

fn record(trial: &mut ShadowTrial, copied: Copied<'_>, count: usize) {
    (0..count).for_each(|_| trial.record(WAITED, copied));
}

fn held(trial: &ShadowTrial) -> Evidence {
    match trial.judge() {
        Judgement::Hold(evidence) => evidence,
        other => panic!("{other:?}"),
    }
}

#[test]
fn enough_equal_answers_pass_and_what_was_shed_counts_for_nothing() {
    let mut trial = trial();
    assert!(held(&trial).reason.starts_with("0 of 50 comparisons"));
    record(&mut trial, Copied::Shed, 1_000);
    record(&mut trial, SAME, 49);
    let evidence = held(&trial);
    assert_eq!(
        evidence.reason,
        "49 of 50 comparisons: 0 of 49 answers differ, 1000 copies were shed"
    );
    record(&mut trial, SAME, 1);
    let Judgement::Pass(evidence) = trial.judge() else {
        panic!("{:?}", trial.judge())
    };
    assert!(evidence.is_bounded());
    assert_eq!(
        (evidence.candidate.requests, evidence.candidate.errors),
        (50, 0)
    );
    assert_eq!(evidence.baseline.latency_mean_us, 2_000);
}

#[test]
fn differences_hold_while_they_may_be_chance_and_roll_back_when_they_are_none() {
    let mut trial = trial();
    record(&mut trial, SAME, 58);
    record(&mut trial, OTHER, 2);
    let evidence = held(&trial);
    assert!(
        evidence
            .reason
            .starts_with("more differences than allowed, which may yet be chance"),
        "{evidence:?}"
    );
    // One of fifty may differ.
    record(&mut trial, SAME, 40);
    assert!(matches!(trial.judge(), Judgement::Pass(_)));
    record(&mut trial, OTHER, 30);
    let Judgement::RollBack(evidence) = trial.judge() else {
        panic!("{:?}", trial.judge())
    };
    assert!(
        evidence
            .reason
            .starts_with("as a shadow, too many mismatches: 32 of 130 answers differ"),
        "{evidence:?}"
    );
    assert!(
        evidence.reason.ends_with("is 4 instead of 3"),
        "{evidence:?}"
    );
    let row = &evidence.guardrails[0];
    assert!(
        row.is_violated && row.value > row.limit && row.value < 32.0 / 130.0,
        "{row:?}"
    );
}

#[test]
fn a_candidate_that_does_not_answer_is_rolled_back_within_a_few_copies() {
    let mut trial = trial();
    let count = (1..100).find(|_| {
        trial.record(WAITED, Copied::Failed("no answer within 5000 ms"));
        matches!(trial.judge(), Judgement::RollBack(_))
    });
    assert!(count.is_some_and(|count| count < 10), "{count:?}");
    let Judgement::RollBack(evidence) = trial.judge() else {
        panic!("it stays violated")
    };
    assert_eq!(evidence.candidate.last_error, "no answer within 5000 ms");
    assert!(evidence.guardrails[1].is_violated && !evidence.guardrails[0].is_violated);
}
