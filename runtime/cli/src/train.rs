//! `mobula train`: submits a training job and follows it; says how one goes.

use std::process::ExitCode;

use anyhow::{Context, bail};
use mobula::{Cluster, JobHandle};
use mobula_actors::checkpoint::client;
use mobula_actors::training::progress::{ProgressLine, StepBreakdown};
use mobula_core::id::JobId;
use serde::Serialize;

use crate::args::{Target, TrainArguments, TrainCommand};
use crate::connect::connect;
use crate::jobs::as_json;
use crate::output::{or_dash, print_json};
use crate::preemptions::{self, PreemptionJson, newest_lines};
use crate::replay;
use crate::submit::{follow, require_executable};
use crate::train_file::{self, TrainFile};

pub(crate) async fn run(
    target: &Target,
    command: Option<TrainCommand>,
    arguments: TrainArguments,
) -> anyhow::Result<ExitCode> {
    match command {
        Some(TrainCommand::Status { job, format }) => {
            status(&connect(target).await?, job, format.json).await
        }
        Some(TrainCommand::Replay {
            job,
            steps,
            run_program,
            store,
            format,
        }) => {
            let options = replay::ReplayOptions {
                steps,
                run_program,
                json: format.json,
            };
            Box::pin(replay::run_replay(target, job, options, &store)).await
        }
        Some(TrainCommand::Diff {
            a,
            b,
            store,
            format,
        }) => {
            replay::run_diff(target, a, b, &store, format.json).await?;
            Ok(ExitCode::SUCCESS)
        }
        None => submit(target, arguments).await,
    }
}

