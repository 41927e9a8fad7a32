//! Trainers that come, too late or wrong again and again, and those that steps wait for.
//!
//! Where time is paused it goes by whenever nothing but a trainer's own thread is at work: pauses take no time, and nothing
//! may be concluded from how much of it a step takes.

use tokio::sync::Semaphore;

use super::*;
use crate::training::coordinator::holds::HOLDS_MAX;
use crate::training::coordinator::joining::HOLD_SHARE;
use crate::training::crew::{LinkError, Presence, REFUSALS_MAX};
use crate::training::messages::TrainerError;

/// A job of a model that is small: a step takes a millisecond or two.
pub(super) fn quick(steps: u64, min: u32, max: u32) -> TrainSpec {
    TrainSpec {
        model: TrainSpec::digits_mlp("a").model,
        ..spec(steps, min, max)
    }
}

pub(super) fn presence(coordinator: &Tested, index: usize) -> Presence {
    coordinator.crew.slots()[index].presence
}

pub(super) async fn advance(coordinator: &mut Tested) {
    assert!(coordinator.state().step < coordinator.spec.steps, "in time");
    coordinator.advance().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_trainer_that_comes_too_late_disturbs_nobody_and_comes_in_after_a_pause() {
    let spec = quick(2000, 1, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let turns = Arc::new(Semaphore::new(0));
    trainers[1].inner.lock().turns = Some(Arc::clone(&turns));
    let mut coordinator = coordinator(&spec, 1, &trainers);
    let kept = coordinator.lead_max();
    // It was sent the first state, and nobody knows the sums any more that it lacks when it arrives.
    follow_to(3 * kept, &mut coordinator).await;
    assert_eq!(presence(&coordinator, 1), Presence::Preparing);
    assert!(coordinator.held_gate.is_none(), "nobody waits for it");
    turns.add_permits(1);
    while coordinator.crew.slots()[1].attempts.late == 0 {
        advance(&mut coordinator).await;
        assert_eq!(coordinator.leader.plan().seats.len(), 1);
    }
    // The next time the gate is held for it, though not for long.
    while coordinator.held_gate.is_none() {
        advance(&mut coordinator).await;
    }
    let limit = coordinator.held_gate.as_ref().unwrap().limit;
    assert!(limit <= coordinator.state().step + kept);
    while coordinator.state().step < limit {
        assert!(coordinator.gate() <= limit);
        advance(&mut coordinator).await;
    }
    advance(&mut coordinator).await;
    assert!(coordinator.held_gate.is_none(), "its time was over");
    assert_eq!(coordinator.ready_count(), 1);
    turns.add_permits(100);
    while coordinator.ready_count() < 2 {
        advance(&mut coordinator).await;
    }
    assert!(trainers[1].inner.lock().log.len() >= 2);
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}

#[tokio::test]
async fn who_follows_when_all_others_are_lost_gets_the_copys_state() {
    let spec = quick(400, 1, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let turns = Arc::new(Semaphore::new(0));
    trainers[1].inner.lock().turns = Some(Arc::clone(&turns));
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(40, &mut coordinator).await;
    turns.add_permits(100);
    while presence(&coordinator, 1) == Presence::Preparing {
        advance(&mut coordinator).await;
    }
    // Forty steps behind, with the only one gone who has the sums.
    trainers[0].crash(&mut trainers[0].inner.lock());
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}

#[tokio::test]
async fn a_machine_with_other_bits_for_the_third_time_takes_part_no_more() {
    let spec = quick(600, 1, 2);
    let faults = [5, 100, 200].map(|step| (step, Fault::FlippedBit));
    let trainers = trainers(&spec, [vec![], faults.to_vec()]);
    let mut coordinator = run(&spec, &trainers).await;
    assert_eq!(coordinator.digest(), expected(&spec));
    assert_eq!(coordinator.counters().digest_mismatches, 3);
    assert_eq!(coordinator.ready_count(), 1);
    assert_eq!(coordinator.strikes.get("worker-1"), Some(&3));
    // Neither is it let in when it is greeted again, nor another process on the same machine.
    for _ in 0..2 {
        coordinator.greeted(1, trainers[1].greeting());
        assert_eq!(presence(&coordinator, 1), Presence::Away);
        trainers[1].crash(&mut trainers[1].inner.lock());
    }
}

#[tokio::test]
async fn who_is_left_alone_is_asked_at_once_when_nobody_else_is_there() {
    let spec = quick(1000, 1, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    while coordinator.ready_count() < 2 {
        advance(&mut coordinator).await;
    }
    coordinator.crew.slot(1).attempts.late = 20;
    coordinator.too_late(1, "came too late");
    let ticket = |coordinator: &Tested| coordinator.crew.slots()[1].ticket;
    let asleep = ticket(&coordinator);
    coordinator.look_after_joining();
    assert_eq!(ticket(&coordinator), asleep, "the other one goes on");
    coordinator.lose(0, "it was killed");
    coordinator.look_after_joining();
    let woken = ticket(&coordinator);
    assert!(woken > asleep);
    coordinator.look_after_joining();
    assert_eq!(ticket(&coordinator), woken, "once");
    let attempts = &mut coordinator.crew.slot(1).attempts;
    assert_eq!(attempts.take_hold(), Duration::ZERO);
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}

/// More than the longest pause where no step begins, and so little that a pause that grew would not be over: of paused time in
/// which nobody computes.
const STANDING_MAX: Duration = Duration::from_secs(15);

#[tokio::test(start_paused = true)]
async fn no_pause_grows_long_while_nobody_goes_on() {
    let spec = quick(20, 1, 1);
    let trainers = trainers(&spec, vec![vec![]; 1]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    // So that its end is listened for, which does not come.
    coordinator.greeted(0, trainers[0].greeting());
    for times in 1..20 {
        coordinator.prepare(0);
        coordinator.lose(0, "it has no memory");
        let slot = coordinator.crew.slot(0);
        assert_eq!((slot.attempts.failed, slot.naps), (times, false));
    }
    let greeted = tokio::time::timeout(STANDING_MAX, coordinator.crew.next_event()).await;
    let greeted = greeted.expect("it is asked again soon");
    coordinator.handle(greeted).unwrap();
    assert_ne!(presence(&coordinator, 0), Presence::Away);
    // Nor does anybody wait for what never came too late.
    assert!(coordinator.held_gate.is_none());
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}

#[tokio::test(start_paused = true)]
async fn who_refuses_the_state_is_asked_on_and_on_where_nobody_goes_on_without_it() {
    let spec = quick(20, 2, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    trainers[1].inner.lock().refuses = true;
    let mut coordinator = coordinator(&spec, 1, &trainers);
    let waits = tokio::time::timeout(STANDING_MAX, coordinator.advance()).await;
    assert!(waits.is_err(), "two are needed");
    // The tenth time is after some nine seconds, or after twenty-five if pauses grew on.
    let asked = trainers[1].inner.lock().log.len();
    assert!(asked > REFUSALS_MAX as usize, "{asked} times");
    let why = coordinator.given_up();
    let expected_why = "; trainer-1 on worker-1 did not do as it was told 10 times or more: a state is to go on at byte 2";
    assert!(why.starts_with(expected_why), "{why}");
    // The same process, which does as it is told now.
    trainers[1].inner.lock().refuses = false;
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.given_up(), "");
    assert_eq!(coordinator.digest(), expected(&spec));
}

#[tokio::test]
async fn who_refuses_too_often_is_given_up_until_its_process_is_another_or_nobody_else_is_there() {
    let spec = quick(1000, 1, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    while coordinator.ready_count() < 2 {
        advance(&mut coordinator).await;
    }
    let give_up = |coordinator: &mut Tested| {
        for _ in 0..REFUSALS_MAX {
            assert_eq!(coordinator.given_up(), "");
            coordinator.refuses(1, "it will not");
        }
        let slot = &coordinator.crew.slots()[1];
        assert!(slot.refused == slot.incarnation && slot.naps);
        coordinator.greeted(1, trainers[1].greeting());
        assert_eq!(presence(coordinator, 1), Presence::Away);
        assert!(coordinator.given_up().ends_with("it will not"));
    };
    give_up(&mut coordinator);
    trainers[1].crash(&mut trainers[1].inner.lock());
    coordinator.greeted(1, trainers[1].greeting());
    assert_eq!(presence(&coordinator, 1), Presence::Preparing);
    assert_eq!(coordinator.given_up(), "");
    give_up(&mut coordinator);
    let asleep = coordinator.crew.slots()[1].ticket;
    coordinator.lose(0, "it was killed");
    coordinator.look_after_joining();
    assert!(coordinator.crew.slots()[1].ticket > asleep, "it is woken");
    coordinator.greeted(1, trainers[1].greeting());
    assert_eq!(presence(&coordinator, 1), Presence::Preparing);
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}

#[tokio::test]
async fn another_process_does_not_wait_for_the_pause_of_the_one_before() {
    let spec = quick(2000, 1, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    while coordinator.ready_count() < 2 {
        advance(&mut coordinator).await;
    }
    // Two minutes, longer than all steps take.
    coordinator.crew.slot(1).attempts.failed = 20;
    coordinator.lose(1, "it has no memory");
    assert!(coordinator.crew.slots()[1].naps);
    trainers[1].crash(&mut trainers[1].inner.lock());
    while coordinator.ready_count() < 2 {
        advance(&mut coordinator).await;
    }
    assert_eq!(coordinator.counters().trainer_restarts, 1);
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}

#[tokio::test]
async fn who_took_part_for_long_begins_anew_whatever_it_lost_its_seat_for() {
    let spec = quick(1000, 1, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    let steady = coordinator.steady_steps();
    while coordinator.ready_count() < 2 || coordinator.state().step < steady {
        advance(&mut coordinator).await;
    }
    let attempts = &mut coordinator.crew.slot(1).attempts;
    attempts.succeeded(0, Instant::now());
    attempts.failed = 5;
    let hindered = TrainerError::Hindered("the store does not answer".to_owned());
    coordinator
        .failed(1, &LinkError::Trainer(hindered))
        .unwrap();
    assert_eq!(presence(&coordinator, 1), Presence::Away);
    assert_eq!(coordinator.crew.slots()[1].attempts.failed, 0);
}

#[tokio::test]
async fn a_notice_while_the_gate_is_held_still_finds_a_state_to_gather_at() {
    let spec = quick(2000, 1, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    for trainer in &trainers[1..] {
        trainer.inner.lock().turns = Some(Arc::new(Semaphore::new(0)));
    }
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(3, &mut coordinator).await;
    let [hold, another] = [60, 90].map(Duration::from_secs);
    coordinator.crew.slot(1).attempts.hold_next(hold);
    coordinator.crew.slot(2).attempts.hold_next(another);
    coordinator.prepare(1);
    coordinator.prepare(2);
    let due = coordinator.crew.slot(2).attempts.take_hold();
    assert_eq!(due, another, "it has not been waited for yet");
    let limit = coordinator.held_gate.as_ref().unwrap().limit;
    follow_to(limit, &mut coordinator).await;
    assert_eq!(coordinator.gate(), limit);
    let step = coordinator.gather("worker-9");
    assert!(coordinator.held_gate.is_none() && step > limit);
    follow_to(step, &mut coordinator).await;
    let helpers = coordinator.helpers(step);
    let names: Vec<String> = helpers.iter().map(|helper| helper.name()).collect();
    assert_eq!(names, ["trainer-0 on worker-0"]);
}

#[tokio::test(start_paused = true)]
async fn several_that_came_too_late_are_together_waited_for_no_longer_than_one_may_be() {
    let spec = quick(2000, 1, 4);
    let trainers = trainers(&spec, vec![vec![]; 4]);
    for trainer in &trainers[1..] {
        trainer.inner.lock().turns = Some(Arc::new(Semaphore::new(0)));
    }
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(3, &mut coordinator).await;
    let second = Duration::from_secs(1);
    coordinator.crew.slot(1).attempts.hold_next(HOLDS_MAX);
    coordinator.prepare(1);
    let limit = coordinator.held_gate.as_ref().unwrap().limit;
    follow_to(limit, &mut coordinator).await;
    // The copy has come there this moment, and stands there for as long as it may for anybody.
    coordinator.look_after_joining();
    tokio::time::advance(HOLDS_MAX - second).await;
    coordinator.look_after_joining();
    assert!(coordinator.held_gate.is_some(), "it has a second left");
    tokio::time::advance(second).await;
    coordinator.look_after_joining();
    assert!(coordinator.held_gate.is_none(), "its time is over");
    // The next one is not waited for at once, and comes all the same.
    coordinator.crew.slot(2).attempts.hold_next(second);
    coordinator.prepare(2);
    assert!(coordinator.held_gate.is_none());
    assert_eq!(presence(&coordinator, 2), Presence::Preparing);
    let due = coordinator.crew.slots()[2].attempts.hold_due();
    assert_eq!(due, second, "it may be waited for at a later attempt");
    tokio::time::advance(second * HOLD_SHARE).await;
    coordinator.prepare(3);
    assert!(coordinator.held_gate.is_none(), "it never came too late");
    coordinator.prepare(2);
    assert!(coordinator.held_gate.is_some(), "they have gone on since");
}

#[tokio::test]
async fn all_trainers_of_a_machine_with_other_bits_for_the_third_time_are_dismissed() {
    let spec = quick(1000, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    while coordinator.ready_count() < 3 {
        advance(&mut coordinator).await;
    }
    assert_eq!(coordinator.struck_machines(), "");
    coordinator.crew.slot(2).node = "worker-1".to_owned();
    coordinator.strikes.insert("worker-1".to_owned(), 2);
    let step = coordinator.state().step;
    let own = coordinator.member.digest_before(step).unwrap();
    let member = |index: usize| coordinator.crew.slots()[index].member.unwrap();
    let said = BTreeMap::from([(member(0), own), (member(1), [7; 16]), (member(2), own)]);
    coordinator.judge(step, &said).unwrap();
    let presences = [0, 1, 2].map(|index| presence(&coordinator, index));
    assert_eq!(presences, [Presence::Ready, Presence::Away, Presence::Away]);
    assert_eq!(coordinator.ready_count(), 1);
    assert!(coordinator.struck_machines().contains("worker-1"));
}

#[tokio::test]
async fn who_follows_and_has_notice_gets_no_seat() {
    let spec = quick(1000, 2, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    while coordinator.ready_count() < 2 {
        advance(&mut coordinator).await;
    }
    let member = coordinator.crew.slots()[1].member.unwrap();
    coordinator.leader.unseat(member);
    coordinator.crew.slot(1).presence = Presence::Following;
    coordinator.keeps_doomed = true;
    let news = |notice_ms| News {
        number: 0,
        member,
        step: spec.steps,
        reports: Vec::new(),
        spent: Default::default(),
        cpu: Duration::ZERO,
        notice_ms,
        gpu_utilization: None,
    };
    coordinator.heard(1, &news(Some(1)));
    assert_eq!(presence(&coordinator, 1), Presence::Following);
    coordinator.heard(1, &news(None));
    assert_eq!(presence(&coordinator, 1), Presence::Ready);
}

#[tokio::test(start_paused = true)]
async fn the_time_in_which_a_step_waited_for_silent_trainers_is_told() {
    let spec = quick(400, 2, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(3, &mut coordinator).await;
    for trainer in &trainers {
        trainer.inner.lock().is_silent = true;
    }
    let mut longest = Duration::ZERO;
    while coordinator.counters().trainers_lost == 0 {
        let begun = Instant::now();
        advance(&mut coordinator).await;
        let wait = coordinator.breakdown(begun.elapsed()).wait;
        longest = longest.max(wait);
    }
    assert!(longest >= Duration::from_millis(500), "{longest:?}");
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}
