use mobula_core::codec;
use mobula_core::control::{Caller, StateModule};
use mobula_core::id::JobId;

use super::super::command::is_allowed;
use super::super::plan::{Direction, Guardrail, Measure, Metric};
use super::*;
use crate::registry::events::EventPage;
use crate::registry::state::{Query as RegistryQuery, Registry};
use crate::serving::rollout::command::{Command as RolloutCommand, Verdict};
use crate::serving::rollout::trial::Evidence;
use crate::serving::rollout::{Guardrails, Strategy};
use crate::serving::state::{Command as ServingCommand, find as find_endpoint};
use crate::serving::test_tables::TestTables;

#[path = "state_counting_tests.rs"]
mod counting;

const ROUTER: Incarnation = Incarnation(900);

const STORED: [u8; 32] = [1; 32];

/// Tables with an endpoint `digits` of the first of three versions, heard of by router 900.
struct Head {
    applied: TestTables,
}

impl Head {
    fn new() -> Self {
        let mut head = Head {
            applied: TestTables::with_versions(3),
        };
        head.serving(&ServingCommand::Deploy {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: Some(1),
            replicas: 2,
            settings: Default::default(),
            token_hash: [7; 32],
        })
        .unwrap();
        head.router(ROUTER);
        head
    }

    fn serving(&mut self, command: &ServingCommand) -> Result<Vec<u8>, Rejection> {
        self.applied.serving(command)
    }

    fn router(&mut self, incarnation: Incarnation) {
        self.serving(&ServingCommand::RouterReady {
            endpoint: "digits".into(),
            incarnation,
            http_address: "127.0.0.1:1".into(),
        })
        .unwrap();
    }

    fn say(&mut self, command: Command) -> Result<Experiment, Rejection> {
        let answer = self.serving(&ServingCommand::Experiment(command))?;
        Ok(codec::decode(&answer, 1 << 20).unwrap())
    }

    fn rollout(&mut self, command: RolloutCommand) -> Result<Vec<u8>, Rejection> {
        self.serving(&ServingCommand::Rollout(command))
    }

    fn now(&self) -> Experiment {
        newest(&self.applied.tables, "digits").unwrap()
    }

    fn stop(&mut self) -> Result<Experiment, Rejection> {
        self.say(Command::Stop {
            endpoint: "digits".into(),
        })
    }

    fn clean(&mut self) {
        let last = self.now();
        self.say(drained(&last, ROUTER)).unwrap();
        self.say(retired(&last)).unwrap();
    }
}

fn proposed(version: u64) -> Proposed {
    Proposed {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: Some(version),
        control_share_bp: 5_000,
        treatment_share_bp: 5_000,
        seed: None,
        primary: Metric {
            measure: Measure::Outcome("clicks".into()),
            direction: Direction::Up,
        },
        effect_min: 0.01,
        guardrails: vec![Guardrail {
            metric: Metric {
                measure: Measure::ErrorRate,
                direction: Direction::Down,
            },
            worsening_max: 0.005,
        }],
        alpha_bp: 500,
        samples_max: 10_000,
    }
}

fn start(version: u64) -> Command {
    Command::Start(proposed(version))
}

fn count(experiment: u64, router: Incarnation) -> Command {
    Command::Count {
        endpoint: "digits".into(),
        experiment,
        router,
    }
}

fn findings(decision: Decision) -> Findings {
    Findings {
        decision,
        ..Findings::because("because".into())
    }
}

fn report(experiment: u64, router: Incarnation) -> Command {
    Command::Report {
        endpoint: "digits".into(),
        experiment,
        router,
        findings: findings(Decision::Undecided),
        stored: STORED,
    }
}

fn count_anew(experiment: u64, count: u32, router: Incarnation) -> Command {
    Command::CountAnew {
        endpoint: "digits".into(),
        experiment,
        count,
        router,
    }
}

fn conclude(experiment: u64, router: Incarnation, ending: Ending, decision: Decision) -> Command {
    Command::Conclude {
        endpoint: "digits".into(),
        experiment,
        router,
        ending,
        findings: findings(decision),
    }
}

fn drained(experiment: &Experiment, router: Incarnation) -> Command {
    Command::Drained {
        endpoint: "digits".into(),
        experiment: experiment.number,
        revision: experiment.revision,
        router,
    }
}

fn retired(experiment: &Experiment) -> Command {
    Command::Retired {
        endpoint: "digits".into(),
        experiment: experiment.number,
        revision: experiment.revision,
    }
}

fn roll_out(version: u64) -> RolloutCommand {
    RolloutCommand::Start {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: Some(version),
        strategy: Strategy::BlueGreen,
        steps: Vec::new(),
        guardrails: Guardrails::STANDARD,
        min_samples: 10,
    }
}

