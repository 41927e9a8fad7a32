//! The core suite: Ray's own benchmark names (`ray microbenchmark`), each against a real cluster of
//! processes, and beside them what the machine itself can do in the same run.
//!
//! Started by a person it makes a cluster of its own, as every program of the SDK does, and its
//! `main` runs there as a job's driver. `cargo xtask bench core` builds and starts it; see
//! `benches/README.md`.
//!
//! Ray's actors are processes, so every row with Ray's name has its caller and its actors in
//! processes of their own. Rows within one process say so.

mod actors;
mod calls;
mod large_objects;
mod limits;
mod memory;
mod objects;
mod outcome;
mod spawning;
mod tasks;

use std::path::PathBuf;
use std::time::Duration;

use mobula::prelude::*;

use outcome::Outcome;

/// How long things are measured, and where the figures go.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Before measuring.
    pub(crate) warm_up: Duration,
    /// Each of [`Options::rounds`].
    pub(crate) round: Duration,
    pub(crate) rounds: u32,
    /// Idle actors whose memory is measured.
    pub(crate) idle_actors: usize,
    /// Only rows whose name contains one of these; empty for all.
    only: Vec<String>,
    output: Option<PathBuf>,
}

impl Options {
    fn parse(args: &[String]) -> std::result::Result<Options, String> {
        let mut options = Options {
            warm_up: Duration::from_millis(500),
            round: Duration::from_secs(1),
            rounds: 3,
            idle_actors: 8000,
            only: Vec::new(),
            output: None,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("`{arg}` needs a value"));
            match arg.as_str() {
                "--quick" => {
                    options.warm_up = Duration::from_millis(100);
                    options.round = Duration::from_millis(300);
                    options.idle_actors = 1000;
                }
                "--idle-actors" => {
                    let count = value()?;
                    let bad = |error| format!("`--idle-actors {count}`: {error}");
                    options.idle_actors = count.parse().map_err(bad)?;
                }
                "--only" => options.only.push(value()?.clone()),
                "--output" => options.output = Some(value()?.into()),
                unknown => return Err(format!("unknown argument `{unknown}`")),
            }
        }
        Ok(options)
    }

    /// Whether a row is asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<()> {
    let options = Options::parse(&args)?;
    let mut outcome = Outcome::begin();
    if options.wants("idle") {
        memory::idle_processes(&mut outcome);
    }
    calls::measure(&cluster, &options, &mut outcome).await?;
    objects::measure(&cluster, &options, &mut outcome).await?;
    large_objects::measure(&cluster, &options, &mut outcome).await?;
    tasks::measure(&cluster, &options, &mut outcome).await?;
    spawning::measure(&cluster, &options, &mut outcome).await?;
    if options.wants("limit") {
        limits::measure(&options, &mut outcome)?;
    }
    if let Some(path) = &options.output {
        outcome.save(path)?;
        println!("written to {}", path.display());
    }
    Ok(())
}
