//! `mobula demo`: the whole mission on a real cluster of processes, with real faults, and a table
//! of what was shown at the end.
//!
//! * `stages`: what happens, in order. * `training`: a job that is watched and disturbed.
//! * `lifecycle`: versions that are signed, tried, rolled back and followed by others.
//! * `requests`: load on an endpoint. * `report`: the table.

mod lifecycle;
mod report;
mod requests;
mod stages;
mod training;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use crate::args::DemoArguments;
use crate::local::stop_all;
use crate::local::up::{LocalOptions, start};
use crate::output::print_json;
use report::{Progress, Report};

/// Three workers: one can be taken away while two go on.
const WORKERS: u32 = 3;

/// CPU cores that each worker claims to have. The processes share the machine's real ones.
const CPUS: f64 = 4.0;

pub(crate) async fn run(arguments: DemoArguments) -> anyhow::Result<ExitCode> {
    let (data_dir, temporary) = data_dir(arguments.data_dir)?;
    let options = LocalOptions {
        data_dir,
        heads: 1,
        workers: WORKERS,
        cpus: CPUS,
        storage_url: None,
        ingress: None,
        config: None,
    };
    let seed = arguments
        .seed
        .unwrap_or_else(|| rand::random_range(0..1_000_000));
    let progress = Progress::start(arguments.format.json);
    progress.say("starting 1 head and 3 workers");
    let record = start(&options)
        .await
        .context("the cluster does not start")?;
    let mut report = Report::default();
    let outcome = stages::run(&record, seed, &progress, &mut report).await;
    if arguments.keep {
        progress.finish();
        let dir = record.data_dir.display();
        eprintln!("the cluster is left up in {dir}; reach it with:");
        eprintln!("  mobula --cluster {dir} status");
        eprintln!("  mobula --cluster {dir} serve list");
        if let Some(hint) = &report.curl {
            eprintln!("  {hint}");
        }
        eprintln!("stop it with:\n  mobula local down --data-dir {dir}");
    } else {
        stop_all(&record).await?;
        progress.finish();
        if temporary {
            std::fs::remove_dir_all(&record.data_dir)
                .with_context(|| format!("{} cannot be removed", record.data_dir.display()))?;
        }
    }
    if let Err(error) = outcome {
        report.fail("the demo itself", format!("{error:#}"));
    }
    if arguments.format.json {
        print_json(&report)?;
    } else {
        report.print();
    }
    Ok(if report.all_passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Where everything is kept, and whether that is to be removed at the end.
fn data_dir(given: Option<PathBuf>) -> anyhow::Result<(PathBuf, bool)> {
    match given {
        Some(dir) => Ok((std::path::absolute(dir)?, false)),
        // Short, because Unix sockets in it have paths of 108 bytes at the most.
        None => Ok((
            tempfile::Builder::new()
                .prefix("mobula-demo-")
                .tempdir()?
                .keep(),
            true,
        )),
    }
}
