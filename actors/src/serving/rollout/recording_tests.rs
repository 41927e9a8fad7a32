use mobula_core::codec;
use mobula_core::control::StateModule;
use mobula_core::id::Incarnation;
use serde_json::{Value, json};

use super::super::command::{Command, Verdict};
use super::super::plan::Guardrails;
use super::super::trial::Evidence;
use super::*;
use crate::registry::events::EventPage;
use crate::registry::state::{Query, Registry};
use crate::serving::state::Command as ServingCommand;
use crate::serving::test_tables::TestTables;

const ROUTER: Incarnation = Incarnation(900);

fn head() -> TestTables {
    let mut head = TestTables::with_versions(2);
    head.serve("front", ROUTER);
    head
}

fn say(head: &mut TestTables, command: Command) -> Rollout {
    let answer = head.serving(&ServingCommand::Rollout(command)).unwrap();
    codec::decode(&answer, 1 << 20).unwrap()
}

fn start(strategy: Strategy) -> Command {
    Command::Start {
        endpoint: "front".into(),
        model: "digits".into(),
        version: Some(2),
        strategy,
        steps: vec![0, 50, 100],
        guardrails: Guardrails::STANDARD,
        min_samples: 10,
    }
}

fn judge(step: u32, verdict: Verdict, reason: &str) -> Command {
    Command::Judge {
        endpoint: "front".into(),
        rollout: 1,
        step,
        router: ROUTER,
        verdict,
        evidence: Evidence {
            reason: reason.to_owned(),
            ..Evidence::default()
        },
    }
}

/// The entries of the registry's log about rollouts.
fn entries(head: &TestTables) -> Vec<Value> {
    let query = codec::encode_plain(&Query::Events { from: 1 });
    let answer = Registry.query(&head.tables, 0, &query).unwrap();
    let page: EventPage = codec::decode(&answer, 1 << 20).unwrap();
    let entries = page.events.iter().map(|event| &event.text);
    entries
        .map(|text| serde_json::from_str(text).unwrap())
        .filter(|entry: &Value| entry["event"] == "rollout")
        .collect()
}

fn entry(head: &TestTables, strategy: &str, outcome: &str, step: u32, reason: &str) -> Value {
    let known = entries(head);
    let last = known.last().unwrap();
    json!({
        "sequence": last["sequence"],
        "index": head.index,
        "time_ms": head.index,
        "event": "rollout",
        "endpoint": "front",
        "number": 1,
        "model": "digits",
        "stable": 1,
        "candidate": 2,
        "strategy": strategy,
        "step": step,
        "outcome": outcome,
        "reason": reason,
    })
}

#[test]
fn the_command_that_ends_a_rollout_writes_how_into_the_log() {
    let mut head = head();
    say(&mut head, start(Strategy::Canary));
    say(&mut head, judge(0, Verdict::Pass, "2 of 2 replicas answer"));
    // Neither its beginning nor its steps are entries: they are with the rollout.
    assert_eq!(entries(&head), Vec::<Value>::new());
    say(&mut head, judge(1, Verdict::Pass, "all is well"));
    let promoted = entry(&head, "canary", "promoted", 1, "all is well");
    assert_eq!(entries(&head), std::slice::from_ref(&promoted));
    let endpoint = "front".to_owned();
    say(&mut head, Command::RollBack { endpoint });
    let back = entry(&head, "canary", "rolled_back", 1, "a client decided");
    assert_eq!(entries(&head), [promoted, back]);
}

#[test]
fn a_rollback_is_written_with_its_reason_and_a_refused_word_is_not() {
    let mut head = head();
    say(&mut head, start(Strategy::BlueGreen));
    say(&mut head, judge(0, Verdict::RollBack, "does not fit"));
    let back = entry(&head, "blue_green", "rolled_back", 0, "does not fit");
    assert_eq!(entries(&head), std::slice::from_ref(&back));
    let late = ServingCommand::Rollout(judge(0, Verdict::RollBack, "once more"));
    head.serving(&late).unwrap_err();
    assert_eq!(entries(&head), [back]);
}

#[test]
fn a_clients_end_is_written_too() {
    let mut head = head();
    say(&mut head, start(Strategy::Rolling));
    let endpoint = "front".to_owned();
    say(&mut head, Command::Abort { endpoint });
    let aborted = entry(&head, "rolling", "aborted", 0, "a client decided");
    assert_eq!(entries(&head), [aborted]);
}
