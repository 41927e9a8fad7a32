//! Where it is decided which checkpoints count: the replicated table, as those who save and restore see it.

use futures::future::BoxFuture;
use mobula::Cluster;
use mobula_core::control::ModuleId;
use mobula_core::{ErrorCode, JobId};
use serde::{Deserialize, Serialize};

use super::client;
use super::preemptions::JobPreemptions;
use super::state::{CheckpointCommand, CheckpointQuery, JobCheckpoints};

/// Why a checkpoint was not saved or restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CheckpointError {
    /// The store or the head does not do it now; the same order may succeed later.
    #[error("{0}")]
    Unavailable(String),
    /// A newer driver has taken over: stop.
    #[error("fenced: {0}")]
    Fenced(String),
    /// It was refused for good.
    #[error("{0}")]
    Refused(String),
}

/// The table.
pub trait Ledger: Send + Sync + 'static {
    /// Applies a command exactly once.
    fn apply<'a>(
        &'a self,
        command: &'a CheckpointCommand,
    ) -> BoxFuture<'a, Result<(), CheckpointError>>;

    /// What is known of a job.
    fn list(&self, job: JobId) -> BoxFuture<'_, Result<JobCheckpoints, CheckpointError>>;

    /// What a job's drivers did about notices.
    fn preemptions(&self, job: JobId) -> BoxFuture<'_, Result<JobPreemptions, CheckpointError>>;
}

impl Ledger for Cluster {
    fn apply<'a>(
        &'a self,
        command: &'a CheckpointCommand,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(async move {
            let applied = Cluster::apply(self, ModuleId::CHECKPOINT, command.encode()).await;
            applied.map(drop).map_err(|error| head_error(&error))
        })
    }

    fn list(&self, job: JobId) -> BoxFuture<'_, Result<JobCheckpoints, CheckpointError>> {
        Box::pin(committed(self, job))
    }

    fn preemptions(&self, job: JobId) -> BoxFuture<'_, Result<JobPreemptions, CheckpointError>> {
        Box::pin(async move {
            let asked = client::preemptions(self, job).await;
            asked.map_err(|error| head_error(&error))
        })
    }
}

/// What the head knows of a job's checkpoints.
pub async fn committed(cluster: &Cluster, job: JobId) -> Result<JobCheckpoints, CheckpointError> {
    let query = CheckpointQuery::List { job }.encode();
    let answer = cluster
        .query(ModuleId::CHECKPOINT, query)
        .await
        .map_err(|error| head_error(&error))?;
    JobCheckpoints::decode(&answer)
        .map_err(|error| CheckpointError::Refused(format!("list of checkpoints: {error}")))
}

fn head_error(error: &mobula::Error) -> CheckpointError {
    match error.code() {
        Some(ErrorCode::Fenced) => CheckpointError::Fenced(error.to_string()),
        // Also a session that the head forgot: every command here may be sent twice.
        Some(
            ErrorCode::Unavailable
            | ErrorCode::DeadlineExceeded
            | ErrorCode::Overloaded
            | ErrorCode::SessionExpired,
        ) => CheckpointError::Unavailable(error.to_string()),
        _ => CheckpointError::Refused(error.to_string()),
    }
}

/// The table in memory, as a head applies commands to it.
#[cfg(test)]
pub(crate) mod memory {
    use mobula_core::Rejection;
    use mobula_core::control::{ApplyContext, StateModule};
    use mobula_scheduler::memory_txn::MemoryTables;
    use parking_lot::Mutex;

    use super::*;
    use crate::checkpoint::CheckpointModule;

    /// A head that knows checkpoints only.
    #[derive(Default)]
    pub(crate) struct MemoryLedger {
        tables: Mutex<(MemoryTables, u64)>,
        /// Whether it answers nobody.
        pub(crate) is_away: Mutex<bool>,
    }

    impl MemoryLedger {
        fn reach(&self) -> Result<(), CheckpointError> {
            if *self.is_away.lock() {
                return Err(CheckpointError::Unavailable("no head answers".to_owned()));
            }
            Ok(())
        }
    }

    impl Ledger for MemoryLedger {
        fn apply<'a>(
            &'a self,
            command: &'a CheckpointCommand,
        ) -> BoxFuture<'a, Result<(), CheckpointError>> {
            Box::pin(async move {
                self.reach()?;
                let mut tables = self.tables.lock();
                tables.1 += 1;
                let context = ApplyContext {
                    index: tables.1,
                    term: 1,
                    now_ms: tables.1,
                };
                let applied: Result<_, Rejection> =
                    tables
                        .0
                        .apply(&CheckpointModule, &context, &command.encode());
                applied.map(drop).map_err(|refused| match refused.code {
                    ErrorCode::Fenced => CheckpointError::Fenced(refused.message),
                    _ => CheckpointError::Refused(refused.message),
                })
            })
        }

        fn list(&self, job: JobId) -> BoxFuture<'_, Result<JobCheckpoints, CheckpointError>> {
            Box::pin(async move {
                self.reach()?;
                let query = CheckpointQuery::List { job }.encode();
                let tables = self.tables.lock();
                let answer = CheckpointModule
                    .query(&tables.0, 0, &query)
                    .expect("the question is well formed");
                Ok(JobCheckpoints::decode(&answer).expect("the module spells it"))
            })
        }

        fn preemptions(
            &self,
            job: JobId,
        ) -> BoxFuture<'_, Result<JobPreemptions, CheckpointError>> {
            Box::pin(async move {
                self.reach()?;
                let query = CheckpointQuery::Preemptions { job }.encode();
                let tables = self.tables.lock();
                let answer = CheckpointModule
                    .query(&tables.0, 0, &query)
                    .expect("the question is well formed");
                let known = mobula_core::codec::decode(&answer, answer.len());
                Ok(known.expect("the module spells it"))
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_waited_for() {
        let refusal = |code| mobula::Error::Control {
            operation: "commit".to_owned(),
            code,
            message: "no".to_owned(),
            executed: mobula_core::error::Executed::Unknown,
        };
        for code in [
            ErrorCode::Unavailable,
            ErrorCode::Overloaded,
            ErrorCode::SessionExpired,
        ] {
            let judged = head_error(&refusal(code));
            assert!(
                matches!(judged, CheckpointError::Unavailable(_)),
                "{judged}"
            );
        }
        let judged = head_error(&refusal(ErrorCode::PermissionDenied));
        assert!(matches!(judged, CheckpointError::Refused(_)), "{judged}");
    }
}
