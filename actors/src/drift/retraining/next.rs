//! Which step of a retraining may be taken now. The leader asks before it proposes a step, and the step's
//! apply asks again: both get the same answer from the same tables.

use mobula_core::control::Reader;
use mobula_core::id::JobId;
use mobula_scheduler::{JobView, Query as SchedulerQuery, QueryResponse};
use serde::Deserialize;

use super::evaluation::{Comparison, compare};
use super::plan::{Phase, Retraining, cut};
use super::tables::find_policy_row;
use crate::registry::stages::{Policy, Risk, Stage, model_state, standing};
use crate::registry::state::{ModelVersion, find as find_version};
use crate::serving::experiment::state as experiments;
use crate::serving::rollout::plan::{Action, Cleanup, Phase as RolloutPhase, Rollout};
use crate::serving::rollout::state as rollouts;
use crate::serving::state::{Endpoint, find as find_endpoint};

/// How long a job may take to be submitted. The leader does it at once; when it is refused for so long, as
/// on a cluster that is full of jobs, the retraining has failed.
pub(super) const SUBMIT_MS_MAX: u64 = 5 * 60_000;

/// A step that may be taken.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Next {
    pub(super) phase: Phase,
    pub(super) reason: String,
    pub(super) found: Found,
}

/// What a step has found, beside the phase that it leads to.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Found {
    Nothing,
    Job(JobId),
    Candidate(u64),
    Comparison(Comparison),
}

impl Next {
    fn to(phase: Phase, reason: impl Into<String>) -> Self {
        Next {
            phase,
            reason: cut(&reason.into()),
            found: Found::Nothing,
        }
    }
}

/// What a training job's result says, as far as it matters here.
#[derive(Deserialize)]
struct JobResult {
    model: Option<String>,
    model_version: Option<u64>,
}

/// The next step of a retraining, if one may be taken.
pub(super) fn next(reader: &dyn Reader, now_ms: u64, row: &Retraining) -> Option<Next> {
    if !row.phase.is_open() {
        return None;
    }
    let endpoint = find_endpoint(reader, &row.endpoint)
        .ok()
        .filter(|endpoint| !endpoint.deleting);
    let Some(endpoint) = endpoint else {
        return Some(Next::to(Phase::Cancelled, "the endpoint is gone"));
    };
    match row.phase {
        Phase::Suggested => (!is_baseline(&endpoint, row)).then(|| superseded(&endpoint, row)),
        Phase::Submitting => submitting(reader, now_ms, row),
        Phase::Training => training(reader, row),
        Phase::Evaluating => Some(evaluating(reader, &endpoint, row)),
        Phase::Gate => gate(reader, row),
        Phase::Queued => queued(reader, &endpoint, row),
        Phase::Canary => canary(reader, row),
        _ => None,
    }
}

/// The job of a retraining, as it is known by now.
pub(super) fn job_of(reader: &dyn Reader, row: &Retraining) -> Option<JobId> {
    row.job
        .map(JobId)
        .or_else(|| mobula_scheduler::job_of_key(reader, &row.job_key()))
}

/// How a job stands; absent if it is not known any more.
pub(super) fn job_view(reader: &dyn Reader, job: JobId) -> Option<JobView> {
    match mobula_scheduler::answer(reader, 0, SchedulerQuery::Job { job }) {
        Ok(QueryResponse::Job(view)) => Some(view),
        _ => None,
    }
}

fn is_baseline(endpoint: &Endpoint, row: &Retraining) -> bool {
    endpoint.version == row.baseline.version
}

fn superseded(endpoint: &Endpoint, row: &Retraining) -> Next {
    Next::to(
        Phase::Cancelled,
        format!(
            "{}:{} is active now, and this is about {}:{}",
            row.model, endpoint.version, row.model, row.baseline.version
        ),
    )
}

fn submitting(reader: &dyn Reader, now_ms: u64, row: &Retraining) -> Option<Next> {
    if let Some(job) = mobula_scheduler::job_of_key(reader, &row.job_key()) {
        return Some(Next {
            found: Found::Job(job),
            ..Next::to(Phase::Training, format!("{job} was submitted"))
        });
    }
    if find_policy_row(reader, &row.endpoint).is_none() {
        return Some(Next::to(Phase::Cancelled, "the policy was removed"));
    }
    (now_ms >= row.since_ms().saturating_add(SUBMIT_MS_MAX)).then(|| {
        Next::to(
            Phase::Failed,
            format!(
                "the job could not be submitted within {} s: the leading head's log says why",
                SUBMIT_MS_MAX / 1000
            ),
        )
    })
}

