//! Policies and retrainings with the tables that they look at: jobs, versions and rollouts, driven by the
//! leader's own loop.

use std::collections::BTreeMap;

use super::*;
use crate::drift::retraining::plan::{BUDGET_JOBS_MAX, Budget, CanaryPlan, Terms};
use crate::drift::retraining::tables::{ledgers, shown};
use crate::drift::retraining::world::World;
use crate::registry::NewVersion;
use crate::registry::stages::Stage;
use crate::serving::rollout::plan::{Guardrails, Strategy};

pub(in crate::drift::retraining) fn new_version(digest: char) -> NewVersion {
    NewVersion {
        model: "digits".into(),
        digest: digest.to_string().repeat(64),
        size_bytes: 10,
        weights_blake3: digest.to_string().repeat(64),
        dataset_blake3: "b".repeat(64),
        job: 3,
        metrics: BTreeMap::from([("accuracy".to_owned(), 0.9)]),
        training_json: "{}".into(),
    }
}

pub(in crate::drift::retraining) fn terms() -> Terms {
    Terms {
        cooldown_ms: 1_000,
        metric: None,
        min_gain: 0.0,
        gate: Stage::Candidate,
        canary: CanaryPlan {
            strategy: Strategy::Canary,
            steps: vec![10, 100],
            guardrails: Guardrails::STANDARD,
            min_samples: 10,
        },
    }
}

fn phases(row: &Retraining) -> Vec<&'static str> {
    row.steps.iter().map(|step| step.phase.as_str()).collect()
}

fn last_reason(row: &Retraining) -> &str {
    &row.steps.last().unwrap().reason
}

#[test]
fn drift_leads_to_another_version_in_service_without_anybody() {
    let mut world = World::new(Mode::Auto);
    world.drift();
    world.settle();
    let job = world.newest().job.unwrap();
    assert_eq!(phases(&world.newest()), ["submitting", "training"]);
    assert_eq!(
        world.jobs(),
        [format!("retrain/digits/{}", world.newest().began_index)]
    );
    world.end_job(job, Some(0.95));
    world.settle();
    let row = world.newest();
    assert_eq!(
        phases(&row),
        ["submitting", "training", "evaluating", "queued", "canary"]
    );
    assert_eq!((row.candidate, row.rollout), (Some(2), Some(1)));
    assert!(row.comparison.unwrap().is_better);
    assert_eq!(world.active(), 1);
    world.judge(true);
    world.settle();
    assert_eq!(world.newest().phase, Phase::Promoted);
    assert_eq!(world.active(), 2);
    // One entry in the registry's log for each step, which people can prove.
    let entries: Vec<serde_json::Value> = world.retraining_events();
    assert_eq!(entries.len(), 6);
    assert_eq!(entries[5]["phase"], "promoted");
    assert_eq!(entries[5]["version"], 2);
    // The same event leads to nothing more, in the cooldown or after it.
    world.pass(10_000);
    world.settle();
    assert_eq!(history(&world.tables, "digits").len(), 1);
}

#[test]
fn every_way_to_fail_ends_with_its_reason_and_starts_the_cooldown() {
    type Course = fn(&mut World, u64);
    let cases: [(&str, &str, Course); 6] = [
        ("failed", "out of data", |world, job| {
            world.fail_job(job, "out of data")
        }),
        ("failed", "registered no version of digits", |world, job| {
            world.end_job(job, None);
        }),
        (
            "not_better",
            "accuracy 0.8000 against 0.9000",
            |world, job| {
                world.end_job(job, Some(0.8));
            },
        ),
        (
            "not_better",
            "has the weights of the active version",
            |world, job| {
                world.end_job_with(job, 'a', 0.95);
            },
        ),
        ("rolled_back", "worse than the baseline", |world, job| {
            world.end_job(job, Some(0.95));
            world.settle();
            world.judge(false);
        }),
        ("cancelled", "a client ended it: holidays", |world, _| {
            let command = Command::Cancel {
                endpoint: "digits".into(),
                reason: "holidays".into(),
            };
            world.retraining(command).unwrap();
        }),
    ];
    for (phase, reason, course) in cases {
        let mut world = World::new(Mode::Auto);
        world.drift();
        world.settle();
        let job = world.newest().job.unwrap();
        course(&mut world, job);
        world.settle();
        let row = world.newest();
        assert_eq!(row.phase.as_str(), phase);
        assert!(last_reason(&row).contains(reason), "{}", last_reason(&row));
        assert_eq!(world.active(), 1, "{phase}");
        assert!(!world.runs(job), "{phase}");
        world.clean();
        // The drift goes on, in the cooldown: it waits.
        world.drift();
        world.settle();
        assert_eq!(world.newest().number, 1, "{phase}");
        world.pass(1_000);
        world.settle();
        assert_eq!(
            (world.newest().number, world.newest().event),
            (2, 1),
            "{phase}"
        );
    }
}

