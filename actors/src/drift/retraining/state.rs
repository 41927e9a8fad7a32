//! What each command does to the tables of policies and retrainings.

use mobula_core::control::{Applied, ApplyContext, ModuleId, Reader, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::{codec, row};

use super::command::Command;
use super::next::{Found, next};
use super::plan::{Mode, Phase, RetrainPolicy, Retraining, STEPS_KEPT_MAX, Step, cut};
use super::tables::{
    HISTORY_MAX, LEDGERS, Ledger, POLICIES, RETRAININGS, find, find_policy, find_policy_row,
    history, key, ledger, newest, spent,
};
use crate::drift::findings::{self, About, RetrainSuggestion};
use crate::registry::events::{Retrained, retrained};
use crate::registry::policy::gate;
use crate::registry::state::find as find_version;
use crate::serving::rollout::command::Command as RolloutCommand;
use crate::serving::rollout::plan::Served;
use crate::serving::rollout::state as rollouts;
use crate::serving::state::{Endpoint, find as find_endpoint};

/// Applies a command.
pub(in crate::drift) fn apply(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    command: Command,
) -> Result<Applied, Rejection> {
    let mut answer = Vec::new();
    match command {
        Command::SetPolicy { endpoint, policy } => set_policy(txn, &endpoint, &policy)?,
        Command::RemovePolicy { endpoint } => {
            if find_policy(txn, &endpoint)?.is_none() {
                return Err(no_policy(&endpoint));
            }
            txn.delete(POLICIES, endpoint.as_bytes());
        }
        Command::Retrain { endpoint } => {
            answer = codec::encode_plain(&retrain(context, txn, &endpoint)?);
        }
        Command::Cancel { endpoint, reason } => {
            answer = codec::encode_plain(&cancel(context, txn, &endpoint, &reason)?);
        }
        Command::Begin { endpoint, event } => begin(context, txn, &endpoint, event)?,
        Command::Advance {
            endpoint,
            number,
            revision,
        } => advance(context, txn, &endpoint, number, revision)?,
        Command::Forget { endpoint } => forget(txn, &endpoint)?,
    }
    Ok(Applied::changed(ModuleId::DRIFT, answer))
}

fn no_policy(endpoint: &str) -> Rejection {
    Rejection::new(
        ErrorCode::FailedPrecondition,
        format!(
            "endpoint `{endpoint}` has no retrain policy: set one with `mobula drift policy set {endpoint} \
             --job FILE`"
        ),
    )
}

fn precondition(message: String) -> Rejection {
    Rejection::new(ErrorCode::FailedPrecondition, message)
}

fn set_policy(txn: &mut dyn Txn, name: &str, policy: &RetrainPolicy) -> Result<(), Rejection> {
    policy.check()?;
    let endpoint = find_endpoint(txn, name)?;
    if policy.model != endpoint.model {
        return Err(Rejection::invalid(format!(
            "endpoint `{name}` serves {}, and the job registers {}: write `register = \"{}\"` into the job file",
            endpoint.model, policy.model, endpoint.model
        )));
    }
    row::put(txn, POLICIES, name.as_bytes(), policy);
    // The leader looks after endpoints that have one.
    let ledger = ledger(txn, name);
    row::put(txn, LEDGERS, name.as_bytes(), &ledger);
    Ok(())
}

/// The suggestion about the version that an endpoint serves, while that drifts.
fn suggestion(reader: &dyn Reader, endpoint: &Endpoint) -> Option<RetrainSuggestion> {
    let found = findings::monitor(reader, &endpoint.name)?.retrain_suggestion?;
    (found.model == endpoint.model && found.version == endpoint.version).then_some(found)
}

/// The drift event for which the leader should begin a retraining now: one that has led to none yet, or one that goes on after
/// the last retraining has ended.
pub(super) fn due(reader: &dyn Reader, now_ms: u64, name: &str, ledger: &Ledger) -> Option<u64> {
    let newest = find(reader, name, ledger.newest);
    let is_open = newest.as_ref().is_some_and(|row| row.phase.is_open());
    if is_open || now_ms < ledger.quiet_until_ms {
        return None;
    }
    let endpoint = find_endpoint(reader, name).ok()?;
    let suggestion = suggestion(reader, &endpoint)?;
    let policy = find_policy_row(reader, name)?;
    if endpoint.deleting || policy.model != endpoint.model {
        return None;
    }
    let is_new = suggestion.event > ledger.event;
    let is_due = is_new
        || newest.is_none_or(|ended| {
            // That the budget is spent is said once, and not again for as long as it is.
            let may_submit =
                policy.mode == Mode::Suggest || spent(&policy, ledger, now_ms) < policy.budget.jobs;
            goes_on_after(reader, &endpoint, &ended)
                && (may_submit || ended.phase != Phase::BudgetSpent)
        });
    is_due.then_some(suggestion.event)
}

/// Whether drift of the version that an endpoint serves was seen after a retraining had ended: where nothing is asked any more, or
/// no labels come that say so, nothing is known to go on.
fn goes_on_after(reader: &dyn Reader, endpoint: &Endpoint, ended: &Retraining) -> bool {
    let about = About {
        endpoint: &endpoint.name,
        model: &endpoint.model,
        version: endpoint.version,
    };
    findings::goes_on_ms(reader, about).is_some_and(|seen_ms| seen_ms >= ended.since_ms())
}

fn begin(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    name: &str,
    event: u64,
) -> Result<(), Rejection> {
    let mut ledger = ledger(txn, name);
    if due(txn, context.now_ms, name, &ledger) != Some(event) {
        return Err(Rejection::fenced(format!(
            "drift event {event} of endpoint `{name}` leads to no retraining now"
        )));
    }
    let policy = find_policy_row(txn, name).ok_or_else(|| no_policy(name))?;
    let spent = spent(&policy, &ledger, context.now_ms);
    let (phase, reason) = match policy.mode {
        Mode::Suggest => (
            Phase::Suggested,
            "the policy leaves it to a client".to_owned(),
        ),
        Mode::Auto if spent < policy.budget.jobs => {
            (Phase::Submitting, "the policy says so".to_owned())
        }
        Mode::Auto => (
            Phase::BudgetSpent,
            format!(
                "{spent} jobs of {} were submitted in the last {} s",
                policy.budget.jobs,
                policy.budget.period_ms / 1000
            ),
        ),
    };
    create(context, txn, name, &mut ledger, &policy)?.enter(
        context,
        txn,
        &mut ledger,
        phase,
        reason,
    );
    Ok(())
}

/// A retraining that has no phase yet; makes room for its row.
fn create(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    name: &str,
    ledger: &mut Ledger,
    policy: &RetrainPolicy,
) -> Result<Retraining, Rejection> {
    let endpoint = find_endpoint(txn, name)?;
    let Some(suggestion) = suggestion(txn, &endpoint) else {
        return Err(precondition(format!(
            "nothing suggests to retrain {}:{} at endpoint `{name}`: see `mobula drift status`",
            endpoint.model, endpoint.version
        )));
    };
    ledger.newest += 1;
    ledger.event = suggestion.event;
    if let Some(old) = ledger.newest.checked_sub(HISTORY_MAX) {
        txn.delete(RETRAININGS, &key(name, old));
    }
    Ok(Retraining {
        endpoint: name.to_owned(),
        number: ledger.newest,
        began_index: context.index,
        model: endpoint.model,
        event: suggestion.event,
        drift: cut(&suggestion.reason),
        baseline: Served {
            version: endpoint.version,
            digest: endpoint.digest,
            size_bytes: endpoint.size_bytes,
        },
        terms: policy.terms.clone(),
        phase: Phase::Suggested,
        job: None,
        candidate: None,
        comparison: None,
        rollout: None,
        revision: context.index,
        steps: Vec::new(),
    })
}

impl Retraining {
    /// Takes a step: the row, what is counted, and the entry of the audit log.
    fn enter(
        mut self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        ledger: &mut Ledger,
        phase: Phase,
        reason: String,
    ) -> Self {
        retrained(
            txn,
            context,
            Retrained {
                endpoint: &self.endpoint,
                number: self.number,
                model: &self.model,
                job: self.job,
                version: self.candidate,
                phase: phase.as_str(),
                reason: &reason,
            },
        );
        self.phase = phase;
        self.revision = context.index;
        self.steps.push(Step {
            at_ms: context.now_ms,
            index: context.index,
            phase,
            reason,
        });
        let excess = self.steps.len().saturating_sub(STEPS_KEPT_MAX);
        self.steps.drain(..excess);
        if phase == Phase::Submitting {
            ledger.submissions_ms.push(context.now_ms);
            let excess = ledger
                .submissions_ms
                .len()
                .saturating_sub(super::plan::BUDGET_JOBS_MAX as usize);
            ledger.submissions_ms.drain(..excess);
        }
        if !phase.is_open() {
            ledger.quiet_until_ms = context.now_ms.saturating_add(self.terms.cooldown_ms);
        }
        row::put(txn, RETRAININGS, &key(&self.endpoint, self.number), &self);
        row::put(txn, LEDGERS, self.endpoint.as_bytes(), ledger);
        self
    }
}

fn retrain(context: &ApplyContext, txn: &mut dyn Txn, name: &str) -> Result<Retraining, Rejection> {
    let policy = find_policy(txn, name)?.ok_or_else(|| no_policy(name))?;
    let mut ledger = ledger(txn, name);
    let spent = spent(&policy, &ledger, context.now_ms);
    if spent >= policy.budget.jobs {
        return Err(precondition(format!(
            "the budget of endpoint `{name}` is spent: {spent} jobs of {} in the last {} s; set another with \
             `mobula drift policy set`",
            policy.budget.jobs,
            policy.budget.period_ms / 1000
        )));
    }
    let open = newest(txn, name).filter(|row| row.phase.is_open());
    let row = match open {
        Some(row) if row.phase == Phase::Suggested => row,
        Some(row) => {
            return Err(Rejection::new(
                ErrorCode::AlreadyExists,
                format!(
                    "retraining {} of endpoint `{name}` is under way ({}): see `mobula drift loop {name}`",
                    row.number,
                    row.phase.as_str()
                ),
            ));
        }
        None => create(context, txn, name, &mut ledger, &policy)?,
    };
    let reason = "a client asked for it".to_owned();
    Ok(row.enter(context, txn, &mut ledger, Phase::Submitting, reason))
}

fn cancel(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    name: &str,
    reason: &str,
) -> Result<Retraining, Rejection> {
    find_endpoint(txn, name)?;
    let Some(row) = newest(txn, name).filter(|row| row.phase.is_open()) else {
        return Err(precondition(format!(
            "endpoint `{name}` has no retraining under way: see `mobula drift history {name}`"
        )));
    };
    if row.phase == Phase::Canary {
        return Err(precondition(format!(
            "retraining {} of endpoint `{name}` is at its rollout: end that with `mobula rollout abort {name}`",
            row.number
        )));
    }
    let reason = match reason {
        "" => "a client ended it".to_owned(),
        reason => cut(&format!("a client ended it: {reason}")),
    };
    let mut ledger = ledger(txn, name);
    Ok(row.enter(context, txn, &mut ledger, Phase::Cancelled, reason))
}

fn advance(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    name: &str,
    number: u64,
    revision: u64,
) -> Result<(), Rejection> {
    let current = find(txn, name, number).filter(|row| row.revision == revision);
    let step = current.and_then(|row| Some((next(txn, context.now_ms, &row)?, row)));
    let Some((step, mut row)) = step else {
        return Err(Rejection::fenced(format!(
            "retraining {number} of endpoint `{name}` takes no step after revision {revision} now"
        )));
    };
    let (mut phase, mut reason) = (step.phase, step.reason);
    match step.found {
        Found::Nothing => {}
        Found::Job(job) => row.job = Some(job.0),
        Found::Candidate(version) => row.candidate = Some(version),
        Found::Comparison(comparison) => row.comparison = Some(comparison),
    }
    if phase == Phase::Canary {
        let plan = row.terms.canary.clone();
        let start = RolloutCommand::Start {
            endpoint: row.endpoint.clone(),
            model: row.model.clone(),
            version: row.candidate,
            strategy: plan.strategy,
            steps: plan.steps,
            guardrails: plan.guardrails,
            min_samples: plan.min_samples,
        };
        // In this entry: a canary that was begun is known to be this retraining's. A start that is refused
        // has written nothing.
        match begin_canary(context, txn, &row, start) {
            Ok(number) => row.rollout = Some(number),
            Err(error) => (phase, reason) = (Phase::Failed, cut(&error.message)),
        }
    }
    let mut ledger = ledger(txn, name);
    row.enter(context, txn, &mut ledger, phase, reason);
    Ok(())
}

/// Begins the rollout of a retraining's version, if the policies permit it; its number.
fn begin_canary(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    row: &Retraining,
    start: RolloutCommand,
) -> Result<u64, Rejection> {
    let version = find_version(txn, &row.model, row.candidate)?;
    let decision = gate::ask_deploy(txn, None, &version, &row.endpoint, true)?;
    let rollout = rollouts::apply(context, txn, start)?;
    gate::write_down(context, txn, &decision);
    Ok(rollout.number)
}

/// The endpoint is gone: its policy goes with it, and events of a later one of its name are counted from one again. What
/// is under way is ended, and then forgotten, by the controller.
pub(in crate::drift) fn retire(txn: &mut dyn Txn, name: &str) {
    txn.delete(POLICIES, name.as_bytes());
    if let Some(known) = row::get::<Ledger>(txn, LEDGERS, name.as_bytes()) {
        let ledger = Ledger { event: 0, ..known };
        row::put(txn, LEDGERS, name.as_bytes(), &ledger);
    }
}

fn forget(txn: &mut dyn Txn, name: &str) -> Result<(), Rejection> {
    if find_endpoint(txn, name).is_ok() {
        return Err(Rejection::fenced(format!("endpoint `{name}` exists")));
    }
    for row in history(txn, name) {
        txn.delete(RETRAININGS, &key(name, row.number));
    }
    txn.delete(POLICIES, name.as_bytes());
    txn.delete(LEDGERS, name.as_bytes());
    Ok(())
}

#[cfg(test)]
#[path = "state_tests.rs"]
pub(super) mod tests;
