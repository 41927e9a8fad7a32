use mobula_core::codec;
use mobula_core::control::Caller;
use mobula_core::id::JobId;
use proptest::prelude::{Just, ProptestConfig, prop_assert, prop_assert_eq, prop_oneof, proptest};
use proptest::strategy::Strategy as _;

use super::super::command::is_allowed;
use super::super::plan::{Guardrails, Strategy};
use super::*;
use crate::serving::state::Command as ServingCommand;
use crate::serving::test_tables::TestTables;

const VERSIONS: u64 = 3;

/// Tables with an endpoint `digits` of the first of some versions, heard of by router 900.
struct Head {
    applied: TestTables,
}

const ROUTER: Incarnation = Incarnation(900);

impl Head {
    fn new() -> Self {
        let mut head = Head {
            applied: TestTables::with_versions(VERSIONS),
        };
        head.applied.serve("digits", ROUTER);
        head
    }

    fn serving(&mut self, command: &ServingCommand) -> Result<Vec<u8>, Rejection> {
        self.applied.serving(command)
    }

    fn router(&mut self, incarnation: Incarnation) -> Result<Vec<u8>, Rejection> {
        self.serving(&ServingCommand::RouterReady {
            endpoint: "digits".into(),
            incarnation,
            http_address: "127.0.0.1:1".into(),
        })
    }

    fn rollout(&mut self, command: Command) -> Result<Rollout, Rejection> {
        let answer = self.serving(&ServingCommand::Rollout(command))?;
        Ok(codec::decode(&answer, 1 << 20).unwrap())
    }

    fn start(&mut self, version: u64) -> Result<Rollout, Rejection> {
        self.rollout(start(version))
    }

    fn judge(&mut self, verdict: Verdict) -> Result<Rollout, Rejection> {
        let rollout = newest(&self.applied.tables, "digits").unwrap();
        self.rollout(judgement(rollout.number, rollout.step, ROUTER, verdict))
    }

    /// Everything that the loser of the last rollout leaves is taken away.
    fn clean(&mut self) {
        let last = newest(&self.applied.tables, "digits").unwrap();
        self.rollout(drained(&last, ROUTER)).unwrap();
        self.rollout(retired(&last)).unwrap();
    }

    fn active(&self) -> u64 {
        find_endpoint(&self.applied.tables, "digits")
            .unwrap()
            .version
    }
}

fn start(version: u64) -> Command {
    Command::Start {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: Some(version),
        strategy: Strategy::Canary,
        steps: vec![5, 50, 100],
        guardrails: Guardrails::STANDARD,
        min_samples: 10,
    }
}

fn evidence() -> Evidence {
    Evidence {
        reason: "10 requests within the guardrails".into(),
        ..Evidence::default()
    }
}

fn judgement(rollout: u64, step: u32, router: Incarnation, verdict: Verdict) -> Command {
    Command::Judge {
        endpoint: "digits".into(),
        rollout,
        step,
        router,
        verdict,
        evidence: evidence(),
    }
}

fn drained(rollout: &Rollout, router: Incarnation) -> Command {
    Command::Drained {
        endpoint: "digits".into(),
        rollout: rollout.number,
        revision: rollout.revision,
        router,
    }
}

fn retired(rollout: &Rollout) -> Command {
    Command::Retired {
        endpoint: "digits".into(),
        rollout: rollout.number,
        revision: rollout.revision,
    }
}

fn named(action: Action) -> Command {
    let endpoint = "digits".to_owned();
    match action {
        Action::Pause => Command::Pause { endpoint },
        Action::Resume => Command::Resume { endpoint },
        Action::Promote => Command::Promote { endpoint },
        Action::Abort => Command::Abort { endpoint },
        _ => Command::RollBack { endpoint },
    }
}

