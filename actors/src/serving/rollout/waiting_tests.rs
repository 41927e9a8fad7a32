use mobula_core::codec;
use mobula_core::error::{ErrorCode, Rejection};

use super::super::command::{Command, Proposed, Verdict};
use super::super::plan::{Action, Guardrails, Phase, Progress, REPLICA_WAIT_MS, Strategy};
use super::super::state::{newest, progress_of};
use super::super::trial::{EVIDENCE_TEXT_BYTES_MAX, Evidence};
use super::*;
use crate::serving::state::Command as ServingCommand;
use crate::serving::test_tables::TestTables;

const ROUTER: Incarnation = Incarnation(900);
const NEXT: Incarnation = Incarnation(901);

/// Tables with an endpoint `digits` of the first of two versions, and a rollout of the second.
struct Head {
    applied: TestTables,
}

impl Head {
    fn new(replica_wait_max_ms: u64) -> Self {
        let mut head = Head {
            applied: TestTables::with_versions(2),
        };
        head.applied.serve("digits", ROUTER);
        let begin = Command::Begin(Proposed {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: Some(2),
            strategy: Strategy::Rolling,
            steps: vec![25, 50, 100],
            guardrails: Guardrails::STANDARD,
            min_samples: 10,
            shadow: None,
            replica_wait_max_ms,
        });
        head.say(begin).unwrap();
        head
    }

    fn router(&mut self, incarnation: Incarnation) {
        let ready = ServingCommand::RouterReady {
            endpoint: "digits".into(),
            incarnation,
            http_address: "127.0.0.1:1".into(),
        };
        self.applied.serving(&ready).unwrap();
    }

    fn say(&mut self, command: Command) -> Result<Rollout, Rejection> {
        let answer = self.applied.serving(&ServingCommand::Rollout(command))?;
        Ok(codec::decode(&answer, 1 << 20).unwrap())
    }

    /// A router says after so many milliseconds that the step waits.
    fn wait(
        &mut self,
        after_ms: u64,
        step: u32,
        router: Incarnation,
    ) -> Result<Rollout, Rejection> {
        // Time is the index of the command.
        self.applied.index += after_ms - 1;
        self.say(Command::Wait {
            endpoint: "digits".into(),
            rollout: 1,
            step,
            router,
            evidence: evidence("0 of 1 replicas answer"),
        })
    }

    /// The same, all the while as often as routers say so; what came of the last time.
    fn wait_on(
        &mut self,
        for_ms: u64,
        step: u32,
        router: Incarnation,
    ) -> Result<Rollout, Rejection> {
        let repeat_ms = REPEAT_INTERVAL.as_millis() as u64;
        let mut left_ms = for_ms;
        while left_ms > repeat_ms {
            self.wait(repeat_ms, step, router)?;
            left_ms -= repeat_ms;
        }
        self.wait(left_ms, step, router)
    }

    fn turn(&mut self, command: fn(String) -> Command) {
        self.say(command("digits".to_owned())).unwrap();
    }

    fn report(&mut self) {
        self.say(Command::Report {
            endpoint: "digits".into(),
            rollout: 1,
            step: 0,
            router: ROUTER,
            evidence: evidence("3 of 10 requests"),
        })
        .unwrap();
    }

    fn now(&self) -> Rollout {
        newest(&self.applied.tables, "digits").unwrap()
    }

    fn progress(&self) -> Progress {
        progress_of(&self.applied.tables, &self.now()).unwrap()
    }
}

fn evidence(reason: &str) -> Evidence {
    Evidence {
        reason: reason.to_owned(),
        ..Evidence::default()
    }
}

#[test]
fn a_step_without_replicas_says_so_and_is_rolled_back_after_the_limit() {
    let mut head = Head::new(60_000);
    head.wait(1, 0, ROUTER).unwrap();
    head.wait_on(59_999, 0, ROUTER).unwrap();
    assert_eq!(
        head.progress().evidence.reason,
        "waiting for 59 s of 60 s at the most: 0 of 1 replicas answer"
    );
    let over = head.wait(1, 0, ROUTER).unwrap();
    assert_eq!(over.phase, Phase::RolledBack);
    let last = over.decisions.last().unwrap();
    assert_eq!(last.action, Action::RollBack);
    assert_eq!(
        last.evidence.as_ref().unwrap().reason,
        "waited for replicas of the candidate for 60 s, and 60 s are the limit: 0 of 1 replicas answer"
    );
    // Nothing of the wait is left, nor goes on.
    assert_eq!(find(&head.applied.tables, &over), None);
    let late = head.wait(1, 0, ROUTER).unwrap_err();
    assert_eq!(late.code, ErrorCode::Fenced);
}

#[test]
fn a_wait_begins_anew_with_an_answer_another_router_and_the_next_step() {
    let mut head = Head::new(60_000);
    head.wait(1, 0, ROUTER).unwrap();
    head.report();
    assert_eq!(head.progress().evidence.reason, "3 of 10 requests");
    head.wait_on(60_000, 0, ROUTER).unwrap();
    // As after hours in which the cluster was down.
    head.router(NEXT);
    let stale = head.wait(1, 0, ROUTER).unwrap_err();
    assert_eq!(stale.code, ErrorCode::Fenced);
    head.wait(7_200_000, 0, NEXT).unwrap();
    head.wait_on(59_000, 0, NEXT).unwrap();
    head.say(Command::Judge {
        endpoint: "digits".into(),
        rollout: 1,
        step: 0,
        router: NEXT,
        verdict: Verdict::Pass,
        evidence: Evidence::default(),
    })
    .unwrap();
    head.wait(1, 1, NEXT).unwrap();
    head.wait_on(59_000, 1, NEXT).unwrap();
    assert_eq!((head.now().phase, head.now().step), (Phase::Running, 1));
    let over = head.wait(1_000, 1, NEXT).unwrap();
    assert_eq!(over.phase, Phase::RolledBack);
}

