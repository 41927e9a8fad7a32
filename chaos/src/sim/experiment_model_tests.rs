use mobula_actors::serving::experiment::findings::Ratio;
use mobula_actors::serving::experiment::{Direction, Measure, Metric};
use mobula_actors::serving::rollout::plan::Served;

use super::*;

fn of_keys(keys: u64) -> Option<Findings> {
    Some(Findings {
        ratios: vec![Ratio {
            of: "keys".into(),
            control: keys,
            treatment: keys,
            p_value: 1.0,
            is_mismatch: false,
        }],
        ..Findings::default()
    })
}

/// One that router 5 counts.
fn open(number: u64) -> Experiment {
    let served = |version| Served {
        version,
        digest: "d".repeat(64),
        size_bytes: 1,
    };
    Experiment {
        number,
        plan: Plan {
            endpoint: "e".into(),
            model: "m".into(),
            control: served(1),
            treatment: served(2),
            control_share_bp: 5_000,
            treatment_share_bp: 5_000,
            seed: "s".into(),
            primary: Metric {
                measure: Measure::ErrorRate,
                direction: Direction::Down,
            },
            effect_min: 0.1,
            guardrails: Vec::new(),
            alpha_bp: 500,
            samples_max: 1_000,
        },
        started_ms: 1,
        ended_ms: None,
        ending: None,
        revision: 10,
        cleanup: Cleanup::Waiting,
        counts: 1,
        counting: Some(Incarnation(5)),
        reported_ms: Some(2),
        findings: of_keys(10),
        stored: Some([1; 32]),
    }
}

fn over(number: u64, cleanup: Cleanup) -> Experiment {
    Experiment {
        ending: Some(Ending::Guardrail),
        ended_ms: Some(3),
        revision: 20,
        cleanup,
        ..open(number)
    }
}

fn end(row: &mut Experiment, ending: Ending) {
    row.ending = Some(ending);
    row.cleanup = Cleanup::Draining;
}

#[test]
fn each_way_to_go_on_wrongly_is_told_by_its_rule() {
    type Change = fn(&mut Experiment);
    type Judged = Result<Option<Turn>, &'static str>;
    let draining = || over(1, Cleanup::Draining);
    let begun = || Experiment {
        counts: 0,
        counting: None,
        findings: None,
        stored: None,
        ..open(1)
    };
    let cases: [(Experiment, Change, Judged); 21] = [
        (open(1), |_| {}, Ok(None)),
        (open(1), |row| row.findings = of_keys(11), Ok(None)),
        (
            begun(),
            |row| (row.counts, row.counting) = (1, Some(Incarnation(5))),
            Ok(None),
        ),
        (open(1), |row| row.counting = Some(Incarnation(6)), Ok(None)),
        (
            open(1),
            |row| (row.counts, row.findings, row.stored) = (2, None, None),
            Ok(None),
        ),
        (
            open(1),
            |row| {
                end(row, Ending::Decided);
                row.findings = None;
            },
            Ok(Some(Turn::Ended(Ending::Decided))),
        ),
        (draining(), |row| row.cleanup = Cleanup::Ending, Ok(None)),
        (draining(), |row| end(row, Ending::Decided), Err(DECIDED)),
        (draining(), |row| row.revision = 21, Err(DECIDED)),
        (draining(), |row| row.findings = None, Err(DECIDED)),
        (open(1), |row| row.counts = 0, Err(COUNTED)),
        (
            open(1),
            |row| (row.counting, row.findings) = (Some(Incarnation(6)), None),
            Err(COUNTED),
        ),
        (open(1), |row| row.stored = None, Err(COUNTED)),
        (open(1), |row| row.counts = 2, Err(COUNTED)),
        (
            open(1),
            |row| {
                row.counting = Some(Incarnation(6));
                (row.counts, row.findings, row.stored) = (2, None, None);
            },
            Err(COUNTED),
        ),
        (
            begun(),
            |row| row.counting = Some(Incarnation(5)),
            Err(COUNTED),
        ),
        (open(1), |row| row.findings = of_keys(9), Err(COUNTED)),
        (draining(), |row| row.cleanup = Cleanup::Done, Err(ARMS)),
        (open(1), |row| row.ending = Some(Ending::Stopped), Err(ARMS)),
        (open(1), |row| row.cleanup = Cleanup::Draining, Err(ARMS)),
        (open(1), |row| row.plan.alpha_bp = 501, Err(PLAN)),
    ];
    for (at, (before, change, expected)) in cases.into_iter().enumerate() {
        let mut after = before.clone();
        change(&mut after);
        let found = goes_on_as(&[before], &[after], true);
        assert_eq!(found.map_err(|why| why.rule()), expected, "case {at}");
    }
}

