//! Jobs: a driver and everything it started.
//!
//! Invariants:
//! 1. The driver's end decides the job's outcome, once; a later stop does not change it (I5).
//! 2. A job is over when the last of its actors has ended, and no actor is created in it after
//!    its outcome is known.
//! 3. [`JobId::SYSTEM`] is there from the start, has no driver, and never ends.
//! 4. A job that keeps detached actors has no driver either; the end of its last detached actor takes
//!    the place of the driver's ([`super::detached`]).

use mobula_core::control::{ModuleId, Reader, Subject};
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::namespace::Namespace;
use mobula_core::spec::{ActorKind, ActorSpec, JobSpec, PlacementPolicy, Program, RestartPolicy};
use mobula_core::{ActorId, ErrorCode, ExitReason, Incarnation, JobId, Rejection, Resources};
use serde::{Deserialize, Serialize};

use super::{
    Apply, actor, held, job_checks, kept, lifecycle, namespace, overloaded, precondition, stopping,
};
use crate::command::Response;
use crate::limits::{
    ENDED_JOBS_BYTES_MAX, FINISHED_JOBS_KEPT, JOB_STOP_GRACE_MS, LIVE_ACTORS_MAX, LIVE_JOBS_MAX,
    LIVING_BYTES_MAX, RESULT_BYTES_MAX, RESULTS_HEADROOM_BYTES,
};
use crate::row::{self, Counter, JOB_SPECS, JOB_SUBMITTERS, JOBS, JOBS_BY_KEY, JOBS_FINISHED};

/// A job, without its specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JobRow {
    pub(crate) id: JobId,
    pub(crate) name: String,
    pub(crate) driver: Option<ActorId>,
    pub(crate) state: JobState,
    pub(crate) submitted_ms: u64,
    pub(crate) started_ms: Option<u64>,
    pub(crate) ended_ms: Option<u64>,
    pub(crate) driver_restarts: u32,
    pub(crate) actor_restarts: u32,
    pub(crate) live_actors: u32,
    pub(crate) result_json: Option<String>,
    pub(crate) exit_reason: Option<ExitReason>,
    pub(crate) namespace: Option<Namespace>,
    /// Only in a job that keeps detached actors: how many of them have not ended.
    pub(crate) detached_actors: Option<u32>,
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum JobState {
    /// Its driver has not started yet.
    Pending,
    Running,
    /// Its outcome is known, its last actors are ending.
    Stopping(Outcome),
    Over(Outcome),
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    Succeeded,
    Failed,
    Stopped,
}

impl JobState {
    pub(crate) fn is_open(self) -> bool {
        matches!(self, JobState::Pending | JobState::Running)
    }
}

pub(crate) fn load(reader: &dyn Reader, id: JobId) -> Option<JobRow> {
    let stored = row::get(reader, JOBS, &id.to_key());
    if id == JobId::SYSTEM {
        Some(stored.unwrap_or_else(system))
    } else {
        stored
    }
}

/// The system job before anything was written about it.
fn system() -> JobRow {
    JobRow {
        id: JobId::SYSTEM,
        name: "system".to_owned(),
        driver: None,
        state: JobState::Running,
        submitted_ms: 0,
        started_ms: None,
        ended_ms: None,
        driver_restarts: 0,
        actor_restarts: 0,
        live_actors: 0,
        result_json: None,
        exit_reason: None,
        namespace: None,
        detached_actors: None,
    }
}

/// At most `rows` jobs with an id larger than `after`.
pub(crate) fn page(reader: &dyn Reader, after: Option<JobId>, rows: usize) -> Vec<JobRow> {
    let after = after.map(JobId::to_key);
    let found = reader.scan(JOBS, &[], after.as_ref().map(|key| key.as_slice()), rows);
    found
        .iter()
        .map(|(_, value)| row::from_bytes(JOBS, value))
        .collect()
}

/// What `id` was asked to be.
pub(crate) fn load_spec(reader: &dyn Reader, id: JobId) -> JobSpec {
    if id == JobId::SYSTEM {
        return JobSpec {
            name: "system".to_owned(),
            program: Program::Builtin,
            args: Vec::new(),
            env: Default::default(),
            resources: Resources::default(),
            placement: PlacementPolicy::default(),
            restart: RestartPolicy::NEVER,
            idempotency_key: None,
            files: Vec::new(),
            retry_errors: false,
            secrets: Default::default(),
            namespace: None,
        };
    }
    row::get(reader, JOB_SPECS, &id.to_key()).expect("every job row has its specification")
}