#[test]
fn drift_that_has_ended_begins_nothing_later() {
    let mut world = World::new(Mode::Auto);
    world.drift();
    world.settle();
    world.fail_job(world.newest().job.unwrap(), "no luck");
    world.settle();
    // It ends, and comes and goes once more, all in the cooldown.
    world.quiet();
    world.drift();
    world.quiet();
    world.pass(10_000);
    world.settle();
    assert_eq!(world.newest().number, 1);
    let refused = world.retraining(Command::Retrain {
        endpoint: "digits".into(),
    });
    let message = refused.unwrap_err().message;
    assert!(message.contains("nothing suggests to retrain"), "{message}");
    // And comes to stay.
    world.drift();
    world.settle();
    assert_eq!((world.newest().number, world.newest().event), (2, 3));
}

#[test]
fn drift_that_nobody_saw_since_the_last_retraining_begins_no_other() {
    let mut world = World::new(Mode::Auto);
    world.drift();
    world.settle();
    world.pass(10);
    world.fail_job(world.newest().job.unwrap(), "no luck");
    world.settle();
    // Nothing is asked: whether it goes on is not known.
    world.pass(10_000);
    world.settle();
    assert_eq!(world.newest().number, 1);
    world.drift();
    world.settle();
    assert_eq!((world.newest().number, world.newest().event), (2, 1));
}

#[test]
fn a_budget_that_is_spent_is_said_and_counted_by_time() {
    let mut world = World::new(Mode::Auto);
    for number in 1..=3 {
        // One drift, which goes on.
        world.drift();
        world.settle();
        let row = world.newest();
        assert_eq!(row.number, number);
        if number < 3 {
            world.fail_job(row.job.unwrap(), "no luck");
            world.settle();
        } else {
            assert_eq!(row.phase, Phase::BudgetSpent);
            assert!(
                last_reason(&row).contains("2 jobs of 2"),
                "{}",
                last_reason(&row)
            );
        }
        world.pass(1_000);
    }
    let refused = world.retraining(Command::Retrain {
        endpoint: "digits".into(),
    });
    assert!(refused.unwrap_err().message.contains("is spent"));
    // The drift goes on: that the budget is spent is said once, and when there is some again the loop goes on.
    world.drift();
    world.settle();
    assert_eq!(world.newest().number, 3);
    world.pass(20_000);
    world.settle();
    let row = world.newest();
    assert_eq!((row.number, row.event, row.phase), (4, 1, Phase::Training));
    let left = shown(&world.tables, world.now_ms, "digits").unwrap();
    assert_eq!((left.jobs_left, left.quiet_until_ms), (Some(1), None));
}

#[test]
fn a_suggestion_waits_for_a_client_and_goes_with_its_version() {
    let mut world = World::new(Mode::Suggest);
    world.drift();
    world.settle();
    assert_eq!(world.newest().phase, Phase::Suggested);
    assert_eq!(world.jobs(), Vec::<String>::new());
    let shown = shown(&world.tables, world.now_ms, "digits").unwrap();
    let waits_for = shown.retrainings[0].waits_for.as_deref().unwrap();
    assert!(
        waits_for.contains("mobula drift retrain digits"),
        "{waits_for}"
    );
    // What ends the drift decides nothing for the client.
    world.quiet();
    world.settle();
    assert_eq!(world.newest().phase, Phase::Suggested);
    world.register(new_version('7'));
    world.promote_by_hand(2);
    world.settle();
    assert_eq!(world.newest().phase, Phase::Cancelled);
    assert!(last_reason(&world.newest()).contains("digits:2 is active now"));
}

#[test]
fn a_suggestion_that_a_client_ended_is_made_again_while_the_drift_goes_on() {
    let mut world = World::new(Mode::Suggest);
    world.drift();
    world.settle();
    world
        .retraining(Command::Cancel {
            endpoint: "digits".into(),
            reason: String::new(),
        })
        .unwrap();
    world.pass(1_000);
    world.drift();
    world.settle();
    let row = world.newest();
    assert_eq!((row.number, row.phase), (2, Phase::Suggested));
}

#[test]
fn a_version_waits_for_the_signature_that_its_model_asks_for() {
    let mut world = World::with(
        Mode::Auto,
        Terms {
            gate: Stage::Staging,
            ..terms()
        },
    );
    world.drift();
    world.settle();
    world.end_job(world.newest().job.unwrap(), Some(0.95));
    world.settle();
    let row = world.newest();
    assert_eq!(row.phase, Phase::Gate);
    let reason = last_reason(&row);
    assert!(
        reason.contains(
            "digits:2 is candidate and has to become staging, signed by a key with the role `stage`"
        ),
        "{reason}"
    );
    assert!(
        reason.contains("mobula models promote digits:2 --to staging"),
        "{reason}"
    );
    world.sign(2);
    world.settle();
    assert_eq!(world.newest().phase, Phase::Canary);
}

