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
    Apply, actor, check_name, group, kept, lifecycle, namespace, overloaded, precondition, stopping,
};
use crate::command::Response;
use crate::limits::{
    FINISHED_JOBS_KEPT, GRACE_MS_MAX, JOB_SPEC_BYTES_MAX, JOB_SPEC_ENTRIES_MAX, JOB_STOP_GRACE_MS,
    LIVE_ACTORS_MAX, LIVE_JOBS_MAX, RESULT_BYTES_MAX,
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
            "{id} is not known (the latest {FINISHED_JOBS_KEPT} ended jobs are kept): see `mobula \
             jobs list`"
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
    check_spec(&spec)?;
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
    let id = JobId(Counter::LastJob.increment(apply.txn));
    Counter::LiveJobs.increment(apply.txn);
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

fn check_spec(spec: &JobSpec) -> Result<(), Rejection> {
    check_name("the job's name", &spec.name)?;
    if let Some(key) = &spec.idempotency_key {
        check_name("the idempotency key", key)?;
    }
    let env_bytes: usize = spec
        .env
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    let secret_bytes: usize = spec
        .secrets
        .iter()
        .map(|(name, secret)| name.len() + secret.size_bytes())
        .sum();
    let size = spec.args.iter().map(String::len).sum::<usize>() + env_bytes + secret_bytes;
    if size > JOB_SPEC_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "arguments, environment and secrets of job `{}` have {size} bytes, the limit is \
             {JOB_SPEC_BYTES_MAX}: pass a file or an object instead",
            spec.name
        )));
    }
    let entries = spec.args.len().max(spec.env.len() + spec.secrets.len());
    if entries > JOB_SPEC_ENTRIES_MAX {
        return Err(Rejection::invalid(format!(
            "job `{}` has {entries} arguments or environment variables and secrets, the limit is \
             {JOB_SPEC_ENTRIES_MAX}: pass a file or an object instead",
            spec.name
        )));
    }
    mobula_core::spec::check_files(&spec.files)
        .map_err(|why| Rejection::invalid(format!("files of job `{}`: {why}", spec.name)))?;
    for file in &spec.files {
        check_blake3(&format!("the hash of file `{}`", file.name), &file.blake3)?;
    }
    if let Program::Artifact { blake3, .. } = &spec.program {
        check_blake3("the program's hash", blake3)?;
    }
    check_process_text(spec)?;
    check_restart("the driver", &spec.restart)?;
    group::check_placement("the driver", &spec.resources, &spec.placement)
}

fn check_blake3(what: &str, hash: &str) -> Result<(), Rejection> {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if hash.len() == 64 && hash.bytes().all(is_hex) {
        return Ok(());
    }
    let shown: String = hash.chars().take(80).collect();
    Err(Rejection::invalid(format!(
        "{what} is `{shown}`, not BLAKE3: expected 64 lower-case hexadecimal digits"
    )))
}

/// Refuses what no process can be started with; each worker would find that out in turn.
fn check_process_text(spec: &JobSpec) -> Result<(), Rejection> {
    let variable = |name: &&String| name.is_empty() || name.contains(['=', '\0']);
    if let Some(name) = spec.env.keys().chain(spec.secrets.keys()).find(variable) {
        return Err(Rejection::invalid(format!(
            "`{}` cannot name an environment variable: give it a name without `=` and NUL",
            name.escape_debug()
        )));
    }
    if let Some(name) = spec
        .secrets
        .keys()
        .find(|name| spec.env.contains_key(*name))
    {
        return Err(Rejection::invalid(format!(
            "`{name}` is both a secret and a variable of the environment: name one of them \
             differently"
        )));
    }
    let texts = spec.args.iter().chain(spec.env.values());
    if let Some(text) = texts.into_iter().find(|text| text.contains('\0')) {
        return Err(Rejection::invalid(format!(
            "the argument or environment value `{}` contains NUL, which ends a text for the \
             operating system: leave it out",
            text.escape_debug()
        )));
    }
    Ok(())
}

/// Refuses a back-off that nobody lives to see the end of.
pub(crate) fn check_restart(what: &str, restart: &RestartPolicy) -> Result<(), Rejection> {
    let longest = restart.backoff_max_ms;
    if longest > GRACE_MS_MAX {
        return Err(Rejection::invalid(format!(
            "{what} waits up to {longest} ms before a restart, the limit is {GRACE_MS_MAX} ms (one \
             day): lower backoff_max_ms"
        )));
    }
    Ok(())
}

fn driver_spec(spec: &JobSpec) -> ActorSpec {
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
    forget_secrets(apply, job.id);
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
    if Counter::FinishedJobs.increment(apply.txn) > FINISHED_JOBS_KEPT {
        forget_oldest(apply);
    }
}

/// Nothing of an ended job is started again.
fn forget_secrets(apply: &mut Apply<'_>, id: JobId) {
    let spec = load_spec(apply.txn, id);
    if !spec.secrets.is_empty() {
        let secrets = Default::default();
        row::put(
            apply.txn,
            JOB_SPECS,
            &id.to_key(),
            &JobSpec { secrets, ..spec },
        );
    }
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
        if let Some(key) = load_spec(apply.txn, id).idempotency_key {
            apply.txn.delete(JOBS_BY_KEY, key.as_bytes());
        }
        apply.txn.delete(JOB_SPECS, &id.to_key());
        apply.txn.delete(JOB_SUBMITTERS, &id.to_key());
        apply.txn.delete(JOBS, &id.to_key());
        apply.txn.delete(JOBS_FINISHED, &key);
        Counter::FinishedJobs.decrement(apply.txn);
    }
}
