//! Tests of `silences`.

use std::process::{Child, Command, Stdio};
use std::time::UNIX_EPOCH;

use mobula_actors::training::first_step::FirstStep;

use super::super::fault_plan::Victim;
use super::*;

const JOB: JobId = JobId(5);

const LIMIT: Duration = Duration::from_secs(20);

fn said(incarnation: u64, ended_ms: u64) -> Said {
    let first = FirstStep { step: 1, ended_ms };
    Said {
        job: JOB,
        incarnation,
        first,
    }
}

fn lost(incarnation: u64, wall_ms: u64) -> LostDriver {
    LostDriver {
        job: JOB,
        incarnation,
        at_ms: wall_ms - 1_000,
        wall: UNIX_EPOCH + Duration::from_millis(wall_ms),
    }
}

/// Cut off at this time, for five seconds.
fn silenced(incarnation: u64, wall_ms: u64) -> SilencedDriver {
    SilencedDriver {
        driver: lost(incarnation, wall_ms),
        lasted: Duration::from_secs(5),
        // Of nobody: processes are numbered from 1 on.
        process: (0, 0),
    }
}

fn after(silences: &Silences) -> Vec<u64> {
    let steps = silences.next_steps.iter();
    steps.map(|step| step.after_ms).collect()
}

/// A process that waits.
fn sleeper() -> Child {
    let mut command = Command::new("sleep");
    command.arg("600").stdin(Stdio::null()).spawn().unwrap()
}

fn actor(type_name: &str, state: &str, node: u64, incarnation: u64) -> Actor {
    Actor {
        type_name: type_name.to_owned(),
        state: state.to_owned(),
        node: Some(node),
        incarnation: Some(incarnation),
        pid: Some(100 + node as u32),
        ..Actor::default()
    }
}

fn planned(kind: FaultKind, peers: Peers) -> Planned {
    Planned {
        at: Duration::ZERO,
        lasts: Duration::from_secs(5),
        entry: 0,
        kind,
        target: Victim::DriverWorker,
        pick: 0,
        peers,
    }
}

#[test]
fn the_machine_of_a_driver_is_that_of_the_one_that_runs() {
    let name = |id: u64| (id, format!("worker-{id}"));
    let names: BTreeMap<u64, String> = [1, 2, 3].map(name).into();
    let mut actors = [
        actor("mobula.trainer", "running", 1, 8),
        actor("driver", "running", 2, 7),
    ];
    assert_eq!(driver_in(&actors, &names), Some(("worker-2", 7, 102)));
    // On a node that is forgotten.
    actors[1].node = Some(9);
    assert_eq!(driver_in(&actors, &names), None);
    // Of whom it is not known yet which process it is, and who was not started anew yet.
    actors[1] = actor("driver", "running", 3, 12);
    actors[1].pid = None;
    assert_eq!(driver_in(&actors, &names), None);
    actors[1] = actor("driver", "pending", 3, 12);
    actors[1].node = None;
    assert_eq!(driver_in(&actors, &names), None);
    actors[1] = actor("driver", "running", 3, 12);
    assert_eq!(driver_in(&actors, &names), Some(("worker-3", 12, 103)));
}

#[test]
fn only_a_machine_that_nobody_hears_is_silent() {
    assert!(is_silence(&planned(FaultKind::Cut, Peers::Everyone)));
    for (kind, peers) in [
        (FaultKind::Cut, Peers::Heads),
        (FaultKind::CutOneWay, Peers::Everyone),
        (FaultKind::Kill, Peers::Everyone),
        (FaultKind::Pause, Peers::Everyone),
    ] {
        assert!(!is_silence(&planned(kind, peers)), "{kind:?}");
    }
}

#[test]
fn a_silence_is_felt_until_a_newer_driver_has_taken_a_step() {
    let said = [said(7, 2_000), said(12, 11_250), said(15, 26_000)];
    let two = [silenced(7, 10_000), silenced(12, 20_000)];
    let found = Silences::of(&two, &[], &said);
    assert_eq!(after(&found), [1_250, 6_000]);
    let at: Vec<u64> = found.next_steps.iter().map(|step| step.at_ms).collect();
    assert_eq!(at, [9_000, 19_000]);
    let times = &found.next_step;
    assert_eq!((times.count, times.p50_ms, times.max_ms), (2, 1_250, 6_000));
    // The second one's machine was back before.
    assert_eq!((found.silenced, found.taken_over), (2, 1));
}

