//! Detached actors: those that live on when the job that made them ends.
//!
//! Processes, certificates and permissions belong to jobs, so detached actors have one of their own:
//! made on demand, in the creator's namespace, with its program, environment, files and secrets, and
//! without a driver. To workers and hosts it is a job like any other.
//!
//! Invariants:
//! 1. A detached actor sees what its creator's job saw: only creators of equal specification (as far as
//!    it concerns their actors) share such a job. Sealed secrets are never equal between submissions,
//!    so that one which was renewed is not mistaken for the one before.
//! 2. It ends with its last detached actor. What those have created meanwhile ends with it.
//! 3. The end of the creator's job does not concern it.

use mobula_core::control::Reader;
use mobula_core::spec::{ActorSpec, JobSpec, PlacementPolicy, RestartPolicy};
use mobula_core::{ErrorCode, JobId, Rejection, Resources};

use super::{Apply, held, job, namespace, overloaded, precondition};
use crate::limits::{DETACHED_JOBS_MAX, LIVE_JOBS_MAX, LIVING_BYTES_MAX};
use crate::row;
use crate::row::{Counter, JOB_SPECS};

/// Whether these are detached; refuses a mixture, and what could not be found or called again.
pub(crate) fn check(
    reader: &dyn Reader,
    job: JobId,
    specs: &[ActorSpec],
) -> Result<bool, Rejection> {
    let count = specs.iter().filter(|spec| spec.detached).count();
    if count == 0 {
        return Ok(false);
    }
    if count < specs.len() {
        return Err(Rejection::invalid(format!(
            "{count} of these {} actors are detached, and they would belong to different jobs: create \
             the others by themselves",
            specs.len()
        )));
    }
    if specs.iter().any(|spec| spec.name.is_none()) {
        return Err(Rejection::invalid(
            "a detached actor has no name, so that nobody would find it when its creator is gone: give \
             it one",
        ));
    }
    if namespace::of_job(reader, job).is_none() {
        return Err(precondition(format!(
            "{job} is in no namespace, where a detached actor is found and called by other jobs: \
             submit it with one (`mobula submit --namespace`)"
        )));
    }
    Ok(true)
}

/// The open job that keeps the detached actors of `creator`, made now if there is none; the new ones hold
/// `actors_bytes`. Refuses before anything is written.
pub(crate) fn home(
    apply: &mut Apply<'_>,
    creator: JobId,
    actors_bytes: u64,
) -> Result<JobId, Rejection> {
    let spec = keeping_spec(apply.txn, creator);
    let entry = spec
        .namespace
        .as_ref()
        .expect("only jobs in a namespace create detached actors");
    let row = namespace::load(apply.txn, &entry.name)
        .expect("a namespace lives as long as its jobs, and the creator is open");
    let is_home =
        |id: &JobId| job::is_open(apply.txn, *id) && job::load_spec(apply.txn, *id) == spec;
    if let Some(home) = row.detached_jobs.iter().copied().find(is_home) {
        return Ok(home);
    }
    if row.detached_jobs.len() >= DETACHED_JOBS_MAX {
        return Err(Rejection::new(
            ErrorCode::Overloaded,
            format!(
                "namespace `{}` has {} jobs that keep detached actors, one for each program, \
                 environment and set of secrets, and the limit is {DETACHED_JOBS_MAX}: stop one of \
                 them (`mobula jobs list`)",
                entry.name,
                row.detached_jobs.len()
            ),
        ));
    }
    if Counter::LiveJobs.value(apply.txn) >= LIVE_JOBS_MAX {
        return Err(overloaded(
            "jobs under way",
            LIVE_JOBS_MAX,
            "create the actor when some have ended",
        ));
    }
    let job_bytes = held::job_bytes(&spec, None);
    let added_bytes = job_bytes + actors_bytes;
    held::check_living(
        apply.txn,
        "detached actors with a job of their own",
        added_bytes,
        LIVING_BYTES_MAX,
    )?;
    let id = JobId(Counter::LastJob.increment(apply.txn));
    Counter::LiveJobs.increment(apply.txn);
    Counter::LivingBytes.add(apply.txn, job_bytes);
    row::put(apply.txn, JOB_SPECS, &id.to_key(), &spec);
    let namespace = namespace::enter(apply, entry, id, true);
    job::store_keeping(apply, id, spec.name.clone(), namespace);
    Ok(id)
}

/// What of a job's specification concerns its detached actors.
fn keeping_spec(reader: &dyn Reader, creator: JobId) -> JobSpec {
    let spec = job::load_spec(reader, creator);
    let name = spec
        .namespace
        .as_ref()
        .map_or_else(String::new, |entry| format!("detached-{}", entry.name));
    JobSpec {
        name,
        args: Vec::new(),
        resources: Resources::default(),
        placement: PlacementPolicy::default(),
        restart: RestartPolicy::NEVER,
        idempotency_key: None,
        retry_errors: false,
        ..spec
    }
}
