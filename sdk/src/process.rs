//! What `#[mobula::main]` does: one program, started by a person, as a driver, or as a host (or in a [`role`]).
//!
//! Started by a person, it ships itself to a cluster as a job and shows that job's output; only
//! there does the user's main run. So a program behaves the same whether it is run or submitted.

use std::fmt::Display;
use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use mobula_core::error::ErrorCode;
use mobula_core::exit::ExitReason;
use mobula_host::Registry;
use mobula_host::agent::{HostEnd, HostProcess, take_bootstrap};
use mobula_wire::host::{HostBootstrap, HostRole};

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::farewell::sessions_closed;
use crate::job::JobHandle;
use crate::main_end::may_pass_with_another_start;
pub use crate::main_end::{MainEnd, MainOutcome};
use crate::role;

/// The environment variable that names the cluster to run on: a data directory, or `ip:port` with
/// the token in [`TOKEN_ENV`].
pub const CLUSTER_ENV: &str = "MOBULA_CLUSTER";

/// The environment variable with a client token.
pub const TOKEN_ENV: &str = "MOBULA_TOKEN";

/// The environment variable that names the namespace that a program which is run by hand enters as a
/// job.
pub const NAMESPACE_ENV: &str = "MOBULA_NAMESPACE";

/// The environment variable that says what a process logs, as `tracing` filters are written.
pub const LOG_ENV: &str = "MOBULA_LOG";

/// Threads for async work: actors may keep one busy without letting the connection starve.
const THREADS_MIN: usize = 4;

/// How long threads may take to end once the process has nothing left to say.
const THREADS_END_MAX: Duration = Duration::from_millis(200);

/// Attempts in a row to read a job's log again after its stream broke: with the pauses, as long as
/// a head may take to be started again.
const LOG_ATTEMPTS_MAX: u32 = 60;

const LOG_PAUSE: Duration = Duration::from_millis(500);

/// Stores what `main` returned, then says how the driver ends.
async fn conclude(cluster: &Cluster, end: MainEnd) -> ExitReason {
    match end {
        MainEnd::Completed { result_json: None } => ExitReason::Completed,
        MainEnd::Completed {
            result_json: Some(json),
        } => match cluster.set_result_json(json).await {
            Ok(()) => ExitReason::Completed,
            Err(error) if may_pass_with_another_start(&error) => {
                ExitReason::Unavailable(error.to_string())
            }
            Err(error) => ExitReason::Failed(error.to_string()),
        },
        MainEnd::Unavailable(text) => ExitReason::Unavailable(text),
        MainEnd::Failed(text) => ExitReason::Failed(text),
    }
}

/// Runs a program with the user's `main`, in whichever part it was started for.
pub fn run_main<F, Fut>(main: F) -> ExitCode
where
    F: FnOnce(Cluster, Vec<String>) -> Fut,
    Fut: Future + Send + 'static,
    Fut::Output: MainOutcome,
{
    match run_in_cluster(main) {
        Some(code) => code,
        None => with_runtime(async {
            let ended = submit_myself().await;
            sessions_closed().await;
            ended
        }),
    }
}

/// Takes part in a cluster if an agent started this process for that, with `main` as the job's, or plays the
/// [`role`] that it was started for; answers `None` where a person started it. Call it before anything
/// else.
pub fn run_in_cluster<F, Fut>(main: F) -> Option<ExitCode>
where
    F: FnOnce(Cluster, Vec<String>) -> Fut,
    Fut: Future + Send + 'static,
    Fut::Output: MainOutcome,
{
    if let Some(asked) = role::asked(|name| std::env::var_os(name)) {
        return Some(with_runtime(role::play(asked)));
    }
    match take_bootstrap() {
        Ok(None) => None,
        Ok(Some(bootstrap)) => Some(with_runtime(take_part(bootstrap, main))),
        Err(error) => Some(with_runtime(async move {
            Err(Error::setup("host process", error))
        })),
    }
}

fn with_runtime(work: impl Future<Output = Result<ExitCode>>) -> ExitCode {
    start_logging();
    let cores = std::thread::available_parallelism().map_or(THREADS_MIN, usize::from);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.max(THREADS_MIN))
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    let code = runtime
        .block_on(work)
        .unwrap_or_else(|error| failed(&error));
    // A method that never awaits must not keep the process alive.
    runtime.shutdown_timeout(THREADS_END_MAX);
    code
}

fn failed(error: &dyn Display) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env(LOG_ENV)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    // The program may have a subscriber of its own already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
}

