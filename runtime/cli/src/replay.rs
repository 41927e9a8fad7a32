//! `mobula train replay` and `mobula train diff`.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::checkpoint::client::Archive;
use mobula_actors::training::models::ModelSpec;
use mobula_actors::training::record::RunRecord;
use mobula_actors::training::replay::program::{ReplayStage, replay_in_program};
use mobula_actors::training::replay::{ReplayReport, replay};
use mobula_actors::training::state::TrainState;
use mobula_actors::training::trace::Difference;
use mobula_actors::training::workload::Workload;
use mobula_core::id::JobId;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{StoreArguments, Target};
use crate::checkpoints::archive;
use crate::connect::connect;
use crate::output::{print_json, print_table};

/// How often it is said how far a replay is.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// A dependency list has hundreds of lines; a person is told how many differ beyond these.
const DEPENDENCIES_SHOWN: usize = 10;

/// Rows of steps that are named to a person, of those that were not recorded.
const GAPS_SHOWN: usize = 5;

/// How a run is made once more.
#[derive(Clone, Copy)]
pub(crate) struct ReplayOptions {
    /// Only so many steps.
    pub(crate) steps: Option<u64>,
    /// Whether the program that ran may be run on this machine.
    pub(crate) run_program: bool,
    pub(crate) json: bool,
}

