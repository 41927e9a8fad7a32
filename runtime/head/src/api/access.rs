//! What a host process may read (I14): its own job, of the other jobs in its namespace where their
//! actors are, and nothing of any other's.
//!
//! A job's code is its submitter's, and its certificate was made for that job. Clients and heads may
//! read everything, and so may processes of the system's own job, which serve all jobs.
//!
//! Writes are not decided here but in `StateModule::authorize`.

use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::JobId;
use mobula_scheduler::{Query, QueryResponse};
use tonic::Status;

use super::rejected;
use crate::context::HeadContext;

/// The only job that `caller` may read of; `None` where it may read of all.
pub(super) fn only_job(caller: &Caller) -> Option<JobId> {
    match caller {
        Caller::Host {
            job: JobId::SYSTEM, ..
        } => None,
        Caller::Host { job, .. } => Some(*job),
        Caller::Client | Caller::Node(_) | Caller::Head => None,
    }
}

/// Refuses a caller that may not read of `job`.
pub(super) fn may_read(caller: &Caller, job: JobId) -> Result<(), Status> {
    match only_job(caller) {
        Some(own) if own != job => Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            format!(
                "a process of {own} may not read what belongs to {job}: use a client token to look \
                 at other jobs"
            ),
        ))),
        _ => Ok(()),
    }
}

/// Refuses a caller that may not know where the actors of `job` are: those of its namespace it may
/// call.
pub(super) async fn may_find(
    context: &HeadContext,
    caller: &Caller,
    job: JobId,
) -> Result<(), Status> {
    let refused = may_read(caller, job);
    if let (Err(_), Some(own)) = (&refused, only_job(caller)) {
        let query = Query::SharesNamespace {
            job: own,
            other: job,
        };
        if let QueryResponse::IsShared(true) = context.ask(query).await? {
            return Ok(());
        }
    }
    refused
}

/// Refuses a host of any job; `what` is shown to people.
pub(super) fn not_for_jobs(caller: &Caller, what: &str) -> Result<(), Status> {
    match only_job(caller) {
        Some(own) => Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            format!("{what} is not for processes of {own}: use a client token"),
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::id::NodeId;

    #[test]
    fn a_host_reads_its_own_job_and_the_systems_hosts_read_all() {
        let host = |job| Caller::Host {
            job,
            node: NodeId(1),
        };
        let cases = [
            (host(JobId(3)), JobId(3), true),
            (host(JobId(3)), JobId(4), false),
            (host(JobId(3)), JobId::SYSTEM, false),
            (host(JobId::SYSTEM), JobId(3), true),
            (Caller::Client, JobId(3), true),
            (Caller::Head, JobId(3), true),
        ];
        for (caller, job, allowed) in cases {
            let found = may_read(&caller, job);
            assert_eq!(found.is_ok(), allowed, "{caller:?} of {job}: {found:?}");
        }
    }
}
