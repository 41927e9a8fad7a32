//! Experiments, replicated.
//!
//! Invariants:
//! 1. An endpoint has one experiment under way at the most, and none beside a rollout: what is active does not
//!    change while versions are compared, and nothing begins before nothing is left of the last.
//! 2. A plan is written once. No command changes it.
//! 3. An experiment changes no endpoint's version, however it ends: that is a rollout's to do.
//! 4. Numbers come from the endpoint's newest router, which has said before that it counts: what an older one
//!    says, or one says about an experiment that is over, changes nothing. Nor do numbers that arrive behind
//!    newer ones: what was counted never becomes less, from router to router, but where it is said to be lost.
//! 5. The treatment's replicas are ended after the router has said that it has no request with them.
//! 6. How an experiment ended is an entry of the registry's log, by the command that ended it.

use mobula_core::control::{ApplyContext, ModuleId, Reader, Table, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::Incarnation;
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::row;

use super::command::{Command, Proposed};
use super::findings::{Decision, Findings};
use super::plan::{Ending, Experiment, Plan};
use crate::registry::events::{ExperimentEnded, experiment_ended};
use crate::serving::autoscaler::state as scaling;
use crate::serving::rollout::plan::Cleanup;
use crate::serving::rollout::start::{another_version, served};
use crate::serving::rollout::state::{HISTORY_MAX, heard, newest as newest_rollout, standing};
use crate::serving::state::Endpoint;

/// Endpoint name, 0, number → [`Experiment`].
const EXPERIMENTS: Table = Table {
    module: ModuleId::SERVING,
    tag: 5,
};

/// Endpoint name → the number of its newest experiment, which is asked for all the time.
const NEWEST: Table = Table {
    module: ModuleId::SERVING,
    tag: 6,
};

fn prefix(endpoint: &str) -> Vec<u8> {
    [endpoint.as_bytes(), &[0]].concat()
}

fn key(endpoint: &str, number: u64) -> Vec<u8> {
    [endpoint.as_bytes(), &[0], &number.to_be_bytes()].concat()
}

/// The experiments of an endpoint that are kept, oldest first: as many as rollouts.
pub fn history(reader: &dyn Reader, endpoint: &str) -> Vec<Experiment> {
    row::all(reader, EXPERIMENTS, &prefix(endpoint))
        .into_iter()
        .map(|(_, experiment)| experiment)
        .collect()
}

/// The newest experiment of an endpoint, if there was one.
pub fn newest(reader: &dyn Reader, endpoint: &str) -> Option<Experiment> {
    let number: u64 = row::get(reader, NEWEST, endpoint.as_bytes())?;
    row::get(reader, EXPERIMENTS, &key(endpoint, number))
}

/// The experiment that keeps an endpoint's versions as they are: one that is under way, or whose treatment's
/// replicas have not ended.
pub fn unfinished(reader: &dyn Reader, endpoint: &str) -> Option<Experiment> {
    newest(reader, endpoint).filter(|experiment| experiment.cleanup != Cleanup::Done)
}

/// Why nothing else may change an endpoint's versions now.
pub(crate) fn in_the_way(reader: &dyn Reader, endpoint: &str) -> Option<String> {
    let experiment = unfinished(reader, endpoint)?;
    let number = experiment.number;
    Some(if experiment.is_open() {
        format!(
            "experiment {number} of endpoint `{endpoint}` is under way: wait for its end, or end it with \
             `mobula experiment stop {endpoint}`"
        )
    } else {
        format!(
            "what is left of experiment {number} of endpoint `{endpoint}` is being taken down: try again in a \
             moment, and see `mobula experiment status {endpoint}`"
        )
    })
}

/// Forgets the experiments of an endpoint that is gone.
pub(in crate::serving) fn forget(txn: &mut dyn Txn, endpoint: &str) {
    if is_planted(Mutant::ExperimentOutlivesEndpoint) {
        return;
    }
    for experiment in history(txn, endpoint) {
        txn.delete(EXPERIMENTS, &key(endpoint, experiment.number));
    }
    txn.delete(NEWEST, endpoint.as_bytes());
}

fn put(txn: &mut dyn Txn, experiment: &Experiment) {
    let key = key(&experiment.plan.endpoint, experiment.number);
    row::put(txn, EXPERIMENTS, &key, experiment);
}

/// Applies a command; the experiment as it is then.
pub(in crate::serving) fn apply(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    command: Command,
) -> Result<Experiment, Rejection> {
    match command {
        Command::Start(proposed) => start(context, txn, proposed),
        Command::Stop { endpoint } => stop(context, txn, &endpoint),
        Command::Count {
            endpoint,
            experiment,
            router,
        } => {
            let mut row = heard_about(txn, (&endpoint, experiment, router))?;
            if row.counting != Some(router) {
                row.counting = Some(router);
                // From here on nobody else replaces what is stored, so this router may go on with it.
                row.counts = row.counts.max(1);
                if is_planted(Mutant::CountsForgotten) {
                    (row.reported_ms, row.findings, row.stored) = (None, None, None);
                }
                put(txn, &row);
            }
            Ok(row)
        }
        Command::CountAnew {
            endpoint,
            experiment,
            count,
            router,
        } => {
            let mut row = counting(txn, (&endpoint, experiment, router))?;
            check_count(&row, count)?;
            row.counts = row.counts.saturating_add(1);
            // Nobody can add to them, and nothing follows from them.
            (row.reported_ms, row.findings, row.stored) = (None, None, None);
            put(txn, &row);
            Ok(row)
        }
        Command::Report {
            endpoint,
            experiment,
            router,
            findings,
            stored,
        } => {
            let mut row = counted_by(txn, (&endpoint, experiment, router), &findings)?;
            check_newer(&row, &findings)?;
            (row.reported_ms, row.findings) = (Some(context.now_ms), Some(findings));
            row.stored = Some(stored);
            put(txn, &row);
            Ok(row)
        }
        Command::Conclude {
            endpoint,
            experiment,
            router,
            ending,
            findings,
        } => {
            let mut row = counted_by(txn, (&endpoint, experiment, router), &findings)?;
            let is_decided = findings.decision != Decision::Undecided;
            if (ending == Ending::Decided) && !is_decided || ending == Ending::Stopped {
                return Err(Rejection::invalid(
                    "a router ends an experiment for what it found: nothing was changed",
                ));
            }
            (row.reported_ms, row.findings) = (Some(context.now_ms), Some(findings));
            end(context, txn, &mut row, ending);
            Ok(row)
        }
        Command::Drained {
            endpoint,
            experiment,
            revision,
            router,
        } => {
            heard(txn, &endpoint, router)?;
            let next = if is_planted(Mutant::TreatmentLeftRunning) {
                Cleanup::Done
            } else {
                Cleanup::Ending
            };
            clean(
                txn,
                (&endpoint, experiment, revision),
                Cleanup::Draining,
                next,
            )
        }
        Command::Retired {
            endpoint,
            experiment,
            revision,
        } => clean(
            txn,
            (&endpoint, experiment, revision),
            Cleanup::Ending,
            Cleanup::Done,
        ),
    }
}

fn start(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    proposed: Proposed,
) -> Result<Experiment, Rejection> {
    let endpoint = standing(txn, &proposed.endpoint)?;
    let treatment = another_version(txn, &endpoint, &proposed.model, proposed.version)?;
    let last = newest(txn, &endpoint.name);
    let number = last.as_ref().map_or(1, |last| last.number + 1);
    let plan = Plan {
        control: served(&endpoint),
        treatment,
        control_share_bp: proposed.control_share_bp,
        treatment_share_bp: proposed.treatment_share_bp,
        // Another one for each, so that not the same keys are always those that meet a new version.
        seed: proposed
            .seed
            .unwrap_or_else(|| format!("{}/experiment-{number}/", endpoint.name)),
        primary: proposed.primary,
        effect_min: proposed.effect_min,
        guardrails: proposed.guardrails,
        alpha_bp: proposed.alpha_bp,
        samples_max: proposed.samples_max,
        model: proposed.model,
        endpoint: proposed.endpoint,
    };
    plan.check()?;
    if let Some(open) = last.as_ref().filter(|last| last.is_open())
        && is_planted(Mutant::ExperimentPlanChanged)
    {
        let changed = Experiment {
            plan,
            ..open.clone()
        };
        put(txn, &changed);
        return Ok(changed);
    }
    check_way(txn, &endpoint, &plan, last.as_ref())?;
    // Both versions are to answer.
    let endpoint = scaling::wake(txn, endpoint);
    let experiment = Experiment {
        number,
        plan,
        started_ms: context.now_ms,
        ended_ms: None,
        ending: None,
        revision: context.index,
        cleanup: Cleanup::Waiting,
        counts: 0,
        counting: None,
        reported_ms: None,
        findings: None,
        stored: None,
    };
    let known = history(txn, &endpoint.name);
    let excess = (known.len() + 1).saturating_sub(HISTORY_MAX);
    for old in &known[..excess] {
        txn.delete(EXPERIMENTS, &key(&endpoint.name, old.number));
    }
    row::put(txn, NEWEST, endpoint.name.as_bytes(), &number);
    put(txn, &experiment);
    Ok(experiment)
}

/// Refuses an experiment beside another one, or beside a rollout.
fn check_way(
    reader: &dyn Reader,
    endpoint: &Endpoint,
    plan: &Plan,
    last: Option<&Experiment>,
) -> Result<(), Rejection> {
    let name = &endpoint.name;
    if let Some(open) = last.filter(|last| last.is_open()) {
        // A seed that nobody gave is no difference.
        let wanted = Plan {
            seed: if plan.seed == format!("{name}/experiment-{}/", open.number + 1) {
                open.plan.seed.clone()
            } else {
                plan.seed.clone()
            },
            ..plan.clone()
        };
        let differences = open.plan.differences(&wanted);
        let asked = if differences.is_empty() {
            "with this plan".to_owned()
        } else {
            format!(
                "with another {}, and a plan is not changed while it is followed: numbers that were looked at \
                 before it was made prove nothing",
                differences.join(", ")
            )
        };
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "experiment {} of endpoint `{name}` is under way {asked}; wait for its end, or end it with \
                 `mobula experiment stop {name}` and start a new one",
                open.number
            ),
        ));
    }
    if let Some(reason) = in_the_way(reader, name) {
        return Err(Rejection::new(ErrorCode::FailedPrecondition, reason));
    }
    let Some(rollout) = newest_rollout(reader, name) else {
        return Ok(());
    };
    if rollout.phase.is_open() {
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "rollout {} of endpoint `{name}` is under way: wait for its end, or end it with `mobula \
                 rollout abort {name}`",
                rollout.number
            ),
        ));
    }
    if rollout.cleanup != Cleanup::Done {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "what is left of rollout {} of endpoint `{name}` is being taken down: try again in a moment",
                rollout.number
            ),
        ));
    }
    Ok(())
}

