use std::time::Duration;

use super::*;
use crate::drift::vitals::sentinels::{SENTINEL_INTERVAL, SENTINEL_PAUSE, SENTINEL_TIMEOUT};
use crate::serving::rollout::fixture::{self, in_a_word};
use crate::serving::rollout::plan::Strategy;
use crate::serving::rollout::plan::tests::begun;
use crate::serving::rollout::trial::EVIDENCE_TEXT_BYTES_MAX;
use crate::serving::sentinels::NONE;
use crate::serving::sentinels::fixture::{Computing, answered, computed};

/// The candidate, of whose two replicas these take requests.
fn candidate(replicas: &[&Computing]) -> Arc<Arm<Computing>> {
    fixture::arm(2, replicas.iter().copied().cloned().collect())
}

/// A step of which both sides had so many requests, of the ten that it takes; the candidate's arm.
fn tried(
    replicas: &[&Computing],
    weight_percent: u32,
    requests: usize,
) -> (Routes<Computing>, Arc<Arm<Computing>>) {
    let candidate = candidate(replicas);
    let routes = fixture::tried(Arc::clone(&candidate), weight_percent, requests);
    (routes, candidate)
}

/// What is seen in a word, and the numbers; whoever was asked has the time to answer then.
async fn look(
    asking: &mut Asking,
    routes: &Routes<Computing>,
    rollout: &Rollout,
) -> (&'static str, Evidence) {
    let seen = asking.look(routes, rollout).unwrap();
    answered().await;
    in_a_word(seen)
}

fn asking(rollout: &Rollout, sentinels: &Arc<Sentinels>) -> Asking {
    let mut asking = Asking::new();
    asking.at(rollout, Arc::clone(sentinels));
    asking
}

#[tokio::test(start_paused = true)]
async fn a_candidate_that_answers_its_sentinels_wrongly_is_rolled_back_before_its_first_step_is_passed()
 {
    let known = computed();
    let [sound, broken] = known.replicas();
    let replicas = [&sound, &broken];
    // As a canary that had all its requests, as blue-green, and as a shadow.
    for (routes, strategy, requests) in [
        (tried(&replicas, 5, 10).0, Strategy::Canary, 10),
        (tried(&replicas, 0, 0).0, Strategy::BlueGreen, 0),
        (
            fixture::shadowed(candidate(&replicas), 20),
            Strategy::Canary,
            20,
        ),
    ] {
        let rollout = begun(strategy, &[0, 100]);
        let mut asking = asking(&rollout, &known.sentinels);
        let (first, evidence) = look(&mut asking, &routes, &rollout).await;
        assert_eq!(first, "waits", "{}", evidence.reason);
        // Again and again: the head may not have heard of it.
        for _ in 0..2 {
            let (seen, evidence) = look(&mut asking, &routes, &rollout).await;
            assert_eq!(seen, "roll back", "{}", evidence.reason);
            let said = "replica 2 answered sentinel ";
            assert!(evidence.reason.contains(said), "{}", evidence.reason);
            assert!(evidence.reason.contains("instead of class "));
            assert!(evidence.reason.ends_with("the same class)"));
            assert!(evidence.is_bounded());
            assert_eq!(evidence.candidate.requests, requests);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_candidate_that_answers_them_rightly_goes_on_and_is_asked_again() {
    let known = computed();
    let replica = Computing::with(Some(&known.sound));
    let (routes, candidate) = tried(&[&replica], 5, 10);
    let mut rollout = begun(Strategy::Canary, &[5, 50, 100]);
    let mut asking = asking(&rollout, &known.sentinels);
    let (seen, evidence) = look(&mut asking, &routes, &rollout).await;
    assert_eq!(
        (seen, &*evidence.reason),
        (
            "waits",
            "0 of 1 replicas have answered the candidate's sentinels; 10 requests within the guardrails"
        )
    );
    let (seen, evidence) = look(&mut asking, &routes, &rollout).await;
    assert_eq!(
        (seen, &*evidence.reason),
        ("pass", "10 requests within the guardrails")
    );
    assert_eq!(replica.asked(), 1, "once is enough for now");
    // A sentinel is nobody's request.
    assert_eq!(evidence.candidate.requests, 10);
    assert_eq!(candidate.statistics().inference_count(), 0);
    assert_eq!(candidate.statistics().execution_count(), 0);

    // Another step: what was answered at the last one does not count.
    rollout.step = 1;
    asking.at(&rollout, Arc::clone(&known.sentinels));
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "waits");
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "pass");
    assert_eq!(replica.asked(), 2);

    // So is another start of the replica, of which nothing is known though nobody saw the first one end.
    let (_, berth) = candidate.fleet().berths().next().unwrap();
    berth.open(replica.clone());
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "waits");
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "pass");
    assert_eq!(replica.asked(), 3);

    // Its device breaks while the rollout stays at the step.
    replica.has(&known.broken);
    tokio::time::advance(SENTINEL_INTERVAL - Duration::from_millis(1)).await;
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "pass");
    assert_eq!(replica.asked(), 3);
    tokio::time::advance(Duration::from_millis(1)).await;
    look(&mut asking, &routes, &rollout).await;
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "roll back");
}

