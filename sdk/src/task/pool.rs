//! The tasks of this process that need the same kind of slot: those that wait, and the slots that
//! it holds for them.
//!
//! Invariants:
//! 1. Tasks begin in the order in which they were submitted; one that is pushed again, or waited for
//!    what it needs, stands in front of those that came after it.
//! 2. At most [`TASKS_WAITING_MAX`] tasks wait; beyond that submitting fails.
//! 3. A pool without tasks gives its slots back and then has nothing that runs.
//! 4. Whoever cancels a task finds it in line, or its slot's driver hears of it: there is no moment
//!    in which it is neither, and nothing of which a driver does not hear because it is slow.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use mobula_core::error::CallError;
use mobula_core::id::JobId;
use mobula_core::object::ObjectId;
use mobula_core::resource::Resources;
use mobula_core::spec::PlacementPolicy;
use mobula_host::mailbox::Deadline;
use mobula_host::objects::Object;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::queue::WaitingQueue;
use super::record::TaskRecord;
use super::under_way::UnderWay;
use crate::cluster::Cluster;

/// Tasks that wait in one pool: at some hundred bytes each, and their arguments.
pub(crate) const TASKS_WAITING_MAX: usize = 1 << 20;

/// Pools of one process. Each kind of slot needs one; a program that makes up resources for every
/// task would hold a slot for every task.
const POOLS_MAX: usize = 256;

/// How long whoever ends late tasks sleeps at most: so long after the last task with a limit it is
/// gone, however far off that limit was.
const LOOK_MAX: Duration = Duration::from_secs(1);

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
    /// A limit was set that is reached before the next look for late tasks.
    sooner: Notify,
    /// Owns what runs for the pool.
    pub(super) running: TaskTracker,
}

#[derive(Default)]
pub(super) struct PoolState {
    waiting: WaitingQueue<TaskRecord>,
    /// Tasks that wait for what they need.
    dependent: HashMap<ObjectId, TaskRecord>,
    /// What slots have, as long as they are driven.
    under_way: Vec<Weak<UnderWay>>,
    /// When late tasks are looked for next, if somebody does that.
    look: Option<Instant>,
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

    /// Whether as many tasks wait, for whatever, as may.
    fn is_full(&self) -> bool {
        self.waiting.len() + self.dependent.len() >= TASKS_WAITING_MAX
    }
}

