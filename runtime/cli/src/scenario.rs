//! `mobula chaos run` and `mobula chaos list`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use mobula_chaos::real::{BUILT_IN, Isolation, RunOptions, Scenario, Timeline};
use serde_json::json;
use tokio::sync::watch;

use crate::args::{ChaosRunArguments, Format};
use crate::chaos::seed_of_the_moment;
use crate::output::{print_json, print_table};

/// A day: what is longer is several runs.
const MINUTES_MAX: f64 = 24.0 * 60.0;

pub(crate) fn list(format: Format) -> anyhow::Result<ExitCode> {
    let scenarios = BUILT_IN
        .iter()
        .filter_map(|(name, _)| Scenario::built_in(name));
    if format.json {
        let scenarios = scenarios.map(|scenario| {
            json!({
                "name": scenario.name,
                "title": scenario.title,
                "needs_network": scenario.needs_network(),
            })
        });
        print_json(&scenarios.collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<Vec<String>> = scenarios
        .map(|scenario| {
            let place = if scenario.needs_network() {
                "root"
            } else {
                "anybody"
            };
            vec![scenario.name, place.to_owned(), scenario.title]
        })
        .collect();
    print_table(&["NAME", "RUN BY", "WHAT HAPPENS"], &rows);
    Ok(ExitCode::SUCCESS)
}

fn find(name: &str) -> anyhow::Result<Scenario> {
    if let Some(scenario) = Scenario::built_in(name) {
        return Ok(scenario);
    }
    let names = || BUILT_IN.map(|(name, _)| name).join(", ");
    let text = std::fs::read_to_string(name).with_context(|| {
        format!(
            "`{name}` is neither a file that can be read nor one of the scenarios that come along: {}",
            names()
        )
    })?;
    let file = Path::new(name).file_name().and_then(|file| file.to_str());
    Ok(Scenario::from_toml(&text, file.unwrap_or(name))?)
}

/// How long `scenario` must go on until so many faults have come and are over.
fn length_of(scenario: &Scenario, seed: u64, faults: u32) -> anyhow::Result<Duration> {
    let limit = Duration::from_secs_f64(MINUTES_MAX * 60.0);
    let count = usize::try_from(faults)?;
    Timeline::length_of(seed, scenario, count, limit).with_context(|| {
        format!(
            "`{}` does not come to {faults} faults within {MINUTES_MAX} minutes: ask for fewer, or run it in parts",
            scenario.name
        )
    })
}

pub(crate) async fn run(arguments: ChaosRunArguments) -> anyhow::Result<ExitCode> {
    let scenario = find(&arguments.scenario)?;
    let seed = arguments.seed.unwrap_or_else(seed_of_the_moment);
    let (length, asked) = match arguments.faults {
        Some(faults) => {
            let length = length_of(&scenario, seed, faults)?;
            (length, format!("--faults {faults}"))
        }
        None => {
            let minutes = arguments.minutes;
            ensure!(
                (0.05..=MINUTES_MAX).contains(&minutes),
                "--minutes {minutes}: allowed are 0.05 to {MINUTES_MAX}"
            );
            let length = Duration::from_secs_f64(minutes * 60.0);
            (length, format!("--minutes {minutes}"))
        }
    };
    let isolation = if arguments.loopback {
        Isolation::Loopback
    } else {
        Isolation::available()
    };
    println!("{}: {}", scenario.name, scenario.title);
    match isolation {
        Isolation::Namespaces => println!("each machine has a network namespace of its own"),
        Isolation::Loopback => {
            println!("all machines share the loopback: no packets are taken away")
        }
    }
    println!(
        "again: mobula chaos run {} --seed {seed} {asked}{}",
        arguments.scenario,
        if arguments.loopback {
            " --loopback"
        } else {
            ""
        }
    );
    let options = RunOptions {
        program: std::env::current_exe().context("this program's own path is not known")?,
        seed,
        length,
        only_loopback: arguments.loopback,
        dir: arguments.data_dir,
        observe: Arc::new(|line| println!("{line}")),
    };
    let (stop, stopped) = watch::channel(false);
    // The run has a runtime of its own, on another network.
    let running =
        tokio::task::spawn_blocking(move || mobula_chaos::real::run(&scenario, &options, stopped));
    tokio::pin!(running);
    let outcome = tokio::select! {
        outcome = &mut running => outcome,
        _ = interrupted() => {
            eprintln!("stopping; this takes everything down first");
            stop.send_replace(true);
            running.await
        }
    };
    let outcome = outcome.context("the run panicked")??;
    println!("\n{outcome}");
    if let Some(file) = &arguments.json {
        let text = serde_json::to_string_pretty(&outcome)?;
        std::fs::write(file, text + "\n")
            .with_context(|| format!("{} cannot be written", file.display()))?;
    }
    Ok(if outcome.passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Ctrl-C, or the request to end.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