async fn take_part<F, Fut>(bootstrap: HostBootstrap, main: F) -> Result<ExitCode>
where
    F: FnOnce(Cluster, Vec<String>) -> Fut,
    Fut: Future + Send + 'static,
    Fut::Output: MainOutcome,
{
    let role = bootstrap.role.clone();
    let failed = |error: &dyn Display| Error::setup("host process", error);
    let registry = Registry::of_this_program().map_err(|error| failed(&error))?;
    let process = Box::pin(HostProcess::start(bootstrap, registry))
        .await
        .map_err(|error| failed(&error))?;
    process.runtime().make_current();
    let cluster = Cluster::of_runtime(process.runtime())?;
    match role {
        HostRole::Actors => match Box::pin(process.run_actors()).await {
            HostEnd::Shutdown => Ok(ExitCode::SUCCESS),
            HostEnd::AgentLost(reason) => Err(Error::NotInCluster(reason)),
        },
        HostRole::Driver { args, .. } => {
            let main = main(cluster.clone(), args);
            let run = async move {
                let end = main.await.into_outcome();
                conclude(&cluster, end).await
            };
            let outcome = Box::pin(process.run_driver(run)).await;
            match outcome {
                ExitReason::Completed | ExitReason::Stopped => Ok(ExitCode::SUCCESS),
                ExitReason::HostExited(code) => {
                    Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from))
                }
                // Into the job's log, where whoever follows it looks.
                reason => Err(Error::User(format!("driver {reason}"))),
            }
        }
    }
}

/// The cluster that the environment names, or one of our own.
async fn chosen_cluster() -> Result<Cluster> {
    // An empty variable is as one that is not set.
    let named = std::env::var(CLUSTER_ENV).unwrap_or_default();
    if named.is_empty() {
        return Cluster::embedded().await;
    }
    if Path::new(&named).is_dir() {
        return Cluster::from_data_dir(Path::new(&named)).await;
    }
    let token = std::env::var(TOKEN_ENV).map_err(|_| {
        Error::setup(
            CLUSTER_ENV,
            format!(
                "`{named}` is not a directory; if it is the address of a head, put a client token \
                 into {TOKEN_ENV}"
            ),
        )
    })?;
    Cluster::connect(&named, &token).await
}

async fn submit_myself() -> Result<ExitCode> {
    let program = std::env::current_exe()?;
    let name = program
        .file_stem()
        .map_or("job".into(), |name| name.to_string_lossy().into_owned());
    let cluster = Box::pin(chosen_cluster()).await?;
    let mut job = cluster
        .new_job(name)
        .program(&program)
        .args(std::env::args().skip(1));
    if let Some(namespace) = std::env::var(NAMESPACE_ENV)
        .ok()
        .filter(|name| !name.is_empty())
    {
        job = job.namespace(namespace);
    }
    let job = Box::pin(job.submit()).await?;
    tokio::select! {
        ended = follow(&job) => ended,
        _ = tokio::signal::ctrl_c() => {
            job.stop().await?;
            eprintln!("{} is stopped", job.id());
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Shows a job's output until it has ended, then how it ended.
async fn follow(job: &JobHandle) -> Result<ExitCode> {
    Box::pin(copy_log(job, &mut std::io::stdout())).await?;
    let ended = job.wait().await?;
    if ended.state == "succeeded" {
        return Ok(ExitCode::SUCCESS);
    }
    let reason = ended
        .exit_reason
        .unwrap_or_else(|| "no reason is known".to_owned());
    eprintln!("{} {}: {reason}", job.id(), ended.state);
    Ok(ExitCode::FAILURE)
}

/// Writes a job's output to `target` until it has ended. When the stream breaks it is read again,
/// without what was written before.
pub async fn copy_log(job: &JobHandle, target: &mut (dyn Write + Send)) -> Result<()> {
    let mut written_bytes = 0usize;
    let mut failures = 0;
    while failures < LOG_ATTEMPTS_MAX {
        let mut skip = written_bytes;
        let error = match job.logs(true).await {
            Err(error) => error,
            Ok(mut log) => loop {
                match log.next_chunk().await {
                    Ok(None) => return Ok(()),
                    Err(error) => break error,
                    Ok(Some(chunk)) => {
                        let known = skip.min(chunk.len());
                        skip -= known;
                        target.write_all(&chunk[known..])?;
                        target.flush()?;
                        written_bytes += chunk.len() - known;
                        failures = 0;
                    }
                }
            },
        };
        if error.code() != Some(ErrorCode::Unavailable) {
            return Err(error);
        }
        tracing::debug!(%error, "a log stream broke, reading it again");
        failures += 1;
        tokio::time::sleep(LOG_PAUSE).await;
    }
    Err(Error::setup(
        format!("log of {}", job.id()),
        format!("the stream broke {LOG_ATTEMPTS_MAX} times; the job goes on, see `mobula jobs`"),
    ))
}
