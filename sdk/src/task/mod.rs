//! Tasks: functions that run somewhere in the cluster, once for each time that they are submitted.
//!
//! ```no_run
//! # use mobula::prelude::*;
//! #[mobula::task]
//! async fn square(x: u64) -> u64 {
//!     x * x
//! }
//!
//! # async fn example(cluster: Cluster) -> mobula::Result<()> {
//! let squares: Vec<_> = (0..100).map(|x| cluster.task(square(x)).submit()).collect();
//! # Ok(())
//! # }
//! ```
//!
//! * `pool`: the tasks that wait, in a `queue`; `lease`: slots from the head; `drive`: tasks into
//!   slots; `pace`: how many at once; `record`: one task; `tries`: when it is executed again;
//!   `scope`: tasks that submit tasks; `lineage`: lost values; `items`: tasks that bring several
//!   values; `under_way`: what a slot has, and what of that was cancelled.
//!
//! Invariants:
//! 1. A submitted task completes its object exactly once, with its value or with why there is none.
//! 2. A task is executed at most `1 + max_retries` times over the life of its value, and again only
//!    after an execution that was lost, or whose value was, or one that failed if that was asked
//!    for; never once it was cancelled. With `max_retries(0)` it is executed at most once.
//! 3. The head grants slots and hears of no task.

mod drive;
mod items;
mod lease;
mod lineage;
mod pace;
pub(crate) mod pool;
mod queue;
mod record;
pub(crate) mod scope;
mod tries;
mod under_way;

pub use items::Items;

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::CallError;
use mobula_core::label::Requirement;
use mobula_core::object::ObjectError;
use mobula_core::resource::Resources;
use mobula_core::spec::{PlacementPolicy, SpreadKey, Strategy};
use mobula_host::mailbox::Deadline;
use mobula_host::objects::Object;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::actor::milli;
use crate::cluster::{Cluster, millis};
use crate::error::Result;
use crate::object::ObjectRef;
use crate::stream::{ItemStream, WINDOW_DEFAULT};
use crate::task::items::ItemSink;
use crate::task::pool::SlotKind;
use crate::task::record::{TaskDescription, TaskRecord, title};
use crate::task::tries::RetryPolicy;

/// How often a task is executed again after a loss, unless it says otherwise.
pub const DEFAULT_MAX_RETRIES: u32 = 3;

/// What `#[mobula::task(..)]` says about a task.
#[derive(Debug, Clone, Copy)]
pub struct TaskDefaults {
    /// Its name, unique within the program.
    pub name: &'static str,
    /// CPU cores; one unless said otherwise.
    pub cpus: Option<f64>,
    /// GPUs.
    pub gpus: Option<f64>,
    /// Memory, in bytes.
    pub memory_bytes: Option<u64>,
    /// How often it is executed again.
    pub max_retries: Option<u32>,
    /// Whether its own errors are a reason for that.
    pub retry_errors: bool,
}

/// A task that is described but not submitted: what `square(3)` gives.
#[must_use = "nothing runs before `cluster.task(..).submit()`"]
pub struct Task<T> {
    defaults: &'static TaskDefaults,
    arguments: std::result::Result<Vec<u8>, String>,
    /// What the arguments refer to.
    references: Vec<Object>,
    /// Those of them that must have a value before it begins.
    after: Vec<Object>,
    value: PhantomData<fn() -> T>,
}

impl<T> Task<T> {
    pub(crate) fn new(
        defaults: &'static TaskDefaults,
        arguments: std::result::Result<Vec<u8>, String>,
        references: Vec<Object>,
    ) -> Self {
        Task {
            defaults,
            arguments,
            references,
            after: Vec::new(),
            value: PhantomData,
        }
    }

    /// It begins when `dependency` has its value, and fails with that one's error if it has none.
    /// Arguments whose type is written `ObjectRef<..>` are such dependencies already.
    pub fn after<U>(mut self, dependency: &ObjectRef<U>) -> Self {
        self.after.push(dependency.object().clone());
        self
    }
}

