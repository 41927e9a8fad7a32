//! Rollouts that begin with a shadow.

use mobula_core::codec;
use mobula_core::control::StateModule;
use mobula_core::id::Incarnation;

use super::super::command::{Command, Verdict};
use super::super::plan::{Guardrails, Strategy};
use super::super::state::{newest, progress_of, shadows};
use super::super::trial::Evidence;
use super::*;
use crate::serving::shadow::{self, Rule};
use crate::serving::state::{Command as ServingCommand, Query, Serving, Steered};
use crate::serving::test_tables::TestTables;

const ROUTER: Incarnation = Incarnation(900);

fn shadow() -> shadow::Plan {
    shadow::Plan {
        percent: 10,
        samples: 50,
        mismatch_max_bp: 100,
        rule: Rule::Ulps(4),
        outputs: vec![("class".into(), Rule::Ignore)],
    }
}

fn start_with(steps: Vec<u32>, shadow: shadow::Plan) -> Command {
    Command::StartShadowed {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: Some(2),
        strategy: Strategy::Canary,
        steps,
        guardrails: Guardrails::STANDARD,
        min_samples: 10,
        shadow,
    }
}

fn head() -> TestTables {
    let mut head = TestTables::with_versions(2);
    head.serve("digits", ROUTER);
    head
}

fn say(head: &mut TestTables, command: Command) -> Result<Rollout, Rejection> {
    let answer = head.serving(&ServingCommand::Rollout(command))?;
    Ok(codec::decode(&answer, 1 << 20).unwrap())
}

fn steered(head: &TestTables) -> Steered {
    let query = Query::Steered {
        endpoint: "digits".into(),
    };
    let payload = codec::encode_plain(&query);
    let answer = Serving.query(&head.tables, 0, &payload).unwrap();
    codec::decode(&answer, 1 << 20).unwrap()
}

#[test]
fn a_shadow_comes_before_every_answer_of_the_candidate() {
    for (steps, expected) in [
        (vec![], vec![0, 1, 5, 25, 50, 100]),
        (vec![50, 100], vec![0, 50, 100]),
        (vec![0, 100], vec![0, 100]),
    ] {
        let mut head = head();
        let rollout = say(&mut head, start_with(steps, shadow())).unwrap();
        assert_eq!((rollout.weight_percent(), &rollout.steps), (0, &expected));
        assert_eq!(steered(&head).shadow, Some(shadow()));
        assert_eq!(shadows(&head.tables, "digits"), [(1, shadow())]);
    }
}

#[test]
fn a_shadow_is_judged_as_a_step_and_forgotten_with_its_rollout() {
    let mut head = head();
    say(&mut head, start_with(vec![50, 100], shadow())).unwrap();
    let pass = Command::Judge {
        endpoint: "digits".into(),
        rollout: 1,
        step: 0,
        router: ROUTER,
        verdict: Verdict::Pass,
        evidence: Evidence::default(),
    };
    let next = say(&mut head, pass.clone()).unwrap();
    assert_eq!((next.step, next.weight_percent()), (1, 50));
    assert_eq!(say(&mut head, pass).unwrap_err().code, ErrorCode::Fenced);
    let endpoint = "digits".to_owned();
    say(&mut head, Command::Abort { endpoint }).unwrap();
    for command in [
        ServingCommand::Delete {
            endpoint: "digits".into(),
        },
        ServingCommand::Gone {
            endpoint: "digits".into(),
        },
    ] {
        head.serving(&command).unwrap();
    }
    assert_eq!(row::all::<shadow::Plan>(&head.tables, SHADOWS, &[]), []);
}

#[test]
fn shadows_that_cannot_be_are_refused() {
    let mut head = head();
    type Change = fn(&mut shadow::Plan);
    let changes: [(Change, &str); 6] = [
        (
            |plan| plan.percent = 0,
            "0 percent (`--shadow-percent`) is not possible",
        ),
        (|plan| plan.percent = 101, "give 1 to 100 percent"),
        (
            |plan| plan.samples = 0,
            "0 samples (`--shadow-samples`) is not possible: give 1 to 1000000 samples",
        ),
        (
            |plan| plan.mismatch_max_bp = 10_000,
            "(`--max-mismatch-bp`) are all: give fewer",
        ),
        (
            |plan| {
                plan.rule = Rule::Close {
                    absolute: -1.0,
                    relative: 0.0,
                }
            },
            "of -1 (`--atol`) and of 0 (`--rtol`) is no rule",
        ),
        (
            |plan| plan.outputs = vec![("scores".into(), Rule::Top(0))],
            "(`--top-k`) is no rule",
        ),
    ];
    for (change, reason) in changes {
        let mut plan = shadow();
        change(&mut plan);
        let refused = say(&mut head, start_with(Vec::new(), plan)).unwrap_err();
        assert!(refused.message.contains(reason), "{refused}");
    }
    assert_eq!(newest(&head.tables, "digits"), None);
}

#[test]
fn a_step_that_is_not_decided_has_the_numbers_of_the_newest_router() {
    let mut head = head();
    let rollout = say(&mut head, start_with(vec![50, 100], shadow())).unwrap();
    let report = |step, router, requests| {
        let mut evidence = Evidence::default();
        evidence.candidate.requests = requests;
        Command::Report {
            endpoint: "digits".into(),
            rollout: 1,
            step,
            router,
            evidence,
        }
    };
    let known = |head: &TestTables| progress_of(&head.tables, &rollout);
    assert_eq!(known(&head), None);
    say(&mut head, report(0, ROUTER, 7)).unwrap();
    say(&mut head, report(0, ROUTER, 9)).unwrap();
    let progress = known(&head).unwrap();
    assert_eq!(
        (progress.step, progress.evidence.candidate.requests),
        (0, 9)
    );
    for late in [report(1, ROUTER, 9), report(0, Incarnation(899), 9)] {
        assert_eq!(say(&mut head, late).unwrap_err().code, ErrorCode::Fenced);
    }
    let judge = |step, verdict| Command::Judge {
        endpoint: "digits".into(),
        rollout: 1,
        step,
        router: ROUTER,
        verdict,
        evidence: Evidence::default(),
    };
    // What is decided has its numbers with the decision.
    say(&mut head, judge(0, Verdict::Pass)).unwrap();
    assert_eq!(known(&head), None);
    say(&mut head, report(1, ROUTER, 3)).unwrap();
    say(&mut head, judge(1, Verdict::RollBack)).unwrap();
    assert_eq!(known(&head), None);
    let late = say(&mut head, report(1, ROUTER, 4)).unwrap_err();
    assert_eq!(late.code, ErrorCode::Fenced);
}
