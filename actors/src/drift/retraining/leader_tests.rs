//! A leader that dies in each transition of a retraining, on every way from drift to an end: each entry of the log is the last one
//! of its leader, and the next one begins with all that its predecessors left on the way, again.

use std::collections::BTreeSet;

use super::command::Command;
use super::invariants_tests::{Course, PHASES};
use super::next::SUBMIT_MS_MAX;
use super::plan::{Mode, Phase, Retraining, Terms};
use super::state::tests::{new_version, terms};
use super::tables::history;
use super::world::World;
use crate::registry::stages::Stage;

/// Leaders on a way: more than any needs.
const LEADERS_MAX: usize = 40;

/// A way from drift to an end.
struct Way {
    what: &'static str,
    mode: Mode,
    terms: fn() -> Terms,
    /// What else happens when a phase is entered.
    beside: fn(&mut World, &Retraining),
    /// The phases of the last retraining.
    phases: &'static [Phase],
    /// How many retrainings there are in the end.
    retrainings: usize,
}

fn endpoint() -> String {
    "digits".to_owned()
}

fn retrain(world: &mut World) {
    let endpoint = endpoint();
    world.retraining(Command::Retrain { endpoint }).unwrap();
}

fn cancel(world: &mut World) {
    let (endpoint, reason) = (endpoint(), String::new());
    world
        .retraining(Command::Cancel { endpoint, reason })
        .unwrap();
}

/// The job of a retraining registers a better version.
fn train(world: &mut World, row: &Retraining) {
    world.end_job(row.job.unwrap(), Some(0.95));
}

fn signed_terms() -> Terms {
    Terms {
        gate: Stage::Staging,
        ..terms()
    }
}

const WAYS: [Way; 16] = [
    Way {
        what: "a better version",
        mode: Mode::Auto,
        terms,
        beside: |world, row| match row.phase {
            Phase::Training => train(world, row),
            Phase::Canary => world.judge(true),
            _ => {}
        },
        phases: &[
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::Queued,
            Phase::Canary,
            Phase::Promoted,
        ],
        retrainings: 1,
    },
    Way {
        what: "a suggestion that a client takes up, and a version that fails on requests",
        mode: Mode::Suggest,
        terms,
        beside: |world, row| match row.phase {
            Phase::Suggested => retrain(world),
            Phase::Training => train(world, row),
            Phase::Canary => world.judge(false),
            _ => {}
        },
        phases: &[
            Phase::Suggested,
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::Queued,
            Phase::Canary,
            Phase::RolledBack,
        ],
        retrainings: 1,
    },
    Way {
        what: "a suggestion that a client ends",
        mode: Mode::Suggest,
        terms,
        beside: |world, row| {
            if row.phase == Phase::Suggested {
                cancel(world);
            }
        },
        phases: &[Phase::Suggested, Phase::Cancelled],
        retrainings: 1,
    },
    Way {
        what: "a policy that is removed before there is a job",
        mode: Mode::Auto,
        terms,
        beside: |world, row| {
            if row.phase == Phase::Submitting {
                let endpoint = endpoint();
                world
                    .retraining(Command::RemovePolicy { endpoint })
                    .unwrap();
            }
        },
        phases: &[Phase::Submitting, Phase::Cancelled],
        retrainings: 1,
    },
    Way {
        what: "a job that nobody submits",
        mode: Mode::Auto,
        terms,
        beside: |world, row| {
            if row.phase == Phase::Submitting {
                world.pass(SUBMIT_MS_MAX);
            }
        },
        phases: &[Phase::Submitting, Phase::Failed],
        retrainings: 1,
    },
    Way {
        what: "a job that fails",
        mode: Mode::Auto,
        terms,
        beside: |world, row| {
            if row.phase == Phase::Training {
                world.fail_job(row.job.unwrap(), "no luck");
            }
        },
        phases: &[Phase::Submitting, Phase::Training, Phase::Failed],
        retrainings: 1,
    },
    Way {
        what: "a job that a client ends",
        mode: Mode::Auto,
        terms,
        beside: |world, row| {
            if row.phase == Phase::Training {
                cancel(world);
            }
        },
        phases: &[Phase::Submitting, Phase::Training, Phase::Cancelled],
        retrainings: 1,
    },
    Way {
        what: "a version that is no better",
        mode: Mode::Auto,
        terms,
        beside: |world, row| {
            if row.phase == Phase::Training {
                world.end_job(row.job.unwrap(), Some(0.8));
            }
        },
        phases: &[
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::NotBetter,
        ],
        retrainings: 1,
    },
    Way {
        what: "a version that cannot be compared",
        mode: Mode::Auto,
        terms: || Terms {
            metric: Some("f1".to_owned()),
            ..terms()
        },
        beside: |world, row| {
            if row.phase == Phase::Training {
                train(world, row);
            }
        },
        phases: &[
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::Failed,
        ],
        retrainings: 1,
    },
    Way {
        what: "another version that becomes active meanwhile",
        mode: Mode::Auto,
        terms,
        beside: |world, row| {
            if row.phase == Phase::Training {
                let other = world.register(new_version('7'));
                world.promote_by_hand(other);
                train(world, row);
            }
        },
        phases: &[
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::Cancelled,
        ],
        retrainings: 1,
    },
    Way {
        what: "a version that is signed",
        mode: Mode::Auto,
        terms: signed_terms,
        beside: |world, row| match row.phase {
            Phase::Training => train(world, row),
            Phase::Gate => world.sign(row.candidate.unwrap()),
            Phase::Canary => world.judge(true),
            _ => {}
        },
        phases: &[
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::Gate,
            Phase::Queued,
            Phase::Canary,
            Phase::Promoted,
        ],
        retrainings: 1,
    },
    Way {
        what: "a version that is refused at the gate",
        mode: Mode::Auto,
        terms: signed_terms,
        beside: |world, row| match row.phase {
            Phase::Training => train(world, row),
            Phase::Gate => world.archive(row.candidate.unwrap()),
            _ => {}
        },
        phases: &[
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::Gate,
            Phase::Cancelled,
        ],
        retrainings: 1,
    },
    Way {
        what: "a version that is archived while it waits for another rollout",
        mode: Mode::Auto,
        terms,
        beside: |world, row| match row.phase {
            Phase::Training => {
                let other = world.register(new_version('7'));
                world.start_by_hand(other);
                train(world, row);
            }
            Phase::Queued => {
                world.archive(row.candidate.unwrap());
                world.judge(false);
                world.clean();
            }
            _ => {}
        },
        phases: &[
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::Queued,
            Phase::Cancelled,
        ],
        retrainings: 1,
    },
    Way {
        what: "a version that the policies forbid to serve",
        mode: Mode::Auto,
        terms,
        beside: |world, row| {
            if row.phase == Phase::Training {
                world.label_data("pii");
                train(world, row);
            }
        },
        phases: &[
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::Queued,
            Phase::Failed,
        ],
        retrainings: 1,
    },
    Way {
        what: "a budget that is spent while the drift goes on",
        mode: Mode::Auto,
        terms,
        beside: |world, row| match row.phase {
            Phase::Training => world.fail_job(row.job.unwrap(), "no luck"),
            Phase::Failed => {
                world.drift();
                world.pass(row.terms.cooldown_ms);
            }
            _ => {}
        },
        phases: &[Phase::BudgetSpent],
        retrainings: 3,
    },
    Way {
        what: "drift that goes on after a version that was no better",
        mode: Mode::Auto,
        terms,
        beside: |world, row| match (row.number, row.phase) {
            (1, Phase::Training) => world.end_job(row.job.unwrap(), Some(0.8)),
            (_, Phase::Training) => train(world, row),
            (_, Phase::NotBetter) => {
                world.drift();
                world.pass(row.terms.cooldown_ms);
            }
            (_, Phase::Canary) => world.judge(true),
            _ => {}
        },
        phases: &[
            Phase::Submitting,
            Phase::Training,
            Phase::Evaluating,
            Phase::Queued,
            Phase::Canary,
            Phase::Promoted,
        ],
        retrainings: 2,
    },
];

