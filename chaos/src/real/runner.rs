//! One run of a scenario from outside: whether it can be shown here, its machines and threads, what may
//! end it early, and what is left of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::cluster::ClusterError;
use super::leaks;
use super::machines::{Isolation, Machines};
use super::outcome::{Check, Outcome};
use super::play::play;
use super::scenario::Scenario;

/// Threads of the clients: they wait for what they ask.
const CLIENT_THREADS: usize = 2;

/// Operations on registers that a run may come to: 800 on each of the thousand names that the registry
/// holds, less those that are begun and not used up.
const OPERATIONS_MAX: f64 = 750_000.0;

/// Jobs that a run may come to: the head keeps as many that have ended.
const JOBS_MAX: f64 = 9_000.0;

/// How a scenario is run.
#[derive(Clone)]
pub struct RunOptions {
    /// The `mobula` binary.
    pub program: PathBuf,
    /// What faults and clients are drawn from.
    pub seed: u64,
    /// How long faults and workload go on.
    pub length: Duration,
    /// Whether machines must share this one's network, also where they need not.
    pub only_loopback: bool,
    /// Where everything is kept; without one, a temporary directory, which stays if the run fails.
    pub dir: Option<PathBuf>,
    /// Told what happens, line by line.
    pub observe: Arc<dyn Fn(&str) + Send + Sync>,
}

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It cannot be shown here.
    #[error(
        "`{scenario}` takes packets or disk space away, for which each machine needs namespaces of its \
         own: run it as root{also}"
    )]
    NeedsNetwork {
        /// The scenario.
        scenario: String,
        /// What else stands in the way.
        also: &'static str,
    },
    /// Longer than can be checked.
    #[error(
        "{minutes:.1} minutes of `{scenario}` are {count:.0} {what}, the limit is {limit}: run it in parts"
    )]
    TooLong {
        /// The scenario.
        scenario: String,
        /// The length asked for.
        minutes: f64,
        /// What there would be too many of.
        what: &'static str,
        /// How many.
        count: f64,
        /// How many there may be.
        limit: f64,
    },
    /// The cluster did not come up.
    #[error("{source} (logs are in {})", dir.display())]
    Cluster {
        /// Why.
        source: ClusterError,
        /// Where the logs are.
        dir: PathBuf,
    },
    /// Nothing can be written, or no thread be started.
    #[error("{what}: {reason}")]
    Setup {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        reason: std::io::Error,
    },
    /// Somebody asked to stop.
    #[error("stopped; everything is taken down")]
    Stopped,
    /// Something of a run that ended early is still there.
    #[error("{} processes of the run are still there: {}", left.len(), left.join("; "))]
    LeftBehind {
        /// Process ids and command lines.
        left: Vec<String>,
    },
    /// A defect of the runner.
    #[error("the run panicked: {0}")]
    Panicked(String),
}

/// Runs a scenario. Whatever happens, all processes and networks of the run are gone when this
/// returns. `stop` becoming true ends it early. Not to be called on a thread of a tokio runtime.
pub fn run(
    scenario: &Scenario,
    options: &RunOptions,
    stop: watch::Receiver<bool>,
) -> Result<Outcome, RunError> {
    check_length(scenario, options.length)?;
    let isolation = if options.only_loopback {
        Isolation::Loopback
    } else {
        Isolation::available()
    };
    if isolation == Isolation::Loopback && scenario.needs_network() {
        return Err(RunError::NeedsNetwork {
            scenario: scenario.name.clone(),
            also: if options.only_loopback {
                ", and without asking for loopback"
            } else {
                ""
            },
        });
    }
    let removed = leaks::remove_of_dead_runs();
    if removed > 0 {
        (options.observe)(&format!("removed what {removed} earlier runs left behind"));
    }
    let setup = |what| move |reason| RunError::Setup { what, reason };
    let dir = match &options.dir {
        Some(dir) => std::path::absolute(dir).map_err(setup("the directory"))?,
        None => leaks::make_dir().map_err(setup("a temporary directory"))?,
    };
    std::fs::create_dir_all(&dir).map_err(setup("the directory"))?;
    let failed = |source| RunError::Cluster {
        source,
        dir: dir.clone(),
    };
    let made = Machines::make(scenario, isolation, options.seed, &options.program, &dir);
    let machines = made.map_err(failed)?;
    // Its threads are begun on the clients' machine, and so have its network.
    let runtime = machines.clients().run(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(CLIENT_THREADS)
            .enable_all()
            .build()
    });
    let runtime = runtime.map_err(setup("threads for the clients"))?;
    let whole = drive(
        scenario.clone(),
        options.clone(),
        isolation,
        machines,
        dir.clone(),
        stop,
    );
    // The calling thread is not on that machine, so it must not poll the run itself.
    let ended = runtime.block_on(async { tokio::spawn(whole).await });
    runtime.shutdown_timeout(Duration::from_secs(1));
    let left = leaks::left_over(&dir);
    let outcome = match ended {
        Ok(Ok(mut outcome)) => {
            let nothing = "no process is left".to_owned();
            let check = Check::of("nothing is left behind (I11)", nothing, &left);
            outcome.passed &= check.passed;
            outcome.checks.push(check);
            Ok(outcome)
        }
        _ if !left.is_empty() => Err(RunError::LeftBehind { left }),
        Ok(Err(error)) => Err(error),
        Err(error) => Err(RunError::Panicked(error.to_string())),
    };
    let is_well = outcome.as_ref().is_ok_and(|outcome| outcome.passed);
    let is_stopped = matches!(outcome, Err(RunError::Stopped));
    if options.dir.is_none() && (is_well || is_stopped) {
        // What cannot be removed now is removed by the next run.
        let _ = std::fs::remove_dir_all(&dir);
    } else {
        leaks::keep_dir(&dir);
        (options.observe)(&format!("logs and data stay in {}", dir.display()));
    }
    outcome
}

fn check_length(scenario: &Scenario, length: Duration) -> Result<(), RunError> {
    let seconds = length.as_secs_f64();
    let workload = &scenario.workload;
    for (what, rate, limit) in [
        (
            "operations on registers",
            workload.register_operations_per_second,
            OPERATIONS_MAX,
        ),
        ("jobs", workload.submits_per_second, JOBS_MAX),
    ] {
        let count = rate * seconds;
        if count > limit {
            return Err(RunError::TooLong {
                scenario: scenario.name.clone(),
                minutes: seconds / 60.0,
                what,
                count,
                limit,
            });
        }
    }
    Ok(())
}

async fn drive(
    scenario: Scenario,
    options: RunOptions,
    isolation: Isolation,
    machines: Machines,
    dir: PathBuf,
    mut stop: watch::Receiver<bool>,
) -> Result<Outcome, RunError> {
    let whole = play(&scenario, &options, isolation, machines, dir);
    tokio::select! {
        outcome = whole => outcome,
        // Dropping the run takes everything down. That the sender is gone is no wish to stop.
        Ok(_) = stop.wait_for(|stop| *stop) => Err(RunError::Stopped),
    }
}
