//! Jobs.

use std::time::Duration;

use mobula_core::control::{Caller, Subject};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::{ActorId, Incarnation, JobId};
use mobula_core::spec::{JobSpec, Program};
use mobula_scheduler::{Command, Query, QueryResponse, Response};
use mobula_wire::control::{self as api, Empty};
use tonic::Status;

use super::access::{may_read, only_job};
use super::artifacts::artifact_id;
use super::modules::{WAIT_MAX, stamp};
use super::{page, rejected, status as make_status, views};
use crate::context::HeadContext;

/// How often a waiter looks again even though nothing woke it: wake-ups are hints.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Pending jobs of a list that are explained: each explanation looks at every node.
const EXPLAINED_MAX: usize = 100;

/// `principal` is in whose name the job enters its namespace, if it names one.
pub(super) async fn submit(
    context: &HeadContext,
    caller: &Caller,
    principal: String,
    request: api::SubmitJobRequest,
) -> Result<api::SubmitJobReply, Status> {
    let mut spec = request
        .spec
        .ok_or_else(|| Rejection::invalid("the request has no job in it"))
        .and_then(JobSpec::try_from)
        .map_err(|rejection| rejected(&rejection))?;
    if let Program::Artifact { blake3, size_bytes } = &spec.program {
        require_artifact(context, "program", blake3, *size_bytes).await?;
    }
    // Refused before the store is asked once for each of them.
    mobula_core::spec::check_files(&spec.files)
        .map_err(|why| rejected(&Rejection::invalid(why)))?;
    for file in &spec.files {
        let what = format!("file `{}`", file.name);
        require_artifact(context, &what, &file.blake3, file.size_bytes).await?;
    }
    if let Some(entry) = &mut spec.namespace {
        entry.principal = principal;
    }
    context
        .seal_secrets(&mut spec)
        .map_err(|rejection| rejected(&rejection))?;
    let command = Command::SubmitJob { spec };
    context.authorize_scheduler(caller, &command)?;
    let (session, seq) = stamp(context, caller, request.stamp).await?;
    match context.propose_scheduler(session, seq, &command).await? {
        Response::JobSubmitted { job, driver, .. } => Ok(api::SubmitJobReply {
            job: job.0,
            driver: driver.0,
        }),
        other => Err(unexpected(&other)),
    }
}

/// What a job names must be stored before the job exists.
async fn require_artifact(
    context: &HeadContext,
    what: &str,
    blake3: &str,
    size_bytes: u64,
) -> Result<(), Status> {
    let id = artifact_id(blake3, size_bytes).map_err(|rejection| rejected(&rejection))?;
    let present = context.artifacts.contains(&id).await.map_err(|error| {
        make_status(
            ErrorCode::Unavailable,
            "no",
            format!("the {what} cannot be looked up: {error}"),
        )
    })?;
    if present {
        return Ok(());
    }
    Err(rejected(&Rejection::new(
        ErrorCode::FailedPrecondition,
        format!("no {what} with BLAKE3 {blake3} is stored: upload it first (`mobula submit` does)"),
    )))
}

/// An answer of the scheduler that does not fit the question: a defect.
pub(super) fn unexpected(response: &Response) -> Status {
    make_status(
        ErrorCode::Internal,
        "yes",
        format!("unexpected answer {response:?}"),
    )
}

pub(super) async fn list(
    context: &HeadContext,
    caller: &Caller,
    request: api::ListJobsRequest,
) -> Result<api::ListJobsReply, Status> {
    if let Some(own) = only_job(caller) {
        let jobs = vec![view(context, own).await?];
        let next_page_token = String::new();
        return Ok(api::ListJobsReply {
            jobs,
            next_page_token,
        });
    }
    let query = Query::ListJobs {
        after: page::after(&request.page_token)?.map(JobId),
        limit: request.page_size,
    };
    let QueryResponse::Jobs(found) = context.ask(query).await? else {
        return Err(Status::internal("the scheduler answered another question"));
    };
    let found = found.into_iter().map(|view| (view.job.0, views::job(view)));
    let (mut jobs, next_page_token) = page::of(found, request.page_size);
    jobs.retain(|job| JobId(job.id) != JobId::SYSTEM);
    let pending = jobs.iter_mut().filter(|job| job.state == "pending");
    for job in pending.take(EXPLAINED_MAX) {
        job.pending_reason = pending_reason(context, JobId(job.id)).await?;
    }
    Ok(api::ListJobsReply {
        jobs,
        next_page_token,
    })
}

/// What keeps a job's driver pending.
async fn pending_reason(context: &HeadContext, job: JobId) -> Result<Option<String>, Status> {
    match context.ask(Query::ExplainJob { job }).await? {
        QueryResponse::Explained(why) => Ok(Some(why.verdict)),
        _ => Ok(None),
    }
}

/// A job, with what keeps its driver pending.
pub(super) async fn view(context: &HeadContext, job: JobId) -> Result<api::Job, Status> {
    let QueryResponse::Job(view) = context.ask(Query::Job { job }).await? else {
        return Err(Status::internal("the scheduler answered another question"));
    };
    let mut message = views::job(view);
    if message.state == "pending" {
        message.pending_reason = pending_reason(context, job).await?;
    }
    Ok(message)
}

pub(super) async fn get(
    context: &HeadContext,
    caller: &Caller,
    request: api::GetJobRequest,
) -> Result<api::Job, Status> {
    may_read(caller, JobId(request.job))?;
    let mut message = view(context, JobId(request.job)).await?;
    if message.ended_ms.is_none() {
        message.storage_problem = context.store_health.problem().await;
    }
    Ok(message)
}

pub(super) async fn wait(
    context: &HeadContext,
    caller: &Caller,
    request: api::WaitJobRequest,
) -> Result<api::Job, Status> {
    let job = JobId(request.job);
    may_read(caller, job)?;
    let limit = Duration::from_millis(request.timeout_ms).min(WAIT_MAX);
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let mut ticket = context.changes.follow(Subject::Job(job));
        let now = view(context, job).await?;
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        if now.ended_ms.is_some() || left.is_zero() {
            return Ok(now);
        }
        // Woken, or time to look: both go round again.
        let _ = tokio::time::timeout(left.min(LOOK_AGAIN), ticket.changed()).await;
    }
}

pub(super) async fn stop(
    context: &HeadContext,
    caller: &Caller,
    request: api::StopJobRequest,
) -> Result<Empty, Status> {
    let command = Command::StopJob {
        job: JobId(request.job),
    };
    context.change(caller, request.stamp, command).await
}

pub(super) async fn set_result(
    context: &HeadContext,
    caller: &Caller,
    request: api::SetJobResultRequest,
) -> Result<Empty, Status> {
    let command = Command::SetJobResult {
        job: JobId(request.job),
        actor: ActorId(request.driver),
        incarnation: Incarnation(request.incarnation),
        result_json: request.result_json,
    };
    context.change(caller, request.stamp, command).await
}