/// The tables at the end of a way.
fn walk(way: &Way) -> World {
    let mut course = Course {
        world: World::with(way.mode, (way.terms)()),
        in_flight: Vec::new(),
    };
    course.world.drift();
    let mut entered = None;
    for _ in 0..LEADERS_MAX {
        if let Some(first) = course.world.proposals().into_iter().next() {
            course.enter(&first).unwrap();
            course.in_flight.push(first);
        }
        // The successor is told all that its predecessors ever said, again.
        for old in course.in_flight.clone() {
            course.enter(&old).unwrap();
        }
        let row = course.world.newest();
        if entered.replace((row.number, row.phase)) != Some((row.number, row.phase)) {
            (way.beside)(&mut course.world, &row);
        }
    }
    course.world
}

#[test]
fn a_leader_that_dies_in_every_transition_changes_nothing_twice() {
    let mut met = BTreeSet::new();
    for way in &WAYS {
        let what = way.what;
        let world = walk(way);
        let rows = history(&world.tables, "digits");
        assert_eq!(rows.len(), way.retrainings, "{what}");
        // An entry that says the same again changes nothing, so no phase is missed and none comes twice.
        let phases: Vec<Phase> = world.newest().steps.iter().map(|step| step.phase).collect();
        assert_eq!(phases, way.phases, "{what}");
        let steps = || rows.iter().flat_map(|row| &row.steps);
        met.extend(steps().map(|step| step.phase.as_str()));
        assert_eq!(world.retraining_events().len(), steps().count(), "{what}");
        let submitted = steps().filter(|step| step.phase == Phase::Training);
        assert_eq!(world.job_count(), submitted.count(), "{what}");
        if phases.last() == Some(&Phase::Promoted) {
            assert_eq!(Some(world.active()), world.newest().candidate, "{what}");
        }
    }
    assert_eq!(met, BTreeSet::from(PHASES.map(Phase::as_str)));
}
