use mobula_core::codec;

use super::*;
use crate::serving::experiment::Measure;
use crate::serving::experiment::command::{Command as ExperimentCommand, Proposed};
use crate::serving::experiment::plan::{Direction, Metric};
use crate::serving::state::Command as ServingCommand;
use crate::serving::test_tables::TestTables;

const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Tables with an endpoint `digits`.
fn deployed() -> TestTables {
    let mut tables = TestTables::with_versions(3);
    deploy(&mut tables, "digits");
    tables
}

fn deploy(tables: &mut TestTables, endpoint: &str) {
    let command = ServingCommand::Deploy {
        endpoint: endpoint.into(),
        model: "digits".into(),
        version: Some(1),
        replicas: 1,
        settings: Default::default(),
        token_hash: [7; 32],
    };
    tables.serving(&command).unwrap();
}

fn apply_one(tables: &mut TestTables, command: Command) -> Result<Access, Rejection> {
    let answer = tables.serving(&ServingCommand::Access(command))?;
    Ok(codec::decode(&answer, ANSWER_BYTES_MAX).unwrap())
}

fn add_token(name: &str, ttl_ms: Option<u64>, per_second: Option<u32>) -> Command {
    Command::AddToken {
        endpoint: "digits".into(),
        name: name.into(),
        hash: *blake3::hash(name.as_bytes()).as_bytes(),
        ttl_ms,
        per_second,
    }
}

fn revoke_token(name: &str) -> Command {
    Command::RevokeToken {
        endpoint: "digits".into(),
        name: name.into(),
    }
}

fn set(value: &str, version: u64, is_first: bool) -> Command {
    Command::SetRule {
        endpoint: "digits".into(),
        rule: Rule {
            matcher: Matcher::header("x-tier", value),
            version,
        },
        is_first,
    }
}

fn names(access: &Access) -> Vec<&str> {
    let names = access.tokens.iter().map(|token| token.name.as_str());
    names.collect()
}

#[test]
fn tokens_come_and_go_beside_the_first_one_which_may_go_too() {
    let mut tables = deployed();
    let access = apply_one(&mut tables, add_token("ann", None, Some(9))).unwrap();
    assert_eq!(names(&access), [FIRST_TOKEN, "ann"]);
    assert_eq!(access.tokens[0].hash, [7; 32]);
    assert_eq!(access.tokens[1].per_second, Some(9));

    let error = apply_one(&mut tables, add_token("ann", None, None)).unwrap_err();
    assert_eq!(error.code, ErrorCode::AlreadyExists);
    let error = apply_one(&mut tables, add_token(FIRST_TOKEN, None, None)).unwrap_err();
    assert_eq!(error.code, ErrorCode::AlreadyExists);
    let error = apply_one(&mut tables, revoke_token("bob")).unwrap_err();
    assert!(error.message.contains("tokens list digits"), "{error}");

    let access = apply_one(&mut tables, revoke_token(FIRST_TOKEN)).unwrap();
    assert_eq!(names(&access), ["ann"]);
    let error = apply_one(&mut tables, revoke_token(FIRST_TOKEN)).unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    let access = apply_one(&mut tables, revoke_token("ann")).unwrap();
    assert_eq!(names(&access), Vec::<&str>::new());
}

#[test]
fn tokens_are_bounded_and_expired_ones_make_room() {
    let mut tables = deployed();
    // Time is the index of the command.
    let expires = apply_one(&mut tables, add_token("short", Some(3), None)).unwrap();
    let token = expires.tokens.last().unwrap();
    assert_eq!(token.expires_ms, Some(token.created_ms + 3));
    for number in 1..=TOKENS_MAX {
        apply_one(&mut tables, add_token(&format!("t{number}"), None, None)).unwrap();
    }
    let error = apply_one(&mut tables, add_token("more", None, None)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Overloaded);
    for bad in [
        add_token("-x", None, None),
        add_token("x", Some(0), None),
        add_token("x", Some(u64::MAX), None),
        add_token("x", None, Some(0)),
    ] {
        let error = apply_one(&mut tables, bad).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    }
}