fn stop(context: &ApplyContext, txn: &mut dyn Txn, name: &str) -> Result<Experiment, Rejection> {
    standing(txn, name)?;
    let Some(mut experiment) = newest(txn, name) else {
        return Err(Rejection::not_found(format!(
            "endpoint `{name}` has had no experiment: begin one with `mobula experiment start {name}`"
        )));
    };
    if !experiment.is_open() {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "experiment {} of endpoint `{name}` is over already: see `mobula experiment status {name}`",
                experiment.number
            ),
        ));
    }
    end(context, txn, &mut experiment, Ending::Stopped);
    Ok(experiment)
}

fn end(context: &ApplyContext, txn: &mut dyn Txn, experiment: &mut Experiment, ending: Ending) {
    experiment.ending = Some(ending);
    experiment.ended_ms = Some(context.now_ms);
    experiment.revision = context.index;
    experiment.cleanup = Cleanup::Draining;
    // The router removes it before it says that the treatment is drained.
    experiment.stored = None;
    put(txn, experiment);
    record(context, txn, experiment, ending);
}

/// Writes the end of an experiment into the registry's log.
fn record(context: &ApplyContext, txn: &mut dyn Txn, experiment: &Experiment, ending: Ending) {
    let plan = &experiment.plan;
    let found = experiment.findings.as_ref();
    let ended = ExperimentEnded {
        endpoint: &plan.endpoint,
        number: experiment.number,
        model: &plan.model,
        control: plan.control.version,
        treatment: plan.treatment.version,
        plan_blake3: plan.digest(),
        outcome: match ending {
            Ending::Decided => "decided",
            Ending::Exhausted => "exhausted",
            Ending::Guardrail => "guardrail",
            Ending::Unfit => "unfit",
            Ending::Stopped => "stopped",
            Ending::Sentinel => "sentinel",
        },
        decision: match found.map_or(Decision::Undecided, |found| found.decision) {
            Decision::Undecided => "undecided",
            Decision::Control => "control",
            Decision::Treatment => "treatment",
        },
        reason: match (ending, found) {
            (Ending::Stopped, _) | (_, None) => "a client ended it",
            (_, Some(found)) => &found.reason,
        },
    };
    experiment_ended(txn, context, ended);
}

