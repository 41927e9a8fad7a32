use mobula_core::codec;
use mobula_core::control::StateModule;
use mobula_core::error::ErrorCode;
use mobula_core::id::NodeId;

use super::*;
use crate::serving::experiment::command::{Command as ExperimentCommand, Proposed};
use crate::serving::experiment::plan::{Direction, Measure, Metric};
use crate::serving::rollout::command::{Command as RolloutCommand, Verdict};
use crate::serving::rollout::trial::Evidence;
use crate::serving::rollout::{Guardrails, Strategy};
use crate::serving::state::{Command as ServingCommand, Query, Serving};
use crate::serving::test_tables::TestTables;

const ROUTER: Incarnation = Incarnation(900);

const STEP: Of = Of::Step {
    rollout: 1,
    step: 0,
};

/// The endpoint `digits` of the first of three versions, behind router 900.
fn served() -> TestTables {
    let mut tables = TestTables::with_versions(3);
    tables.serve("digits", ROUTER);
    tables
}

fn start_rollout(tables: &mut TestTables) {
    let start = RolloutCommand::Start {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: Some(2),
        strategy: Strategy::Canary,
        steps: vec![5, 50, 100],
        guardrails: Guardrails::STANDARD,
        min_samples: 10,
    };
    tables.serving(&ServingCommand::Rollout(start)).unwrap();
}

fn standing(right: u32) -> Standing {
    Standing {
        sentinels: 8,
        replicas: 2,
        right,
    }
}

fn said(router: Incarnation, of: Of, standing: Standing) -> ServingCommand {
    ServingCommand::Sentinels(Command::Note {
        endpoint: "digits".into(),
        router,
        of,
        standing,
    })
}

/// What a status is answered.
fn shown(tables: &TestTables) -> Option<Asked> {
    let query = codec::encode_plain(&Query::Sentinels {
        endpoint: "digits".into(),
    });
    let answer = Serving.query(&tables.tables, 0, &query).unwrap();
    codec::decode(&answer, 1 << 20).unwrap()
}

#[test]
fn what_a_router_says_of_a_step_is_known_until_the_step_is_passed() {
    let mut tables = served();
    let early = tables.serving(&said(ROUTER, STEP, standing(0)));
    assert_eq!(early.unwrap_err().code, ErrorCode::Fenced);
    start_rollout(&mut tables);
    assert_eq!(shown(&tables), None);
    tables.serving(&said(ROUTER, STEP, standing(1))).unwrap();
    let asked = shown(&tables).unwrap();
    let expected = (STEP, standing(1), ROUTER, tables.index);
    assert_eq!(
        (asked.of, asked.standing, asked.router, asked.at_ms),
        expected
    );
    tables.serving(&said(ROUTER, STEP, standing(2))).unwrap();

    // Neither another router, nor more than there are, nor another step.
    for (router, of, right, code) in [
        (Incarnation(899), STEP, 0, ErrorCode::Fenced),
        (ROUTER, STEP, 3, ErrorCode::InvalidArgument),
        (
            ROUTER,
            Of::Step {
                rollout: 1,
                step: 1,
            },
            0,
            ErrorCode::Fenced,
        ),
        (
            ROUTER,
            Of::Experiment { experiment: 1 },
            0,
            ErrorCode::Fenced,
        ),
    ] {
        let refused = tables.serving(&said(router, of, standing(right)));
        assert_eq!(refused.unwrap_err().code, code, "{router} {of:?}");
    }
    assert_eq!(shown(&tables).unwrap().standing, standing(2));

    let pass = RolloutCommand::Judge {
        endpoint: "digits".into(),
        rollout: 1,
        step: 0,
        router: ROUTER,
        verdict: Verdict::Pass,
        evidence: Evidence::default(),
    };
    tables.serving(&ServingCommand::Rollout(pass)).unwrap();
    assert_eq!(shown(&tables), None);
    let late = tables.serving(&said(ROUTER, STEP, standing(2)));
    let late = late.unwrap_err();
    assert_eq!(late.code, ErrorCode::Fenced);
    assert!(late.message.contains("rollout 1 at step 0"), "{late}");
}

#[test]
fn it_is_known_of_an_experiment_until_that_ends_and_goes_with_the_endpoint() {
    let mut tables = served();
    let start = ExperimentCommand::Start(Proposed {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: Some(2),
        control_share_bp: 5_000,
        treatment_share_bp: 5_000,
        seed: None,
        primary: Metric {
            measure: Measure::Outcome("clicks".into()),
            direction: Direction::Up,
        },
        effect_min: 0.01,
        guardrails: Vec::new(),
        alpha_bp: 500,
        samples_max: 10_000,
    });
    tables.serving(&ServingCommand::Experiment(start)).unwrap();
    let of = Of::Experiment { experiment: 1 };
    // A version without any.
    tables
        .serving(&said(ROUTER, of, Standing::default()))
        .unwrap();
    let asked = shown(&tables).unwrap();
    assert!(asked.of == of && asked.standing.is_all());
    let endpoint = "digits".to_owned();
    let stop = ExperimentCommand::Stop {
        endpoint: endpoint.clone(),
    };
    tables.serving(&ServingCommand::Experiment(stop)).unwrap();
    assert_eq!(shown(&tables), None);
    for command in [
        ServingCommand::Delete {
            endpoint: endpoint.clone(),
        },
        ServingCommand::Gone { endpoint },
    ] {
        tables.serving(&command).unwrap();
    }
    let kept: Option<Asked> = row::get(&tables.tables, ASKED, b"digits");
    assert_eq!(kept, None);
}

#[test]
fn only_routers_say_so() {
    let payload = codec::encode_plain(&said(ROUTER, STEP, standing(0)));
    let host = |job| Caller::Host {
        job,
        node: NodeId(1),
    };
    Serving.authorize(&host(JobId::SYSTEM), &payload).unwrap();
    for caller in [Caller::Client, host(JobId(3))] {
        let error = Serving.authorize(&caller, &payload).unwrap_err();
        assert_eq!(error.code, ErrorCode::PermissionDenied);
    }
}
