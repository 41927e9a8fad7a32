//! The training suite: steps of whole networks and kernels by themselves, on one thread and on two, and what checkpoints
//! cost.
//!
//! `cargo xtask bench train` builds and starts it; with `--peers`, `peers.py` does the same with PyTorch, from the
//! same weights and data, which this program leaves for it. See `benches/README.md`.

mod checkpoints;
mod exchange;
mod kernels;
mod language;
mod network;
mod steps;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use mobula_benches::measure::Settings;
use mobula_benches::results::Results;

/// What a part may end with.
type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// How much is measured, and where the figures go.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// For each row.
    pub(crate) round: Duration,
    /// Where weights, data and losses are left for the peer.
    pub(crate) exchange: Option<PathBuf>,
    only: Vec<String>,
    output: Option<PathBuf>,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            round: Duration::from_secs(3),
            exchange: None,
            only: Vec::new(),
            output: None,
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("`{arg}` needs a value"));
            match arg.as_str() {
                "--quick" => options.round = Duration::from_millis(600),
                "--only" => options.only.push(value()?),
                "--output" => options.output = Some(value()?.into()),
                "--exchange" => options.exchange = Some(value()?.into()),
                unknown => {
                    return Err(format!(
                        "unknown argument `{unknown}`: there are --quick, --only PART OF A NAME, \
                         --output FILE and --exchange FOLDER"
                    ));
                }
            }
        }
        Ok(options)
    }

    /// Whether a row is asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            warm_up: self.round / 5,
            length: self.round,
        }
    }
}

/// One thread, and as many as this machine has.
pub(crate) fn thread_counts() -> Vec<NonZeroUsize> {
    let all = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    match all {
        NonZeroUsize::MIN => vec![all],
        _ => vec![NonZeroUsize::MIN, all],
    }
}

fn main() -> Outcome {
    // candle divides additions of large tensors among threads that wait in a busy loop; ours are divided by the
    // kernels. SAFETY: no other thread runs yet, so nobody reads the environment at the same time.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    // As trainers do.
    mobula_actors::kernels::memory::keep_freed_memory();
    let options = Options::parse(std::env::args().skip(1))?;
    let mut results = Results::begin("train");
    steps::measure(&options, &mut results)?;
    language::measure(&options, &mut results)?;
    kernels::measure(&options, &mut results)?;
    checkpoints::measure(&options, &mut results)?;
    if let Some(path) = &options.output {
        results.save(path)?;
        println!("written to {}", path.display());
    }
    Ok(())
}