#[test]
fn a_driver_that_is_hit_again_has_gone_on_by_itself() {
    let said = [said(7, 2_000), said(12, 21_000)];
    // Nobody noticed the first silence of it.
    let twice = [silenced(7, 10_000), silenced(7, 20_000)];
    let found = Silences::of(&twice, &[], &said);
    assert_eq!((after(&found), found.silenced), (vec![1_000], 2));
    assert_eq!(found.next_steps[0].at_ms, 19_000);
    // It was killed in the end: that is why another one went on.
    let found = Silences::of(&twice[..1], &[lost(7, 20_000)], &said);
    assert_eq!((after(&found), found.taken_over), (vec![], 0));
    // Another driver, and another job, say nothing of it.
    let mut other = lost(7, 10_500);
    other.job = JobId(6);
    let found = Silences::of(&twice[1..], &[lost(9, 20_500), other], &said);
    assert_eq!(after(&found), [1_000]);
}

#[test]
fn silences_without_a_time_are_counted() {
    let said = [said(7, 2_000), said(12, 11_000)];
    // Before the job's first step, and nobody after it.
    let found = Silences::of(
        &[
            silenced(7, 1_500),
            silenced(7, 10_000),
            silenced(12, 30_000),
        ],
        &[],
        &said,
    );
    assert_eq!((after(&found), found.silenced), (vec![1_000], 3));
    let (name, text) = found.row().unwrap();
    assert_eq!(name, "driver");
    assert_eq!(
        text,
        "silence to next committed step p50 1000 ms, p99 1000 ms, longest 1000 ms, of 1; \
         2 more silences with no step before, or no newer driver after"
    );
    assert!(Silences::default().row().is_none());
}

#[test]
fn what_drivers_said_is_read_out_of_their_logs() {
    let run = tempfile::tempdir().unwrap();
    let dir = run.path().join("logs").join("job-5");
    std::fs::create_dir_all(&dir).unwrap();
    for (incarnation, ended_ms) in [(7, 2_000), (12, 10_900)] {
        let line = FirstStep { step: 9, ended_ms }.to_string();
        std::fs::write(dir.join(format!("actor-3-{incarnation}.log")), line + "\n").unwrap();
    }
    let found = Silences::read(&[silenced(7, 10_000)], &[], &[run.path().to_owned()]);
    assert_eq!((after(&found), found.taken_over), (vec![900], 1));
}

#[test]
fn a_run_in_which_nobody_takes_over_does_not_pass() {
    let minute = Duration::from_secs(60);
    let said = [said(7, 2_000), said(12, 11_250)];
    let found = Silences::of(&[silenced(7, 10_000), silenced(12, 30_000)], &[], &said);
    let passed = |found: &Silences, least, left: &[String]| -> Vec<bool> {
        let checks = found.checks(least, minute, left);
        checks.iter().map(|check| check.passed).collect()
    };
    assert_eq!(passed(&found, 1.0, &[]), [true, true]);
    assert_eq!(passed(&found, 2.0, &[]), [false, true]);
    let broken = &found.checks(2.0, minute, &[])[0];
    assert!(broken.detail.starts_with("1 of 2 did before"), "{broken:?}");
    assert_eq!(passed(&found, 1.0, &["somebody".to_owned()]), [true, false]);
    // Where nobody was silenced nothing is checked, unless that is what the scenario is for.
    assert!(passed(&Silences::default(), 0.0, &[]).is_empty());
    assert_eq!(passed(&Silences::default(), 1.0, &[]), [false]);
}

#[tokio::test]
async fn a_driver_that_is_still_there_when_its_job_has_ended_is_named() {
    let mut child = sleeper();
    let mut driver = silenced(7, 10_000);
    driver.process = (child.id(), start_time_of(child.id()).unwrap());
    let gone = silenced(9, 20_000);
    let found = still_there(&[gone, driver], Duration::ZERO).await;
    let expected = format!(
        "the driver of job-5 with incarnation 7 still runs as process {}",
        child.id()
    );
    assert_eq!(found, [expected]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(still_there(&[gone, driver], LIMIT).await.is_empty());
}