fn training(reader: &dyn Reader, row: &Retraining) -> Option<Next> {
    let job = job_of(reader, row)?;
    let failed = |reason: String| Some(Next::to(Phase::Failed, reason));
    let Some(view) = job_view(reader, job) else {
        return failed(format!("{job} is not known any more"));
    };
    if !view.finished {
        return None;
    }
    if view.state != "succeeded" {
        let why = view
            .exit_reason
            .unwrap_or_else(|| "no reason is known".to_owned());
        return failed(format!("{job} {}: {why}", view.state));
    }
    let result: Option<JobResult> = view
        .result
        .and_then(|text| serde_json::from_str(&text).ok());
    let version = result
        .filter(|result| result.model.as_deref() == Some(&row.model))
        .and_then(|result| result.model_version);
    let Some(version) = version else {
        return failed(format!("{job} registered no version of {}", row.model));
    };
    Some(Next {
        found: Found::Candidate(version),
        ..Next::to(
            Phase::Evaluating,
            format!("{job} registered {}:{version}", row.model),
        )
    })
}

fn candidate_of(reader: &dyn Reader, row: &Retraining) -> Result<ModelVersion, Next> {
    find_version(reader, &row.model, row.candidate)
        .map_err(|error| Next::to(Phase::Failed, error.message))
}

fn evaluating(reader: &dyn Reader, endpoint: &Endpoint, row: &Retraining) -> Next {
    if !is_baseline(endpoint, row) {
        return superseded(endpoint, row);
    }
    let candidate = match candidate_of(reader, row) {
        Ok(candidate) => candidate,
        Err(failed) => return failed,
    };
    let active = match find_version(reader, &row.model, Some(row.baseline.version)) {
        Ok(active) => active,
        Err(error) => return Next::to(Phase::Failed, error.message),
    };
    let (new, old) = (&candidate.description, &active.description);
    if new.weights_blake3 == old.weights_blake3 {
        return Next::to(
            Phase::NotBetter,
            format!(
                "{}:{} has the weights of the active version: the job's data is what it was",
                row.model, candidate.version
            ),
        );
    }
    let comparison = match compare(&row.terms, new, old) {
        Ok(comparison) => comparison,
        Err(reason) => return Next::to(Phase::Failed, reason),
    };
    let reason = comparison.described(row.terms.min_gain);
    let step = if !comparison.is_better {
        Next::to(Phase::NotBetter, reason)
    } else if let Some(waits_for) = waits_for_stage(reader, row, &candidate) {
        Next::to(Phase::Gate, format!("{reason}; {waits_for}"))
    } else {
        Next::to(Phase::Queued, reason)
    };
    Next {
        found: Found::Comparison(comparison),
        ..step
    }
}

/// The stage that a version must have: what the retrain policy says, and for a model that nobody decides on
/// alone at least that somebody has signed it into staging.
fn needed_stage(row: &Retraining, policy: &Policy) -> Stage {
    let is_signed_by_several = policy.risk == Risk::High || policy.signatures > 1;
    match row.terms.gate {
        Stage::Candidate if is_signed_by_several => Stage::Staging,
        gate => gate,
    }
}

/// What a version waits for before it may be tried; absent if for nothing.
fn waits_for_stage(
    reader: &dyn Reader,
    row: &Retraining,
    candidate: &ModelVersion,
) -> Option<String> {
    let policy = model_state(reader, &row.model).policy;
    let (stage, needed) = (
        standing(reader, candidate).stage,
        needed_stage(row, &policy),
    );
    if stage >= needed {
        return None;
    }
    let edge = match stage {
        Stage::Candidate => Stage::Staging,
        _ => needed,
    };
    Some(format!(
        "waits for a signature: {}:{} is {} and has to become {}, signed by {} with the role `{}` (`mobula \
         models promote {}:{} --to {}`)",
        row.model,
        candidate.version,
        stage.as_str(),
        needed.as_str(),
        match policy.signatures {
            1 => "a key".to_owned(),
            several => format!("{several} different keys"),
        },
        stage.role_to(edge).as_str(),
        row.model,
        candidate.version,
        edge.as_str(),
    ))
}

