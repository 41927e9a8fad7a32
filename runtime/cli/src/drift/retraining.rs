//! `mobula drift loop`, `history`, `retrain`, `cancel`: the retrainings of an endpoint.

use anyhow::Context;
use mobula_actors::drift::client;
use mobula_actors::drift::retraining::evaluation::Comparison;
use mobula_actors::drift::retraining::plan::Step;
use mobula_actors::drift::retraining::{History, Phase, Retraining, Shown};
use mobula_core::clock::Clock;
use serde::Serialize;

use crate::args::{DriftTarget, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table};

/// A retraining as `--json` prints it.
#[derive(Serialize)]
struct RetrainingJson<'a> {
    endpoint: &'a str,
    number: u64,
    model: &'a str,
    phase: Phase,
    waits_for: Option<&'a str>,
    event: u64,
    drift: &'a str,
    baseline_version: u64,
    job: Option<u64>,
    version: Option<u64>,
    comparison: Option<&'a Comparison>,
    rollout: Option<u64>,
    steps: &'a [Step],
}

/// The retrainings of an endpoint as `--json` prints them.
#[derive(Serialize)]
struct HistoryJson<'a> {
    endpoint: &'a str,
    jobs_left: Option<u32>,
    quiet_until_ms: Option<u64>,
    /// Oldest first.
    retrainings: Vec<RetrainingJson<'a>>,
}

impl<'a> RetrainingJson<'a> {
    fn of(row: &'a Retraining, waits_for: Option<&'a str>) -> Self {
        RetrainingJson {
            endpoint: &row.endpoint,
            number: row.number,
            model: &row.model,
            phase: row.phase,
            waits_for,
            event: row.event,
            drift: &row.drift,
            baseline_version: row.baseline.version,
            job: row.job,
            version: row.candidate,
            comparison: row.comparison.as_ref(),
            rollout: row.rollout,
            steps: &row.steps,
        }
    }

    fn of_shown(shown: &'a Shown) -> Self {
        RetrainingJson::of(&shown.retraining, shown.waits_for.as_deref())
    }
}

pub(super) async fn newest(target: &Target, of: DriftTarget) -> anyhow::Result<()> {
    let found = client::retrainings(&connect(target).await?, &of.endpoint).await?;
    let newest = found.retrainings.last().with_context(|| {
        format!(
            "endpoint `{0}` has had no retraining: `mobula drift policy show {0}` says what is done when it \
             drifts, `mobula drift status` whether it does",
            of.endpoint
        )
    })?;
    if of.format.json {
        return print_json(&RetrainingJson::of_shown(newest));
    }
    print_retraining(newest);
    Ok(())
}

pub(super) async fn history(target: &Target, of: DriftTarget) -> anyhow::Result<()> {
    let found = client::retrainings(&connect(target).await?, &of.endpoint).await?;
    let History {
        retrainings,
        jobs_left,
        quiet_until_ms,
    } = &found;
    if of.format.json {
        return print_json(&HistoryJson {
            endpoint: &of.endpoint,
            jobs_left: *jobs_left,
            quiet_until_ms: *quiet_until_ms,
            retrainings: retrainings.iter().map(RetrainingJson::of_shown).collect(),
        });
    }
    let now_ms = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = retrainings
        .iter()
        .map(|shown| {
            let row = &shown.retraining;
            vec![
                row.number.to_string(),
                age(row.began_ms(), now_ms),
                row.event.to_string(),
                format!("{}:{}", row.model, row.baseline.version),
                or_dash(row.job.map(|job| format!("job-{job}"))),
                or_dash(
                    row.candidate
                        .map(|version| format!("{}:{version}", row.model)),
                ),
                row.phase.as_str().to_owned(),
                row.steps
                    .last()
                    .map(|step| step.reason.clone())
                    .unwrap_or_default(),
            ]
        })
        .collect();
    print_table(
        &[
            "NUMBER", "BEGAN", "EVENT", "ACTIVE", "JOB", "VERSION", "PHASE", "REASON",
        ],
        &rows,
    );
    match (jobs_left, quiet_until_ms) {
        (None, _) => println!(
            "\nthere is no policy: nothing is done when {} drifts",
            of.endpoint
        ),
        (Some(left), None) => println!("\nthe budget allows {left} more jobs now"),
        (Some(left), Some(until)) => println!(
            "\nthe budget allows {left} more jobs now; the cooldown lasts {} more",
            age(now_ms, *until)
        ),
    }
    Ok(())
}

pub(super) async fn retrain(target: &Target, of: DriftTarget) -> anyhow::Result<()> {
    let row = client::retrain(&connect(target).await?, &of.endpoint).await?;
    print_changed(&row, &of)
}

pub(super) async fn cancel(target: &Target, of: DriftTarget, reason: &str) -> anyhow::Result<()> {
    let row = client::cancel(&connect(target).await?, &of.endpoint, reason).await?;
    print_changed(&row, &of)
}

fn print_changed(row: &Retraining, of: &DriftTarget) -> anyhow::Result<()> {
    if of.format.json {
        return print_json(&RetrainingJson::of(row, None));
    }
    println!(
        "retraining {} of {} is {}; see how it goes with `mobula drift loop {}`",
        row.number,
        row.endpoint,
        row.phase.as_str(),
        row.endpoint
    );
    Ok(())
}

fn print_retraining(shown: &Shown) {
    let row = &shown.retraining;
    println!(
        "retraining {} of {} (active {}:{}) is {}",
        row.number,
        row.endpoint,
        row.model,
        row.baseline.version,
        row.phase.as_str()
    );
    println!("drift event {}: {}", row.event, row.drift);
    if let Some(waits_for) = &shown.waits_for {
        println!("waits for: {waits_for}");
    }
    println!();
    let now_ms = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = row
        .steps
        .iter()
        .map(|step| {
            vec![
                age(step.at_ms, now_ms),
                step.phase.as_str().to_owned(),
                step.reason.clone(),
            ]
        })
        .collect();
    print_table(&["AGO", "PHASE", "WHY"], &rows);
}
