use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::drift::vitals::sentinels::{SENTINEL_INTERVAL, SENTINEL_PAUSE, SENTINEL_TIMEOUT};
use crate::serving::arm::{Arm, Compared, lock};
use crate::serving::experiment::tally::Tally;
use crate::serving::experiment::tally::stored::tests::plan;
use crate::serving::rollout::fixture;
use crate::serving::sentinels::fixture::{Computing, answered, computed};

/// An experiment whose treatment has two replicas, of which these take requests.
pub(in crate::serving::experiment) fn compared(replicas: &[&Computing]) -> Routes<Computing> {
    let compared = Compared {
        arm: fixture::arm(2, replicas.iter().copied().cloned().collect()),
        plan: Arc::new(plan()),
        tally: Arc::new(Mutex::new(Tally::new(plan(), 0.05))),
    };
    Routes {
        compared: Some(compared),
        ..fixture::routes()
    }
}

fn treatment(routes: &Routes<Computing>) -> &Arm<Computing> {
    &routes.compared.as_ref().unwrap().arm
}

fn asking(sentinels: &Arc<Sentinels>) -> Asking {
    let mut asking = Asking::new();
    asking.at(1, Arc::clone(sentinels));
    asking
}

/// The numbers that are looked at: too few for anything to follow.
fn too_few() -> Findings {
    Findings::because("too few".into())
}

/// Why the experiment is over, if it is; whoever was asked has the time to answer then.
async fn look(asking: &mut Asking, routes: &Routes<Computing>) -> Option<Ending> {
    let (ending, _) = asking.look(routes, (None, too_few()));
    answered().await;
    ending
}

#[tokio::test(start_paused = true)]
async fn a_treatment_that_answers_its_sentinels_wrongly_ends_the_experiment_whatever_its_numbers_say()
 {
    let known = computed();
    let [sound, broken] = known.replicas();
    let routes = compared(&[&sound, &broken]);
    let mut asking = asking(&known.sentinels);
    let better = || Findings {
        decision: Decision::Treatment,
        uncounted: 7,
        ..too_few()
    };
    for counted in [(None, too_few()), (Some(Ending::Decided), better())] {
        assert_eq!(asking.look(&routes, counted.clone()), counted);
    }
    answered().await;
    // Again and again: the head may not have heard of it.
    for counted in [(None, better()), (Some(Ending::Decided), better())] {
        let (ending, findings) = asking.look(&routes, counted);
        assert_eq!(ending, Some(Ending::Sentinel));
        assert_eq!(findings.decision, Decision::Control);
        let said = "the treatment is wrong about a row whose answer is known: replica 2 answered sentinel ";
        assert!(findings.reason.starts_with(said), "{}", findings.reason);
        assert!(findings.reason.contains("instead of class "));
        assert!(findings.reason.ends_with("the same class)"));
        assert!(findings.is_bounded() && findings.uncounted == 7);
    }
    // A sentinel is nobody's request, and nobody asks one that is done for.
    assert_eq!((sound.asked(), broken.asked()), (1, 1));
    assert_eq!(treatment(&routes).statistics().inference_count(), 0);
    let tally = &routes.compared.as_ref().unwrap().tally;
    assert_eq!(lock(tally).exposed(), 0);
}

#[tokio::test(start_paused = true)]
async fn each_start_of_each_replica_of_a_treatment_is_asked_and_asked_again() {
    let known = computed();
    let (first, second) = (
        Computing::with(Some(&known.sound)),
        Computing::with(Some(&known.sound)),
    );
    let routes = compared(&[&first]);
    let mut asking = asking(&known.sentinels);
    for _ in 0..2 {
        assert_eq!(look(&mut asking, &routes).await, None);
        assert_eq!(first.asked(), 1, "once is enough for now");
    }
    // Of another start nothing is known, though nobody saw the first one end.
    let (_, berth) = treatment(&routes).fleet().berths().next().unwrap();
    berth.open(first.clone());
    for _ in 0..2 {
        assert_eq!(look(&mut asking, &routes).await, None);
        assert_eq!(first.asked(), 2);
    }
    let (_, berth) = treatment(&routes).fleet().berths().nth(1).unwrap();
    berth.open(second.clone());
    for _ in 0..2 {
        assert_eq!(look(&mut asking, &routes).await, None);
        assert_eq!(second.asked(), 1);
    }

    // A device breaks while the experiment is under way.
    second.has(&known.broken);
    tokio::time::advance(SENTINEL_INTERVAL - Duration::from_millis(1)).await;
    assert_eq!(look(&mut asking, &routes).await, None);
    assert_eq!(second.asked(), 1);
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(look(&mut asking, &routes).await, None);
    assert_eq!(second.asked(), 2);
    assert_eq!(look(&mut asking, &routes).await, Some(Ending::Sentinel));

    // What one experiment has found is not held against the next one.
    second.has(&known.sound);
    asking.at(2, Arc::clone(&known.sentinels));
    for _ in 0..2 {
        assert_eq!(look(&mut asking, &routes).await, None);
        assert_eq!(second.asked(), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn no_answer_of_a_treatment_is_no_wrong_answer_and_is_asked_for_again() {
    let known = computed();
    let replica = Computing::with(None);
    let routes = compared(&[&replica]);
    let mut asking = asking(&known.sentinels);
    assert_eq!(look(&mut asking, &routes).await, None);
    tokio::time::advance(2 * SENTINEL_TIMEOUT).await;
    // The one that ends the round, and others during the pause.
    for _ in 0..3 {
        assert_eq!(look(&mut asking, &routes).await, None);
    }
    assert_eq!(replica.asked(), 1);
    replica.has(&known.broken);
    tokio::time::advance(SENTINEL_PAUSE).await;
    assert_eq!(look(&mut asking, &routes).await, None);
    assert_eq!(look(&mut asking, &routes).await, Some(Ending::Sentinel));
    assert_eq!(replica.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_treatment_without_sentinels_is_not_asked_and_that_is_said() {
    let known = computed();
    let replica = Computing::with(Some(&known.broken));
    let routes = compared(&[&replica]);
    // Before its file is read it is not known.
    assert_eq!(Asking::new().noted(too_few()), too_few());
    let mut asking = asking(&Arc::default());
    for _ in 0..2 {
        assert_eq!(look(&mut asking, &routes).await, None);
    }
    assert_eq!(replica.asked(), 0);
    assert_eq!(
        asking.noted(too_few()).reason,
        "too few; its version has no sentinels to be asked"
    );
    asking.at(2, Arc::clone(&known.sentinels));
    assert_eq!(asking.noted(too_few()), too_few());
}
