//! Short runs of whole scenarios, as `mobula chaos run` does them: what they show is checked by the
//! runner; here, that it comes to the right verdict and leaves nothing.

use std::sync::Arc;
use std::time::Duration;

use mobula_chaos::real::cluster::ClusterError;
use mobula_chaos::real::{Isolation, Outcome, RunError, RunOptions, Scenario, run};
use mobula_chaos::schedule::seed_from_env;
use tokio::sync::watch;

use crate::cluster::binary;

/// How long the cluster is hurt: some faults and some hundred operations.
const LENGTH: Duration = Duration::from_secs(12);

fn options(seed: u64) -> RunOptions {
    RunOptions {
        program: binary("mobula"),
        seed,
        length: LENGTH,
        only_loopback: false,
        dir: None,
        observe: Arc::new(|line| println!("{line}")),
    }
}

fn never() -> watch::Receiver<bool> {
    watch::Sender::new(false).subscribe()
}

/// Runs it; everything must have held.
fn must_hold(scenario: &Scenario, options: &RunOptions) -> Outcome {
    let outcome = run(scenario, options, never());
    let outcome = outcome.unwrap_or_else(|error| panic!("seed {}: {error}", options.seed));
    println!("{outcome}");
    assert!(outcome.passed, "seed {}: {outcome}", options.seed);
    outcome
}

#[test]
fn leaders_die_on_loopback_and_every_promise_is_kept() {
    let mut options = options(seed_from_env().unwrap());
    options.only_loopback = true;
    let outcome = must_hold(&Scenario::built_in("leader-kill").unwrap(), &options);
    assert_eq!(outcome.isolation, Isolation::Loopback);
    assert!(outcome.faults_on_leader > 0 && outcome.counts.jobs_acknowledged > 0);
    assert!(outcome.network.is_none());
}

#[test]
fn heads_are_cut_off_and_every_promise_is_kept() {
    if Isolation::available() == Isolation::Loopback {
        println!("not shown: this user may not make network namespaces");
        return;
    }
    let mut options = options(seed_from_env().unwrap());
    // By then the first cut of each kind is over, whatever the seed: as many as the scenario asks for.
    options.length = Duration::from_secs(16);
    let outcome = must_hold(&Scenario::built_in("partition-storm").unwrap(), &options);
    assert_eq!(outcome.isolation, Isolation::Namespaces);
    let network = outcome.network.unwrap();
    assert!(
        network.cut > 0 && network.delivered > network.cut,
        "{network:?}"
    );
}

#[test]
fn disks_fill_up_and_take_no_writes_for_moments_and_every_promise_is_kept() {
    if Isolation::available() == Isolation::Loopback {
        println!("not shown: this user may not make network namespaces");
        return;
    }
    let mut options = options(seed_from_env().unwrap());
    // The leader's disk stands still each five to ten seconds.
    options.length = Duration::from_secs(16);
    let scenario = Scenario::built_in("disk-full").unwrap();
    let outcome = match run(&scenario, &options, never()) {
        Err(RunError::Cluster {
            source: ClusterError::Disk(error),
            ..
        }) => {
            println!("not shown: {error}");
            return;
        }
        outcome => outcome.unwrap_or_else(|error| panic!("seed {}: {error}", options.seed)),
    };
    println!("{outcome}");
    assert!(outcome.passed, "seed {}: {outcome}", options.seed);
    let count = |kind: &str| outcome.faults.get(kind).copied().unwrap_or(0);
    assert!(count("freeze-disk") > 0, "{:?}", outcome.faults);
    assert!(count("fill-disk") > 0, "{:?}", outcome.faults);
}

#[test]
fn what_runs_goes_on_while_all_heads_are_away_and_is_adopted() {
    let mut options = options(seed_from_env().unwrap());
    options.only_loopback = true;
    let mut scenario = Scenario::built_in("heads-away").unwrap();
    // Longer than an election and a worker's lease, shorter than anybody's patience.
    scenario.faults[0].lasts_s = (6.0, 6.0);
    scenario.faults[0].every_s = (2.0, 2.0);
    // How fast depends on what else this machine does.
    scenario.checks.increments_gap_max_ms = Some(5_000);
    scenario.checks.reconciled_max_ms = None;
    scenario.checks.training_jobs_min_per_minute = 0.0;
    let outcome = must_hold(&scenario, &options);
    assert_eq!(outcome.felt.reconciled.count, 1, "{outcome}");
}

#[test]
fn what_takes_packets_away_is_refused_on_loopback() {
    let mut options = options(1);
    options.only_loopback = true;
    let scenario = Scenario::built_in("partition-storm").unwrap();
    let refused = run(&scenario, &options, never()).unwrap_err();
    assert!(
        matches!(refused, RunError::NeedsNetwork { .. }),
        "{refused}"
    );
    options.length = Duration::from_secs(24 * 3600);
    let refused = run(&scenario, &options, never()).unwrap_err();
    assert!(refused.to_string().contains("run it in parts"), "{refused}");
}

#[test]
fn a_run_that_is_stopped_takes_everything_down_and_too_little_traffic_fails() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(1);
    options.only_loopback = true;
    options.dir = Some(dir.path().to_owned());
    let (stop, stopped) = watch::channel(false);
    options.observe = Arc::new(move |line| {
        println!("{line}");
        // It is up, and its clients begin.
        stop.send_replace(true);
    });
    let scenario = Scenario::built_in("leader-kill").unwrap();
    let ended = run(&scenario, &options, stopped).unwrap_err();
    assert!(matches!(ended, RunError::Stopped), "{ended}");
    let mut idle = scenario;
    idle.workload.submits_per_second = 0.0;
    idle.workload.register_operations_per_second = 0.0;
    idle.workload.increments_per_second = 0.0;
    idle.faults.clear();
    options.observe = Arc::new(|line| println!("{line}"));
    options.length = Duration::from_secs(4);
    options.dir = Some(dir.path().join("idle"));
    let outcome = run(&idle, &options, never()).unwrap();
    assert!(!outcome.passed, "{outcome}");
    let broken: Vec<_> = outcome
        .checks
        .iter()
        .filter(|check| !check.passed)
        .collect();
    assert_eq!(broken.len(), 1, "{outcome}");
    assert_eq!(broken[0].name, "enough happened to show something");
}