#[test]
fn a_wait_begins_anew_after_hours_in_which_nobody_could_be_heard() {
    let mut head = Head::new(3_600_000);
    head.wait(1, 0, ROUTER).unwrap();
    head.wait_on(300_000, 0, ROUTER).unwrap();
    // The heads have no quorum, so that no replica can be placed.
    let open = head.wait(7_200_000, 0, ROUTER).unwrap();
    assert_eq!(open.phase, Phase::Running);
    assert_eq!(
        head.progress().evidence.reason,
        "waiting for 0 s of 3600 s at the most: 0 of 1 replicas answer"
    );
    // A word or two that are lost are no such silence; one millisecond more is.
    head.wait(SILENCE_MAX_MS, 0, ROUTER).unwrap();
    let waits = find(&head.applied.tables, &head.now()).unwrap();
    assert_eq!(waits.last_ms - waits.since_ms, SILENCE_MAX_MS);
    head.wait(SILENCE_MAX_MS + 1, 0, ROUTER).unwrap();
    let waits = find(&head.applied.tables, &head.now()).unwrap();
    assert_eq!(waits.since_ms, waits.last_ms);
}

#[test]
fn a_paused_rollout_does_not_wait_and_one_that_is_resumed_waits_anew() {
    let mut head = Head::new(60_000);
    head.wait(1, 0, ROUTER).unwrap();
    head.wait_on(59_000, 0, ROUTER).unwrap();
    head.turn(|endpoint| Command::Pause { endpoint });
    assert_eq!(find(&head.applied.tables, &head.now()), None);
    let paused = head.wait_on(600_000, 0, ROUTER).unwrap();
    assert_eq!(paused.phase, Phase::Paused);
    assert_eq!(find(&head.applied.tables, &paused), None);
    assert_eq!(
        head.progress().evidence.reason,
        "paused, so that its wait does not count: 0 of 1 replicas answer"
    );
    head.turn(|endpoint| Command::Resume { endpoint });
    head.wait(1, 0, ROUTER).unwrap();
    let open = head.wait_on(59_999, 0, ROUTER).unwrap();
    assert_eq!(open.phase, Phase::Running);
    let over = head.wait(1, 0, ROUTER).unwrap();
    assert_eq!(over.phase, Phase::RolledBack);
}

#[test]
fn a_wait_ends_with_a_pause_however_short() {
    let mut head = Head::new(60_000);
    head.wait(1, 0, ROUTER).unwrap();
    head.wait_on(59_000, 0, ROUTER).unwrap();
    head.turn(|endpoint| Command::Pause { endpoint });
    head.turn(|endpoint| Command::Resume { endpoint });
    let open = head.wait(1_000, 0, ROUTER).unwrap();
    assert_eq!(open.phase, Phase::Running);
}

#[test]
fn a_rollout_may_wait_for_ever_and_waits_an_hour_unless_it_says_so() {
    let mut head = Head::new(0);
    head.wait(1, 0, ROUTER).unwrap();
    let open = head.wait_on(2 * REPLICA_WAIT_MS, 0, ROUTER).unwrap();
    assert_eq!(open.phase, Phase::Running);
    assert_eq!(
        head.progress().evidence.reason,
        "waiting for 7200 s: 0 of 1 replicas answer"
    );

    let mut head = Head::new(1);
    let endpoint = "digits".to_owned();
    head.say(Command::Abort { endpoint }).unwrap();
    let aborted = head.now();
    for command in [
        Command::Drained {
            endpoint: "digits".into(),
            rollout: 1,
            revision: aborted.revision,
            router: ROUTER,
        },
        Command::Retired {
            endpoint: "digits".into(),
            rollout: 1,
            revision: aborted.revision,
        },
    ] {
        head.say(command).unwrap();
    }
    let begun = head
        .say(Command::Start {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: Some(2),
            strategy: Strategy::Canary,
            steps: Vec::new(),
            guardrails: Guardrails::STANDARD,
            min_samples: 10,
        })
        .unwrap();
    assert_eq!(begun.replica_wait_max_ms, 3_600_000);
}

#[test]
fn a_reason_that_is_as_long_as_it_may_be_is_cut_and_not_refused() {
    let mut head = Head::new(1);
    let long = Command::Wait {
        endpoint: "digits".into(),
        rollout: 1,
        step: 0,
        router: ROUTER,
        evidence: evidence(&"x".repeat(EVIDENCE_TEXT_BYTES_MAX)),
    };
    head.say(long.clone()).unwrap();
    assert!(head.progress().evidence.is_bounded());
    let over = head.say(long).unwrap();
    let decided = over.decisions.last().unwrap().evidence.as_ref();
    assert!(over.phase == Phase::RolledBack && decided.unwrap().is_bounded());
}