#[test]
fn a_candidate_that_passes_every_step_becomes_the_endpoint_s_version_in_one_entry() {
    let mut head = Head::new();
    let begun = head.start(2).unwrap();
    assert_eq!((begun.number, begun.weight_percent()), (1, 5));
    let next = head.judge(Verdict::Pass).unwrap();
    assert_eq!(
        (next.step, next.weight_percent(), head.active()),
        (1, 50, 1)
    );
    let last = head.judge(Verdict::Pass).unwrap();
    assert_eq!(last.phase, Phase::Promoted);
    let endpoint = find_endpoint(&head.applied.tables, "digits").unwrap();
    assert_eq!((endpoint.version, endpoint.size_bytes), (2, 12));
    assert_eq!(endpoint.digest, "2".repeat(64));
    let actions: Vec<Action> = last
        .decisions
        .iter()
        .map(|decision| decision.action)
        .collect();
    assert_eq!(actions, [Action::Start, Action::Pass, Action::Promote]);
    assert_eq!(last.decisions[2].evidence, Some(evidence()));
    // What was tried is what serves, so the next rollout goes on from there.
    head.clean();
    assert_eq!(head.start(3).unwrap().stable.version, 2);
}

#[test]
fn a_violated_guardrail_returns_everything_and_keeps_the_evidence() {
    let mut head = Head::new();
    head.start(2).unwrap();
    head.judge(Verdict::Pass).unwrap();
    let last = head.judge(Verdict::RollBack).unwrap();
    assert_eq!((last.phase, last.weight_percent()), (Phase::RolledBack, 0));
    assert_eq!((head.active(), last.retiring().unwrap().version), (1, 2));
    assert_eq!(last.decisions.last().unwrap().evidence, Some(evidence()));
    assert!(head.judge(Verdict::Pass).is_err());
}

#[test]
fn a_promotion_can_be_taken_back_until_the_next_rollout() {
    let mut head = Head::new();
    head.start(2).unwrap();
    let promoted = head.rollout(named(Action::Promote)).unwrap();
    assert_eq!(head.active(), 2);
    let back = head.rollout(named(Action::RollBack)).unwrap();
    assert_eq!((head.active(), back.retiring().unwrap().version), (1, 2));
    // A word about the promotion is none about the rollback.
    let error = head.rollout(drained(&promoted, ROUTER)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Fenced);
    let error = head.start(3).unwrap_err();
    assert!(error.message.contains("being taken down"), "{error}");
    head.clean();
    head.start(3).unwrap();
}

#[test]
fn only_the_newest_router_judges_and_only_the_step_that_it_saw() {
    let mut head = Head::new();
    head.start(2).unwrap();
    let newer = Incarnation(901);
    head.router(newer).unwrap();
    for (rollout, step, router) in [(1, 0, ROUTER), (1, 1, newer), (2, 0, newer)] {
        let error = head
            .rollout(judgement(rollout, step, router, Verdict::RollBack))
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::Fenced, "{error}");
    }
    head.rollout(judgement(1, 0, newer, Verdict::Pass)).unwrap();
    // The same word once more is about a step that is over.
    let again = head.rollout(judgement(1, 0, newer, Verdict::Pass));
    assert_eq!(again.unwrap_err().code, ErrorCode::Fenced);
}

#[test]
fn a_paused_rollout_passes_no_step_and_is_still_rolled_back() {
    let mut head = Head::new();
    head.start(2).unwrap();
    head.rollout(named(Action::Pause)).unwrap();
    let error = head.judge(Verdict::Pass).unwrap_err();
    assert!(error.message.contains("is paused"), "{error}");
    head.rollout(named(Action::Resume)).unwrap();
    head.rollout(named(Action::Pause)).unwrap();
    assert_eq!(
        head.judge(Verdict::RollBack).unwrap().phase,
        Phase::RolledBack
    );
    let error = head.rollout(named(Action::Resume)).unwrap_err();
    assert!(
        error
            .message
            .contains("is rolled back, so there is nothing to resume"),
        "{error}"
    );
}

