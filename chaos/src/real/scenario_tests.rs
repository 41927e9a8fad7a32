//! Tests of `scenario`.

use super::super::fault_plan::{FaultKind, Peers, Victim};
use super::*;

const SMALL: &str = "\
title = \"small\"
[cluster]
heads = 3
workers = 1
[workload]
submitters = 1
submits_per_second = 1
register_clients = 1
registers = 1
register_operations_per_second = 10
[checks]
jobs_min_per_minute = 1
register_operations_min_per_minute = 1
faults_min_per_minute = 1
";

#[test]
fn every_built_in_scenario_is_read_and_says_what_it_is() {
    for (name, text) in BUILT_IN {
        let scenario = Scenario::from_toml(text, name).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(Scenario::built_in(name), Some(scenario.clone()));
        assert!(!scenario.title.is_empty() && !scenario.faults.is_empty());
    }
    assert_eq!(Scenario::built_in("no-such"), None);
}

#[test]
fn what_cannot_be_meant_is_refused_where_it_stands() {
    assert!(Scenario::from_toml(SMALL, "small.toml").is_ok());
    let fault = |text: &str| format!("{SMALL}[[fault]]\n{text}\nevery_s = [1, 2]\n");
    let training = |text: &str| {
        let jobs = format!("training = [{{ steps = 1, checkpoint_every_steps = 1, {text} }}]");
        SMALL.replace("[checks]", &format!("{jobs}\n[checks]"))
    };
    let cases = [
        (
            SMALL.replace("workers", "workerz"),
            ":4:1: unknown field `workerz`",
        ),
        (
            SMALL.replace("heads = 3", "heads = 2"),
            ":2:1: `heads` is 2",
        ),
        (
            SMALL.replace("submitters = 1", "submitters = 1000"),
            ":5:1: `submitters` is 1000, the limit is 256",
        ),
        (
            SMALL.replace(
                "[workload]",
                "[cluster.config.raft]\ntick_ms = 1\n[workload]",
            ),
            "[cluster.config]: config: `raft.tick_ms` is 1",
        ),
        (
            fault("kind = \"explode\"\nlasts_s = [0, 1]"),
            ":16:8: unknown variant `explode`",
        ),
        (
            fault("kind = \"kill\"\nlasts_s = [0, 1]\npeers = \"heads\""),
            ":16:8: `peers` means nothing to `kill`",
        ),
        (
            fault("kind = \"disturb\"\nlasts_s = [0, 1]"),
            "which needs one of them",
        ),
        (
            fault("kind = \"fill-disk\"\nlasts_s = [0, 1]"),
            "`fill-disk` needs `head_disk_mib`",
        ),
        (
            fault("kind = \"kill\"\nlasts_s = [2, 1]"),
            "`lasts_s` is [2, 1]",
        ),
        (
            fault("kind = \"kill\"\ntarget = \"counter\"\nlasts_s = [0, 1]"),
            "there is no counter",
        ),
        (
            fault("kind = \"kill\"\ntarget = \"workers\"\nlasts_s = [0, 1]"),
            "`kill` cannot hit that target",
        ),
        (
            fault("kind = \"notice\"\ntarget = \"training-worker\"\nlasts_s = [8, 9]"),
            "nothing trains",
        ),
        (
            fault("kind = \"cut\"\ntarget = \"driver-worker\"\nlasts_s = [4, 6]"),
            ":16:8: nothing trains",
        ),
        (
            fault("kind = \"notice\"\ntarget = \"driver-worker\"\nlasts_s = [8, 9]"),
            "`notice` cannot hit that target",
        ),
        (
            fault("kind = \"rolling-restart\"\ntarget = \"driver-worker\"\nlasts_s = [0, 1]"),
            "`rolling-restart` cannot hit that target",
        ),
        (
            fault("kind = \"kill\"\nlasts_s = [0, 1]\nall_workers_percent = 5"),
            "`all_workers_percent` means nothing to `kill`",
        ),
        (
            training("trainers_min = 3, trainers_max = 2"),
            "with 3 to 2 trainers",
        ),
        (
            training("trainers_max = 2, hidden = [0]"),
            "`hidden` is [0]",
        ),
    ];
    for (text, expected) in cases {
        let error = Scenario::from_toml(&text, "small.toml").unwrap_err();
        let error = error.to_string();
        assert!(error.starts_with("small.toml:"), "{error}");
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn what_takes_packets_away_needs_a_network_of_its_own() {
    let scenario = Scenario::built_in("leader-kill").unwrap();
    assert!(!scenario.needs_network());
    for name in [
        "driver-silence",
        "partition-storm",
        "one-way-cuts",
        "lossy-network",
        "disk-full",
    ] {
        assert!(Scenario::built_in(name).unwrap().needs_network(), "{name}");
    }
}

#[test]
fn drivers_fall_silent_in_the_jobs_in_which_they_are_killed_and_for_longer_than_their_lease() {
    let loss = Scenario::built_in("driver-loss").unwrap();
    let silence = Scenario::built_in("driver-silence").unwrap();
    assert_eq!(silence.workload, loss.workload);
    let [fault] = silence.faults.as_slice() else {
        panic!("something else happens too: {:?}", silence.faults);
    };
    assert_eq!(
        (fault.kind(), fault.target(), fault.peers),
        (FaultKind::Cut, Victim::DriverWorker, Some(Peers::Everyone))
    );
    // Wherever the trainers are, one machine more is there.
    let trainers = silence.workload.training.iter();
    let trainers = trainers.map(|plan| plan.trainers_max).max();
    assert!(trainers.is_some_and(|trainers| trainers < silence.cluster.workers));
    let text = toml::to_string(&silence.cluster.config).unwrap();
    let limits = Config::from_toml(&text, "config").unwrap().limits;
    let lease_s = limits.lease_ms as f64 / 1e3;
    assert!(lease_s < 1.5, "{lease_s}");
    assert!(2.0 * lease_s < fault.lasts_s.0, "{lease_s}");
    assert!(silence.checks.takeovers_min_per_minute > 0.0);
    assert_eq!(loss.checks.takeovers_min_per_minute, 0.0);
}

#[test]
fn the_machine_of_a_driver_takes_what_a_workers_does() {
    let jobs = "training = [{ steps = 1, checkpoint_every_steps = 1, trainers_max = 1 }]";
    let trains = SMALL.replace("[checks]", &format!("{jobs}\n[checks]"));
    let trains = format!("{trains}takeovers_min_per_minute = 2.5\n");
    for kind in ["cut", "cut-one-way", "kill", "pause"] {
        let fault = format!("[[fault]]\nkind = \"{kind}\"\ntarget = \"driver-worker\"\n");
        let fault = format!("{fault}every_s = [1, 2]\nlasts_s = [4, 6]\n");
        let scenario = Scenario::from_toml(&format!("{trains}{fault}"), "small.toml").unwrap();
        assert_eq!(scenario.faults[0].target(), Victim::DriverWorker);
        assert_eq!(scenario.checks.takeovers_min_per_minute, 2.5);
        let no_workers = trains.replace("workers = 1", "workers = 0");
        let error = Scenario::from_toml(&format!("{no_workers}{fault}"), "small.toml").unwrap_err();
        assert!(error.to_string().contains("no worker to hit"), "{error}");
    }
}