#[test]
fn rules_keep_their_order_and_name_versions_that_exist() {
    let mut tables = deployed();
    let order = |access: &Access| {
        let rules = access.rules.iter();
        rules.map(Rule::to_string).collect::<Vec<_>>()
    };
    apply_one(&mut tables, set("a", 1, false)).unwrap();
    apply_one(&mut tables, set("b", 2, false)).unwrap();
    let access = apply_one(&mut tables, set("c", 3, true)).unwrap();
    let [a, b, c] = [
        "header x-tier=a to version 1",
        "header x-tier=b to version 2",
        "header x-tier=c to version 3",
    ];
    assert_eq!(order(&access), [c, a, b]);
    // The same matcher is changed where it stands, or moved.
    let access = apply_one(&mut tables, set("a", 3, false)).unwrap();
    assert_eq!(order(&access), [c, "header x-tier=a to version 3", b]);
    let access = apply_one(&mut tables, set("b", 2, true)).unwrap();
    assert_eq!(order(&access)[0], b);

    let error = apply_one(&mut tables, set("d", 9, false)).unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound, "{error}");
    let remove = || Command::RemoveRule {
        endpoint: "digits".into(),
        matcher: Matcher::header("X-Tier", "b"),
    };
    assert_eq!(apply_one(&mut tables, remove()).unwrap().rules.len(), 2);
    let error = apply_one(&mut tables, remove()).unwrap_err();
    assert!(error.message.contains("route list digits"), "{error}");
    for number in 2..RULES_MAX {
        apply_one(&mut tables, set(&format!("r{number}"), 1, false)).unwrap();
    }
    let error = apply_one(&mut tables, set("more", 1, false)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Overloaded);
    apply_one(&mut tables, set("a", 1, false)).unwrap();
}

#[test]
fn another_share_changes_the_rule_that_stands() {
    let mut tables = deployed();
    let share = |value: &str, percent| Command::SetRule {
        endpoint: "digits".into(),
        rule: Rule {
            matcher: Matcher::header("x-tier", value).of_percent(percent),
            version: 2,
        },
        is_first: false,
    };
    apply_one(&mut tables, share("a", 20)).unwrap();
    apply_one(&mut tables, set("b", 1, false)).unwrap();
    for (percent, expected) in [(40, "40 % of header x-tier=a"), (100, "header x-tier=a")] {
        let access = apply_one(&mut tables, share("a", percent)).unwrap();
        let rules: Vec<String> = access
            .rules
            .iter()
            .map(|rule| rule.matcher.to_string())
            .collect();
        assert_eq!(rules, [expected, "header x-tier=b"]);
    }
    let error = apply_one(&mut tables, share("c", 0)).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(error.message.contains("0 percent"), "{error}");

    // Whoever removes it need not know its share.
    apply_one(&mut tables, share("a", 7)).unwrap();
    let remove = Command::RemoveRule {
        endpoint: "digits".into(),
        matcher: Matcher::header("x-tier", "a"),
    };
    assert_eq!(apply_one(&mut tables, remove).unwrap().rules.len(), 1);

    // An experiment on the version keeps its share, too.
    apply_one(&mut tables, share("a", 7)).unwrap();
    start_experiment(&mut tables);
    let error = apply_one(&mut tables, share("a", 8)).unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition, "{error}");
}

/// Compares version 2 with the active one.
fn start_experiment(tables: &mut TestTables) {
    let proposed = Proposed {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: Some(2),
        control_share_bp: 5_000,
        treatment_share_bp: 5_000,
        seed: None,
        primary: Metric {
            measure: Measure::ErrorRate,
            direction: Direction::Down,
        },
        effect_min: 0.01,
        guardrails: Vec::new(),
        alpha_bp: 500,
        samples_max: 1_000,
    };
    let start = ServingCommand::Experiment(ExperimentCommand::Start(proposed));
    tables.serving(&start).unwrap();
}

