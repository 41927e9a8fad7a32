//! Rollouts, replicated.
//!
//! Invariants:
//! 1. An endpoint has one active version at every log index: that of its row. A promotion changes it in
//!    one entry, and so does a rollback after one; nothing else does.
//! 2. An endpoint has one open rollout at the most, and none begins before nothing is left of the last.
//! 3. Steps are judged by the endpoint's newest router, which names the rollout and the step that it
//!    judged: what an older router says, or one says late, changes nothing.
//! 4. The actors of the version that lost are ended after the router has said that it has no request
//!    with them. It names the revision that it follows, so that a word about a promotion is not taken
//!    for one about the rollback after it.
//! 5. Nothing begins, and nothing is taken back, while an experiment compares the active version with another.
//! 6. A step waits for replicas of the candidate as long as its rollout may (`waiting`), and for requests for ever. One that is paused
//!    does not wait.
//! 7. How a rollout ended is an entry of the registry's log, by the command that decided (`recording`).

use mobula_core::control::{ApplyContext, ModuleId, Reader, Table, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::Incarnation;
use mobula_core::row;

use super::command::{Command, Proposed, Verdict};
use super::plan::{Action, Cleanup, Phase, Progress, REPLICA_WAIT_MS, Rollout};
use super::recording::record;
use super::start::{check_experiment, start};
use super::trial::Evidence;
use super::waiting;
use crate::serving::shadow;
use crate::serving::state::{Endpoint, find as find_endpoint, put_endpoint};

/// Endpoint name, 0, number → [`Rollout`].
const ROLLOUTS: Table = Table {
    module: ModuleId::SERVING,
    tag: 2,
};

/// Endpoint name → the number of its newest rollout, which is asked for all the time.
pub(super) const NEWEST: Table = Table {
    module: ModuleId::SERVING,
    tag: 3,
};

/// Endpoint name, 0, number of the rollout → how its candidate is shadowed at the first step, if it is.
pub(super) const SHADOWS: Table = Table {
    module: ModuleId::SERVING,
    tag: 7,
};

/// Endpoint name, 0, number of the rollout → [`Progress`] at its step, while that is not decided.
const PROGRESS: Table = Table {
    module: ModuleId::SERVING,
    tag: 9,
};

/// Rollouts that are kept of an endpoint, the newest: of some KiB each.
pub const HISTORY_MAX: usize = 20;

fn prefix(endpoint: &str) -> Vec<u8> {
    [endpoint.as_bytes(), &[0]].concat()
}

pub(super) fn key(endpoint: &str, number: u64) -> Vec<u8> {
    [endpoint.as_bytes(), &[0], &number.to_be_bytes()].concat()
}

/// The rollouts of an endpoint that are kept, oldest first.
pub fn history(reader: &dyn Reader, endpoint: &str) -> Vec<Rollout> {
    row::all(reader, ROLLOUTS, &prefix(endpoint))
        .into_iter()
        .map(|(_, rollout)| rollout)
        .collect()
}

/// The newest rollout of an endpoint, if there was one.
pub fn newest(reader: &dyn Reader, endpoint: &str) -> Option<Rollout> {
    let number: u64 = row::get(reader, NEWEST, endpoint.as_bytes())?;
    row::get(reader, ROLLOUTS, &key(endpoint, number))
}

/// How a rollout's candidate is shadowed at the first step, if it is.
pub fn shadow_of(reader: &dyn Reader, rollout: &Rollout) -> Option<shadow::Plan> {
    row::get(reader, SHADOWS, &key(&rollout.endpoint, rollout.number))
}

/// The same for all rollouts of an endpoint that are kept, by their numbers.
pub fn shadows(reader: &dyn Reader, endpoint: &str) -> Vec<(u64, shadow::Plan)> {
    let known = history(reader, endpoint);
    let shadows = known
        .iter()
        .map(|rollout| (rollout.number, shadow_of(reader, rollout)));
    shadows
        .filter_map(|(number, shadow)| Some((number, shadow?)))
        .collect()
}

/// What was counted of the step that a rollout is at.
pub fn progress_of(reader: &dyn Reader, rollout: &Rollout) -> Option<Progress> {
    row::get(reader, PROGRESS, &key(&rollout.endpoint, rollout.number))
}

pub(super) fn remove(txn: &mut dyn Txn, rollout: &Rollout) {
    let key = key(&rollout.endpoint, rollout.number);
    txn.delete(ROLLOUTS, &key);
    txn.delete(SHADOWS, &key);
    txn.delete(PROGRESS, &key);
    waiting::end(txn, rollout);
}

/// Forgets the rollouts of an endpoint that is gone.
pub(in crate::serving) fn forget(txn: &mut dyn Txn, endpoint: &str) {
    for rollout in history(txn, endpoint) {
        remove(txn, &rollout);
    }
    txn.delete(NEWEST, endpoint.as_bytes());
}

pub(super) fn put(txn: &mut dyn Txn, rollout: &Rollout) {
    row::put(
        txn,
        ROLLOUTS,
        &key(&rollout.endpoint, rollout.number),
        rollout,
    );
}

/// Applies a command; the rollout as it is then.
pub(crate) fn apply(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    command: Command,
) -> Result<Rollout, Rejection> {
    match command {
        Command::Start {
            endpoint,
            model,
            version,
            strategy,
            steps,
            guardrails,
            min_samples,
        } => {
            let plan = Proposed {
                endpoint,
                model,
                version,
                strategy,
                steps,
                guardrails,
                min_samples,
                shadow: None,
                replica_wait_max_ms: REPLICA_WAIT_MS,
            };
            start(context, txn, plan)
        }
        Command::StartShadowed {
            endpoint,
            model,
            version,
            strategy,
            steps,
            guardrails,
            min_samples,
            shadow,
        } => {
            let plan = Proposed {
                endpoint,
                model,
                version,
                strategy,
                steps,
                guardrails,
                min_samples,
                shadow: Some(shadow),
                replica_wait_max_ms: REPLICA_WAIT_MS,
            };
            start(context, txn, plan)
        }
        Command::Begin(plan) => start(context, txn, plan),
        Command::Pause { endpoint } => turn(context, txn, &endpoint, Action::Pause),
        Command::Resume { endpoint } => turn(context, txn, &endpoint, Action::Resume),
        Command::Promote { endpoint } => turn(context, txn, &endpoint, Action::Promote),
        Command::Abort { endpoint } => turn(context, txn, &endpoint, Action::Abort),
        Command::RollBack { endpoint } => turn(context, txn, &endpoint, Action::RollBack),
        Command::Judge {
            endpoint,
            rollout,
            step,
            router,
            verdict,
            evidence,
        } => {
            heard(txn, &endpoint, router)?;
            judge(context, txn, (&endpoint, rollout, step), verdict, evidence)
        }
        Command::Report {
            endpoint,
            rollout,
            step,
            router,
            evidence,
        } => {
            heard(txn, &endpoint, router)?;
            let rollout = at_step(txn, (&endpoint, rollout, step), &evidence)?;
            waiting::end(txn, &rollout);
            put_progress(context, txn, &rollout, router, evidence);
            Ok(rollout)
        }
        Command::Wait {
            endpoint,
            rollout,
            step,
            router,
            evidence,
        } => {
            heard(txn, &endpoint, router)?;
            let rollout = at_step(txn, (&endpoint, rollout, step), &evidence)?;
            waiting::wait(context, txn, rollout, router, evidence)
        }
        Command::Drained {
            endpoint,
            rollout,
            revision,
            router,
        } => {
            heard(txn, &endpoint, router)?;
            clean(
                txn,
                (&endpoint, rollout, revision),
                Cleanup::Draining,
                Cleanup::Ending,
            )
        }
        Command::Retired {
            endpoint,
            rollout,
            revision,
        } => clean(
            txn,
            (&endpoint, rollout, revision),
            Cleanup::Ending,
            Cleanup::Done,
        ),
    }
}

/// An endpoint that is not being taken down.
pub(in crate::serving) fn standing(reader: &dyn Reader, name: &str) -> Result<Endpoint, Rejection> {
    let endpoint = find_endpoint(reader, name)?;
    if endpoint.deleting {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!("endpoint `{name}` is being taken down: deploy it again first"),
        ));
    }
    Ok(endpoint)
}

