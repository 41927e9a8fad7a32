//! Jobs: programs that run on a cluster, supervised and restartable.
//!
//! Invariants:
//! 1. A program is shipped by the hash of its bytes, once; the head checks the hash.
//! 2. Submitting is a change like any other: sent again it stays one job.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::id::{ActorId, JobId};
use mobula_core::namespace::NamespaceEntry;
use mobula_core::resource::Resources;
use mobula_core::secret::Secret;
use mobula_core::spec::{JobFile, JobSpec, PlacementPolicy, Program, RestartPolicy};
use mobula_wire::control as api;
use serde::de::DeserializeOwned;

use crate::actor::milli;
use crate::cluster::{Cluster, millis};
use crate::control::status_error;
use crate::error::{Error, Result};
use crate::timeline::Timeline;
use crate::upload::{Observer, UploadProgress, ship};

/// How long one question for a job's end waits before it is asked again: shorter than what a
/// proxy or firewall lets pass in silence.
const WAIT_EACH: Duration = Duration::from_secs(30);

/// A job about to be submitted.
#[must_use = "nothing is submitted before `submit`"]
pub struct JobBuilder {
    cluster: Cluster,
    program: Option<PathBuf>,
    files: Vec<(PathBuf, String)>,
    spec: JobSpec,
    observer: Observer,
}

impl JobBuilder {
    pub(crate) fn new(cluster: Cluster, name: String) -> Self {
        let spec = JobSpec {
            name,
            program: Program::Builtin,
            args: Vec::new(),
            env: BTreeMap::new(),
            resources: Resources::default(),
            placement: PlacementPolicy::default(),
            restart: RestartPolicy::NEVER,
            idempotency_key: None,
            files: Vec::new(),
            retry_errors: false,
            secrets: BTreeMap::new(),
            namespace: None,
        };
        JobBuilder {
            cluster,
            program: None,
            files: Vec::new(),
            spec,
            observer: Arc::new(|_| {}),
        }
    }

