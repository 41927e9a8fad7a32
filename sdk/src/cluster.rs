//! A cluster and what can be asked of it: actors, jobs, modules.
//!
//! Invariant: whatever changes something goes through [`Control::mutate`], and so takes effect
//! once.

mod actors;
mod contexts;

pub use contexts::{ContextExt, TaskContextExt};

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::control::ModuleId;
use mobula_core::id::{ActorId, Incarnation, JobId};
use mobula_host::client::CallClient;
use mobula_host::{HostRuntime, Notice};
use mobula_wire::control as api;
use mobula_wire::host::HostRole;
use mobula_wire::session::StorageLocation;
use serde::Serialize;
use tokio::sync::{OnceCell, watch};

use crate::control::Control;
use crate::creation::Creations;
use crate::embedded::LocalCluster;
use crate::error::{Error, Result};
use crate::job::{JobBuilder, JobHandle};
use crate::resolution::Resolutions;
use crate::task::pool::TaskPools;
use crate::task::{Task, TaskBuilder};

/// A cluster, and in it a job, as far as the process has one. Clones are the same.
#[derive(Clone)]
pub struct Cluster {
    pub(crate) inner: Arc<ClusterInner>,
    pub(crate) job: Option<JobId>,
    /// The actor or driver that holds this handle; what it creates is fenced by its incarnation.
    pub(crate) holder: Option<(ActorId, Incarnation)>,
}

pub(crate) struct ClusterInner {
    pub(crate) control: Control,
    pub(crate) place: Place,
    /// Actors that wait to be created together.
    pub(crate) creations: Arc<Creations>,
    /// Actors of which it is not known yet where they run.
    pub(crate) resolutions: Arc<Resolutions>,
    /// The tasks that this process has submitted.
    pub(crate) tasks: TaskPools,
    /// A cluster of our own, which ends with the last clone.
    pub(crate) embedded: Option<LocalCluster>,
}

/// How the process came to the cluster.
pub(crate) enum Place {
    Inside(Arc<HostRuntime>),
    Outside {
        token: String,
        calls: OnceCell<CallClient>,
    },
}

impl Cluster {
    /// The same cluster, with everything done for `job`.
    #[must_use]
    pub fn in_job(&self, job: JobId) -> Cluster {
        Cluster {
            inner: Arc::clone(&self.inner),
            job: Some(job),
            holder: self.holder,
        }
    }

    /// The job that actors are created for.
    #[must_use]
    pub fn job(&self) -> Option<JobId> {
        self.job
    }