#[test]
fn one_goes_on_at_a_time_and_by_entries_about_it() {
    let begun = |number| Experiment {
        counts: 0,
        counting: None,
        findings: None,
        stored: None,
        ..open(number)
    };
    let done = |number| over(number, Cleanup::Done);
    let goes_on = |before: &[Experiment], after: &[Experiment]| {
        goes_on_as(before, after, true).map_err(|why| why.rule())
    };
    let turn = Ok(Some(Turn::Begun));
    assert_eq!(goes_on(&[], &[begun(1)]), turn);
    assert_eq!(goes_on(&[done(1)], &[done(1), begun(2)]), turn);
    // The oldest one was forgotten.
    assert_eq!(goes_on(&[done(1), done(2)], &[done(2), begun(3)]), turn);
    let ending = over(1, Cleanup::Ending);
    for (before, after) in [
        (vec![open(1)], vec![open(1), begun(2)]),
        (vec![ending.clone()], vec![ending, begun(2)]),
        (vec![done(1)], vec![done(1), begun(3)]),
        (vec![done(1)], vec![begun(2)]),
        (vec![done(1), done(2)], vec![done(1)]),
        (vec![open(1)], vec![]),
    ] {
        assert_eq!(goes_on(&before, &after), Err(ALONE), "{before:?}");
    }
    let unasked = goes_on_as(&[], &[begun(1)], false);
    assert_eq!(unasked.map_err(|why| why.rule()), Err(ALONE));
}

#[test]
fn an_experiment_hears_its_newest_router_once_it_counts() {
    let standing = Standing {
        router: Incarnation(5),
        is_deleting: false,
        model: "m".into(),
        versions: 2,
        active: 1,
        is_rolling: false,
    };
    let mut model = ExperimentModel::default();
    model.endpoints.insert("e".into(), vec![open(1)]);
    let hears = |command: &Command| model.hears(command, Some(&standing));
    let report = |router, keys| Command::Report {
        endpoint: "e".into(),
        experiment: 1,
        router: Incarnation(router),
        findings: of_keys(keys).unwrap(),
        stored: [2; 32],
    };
    assert!(hears(&report(5, 10)) && !hears(&report(5, 9)) && !hears(&report(6, 11)));
    let anew = |router, count| Command::CountAnew {
        endpoint: "e".into(),
        experiment: 1,
        count,
        router: Incarnation(router),
    };
    assert!(hears(&anew(5, 1)) && !hears(&anew(5, 2)) && !hears(&anew(6, 1)));
    let conclude = |ending| Command::Conclude {
        endpoint: "e".into(),
        experiment: 1,
        router: Incarnation(5),
        ending,
        findings: Findings::default(),
    };
    assert!(hears(&conclude(Ending::Exhausted)));
    assert!(!hears(&conclude(Ending::Decided)) && !hears(&conclude(Ending::Stopped)));
    let stop = Command::Stop {
        endpoint: "e".into(),
    };
    assert!(hears(&stop) && !model.hears(&stop, None));
    let deleting = Standing {
        is_deleting: true,
        ..standing
    };
    assert!(!model.hears(&stop, Some(&deleting)));
}
