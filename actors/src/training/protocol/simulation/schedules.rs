//! Schedules: faults drawn from seeds, and a blow before each event in turn.

use std::collections::BTreeMap;

use super::toy::{Toy, undisturbed};
use super::{Event, Trainer, VALUES, World};
use crate::training::protocol::buckets::Buckets;

fn check(world: &World, states: &[Toy]) {
    let last = states.last().unwrap();
    let driver = world.driver.as_ref().unwrap();
    assert_eq!(&driver.copy.toy, last, "the driver's copy");
    for member in driver.leader.seated() {
        if world.has_errors {
            // The very last update may be the wrong one; no sums come after it that would show it.
            break;
        }
        let copy = world.trainers[member.slot as usize].copy.as_ref().unwrap();
        assert_eq!(&copy.toy, last, "{member}");
    }
}

fn run(seed: u64, states: &[Toy]) -> BTreeMap<&'static str, u64> {
    let mut world = World::new(seed);
    world.plan_faults();
    world.run();
    check(&world, states);
    world.counts
}

/// A world of three trainers in which nothing happens by chance but delays.
fn calm(seed: u64) -> World {
    let mut world = World::new(seed);
    world.trainers.truncate(1);
    while world.trainers.len() < 3 {
        world.trainers.push(Trainer {
            incarnation: 1,
            entry: 0,
            is_up: true,
            copy: None,
            paused_until: 0,
        });
    }
    (world.members_min, world.has_errors) = (2, false);
    (world.loss_percent, world.delay_max) = (0, 4);
    world.shape.buckets = Buckets::new(VALUES, 2);
    world.shape.steps = 4;
    world
}

/// Before each event of a run, in turn, somebody is killed.
fn kill_before_each_event(blow: &Event) {
    let states = &undisturbed()[..=4];
    let mut undisturbed = calm(1);
    undisturbed.run();
    check(&undisturbed, states);
    for number in 1..undisturbed.events {
        let outcome = std::panic::catch_unwind(|| {
            let mut world = calm(1);
            world.blows.insert(number, blow.clone());
            world.run();
            check(&world, states);
            world.counts
        });
        let counts = outcome.unwrap_or_else(|_| panic!("before event {number}"));
        assert!(
            counts.len() > 1,
            "nothing happened before event {number}: {counts:?}"
        );
    }
}

#[test]
fn a_driver_killed_at_any_moment_changes_no_bit() {
    kill_before_each_event(&Event::KillDriver);
}

#[test]
fn a_trainer_killed_at_any_moment_changes_no_bit() {
    kill_before_each_event(&Event::Kill(1));
}

#[test]
fn a_trainer_stopped_at_any_moment_for_longer_than_is_waited_changes_no_bit() {
    kill_before_each_event(&Event::Pause(2, 300));
}

#[test]
fn a_backup_ends_with_its_step_and_changes_no_bit() {
    let steps = 8;
    let states = &undisturbed()[..=steps as usize];
    let calm = || {
        let mut world = calm(1);
        world.shape.steps = steps;
        world
    };
    let mut undisturbed = calm();
    undisturbed.run();
    let mut ended = 0;
    for number in 1..undisturbed.events {
        let mut world = calm();
        // It is not stopped for so long that it is given up.
        world.blows.insert(number, Event::Pause(1, 50));
        world.blows.insert(number + 1, Event::BackUp(1));
        world.run();
        check(&world, states);
        let Some((backed_up, 3)) = world.backed_up else {
            // It comes still, or who comes gets shards of the others.
            continue;
        };
        for ((step, shard), times) in world.ordered.range((backed_up + 1, 0)..) {
            assert_eq!(
                *times, 1,
                "step {step}, shard {shard}, backed up at {backed_up} before event {number}"
            );
        }
        ended += u64::from(backed_up + 1 < steps);
    }
    assert!(ended > 0, "no step came after a backup");
}

#[test]
fn every_schedule_ends_in_the_bits_of_the_undisturbed_run() {
    let states = undisturbed();
    let first: u64 = std::env::var("MOBULA_SEED").map_or(0, |seed| seed.parse().unwrap());
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seed in first..first + 400 {
        let outcome = std::panic::catch_unwind(|| run(seed, &states));
        let Ok(counted) = outcome else {
            panic!("seed {seed}: run it alone with MOBULA_SEED={seed}");
        };
        for (what, count) in counted {
            *counts.entry(what).or_default() += count;
        }
    }
    println!("{counts:?}");
    // Otherwise the schedules have become tame and the test proves nothing.
    for (what, least) in [
        ("kills", 200),
        ("pauses", 100),
        ("drivers lost", 100),
        ("plans refused", 20),
        ("quarantined", 10),
        ("backups", 20),
    ] {
        assert!(counts.get(what).is_some_and(|n| *n >= least), "{counts:?}");
    }
}
