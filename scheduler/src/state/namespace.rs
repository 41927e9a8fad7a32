//! Namespaces: whose they are, and which jobs are in them.
//!
//! Invariants:
//! 1. A namespace takes the jobs of one principal, the one that entered it first, for as long as a job
//!    in it is not over. Then its row goes, and the name is anybody's.
//! 2. Its incarnation is the index of the entry that began it: what was certified for an earlier life
//!    of the name is not of this one.
//! 3. A name in it belongs to one living actor, whichever of its jobs made that.

use mobula_core::control::Reader;
use mobula_core::namespace::{Namespace, NamespaceEntry, check_namespace};
use mobula_core::{ErrorCode, Incarnation, JobId, Rejection};
use serde::{Deserialize, Serialize};

use super::job::{self, JobRow};
use super::{Apply, check_name, overloaded, token};
use crate::limits::NAMESPACES_MAX;
use crate::row::{self, Counter, NAMESPACES};

/// A namespace with at least one job that is not over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NamespaceRow {
    pub(crate) incarnation: Incarnation,
    pub(crate) owner: String,
    /// Jobs in it that are not over.
    pub(crate) jobs: u32,
    /// Those of them that keep detached actors, oldest first.
    pub(crate) detached_jobs: Vec<JobId>,
}

pub(crate) fn load(reader: &dyn Reader, name: &str) -> Option<NamespaceRow> {
    row::get(reader, NAMESPACES, name.as_bytes())
}

/// The namespace of a job, also of one that is over.
pub(crate) fn of_job(reader: &dyn Reader, job: JobId) -> Option<Namespace> {
    job::load(reader, job)?.namespace
}

/// Whose namespaces the bearer of the token with this hash enters, if it is good: those of the principal
/// that it was made for, or else of the token alone.
pub fn owner(
    reader: &dyn Reader,
    secret_hash: &[u8; 32],
    now_ms: u64,
) -> Result<String, Rejection> {
    let token = token::usable(reader, secret_hash, now_ms)?;
    Ok(token.principal.unwrap_or(token.id))
}

/// Whether the two are different jobs of one namespace.
pub(crate) fn is_shared(reader: &dyn Reader, one: JobId, other: JobId) -> bool {
    let namespace = of_job(reader, one);
    one != other && namespace.is_some() && namespace == of_job(reader, other)
}

/// Refuses a job that may not enter. Whether it may is asked before anything is written.
pub(crate) fn check_entry(reader: &dyn Reader, entry: &NamespaceEntry) -> Result<(), Rejection> {
    let NamespaceEntry { name, principal } = entry;
    check_namespace(name).map_err(Rejection::invalid)?;
    check_name("the principal of a namespace", principal)?;
    match load(reader, name) {
        Some(row) if row.owner != *principal => Err(Rejection::new(
            ErrorCode::PermissionDenied,
            format!(
                "namespace `{name}` belongs to `{}` as long as a job lives in it, and this job comes \
                 from `{principal}`: submit it with that token, or choose another namespace",
                row.owner
            ),
        )),
        None if Counter::Namespaces.value(reader) >= NAMESPACES_MAX => Err(overloaded(
            "namespaces in use",
            NAMESPACES_MAX,
            "use one of them, or submit again when the jobs of one have ended",
        )),
        _ => Ok(()),
    }
}

/// A new job enters; [`check_entry`] said that it may.
pub(crate) fn enter(
    apply: &mut Apply<'_>,
    entry: &NamespaceEntry,
    job: JobId,
    keeps_detached: bool,
) -> Namespace {
    let mut row = load(apply.txn, &entry.name).unwrap_or_else(|| {
        Counter::Namespaces.increment(apply.txn);
        NamespaceRow {
            incarnation: Incarnation(apply.context.index),
            owner: entry.principal.clone(),
            jobs: 0,
            detached_jobs: Vec::new(),
        }
    });
    row.jobs += 1;
    if keeps_detached {
        row.detached_jobs.push(job);
    }
    row::put(apply.txn, NAMESPACES, entry.name.as_bytes(), &row);
    Namespace {
        name: entry.name.clone(),
        incarnation: row.incarnation,
    }
}

/// A job is over. The namespace goes with its last one.
pub(crate) fn leave(apply: &mut Apply<'_>, job: &JobRow) {
    let Some(Namespace { name, .. }) = &job.namespace else {
        return;
    };
    let mut row = load(apply.txn, name).expect("a namespace lives as long as its jobs");
    row.jobs = row
        .jobs
        .checked_sub(1)
        .expect("what leaves was counted when it entered");
    row.detached_jobs.retain(|id| *id != job.id);
    if row.jobs == 0 {
        Counter::Namespaces.decrement(apply.txn);
        apply.txn.delete(NAMESPACES, name.as_bytes());
    } else {
        row::put(apply.txn, NAMESPACES, name.as_bytes(), &row);
    }
}
