//! `mobula local up`.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_head::{CLIENT_TOKEN_FILE, WORKER_TOKEN_FILE};
use tokio::signal::unix::{SignalKind, signal};

use super::heads::Heads;
use super::process::{spawn, start_time_of};
use super::record::{ClusterRecord, ProcessRecord};
use super::stop_all;
use crate::args::LocalUpArguments;
use crate::nodes;
use crate::output::print_json;

/// How long a process may take to serve.
pub(super) const READY_LIMIT: Duration = Duration::from_secs(30);

/// How often is looked whether the workers have joined.
pub(super) const POLL: Duration = Duration::from_millis(50);

/// Workers of a local cluster: each is a process that shares this machine with the others.
const WORKERS_MAX: u32 = 128;

/// What a local cluster is made of.
pub(crate) struct LocalOptions {
    pub(crate) data_dir: PathBuf,
    pub(crate) heads: u32,
    pub(crate) workers: u32,
    pub(crate) cpus: f64,
    pub(crate) storage_url: Option<String>,
    /// Where the first worker answers for all endpoints; each other one takes the next port.
    pub(crate) ingress: Option<SocketAddr>,
    pub(crate) config: Option<PathBuf>,
}

pub(crate) async fn run(data_dir: PathBuf, arguments: LocalUpArguments) -> anyhow::Result<()> {
    if ![1, 3, 5].contains(&arguments.heads) {
        bail!(
            "--heads {} is not possible: a group has 1, 3 or 5 (an even number survives no more \
             losses than one less)",
            arguments.heads
        );
    }
    if arguments.workers > WORKERS_MAX {
        bail!(
            "--workers {} is not possible: each is a process of its own, and a local cluster has \
             {WORKERS_MAX} at the most; run `mobula worker` on more machines",
            arguments.workers
        );
    }
    let options = LocalOptions {
        data_dir,
        heads: arguments.heads,
        workers: arguments.workers,
        cpus: arguments.cpus,
        storage_url: arguments.storage_url,
        ingress: arguments.ingress,
        config: arguments.config,
    };
    let record = start(&options).await?;
    if arguments.format.json {
        print_json(&record)?;
    } else {
        println!(
            "cluster {} is up in {}",
            record.cluster_id,
            record.data_dir.display()
        );
        for process in &record.processes {
            println!(
                "  {:<10} pid {:<8} log {}",
                process.name,
                process.pid,
                process.log.display()
            );
        }
        let dir = record.data_dir.display();
        println!("use it with `mobula --cluster {dir} status`");
        println!("stop it with `mobula local down --data-dir {dir}`");
    }
    if arguments.ephemeral {
        wait_for_end().await?;
        stop_all(&record).await?;
    }
    Ok(())
}