#[test]
fn a_plan_that_is_followed_is_not_changed() {
    let mut head = Head::new();
    let begun = head.say(start(2)).unwrap();
    assert_eq!((begun.number, begun.plan.control.version), (1, 1));
    assert_eq!(begun.plan.seed, "digits/experiment-1/");
    let plan = head.now().plan;

    for (change, named) in [
        (
            Proposed {
                alpha_bp: 1_000,
                samples_max: 20_000,
                ..proposed(2)
            },
            "with another alpha, maximal samples, and a plan is not changed",
        ),
        (
            Proposed {
                control_share_bp: 9_000,
                treatment_share_bp: 1_000,
                ..proposed(2)
            },
            "with another split, and",
        ),
        (proposed(3), "with another treatment, and"),
        (
            Proposed {
                seed: Some("mine".into()),
                ..proposed(2)
            },
            "with another seed, and",
        ),
        (proposed(2), "is under way with this plan"),
    ] {
        let refused = head.say(Command::Start(change)).unwrap_err();
        assert_eq!(refused.code, ErrorCode::AlreadyExists);
        assert!(refused.message.contains(named), "{refused}");
        assert!(
            refused
                .message
                .ends_with("`mobula experiment stop digits` and start a new one"),
            "{refused}"
        );
    }
    assert_eq!(head.now().plan, plan);
    // Whatever else is said of it, the plan stays.
    head.say(count(1, ROUTER)).unwrap();
    head.say(report(1, ROUTER)).unwrap();
    head.stop().unwrap();
    assert_eq!(head.now().plan.digest(), plan.digest());
}

#[test]
fn only_another_version_of_the_endpoints_model_is_compared() {
    let mut head = Head::new();
    let faces = Proposed {
        model: "faces".into(),
        ..proposed(2)
    };
    for (change, reason) in [
        (faces, "serves digits, not faces"),
        (proposed(1), "serves digits:1 already"),
        (proposed(9), "has no version 9"),
        (
            Proposed {
                alpha_bp: 0,
                ..proposed(2)
            },
            "give 0.0001 to 0.2",
        ),
    ] {
        let refused = head.say(Command::Start(change)).unwrap_err();
        assert!(refused.message.contains(reason), "{refused}");
    }
    assert_eq!(newest(&head.applied.tables, "digits"), None);
}

#[test]
fn an_endpoint_has_one_of_experiment_and_rollout() {
    let mut head = Head::new();
    head.say(start(2)).unwrap();
    let refused = head.rollout(roll_out(3)).unwrap_err();
    assert!(
        refused.message.contains("mobula experiment stop digits"),
        "{refused}"
    );
    head.stop().unwrap();
    let again = head.stop().unwrap_err();
    assert!(again.message.contains("is over already"), "{again}");
    // What is left of it goes first.
    let early = head.rollout(roll_out(3)).unwrap_err();
    assert!(early.message.contains("is being taken down"), "{early}");
    let early = head.say(start(3)).unwrap_err();
    assert!(early.message.contains("is being taken down"), "{early}");
    head.clean();
    assert_eq!(unfinished(&head.applied.tables, "digits"), None);

    head.rollout(roll_out(2)).unwrap();
    let refused = head.say(start(3)).unwrap_err();
    assert!(
        refused.message.contains("mobula rollout abort digits"),
        "{refused}"
    );
    let of = || "digits".to_owned();
    head.rollout(RolloutCommand::Promote { endpoint: of() })
        .unwrap();
    let early = head.say(start(3)).unwrap_err();
    assert!(early.message.contains("rollout 1"), "{early}");
    let rollout = newest_rollout(&head.applied.tables, "digits").unwrap();
    head.rollout(RolloutCommand::Drained {
        endpoint: of(),
        rollout: 1,
        revision: rollout.revision,
        router: ROUTER,
    })
    .unwrap();
    head.rollout(RolloutCommand::Retired {
        endpoint: of(),
        rollout: 1,
        revision: rollout.revision,
    })
    .unwrap();

    // Compared with the version of before, whose actors a rollback would need.
    let second = head.say(start(1)).unwrap();
    assert_eq!((second.number, second.plan.control.version), (2, 2));
    let refused = head
        .rollout(RolloutCommand::RollBack { endpoint: of() })
        .unwrap_err();
    assert!(
        refused.message.contains("mobula experiment stop digits"),
        "{refused}"
    );
    let judged = head.rollout(RolloutCommand::Judge {
        endpoint: of(),
        rollout: 1,
        step: 0,
        router: ROUTER,
        verdict: Verdict::RollBack,
        evidence: Evidence::default(),
    });
    assert_eq!(judged.unwrap_err().code, ErrorCode::Fenced);
    assert_eq!(
        find_endpoint(&head.applied.tables, "digits")
            .unwrap()
            .version,
        2
    );
    head.stop().unwrap();
    head.clean();
    head.rollout(RolloutCommand::RollBack { endpoint: of() })
        .unwrap();
    assert_eq!(
        find_endpoint(&head.applied.tables, "digits")
            .unwrap()
            .version,
        1
    );
}

