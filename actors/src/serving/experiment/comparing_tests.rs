use mobula_storage::blob::fault::{Fault, FaultStore};
use mobula_storage::blob::{RetryPolicy, S3Options};

use super::*;
use crate::serving::experiment::plan::SAMPLES_MAX;
use crate::serving::experiment::sentinels::tests::compared;
use crate::serving::experiment::tally::stored::TALLY_BYTES_MAX;
use crate::serving::experiment::tally::stored::tests::plan;
use crate::serving::experiment::tally::{Unit, Variant};
use crate::serving::loading::tests::loaded;
use crate::serving::rollout::trial::Outcome;
use crate::serving::sentinels::NONE;
use crate::serving::sentinels::fixture::{Computing, answered, computed};

/// How often a task of this thread is let run, which needs a few times.
const TURNS: u32 = 1_000;

fn begun() -> Experiment {
    Experiment {
        number: 1,
        plan: plan(),
        started_ms: 1,
        ended_ms: None,
        ending: None,
        revision: 10,
        cleanup: Cleanup::Waiting,
        counts: 1,
        counting: Some(Incarnation(5)),
        reported_ms: None,
        findings: None,
        stored: None,
    }
}

fn store_with_faults() -> (FaultStore, BlobStore) {
    let policy = RetryPolicy {
        attempts: 1,
        ..RetryPolicy::IMMEDIATE
    };
    BlobStore::open("memory://", &S3Options::default())
        .unwrap()
        .with_faults(policy)
}

/// A router's count from zero.
fn from_zero(experiment: &Experiment) -> Current {
    let tally = Tally::new(experiment.plan.clone(), experiment.alpha());
    Current::new(experiment, tally)
}

fn meet(current: &Current, keys: std::ops::Range<u64>) {
    for key in keys {
        let answered = Outcome::Answered(Duration::from_millis(1));
        lock(&current.tally).record(Unit::Key(key), Variant::Control, answered);
    }
}