pub(crate) fn require(reader: &dyn Reader, id: JobId) -> Result<JobRow, Rejection> {
    load(reader, id).ok_or_else(|| {
        Rejection::not_found(format!(
            "{id} is not known (the latest ended jobs are kept, at most {FINISHED_JOBS_KEPT}): see \
             `mobula jobs list`"
        ))
    })
}

/// Whether actors of `id` may be started.
pub(crate) fn is_open(reader: &dyn Reader, id: JobId) -> bool {
    load(reader, id).is_some_and(|job| job.state.is_open())
}

pub(crate) fn store(apply: &mut Apply<'_>, job: &JobRow) {
    row::put(apply.txn, JOBS, &job.id.to_key(), job);
    apply.changed(Subject::Job(job.id));
}

pub(crate) fn submit(apply: &mut Apply<'_>, spec: JobSpec) -> Result<Response, Rejection> {
    job_checks::check_spec(&spec)?;
    if let Some(response) = submitted_before(apply.txn, &spec)? {
        return Ok(response);
    }
    if let Some(entry) = &spec.namespace {
        namespace::check_entry(apply.txn, entry)?;
    }
    if Counter::LiveJobs.value(apply.txn) >= LIVE_JOBS_MAX {
        return Err(overloaded(
            "jobs under way",
            LIVE_JOBS_MAX,
            "submit again when some have ended",
        ));
    }
    if Counter::LiveActors.value(apply.txn) >= LIVE_ACTORS_MAX {
        return Err(overloaded(
            "actors",
            LIVE_ACTORS_MAX,
            "submit again when some have ended",
        ));
    }
    let added_bytes = held::job_bytes(&spec, None);
    held::check_living(apply.txn, "this job", added_bytes, LIVING_BYTES_MAX)?;
    let id = JobId(Counter::LastJob.increment(apply.txn));
    Counter::LiveJobs.increment(apply.txn);
    Counter::LivingBytes.add(apply.txn, added_bytes);
    if let Some(key) = &spec.idempotency_key {
        row::put(apply.txn, JOBS_BY_KEY, key.as_bytes(), &id);
    }
    row::put(apply.txn, JOB_SPECS, &id.to_key(), &spec);
    let entry = spec.namespace.as_ref();
    let namespace = entry.map(|entry| namespace::enter(apply, entry, id, false));
    let driver = lifecycle::create(apply, id, &driver_spec(&spec), None);
    let submitted_ms = apply.now_ms();
    let job = JobRow {
        id,
        name: spec.name,
        driver: Some(driver),
        state: JobState::Pending,
        submitted_ms,
        live_actors: 1,
        namespace,
        ..system()
    };
    store(apply, &job);
    Ok(Response::JobSubmitted {
        job: id,
        driver,
        created: true,
    })
}

/// Stores a new job that keeps detached actors, of which there are none yet.
pub(crate) fn store_keeping(apply: &mut Apply<'_>, id: JobId, name: String, namespace: Namespace) {
    let now_ms = apply.now_ms();
    let job = JobRow {
        id,
        name,
        // There is no driver to wait for.
        state: JobState::Running,
        submitted_ms: now_ms,
        started_ms: Some(now_ms),
        namespace: Some(namespace),
        detached_actors: Some(0),
        ..system()
    };
    store(apply, &job);
}

/// The job that was submitted with this idempotency key, as long as it is kept.
#[must_use]
pub fn of_key(reader: &dyn Reader, key: &str) -> Option<JobId> {
    row::get(reader, JOBS_BY_KEY, key.as_bytes())
}

fn submitted_before(reader: &dyn Reader, spec: &JobSpec) -> Result<Option<Response>, Rejection> {
    let Some(key) = &spec.idempotency_key else {
        return Ok(None);
    };
    let Some(job) = of_key(reader, key).filter(|_| !is_planted(Mutant::KeyIgnored)) else {
        return Ok(None);
    };
    // Secrets are not compared: they are gone when the job is over, and may have been renewed.
    let without_secrets = |spec: JobSpec| JobSpec {
        secrets: Default::default(),
        ..spec
    };
    if without_secrets(load_spec(reader, job)) != without_secrets(spec.clone()) {
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "{job} was submitted with idempotency key `{key}` and another specification: submit \
                 the same one, or choose another key"
            ),
        ));
    }
    let driver = load(reader, job)
        .and_then(|row| row.driver)
        .expect("a job is kept as long as its key, and was submitted with a driver");
    Ok(Some(Response::JobSubmitted {
        job,
        driver,
        created: false,
    }))
}