async fn submit(target: &Target, arguments: TrainArguments) -> anyhow::Result<ExitCode> {
    let Some(file) = &arguments.file else {
        bail!("name a job file, such as cluster-configs/jobs/digits-mlp.toml, or `status <job>`");
    };
    let TrainFile {
        spec,
        text,
        secrets,
        files,
    } = train_file::read(file, arguments.workers)?;
    match &arguments.program {
        Some(program) => require_executable(program)?,
        None => train_file::check_program(&spec, file)?,
    }
    let cluster = connect(target).await?;
    let mut job = cluster
        .new_job(arguments.name.as_deref().unwrap_or(&spec.name))
        .args(["train".to_owned(), text]);
    if let Some(program) = &arguments.program {
        job = job.program(program);
    }
    for (name, value) in secrets {
        job = job.secret(name, value);
    }
    for (path, name) in files {
        job = job.file(path, name);
    }
    let id = job
        .cpus(arguments.cpus)
        .max_restarts(arguments.max_restarts)
        .on_upload(crate::upload::shown())
        .submit()
        .await?
        .id();
    let json = arguments.format.json;
    if !arguments.follow {
        if json {
            print_json(&serde_json::json!({ "job": id.0 }))?;
        } else {
            println!("{id} submitted; see how it goes with `mobula train status {id}`");
        }
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{id} submitted; Ctrl-C stops following, not the job");
    tokio::select! {
        end = follow(&cluster, id, json) => end,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.context("Ctrl-C cannot be waited for")?;
            eprintln!(
                "\n{id} goes on. Follow it again: mobula jobs logs -f {id}\n\
                 See how it goes:  mobula train status {id}\n\
                 End it:           mobula jobs stop {id}"
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// What `mobula train status` knows of a job.
#[derive(Debug, Serialize)]
struct Status {
    job: u64,
    name: String,
    state: String,
    restarts: u32,
    why: Option<String>,
    progress: Option<ProgressLine>,
    /// Milliseconds of a step, part by part.
    breakdown_ms: Option<serde_json::Map<String, serde_json::Value>>,
    evaluation: Option<String>,
    result: serde_json::Value,
    /// What its drivers did about notices, oldest first.
    preemptions: Vec<PreemptionJson>,
}

async fn status(cluster: &Cluster, id: JobId, json: bool) -> anyhow::Result<ExitCode> {
    let handle = cluster.job_handle(id);
    let job = handle.status().await?;
    let mut told = Told::default();
    if let Err(error) = told.read_log(&handle).await {
        // What the head knows is worth showing all the same.
        eprintln!("the log of {id} cannot be read now: {error}");
    }
    let preemptions = match client::preemptions(cluster, id).await {
        Ok(known) => preemptions::as_json(&known),
        Err(error) => {
            eprintln!("what became of notices cannot be asked now: {error}");
            Vec::new()
        }
    };
    let status = Status {
        job: id.0,
        name: job.name.clone(),
        state: job.state.clone(),
        restarts: job.restarts,
        why: job.pending_reason.clone().or(job.exit_reason.clone()),
        breakdown_ms: told.progress.map(|line| {
            let names = StepBreakdown::default().parts();
            let parts = names.iter().zip(line.parts_ms);
            parts
                .map(|((name, _), ms)| ((*name).to_owned(), ms.into()))
                .collect()
        }),
        progress: told.progress,
        evaluation: told.evaluation,
        result: as_json(&job)?["result"].clone(),
        preemptions,
    };
    if json {
        print_json(&status)?;
    } else {
        show(&status);
    }
    Ok(ExitCode::SUCCESS)
}

/// What a job's log says of its progress, as far as it was read.
#[derive(Default)]
struct Told {
    progress: Option<ProgressLine>,
    evaluation: Option<String>,
    /// The beginning of a line that is not there whole.
    rest: Vec<u8>,
}

/// Bytes of a line, at most; a longer one tells no progress.
const LINE_BYTES_MAX: usize = 16 << 10;

impl Told {
    async fn read_log(&mut self, job: &JobHandle) -> mobula::Result<()> {
        let mut logs = job.logs(false).await?;
        while let Some(chunk) = logs.next_chunk().await? {
            self.read(&chunk);
        }
        self.end();
        Ok(())
    }

    fn read(&mut self, chunk: &[u8]) {
        for piece in chunk.split_inclusive(|byte| *byte == b'\n') {
            if self.rest.len() + piece.len() <= LINE_BYTES_MAX {
                self.rest.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                self.end();
            }
        }
    }

    fn end(&mut self) {
        let line = std::mem::take(&mut self.rest);
        let line = String::from_utf8_lossy(&line);
        if let Ok(progress) = line.parse() {
            self.progress = Some(progress);
        } else if let Some(text) = line.trim().strip_prefix("evaluation ") {
            self.evaluation = Some(text.to_owned());
        }
    }
}

fn show(status: &Status) {
    println!("job         {} `{}`", JobId(status.job), status.name);
    println!("state       {}, {} restarts", status.state, status.restarts);
    if let Some(why) = &status.why {
        println!("why         {why}");
    }
    for line in newest_lines(&status.preemptions) {
        println!("notice      {line}");
    }
    let Some(line) = &status.progress else {
        println!("progress    no step is taken yet");
        return;
    };
    let share = 100.0 * line.step as f64 / line.steps.max(1) as f64;
    println!(
        "progress    step {} of {} ({share:.1} %)",
        line.step, line.steps
    );
    println!(
        "last step   loss {:.4}, learning rate {:.3e}, gradient norm {:.3e}",
        line.loss, line.learning_rate, line.gradient_norm
    );
    if let Some(evaluation) = &status.evaluation {
        println!("evaluation  {evaluation}");
    }
    println!("speed       {}", speed(line));
    let total: f64 = line.parts_ms.iter().sum();
    let names = StepBreakdown::default().parts();
    let parts: Vec<String> = names
        .iter()
        .zip(line.parts_ms)
        .map(|((name, _), ms)| format!("{name} {ms:.2}"))
        .collect();
    println!("a step      {total:.2} ms: {}", parts.join(", "));
    if !status.result.is_null() {
        let text = |key: &str| status.result[key].to_string();
        println!("weights     {}", text("weights_blake3").trim_matches('"'));
        let loss = status.result["held_out_loss"].as_f64();
        let loss = or_dash(loss.map(|loss| format!("{loss:.4}")));
        println!("held out    loss {loss}, metrics {}", text("metrics"));
    }
}

/// How fast it goes, and what that keeps busy.
fn speed(line: &ProgressLine) -> String {
    let gpus = line.gpu_utilization.map_or_else(String::new, |ratio| {
        format!(", GPUs busy {:.1} %", 100.0 * ratio)
    });
    format!(
        "{:.0} samples/s with {} workers on {:.2} cores{gpus}, goodput {:.1} %",
        line.samples_per_second,
        line.workers,
        line.cpu_cores,
        100.0 * line.goodput
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_shown_beside_the_cores_where_there_are_some() {
        let on_cpus = "step 12/20 loss 1.5 rate 1e-3 gradient 1.0 samples/s 10 workers 2 goodput 0.5 cores 0.9 ms \
            data 0.0 compute 2.0 exchange 0.5 wait 0.0 checkpoint 0.0";
        let shown = |text: &str| speed(&text.parse().unwrap());
        assert_eq!(
            shown(on_cpus),
            "10 samples/s with 2 workers on 0.90 cores, goodput 50.0 %"
        );
        assert_eq!(
            shown(&format!("{on_cpus} gpu 0.875")),
            "10 samples/s with 2 workers on 0.90 cores, GPUs busy 87.5 %, goodput 50.0 %"
        );
    }

    #[test]
    fn the_last_line_of_progress_counts_however_the_log_is_cut() {
        let text = "training `a`: 20 steps\n\
            step 1/20 loss 2.5000 rate 1.000e-3 gradient 1.000e0 samples/s 10 workers 1 goodput 0.5 cores 0.9 \
            ms data 0.0 compute 1.0 exchange 0.0 wait 0.0 checkpoint 0.0\n\
            evaluation after step 10: loss 1.5\n\
            step 12/20 loss 1.5000 rate 1.000e-3 gradient 1.000e0 samples/s 10 workers 2 goodput 0.5 cores 0.9 \
            ms data 0.0 compute 2.0 exchange 0.5 wait 0.0 checkpoint 0.0\nstep 13/20 loss";
        for size in [1, 7, 50, 4096] {
            let mut told = Told::default();
            for chunk in text.as_bytes().chunks(size) {
                told.read(chunk);
            }
            told.end();
            let line = told.progress.unwrap();
            assert_eq!((line.step, line.workers, line.parts_ms[2]), (12, 2, 0.5));
            assert_eq!(told.evaluation.as_deref(), Some("after step 10: loss 1.5"));
        }
    }
}
