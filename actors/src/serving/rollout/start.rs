//! How a rollout begins.

use mobula_core::control::{ApplyContext, Reader, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;

use super::command::Proposed;
use super::plan::{Action, Cleanup, Phase, Rollout, Served, check};
use super::state::{HISTORY_MAX, NEWEST, SHADOWS, history, key, put, remove, standing};
use crate::registry;
use crate::serving::autoscaler::state as scaling;
use crate::serving::experiment::state as experiment;
use crate::serving::state::{Endpoint, check_device};

/// Begins a rollout.
pub(super) fn start(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    plan: Proposed,
) -> Result<Rollout, Rejection> {
    let endpoint = standing(txn, &plan.endpoint)?;
    let mut steps = if plan.steps.is_empty() {
        plan.strategy.default_steps()
    } else {
        plan.steps
    };
    if let Some(shadow) = &plan.shadow {
        shadow.check()?;
        // Nobody gets an answer of a shadow.
        if steps.first() != Some(&0) {
            steps.insert(0, 0);
        }
    }
    check(&steps, &plan.guardrails, plan.min_samples)?;
    let candidate = another_version(txn, &endpoint, &plan.model, plan.version)?;
    check_experiment(txn, &endpoint.name)?;
    let number = next_number(txn, &endpoint.name)?;
    // A candidate is compared with a version that answers.
    let endpoint = scaling::wake(txn, endpoint);
    let mut rollout = Rollout {
        number,
        strategy: plan.strategy,
        stable: served(&endpoint),
        candidate,
        steps,
        step: 0,
        phase: Phase::Running,
        guardrails: plan.guardrails,
        min_samples: plan.min_samples,
        started_ms: context.now_ms,
        revision: context.index,
        cleanup: Cleanup::Waiting,
        decisions: Vec::new(),
        replica_wait_max_ms: plan.replica_wait_max_ms,
        endpoint: endpoint.name,
    };
    rollout.decided(context.now_ms, Action::Start, None);
    row::put(txn, NEWEST, rollout.endpoint.as_bytes(), &number);
    put(txn, &rollout);
    if let Some(shadow) = &plan.shadow {
        row::put(txn, SHADOWS, &key(&rollout.endpoint, number), shadow);
    }
    Ok(rollout)
}

/// The version that an endpoint serves.
pub(in crate::serving) fn served(endpoint: &Endpoint) -> Served {
    Served {
        version: endpoint.version,
        digest: endpoint.digest.clone(),
        size_bytes: endpoint.size_bytes,
    }
}

/// A version of an endpoint's model that is not the one it serves.
pub(in crate::serving) fn another_version(
    reader: &dyn Reader,
    endpoint: &Endpoint,
    model: &str,
    version: Option<u64>,
) -> Result<Served, Rejection> {
    if model != endpoint.model {
        return Err(Rejection::invalid(format!(
            "endpoint `{}` serves {}, not {model}: roll out a version of {}, or deploy {model} as an \
             endpoint of its own",
            endpoint.name, endpoint.model, endpoint.model
        )));
    }
    let found = registry::state::find(reader, model, version)?;
    if found.version == endpoint.version {
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "endpoint `{}` serves {model}:{} already: see `mobula models show {model}` for others",
                endpoint.name, found.version
            ),
        ));
    }
    check_device(endpoint.settings.device, &found)?;
    Ok(Served {
        version: found.version,
        digest: found.description.digest,
        size_bytes: found.description.size_bytes,
    })
}

/// Refuses to change an endpoint's version while an experiment goes by it.
pub(super) fn check_experiment(reader: &dyn Reader, endpoint: &str) -> Result<(), Rejection> {
    match experiment::in_the_way(reader, endpoint) {
        Some(reason) => Err(Rejection::new(ErrorCode::FailedPrecondition, reason)),
        None => Ok(()),
    }
}

/// The number of a new rollout; makes room for its row.
fn next_number(txn: &mut dyn Txn, endpoint: &str) -> Result<u64, Rejection> {
    let known = history(txn, endpoint);
    let Some(last) = known.last() else {
        return Ok(1);
    };
    if last.phase.is_open() {
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "rollout {} of endpoint `{endpoint}` to version {} is under way: wait for its end, or \
                 end it with `mobula rollout abort {endpoint}`",
                last.number, last.candidate.version
            ),
        ));
    }
    if last.cleanup != Cleanup::Done {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "what is left of rollout {} of endpoint `{endpoint}` is being taken down: try again in \
                 a moment, and see `mobula rollout status {endpoint}`",
                last.number
            ),
        ));
    }
    let excess = (known.len() + 1).saturating_sub(HISTORY_MAX);
    for old in &known[..excess] {
        remove(txn, old);
    }
    Ok(last.number + 1)
}

#[cfg(test)]
#[path = "start_tests.rs"]
mod tests;