/// What a job's driver is asked to be.
pub(super) fn driver_spec(spec: &JobSpec) -> ActorSpec {
    ActorSpec {
        resources: spec.resources.clone(),
        placement: spec.placement.clone(),
        restart: spec.restart.clone(),
        isolated: true,
        ..ActorSpec::new(ActorKind::Driver)
    }
}

pub(crate) fn stop(apply: &mut Apply<'_>, id: JobId) -> Result<Response, Rejection> {
    if id == JobId::SYSTEM {
        return Err(precondition(format!(
            "{id} is the platform itself and cannot be stopped: stop its actors, or delete the \
             endpoints and monitors that own them"
        )));
    }
    let job = require(apply.txn, id)?;
    let is_over = matches!(job.state, JobState::Over(_));
    if job.state.is_open() || (is_over && is_planted(Mutant::OutcomeOverwritten)) {
        decide(apply, job, Outcome::Stopped, ExitReason::Stopped);
    }
    Ok(Response::Done)
}

pub(crate) fn set_result(
    apply: &mut Apply<'_>,
    id: JobId,
    driver: ActorId,
    incarnation: Incarnation,
    result_json: String,
) -> Result<Response, Rejection> {
    let size = result_json.len();
    if size > RESULT_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "the result of {id} has {size} bytes, the limit is {RESULT_BYTES_MAX}: store it as an \
             object or a checkpoint and name that in the result"
        )));
    }
    let mut job = require(apply.txn, id)?;
    if job.driver != Some(driver) {
        return Err(Rejection::invalid(format!(
            "{driver} is not the driver of {id}: only the driver sets the job's result"
        )));
    }
    if !is_planted(Mutant::StaleResultAccepted) {
        stopping::check_incarnation(&actor::require(apply.txn, driver)?, incarnation)?;
    }
    // It counts with its job: what an earlier result had comes free.
    let before = job.result_json.as_ref().map_or(0, String::len) as u64;
    let after = result_json.len() as u64;
    let limit_bytes = LIVING_BYTES_MAX + RESULTS_HEADROOM_BYTES;
    let added_bytes = after.saturating_sub(before);
    held::check_living(apply.txn, "this result", added_bytes, limit_bytes)?;
    Counter::LivingBytes.add(apply.txn, after);
    Counter::LivingBytes.subtract(apply.txn, before);
    job.result_json = Some(result_json);
    store(apply, &job);
    Ok(Response::Done)
}

pub(crate) fn driver_started(apply: &mut Apply<'_>, id: JobId) {
    let mut job = load(apply.txn, id).expect("an actor's job exists");
    if job.state == JobState::Pending {
        job.state = JobState::Running;
        job.started_ms = Some(apply.now_ms());
        store(apply, &job);
    }
}

pub(crate) fn count_restart(apply: &mut Apply<'_>, id: JobId, driver: bool) {
    let mut job = load(apply.txn, id).expect("an actor's job exists");
    let count = if driver {
        &mut job.driver_restarts
    } else {
        &mut job.actor_restarts
    };
    *count = count.saturating_add(1);
    store(apply, &job);
}

/// An actor of the job is over for good.
pub(crate) fn actor_ended(apply: &mut Apply<'_>, ended: &actor::ActorRow, reason: &ExitReason) {
    let mut job = load(apply.txn, ended.job).expect("an actor's job exists");
    job.live_actors = job
        .live_actors
        .checked_sub(1)
        .expect("what ends was counted when created");
    if let Some(detached) = job.detached_actors.as_mut().filter(|_| ended.detached) {
        *detached = detached
            .checked_sub(1)
            .expect("what ends was counted when created");
    }
    store(apply, &job);
    match job.state {
        JobState::Pending | JobState::Running if ended.driver || job.detached_actors == Some(0) => {
            let outcome = match reason {
                ExitReason::Completed => Outcome::Succeeded,
                ExitReason::Stopped => Outcome::Stopped,
                _ => Outcome::Failed,
            };
            decide(apply, job, outcome, reason.clone());
        }
        JobState::Stopping(outcome) if job.live_actors == 0 => finish(apply, job, outcome),
        _ => {}
    }
}