#[test]
fn what_cannot_be_rolled_out_is_refused_with_the_reason() {
    let mut head = Head::new();
    let error = head.rollout(named(Action::Pause)).unwrap_err();
    assert!(
        error.message.contains("mobula rollout start digits digits"),
        "{error}"
    );
    let with = |change: fn(&mut Command)| {
        let mut command = start(2);
        change(&mut command);
        command
    };
    let cases: [(Command, &str); 9] = [
        (
            with(|command| {
                if let Command::Start { model, .. } = command {
                    *model = "faces".into();
                }
            }),
            "serves digits, not faces",
        ),
        (start(1), "serves digits:1 already"),
        (start(9), "has no version 9"),
        (
            with(|command| {
                if let Command::Start { steps, .. } = command {
                    *steps = vec![5, 5, 100];
                }
            }),
            "steps `5,5,100` are not possible (`--steps`)",
        ),
        (
            with(|command| {
                if let Command::Start { steps, .. } = command {
                    *steps = vec![5, 50];
                }
            }),
            "the last is 100",
        ),
        (
            with(|command| {
                if let Command::Start { min_samples, .. } = command {
                    *min_samples = 0;
                }
            }),
            "0 samples a step are not possible (`--min-samples`)",
        ),
        (
            with(|command| {
                if let Command::Start { guardrails, .. } = command {
                    guardrails.false_rollback_max_bp = 0;
                }
            }),
            "guardrails are out of range: 0 basis points as a chance of a false rollback; give 1 to 5000",
        ),
        (
            with(|command| {
                if let Command::Start { guardrails, .. } = command {
                    guardrails.error_increase_max_bp = 10_001;
                }
            }),
            "10001 basis points as an increase of errors (`--max-error-increase-bp`); give 0 to 10000",
        ),
        (
            with(|command| {
                if let Command::Start { guardrails, .. } = command {
                    guardrails.latency_increase_max_percent = 100_001;
                }
            }),
            "100001 percent as an increase of latency (`--max-latency-increase`); give 0 to 100000",
        ),
    ];
    for (command, expected) in cases {
        let error = head.rollout(command).unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
    head.start(2).unwrap();
    let error = head.start(3).unwrap_err();
    assert!(
        error.message.contains("mobula rollout abort digits"),
        "{error}"
    );
    let endless = Command::Judge {
        endpoint: "digits".into(),
        rollout: 1,
        step: 0,
        router: ROUTER,
        verdict: Verdict::RollBack,
        evidence: Evidence {
            reason: "x".repeat(1_000),
            ..Evidence::default()
        },
    };
    assert!(
        head.rollout(endless)
            .unwrap_err()
            .message
            .contains("too long a text")
    );
}

#[test]
fn who_may_do_what() {
    let host = |job| Caller::Host {
        job: JobId(job),
        node: mobula_core::id::NodeId(1),
    };
    let judge = judgement(1, 0, ROUTER, Verdict::Pass);
    assert!(is_allowed(&Caller::Client, &start(2)) && is_allowed(&host(0), &judge));
    assert!(!is_allowed(&host(0), &start(2)) && !is_allowed(&host(4), &judge));
    assert!(!is_allowed(&Caller::Client, &judge));
}

#[test]
fn history_is_bounded_and_goes_with_its_endpoint() {
    let mut head = Head::new();
    for number in 1..=HISTORY_MAX as u64 + 3 {
        assert_eq!(head.start(2).unwrap().number, number);
        for _ in 0..80 {
            head.rollout(named(Action::Pause)).unwrap();
            head.rollout(named(Action::Resume)).unwrap();
        }
        head.rollout(named(Action::Abort)).unwrap();
        head.clean();
    }
    let kept = history(&head.applied.tables, "digits");
    assert_eq!((kept.len(), kept[0].number), (HISTORY_MAX, 4));
    assert!(kept.iter().all(|rollout| rollout.decisions.len() == 64));
    let endpoint = "digits".to_owned();
    head.serving(&ServingCommand::Delete {
        endpoint: endpoint.clone(),
    })
    .unwrap();
    assert!(
        head.start(3)
            .unwrap_err()
            .message
            .contains("being taken down")
    );
    head.serving(&ServingCommand::Gone { endpoint }).unwrap();
    assert_eq!(history(&head.applied.tables, "digits"), []);
    assert_eq!(newest(&head.applied.tables, "digits"), None);
}

fn any_command() -> impl proptest::strategy::Strategy<Value = Command> {
    let router = prop_oneof![4 => Just(ROUTER), 1 => Just(Incarnation(7))];
    let verdict = prop_oneof![3 => Just(Verdict::Pass), 1 => Just(Verdict::RollBack)];
    let action = prop_oneof![
        Just(Action::Pause),
        Just(Action::Resume),
        Just(Action::Promote),
        Just(Action::Abort),
        Just(Action::RollBack),
    ];
    prop_oneof![
        3 => (1..=VERSIONS).prop_map(start),
        4 => (1..6u64, 0..3u32, router.clone(), verdict)
            .prop_map(|(rollout, step, router, verdict)| judgement(rollout, step, router, verdict)),
        3 => action.prop_map(named),
        3 => (1..6u64, 5..60u64, router).prop_map(|(rollout, revision, router)| Command::Drained {
            endpoint: "digits".into(),
            rollout,
            revision,
            router,
        }),
        2 => (1..6u64, 5..60u64).prop_map(|(rollout, revision)| Command::Retired {
            endpoint: "digits".into(),
            rollout,
            revision,
        }),
    ]
}

/// A command, or a word about the newest rollout as it is: random numbers alone seldom hit.
#[derive(Debug, Clone)]
enum Step {
    Any(Box<Command>),
    Judge(Verdict),
    Clean,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever is said in whatever order: one active version, one open rollout, no way back from an
    /// end, and no change of version but by a promotion or by taking one back.
    #[test]
    fn the_invariants_hold_at_every_log_index(
        steps in proptest::collection::vec(
            prop_oneof![
                2 => any_command().prop_map(|command| Step::Any(Box::new(command))),
                2 => Just(Step::Judge(Verdict::Pass)),
                1 => Just(Step::Judge(Verdict::RollBack)),
                1 => Just(Step::Clean),
            ],
            1..80,
        )
    ) {
        let mut head = Head::new();
        for step in steps {
            let (before, active) = (history(&head.applied.tables, "digits"), head.active());
            let result = match step {
                Step::Any(command) => head.rollout(*command),
                Step::Judge(verdict) if !before.is_empty() => head.judge(verdict),
                Step::Clean if before.last().is_some_and(|last| !last.phase.is_open()) => {
                    head.clean();
                    continue;
                }
                Step::Judge(_) | Step::Clean => continue,
            };
            let (after, now) = (history(&head.applied.tables, "digits"), head.active());
            if result.is_err() {
                prop_assert_eq!(&before, &after);
                prop_assert_eq!(active, now);
            }
            let (ended, last) = after.split_at(after.len().saturating_sub(1));
            prop_assert!(ended.iter().all(|rollout| rollout.cleanup == Cleanup::Done));
            prop_assert!(after.len() <= HISTORY_MAX);
            prop_assert_eq!(last.first().cloned(), newest(&head.applied.tables, "digits"));
            let Some(last) = last.first() else { continue };
            let expected = match last.phase {
                Phase::Promoted => last.candidate.version,
                _ => last.stable.version,
            };
            prop_assert_eq!(now, expected);
            prop_assert!((last.step as usize) < last.steps.len() - 1);
            prop_assert_eq!(last.phase.is_open(), last.cleanup == Cleanup::Waiting);
            let previous = before.iter().find(|rollout| rollout.number == last.number);
            let Some(previous) = previous else {
                prop_assert_eq!(active, now);
                continue;
            };
            prop_assert!(previous.step <= last.step && last.step <= previous.step + 1);
            let may_follow = match previous.phase {
                Phase::Running | Phase::Paused => true,
                Phase::Promoted => matches!(last.phase, Phase::Promoted | Phase::RolledBack),
                ended => last.phase == ended,
            };
            prop_assert!(may_follow, "{:?} after {:?}", last.phase, previous.phase);
        }
    }
}