    /// The head's API under all this.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.inner.control
    }

    /// The data directory of an embedded cluster.
    #[must_use]
    pub fn embedded_directory(&self) -> Option<&Path> {
        self.inner.embedded.as_ref().map(LocalCluster::directory)
    }

    /// Where bytes at rest are; known to processes of the cluster.
    #[must_use]
    pub fn storage(&self) -> Option<&StorageLocation> {
        self.runtime().map(|runtime| &runtime.info().storage)
    }

    /// The name of this process's node; known to processes of the cluster.
    #[must_use]
    pub fn node_name(&self) -> Option<&str> {
        self.runtime()
            .map(|runtime| runtime.info().node_name.as_str())
    }

    /// The notice that this process's node was given, and every change of it. Outside a cluster
    /// there is none, ever.
    #[must_use]
    pub fn notices(&self) -> watch::Receiver<Option<Notice>> {
        match self.runtime() {
            Some(runtime) => runtime.notices(),
            None => watch::Sender::new(None).subscribe(),
        }
    }

    /// Whether the cloud says that it may take this process's node away, and every change of it. There is no
    /// deadline then, and there may never be one: a good moment to save, and no reason to leave.
    #[must_use]
    pub fn advice(&self) -> watch::Receiver<bool> {
        match self.runtime() {
            Some(runtime) => runtime.advice(),
            None => watch::Sender::new(false).subscribe(),
        }
    }

    /// Becomes true when the job is asked to stop: a driver that watches this gets its grace, one
    /// that does not ends at once.
    #[must_use]
    pub fn stop_requested(&self) -> watch::Receiver<bool> {
        match self.runtime() {
            Some(runtime) => runtime.stop_requested(),
            None => watch::Sender::new(false).subscribe(),
        }
    }

    /// The job's driver and which start of it, if this process is that: the incarnation is the
    /// fencing token of what it does outside the cluster.
    #[must_use]
    pub fn driver(&self) -> Option<(ActorId, Incarnation)> {
        match self.runtime()?.info().role {
            HostRole::Driver {
                actor, incarnation, ..
            } => Some((actor, incarnation)),
            HostRole::Actors => None,
        }
    }

    pub(crate) fn runtime(&self) -> Option<&Arc<HostRuntime>> {
        match &self.inner.place {
            Place::Inside(runtime) => Some(runtime),
            Place::Outside { .. } => None,
        }
    }

    pub(crate) fn required_job(&self) -> Result<JobId> {
        self.job.ok_or_else(|| {
            Error::NotInCluster(
                "actors belong to a job, and this process is none's driver: run it with `mobula \
                 submit`, or say which one with `in_job`"
                    .to_owned(),
            )
        })
    }

    /// What the cluster is and how it does.
    pub async fn status(&self) -> Result<api::StatusReply> {
        self.control()
            .read("status", |mut api| async move {
                api.status(api::StatusRequest {}).await
            })
            .await
    }

    /// Describes a task to submit: `cluster.task(square(3)).submit()`.
    pub fn task<T>(&self, task: Task<T>) -> TaskBuilder<T> {
        TaskBuilder::new(self.clone(), task)
    }

    /// Stores the job's result as JSON; only its driver may, and the last one counts.
    pub async fn set_result<T: Serialize + ?Sized>(&self, result: &T) -> Result<()> {
        self.set_result_json(serde_json::to_string(result)?).await
    }

    pub(crate) async fn set_result_json(&self, result_json: String) -> Result<()> {
        let role = self.runtime().map(|runtime| runtime.info().role.clone());
        let (
            Some(HostRole::Driver {
                actor, incarnation, ..
            }),
            Some(job),
        ) = (role, self.job)
        else {
            return Err(Error::NotInCluster(
                "only a job's driver can store its result".to_owned(),
            ));
        };
        self.control()
            .mutate("store the job's result", |mut api, stamp| {
                let request = api::SetJobResultRequest {
                    stamp: Some(stamp),
                    job: job.0,
                    driver: actor.0,
                    incarnation: incarnation.0,
                    result_json: result_json.clone(),
                };
                async move { api.set_job_result(request).await }
            })
            .await
            .map(|api::Empty {}| ())
    }

    /// Applies a command of a domain module, exactly once.
    pub async fn apply(&self, module: ModuleId, payload: Vec<u8>) -> Result<Vec<u8>> {
        let reply = self
            .control()
            .mutate("", |mut api, stamp| {
                let request = api::ApplyRequest {
                    stamp: Some(stamp),
                    module: u32::from(module.0),
                    payload: payload.clone(),
                };
                async move { api.apply(request).await }
            })
            .await?;
        Ok(reply.response)
    }

    /// Asks a domain module.
    pub async fn query(&self, module: ModuleId, payload: Vec<u8>) -> Result<Vec<u8>> {
        let reply = self
            .control()
            .read("", |mut api| {
                let request = api::QueryRequest {
                    module: u32::from(module.0),
                    payload: payload.clone(),
                };
                async move { api.query(request).await }
            })
            .await?;
        Ok(reply.payload)
    }

    /// Waits until something changed in a domain module after revision `seen` (0: ever), for at most
    /// `wait`; answers the revision that it has then. Revisions grow, and mean the same at every head: a
    /// loop that gives back the largest that it was answered misses no change, whichever heads come and
    /// go. (At the end of `wait` a head that is behind answers what it has.)
    pub async fn wait_module(&self, module: ModuleId, seen: u64, wait: Duration) -> Result<u64> {
        let request = api::WaitModuleRequest {
            module: u32::from(module.0),
            seen_revision: seen,
            timeout_ms: millis(wait),
        };
        let reply = self
            .control()
            .read("wait for a module", |mut api| async move {
                api.wait_module(request).await
            })
            .await?;
        Ok(reply.revision)
    }

    /// Describes a job to submit.
    pub fn new_job(&self, name: impl Into<String>) -> JobBuilder {
        JobBuilder::new(self.clone(), name.into())
    }

    /// A job that exists.
    #[must_use]
    pub fn job_handle(&self, job: JobId) -> JobHandle {
        JobHandle::new(self.clone(), job, None)
    }

    /// All jobs that the head still knows.
    pub async fn list_jobs(&self) -> Result<Vec<api::Job>> {
        let mut jobs = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = api::ListJobsRequest {
                page_size: 0,
                page_token,
            };
            let page = self
                .control()
                .read("list jobs", |mut api| {
                    let request = request.clone();
                    async move { api.list_jobs(request).await }
                })
                .await?;
            jobs.extend(page.jobs);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(jobs);
            }
        }
    }

    /// The client for calls to actors, where it is there already.
    pub(crate) fn ready_calls(&self) -> Option<&CallClient> {
        match &self.inner.place {
            Place::Inside(runtime) => runtime.calls(),
            Place::Outside { calls, .. } => calls.get(),
        }
    }

    /// The client for calls to actors.
    pub(crate) async fn calls(&self) -> Result<CallClient> {
        match &self.inner.place {
            Place::Inside(runtime) => runtime.calls().cloned().ok_or_else(|| {
                Error::NotInCluster("this process has no endpoint for calls yet".to_owned())
            }),
            Place::Outside { token, calls } => {
                calls.get_or_try_init(|| self.join(token)).await.cloned()
            }
        }
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("control", &self.inner.control)
            .field("job", &self.job)
            .finish_non_exhaustive()
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