/// What a client wants of the newest rollout.
fn turn(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    name: &str,
    action: Action,
) -> Result<Rollout, Rejection> {
    let endpoint = standing(txn, name)?;
    let Some(mut rollout) = newest(txn, name) else {
        return Err(Rejection::not_found(format!(
            "endpoint `{name}` has had no rollout: begin one with `mobula rollout start {name} {}`",
            endpoint.model
        )));
    };
    let phase = match (action, rollout.phase) {
        (Action::Pause, Phase::Running) => Phase::Paused,
        (Action::Resume, Phase::Paused) => Phase::Running,
        (Action::Promote, Phase::Running | Phase::Paused) => Phase::Promoted,
        (Action::Abort, Phase::Running | Phase::Paused) => Phase::Aborted,
        (Action::RollBack, Phase::Running | Phase::Paused | Phase::Promoted) => Phase::RolledBack,
        (_, phase) => {
            return Err(Rejection::new(
                ErrorCode::FailedPrecondition,
                format!(
                    "rollout {} of endpoint `{name}` is {}, so there is nothing to {}: see `mobula \
                     rollout status {name}`",
                    rollout.number,
                    said(phase),
                    wanted(action)
                ),
            ));
        }
    };
    // The other version's actors may be the experiment's, and are ended with it.
    check_experiment(txn, name)?;
    rollout.decided(context.now_ms, action, None);
    enter(context, txn, endpoint, &mut rollout, phase);
    Ok(rollout)
}