/// A task about to be submitted.
#[must_use = "nothing runs before `submit`"]
pub struct TaskBuilder<T> {
    cluster: Cluster,
    task: Task<T>,
    kind: SlotKind,
    retries: RetryPolicy,
    timeout: Option<Duration>,
    /// For tasks that bring several values: how many may wait to be read.
    window: u32,
}

impl<T> TaskBuilder<T> {
    pub(crate) fn new(cluster: Cluster, task: Task<T>) -> Self {
        let defaults = task.defaults;
        TaskBuilder {
            cluster,
            kind: SlotKind {
                resources: Resources {
                    cpu_milli: milli(defaults.cpus.unwrap_or(1.0)),
                    memory_bytes: defaults.memory_bytes.unwrap_or(0),
                    gpu_milli: milli(defaults.gpus.unwrap_or(0.0)),
                    ..Resources::default()
                },
                placement: PlacementPolicy {
                    // Tasks are there to use every node.
                    strategy: Strategy::Spread,
                    ..PlacementPolicy::default()
                },
            },
            retries: RetryPolicy {
                max_retries: defaults.max_retries.unwrap_or(DEFAULT_MAX_RETRIES),
                retry_errors: defaults.retry_errors,
            },
            timeout: None,
            window: WINDOW_DEFAULT,
            task,
        }
    }

    /// CPU cores that its slot has; thousandths count.
    pub fn cpus(mut self, cpus: f64) -> Self {
        self.kind.resources.cpu_milli = milli(cpus);
        self
    }

    /// GPUs that its slot has; thousandths count. Such a slot is a process of its own.
    pub fn gpus(mut self, gpus: f64) -> Self {
        self.kind.resources.gpu_milli = milli(gpus);
        self
    }

    /// Memory that its slot has.
    pub fn memory_bytes(mut self, memory_bytes: u64) -> Self {
        self.kind.resources.memory_bytes = memory_bytes;
        self
    }

    /// All that its slot has.
    pub fn resources(mut self, resources: Resources) -> Self {
        self.kind.resources = resources;
        self
    }

    /// Something that the node's labels must meet.
    pub fn require(mut self, requirement: Requirement) -> Self {
        self.kind.placement.selector.push(requirement);
        self
    }

    /// How to choose among nodes that fit; tasks are spread unless said otherwise.
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.kind.placement.strategy = strategy;
        self
    }

    /// Keeps the slots of tasks with the same key on one node where that fits.
    pub fn affinity(mut self, key: impl Into<String>) -> Self {
        self.kind.placement.affinity_key = Some(key.into());
        self
    }

    /// Keeps the slots of tasks with the same key on different nodes where that fits.
    pub fn spread(mut self, key: impl Into<String>) -> Self {
        self.kind.placement.spread_key = Some(SpreadKey {
            key: key.into(),
            strict: false,
        });
        self
    }

    /// How often it is executed again when an execution, or the value that it brought, was lost with
    /// its process or node. With 0 it is executed at most once, otherwise at least once where it
    /// succeeds.
    pub fn max_retries(mut self, times: u32) -> Self {
        self.retries.max_retries = times;
        self
    }

    /// Whether its own errors and panics count as a reason to execute it again.
    pub fn retry_errors(mut self, retry: bool) -> Self {
        self.retries.retry_errors = retry;
        self
    }

    /// Gives up when there is no value after `timeout`, which counts from `submit` and includes
    /// waiting for a slot and every execution. A task that runs then is dropped at its next await.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}

impl<T: DeserializeOwned> TaskBuilder<T> {
    /// Submits it. The reference is there at once, its value when the task has run; whatever goes
    /// wrong is an error of the value.
    ///
    /// # Panics
    ///
    /// In a process that is no part of a job, which can own no objects: see
    /// [`try_submit`](TaskBuilder::try_submit).
    pub fn submit(self) -> ObjectRef<T> {
        self.try_submit()
            .unwrap_or_else(|error| panic!("a task cannot be submitted here: {error}"))
    }

