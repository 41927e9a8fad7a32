//! `mobula train replay` and `mobula train diff`.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::checkpoint::client::Archive;
use mobula_actors::training::record::RunRecord;
use mobula_actors::training::replay::{ReplayReport, replay};
use mobula_actors::training::state::TrainState;
use mobula_actors::training::trace::Difference;
use mobula_actors::training::workload::Workload;
use mobula_core::id::JobId;
use serde::Serialize;
use tokio::runtime::Handle;

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

/// Makes a job's run once more, here, and says whether it ends in the same bits.
pub(crate) async fn run_replay(
    target: &Target,
    job: JobId,
    steps: Option<u64>,
    store: &StoreArguments,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let cluster = connect(target).await?;
    let archive = archive(&cluster, store).await?;
    let record = record_of(&cluster, &archive, job).await?;
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
    let steps_max = steps.unwrap_or(u64::MAX);
    let total = record.steps.min(steps_max);
    if !json {
        println!(
            "replaying {total} of {} steps of {job} (`{}`) on this machine",
            record.steps, record.spec.name
        );
    }
    let report = tokio::task::spawn_blocking(move || {
        let mut said = Instant::now();
        replay(&record, &workload, start, steps_max, |step| {
            if !json && said.elapsed() >= PROGRESS_EVERY {
                println!("step {step}/{total}");
                said = Instant::now();
            }
        })
    })
    .await
    .context("the replay did not come to an end")??;
    if json {
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
    Ok(archive.record(digest).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

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
