//! Trainers that keep the state of a save.

use super::joining::{advance, quick};
use super::*;

/// The only trainer, which is on another machine than the driver, once it has said that it keeps the state after `step`.
async fn helper(step: u64, coordinator: &mut Tested) -> Arc<dyn Helper> {
    loop {
        coordinator.prepare_save(step, "worker-9");
        if let Some(helper) = coordinator.helpers(step).pop() {
            return helper;
        }
        advance(coordinator).await;
    }
}

#[tokio::test]
async fn the_end_of_a_save_takes_nothing_from_a_later_one_of_the_same_step() {
    let spec = quick(2000, 1, 1);
    let trainers = trainers(&spec, vec![vec![]; 1]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    // No such step: it is wanted for as long as it is not ended.
    let step = spec.steps + 1;
    let is_kept = || {
        let replica = Arc::clone(&trainers[0].inner.lock().replica);
        let kept = replica.lock().kept(step);
        matches!(kept, Kept::Coming)
    };
    let earlier = helper(step, &mut coordinator).await;
    // As where it was thought to be lost meanwhile, and is asked again.
    let slot = coordinator.crew.slot(0);
    (slot.asked_to_keep, slot.keeps) = (None, false);
    let later = helper(step, &mut coordinator).await;
    earlier.release().await;
    assert!(is_kept());
    later.release().await;
    assert!(!is_kept());
}

#[tokio::test]
async fn an_answer_to_an_earlier_order_says_nothing_of_what_a_later_one_asked_for() {
    let spec = quick(2000, 1, 1);
    let trainers = trainers(&spec, vec![vec![]; 1]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    let [first, second] = [spec.steps + 1, spec.steps + 2];
    helper(first, &mut coordinator).await;
    let (earlier, _) = coordinator.crew.slots()[0].asked_to_keep.unwrap();
    coordinator.prepare_save(second, "worker-9");
    let (later, _) = coordinator.crew.slots()[0].asked_to_keep.unwrap();
    assert!(earlier < later);
    coordinator.crew.keeps(0, earlier, true);
    assert!(coordinator.helpers(first).is_empty());
    assert!(coordinator.helpers(second).is_empty());
    coordinator.crew.keeps(0, later, true);
    assert_eq!(coordinator.helpers(second).len(), 1);
    assert!(coordinator.helpers(first).is_empty());
}
