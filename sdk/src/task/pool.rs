//! The tasks of this process that need the same kind of slot: those that wait, and the slots that
//! it holds for them.
//!
//! Invariants:
//! 1. Tasks begin in the order in which they were submitted, except those that are pushed again.
//! 2. At most [`TASKS_WAITING_MAX`] tasks wait; beyond that submitting fails.
//! 3. A pool without tasks gives its slots back and then has nothing that runs.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use mobula_core::error::CallError;
use mobula_core::id::JobId;
use mobula_core::object::ObjectId;
use mobula_core::resource::Resources;
use mobula_core::spec::PlacementPolicy;
use mobula_host::mailbox::Deadline;
use mobula_host::objects::Object;
use parking_lot::Mutex;
use tokio::sync::{Notify, broadcast};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::record::TaskRecord;
use crate::cluster::Cluster;

/// Tasks that wait in one pool: at some hundred bytes each, and their arguments.
pub(crate) const TASKS_WAITING_MAX: usize = 1 << 20;

/// Pools of one process. Each kind of slot needs one; a program that makes up resources for every
/// task would hold a slot for every task.
const POOLS_MAX: usize = 256;

/// Cancellations that a slot's driver may not have seen yet. One that falls behind by more looks
/// at none of them: cancelling is asking, and may come too late in any case.
const CANCELLATIONS_MAX: usize = 4096;

fn refuse(record: TaskRecord) {
    let capacity = TASKS_WAITING_MAX as u32;
    let actor = String::new();
    record.fail(CallError::Overloaded { actor, capacity }, None);
}

/// What the slots of one pool have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SlotKind {
    pub(crate) resources: Resources,
    pub(crate) placement: PlacementPolicy,
}

/// All pools of a process. Looked through one by one at each submission: a program has a handful, and
/// comparing two kinds costs less than making a key of one.
#[derive(Default)]
pub(crate) struct TaskPools(Mutex<Vec<(JobId, Arc<Pool>)>>);

impl TaskPools {
    /// The pool for `kind`, made at first use.
    pub(crate) fn get(&self, job: JobId, kind: &SlotKind) -> Result<Arc<Pool>, CallError> {
        let mut pools = self.0.lock();
        let known = pools
            .iter()
            .find(|(of, pool)| *of == job && pool.kind == *kind);
        if let Some((_, pool)) = known {
            return Ok(Arc::clone(pool));
        }
        if pools.len() >= POOLS_MAX {
            pools.retain(|(_, pool)| !pool.is_idle());
        }
        if pools.len() >= POOLS_MAX {
            return Err(CallError::Overloaded {
                actor: "the kinds of slots that tasks of this process ask for".to_owned(),
                capacity: POOLS_MAX as u32,
            });
        }
        let pool = Arc::new(Pool::new(kind.clone()));
        pools.push((job, Arc::clone(&pool)));
        Ok(pool)
    }

    /// The pools of `job`.
    pub(super) fn of_job(&self, job: JobId) -> Vec<Arc<Pool>> {
        let pools = self.0.lock();
        let of_job = pools.iter().filter(|(of, _)| *of == job);
        of_job.map(|(_, pool)| Arc::clone(pool)).collect()
    }

    /// Ends the task whose value `id` is to be, if this process submitted it.
    pub(crate) fn cancel(&self, id: ObjectId, forced: bool) {
        let pools = self.0.lock().clone();
        for (_, pool) in pools {
            pool.cancel(id, forced);
        }
    }
}

/// The tasks that need one kind of slot.
pub(crate) struct Pool {
    pub(crate) kind: SlotKind,
    pub(super) state: Mutex<PoolState>,
    /// Told when a task waits: one slot's driver takes it.
    pub(super) work: Notify,
    /// Tasks under way that are not wanted any more, and whether that is forced.
    pub(super) cancellations: broadcast::Sender<(ObjectId, bool)>,
    /// Owns what runs for the pool.
    pub(super) running: TaskTracker,
}

#[derive(Default)]
pub(super) struct PoolState {
    waiting: VecDeque<TaskRecord>,
    /// Tasks that wait for what they need.
    dependent: HashMap<ObjectId, TaskRecord>,
    /// Slots that take tasks.
    pub(super) slots: usize,
    /// Those of them that have none.
    pub(super) idle: usize,
    /// Slots that were asked for and do not take tasks yet.
    pub(super) coming: usize,
    /// Somebody asks for slots.
    pub(super) leasing: bool,
    /// Starts of slots that failed since the last one that did not.
    pub(super) failures: u32,
}

impl PoolState {
    pub(super) fn waiting_count(&self) -> usize {
        self.waiting.len()
    }
}

impl Pool {
    fn new(kind: SlotKind) -> Self {
        Pool {
            kind,
            state: Mutex::default(),
            work: Notify::new(),
            cancellations: broadcast::Sender::new(CANCELLATIONS_MAX),
            running: TaskTracker::new(),
        }
    }

    fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.waiting.is_empty()
            && state.dependent.is_empty()
            && state.slots == 0
            && state.coming == 0
            && !state.leasing
    }

    /// Takes a task that begins when `after` have their values. `cluster` is that of whoever
    /// submits it.
    pub(crate) fn submit_after(
        self: &Arc<Self>,
        cluster: &Cluster,
        record: TaskRecord,
        after: Vec<Object>,
    ) {
        let (id, deadline) = (record.object(), record.deadline);
        let is_ready = |object: &Object| matches!(object.outcome(), Some(Ok(_)));
        if after.iter().all(is_ready) {
            return self.submit(cluster, record);
        }
        {
            let mut state = self.state.lock();
            if state.waiting.len() + state.dependent.len() >= TASKS_WAITING_MAX {
                drop(state);
                return refuse(record);
            }
            state.dependent.insert(id, record);
        }
        let (pool, cluster) = (Arc::clone(self), cluster.clone());
        self.running.spawn(async move {
            pool.wait_for_dependencies(&cluster, id, deadline, &after)
                .await;
        });
    }

    /// Takes a task, which begins when a slot is free.
    fn submit(self: &Arc<Self>, cluster: &Cluster, record: TaskRecord) {
        let deadline = record.deadline;
        {
            let mut state = self.state.lock();
            if state.waiting.len() >= TASKS_WAITING_MAX {
                drop(state);
                return refuse(record);
            }
            state.waiting.push_back(record);
            self.lease_if_short(&mut state, cluster);
        }
        self.work.notify_one();
        if let Some(deadline) = deadline {
            // Ends at the deadline; a task that found a slot by then is not here any more.
            let pool = Arc::clone(self);
            self.running.spawn(async move {
                tokio::time::sleep_until(deadline.at).await;
                pool.expire();
            });
        }
    }

    async fn wait_for_dependencies(
        self: &Arc<Self>,
        cluster: &Cluster,
        id: ObjectId,
        deadline: Option<Deadline>,
        after: &[Object],
    ) {
        let all = async {
            for object in after {
                object.wait().await?;
            }
            Ok(())
        };
        let outcome = match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.at, all).await.ok(),
            None => Some(all.await),
        };
        // One that was cancelled meanwhile is not here any more.
        let Some(mut record) = self.state.lock().dependent.remove(&id) else {
            return;
        };
        record.waited_for("what it needs", Instant::now());
        record.wait();
        match (outcome, deadline) {
            (Some(Ok(())), _) => self.submit(cluster, record),
            (Some(Err(error)), _) => record.fail_with(error),
            (None, Some(deadline)) => record.fail_late(deadline),
            (None, None) => {}
        }
    }

    /// Ends a task: at once if it is not under way, and otherwise by way of its slot.
    pub(super) fn cancel(&self, id: ObjectId, forced: bool) {
        let found = {
            let mut state = self.state.lock();
            let place = state.waiting.iter().position(|task| task.object() == id);
            match place {
                Some(place) => state.waiting.remove(place),
                None => state.dependent.remove(&id),
            }
        };
        match found {
            Some(record) => record.fail_cancelled(),
            // Fails only while there is no slot that could have it.
            None => drop(self.cancellations.send((id, forced))),
        }
    }

    /// Puts tasks back that are to be pushed again, in front and in their order.
    pub(super) fn put_back(self: &Arc<Self>, cluster: &Cluster, records: Vec<TaskRecord>) {
        let count = records.len();
        {
            let mut state = self.state.lock();
            for mut record in records.into_iter().rev() {
                record.wait();
                state.waiting.push_front(record);
            }
            self.lease_if_short(&mut state, cluster);
        }
        for _ in 0..count {
            self.work.notify_one();
        }
    }

    /// The name of the task that is next.
    pub(super) fn next_name(&self) -> Option<&'static str> {
        self.state
            .lock()
            .waiting
            .front()
            .map(|record| record.name())
    }

    /// Takes the next tasks out, up to `count` of them that are still wanted.
    pub(super) fn take(&self, count: usize) -> Vec<TaskRecord> {
        let records: Vec<_> = {
            let mut state = self.state.lock();
            let count = count.min(state.waiting.len());
            state.waiting.drain(..count).collect()
        };
        let now = Instant::now();
        for record in &records {
            record.waited_for("a slot", now);
        }
        let is_wanted = |record: &TaskRecord| {
            let is_late = record.deadline.is_some_and(|deadline| deadline.at <= now);
            !is_late && !record.is_unread()
        };
        if records.iter().all(is_wanted) {
            return records;
        }
        let (wanted, unwanted): (Vec<_>, Vec<_>) = records.into_iter().partition(is_wanted);
        for record in unwanted {
            match record.deadline {
                Some(deadline) if deadline.at <= now => record.fail_late(deadline),
                _ => record.fail_cancelled(),
            }
        }
        wanted
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.state.lock().waiting.len()
    }

    fn expire(&self) {
        let now = Instant::now();
        let late = |record: &TaskRecord| record.deadline.is_some_and(|limit| limit.at <= now);
        let late: Vec<_> = {
            let mut state = self.state.lock();
            if !state.waiting.iter().any(late) {
                return;
            }
            let (late, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut state.waiting)
                .into_iter()
                .partition(late);
            state.waiting = rest.into();
            late
        };
        for record in late {
            if let Some(deadline) = record.deadline {
                record.fail_late(deadline);
            }
        }
    }

    /// Nothing will ever run the tasks that wait: says why.
    pub(super) fn fail_waiting(&self, error: &CallError) {
        let waiting = std::mem::take(&mut self.state.lock().waiting);
        for record in waiting {
            record.fail(error.clone(), None);
        }
    }
}