    /// Runs this binary, which uses `#[mobula::main]`.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Some(path.into());
        self
    }

    /// Runs the `mobula` binary's own job named by the first argument. The default.
    pub fn builtin(mut self) -> Self {
        self.program = None;
        self
    }

    /// The driver's arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.spec.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// One more variable in the environment of the driver and its hosts.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.spec.env.insert(name.into(), value.into());
        self
    }

    /// One more variable in the environment of the driver and its hosts, which is shown nowhere: not
    /// among what the cluster tells of the job, and not in logs or timelines. Heads keep it sealed,
    /// and only until the job is over. Text without NUL; with arguments and environment at most 64 KiB.
    pub fn secret(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let value: String = value.into();
        self.spec
            .secrets
            .insert(name.into(), Secret::new(value.into_bytes()));
        self
    }

    /// Ships a file, which then lies as `name` (a relative path) in the working directory of every
    /// process of the job, read-only. At most 64 files and 8 GiB together; the same bytes are
    /// uploaded once, however many jobs use them.
    pub fn file(mut self, path: impl Into<PathBuf>, name: impl Into<String>) -> Self {
        self.files.push((path.into(), name.into()));
        self
    }

    /// CPU cores that the driver itself needs; thousandths count.
    pub fn cpus(mut self, cpus: f64) -> Self {
        self.spec.resources.cpu_milli = milli(cpus);
        self
    }

    /// All that the driver itself needs.
    pub fn resources(mut self, resources: Resources) -> Self {
        self.spec.resources = resources;
        self
    }

    /// Where the driver may run.
    pub fn placement(mut self, placement: PlacementPolicy) -> Self {
        self.spec.placement = placement;
        self
    }

    /// How often the driver is started again after an end that nobody asked for: its process
    /// died, it panicked, the cluster did not answer it. The first restart comes at once, the next
    /// after 100 ms, later ones after up to 5 s; what the infrastructure took away does not count. An error that `main`
    /// returned is final, see [`JobBuilder::retry_errors`].
    pub fn max_restarts(mut self, times: u32) -> Self {
        self.spec.restart = RestartPolicy::times(times);
        self
    }

    /// Starts the driver again also when its `main` returned an error of its own. Without this such
    /// an error ends the job: a program that refused its input once refuses it again.
    pub fn retry_errors(mut self) -> Self {
        self.spec.retry_errors = true;
        self
    }

    /// Puts the job into a namespace: its named actors are found by the other jobs there, and all of
    /// them may call each other's actors; its actors can be [detached]. 1 to 63 of `a-z`, `0-9`, `-`,
    /// `_` and `.`. A namespace belongs to whoever submitted the first job in it (as the client token
    /// says), as long as a job lives in it; a job of somebody else is refused with
    /// [`PermissionDenied`](mobula_core::ErrorCode::PermissionDenied). Without one the job shares
    /// nothing.
    ///
    /// [detached]: crate::actor::ActorBuilder::detached
    pub fn namespace(mut self, name: impl Into<String>) -> Self {
        self.spec.namespace = Some(NamespaceEntry {
            name: name.into(),
            // The head says who we are.
            principal: String::new(),
        });
        self
    }

    /// A second submission with the same key gives the same job.
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.spec.idempotency_key = Some(key.into());
        self
    }

    /// Calls `observe` as the program and each file is uploaded: at the beginning, after each piece
    /// that was handed to the connection, and at the end. What the cluster has already is not
    /// uploaded and not told. The call comes from a thread that may wait, so it may draw.
    pub fn on_upload(mut self, observe: impl Fn(&UploadProgress) + Send + Sync + 'static) -> Self {
        self.observer = Arc::new(observe);
        self
    }

    /// Ships the program and the files that the cluster lacks; the job as it can be submitted at any time
    /// later, by whoever is told.
    pub async fn into_spec(self) -> Result<JobSpec> {
        let JobBuilder {
            cluster,
            program,
            files,
            mut spec,
            observer,
        } = self;
        if let Some(path) = program {
            let (blake3, size_bytes) = ship(&cluster, "program", &path, &observer).await?;
            spec.program = Program::Artifact { blake3, size_bytes };
        }
        for (path, name) in files {
            let (blake3, size_bytes) = ship(&cluster, "file", &path, &observer).await?;
            spec.files.push(JobFile {
                name,
                blake3,
                size_bytes,
            });
        }
        Ok(spec)
    }

    /// Ships the program if the cluster lacks it, and starts the job.
    pub async fn submit(self) -> Result<JobHandle> {
        let cluster = self.cluster.clone();
        let spec = self.into_spec().await?;
        let reply = cluster
            .control()
            .mutate("submit a job", |mut api, stamp| {
                let spec = Some(api::JobSpec::from(spec.clone()));
                let request = api::SubmitJobRequest {
                    stamp: Some(stamp),
                    spec,
                };
                async move { api.submit_job(request).await }
            })
            .await?;
        Ok(JobHandle::new(
            cluster,
            JobId(reply.job),
            Some(ActorId(reply.driver)),
        ))
    }
}

/// A job that exists.
#[derive(Debug, Clone)]
pub struct JobHandle {
    cluster: Cluster,
    job: JobId,
    driver: Option<ActorId>,
}

impl JobHandle {
    pub(crate) fn new(cluster: Cluster, job: JobId, driver: Option<ActorId>) -> Self {
        JobHandle {
            cluster,
            job,
            driver,
        }
    }

    /// The job.
    #[must_use]
    pub fn id(&self) -> JobId {
        self.job
    }

    /// Its driver, if this handle is from its submission. A job that keeps detached actors has none.
    #[must_use]
    pub fn driver(&self) -> Option<ActorId> {
        self.driver
    }

    /// How the job stands now.
    pub async fn status(&self) -> Result<api::Job> {
        let request = api::GetJobRequest { job: self.job.0 };
        self.cluster
            .control()
            .read(
                "show a job",
                |mut api| async move { api.get_job(request).await },
            )
            .await
    }

