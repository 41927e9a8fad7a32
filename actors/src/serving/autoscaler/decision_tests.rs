use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// How often a router looks.
const LOOK_MS: u64 = 500;

const MINUTE_MS: u64 = 60_000;

/// An endpoint under a load, and what was decided about it.
struct World {
    policy: Policy,
    autoscaler: Autoscaler,
    now_ms: u64,
    load: Load,
    replicas: u32,
    changes: Vec<Change>,
    is_rolling_out: bool,
    /// Replicas whose models compute all the time, in thousandths.
    busy_milli: u64,
    memory_percent: u8,
    /// Of the requests that come, in percent.
    refused_percent: u64,
}

impl World {
    fn new(policy: Policy, replicas: u32) -> Self {
        World {
            policy,
            autoscaler: Autoscaler::default(),
            // A Thursday, at midnight.
            now_ms: 7 * 24 * 60 * MINUTE_MS,
            load: Load::default(),
            replicas,
            changes: Vec::new(),
            is_rolling_out: false,
            busy_milli: 0,
            memory_percent: 0,
            refused_percent: 0,
        }
    }

    /// Looks once, after so much time with so many in flight, of which so many came and took so long.
    fn look(&mut self, in_flight: u64, arrived: u64, taken_ms: u64) {
        self.now_ms += LOOK_MS;
        self.load.spent_us += in_flight * LOOK_MS * 1_000;
        self.load.computed_ns += self.busy_milli * LOOK_MS * 1_000;
        self.load.in_flight = in_flight;
        self.load.arrived += arrived;
        self.load.refused += arrived * self.refused_percent / 100;
        for _ in 0..arrived.min(20) {
            self.load.latencies.record(Duration::from_millis(taken_ms));
        }
        let standing = Standing {
            replicas: self.replicas,
            version: 1,
            changes: &self.changes,
            is_rolling_out: self.is_rolling_out,
        };
        let (low, high) = standing.allowed(&self.policy, self.now_ms);
        let decided = self.autoscaler.decide(
            &self.policy,
            standing,
            Answering {
                ready: self.replicas,
                memory_percent: self.memory_percent,
            },
            self.load,
            self.now_ms,
        );
        let Some(choice) = decided else {
            return;
        };
        assert!(
            (low..=high).contains(&choice.to),
            "{choice:?} of {low}..={high}"
        );
        assert_ne!(choice.to, self.replicas);
        self.changes.push(Change {
            at_ms: self.now_ms,
            version: 1,
            from: self.replicas,
            to: choice.to,
            cause: choice.cause,
            figures: choice.figures,
        });
        self.replicas = choice.to;
    }

    /// The same load for so long.
    fn hold(&mut self, minutes: f64, in_flight: u64, a_second: u64, taken_ms: u64) {
        let looks = (minutes * MINUTE_MS as f64) as u64 / LOOK_MS;
        for _ in 0..looks {
            self.look(in_flight, a_second * LOOK_MS / 1_000, taken_ms);
        }
    }

    /// What was decided, with the second in which it was.
    fn decided(&self, since_ms: u64) -> Vec<(u64, u32, Cause)> {
        let of = |change: &Change| ((change.at_ms - since_ms) / 1_000, change.to, change.cause);
        self.changes.iter().map(of).collect()
    }
}

#[test]
fn a_slow_model_that_has_no_room_for_its_requests_gets_company() {
    // Half a second each, and five seconds of patience: never more than ten are let in, far below the target.
    let mut world = World::new(Policy::between(1, 8), 1);
    world.hold(5.0, 9, 100, 4_500);
    assert_eq!(world.changes, []);
    let begun_ms = world.now_ms;
    world.refused_percent = 50;
    world.hold(0.2, 9, 100, 4_500);
    let decided = world.decided(begun_ms);
    let [(after_s, 2, Cause::Refused)] = decided[..] else {
        panic!("{decided:?}")
    };
    assert!(after_s <= 6, "{decided:?}");
    let said = world.changes[0].figures.said();
    assert!(said.contains("refused a second"), "{said}");
    // With room for all of them there is no reason for more; and the number that was too few does not come back.
    world.refused_percent = 0;
    world.hold(30.0, 9, 100, 500);
    assert_eq!(world.replicas, 2, "{:?}", world.changes);
}

#[test]
fn models_that_compute_too_much_of_the_time_get_company_that_stays() {
    let mut world = World::new(Policy::golden(), 1);
    // Just what one replica may.
    (world.busy_milli, world.memory_percent) = (700, 60);
    world.hold(5.0, 1, 50, 1);
    assert_eq!(world.changes, []);
    world.busy_milli = 1_300;
    world.hold(20.0, 1, 50, 1);
    let [change] = world.changes.as_slice() else {
        panic!("{:?}", world.changes)
    };
    assert_eq!((change.to, change.cause), (2, Cause::Busy));
    assert!(change.figures.busy_milli > 700, "{:?}", change.figures);
    assert!(
        change
            .figures
            .said()
            .contains("computing, 60 % of the memory")
    );
    // Nearly nothing is asked any more.
    world.busy_milli = 100;
    world.hold(20.0, 1, 5, 1);
    let last = world.changes.last().map(|change| (change.to, change.cause));
    assert_eq!(last, Some((1, Cause::Fewer)));
}