/// The entries of the registry's log about experiments.
fn entries(head: &Head) -> Vec<serde_json::Value> {
    let query = codec::encode_plain(&RegistryQuery::Events { from: 1 });
    let answer = Registry.query(&head.applied.tables, 0, &query).unwrap();
    let page: EventPage = codec::decode(&answer, 1 << 20).unwrap();
    let entries = page.events.iter().map(|event| &event.text);
    entries
        .map(|text| serde_json::from_str(text).unwrap())
        .filter(|entry: &serde_json::Value| entry["event"] == "experiment")
        .collect()
}

#[test]
fn the_command_that_ends_an_experiment_writes_how_into_the_log() {
    let mut head = Head::new();
    head.say(start(2)).unwrap();
    head.say(count(1, ROUTER)).unwrap();
    head.say(report(1, ROUTER)).unwrap();
    assert_eq!(entries(&head), Vec::<serde_json::Value>::new());
    let plan = head.now().plan.digest();
    head.say(conclude(1, ROUTER, Ending::Decided, Decision::Treatment))
        .unwrap();
    let index = head.applied.index;
    let first = entries(&head);
    let expected = serde_json::json!({
        "sequence": first[0]["sequence"],
        "index": index,
        "time_ms": index,
        "event": "experiment",
        "endpoint": "digits",
        "number": 1,
        "model": "digits",
        "control": 1,
        "treatment": 2,
        "plan_blake3": plan,
        "outcome": "decided",
        "decision": "treatment",
        "reason": "because",
    });
    assert_eq!(first, [expected]);
    // What is refused is no entry.
    head.stop().unwrap_err();
    head.clean();
    assert_eq!(entries(&head), first);

    head.say(start(3)).unwrap();
    head.stop().unwrap();
    let both = entries(&head);
    assert_eq!((both.len(), &both[0]), (2, &first[0]));
    for (field, value) in [
        ("outcome", "stopped"),
        ("decision", "undecided"),
        ("reason", "a client ended it"),
    ] {
        assert_eq!(both[1][field], value, "{both:?}");
    }
}

#[test]
fn a_sentinel_that_is_answered_wrongly_ends_an_experiment_and_changes_no_version() {
    let mut head = Head::new();
    head.say(start(2)).unwrap();
    let wrong = || conclude(1, ROUTER, Ending::Sentinel, Decision::Control);
    assert_eq!(head.say(wrong()).unwrap_err().code, ErrorCode::Fenced);
    head.say(count(1, ROUTER)).unwrap();
    head.say(report(1, ROUTER)).unwrap();
    let over = head.say(wrong()).unwrap();
    assert_eq!((over.ending, over.stored), (Some(Ending::Sentinel), None));
    assert_eq!(over.cleanup, Cleanup::Draining);
    assert_eq!(over.findings, Some(findings(Decision::Control)));
    let endpoint = find_endpoint(&head.applied.tables, "digits").unwrap();
    assert_eq!(endpoint.version, 1);
    let said = entries(&head);
    for (field, value) in [
        ("outcome", "sentinel"),
        ("decision", "control"),
        ("reason", "because"),
    ] {
        assert_eq!(said[0][field], value, "{said:?}");
    }
    head.clean();
    assert_eq!(unfinished(&head.applied.tables, "digits"), None);
}

#[test]
fn what_is_kept_is_bounded_and_goes_with_the_endpoint() {
    let mut head = Head::new();
    for _ in 0..HISTORY_MAX + 3 {
        head.say(start(2)).unwrap();
        head.stop().unwrap();
        head.clean();
    }
    let known = history(&head.applied.tables, "digits");
    assert_eq!((known.len(), known[0].number), (HISTORY_MAX, 4));
    let of = || "digits".to_owned();
    head.serving(&ServingCommand::Delete { endpoint: of() })
        .unwrap();
    assert!(
        head.say(start(2))
            .unwrap_err()
            .message
            .contains("taken down")
    );
    head.serving(&ServingCommand::Gone { endpoint: of() })
        .unwrap();
    assert_eq!(history(&head.applied.tables, "digits"), []);
    assert_eq!(newest(&head.applied.tables, "digits"), None);
}

#[test]
fn clients_start_and_stop_and_routers_say_what_they_found() {
    let host = |job| Caller::Host {
        job,
        node: mobula_core::id::NodeId(1),
    };
    let stop = Command::Stop {
        endpoint: "digits".into(),
    };
    for (command, client, router) in [
        (start(2), true, false),
        (stop, true, false),
        (count(1, ROUTER), false, true),
        (report(1, ROUTER), false, true),
        (count_anew(1, 1, ROUTER), false, true),
        (
            conclude(1, ROUTER, Ending::Decided, Decision::Control),
            false,
            true,
        ),
    ] {
        assert_eq!(is_allowed(&Caller::Client, &command), client, "{command:?}");
        assert_eq!(
            is_allowed(&host(JobId::SYSTEM), &command),
            router,
            "{command:?}"
        );
        assert!(!is_allowed(&host(JobId(7)), &command), "{command:?}");
        assert!(is_allowed(&Caller::Head, &command), "{command:?}");
    }
}