    /// As [`submit`](TaskBuilder::submit), with an error where this process can own no objects.
    pub fn try_submit(self) -> Result<ObjectRef<T>> {
        self.enqueue(None)
    }
}

impl<T: DeserializeOwned + Send + 'static> TaskBuilder<Items<T>> {
    /// How many values may wait here until they are read (1 to 65 536, by default
    /// [`WINDOW_DEFAULT`]); beyond that the task waits.
    pub fn window(mut self, values: u32) -> Self {
        self.window = values;
        self
    }

    /// Submits it. The values come as it makes them, then the end; an error is the last thing that
    /// comes. Dropping the stream cancels the task.
    ///
    /// An execution that is lost is repeated like any other, and as many values as have come already
    /// are left out then: a task that makes other values each time needs `max_retries(0)`.
    ///
    /// # Panics
    ///
    /// In a process that is no part of a job: see [`try_submit`](TaskBuilder::try_submit).
    pub fn submit(self) -> ItemStream<T> {
        self.try_submit()
            .unwrap_or_else(|error| panic!("a task cannot be submitted here: {error}"))
    }

    /// As [`submit`](TaskBuilder::submit), with an error where this process can own no objects.
    pub fn try_submit(self) -> Result<ItemStream<T>> {
        let name = self.task.defaults.name;
        let (sink, items) = ItemSink::new(self.window);
        Ok(items::read(name, items, self.enqueue(Some(sink))?))
    }
}

impl<T> TaskBuilder<T> {
    /// Puts the task in line. The reference is to its value, or to nothing where its values go into
    /// `items`.
    fn enqueue<V>(self, items: Option<ItemSink>) -> Result<ObjectRef<V>> {
        let TaskBuilder {
            cluster,
            task,
            kind,
            retries,
            timeout,
            window: _,
        } = self;
        let job = cluster.required_job()?;
        let (object, completer) = cluster.objects()?.create_pending();
        let name = task.defaults.name;
        let reference = ObjectRef::from_object(object);
        let arguments = match task.arguments {
            Ok(arguments) => arguments,
            Err(reason) => {
                let reason = format!("{}: {reason}", title(name));
                completer.fail(ObjectError::Failed(CallError::BadCall(reason)));
                return Ok(reference);
            }
        };
        let description = TaskDescription::new(name, &arguments, retries, task.references);
        let deadline = timeout.and_then(|timeout| {
            Some(Deadline {
                at: Instant::now().checked_add(timeout)?,
                limit_ms: millis(timeout),
            })
        });
        let record = TaskRecord::new(Arc::new(description), deadline, completer, items);
        match cluster.inner.tasks.get(job, &kind) {
            Ok(pool) => {
                scope::remember_child(&pool, record.object());
                pool.submit_after(&cluster, record, task.after);
            }
            Err(error) => record.fail(error, None),
        }
        Ok(reference)
    }
}

impl<T> ObjectRef<T> {
    /// Says that the task which is to bring this value is not wanted any more, nor what it has
    /// submitted itself. It ends as [`CallError::Cancelled`]: at once if it has not begun, otherwise
    /// at its next await. With `forced` it ends although it never awaits; what it computes then is
    /// thrown away.
    ///
    /// Does nothing where the value is there already, is not that of a task, or where another
    /// process submitted it.
    pub fn cancel(&self, forced: bool) {
        if let Some(cluster) = Cluster::current() {
            cluster.cancel_task(self, forced);
        }
    }
}

impl Cluster {
    /// As [`ObjectRef::cancel`].
    pub fn cancel_task<T>(&self, value: &ObjectRef<T>, forced: bool) {
        self.inner.tasks.cancel(value.id(), forced);
    }
}