#[test]
fn where_memory_is_scarce_replicas_are_added_one_by_one_and_none_is_taken_away() {
    let mut world = World::new(Policy::golden(), 1);
    world.memory_percent = 81;
    let began_ms = world.now_ms;
    world.hold(1.0, 1, 1, 1);
    let decided = world.decided(began_ms);
    assert!(
        matches!(decided[..], [(_, 2, Cause::Memory), (_, 3, Cause::Memory)]),
        "{decided:?}"
    );
    // Two thirds of the memory are within the target and too much for fewer.
    world.memory_percent = 66;
    world.hold(30.0, 1, 1, 1);
    assert_eq!(world.replicas, 3);
    // Where nothing is asked, no replica is needed, however scarce memory is.
    world.policy.replicas_min = 0;
    world.memory_percent = 99;
    world.hold(30.0, 0, 0, 1);
    assert_eq!(world.replicas, 0);
}

#[test]
fn an_endpoint_without_replicas_wakes_with_the_first_request_and_sleeps_when_nothing_is_asked() {
    let mut world = World::new(Policy::between(0, 4), 0);
    world.hold(10.0, 0, 0, 1);
    assert_eq!(world.changes, []);
    let began_ms = world.now_ms;
    world.look(1, 2, 1);
    world.hold(1.0, 1, 2, 1);
    world.hold(20.0, 0, 0, 1);
    let idle_s = 60 + 300;
    assert_eq!(
        world.decided(began_ms),
        [(0, 1, Cause::Wake), (idle_s, 0, Cause::Idle)]
    );
}

#[test]
fn a_burst_doubles_at_once_and_again_after_half_a_minute_and_ends_by_halves() {
    let mut world = World::new(Policy::between(1, 8), 1);
    world.hold(5.0, 4, 100, 1);
    let began_ms = world.now_ms;
    world.hold(2.0, 100, 1_000, 1);
    world.hold(30.0, 1, 20, 1);
    let decided = world.decided(began_ms);
    let (first_s, to, cause) = decided[0];
    // A third of the short window has 100 in flight: twice the target of 16.
    assert!((1..=3).contains(&first_s), "{decided:?}");
    assert_eq!((to, cause), (2, Cause::Burst));
    assert_eq!((decided[1].0, decided[1].1), (first_s + 30, 4));
    assert_eq!((decided[2].0, decided[2].1), (first_s + 60, 7));
    // Fewer when the average falls, by half in five minutes at the most.
    let fewer = &decided[3..];
    assert!(
        fewer.iter().all(|change| change.2 == Cause::Fewer),
        "{decided:?}"
    );
    assert!(fewer[0].0 >= 120, "{decided:?}");
    let is_soon = |change: &&(u64, u32, Cause)| change.0 < fewer[0].0 + 300;
    let lowest = fewer.iter().filter(is_soon).map(|change| change.1).min();
    assert_eq!(lowest, Some(3), "{decided:?}");
    assert_eq!(world.replicas, 1, "{decided:?}");
}

#[test]
fn slow_answers_add_replicas_which_stay_while_the_rate_is_the_same() {
    let mut policy = Policy::between(1, 6);
    policy.slo_p99_ms = Some(100);
    let mut world = World::new(policy, 1);
    world.hold(3.0, 2, 50, 300);
    assert_eq!(world.changes[0].cause, Cause::Latency);
    let count = world.replicas;
    assert!(count > 1);
    // Now answers are quick, and few are in flight because they are.
    world.hold(60.0, 1, 50, 10);
    assert!(world.replicas >= 2, "{:?}", world.changes);
    let before = world.changes.len();
    world.hold(120.0, 1, 50, 10);
    assert_eq!(world.changes.len(), before, "{:?}", world.changes);
    // With fewer requests there are fewer replicas.
    world.hold(30.0, 1, 5, 10);
    assert_eq!(world.replicas, 1, "{:?}", world.changes);
}

#[test]
fn a_target_of_requests_a_second_is_kept() {
    let mut world = World::new(Policy::golden(), 1);
    world.hold(5.0, 1, 250, 10);
    assert_eq!(world.replicas, 3);
    assert!(
        world
            .changes
            .iter()
            .all(|change| change.cause == Cause::Rate)
    );
    world.hold(40.0, 1, 80, 10);
    assert_eq!(world.replicas, 1);
}