/// The outcome is known: stop what still lives, and finish when nothing does.
fn decide(apply: &mut Apply<'_>, mut job: JobRow, outcome: Outcome, reason: ExitReason) {
    let id = job.id;
    job.state = JobState::Stopping(outcome);
    job.exit_reason = Some(reason);
    store(apply, &job);
    if job.live_actors == 0 {
        return finish(apply, job, outcome);
    }
    let actors: Vec<ActorId> = actor::ids_of_job(apply.txn, id).collect();
    for actor in actors {
        // The last one that ends finishes the job, after which some rows may be gone.
        if let Some(actor) = actor::load(apply.txn, actor) {
            stopping::stop(apply, actor, JOB_STOP_GRACE_MS);
        }
    }
}

fn finish(apply: &mut Apply<'_>, mut job: JobRow, outcome: Outcome) {
    forget_secrets(apply, &job);
    if kept::forget(apply.txn, job.id) {
        apply.changed(Subject::Module(ModuleId::KEPT));
    }
    namespace::leave(apply, &job);
    job.state = JobState::Over(outcome);
    job.ended_ms = Some(apply.now_ms());
    store(apply, &job);
    apply.job_ended(job.id);
    Counter::LiveJobs.decrement(apply.txn);
    let finished = Counter::LastFinished.increment(apply.txn);
    row::put(
        apply.txn,
        JOBS_FINISHED,
        &row::pair(finished, job.id.0),
        &(),
    );
    Counter::FinishedJobs.increment(apply.txn);
    while are_too_many(apply.txn) {
        forget_oldest(apply);
    }
}

/// Nothing of an ended job is started again. What is left counts as ended from here on.
fn forget_secrets(apply: &mut Apply<'_>, job: &JobRow) {
    let mut spec = load_spec(apply.txn, job.id);
    let result = job.result_json.as_deref();
    Counter::LivingBytes.subtract(apply.txn, held::job_bytes(&spec, result));
    if !spec.secrets.is_empty() {
        spec.secrets.clear();
        row::put(apply.txn, JOB_SPECS, &job.id.to_key(), &spec);
    }
    Counter::EndedJobBytes.add(apply.txn, held::job_bytes(&spec, result));
}

/// Whether more ended jobs are kept than may be, in number or in bytes.
fn are_too_many(reader: &dyn Reader) -> bool {
    Counter::FinishedJobs.value(reader) > FINISHED_JOBS_KEPT
        || Counter::EndedJobBytes.value(reader) > ENDED_JOBS_BYTES_MAX
}

/// Removes the job that ended first, with its actors and its idempotency key.
fn forget_oldest(apply: &mut Apply<'_>) {
    let forgotten = Counter::ForgottenJobs.value(apply.txn);
    let after = row::pair(forgotten, u64::MAX);
    for (key, _) in apply.txn.scan(JOBS_FINISHED, &[], Some(&after), 1) {
        Counter::ForgottenJobs.set(apply.txn, row::number_at(&key, 0));
        let id = JobId(row::number_at(&key, 1));
        let actors: Vec<ActorId> = actor::ids_of_job(apply.txn, id).collect();
        for actor in actors {
            let actor = actor::load(apply.txn, actor).expect("the index names rows that exist");
            lifecycle::forget(apply, &actor);
        }
        let spec = load_spec(apply.txn, id);
        let job = load(apply.txn, id).expect("the list of ended jobs names rows that exist");
        let ended_bytes = held::job_bytes(&spec, job.result_json.as_deref());
        Counter::EndedJobBytes.subtract(apply.txn, ended_bytes);
        if let Some(key) = spec.idempotency_key {
            apply.txn.delete(JOBS_BY_KEY, key.as_bytes());
        }
        apply.txn.delete(JOB_SPECS, &id.to_key());
        apply.txn.delete(JOB_SUBMITTERS, &id.to_key());
        apply.txn.delete(JOBS, &id.to_key());
        apply.txn.delete(JOBS_FINISHED, &key);
        Counter::FinishedJobs.decrement(apply.txn);
    }
}