/// The experiment that the endpoint's newest router speaks of, if it is under way.
fn heard_about(
    reader: &dyn Reader,
    (name, number, router): (&str, u64, Incarnation),
) -> Result<Experiment, Rejection> {
    if !is_planted(Mutant::StaleRouterCounts) {
        heard(reader, name, router)?;
    }
    let is_open = |experiment: &Experiment| {
        experiment.is_open() || is_planted(Mutant::ExperimentDecidedTwice)
    };
    newest(reader, name)
        .filter(|experiment| experiment.number == number && is_open(experiment))
        .ok_or_else(|| {
            Rejection::fenced(format!(
                "experiment {number} of endpoint `{name}` is not under way any more"
            ))
        })
}

/// The same for a router that says what it found.
fn counted_by(
    reader: &dyn Reader,
    said: (&str, u64, Incarnation),
    findings: &Findings,
) -> Result<Experiment, Rejection> {
    if !findings.is_bounded() {
        return Err(Rejection::invalid(
            "the findings have too long a text, or a number that is none: nothing was changed",
        ));
    }
    counting(reader, said)
}

/// The experiment that the endpoint's newest router speaks of, if it has said that it counts.
fn counting(reader: &dyn Reader, said: (&str, u64, Incarnation)) -> Result<Experiment, Rejection> {
    let experiment = heard_about(reader, said)?;
    if experiment.counting != Some(said.2) {
        return Err(Rejection::fenced(format!(
            "router {} of endpoint `{}` has not said that it counts",
            said.2, said.0
        )));
    }
    Ok(experiment)
}

