//! Tests of `departures`.

use mobula_core::Incarnation;

use super::*;

/// What one driver did: where it went, after so many steps, so many milliseconds after the first.
fn driver(incarnation: u64, went: &[(PreemptionPhase, u64, u64)]) -> Vec<PreemptionStep> {
    let mut from = PreemptionPhase::Running;
    let steps = went
        .iter()
        .zip(1..)
        .map(|(&(to, trained_steps, said_ms), number)| PreemptionStep {
            incarnation: Incarnation(incarnation),
            number,
            node: "worker-1".to_owned(),
            from: std::mem::replace(&mut from, to),
            to,
            deadline_ms: None,
            trained_steps,
            needed_ms: None,
            usable_ms: None,
            why: String::new(),
            said_ms,
        });
    steps.collect()
}

/// One that left by `choice` after `left` steps, and another one that went on after `goes_on`.
fn left_by(
    incarnation: u64,
    choice: PreemptionPhase,
    left: u64,
    goes_on: u64,
) -> Vec<PreemptionStep> {
    let went = [
        (PreemptionPhase::Noticed, left, 1_000),
        (choice, left, 1_100),
        (PreemptionPhase::Detached, goes_on, 2_400),
        (PreemptionPhase::Gone, goes_on, 2_500),
    ];
    driver(incarnation, &went)
}

fn departures(drivers: &[Vec<PreemptionStep>]) -> Departures {
    Departures::of(&JobPreemptions {
        steps: drivers.concat(),
    })
}

/// A job of 100 steps whose drivers counted so many lost, and knew of all of them or not.
fn job(lost_steps: u64, known: bool, drivers: &[Vec<PreemptionStep>]) -> StepsOf {
    StepsOf {
        job: JobId(5),
        steps: 100,
        lost_steps,
        lost_steps_known: known,
        restarts: drivers.len() as u64,
        departures: Some(departures(drivers)),
    }
}

#[test]
fn each_way_of_leaving_is_counted_once_a_driver() {
    let abandoned = driver(
        9,
        &[
            (PreemptionPhase::Advised, 10, 0),
            (PreemptionPhase::Noticed, 20, 10),
            // It fitted, and then did not.
            (PreemptionPhase::SaveSolo, 20, 20),
            (PreemptionPhase::Abandon, 20, 900),
        ],
    );
    let stayed = driver(
        11,
        &[
            (PreemptionPhase::Noticed, 30, 0),
            (PreemptionPhase::Running, 31, 10),
        ],
    );
    let undecided = driver(13, &[(PreemptionPhase::Noticed, 40, 0)]);
    let found = departures(&[
        left_by(3, PreemptionPhase::Handoff, 10, 12),
        left_by(5, PreemptionPhase::SaveShared, 20, 20),
        left_by(7, PreemptionPhase::SaveSolo, 20, 20),
        abandoned,
        stayed,
        undecided,
    ]);
    let ways = Ways {
        handoff: 1,
        save_shared: 1,
        save_solo: 1,
        abandon: 1,
        undecided: 1,
    };
    assert_eq!((found.ways, found.followed), (ways, 3));
    assert_eq!(found.next_driver_ms, [1_500; 3]);
    assert_eq!(found.steps_behind, 0);
}

#[test]
fn a_driver_that_goes_on_behind_the_one_before_takes_steps_again() {
    let behind = departures(&[
        left_by(3, PreemptionPhase::SaveSolo, 40, 37),
        left_by(5, PreemptionPhase::Handoff, 50, 64),
        left_by(7, PreemptionPhase::Abandon, 90, 70),
    ]);
    assert_eq!(behind.steps_behind, 3 + 20);
}

#[test]
fn one_step_taken_again_fails_the_verdict_and_names_the_seed() {
    let saved = || vec![left_by(3, PreemptionPhase::SaveSolo, 40, 40)];
    // The next driver found no trainer who knew; what the head keeps says that nothing is lost.
    let well = [job(0, true, &[]), job(0, false, &saved())];
    let held = check_again(&well, 0, 17);
    assert!(held.passed, "{held:?}");
    assert!(held.detail.contains("0 of 200 steps in 2 jobs"), "{held:?}");

    // Said by the driver, or only seen by where the next one went on.
    let behind = [left_by(3, PreemptionPhase::SaveSolo, 40, 39)];
    for lost in [job(1, true, &[]), job(0, false, &behind)] {
        let broken = check_again(&[well[0].clone(), lost], 0, 17);
        assert!(!broken.passed);
        let said = "job-5 took 1 steps again (seed 17)";
        assert_eq!(broken.detail, said);
    }
    let allowed = check_again(&[job(1, true, &behind)], 1, 17);
    assert!(allowed.passed, "said twice it counts once: {allowed:?}");
}

#[test]
fn what_nobody_knows_fails_the_verdict_too() {
    let mut unknown = job(0, false, &[left_by(3, PreemptionPhase::SaveSolo, 40, 40)]);
    // Another one was lost without a word.
    unknown.restarts = 2;
    let verdict = |job: &StepsOf| check_again(std::slice::from_ref(job), 0, 17);
    let broken = verdict(&unknown);
    assert!(!broken.passed && broken.detail.contains("known to nobody"));
    unknown.restarts = 1;
    assert!(verdict(&unknown).passed);
    unknown.departures = None;
    assert!(!verdict(&unknown).passed);
}

#[test]
fn a_run_in_which_a_way_is_missing_shows_too_little() {
    let ways = Ways {
        handoff: 9,
        save_shared: 0,
        save_solo: 3,
        ..Ways::default()
    };
    let short = check_ways(&ways, 0.05, 40.0).unwrap();
    assert!(!short.passed && short.detail.starts_with("0 SAVE_SHARED"));
    let every = Ways {
        save_shared: 2,
        ..ways
    };
    assert!(check_ways(&every, 0.05, 40.0).unwrap().passed);
    // One that is too short for any says nothing.
    assert_eq!(check_ways(&ways, 0.05, 10.0), None);
}
