//! How long a head takes to start and lead when a long history is behind it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use mobula_benches::SystemClock;
use mobula_benches::results::Results;
use mobula_core::config::Config;
use mobula_core::control::ModuleId;
use mobula_core::id::SessionId;
use mobula_head::raft::RaftHandle;
use mobula_head::{Head, HeadOptions};
use mobula_scheduler::{Command, Response};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use crate::tables::job;
use crate::{Options, Outcome};

/// Submissions under way at once.
const AT_ONCE: u64 = 256;

/// Starts that are measured.
const STARTS: u32 = 5;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

struct Running {
    raft: RaftHandle,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<(), mobula_head::HeadError>>,
}

async fn start(dir: &Path) -> Result<Running, AnyError> {
    let mut config = Config::default();
    config.head.data_dir = dir.join("head").display().to_string();
    config.storage.url = format!("file://{}", dir.join("store").display());
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).to_string();
    config.head.api_listen = any_port.clone();
    config.head.cluster_listen = any_port;
    let head = Head::start(HeadOptions::from_config(&config, Arc::new(SystemClock))?).await?;
    let raft = head.raft();
    let mut leadership = raft.leadership();
    leadership.wait_for(|now| now.is_leader).await?;
    // It leads once it answers.
    raft.read().await?;
    let (stop, stopped) = oneshot::channel::<()>();
    let ended = tokio::spawn(head.run(async move { drop(stopped.await) }));
    Ok(Running { raft, stop, ended })
}

impl Running {
    async fn stop(self) -> Result<(), AnyError> {
        drop(self.stop);
        Ok(self.ended.await??)
    }
}

pub(crate) async fn measure(options: &Options, results: &mut Results) -> Outcome {
    let dir = tempfile::tempdir()?;
    let empty = Instant::now();
    start(dir.path()).await?.stop().await?;
    let first_ms = empty.elapsed().as_secs_f64() * 1e3;
    results.figure(
        "start and stop of a head that begins a cluster",
        first_ms,
        "ms",
    );
    let head = start(dir.path()).await?;
    let began = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut submitters: JoinSet<Result<(), AnyError>> = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (raft, next, jobs) = (head.raft.clone(), Arc::clone(&next), options.jobs);
        submitters.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= jobs {
                    return Ok(());
                }
                submit_and_stop(&raft, number).await?;
            }
        });
    }
    while let Some(ended) = submitters.join_next().await {
        ended??;
    }
    let rate = options.jobs as f64 / began.elapsed().as_secs_f64();
    results.figure(
        "jobs submitted and stopped, one head, in process",
        rate,
        "/s",
    );
    head.stop().await?;
    let mut times_ms = Vec::new();
    for _ in 0..STARTS {
        let began = Instant::now();
        let head = start(dir.path()).await?;
        times_ms.push(began.elapsed().as_secs_f64() * 1e3);
        head.stop().await?;
    }
    times_ms.sort_by(f64::total_cmp);
    let name = format!(
        "start with {} jobs in history, until it leads and answers",
        options.jobs
    );
    results.figure(&name, times_ms[times_ms.len() / 2], "ms");
    let name = format!("its data directory after {} jobs", options.jobs);
    results.figure(&name, size_mib(&dir.path().join("head")), "MiB");
    Ok(())
}

async fn propose(raft: &RaftHandle, command: Command) -> Result<Response, AnyError> {
    let payload = command.encode();
    let proposed = raft.propose(SessionId::INTERNAL, 0, ModuleId::SCHEDULER, payload);
    let answer = proposed.await?.result;
    let answer = answer.map_err(|rejection| rejection.message)?;
    Ok(Response::decode(&answer)?)
}

async fn submit_and_stop(raft: &RaftHandle, number: u64) -> Result<(), AnyError> {
    let submitted = propose(raft, Command::SubmitJob { spec: job(number) }).await?;
    if let Response::JobSubmitted { job, .. } = submitted {
        propose(raft, Command::StopJob { job }).await?;
    }
    Ok(())
}

fn size_mib(dir: &Path) -> f64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => size_mib(&entry.path()),
        Ok(found) => found.len() as f64 / f64::from(1 << 20),
        Err(_) => 0.0,
    });
    sizes.sum()
}
