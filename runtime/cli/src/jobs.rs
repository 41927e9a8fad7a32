//! `mobula jobs`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use mobula::Cluster;
use mobula::log_lines::{FOLD_WINDOW, LogLines};
use mobula_actors::checkpoint::client;
use mobula_core::clock::Clock;
use mobula_core::id::JobId;
use mobula_core::kept::KeptObject;
use mobula_wire::control::Job;
use serde_json::json;

use crate::args::{JobsCommand, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table, result_lines};
use crate::preemptions;

pub(crate) async fn run(target: &Target, command: JobsCommand) -> anyhow::Result<ExitCode> {
    let cluster = connect(target).await?;
    match command {
        JobsCommand::List(format) => {
            let jobs = cluster.list_jobs().await?;
            if format.json {
                let jobs: Result<Vec<_>, _> = jobs.iter().map(as_json).collect();
                print_json(&jobs?)?;
                return Ok(ExitCode::SUCCESS);
            }
            let rows: Vec<Vec<String>> = jobs.iter().map(row).collect();
            print_table(
                &["ID", "NAME", "NAMESPACE", "STATE", "AGE", "RESTARTS", "WHY"],
                &rows,
            );
        }
        JobsCommand::Show { job, format } => {
            let job = cluster.job_handle(job).status().await?;
            if format.json {
                print_json(&as_json(&job)?)?;
            } else {
                show(&job);
            }
        }
        JobsCommand::Logs {
            job,
            follow,
            all: true,
            no_dedup,
        } => print_all_logs(&cluster, job, follow, LogLines::new(!no_dedup)).await?,
        JobsCommand::Logs { job, follow, .. } => print_logs(&cluster, job, follow).await?,
        JobsCommand::Timeline { job, output } => {
            let timeline = cluster.job_handle(job).timeline().await?;
            let mut trace = timeline.to_chrome_trace();
            let notices = client::preemptions(&cluster, job).await?;
            if let Some(events) = trace["traceEvents"].as_array_mut() {
                events.extend(preemptions::marks(&notices));
            }
            let Some(path) = output else {
                print_json(&trace)?;
                return Ok(ExitCode::SUCCESS);
            };
            std::fs::write(&path, serde_json::to_vec(&trace)?)
                .with_context(|| format!("{} cannot be written", path.display()))?;
            println!(
                "{} spans in {}; open it at https://ui.perfetto.dev",
                timeline.spans().len(),
                path.display()
            );
        }
        JobsCommand::Kept { job, format } => {
            let kept = cluster.in_job(job).kept_objects().await?;
            if format.json {
                print_json(&kept.iter().map(kept_as_json).collect::<Vec<_>>())?;
                return Ok(ExitCode::SUCCESS);
            }
            let now_ms = SystemClock.now_ms();
            let row = |kept: &KeptObject| {
                let size = kept.value.size_bytes.to_string();
                vec![kept.name.clone(), size, age(kept.kept_ms, now_ms)]
            };
            let rows: Vec<Vec<String>> = kept.iter().map(row).collect();
            print_table(&["NAME", "BYTES", "AGE"], &rows);
        }
        JobsCommand::Stop { job } => {
            let handle = cluster.job_handle(job);
            handle.stop().await?;
            let now = handle.status().await?;
            if now.ended_ms.is_some() {
                println!("{job} has ended: {}", now.state);
            } else {
                println!("{job} is stopping");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what a job's driver printed.
pub(crate) async fn print_logs(cluster: &Cluster, job: JobId, follow: bool) -> anyhow::Result<()> {
    let mut logs = cluster.job_handle(job).logs(follow).await?;
    let mut stdout = std::io::stdout();
    while let Some(chunk) = logs.next_chunk().await? {
        stdout.write_all(&chunk)?;
        stdout.flush()?;
    }
    Ok(())
}

/// Prints what all of a job's processes printed.
async fn print_all_logs(
    cluster: &Cluster,
    job: JobId,
    follow: bool,
    mut lines: LogLines,
) -> anyhow::Result<()> {
    let mut logs = cluster.job_handle(job).all_logs(follow).await?;
    let mut stdout = std::io::stdout();
    let mut show = |text: Vec<u8>| {
        stdout.write_all(&text)?;
        stdout.flush()
    };
    let mut tick = tokio::time::interval(FOLD_WINDOW / 5);
    loop {
        tokio::select! {
            chunk = logs.next_with_source() => match chunk? {
                Some(chunk) => show(lines.push(&chunk.source, &chunk.data, Instant::now()))?,
                None => break,
            },
            _ = tick.tick() => show(lines.due(Instant::now()))?,
        }
    }
    show(lines.finish(Instant::now()))?;
    Ok(())
}

/// A job as `--json` prints it: the API's message, and its result as the JSON that it is.
pub(crate) fn as_json(job: &Job) -> anyhow::Result<serde_json::Value> {
    let mut value = serde_json::to_value(job)?;
    let result = match &job.result_json {
        Some(text) => serde_json::from_str(text)?,
        None => serde_json::Value::Null,
    };
    if let Some(object) = value.as_object_mut() {
        object.insert("result".to_owned(), result);
    }
    Ok(value)
}

/// A kept object as `--json` prints it.
fn kept_as_json(kept: &KeptObject) -> serde_json::Value {
    json!({
        "name": kept.name,
        "size_bytes": kept.value.size_bytes,
        "kept_ms": kept.kept_ms,
    })
}

/// Why a job is not (or not any more) running, or why one without a driver is.
fn why(job: &Job) -> Option<String> {
    let reason = job.pending_reason.as_ref().or(job.exit_reason.as_ref());
    match (reason, job.detached_actors) {
        (None, Some(1)) => Some("keeps 1 detached actor".to_owned()),
        (None, Some(count)) => Some(format!("keeps {count} detached actors")),
        (reason, _) => reason.cloned(),
    }
}

fn row(job: &Job) -> Vec<String> {
    let until = job.ended_ms.unwrap_or_else(|| SystemClock.now_ms());
    vec![
        JobId(job.id).to_string(),
        job.name.clone(),
        or_dash(job.namespace.as_ref()),
        job.state.clone(),
        age(job.submitted_ms, until),
        job.restarts.to_string(),
        or_dash(why(job)),
    ]
}

fn show(job: &Job) {
    println!("id         {}", JobId(job.id));
    println!("name       {}", job.name);
    if let Some(namespace) = &job.namespace {
        println!("namespace  {namespace}");
    }
    println!("state      {}", job.state);
    println!("restarts   {}", job.restarts);
    if let Some(why) = why(job) {
        println!("why        {why}");
    }
    if let Some(problem) = &job.storage_problem {
        println!("storage    PROBLEM: {problem}");
        println!("           what the job loads or saves there waits until it answers");
    }
    if let Some(result) = &job.result_json {
        let lines = result_lines(JobId(job.id), result);
        println!("result     {}", lines.join("\n           "));
    }
}
