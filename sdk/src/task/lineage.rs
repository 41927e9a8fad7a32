//! Lost values of tasks are produced again, by executing the task again.
//!
//! A value can be lost when it lives in the memory of a node. What the task needs for another
//! execution, its arguments and the objects they refer to, is kept as long as the value is and may
//! be produced again; those objects are produced again in the same way when the new execution finds
//! them lost.
//!
//! Invariants:
//! 1. Executions for lost values count with those that were lost themselves: over the whole life of a
//!    value its task is executed `1 + max_retries` times at most, however often the value is lost.
//! 2. The chain of values that are produced again ends, because each needs only older ones.
//! 3. One loss is one execution, however many notice it: the object makes sure of that.

use std::sync::Arc;

use mobula_core::object::ObjectError;
use mobula_host::objects::{Completer, Lineage};

use super::pool::Pool;
use super::record::{TaskDescription, TaskRecord};
use super::tries::Tries;
use crate::cluster::Cluster;

/// The lineage of a value that `task` has brought after these `tries`.
pub(super) fn of(
    task: Arc<TaskDescription>,
    tries: Tries,
    pool: &Arc<Pool>,
    cluster: &Cluster,
) -> Arc<dyn Lineage> {
    match tries.after_lost_value() {
        Some(tries) => Arc::new(TaskLineage {
            task,
            tries,
            pool: Arc::clone(pool),
            cluster: cluster.clone(),
        }),
        None => Arc::new(NoneLeft {
            max_retries: tries.policy.max_retries,
        }),
    }
}

/// How one value is produced again.
struct TaskLineage {
    task: Arc<TaskDescription>,
    /// With the execution that is due then.
    tries: Tries,
    pool: Arc<Pool>,
    cluster: Cluster,
}

impl Lineage for TaskLineage {
    fn recreate(&self, completer: Completer, reason: &str) {
        tracing::info!(object = %completer.id(), %reason, "a task runs again for its lost value");
        let record = TaskRecord::for_lost_value(Arc::clone(&self.task), self.tries, completer);
        self.pool.submit_after(&self.cluster, record, Vec::new());
    }
}

/// A value that is not produced again: its task was executed as often as it may be. Nothing of the
/// task is kept for it.
struct NoneLeft {
    max_retries: u32,
}

impl Lineage for NoneLeft {
    fn recreate(&self, completer: Completer, reason: &str) {
        let object = completer.id();
        let reason = format!(
            "{reason}, and its task has none of its {} retries left; allow more with `max_retries`",
            self.max_retries
        );
        completer.fail(ObjectError::Lost { object, reason });
    }
}