/// Refuses to give a count up that is given up already: a host says again what was not answered.
fn check_count(experiment: &Experiment, count: u32) -> Result<(), Rejection> {
    if experiment.counts == count {
        return Ok(());
    }
    Err(Rejection::fenced(format!(
        "count {count} of experiment {} of endpoint `{}` is given up already, and count {} is under way: nothing \
         was changed",
        experiment.number, experiment.plan.endpoint, experiment.counts
    )))
}

/// Refuses numbers that are older than what is known of the same count: a host sends again what was not answered, so
/// one report may arrive behind the next.
fn check_newer(experiment: &Experiment, findings: &Findings) -> Result<(), Rejection> {
    let known = experiment.findings.as_ref().map_or(0, Findings::counted);
    let counted = findings.counted();
    if counted >= known || is_planted(Mutant::LateReportHeard) {
        return Ok(());
    }
    Err(Rejection::fenced(format!(
        "a report of {counted} keys and values of experiment {} of endpoint `{}` comes late, {known} are known \
         already: nothing was changed, and the next report says more",
        experiment.number, experiment.plan.endpoint
    )))
}

fn clean(
    txn: &mut dyn Txn,
    (name, number, revision): (&str, u64, u64),
    from: Cleanup,
    to: Cleanup,
) -> Result<Experiment, Rejection> {
    let current = newest(txn, name)
        .filter(|experiment| experiment.number == number && experiment.revision == revision);
    let Some(mut experiment) = current else {
        return Err(Rejection::fenced(format!(
            "experiment {number} of endpoint `{name}` is past revision {revision}"
        )));
    };
    if experiment.cleanup == from {
        experiment.cleanup = to;
        put(txn, &experiment);
    }
    Ok(experiment)
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