/// A phase in words.
fn said(phase: Phase) -> &'static str {
    match phase {
        Phase::Running => "running",
        Phase::Paused => "paused",
        Phase::Promoted => "promoted",
        Phase::Aborted => "aborted",
        Phase::RolledBack => "rolled back",
    }
}

fn wanted(action: Action) -> &'static str {
    match action {
        Action::Start => "start",
        Action::Pass => "pass",
        Action::Pause => "pause",
        Action::Resume => "resume",
        Action::Promote => "promote",
        Action::Abort => "abort",
        Action::RollBack => "roll back",
    }
}

/// Enters a phase, and makes the version active that this phase is about.
pub(super) fn enter(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    endpoint: Endpoint,
    rollout: &mut Rollout,
    phase: Phase,
) {
    if !phase.is_open() {
        txn.delete(PROGRESS, &key(&rollout.endpoint, rollout.number));
    }
    waiting::end(txn, rollout);
    rollout.phase = phase;
    rollout.revision = context.index;
    rollout.cleanup = if phase.is_open() {
        Cleanup::Waiting
    } else {
        Cleanup::Draining
    };
    put(txn, rollout);
    record(context, txn, &endpoint.model, rollout);
    let active = match phase {
        Phase::Promoted => &rollout.candidate,
        Phase::Running | Phase::Paused | Phase::Aborted | Phase::RolledBack => &rollout.stable,
    };
    if active.version != endpoint.version {
        let endpoint = Endpoint {
            version: active.version,
            digest: active.digest.clone(),
            size_bytes: active.size_bytes,
            ..endpoint
        };
        put_endpoint(txn, &endpoint);
    }
}

/// Refuses routers that are not the endpoint's newest.
pub(in crate::serving) fn heard(
    reader: &dyn Reader,
    name: &str,
    router: Incarnation,
) -> Result<(), Rejection> {
    let known = standing(reader, name)?.router_incarnation;
    if router == known {
        return Ok(());
    }
    Err(Rejection::fenced(format!(
        "router {router} of endpoint `{name}` has no say: {known} has"
    )))
}

/// The rollout that is at the step which a router has counted.
fn at_step(
    reader: &dyn Reader,
    (name, number, step): (&str, u64, u32),
    evidence: &Evidence,
) -> Result<Rollout, Rejection> {
    if !evidence.is_bounded() {
        return Err(Rejection::invalid(
            "the evidence has too long a text, or a number that is none: nothing was changed",
        ));
    }
    newest(reader, name)
        .filter(|rollout| {
            rollout.number == number && rollout.phase.is_open() && rollout.step == step
        })
        .ok_or_else(|| {
            Rejection::fenced(format!(
                "rollout {number} of endpoint `{name}` is not at step {step} any more"
            ))
        })
}

fn judge(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    (name, number, step): (&str, u64, u32),
    verdict: Verdict,
    evidence: Evidence,
) -> Result<Rollout, Rejection> {
    let endpoint = standing(txn, name)?;
    let mut rollout = at_step(txn, (name, number, step), &evidence)?;
    if verdict == Verdict::RollBack {
        rollout.decided(context.now_ms, Action::RollBack, Some(evidence));
        enter(context, txn, endpoint, &mut rollout, Phase::RolledBack);
        return Ok(rollout);
    }
    if rollout.phase == Phase::Paused {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!("rollout {number} of endpoint `{name}` is paused: no step is passed"),
        ));
    }
    let next = step + 1;
    if rollout.steps[next as usize] == 100 {
        rollout.decided(context.now_ms, Action::Promote, Some(evidence));
        enter(context, txn, endpoint, &mut rollout, Phase::Promoted);
    } else {
        rollout.decided(context.now_ms, Action::Pass, Some(evidence));
        rollout.step = next;
        txn.delete(PROGRESS, &key(name, number));
        enter(context, txn, endpoint, &mut rollout, Phase::Running);
    }
    Ok(rollout)
}

/// Notes what a router has counted of the step that is under way.
pub(super) fn put_progress(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    rollout: &Rollout,
    router: Incarnation,
    evidence: Evidence,
) {
    let progress = Progress {
        at_ms: context.now_ms,
        step: rollout.step,
        router,
        evidence,
    };
    let key = key(&rollout.endpoint, rollout.number);
    row::put(txn, PROGRESS, &key, &progress);
}

fn clean(
    txn: &mut dyn Txn,
    (name, number, revision): (&str, u64, u64),
    from: Cleanup,
    to: Cleanup,
) -> Result<Rollout, Rejection> {
    let current = newest(txn, name)
        .filter(|rollout| rollout.number == number && rollout.revision == revision);
    let Some(mut rollout) = current else {
        return Err(Rejection::fenced(format!(
            "rollout {number} of endpoint `{name}` is past revision {revision}"
        )));
    };
    if rollout.cleanup == from {
        rollout.cleanup = to;
        put(txn, &rollout);
    }
    Ok(rollout)
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