    /// Waits until the job has ended, for at most `wait`; answers how it stands then.
    pub async fn wait_timeout(&self, wait: Duration) -> Result<api::Job> {
        let request = api::WaitJobRequest {
            job: self.job.0,
            timeout_ms: millis(wait),
        };
        self.cluster
            .control()
            .read("wait for a job", |mut api| async move {
                api.wait_job(request).await
            })
            .await
    }

    /// Waits until the job has ended.
    pub async fn wait(&self) -> Result<api::Job> {
        loop {
            let job = self.wait_timeout(WAIT_EACH).await?;
            if has_ended(&job) {
                return Ok(job);
            }
        }
    }

    /// Waits until the job has ended, and gives what its driver stored; `None` if it stored
    /// nothing. A job that did not succeed is an error.
    pub async fn result<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let job = self.wait().await?;
        if job.state != "succeeded" {
            let reason = job
                .exit_reason
                .unwrap_or_else(|| "no reason is known".to_owned());
            return Err(Error::User(format!("{} {}: {reason}", self.job, job.state)));
        }
        Ok(job
            .result_json
            .map(|text| serde_json::from_str(&text))
            .transpose()?)
    }

    /// What took how long in the job, as far as the cluster remembers.
    pub async fn timeline(&self) -> Result<Timeline> {
        let request = api::TimelineRequest { job: self.job.0 };
        let reply = self
            .cluster
            .control()
            .read("read a timeline", |mut api| async move {
                api.timeline(request).await
            })
            .await?;
        Ok(Timeline::new(reply))
    }

    /// Ends the job.
    pub async fn stop(&self) -> Result<()> {
        self.cluster
            .control()
            .mutate("stop a job", |mut api, stamp| {
                let request = api::StopJobRequest {
                    stamp: Some(stamp),
                    job: self.job.0,
                };
                async move { api.stop_job(request).await }
            })
            .await
            .map(|api::Empty {}| ())
    }

    /// The driver's output from its beginning; with `follow`, until the job has ended. Of a job that
    /// keeps detached actors, which has no driver, the output of all its processes.
    pub async fn logs(&self, follow: bool) -> Result<LogStream> {
        self.read_logs(follow, false).await
    }

    /// The output of all processes of the job, each piece with where it comes from; with `follow`,
    /// until the job has ended. [`LogLines`](crate::log_lines::LogLines) makes lines of it.
    pub async fn all_logs(&self, follow: bool) -> Result<LogStream> {
        self.read_logs(follow, true).await
    }

    async fn read_logs(&self, follow: bool, all_processes: bool) -> Result<LogStream> {
        let request = api::JobLogsRequest {
            job: self.job.0,
            follow,
            all_processes,
        };
        let chunks = self
            .cluster
            .control()
            .once("read a job's log", |mut api| async move {
                api.job_logs(request).await
            })
            .await?;
        Ok(LogStream { chunks })
    }
}

/// Whether a job is over.
#[must_use]
pub fn has_ended(job: &api::Job) -> bool {
    matches!(job.state.as_str(), "succeeded" | "failed" | "stopped")
}

/// A job's output, piece by piece.
pub struct LogStream {
    chunks: tonic::Streaming<api::LogChunk>,
}

impl LogStream {
    /// The next piece; `None` at the end.
    pub async fn next_chunk(&mut self) -> Result<Option<Vec<u8>>> {
        let chunk = self.next_with_source().await?;
        Ok(chunk.map(|chunk| chunk.data))
    }

    /// The next piece and where it comes from; `None` at the end.
    pub async fn next_with_source(&mut self) -> Result<Option<api::LogChunk>> {
        match self.chunks.message().await {
            Ok(chunk) => Ok(chunk),
            Err(status) => Err(status_error("read a job's log", &status, false)),
        }
    }
}