#[test]
fn rules_about_the_versions_of_an_experiment_stay_while_it_is_under_way() {
    let mut tables = deployed();
    apply_one(&mut tables, set("early", 2, false)).unwrap();
    apply_one(&mut tables, set("other", 3, false)).unwrap();
    let before = of(&tables.tables, "digits").unwrap().rules;
    start_experiment(&mut tables);
    let remove = |value| Command::RemoveRule {
        endpoint: "digits".into(),
        matcher: Matcher::header("x-tier", value),
    };
    for (change, named) in [
        (
            set("new", 2, false),
            "x-tier=new to version 2` is about version 2, the treatment",
        ),
        (
            set("new", 1, true),
            "x-tier=new to version 1` is about version 1, the control",
        ),
        // What stands is about one of them, or what comes instead.
        (
            set("early", 3, false),
            "x-tier=early to version 2` is about",
        ),
        (set("early", 2, true), "x-tier=early to version 2` is about"),
        (
            set("other", 2, false),
            "x-tier=other to version 2` is about",
        ),
        (remove("early"), "x-tier=early to version 2` is about"),
    ] {
        let error = apply_one(&mut tables, change).unwrap_err();
        assert_eq!(error.code, ErrorCode::FailedPrecondition);
        assert!(error.message.contains(named), "{error}");
        assert!(
            error
                .message
                .contains("of experiment 1 of endpoint `digits`")
                && error.message.contains("`mobula experiment stop digits`"),
            "{error}"
        );
    }
    assert_eq!(of(&tables.tables, "digits").unwrap().rules, before);
    // No key of the experiment meets version 3.
    apply_one(&mut tables, remove("other")).unwrap();
    apply_one(&mut tables, set("another", 3, true)).unwrap();

    let stop = ExperimentCommand::Stop {
        endpoint: "digits".into(),
    };
    tables.serving(&ServingCommand::Experiment(stop)).unwrap();
    apply_one(&mut tables, set("new", 2, false)).unwrap();
    apply_one(&mut tables, remove("early")).unwrap();
}

#[test]
fn doors_are_told_of_what_concerns_them_and_of_nothing_else() {
    let mut tables = deployed();
    let first = doors(&tables.tables, 0);
    assert_eq!(first.doors.as_ref().unwrap()[0].endpoint, "digits");
    assert_eq!(doors(&tables.tables, first.revision).doors, None);

    tables
        .serving(&ServingCommand::RouterReady {
            endpoint: "digits".into(),
            incarnation: mobula_core::id::Incarnation(99),
            http_address: "127.0.0.1:9".into(),
        })
        .unwrap();
    assert_eq!(doors(&tables.tables, first.revision).doors, None);

    apply_one(&mut tables, set("a", 1, false)).unwrap();
    let second = doors(&tables.tables, first.revision);
    assert_eq!(second.doors.unwrap()[0].headers, ["x-tier"]);

    tables
        .serving(&ServingCommand::Delete {
            endpoint: "digits".into(),
        })
        .unwrap();
    let third = doors(&tables.tables, second.revision);
    assert_eq!(third.doors, Some(Vec::new()));
    let error = apply_one(&mut tables, add_token("late", None, None)).unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
}

#[test]
fn another_deployment_of_a_name_begins_without_what_the_first_had() {
    let mut tables = deployed();
    apply_one(&mut tables, add_token("ann", None, None)).unwrap();
    for command in [
        ServingCommand::Delete {
            endpoint: "digits".into(),
        },
        ServingCommand::Gone {
            endpoint: "digits".into(),
        },
    ] {
        tables.serving(&command).unwrap();
    }
    deploy(&mut tables, "digits");
    assert_eq!(names(&of(&tables.tables, "digits").unwrap()), [FIRST_TOKEN]);
}

#[test]
fn what_all_endpoints_have_at_the_most_fits_into_one_answer() {
    let token = |number: usize| Token {
        name: format!("{number:064}"),
        hash: [0xFF; 32],
        created_ms: u64::MAX,
        expires_ms: Some(u64::MAX),
        per_second: Some(u32::MAX),
    };
    let door = |number: usize| Door {
        endpoint: format!("{number:064}"),
        deployed_ms: u64::MAX,
        tokens: (0..=TOKENS_MAX).map(token).collect(),
        headers: (0..RULES_MAX)
            .map(|number| format!("{number:064}"))
            .collect(),
        graph: None,
    };
    let all = Doors {
        revision: u64::MAX,
        doors: Some((0..1_000).map(door).collect()),
    };
    assert!(codec::encode_plain(&all).len() < 5 * 1024 * 1024);
}
