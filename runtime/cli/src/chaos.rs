//! `mobula chaos`: hurt a cluster on purpose, and see whether it keeps its promises.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::ensure;
use indicatif::{ProgressBar, ProgressStyle};
use mobula_chaos::sim::{Campaign, Counts, EVENTS_MAX, Report, Summary, run, run_many};

use crate::args::{ChaosCommand, ChaosSimArguments};

pub(crate) async fn run_command(command: ChaosCommand) -> anyhow::Result<ExitCode> {
    match command {
        ChaosCommand::Sim(arguments) => simulate(&arguments),
        ChaosCommand::Run(arguments) => crate::scenario::run(arguments).await,
        ChaosCommand::List(format) => crate::scenario::list(format),
    }
}

fn simulate(arguments: &ChaosSimArguments) -> anyhow::Result<ExitCode> {
    let is_one = arguments.seeds.unwrap_or(1) == 1 && arguments.minutes.is_none();
    let first_seed = arguments.seed.unwrap_or_else(seed_of_the_moment);
    let events_max = arguments.events_max.unwrap_or(EVENTS_MAX);
    if is_one {
        return Ok(simulate_one(first_seed, events_max, arguments.verbose));
    }
    ensure!(
        !arguments.verbose,
        "--verbose prints one run: give --seed alone"
    );
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = arguments.threads.unwrap_or(cores).max(1);
    let campaign = Campaign {
        first_seed,
        seeds: arguments.seeds,
        time_max: arguments
            .minutes
            .map(|minutes| Duration::from_secs_f64(minutes.max(0.0) * 60.0)),
        events_max,
        threads,
        stops_at_failure: false,
    };
    println!("seeds from {first_seed} on, {threads} at a time");
    let bar = match campaign.seeds {
        Some(seeds) => ProgressBar::new(seeds),
        None => ProgressBar::new_spinner(),
    };
    bar.set_style(ProgressStyle::with_template(
        "{elapsed_precise} {wide_bar} {pos}/{len} {per_sec} {msg}",
    )?);
    let failed = AtomicU64::new(0);
    let summary = run_many(
        &campaign,
        || {},
        |report| {
            bar.inc(1);
            if let Some(violation) = &report.violation {
                let count = failed.fetch_add(1, Ordering::Relaxed) + 1;
                bar.set_message(format!("{count} failed"));
                bar.println(format!("seed {}: {violation}", report.seed));
            }
        },
    );
    bar.finish_and_clear();
    print_summary(&summary, threads);
    let missing = summary.counts.missing(summary.seeds);
    if !missing.is_empty() {
        println!(
            "\ntoo little happened for these seeds to show anything about: {}",
            missing.join(", ")
        );
    }
    Ok(exit_code(summary.failed + missing.len() as u64))
}

pub(crate) fn seed_of_the_moment() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    since.as_secs()
}

fn exit_code(failed: u64) -> ExitCode {
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn simulate_one(seed: u64, events_max: u64, is_verbose: bool) -> ExitCode {
    let report = run(seed, events_max, is_verbose);
    print_report(&report);
    exit_code(u64::from(report.violation.is_some()))
}

fn print_report(report: &Report) {
    println!("seed      {}", report.seed);
    println!("options   {}", report.swarm);
    println!("trace     {:016x}", report.trace);
    println!(
        "run       {} ms of virtual time, {}",
        report.virtual_ms,
        coverage(&report.counts)
    );
    match &report.violation {
        None => println!("result    every promise was kept"),
        Some(violation) => {
            println!("result    BROKEN: {violation}");
            println!("again     {}", report.replay());
        }
    }
}

/// All that a run came across, in a line.
fn coverage(counts: &Counts) -> String {
    let rows = counts.rows().into_iter();
    let met: Vec<String> = rows
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    met.join(", ")
}

fn print_summary(summary: &Summary, threads: usize) {
    let mut rows = vec![
        ("seeds", summary.seeds.to_string()),
        ("failed", summary.failed.to_string()),
        (
            "wall clock",
            format!("{:.1} s", summary.elapsed.as_secs_f64()),
        ),
        (
            "seeds an hour a core",
            format!("{:.0}", summary.seeds_per_core_hour(threads)),
        ),
        (
            "virtual time",
            format!("{:.1} h", summary.virtual_ms as f64 / 3_600_000.0),
        ),
    ];
    let counted = summary.counts.rows().into_iter();
    rows.extend(counted.map(|(name, count)| (name, count.to_string())));
    for (name, value) in rows {
        println!("{name:<22}{value:>14}");
    }
    for report in &summary.failures {
        if let Some(violation) = &report.violation {
            println!("\nseed {}: {violation}\n  {}", report.seed, report.replay());
        }
    }
}