fn gate(reader: &dyn Reader, row: &Retraining) -> Option<Next> {
    let candidate = match candidate_of(reader, row) {
        Ok(candidate) => candidate,
        Err(failed) => return Some(failed),
    };
    let stage = standing(reader, &candidate).stage;
    let name = format!("{}:{}", row.model, candidate.version);
    if stage == Stage::Archived {
        return Some(Next::to(Phase::Cancelled, format!("{name} was archived")));
    }
    waits_for_stage(reader, row, &candidate)
        .is_none()
        .then(|| Next::to(Phase::Queued, format!("{name} is {}", stage.as_str())))
}

/// Why a rollout cannot begin yet.
fn busy(rollout: &Rollout) -> Option<String> {
    let what = if rollout.phase.is_open() {
        "is under way"
    } else if rollout.cleanup != Cleanup::Done {
        "is being cleaned up after"
    } else {
        return None;
    };
    Some(format!("rollout {} of the endpoint {what}", rollout.number))
}

/// What an endpoint's next rollout waits for.
fn occupied(reader: &dyn Reader, endpoint: &str) -> Option<String> {
    rollouts::newest(reader, endpoint)
        .and_then(|rollout| busy(&rollout))
        .or_else(|| {
            experiments::unfinished(reader, endpoint).map(|experiment| {
                format!(
                    "experiment {} of the endpoint is not over",
                    experiment.number
                )
            })
        })
}

fn queued(reader: &dyn Reader, endpoint: &Endpoint, row: &Retraining) -> Option<Next> {
    if !is_baseline(endpoint, row) {
        return Some(superseded(endpoint, row));
    }
    if occupied(reader, &row.endpoint).is_some() {
        return None;
    }
    let candidate = match candidate_of(reader, row) {
        Ok(candidate) => candidate,
        Err(failed) => return Some(failed),
    };
    // Also after the gate somebody may take it out of use.
    if standing(reader, &candidate).stage == Stage::Archived {
        let reason = format!("{}:{} was archived", row.model, candidate.version);
        return Some(Next::to(Phase::Cancelled, reason));
    }
    // And the model's policy may have come to ask for more.
    if waits_for_stage(reader, row, &candidate).is_some() {
        return None;
    }
    Some(Next::to(
        Phase::Canary,
        format!("{}:{} is tried on requests", row.model, candidate.version),
    ))
}

fn canary(reader: &dyn Reader, row: &Retraining) -> Option<Next> {
    let tried = rollouts::history(reader, &row.endpoint)
        .into_iter()
        .find(|rollout| Some(rollout.number) == row.rollout);
    let Some(rollout) = tried else {
        return Some(Next::to(Phase::Failed, "its rollout is not known any more"));
    };
    let said = |action: Action| {
        let decision = rollout
            .decisions
            .iter()
            .rev()
            .find(|decision| decision.action == action);
        decision
            .and_then(|decision| decision.evidence.as_ref())
            .map_or_else(
                || "a client decided".to_owned(),
                |found| found.reason.clone(),
            )
    };
    let number = rollout.number;
    match rollout.phase {
        RolloutPhase::Running | RolloutPhase::Paused => None,
        RolloutPhase::Promoted => Some(Next::to(
            Phase::Promoted,
            format!("rollout {number} passed: {}", said(Action::Promote)),
        )),
        RolloutPhase::Aborted => Some(Next::to(
            Phase::RolledBack,
            format!("rollout {number} was ended by a client"),
        )),
        RolloutPhase::RolledBack => Some(Next::to(
            Phase::RolledBack,
            format!(
                "rollout {number} was rolled back: {}",
                said(Action::RollBack)
            ),
        )),
    }
}

/// What a retraining that takes no step waits for, for people.
pub(super) fn waits_for(reader: &dyn Reader, row: &Retraining) -> Option<String> {
    match row.phase {
        Phase::Suggested => Some(format!(
            "a client's word: `mobula drift retrain {0}`, or `mobula drift cancel {0}`",
            row.endpoint
        )),
        Phase::Submitting => Some("its job to be submitted".to_owned()),
        Phase::Training => job_of(reader, row).map(|job| format!("the end of {job}")),
        Phase::Gate => candidate_of(reader, row)
            .ok()
            .and_then(|candidate| waits_for_stage(reader, row, &candidate)),
        Phase::Queued => occupied(reader, &row.endpoint).or_else(|| {
            let candidate = candidate_of(reader, row).ok()?;
            waits_for_stage(reader, row, &candidate)
        }),
        Phase::Canary => Some(format!(
            "the verdict on rollout {} (`mobula rollout status {}`)",
            row.rollout.unwrap_or_default(),
            row.endpoint
        )),
        _ => None,
    }
}