#[tokio::test(start_paused = true)]
async fn replicas_that_come_later_are_asked_as_well_and_those_that_go_are_not_waited_for() {
    let known = computed();
    let (first, second) = (
        Computing::with(Some(&known.sound)),
        Computing::with(Some(&known.broken)),
    );
    let (routes, candidate) = tried(&[&first], 5, 10);
    let rollout = begun(Strategy::Rolling, &[50, 100]);
    let mut asking = asking(&rollout, &known.sentinels);
    look(&mut asking, &routes, &rollout).await;
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "pass");
    let (_, berth) = candidate.fleet().berths().nth(1).unwrap();
    let silent = Computing::with(None);
    berth.open(silent.clone());
    let (seen, evidence) = look(&mut asking, &routes, &rollout).await;
    assert_eq!(seen, "waits");
    assert!(
        evidence.reason.starts_with("1 of 2 replicas"),
        "{}",
        evidence.reason
    );
    berth.close();
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "pass");
    // None is left to be asked before anything is passed.
    let (_, berth_of_first) = candidate.fleet().berths().next().unwrap();
    berth_of_first.close();
    let (seen, evidence) = look(&mut asking, &routes, &rollout).await;
    assert_eq!(seen, "waits", "{}", evidence.reason);
    // What was asked before gets its time, and then its pause.
    tokio::time::advance(2 * SENTINEL_TIMEOUT).await;
    look(&mut asking, &routes, &rollout).await;
    look(&mut asking, &routes, &rollout).await;
    tokio::time::advance(SENTINEL_PAUSE).await;
    berth.open(second);
    look(&mut asking, &routes, &rollout).await;
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "roll back");
    assert_eq!(silent.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_version_without_sentinels_is_not_held_and_that_is_said() {
    let replica = Computing::with(None);
    let bare = Arc::new(Sentinels::default());
    let rollout = begun(Strategy::Canary, &[5, 100]);
    for (requests, what, why) in [
        (
            10,
            "pass",
            "10 requests within the guardrails; its version has no sentinels to be asked",
        ),
        (
            3,
            "hold",
            "3 of 10 requests; its version has no sentinels to be asked",
        ),
    ] {
        let (routes, _) = tried(&[&replica], 5, requests);
        let mut asking = asking(&rollout, &bare);
        let (seen, evidence) = look(&mut asking, &routes, &rollout).await;
        assert_eq!((seen, &*evidence.reason), (what, why));
    }
    assert_eq!(replica.asked(), 0);
    let long = Evidence {
        reason: "ü".repeat(EVIDENCE_TEXT_BYTES_MAX / 2),
        ..Evidence::default()
    };
    let noted = evidence_of(noted(Seen::Judged(Judgement::Hold(long))));
    assert!(noted.is_bounded() && noted.reason.ends_with(NONE));
}

#[tokio::test(start_paused = true)]
async fn no_answer_is_no_wrong_answer_and_is_asked_for_again() {
    let known = computed();
    let replica = Computing::with(None);
    let (routes, _) = tried(&[&replica], 5, 10);
    let rollout = begun(Strategy::Canary, &[5, 100]);
    let mut asking = asking(&rollout, &known.sentinels);
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "waits");
    tokio::time::advance(2 * SENTINEL_TIMEOUT).await;
    // The one that ends the round, and others during the pause.
    for _ in 0..3 {
        assert_eq!(look(&mut asking, &routes, &rollout).await.0, "waits");
    }
    assert_eq!(replica.asked(), 1);
    replica.has(&known.sound);
    tokio::time::advance(SENTINEL_PAUSE).await;
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "waits");
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "pass");
    assert_eq!(replica.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn numbers_that_are_not_enough_yet_do_not_hide_a_wrong_answer() {
    let known = computed();
    let replica = Computing::with(Some(&known.broken));
    let (routes, _) = tried(&[&replica], 5, 3);
    let rollout = begun(Strategy::Canary, &[5, 100]);
    let mut asking = asking(&rollout, &known.sentinels);
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "hold");
    assert_eq!(look(&mut asking, &routes, &rollout).await.0, "roll back");
}