impl Pool {
    fn new(kind: SlotKind) -> Self {
        Pool {
            kind,
            state: Mutex::default(),
            work: Notify::new(),
            sooner: Notify::new(),
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
            if state.is_full() {
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
        {
            let mut state = self.state.lock();
            if state.is_full() {
                drop(state);
                return refuse(record);
            }
            self.line_up(&mut state, record);
            self.lease_if_short(&mut state, cluster);
        }
        self.work.notify_one();
    }

    /// Puts a task in line, and sees to it that it ends when its time runs out there.
    fn line_up(self: &Arc<Self>, state: &mut PoolState, record: TaskRecord) {
        let limit = record.deadline.map(|deadline| deadline.at);
        state.waiting.insert(record.object(), limit, record);
        let Some(limit) = limit else { return };
        match state.look {
            Some(look) if look <= limit => {}
            Some(_) => self.sooner.notify_one(),
            None => {
                state.look = Some(limit);
                let pool = Arc::clone(self);
                self.running.spawn(async move { pool.end_late().await });
            }
        }
    }

    /// Ends tasks whose time runs out while they are in line: one for all of them, as long as there
    /// are any.
    async fn end_late(&self) {
        loop {
            let (late, look) = {
                let mut state = self.state.lock();
                let now = Instant::now();
                let late = state.waiting.take_late(now);
                let next = state.waiting.next_limit();
                state.look = next.map(|next| next.min(now + LOOK_MAX));
                (late, state.look)
            };
            for record in late {
                if let Some(deadline) = record.deadline {
                    record.fail_late(deadline);
                }
            }
            let Some(look) = look else { return };
            tokio::select! {
                () = tokio::time::sleep_until(look) => {}
                () = self.sooner.notified() => {}
            }
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
        let now = Instant::now();
        let record = {
            let mut state = self.state.lock();
            // One that was cancelled meanwhile is not here any more.
            let Some(mut record) = state.dependent.remove(&id) else {
                return;
            };
            record.waited_for("what it needs", now);
            match outcome {
                Some(Ok(())) => {
                    record.wait();
                    self.line_up(&mut state, record);
                    self.lease_if_short(&mut state, cluster);
                    None
                }
                _ => Some(record),
            }
        };
        match (record, outcome, deadline) {
            (None, ..) => self.work.notify_one(),
            (Some(record), Some(Err(error)), _) => record.fail_with(error),
            (Some(record), None, Some(deadline)) => record.fail_late(deadline),
            // Nothing is late without a limit.
            (Some(_), ..) => {}
        }
    }

    /// Ends a task: at once if it is not under way, and otherwise by way of its slot.
    pub(super) fn cancel(&self, id: ObjectId, forced: bool) {
        let found = {
            let mut state = self.state.lock();
            let waiting = state.waiting.remove(id);
            let found = waiting.or_else(|| state.dependent.remove(&id));
            if found.is_none() {
                // Under the lock, so that it is not put back in line meanwhile. What no slot has is over,
                // or another pool's.
                let mut slots = state.under_way.iter().filter_map(Weak::upgrade);
                let _ = slots.any(|slot| slot.cancel(id, forced));
            }
            found
        };
        if let Some(record) = found {
            record.fail_cancelled();
        }
    }

    /// A slot is driven from now on: answers where the tasks that it has are noted, for whoever
    /// cancels one.
    pub(super) fn enlist(&self) -> Arc<UnderWay> {
        let slot: Arc<UnderWay> = Arc::default();
        let mut state = self.state.lock();
        state.under_way.retain(|slot| slot.strong_count() > 0);
        state.under_way.push(Arc::downgrade(&slot));
        slot
    }

    /// Puts tasks of `slot` back in line that are to be pushed again, but for those that were
    /// cancelled by then.
    pub(super) fn put_back(
        self: &Arc<Self>,
        cluster: &Cluster,
        records: Vec<TaskRecord>,
        slot: &UnderWay,
    ) {
        let (cancelled, count) = {
            let mut state = self.state.lock();
            // Under the lock: who cancels from now on finds them in line.
            let is_cancelled = |record: &TaskRecord| slot.end(record.object());
            let (cancelled, again): (Vec<_>, Vec<_>) = records.into_iter().partition(is_cancelled);
            let count = again.len();
            for mut record in again {
                record.wait();
                self.line_up(&mut state, record);
            }
            self.lease_if_short(&mut state, cluster);
            (cancelled, count)
        };
        for record in cancelled {
            record.fail_cancelled();
        }
        for _ in 0..count {
            self.work.notify_one();
        }
    }

    /// The name of the task that is next.
    pub(super) fn next_name(&self) -> Option<&'static str> {
        let state = self.state.lock();
        state.waiting.first().map(TaskRecord::name)
    }

    /// Takes the next tasks out for `slot`, up to `count` of them that are still wanted.
    pub(super) fn take(&self, count: usize, slot: &UnderWay) -> Vec<TaskRecord> {
        let records: Vec<_> = {
            let mut state = self.state.lock();
            let next = || state.waiting.pop_first();
            let records: Vec<_> = std::iter::from_fn(next).take(count).collect();
            // Under the lock: who cancels from now on finds them there.
            slot.begin(records.iter().map(TaskRecord::object));
            records
        };
        let now = Instant::now();
        for record in &records {
            record.waited_for("a slot", now);
        }
        if records.iter().all(|record| record.is_wanted(now)) {
            return records;
        }
        let (wanted, unwanted): (Vec<_>, Vec<_>) = records
            .into_iter()
            .partition(|record| record.is_wanted(now));
        for record in unwanted {
            slot.end(record.object());
            record.fail_unwanted(now);
        }
        wanted
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.state.lock().waiting.len()
    }

    /// Nothing will ever run the tasks that wait: says why.
    pub(super) fn fail_waiting(&self, error: &CallError) {
        let waiting = std::mem::take(&mut self.state.lock().waiting);
        for record in waiting.into_values() {
            record.fail(error.clone(), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use mobula_core::object::ProcessId;

    #[test]
    fn a_driver_that_falls_far_behind_loses_no_cancellation() {
        let pool = Pool::new(SlotKind {
            resources: Resources::cpu_milli(1000),
            placement: PlacementPolicy::default(),
        });
        let task = |sequence| ObjectId {
            owner: ProcessId(1),
            sequence,
        };
        let (busy, other) = (pool.enlist(), pool.enlist());
        busy.begin((0..2).map(task));
        other.begin((2..100_000).map(task));
        for sequence in 0..100_000 {
            pool.cancel(task(sequence), false);
        }
        for sequence in 0..2 {
            let heard = busy.cancelled().now_or_never();
            assert_eq!(heard, Some((task(sequence), false)));
        }
        assert_eq!(busy.cancelled().now_or_never(), None);
        drop((busy, other));
        let _last = pool.enlist();
        assert_eq!(
            pool.state.lock().under_way.len(),
            1,
            "drivers do not pile up"
        );
    }
}