/// Waits until a copy is in the store, or could not be written.
async fn heard(current: &mut Current, experiment: &Experiment) {
    for _ in 0..TURNS {
        current.hear(experiment);
        if current.storing.is_empty() {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("a copy is not in the store after {TURNS} turns");
}

#[tokio::test(start_paused = true)]
async fn a_router_goes_on_with_the_copy_that_the_head_knows() {
    let (_, blobs) = store_with_faults();
    let mut experiment = begun();
    let mut current = from_zero(&experiment);
    assert!(!current.is_due(), "there is nothing to look at");
    meet(&current, 0..60);
    assert!(current.is_due());
    current.store(blobs.clone());
    // What comes meanwhile is not in the copy.
    meet(&current, 60..100);
    assert!(!current.is_due(), "one copy is on its way");
    heard(&mut current, &experiment).await;
    let look = current.told.as_ref().unwrap();
    assert_eq!((look.ending, look.findings.ratios[0].control), (None, 60));

    // It is told until the head knows it.
    current.hear(&experiment);
    assert!(current.told.is_some());
    experiment.stored = current.told.as_ref().map(|look| look.stored);
    current.hear(&experiment);
    assert!(current.told.is_none() && current.stored == experiment.stored);
    assert!(!current.is_due(), "the next copy has time");
    tokio::time::advance(REPORT_INTERVAL).await;
    assert!(current.is_due());
    drop(current);

    // The next router knows those sixty keys, and counts none of them again.
    let (plan, alpha) = (&experiment.plan, experiment.alpha());
    let stored = experiment.stored.unwrap();
    let tally = shelf::read(&blobs, plan, alpha, stored).await.unwrap();
    let current = Current::new(&experiment, tally);
    meet(&current, 0..60);
    assert!(!current.is_due() && lock(&current.tally).exposed() == 60);
    meet(&current, 60..61);
    assert!(current.is_due() && lock(&current.tally).exposed() == 61);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_does_not_hold_who_goes_on_with_a_count() {
    let hangs = Duration::from_secs(3_600);
    let (faults, blobs) = store_with_faults();
    let mut experiment = begun();
    let mut current = from_zero(&experiment);
    meet(&current, 0..60);
    current.store(blobs.clone());
    heard(&mut current, &experiment).await;
    experiment.stored = current.told.as_ref().map(|look| look.stored);

    faults.reset();
    faults.stand(Some(Fault::Stalled(hangs)));
    let open = || Ok(blobs.clone());
    let mut reading = Loading::new();
    for _ in 0..TURNS {
        assert!(counted_before(&mut reading, &experiment, open).is_none());
        tokio::task::yield_now().await;
    }
    assert_eq!(faults.operations(), 1, "it is asked once at a time");
    tokio::time::advance(2 * hangs).await;
    let tally = loaded(|| counted_before(&mut reading, &experiment, open)).await;
    assert_eq!(tally.unwrap().exposed(), 60);

    // A count from zero asks nobody, and what was asked for another one is dropped.
    assert!(counted_before(&mut reading, &experiment, open).is_none());
    (experiment.counts, experiment.stored) = (2, None);
    let anew = counted_before(&mut reading, &experiment, open);
    assert!(anew.is_some_and(|tally| tally.unwrap().exposed() == 0));
}

#[tokio::test(start_paused = true)]
async fn a_count_that_is_out_of_reach_is_asked_for_again() {
    let (faults, blobs) = store_with_faults();
    let mut experiment = begun();
    experiment.stored = Some([7; 32]);
    faults.plan(0, Fault::BeforeStore);
    let open = || Ok(blobs.clone());
    let mut reading = Loading::new();
    let away = loaded(|| counted_before(&mut reading, &experiment, open)).await;
    assert!(!away.unwrap_err().is_final());
    // It answers, and has no such count.
    let gone = loaded(|| counted_before(&mut reading, &experiment, open)).await;
    assert!(gone.unwrap_err().is_final());
    assert_eq!(faults.operations(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_copy_stays_until_the_one_after_it_is_known() {
    let (_, blobs) = store_with_faults();
    let mut experiment = begun();
    let mut current = from_zero(&experiment);
    for round in 0..10 {
        meet(&current, round..round + 1);
        current.store(blobs.clone());
        heard(&mut current, &experiment).await;
        // Until the head knows of this one, somebody may go on with the one before it.
        if let Some(stored) = experiment.stored {
            let (plan, alpha) = (&experiment.plan, experiment.alpha());
            let before = shelf::read(&blobs, plan, alpha, stored).await.unwrap();
            assert_eq!(before.exposed(), round);
        }
        experiment.stored = current.told.as_ref().map(|look| look.stored);
        current.hear(&experiment);
        let left = blobs.list("experiments", 10).await.unwrap();
        assert!(left.len() <= 2, "{left:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_copy_is_written_while_the_replaced_one_cannot_be_removed() {
    let (faults, blobs) = store_with_faults();
    let mut experiment = begun();
    let mut current = from_zero(&experiment);
    for round in 0..2 {
        meet(&current, round..round + 1);
        current.store(blobs.clone());
        heard(&mut current, &experiment).await;
        experiment.stored = current.told.as_ref().map(|look| look.stored);
        current.hear(&experiment);
    }
    meet(&current, 2..3);
    // The first of the two is to be removed now, and a write would succeed.
    faults.reset();
    faults.plan(0, Fault::BeforeStore);
    current.store(blobs.clone());
    heard(&mut current, &experiment).await;
    assert!(current.told.is_none());
    // Both are tried again.
    tokio::time::advance(REPORT_INTERVAL).await;
    assert!(current.is_due());
    current.store(blobs.clone());
    heard(&mut current, &experiment).await;
    let told = current.told.as_ref().unwrap().stored;
    let left = blobs.list("experiments", 10).await.unwrap();
    assert_eq!(left.len(), 2, "{left:?}");
    for stored in [experiment.stored.unwrap(), told] {
        let (plan, alpha) = (&experiment.plan, experiment.alpha());
        shelf::read(&blobs, plan, alpha, stored).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_follows_from_a_count_that_cannot_be_stored() {
    let (faults, blobs) = store_with_faults();
    let experiment = begun();
    let mut current = from_zero(&experiment);
    meet(&current, 0..60);
    faults.stand(Some(Fault::NoSpace));
    current.store(blobs.clone());
    heard(&mut current, &experiment).await;
    assert!(current.told.is_none() && !current.is_due());
    // The same keys are tried again, though no other came.
    tokio::time::advance(REPORT_INTERVAL).await;
    assert!(current.is_due());
    faults.stand(None);
    current.store(blobs);
    heard(&mut current, &experiment).await;
    assert!(current.told.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_wrong_answer_to_a_sentinel_is_told_before_anything_is_stored() {
    let known = computed();
    let broken = Computing::with(Some(&known.broken));
    let routes = compared(&[&broken]);
    let experiment = begun();
    let mut current = from_zero(&experiment);
    let mut asking = Asking::new();
    asking.at(experiment.number, Arc::clone(&known.sentinels));
    let first = current.word(&experiment, &routes, &mut asking);
    assert!(first.is_none(), "{first:?}");
    answered().await;
    // Again and again: the head may not have heard of it.
    for _ in 0..2 {
        let word = current.word(&experiment, &routes, &mut asking);
        let Some(Word::Over(Ending::Sentinel, findings)) = word else {
            panic!("nothing follows from a wrong answer: {word:?}");
        };
        assert_eq!(findings.decision, Decision::Control);
    }
}

#[tokio::test(start_paused = true)]
async fn a_report_of_a_treatment_without_sentinels_says_so() {
    let (_, blobs) = store_with_faults();
    let experiment = begun();
    let mut current = from_zero(&experiment);
    let mut asking = Asking::new();
    asking.at(experiment.number, Arc::default());
    meet(&current, 0..60);
    current.store(blobs);
    heard(&mut current, &experiment).await;
    let told = current.told.as_ref().unwrap().stored;
    let word = current.word(&experiment, &compared(&[]), &mut asking);
    let Some(Word::SoFar(findings, stored)) = word else {
        panic!("a copy that the head does not know is not told: {word:?}");
    };
    assert_eq!(stored, told);
    assert!(findings.reason.ends_with(NONE), "{}", findings.reason);
    assert!(findings.is_bounded());
}

#[test]
fn large_counts_are_stored_less_often() {
    assert_eq!(pause_after(1_000), REPORT_INTERVAL);
    let longest = pause_after(TALLY_BYTES_MAX);
    assert!(
        (8..10).contains(&longest.as_secs()),
        "{longest:?} for {SAMPLES_MAX} keys"
    );
}