/// Waits until standard input is closed or a signal comes.
async fn wait_for_end() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (closed, input_closed) = tokio::sync::oneshot::channel();
    // A thread of its own: a blocked read of standard input cannot be cancelled, and must not
    // keep the runtime from ending.
    std::thread::spawn(move || {
        let mut sink = [0; 256];
        while matches!(std::io::stdin().read(&mut sink), Ok(count) if count > 0) {}
        let _ = closed.send(());
    });
    tokio::select! {
        _ = input_closed => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Starts a cluster and waits until all its workers have joined.
pub(crate) async fn start(options: &LocalOptions) -> anyhow::Result<ClusterRecord> {
    let dir = &options.data_dir;
    refuse_second(dir)?;
    std::fs::create_dir_all(dir)
        .with_context(|| format!("the data directory {} cannot be made", dir.display()))?;
    let mut processes = Vec::new();
    match start_processes(options, &mut processes).await {
        Ok(record) => Ok(record),
        Err(error) => {
            // Nothing that was started stays behind.
            for process in processes.iter().rev() {
                super::process::end(process.pid, process.start_time, Duration::ZERO).await;
            }
            Err(error)
        }
    }
}

fn refuse_second(dir: &Path) -> anyhow::Result<()> {
    let Some(record) = ClusterRecord::read(dir)? else {
        return Ok(());
    };
    if let Some(process) = record.processes.iter().find(|process| process.is_alive()) {
        bail!(
            "a cluster runs in {} already ({} has pid {}): stop it with `mobula local down \
             --data-dir {}`, or give another --data-dir",
            dir.display(),
            process.name,
            process.pid,
            dir.display()
        );
    }
    Ok(())
}

async fn start_processes(
    options: &LocalOptions,
    processes: &mut Vec<ProcessRecord>,
) -> anyhow::Result<ClusterRecord> {
    let dir = &options.data_dir;
    let mut heads = Heads::start_first(options, processes).await?;
    let token_dir = dir.join("tokens");
    let worker_token = heads.copy_token(WORKER_TOKEN_FILE, &token_dir).await?;
    let client_token = heads.copy_token(CLIENT_TOKEN_FILE, &token_dir).await?;
    heads.start_others(options, processes, &token_dir).await?;

    for number in 1..=options.workers {
        let name = format!("worker-{number}");
        let log = dir.join(format!("{name}.log"));
        let mut arguments = vec!["worker".to_owned()];
        let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        option("--name", name.clone());
        option("--data-dir", dir.join(&name).display().to_string());
        option("--head", heads.api_addresses.join(","));
        option("--join-token-file", worker_token.display().to_string());
        option("--cpus", options.cpus.to_string());
        if let Some(address) = ingress_of(options, number)? {
            option("--ingress", address.to_string());
        }
        option(
            "--notice-file",
            dir.join(&name).join("notice").display().to_string(),
        );
        let worker = spawn(&arguments, &log)?;
        processes.push(record_of(&worker, "worker", &name, &log)?);
    }
    let record = ClusterRecord {
        cluster_id: heads.cluster_id,
        data_dir: dir.clone(),
        api_addresses: heads.api_addresses,
        client_token_file: client_token,
        processes: processes.clone(),
    };
    record.write()?;
    wait_for_workers(&record, options.workers).await?;
    Ok(record)
}

/// Where the worker of this number, counted from 1, answers for all endpoints.
fn ingress_of(options: &LocalOptions, number: u32) -> anyhow::Result<Option<SocketAddr>> {
    let Some(first) = options.ingress else {
        return Ok(None);
    };
    let port = u32::from(first.port()) + number - 1;
    let port = u16::try_from(port).with_context(|| {
        format!(
            "worker-{number} would have its ingress at port {port}: give --ingress a lower port"
        )
    })?;
    Ok(Some(SocketAddr::new(first.ip(), port)))
}

pub(super) fn record_of(
    child: &Child,
    role: &str,
    name: &str,
    log: &Path,
) -> anyhow::Result<ProcessRecord> {
    Ok(ProcessRecord {
        role: role.to_owned(),
        name: name.to_owned(),
        pid: child.id(),
        start_time: start_time_of(child.id()).with_context(|| {
            format!("{name} ended at once:\n{}", super::process::last_lines(log))
        })?,
        addresses: Vec::new(),
        log: log.to_owned(),
    })
}

async fn wait_for_workers(record: &ClusterRecord, count: u32) -> anyhow::Result<()> {
    let cluster = Cluster::from_data_dir(&record.data_dir)
        .await
        .context("the new head does not answer")?;
    let deadline = std::time::Instant::now() + READY_LIMIT;
    loop {
        let nodes = nodes::list(&cluster).await?;
        let alive = nodes.iter().filter(|node| node.state == "alive").count();
        if alive >= count as usize {
            return Ok(());
        }
        let gone = record.processes.iter().find(|process| !process.is_alive());
        if let Some(process) = gone {
            bail!(
                "{} ended:\n{}",
                process.name,
                super::process::last_lines(&process.log)
            );
        }
        if std::time::Instant::now() >= deadline {
            bail!(
                "only {alive} of {count} workers joined within {} s",
                READY_LIMIT.as_secs()
            );
        }
        tokio::time::sleep(POLL).await;
    }
}
