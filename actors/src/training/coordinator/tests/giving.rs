//! Trainers that give the state to one that joins.

use super::joining::{advance, presence, quick};
use super::*;
use crate::training::crew::Presence;

#[tokio::test]
async fn who_joins_takes_the_state_from_several_others_and_ends_in_the_same_bits() {
    let spec = quick(1500, 1, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    coordinator.part_bytes = 1000;
    let has_pulled = || trainers[2].inner.lock().log.contains(&"pull");
    // Again where the others were beyond the step that was chosen, as they may be on a busy machine.
    while !has_pulled() {
        while coordinator.ready_count() < 3 {
            advance(&mut coordinator).await;
        }
        trainers[2].crash(&mut trainers[2].inner.lock());
        let lost = coordinator.counters().trainers_lost;
        while coordinator.counters().trainers_lost == lost {
            advance(&mut coordinator).await;
        }
        while coordinator.ready_count() < 3 {
            advance(&mut coordinator).await;
        }
    }
    for giver in &trainers[..2] {
        assert!(giver.inner.lock().given > 0);
    }
    while coordinator.giving.is_some() {
        advance(&mut coordinator).await;
    }
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}

#[tokio::test]
async fn who_waits_for_the_state_of_others_gets_the_copys_where_no_step_begins() {
    let spec = quick(1000, 2, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    coordinator.part_bytes = 1000;
    while coordinator.ready_count() < 3 || coordinator.giving.is_some() {
        advance(&mut coordinator).await;
    }
    // The first time it may have come when others took part already, and they gave it the state.
    trainers[2].inner.lock().log.clear();
    trainers[2].crash(&mut trainers[2].inner.lock());
    coordinator.lose(2, "it was killed");
    coordinator.greeted(2, trainers[2].greeting());
    assert!(coordinator.giving.is_some());
    assert_eq!(presence(&coordinator, 2), Presence::Preparing);
    coordinator.look_after_joining();
    assert!(coordinator.giving.is_some(), "two go on");
    coordinator.lose(0, "it was killed");
    coordinator.look_after_joining();
    assert!(coordinator.giving.is_none());
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
    assert!(!trainers[2].inner.lock().log.contains(&"pull"));
}

#[tokio::test(start_paused = true)]
async fn who_has_not_heard_that_a_state_is_kept_no_more_is_told_again() {
    let spec = quick(2000, 1, 1);
    let trainers = trainers(&spec, vec![vec![]; 1]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(3, &mut coordinator).await;
    // No such step: it is wanted for as long as it is not ended.
    let step = spec.steps + 1;
    let order = coordinator.crew.next_keep_order();
    assert!(trainers[0].share(order, step).await.unwrap());
    trainers[0].inner.lock().unshares_lost = 2;
    coordinator.crew.end_sharing(&[0], order);
    let is_told = || {
        let inner = trainers[0].inner.lock();
        let kept = inner.replica.lock().shared(step);
        inner.unshares_lost == 0 && matches!(kept, Kept::Never)
    };
    while !is_told() {
        advance(&mut coordinator).await;
    }
}

#[tokio::test]
async fn an_answer_to_an_earlier_order_says_nothing_of_who_keeps_the_state_of_a_later_one() {
    let spec = quick(1000, 1, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    coordinator.part_bytes = 1000;
    while coordinator.ready_count() < 3 || coordinator.giving.is_some() {
        advance(&mut coordinator).await;
    }
    let mut orders = Vec::new();
    for _ in 0..2 {
        coordinator.lose(2, "it was killed");
        coordinator.bring_in(2);
        let giving = coordinator.giving.as_ref().unwrap();
        orders.push((giving.order, giving.step));
        coordinator.lose(2, "it was killed");
        if orders.len() == 1 {
            // Nobody is on the way to it any more.
            coordinator.look_after_giving();
            assert!(coordinator.giving.is_none());
        }
    }
    let [(earlier, first), (later, second)] = orders[..] else {
        panic!("two were given");
    };
    assert!(earlier < later && later.driver_incarnation == 1);
    assert_eq!(first, second, "the same state");
    let keepers = |coordinator: &Tested| coordinator.giving.as_ref().unwrap().keeps.len();
    coordinator.shares(0, earlier, true);
    assert_eq!(keepers(&coordinator), 0);
    coordinator.shares(0, later, true);
    assert_eq!(keepers(&coordinator), 1);
}

#[tokio::test]
async fn few_wait_for_the_state_of_others_and_nobody_does_where_steps_take_long() {
    let spec = quick(2000, 1, 7);
    let trainers = trainers(&spec, vec![vec![]; 7]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    coordinator.part_bytes = 1000;
    while coordinator.ready_count() < 7 || coordinator.giving.is_some() {
        advance(&mut coordinator).await;
    }
    for index in 2..7 {
        coordinator.lose(index, "it was killed");
    }
    coordinator.usual_step = Some(Duration::from_secs(4));
    coordinator.bring_in(2);
    assert!(coordinator.giving.is_none(), "it would take too long");
    assert_eq!(presence(&coordinator, 2), Presence::Preparing);
    coordinator.usual_step = Some(Duration::from_secs(2));
    for index in 2..7 {
        coordinator.bring_in(index);
        assert_eq!(presence(&coordinator, index), Presence::Preparing);
    }
    let furthest = coordinator.furthest();
    let giving = coordinator.giving.as_ref().unwrap();
    let in_time = coordinator.gate().min(furthest + 2);
    assert_eq!(giving.step, in_time, "four seconds from now");
    assert!(giving.takers.iter().copied().eq(2..6), "{giving:?}");
    follow_to(spec.steps, &mut coordinator).await;
    assert_eq!(coordinator.digest(), expected(&spec));
}
