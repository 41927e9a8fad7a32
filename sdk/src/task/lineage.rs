//! Lost values of tasks are produced again, by executing the task again.
//!
//! A value can be lost when it lives in the memory of a node. What the task needs for another
//! execution, its arguments and the objects they refer to, is kept as long as the value is; those
//! objects are produced again in the same way when the new execution finds them lost.
//!
//! Invariants:
//! 1. A value is produced again at most as often as its task may be executed again, and never with
//!    `max_retries(0)`.
//! 2. The chain of values that are produced again ends, because each needs only older ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mobula_host::objects::{Completer, Lineage};

use super::pool::Pool;
use super::record::{TaskDescription, TaskRecord};
use crate::cluster::Cluster;

/// How one value is produced again.
pub(super) struct TaskLineage {
    task: Arc<TaskDescription>,
    pool: Arc<Pool>,
    cluster: Cluster,
    times: AtomicU32,
}

impl TaskLineage {
    /// The lineage of a value of `task`, if it may be executed again.
    pub(super) fn of(
        task: Arc<TaskDescription>,
        pool: &Arc<Pool>,
        cluster: &Cluster,
    ) -> Option<Arc<dyn Lineage>> {
        let may_run_again = task.policy.max_retries > 0;
        may_run_again.then(|| {
            Arc::new(TaskLineage {
                task,
                pool: Arc::clone(pool),
                cluster: cluster.clone(),
                times: AtomicU32::new(0),
            }) as Arc<dyn Lineage>
        })
    }
}

impl Lineage for TaskLineage {
    fn recreate(&self, completer: Completer, reason: &str) {
        let times = self.times.fetch_add(1, Ordering::AcqRel);
        if times >= self.task.policy.max_retries {
            // Dropping the completer says that the value is lost.
            return;
        }
        tracing::info!(object = %completer.id(), %reason, "a task runs again for its lost value");
        let record = TaskRecord::new(Arc::clone(&self.task), None, completer, None);
        self.pool.submit_after(&self.cluster, record, Vec::new());
    }
}