#[test]
fn a_version_that_the_policies_forbid_to_serve_is_not_tried() {
    let mut world = World::new(Mode::Auto);
    world.drift();
    world.settle();
    world.label_data("pii");
    world.end_job(world.newest().job.unwrap(), Some(0.95));
    world.settle();
    let row = world.newest();
    assert_eq!((row.phase, row.rollout), (Phase::Failed, None));
    let reason = last_reason(&row);
    assert!(
        reason.contains("policy pii-needs-approval forbids"),
        "{reason}"
    );
    assert_eq!(world.active(), 1);
}

#[test]
fn the_rollout_of_somebody_else_is_waited_for() {
    let mut world = World::new(Mode::Auto);
    world.drift();
    world.settle();
    world.register(new_version('7'));
    world.start_by_hand(2);
    world.end_job(world.newest().job.unwrap(), Some(0.95));
    world.settle();
    assert_eq!(world.newest().phase, Phase::Queued);
    world.judge(false);
    world.settle();
    assert_eq!(world.newest().phase, Phase::Queued);
    world.clean();
    world.settle();
    let row = world.newest();
    assert_eq!(
        (row.phase, row.candidate, row.rollout),
        (Phase::Canary, Some(3), Some(2))
    );
}

#[test]
fn what_cannot_be_a_policy_is_refused_with_the_reason() {
    type Change = fn(&mut RetrainPolicy);
    let mut world = World::new(Mode::Auto);
    let cases: [(Change, &str); 7] = [
        (
            |policy| policy.model = "faces".into(),
            "write `register = \"digits\"`",
        ),
        (
            |policy| {
                policy.budget = Budget {
                    jobs: BUDGET_JOBS_MAX + 1,
                    period_ms: 1,
                };
            },
            "65 jobs in 1ms (`--budget`) is not possible: give 1 to 64 jobs in 1ms to 8784h",
        ),
        (
            |policy| policy.terms.cooldown_ms = 9_000 * 3_600_000,
            "(`--cooldown`) of 9000h is not possible: give 8784h at the most",
        ),
        (
            |policy| policy.terms.min_gain = f64::NAN,
            "(`--min-gain`) must be a number",
        ),
        (
            |policy| policy.terms.gate = Stage::Archived,
            "the gate is candidate",
        ),
        (
            |policy| policy.terms.metric = Some(String::new()),
            "1 to 64 bytes",
        ),
        (
            |policy| policy.job.idempotency_key = Some("k".into()),
            "no secrets",
        ),
    ];
    for (change, expected) in cases {
        let mut policy = world.policy(Mode::Auto, terms());
        change(&mut policy);
        let error = world.set_policy(policy).unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
}

#[test]
fn an_endpoint_that_goes_takes_its_retrainings_and_their_job_with_it() {
    let mut world = World::new(Mode::Auto);
    world.drift();
    world.settle();
    let job = world.newest().job.unwrap();
    world.delete_endpoint();
    world.settle();
    assert!(!world.runs(job));
    assert_eq!(history(&world.tables, "digits"), []);
    assert_eq!(ledgers(&world.tables), []);
    assert_eq!(find_policy_row(&world.tables, "digits"), None);
}

#[test]
fn what_an_endpoint_has_seen_is_nothing_to_a_later_one_of_its_name() {
    let mut world = World::new(Mode::Auto);
    world.drift();
    world.settle();
    world.delete_endpoint();
    world.settle();
    let jobs = world.job_count();
    world.deploy();
    let policy = world.policy(Mode::Auto, terms());
    world.set_policy(policy).unwrap();
    world.settle();
    assert_eq!(world.job_count(), jobs);
    // Its own drift is the first of its events.
    world.drift();
    world.settle();
    assert_eq!(world.newest().event, 1);
    assert_eq!(world.job_count(), jobs + 1);
}

#[test]
fn a_version_whose_model_comes_to_need_signatures_while_it_waits_is_not_tried_without() {
    let mut world = World::new(Mode::Auto);
    world.drift();
    world.settle();
    // Something else is under way when the version is there.
    world.register(new_version('7'));
    world.start_by_hand(2);
    world.end_job(world.newest().job.unwrap(), Some(0.95));
    world.settle();
    assert_eq!(world.newest().phase, Phase::Queued);
    world.need_signatures(2);
    world.judge(false);
    world.clean();
    world.settle();
    assert_eq!(world.newest().phase, Phase::Queued);
    let waits = super::super::next::waits_for(&world.tables, &world.newest()).unwrap();
    assert!(waits.contains("waits for a signature"), "{waits}");
}

#[test]
fn a_job_that_is_refused_for_too_long_fails_the_retraining() {
    let mut world = World::new(Mode::Auto);
    let mut policy = world.policy(Mode::Auto, terms());
    policy.job.name = "x".repeat(5_000);
    world.set_policy(policy).unwrap();
    world.drift();
    world.settle();
    assert_eq!(world.newest().phase, Phase::Submitting);
    world.pass(6 * 60_000);
    world.settle();
    assert_eq!(world.newest().phase, Phase::Failed);
    assert!(last_reason(&world.newest()).contains("could not be submitted within 300 s"));
}