#[test]
fn schedules_move_the_floor_and_the_ceiling() {
    let mut policy = Policy::between(1, 3);
    policy.schedules = vec![
        "thu 00:10-00:40 2..".parse().unwrap(),
        "thu 00:50-01:00 ..1".parse().unwrap(),
    ];
    let mut world = World::new(policy, 1);
    let began_ms = world.now_ms;
    world.hold(45.0, 0, 0, 1);
    world.hold(20.0, 25, 100, 1);
    let decided = world.decided(began_ms);
    let causes: Vec<(u32, Cause)> = decided.iter().map(|change| (change.1, change.2)).collect();
    assert_eq!(
        causes,
        [
            (2, Cause::Floor),
            (1, Cause::Idle),
            (2, Cause::InFlight),
            (1, Cause::Ceiling),
            (2, Cause::InFlight),
        ],
        "{decided:?}"
    );
    assert_eq!(
        (decided[0].0, decided[3].0, decided[4].0),
        (600, 3_000, 3_600)
    );
}

#[test]
fn a_rollout_takes_nothing_away_and_may_add() {
    let mut world = World::new(Policy::between(0, 8), 4);
    world.is_rolling_out = true;
    world.hold(30.0, 0, 0, 1);
    assert_eq!(world.changes, []);
    world.hold(1.0, 100, 100, 1);
    assert!(world.replicas > 4);
    // Nor do bounds that were made narrower meanwhile.
    world.policy = Policy::between(0, 2);
    world.hold(30.0, 0, 0, 1);
    assert!(world.replicas > 4);
    world.is_rolling_out = false;
    world.hold(1.0, 0, 0, 1);
    assert_eq!(world.replicas, 2);
}

#[test]
fn who_begins_to_look_takes_nothing_away_before_a_whole_window() {
    let mut world = World::new(Policy::between(1, 8), 6);
    world.hold(0.9, 0, 0, 1);
    assert_eq!(world.changes, []);
    world.hold(0.3, 0, 0, 1);
    assert_eq!(world.replicas, 3);
}

proptest! {
    // Each case is an hour or more, looked at twice a second.
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the load does, the number stays within the bounds and moves as fast as it may at most.
    #[test]
    fn no_load_moves_it_out_of_the_bounds_or_too_fast(
        low in 0_u32..4,
        more in 1_u32..20,
        phases in proptest::collection::vec((0_u64..600, 0_u64..2_000, 1_u64..500), 1..12),
    ) {
        let mut policy = Policy::between(low, low + more);
        policy.slo_p99_ms = Some(100);
        let mut world = World::new(policy.clone(), low.max(1));
        for (in_flight, a_second, taken_ms) in phases {
            world.hold(2.5, in_flight, a_second, taken_ms);
            prop_assert!((low..=low + more).contains(&world.replicas));
        }
        for (index, change) in world.changes.iter().enumerate() {
            for other in &world.changes[..=index] {
                let apart_ms = change.at_ms - other.at_ms;
                if apart_ms < policy.up_window_ms {
                    prop_assert!(change.to <= (2 * other.from.max(1)).max(change.from));
                }
                if apart_ms < policy.down_window_ms {
                    prop_assert!(change.to >= (other.from / 2).min(change.from));
                }
            }
        }
    }

    /// So many clients, each with one request at a time: the number settles.
    #[test]
    fn a_constant_number_in_flight_does_not_flap(
        in_flight in 0_u64..200,
        target in 1_u32..64,
        replicas in 1_u32..16,
    ) {
        let mut policy = Policy::between(1, 16);
        policy.target_in_flight = target;
        let mut world = World::new(policy, replicas);
        world.hold(45.0, in_flight, 50, 5);
        let settled = world.changes.len();
        world.hold(60.0, in_flight, 50, 5);
        prop_assert_eq!(world.changes.len(), settled);
    }

    /// So many requests a second, and replicas that queue when they get more than they can do: the number
    /// settles, though few are in flight once there are enough.
    #[test]
    fn a_constant_rate_does_not_flap(a_second in 2_u64..2_000, capacity in 50_u64..400) {
        let mut policy = Policy::between(1, 16);
        policy.slo_p99_ms = Some(100);
        let mut world = World::new(policy, 1);
        let hold = |world: &mut World, minutes: u64| {
            for _ in 0..minutes * MINUTE_MS / LOOK_MS {
                let load = a_second as f64 / (capacity * u64::from(world.replicas)) as f64;
                let (in_flight, taken_ms) = if load < 0.95 {
                    let busy = load / (1.0 - load) * f64::from(world.replicas);
                    (busy as u64, (1_000.0 / capacity as f64 / (1.0 - load)) as u64)
                } else {
                    (256 * u64::from(world.replicas), 256_000 / capacity)
                };
                world.look(in_flight, a_second * LOOK_MS / 1_000, taken_ms);
            }
        };
        hold(&mut world, 60);
        let settled = world.changes.len();
        hold(&mut world, 120);
        prop_assert_eq!(world.changes.len(), settled, "{:?}", world.changes);
    }
}