/// Makes a job's run once more, on this machine, and says whether it ends in the same bits.
pub(crate) async fn run_replay(
    target: &Target,
    job: JobId,
    options: ReplayOptions,
    store: &StoreArguments,
) -> anyhow::Result<ExitCode> {
    let cluster = connect(target).await?;
    let archive = archive(&cluster, store).await?;
    let digest = record_digest(&cluster, job).await?;
    let record = archive.record(&digest).await?;
    let telling = Telling::of(job, &record, options);
    let report = match &record.spec.model {
        ModelSpec::Custom { .. } if options.run_program => {
            Box::pin(in_its_program(&archive, &digest, options, telling)).await?
        }
        ModelSpec::Custom { name, .. } => bail!(
            "the model `{name}` is part of the program that ran, and not of `mobula`: `{}` fetches that program \
             (BLAKE3 {}) from the cluster's object store and runs it on this machine, with all your rights",
            command_with_program(job, options, store),
            record.program.blake3.as_deref().unwrap_or("not known"),
        ),
        _ => here(&archive, record, options, telling).await?,
    };
    if options.json {
        print_json(&report)?;
    } else {
        say(&report);
    }
    Ok(if report.equal {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The command that may run the program, for the same replay.
fn command_with_program(job: JobId, options: ReplayOptions, store: &StoreArguments) -> String {
    let mut text = format!("mobula train replay {job} --run-program");
    if let Some(steps) = options.steps {
        text += &format!(" --steps {steps}");
    }
    if let Some(config) = &store.config {
        text += &format!(" --config {}", config.display());
    }
    if options.json {
        text += " --json";
    }
    text
}

/// What a person is told while a replay goes on.
struct Telling {
    is_silent: bool,
    job: JobId,
    name: String,
    recorded: u64,
    total: u64,
    said: Instant,
}

impl Telling {
    fn of(job: JobId, record: &RunRecord, options: ReplayOptions) -> Self {
        Telling {
            is_silent: options.json,
            job,
            name: record.spec.name.clone(),
            recorded: record.steps,
            total: record.steps.min(options.steps.unwrap_or(u64::MAX)),
            said: Instant::now(),
        }
    }

    fn begin(&mut self) {
        self.said = Instant::now();
        if !self.is_silent {
            println!(
                "replaying {} of {} steps of {} (`{}`) on this machine",
                self.total, self.recorded, self.job, self.name
            );
        }
    }

    fn step(&mut self, step: u64) {
        if !self.is_silent && self.said.elapsed() >= PROGRESS_EVERY {
            println!("step {step}/{}", self.total);
            self.said = Instant::now();
        }
    }
}

/// Replays the run of a model of the user's own, in the program that ran.
async fn in_its_program(
    archive: &Archive,
    digest: &str,
    options: ReplayOptions,
    mut telling: Telling,
) -> anyhow::Result<ReplayReport> {
    let replayed = replay_in_program(archive, digest, options.steps, |stage| match stage {
        ReplayStage::Began => telling.begin(),
        ReplayStage::Step(step) => telling.step(step),
    });
    tokio::select! {
        replayed = replayed => Ok(replayed?),
        // The program and its folder are gone when this returns.
        stopped = stopped() => {
            stopped.context("signals cannot be heard")?;
            bail!("the replay was interrupted")
        }
    }
}

/// Returns when somebody ends this process, but for those who do it the hard way.
async fn stopped() -> std::io::Result<()> {
    let mut hung_up = signal(SignalKind::hangup())?;
    let mut terminated = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = hung_up.recv() => {}
        _ = terminated.recv() => {}
    }
    Ok(())
}

/// Replays the run of a built-in model, in this process.
async fn here(
    archive: &Archive,
    record: RunRecord,
    options: ReplayOptions,
    mut telling: Telling,
) -> anyhow::Result<ReplayReport> {
    let (spec, files) = (record.spec.clone(), archive.files(Handle::current()));
    let workload = tokio::task::spawn_blocking(move || Workload::load(&spec, &files))
        .await
        .context("the run's data could not be read")??;
    let start = match &record.spec.start_from {
        Some(from) => {
            let mut start = TrainState::initial(&workload);
            archive.start(from, &mut start).await?;
            Some(start)
        }
        None => None,
    };
    let steps_max = options.steps.unwrap_or(u64::MAX);
    telling.begin();
    let replayed = tokio::task::spawn_blocking(move || {
        replay(&record, &workload, start, steps_max, |step| {
            telling.step(step);
        })
    });
    let report = replayed
        .await
        .context("the replay did not come to an end")??;
    Ok(report)
}

fn say(report: &ReplayReport) {
    if report.equal {
        println!(
            "equal: {} steps, {} recorded states compared",
            report.steps, report.compared
        );
        println!("weights {}", report.weights_blake3);
        say_gaps("", &report.not_recorded);
        return;
    }
    match &report.difference {
        Some(difference) => say_difference(difference),
        None => println!("differs: after a step that no digest is known of"),
    }
    say_gaps("", &report.not_recorded);
    println!("weights here     {}", report.weights_blake3);
    println!("weights recorded {}", report.recorded_weights_blake3);
}

fn say_difference(difference: &Difference) {
    println!(
        "differs: the states after step {} are not the same",
        difference.step
    );
    if let Some(step) = difference.equal_until {
        println!("  after step {step} they still were");
    }
    if let Some((step, tensor)) = &difference.tensor {
        println!("  the first tensor that differs after step {step} is {tensor}");
    }
}

/// Says which steps `of_whom` has no states of, if there are any.
fn say_gaps(of_whom: &str, gaps: &[(u64, u64)]) {
    if let Some(steps) = gap_text(gaps) {
        println!(
            "not recorded{of_whom}: {steps}: a driver was lost there and trainers went on, so these states are not \
             compared"
        );
    }
}

/// The rows of steps, as far as a person wants to read them; nothing where there are none.
fn gap_text(gaps: &[(u64, u64)]) -> Option<String> {
    let shown = gaps.iter().take(GAPS_SHOWN).map(|(first, last)| {
        if first == last {
            format!("step {first}")
        } else {
            format!("steps {first} to {last}")
        }
    });
    let mut shown: Vec<String> = shown.collect();
    if gaps.len() > GAPS_SHOWN {
        shown.push(format!("and {} more such rows", gaps.len() - GAPS_SHOWN));
    }
    (!shown.is_empty()).then(|| shown.join(", "))
}

#[derive(Serialize)]
struct DiffJson {
    a: u64,
    b: u64,
    equal_weights: bool,
    difference: Option<Difference>,
    not_recorded: [Vec<(u64, u64)>; 2],
    fields: BTreeMap<String, [String; 2]>,
}

/// Says what differs between the records of two runs.
pub(crate) async fn run_diff(
    target: &Target,
    a: JobId,
    b: JobId,
    store: &StoreArguments,
    json: bool,
) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    let archive = archive(&cluster, store).await?;
    let first = record_of(&cluster, &archive, a).await?;
    let second = record_of(&cluster, &archive, b).await?;
    let fields: BTreeMap<String, [String; 2]> = first
        .differences(&second)
        .into_iter()
        .filter(|(key, ..)| key != "job")
        .map(|(key, ours, theirs)| (key, [ours, theirs]))
        .collect();
    let (first_trace, second_trace) = (first.trace()?, second.trace()?);
    let difference = first_trace.first_difference(&second_trace);
    let not_recorded = [
        first_trace.not_recorded(first.steps),
        second_trace.not_recorded(second.steps),
    ];
    let equal_weights = first.weights_blake3 == second.weights_blake3;
    if json {
        return print_json(&DiffJson {
            a: a.0,
            b: b.0,
            equal_weights,
            difference,
            not_recorded,
            fields,
        });
    }
    let is_dependency = |key: &str| key.starts_with("program.dependencies.");
    let mut dependencies = 0;
    let mut rows = Vec::new();
    for (key, [ours, theirs]) in &fields {
        if is_dependency(key) {
            dependencies += 1;
            if dependencies > DEPENDENCIES_SHOWN {
                continue;
            }
        }
        rows.push(vec![key.clone(), ours.clone(), theirs.clone()]);
    }
    if rows.is_empty() {
        println!("nothing differs in what {a} and {b} were");
    } else {
        print_table(&["KEY", &a.to_string(), &b.to_string()], &rows);
    }
    if dependencies > DEPENDENCIES_SHOWN {
        println!(
            "and {} more dependencies; --json has all",
            dependencies - DEPENDENCIES_SHOWN
        );
    }
    match difference {
        None if equal_weights => println!("both ended in the same bits"),
        None => {
            println!("they ended in different bits, and no state of both is known that differs")
        }
        Some(difference) => say_difference(&difference),
    }
    for (job, gaps) in [a, b].iter().zip(&not_recorded) {
        say_gaps(&format!(" of {job}"), gaps);
    }
    Ok(())
}

async fn record_of(cluster: &Cluster, archive: &Archive, job: JobId) -> anyhow::Result<RunRecord> {
    Ok(archive.record(&record_digest(cluster, job).await?).await?)
}

/// What names the record of a job's run.
async fn record_digest(cluster: &Cluster, job: JobId) -> anyhow::Result<String> {
    let status = cluster.job_handle(job).status().await?;
    if status.ended_ms.is_none() {
        bail!("{job} has not ended: its record is made at its end");
    }
    let result: serde_json::Value = status
        .result_json
        .as_deref()
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    let digest = result["record"].as_str().with_context(|| {
        format!(
            "{job} ({}) left no record: only training jobs that succeed do",
            status.state
        )
    })?;
    Ok(digest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_runs_the_program_is_for_the_same_replay() {
        let job = JobId(12);
        let mut options = ReplayOptions {
            steps: None,
            run_program: false,
            json: false,
        };
        let mut store = StoreArguments { config: None };
        assert_eq!(
            command_with_program(job, options, &store),
            "mobula train replay job-12 --run-program"
        );
        (options.steps, options.json) = (Some(20), true);
        store.config = Some("s3.toml".into());
        assert_eq!(
            command_with_program(job, options, &store),
            "mobula train replay job-12 --run-program --steps 20 --config s3.toml --json"
        );
    }

    #[test]
    fn steps_that_were_not_recorded_are_named_row_by_row() {
        assert_eq!(gap_text(&[]), None);
        let text = gap_text(&[(41, 57), (80, 80)]);
        assert_eq!(text.as_deref(), Some("steps 41 to 57, step 80"));
        let many: Vec<(u64, u64)> = (1..=7).map(|row| (row * 10, row * 10 + 1)).collect();
        let text = gap_text(&many).unwrap();
        assert!(
            text.ends_with("steps 50 to 51, and 2 more such rows"),
            "{text}"
        );
    }
}
