//! Whatever happens in whatever order, with a leader that dies between any two entries of the log: one active
//! version, one retraining, and each step of it once.

use std::cell::RefCell;
use std::collections::BTreeSet;

use mobula_core::control::Proposal;
use proptest::prelude::{Just, ProptestConfig, Strategy, prop_assert, prop_assert_eq, prop_oneof};
use proptest::test_runner::{RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::command::Command;
use super::plan::{Mode, Phase, Retraining, Terms};
use super::state::tests::terms;
use super::tables::history;
use super::world::{BUDGET, World};
use crate::registry::stages::Stage;
use crate::registry::state::find as find_version;
use crate::serving::rollout::command::Command as RolloutCommand;
use crate::serving::rollout::plan::{Phase as RolloutPhase, Rollout};
use crate::serving::rollout::state as rollouts;
use crate::serving::state::endpoints;

/// What happens next.
#[derive(Debug, Clone)]
enum Happening {
    /// The leader looks, and all that it proposes is applied.
    Lead,
    /// It dies after so many of its proposals are in the log. The others are on their way, or lost.
    LeaderDies {
        applied: usize,
        others_are_lost: bool,
    },
    /// One of the proposals that were on their way arrives after all, and perhaps not for the last time.
    Arrives {
        which: usize,
        again: bool,
    },
    Drift,
    Quiet,
    /// The retraining's job ends: well with this accuracy, without a version, or badly.
    JobEnds(Option<Option<f64>>),
    Judged(bool),
    Cleaned,
    TimePasses(u64),
    Signed,
    Asked(Asked),
    /// Somebody who has no say sends a command with made up numbers.
    Stray {
        number: u64,
        revision: u64,
        event: u64,
    },
}

/// What people ask for.
#[derive(Debug, Clone, Copy)]
enum Asked {
    Retrain,
    Cancel,
    Promote,
    Abort,
    RollBack,
    StartAnother,
    Policy(Mode, Stage),
    NoPolicy,
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![3 => Just(Mode::Auto), 1 => Just(Mode::Suggest)]
}

fn gate() -> impl Strategy<Value = Stage> {
    prop_oneof![3 => Just(Stage::Candidate), 1 => Just(Stage::Staging)]
}

fn happenings() -> impl Strategy<Value = Happening> {
    let asked = prop_oneof![
        2 => Just(Asked::Retrain),
        1 => Just(Asked::Cancel),
        1 => Just(Asked::Promote),
        1 => Just(Asked::Abort),
        1 => Just(Asked::RollBack),
        1 => Just(Asked::StartAnother),
        1 => (mode(), gate()).prop_map(|(mode, gate)| Asked::Policy(mode, gate)),
        1 => Just(Asked::NoPolicy),
    ];
    let accuracy = prop_oneof![3 => Just(0.95), 1 => Just(0.8)];
    let job = prop_oneof![
        4 => accuracy.prop_map(|accuracy| Some(Some(accuracy))),
        1 => Just(Some(None)),
        1 => Just(None),
    ];
    prop_oneof![
        10 => Just(Happening::Lead),
        8 => (0..2usize, proptest::bool::ANY)
            .prop_map(|(applied, others_are_lost)| Happening::LeaderDies { applied, others_are_lost }),
        8 => (0..8usize, proptest::bool::ANY).prop_map(|(which, again)| Happening::Arrives { which, again }),
        5 => Just(Happening::Drift),
        2 => Just(Happening::Quiet),
        6 => job.prop_map(Happening::JobEnds),
        6 => proptest::bool::weighted(0.7).prop_map(Happening::Judged),
        4 => Just(Happening::Cleaned),
        4 => (1..5_000u64).prop_map(Happening::TimePasses),
        2 => Just(Happening::Signed),
        3 => asked.prop_map(Happening::Asked),
        2 => (0..4u64, 0..80u64, 0..4u64)
            .prop_map(|(number, revision, event)| Happening::Stray { number, revision, event }),
    ]
}

/// All phases there are.
pub(super) const PHASES: [Phase; 13] = [
    Phase::Suggested,
    Phase::Submitting,
    Phase::Training,
    Phase::Evaluating,
    Phase::Gate,
    Phase::Queued,
    Phase::Canary,
    Phase::Promoted,
    Phase::RolledBack,
    Phase::Failed,
    Phase::NotBetter,
    Phase::BudgetSpent,
    Phase::Cancelled,
];

/// A head with proposals of dead leaders on their way to it.
pub(super) struct Course {
    pub(super) world: World,
    pub(super) in_flight: Vec<Proposal>,
}

impl Course {
    /// Applies a proposal as the next entry, and checks what holds at every index.
    pub(super) fn enter(&mut self, proposal: &Proposal) -> Result<(), TestCaseError> {
        let before = Seen::of(&self.world);
        let _ = self.world.apply(proposal.module, &proposal.payload);
        check(&before, &Seen::of(&self.world))
    }

    fn happen(&mut self, what: &Happening) -> Result<(), TestCaseError> {
        let before = Seen::of(&self.world);
        let endpoint = "digits".to_owned();
        match what.clone() {
            Happening::Lead => {
                for proposal in self.world.proposals() {
                    self.enter(&proposal)?;
                }
                return Ok(());
            }
            Happening::LeaderDies {
                applied,
                others_are_lost,
            } => {
                for (number, proposal) in self.world.proposals().into_iter().enumerate() {
                    if number < applied {
                        self.enter(&proposal)?;
                    } else if !others_are_lost {
                        self.in_flight.push(proposal);
                    }
                }
                return Ok(());
            }
            Happening::Arrives { which, again } => {
                if self.in_flight.is_empty() {
                    return Ok(());
                }
                let which = which % self.in_flight.len();
                let proposal = self.in_flight[which].clone();
                if !again {
                    self.in_flight.swap_remove(which);
                }
                return self.enter(&proposal);
            }
            Happening::Drift => self.world.drift(),
            Happening::Quiet => self.world.quiet(),
            Happening::JobEnds(how) => {
                let job = before.newest().and_then(|row| row.job);
                match (job, how) {
                    (Some(job), Some(accuracy)) => self.world.end_job(job, accuracy),
                    (Some(job), None) => self.world.fail_job(job, "no luck"),
                    (None, _) => {}
                }
            }
            Happening::Judged(passes) => self.world.judge(passes),
            Happening::Cleaned => self.world.clean(),
            Happening::TimePasses(ms) => self.world.pass(ms),
            Happening::Signed => {
                if let Some(version) = before.newest().and_then(|row| row.candidate) {
                    self.world.sign(version);
                }
            }
            // People are refused what is not possible.
            Happening::Asked(asked) => {
                let _ = match asked {
                    Asked::Retrain => self.world.retraining(Command::Retrain { endpoint }),
                    Asked::Cancel => self.world.retraining(Command::Cancel {
                        endpoint,
                        reason: String::new(),
                    }),
                    Asked::Promote => self.world.rollout(RolloutCommand::Promote { endpoint }),
                    Asked::Abort => self.world.rollout(RolloutCommand::Abort { endpoint }),
                    Asked::RollBack => self.world.rollout(RolloutCommand::RollBack { endpoint }),
                    Asked::StartAnother => self.world.try_start_by_hand(2),
                    Asked::Policy(mode, gate) => {
                        let policy = self.world.policy(mode, Terms { gate, ..terms() });
                        self.world.set_policy(policy)
                    }
                    Asked::NoPolicy => self.world.retraining(Command::RemovePolicy { endpoint }),
                };
            }
            Happening::Stray {
                number,
                revision,
                event,
            } => {
                let _ = self.world.retraining(Command::Advance {
                    endpoint: endpoint.clone(),
                    number,
                    revision,
                });
                check(&before, &Seen::of(&self.world))?;
                let _ = self.world.retraining(Command::Begin {
                    endpoint: endpoint.clone(),
                    event,
                });
                check(&before, &Seen::of(&self.world))?;
                let _ = self.world.retraining(Command::Forget { endpoint });
            }
        }
        check(&before, &Seen::of(&self.world))
    }
}

/// What of the tables the invariants are about.
struct Seen {
    active: Vec<u64>,
    newest_version: u64,
    rollouts: Vec<Rollout>,
    retrainings: Vec<Retraining>,
    jobs: usize,
}

impl Seen {
    fn of(world: &World) -> Self {
        Seen {
            active: endpoints(&world.tables)
                .iter()
                .map(|row| row.version)
                .collect(),
            newest_version: find_version(&world.tables, "digits", None).unwrap().version,
            rollouts: rollouts::history(&world.tables, "digits"),
            retrainings: history(&world.tables, "digits"),
            jobs: world.job_count(),
        }
    }

    fn newest(&self) -> Option<&Retraining> {
        self.retrainings.last()
    }
}

/// Phases in the order that a retraining goes through them.
fn rank(phase: Phase) -> u8 {
    match phase {
        Phase::Suggested => 0,
        Phase::Submitting => 1,
        Phase::Training => 2,
        Phase::Evaluating => 3,
        Phase::Gate => 4,
        Phase::Queued => 5,
        Phase::Canary => 6,
        _ => 7,
    }
}

fn check(before: &Seen, after: &Seen) -> Result<(), TestCaseError> {
    // One active version, which exists; another one only by a rollout that says so.
    prop_assert_eq!(after.active.len(), 1);
    let active = after.active[0];
    prop_assert!((1..=after.newest_version).contains(&active));
    let by_rollout = after.rollouts.last().map_or(1, |last| match last.phase {
        RolloutPhase::Promoted => last.candidate.version,
        _ => last.stable.version,
    });
    prop_assert_eq!(active, by_rollout);
    let open_rollouts = after
        .rollouts
        .iter()
        .filter(|rollout| rollout.phase.is_open());
    prop_assert!(open_rollouts.count() <= 1);

    // One retraining, the newest; what is over stays as it was.
    let (older, newest) = after
        .retrainings
        .split_at(after.retrainings.len().saturating_sub(1));
    prop_assert!(older.iter().all(|row| !row.phase.is_open()));
    for row in before.retrainings.iter().filter(|row| !row.phase.is_open()) {
        prop_assert!(after.retrainings.contains(row), "{:?} has changed", row);
    }
    prop_assert!(after.retrainings.len() <= before.retrainings.len() + 1);

    // Each step once, in order, by an entry of its own.
    for row in &after.retrainings {
        let in_order = row
            .steps
            .is_sorted_by(|one, next| rank(one.phase) < rank(next.phase) && one.index < next.index);
        prop_assert!(in_order, "{:?}", row.steps);
        let last = row.steps.last().unwrap();
        prop_assert_eq!((last.phase, last.index), (row.phase, row.revision));
        prop_assert_eq!(
            row.rollout.is_some(),
            row.steps.iter().any(|s| s.phase == Phase::Canary)
        );
    }
    for row in newest {
        let old = before
            .retrainings
            .iter()
            .find(|old| old.number == row.number);
        let taken = old.map_or(0, |old| old.steps.len());
        prop_assert!(row.steps.len() <= taken + 1);
        prop_assert!(row.steps[..taken] == old.map_or(&[][..], |old| &old.steps[..])[..]);
    }

    // No job but for a retraining, one for each; no rollout for two of them.
    let submitted = |rows: &[Retraining]| {
        rows.iter()
            .filter(|row| row.steps.iter().any(|step| step.phase == Phase::Submitting))
            .count()
    };
    prop_assert!(after.jobs <= submitted(&after.retrainings));
    for one in &after.retrainings {
        for other in after
            .retrainings
            .iter()
            .filter(|other| other.number > one.number)
        {
            prop_assert!(one.job.is_none() || one.job != other.job);
            prop_assert!(one.rollout.is_none() || one.rollout != other.rollout);
            prop_assert!(one.began_index < other.began_index);
        }
    }

    // Never more jobs in the budget's time than it allows; nothing begins by itself in the cooldown.
    let times: Vec<u64> = after
        .retrainings
        .iter()
        .flat_map(|row| &row.steps)
        .filter(|step| step.phase == Phase::Submitting)
        .map(|step| step.at_ms)
        .collect();
    for (index, at) in times.iter().enumerate() {
        let within = times[..=index]
            .iter()
            .filter(|other| **other > at.saturating_sub(BUDGET.period_ms));
        prop_assert!(within.count() <= BUDGET.jobs as usize, "{:?}", times);
    }
    for pair in after.retrainings.windows(2) {
        let first = &pair[1].steps[0];
        let earliest = pair[0].since_ms() + pair[0].terms.cooldown_ms;
        prop_assert!(first.reason.contains("a client asked") || first.at_ms >= earliest);
    }
    Ok(())
}

/// What the histories below are made of: a run that fails can be repeated. It is printed with the failure.
const SEED: [u8; 32] = *b"one active version at each index";

/// Histories, of [`HAPPENINGS_MAX`] happenings at the most.
const HISTORIES: u32 = 128;

const HAPPENINGS_MAX: usize = 150;

#[test]
fn one_version_is_active_at_every_index_whenever_a_leader_dies() {
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(HISTORIES)
    };
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &SEED);
    let histories = (
        mode(),
        gate(),
        proptest::collection::vec(happenings(), 1..HAPPENINGS_MAX),
    );
    let met = RefCell::new(BTreeSet::new());
    let outcome =
        TestRunner::new_with_rng(config, random).run(&histories, |(mode, gate, happenings)| {
            let terms = Terms { gate, ..terms() };
            let mut course = Course {
                world: World::with(mode, terms),
                in_flight: Vec::new(),
            };
            course.world.register(super::state::tests::new_version('f'));
            for what in &happenings {
                course.happen(what)?;
            }
            let rows = history(&course.world.tables, "digits");
            let phases = rows
                .iter()
                .flat_map(|row| &row.steps)
                .map(|step| step.phase);
            let phases: Vec<&str> = phases.map(Phase::as_str).collect();
            prop_assert_eq!(course.world.retraining_events().len(), phases.len());
            met.borrow_mut().extend(phases);
            Ok(())
        });
    if let Err(error) = outcome {
        panic!("seed {SEED:?}: {error}");
    }
    assert_eq!(met.into_inner(), BTreeSet::from(PHASES.map(Phase::as_str)));
}
