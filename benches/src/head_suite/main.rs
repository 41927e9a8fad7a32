//! The head suite: what a group of heads takes, how long the loss of its leader is felt, how long it
//! takes to start with a long history, and what its tables need.
//!
//! `cargo xtask bench head` builds and starts it; see `benches/README.md`.

mod commands;
mod failover;
mod history;
mod simulator;
mod tables;

use std::path::PathBuf;
use std::time::Duration;

use mobula_benches::results::Results;

/// What a part may end with.
type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// How much is measured, and where the figures go.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// For each rate.
    pub(crate) round: Duration,
    /// How long leaders are killed.
    pub(crate) failover: Duration,
    /// Jobs in the history.
    pub(crate) jobs: u64,
    /// Seeds of the simulator.
    pub(crate) seeds: u64,
    /// The `mobula` binary.
    pub(crate) mobula: PathBuf,
    only: Vec<String>,
    output: Option<PathBuf>,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut options = Options {
            round: Duration::from_secs(5),
            // A hundred kills and some.
            failover: Duration::from_secs(480),
            jobs: 1_000_000,
            seeds: 1_000,
            mobula: own.with_file_name("mobula"),
            only: Vec::new(),
            output: None,
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("`{arg}` needs a value"));
            match arg.as_str() {
                "--quick" => {
                    options.round = Duration::from_secs(1);
                    options.failover = Duration::from_secs(30);
                    options.jobs = 20_000;
                    options.seeds = 50;
                }
                "--only" => options.only.push(value()?),
                "--output" => options.output = Some(value()?.into()),
                unknown => {
                    return Err(format!(
                        "unknown argument `{unknown}`: there are --quick, --only PART and --output FILE; \
                         parts are commands, failover, history, tables, simulator"
                    ));
                }
            }
        }
        Ok(options)
    }

    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == part)
    }
}

fn main() -> Outcome {
    let options = Options::parse(std::env::args().skip(1))?;
    let mut results = Results::begin("head");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    // First, while nothing else has touched this process's memory.
    if options.wants("tables") {
        tables::measure(&options, &mut results);
    }
    if options.wants("commands") {
        runtime.block_on(commands::measure(&options, &mut results))?;
    }
    if options.wants("history") {
        runtime.block_on(history::measure(&options, &mut results))?;
    }
    if options.wants("simulator") {
        simulator::measure(&options, &mut results);
    }
    if options.wants("failover") {
        failover::measure(&options, &mut results)?;
    }
    if let Some(path) = &options.output {
        results.save(path)?;
        println!("written to {}", path.display());
    }
    Ok(())
}
