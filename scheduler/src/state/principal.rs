//! In whose name things are asked for: who submitted a job, and whose a token is.
//!
//! Invariants:
//! 1. A job's submitter is written once, in the entry that makes the job, and goes with the job.
//! 2. Tokens that were made for one principal act as that principal: who has two of them is one person.

use mobula_core::JobId;
use mobula_core::control::{Origin, Reader, Txn};

use super::token::TokenRow;
use crate::command::Response;
use crate::row::{self, JOB_SUBMITTERS, TOKENS};

/// What stands before the job's number in the name of a host's certificate.
const OF_JOB: &str = "/job/";

/// The principal in whose name a call comes: of a token that which it was made for, of a job's process
/// whoever submitted the job, and else the name itself.
#[must_use]
pub fn principal_of(reader: &dyn Reader, name: &str) -> String {
    if let Some(principal) = of_token(reader, name) {
        return principal;
    }
    job_of(name)
        .and_then(|job| job_submitter(reader, job))
        .unwrap_or_else(|| name.to_owned())
}

/// With whose sessions those of this caller are counted: a job's processes with each other, so that one that opens too
/// many keeps nobody from stopping it, and all others with those of their principal.
pub(crate) fn session_holder(reader: &dyn Reader, name: &str) -> String {
    if let Some(principal) = of_token(reader, name) {
        return principal;
    }
    job_of(name).map_or_else(|| name.to_owned(), |job| job.to_string())
}

/// Whose the token of this name is, if it is one's.
fn of_token(reader: &dyn Reader, name: &str) -> Option<String> {
    let token = row::get::<TokenRow>(reader, TOKENS, name.as_bytes())?;
    Some(token.principal.unwrap_or(token.id))
}

/// The job in the name of a host's certificate.
fn job_of(name: &str) -> Option<JobId> {
    let (_, job) = name.rsplit_once(OF_JOB)?;
    job.parse().ok().map(JobId)
}

/// The principal in whose name a job was submitted; `None` for jobs that are not known any more, and for
/// those that the heads made themselves.
#[must_use]
pub fn job_submitter(reader: &dyn Reader, job: JobId) -> Option<String> {
    row::get(reader, JOB_SUBMITTERS, &job.to_key())
}

/// Writes down who submitted a job, if `response` says that one was made.
pub(crate) fn note_submitter(txn: &mut dyn Txn, origin: &Origin, response: &Response) {
    if let Response::JobSubmitted {
        job, created: true, ..
    } = response
    {
        let principal = principal_of(txn, &origin.principal);
        row::put(txn, JOB_SUBMITTERS, &job.to_key(), &principal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Role;
    use crate::memory_txn::MemoryTables;

    fn token(id: &str, principal: Option<&str>) -> TokenRow {
        TokenRow {
            id: id.to_owned(),
            secret_hash: [0; 32],
            role: Role::Client,
            expires_at_ms: 0,
            uses_left: None,
            ends_with: String::new(),
            principal: principal.map(str::to_owned),
        }
    }

    #[test]
    fn tokens_and_jobs_act_in_the_name_of_whoever_they_come_from() {
        let mut tables = MemoryTables::default();
        for row in [token("client-1", Some("ann")), token("client-2", None)] {
            row::put(&mut tables, TOKENS, row.id.clone().as_bytes(), &row);
        }
        let origin = Origin {
            principal: "client-1".to_owned(),
            call: "SubmitJob".to_owned(),
        };
        let made = |job, created| Response::JobSubmitted {
            job: JobId(job),
            driver: mobula_core::ActorId(1),
            created,
        };
        note_submitter(&mut tables, &origin, &made(7, true));
        note_submitter(&mut tables, &origin, &made(8, false));
        for (name, expected) in [
            ("client-1", "ann"),
            ("client-2", "client-2"),
            ("gone", "gone"),
            ("spiffe://c/host/7-3/2/job/7", "ann"),
            ("spiffe://c/host/7-3/2/job/8", "spiffe://c/host/7-3/2/job/8"),
        ] {
            assert_eq!(principal_of(&tables, name), expected);
        }
        for (name, expected) in [
            ("client-1", "ann"),
            ("client-2", "client-2"),
            ("spiffe://c/host/7-3/2/job/7", "job-7"),
            ("spiffe://c/head/1/1", "spiffe://c/head/1/1"),
        ] {
            assert_eq!(session_holder(&tables, name), expected);
        }
    }
}
