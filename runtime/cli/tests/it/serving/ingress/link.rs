//! The way from an ingress to an endpoint's router: how much goes along it at once, what a router is told of the time, what becomes
//! of a request whose router is lost, and of one that nobody waits for any more.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use mobula_actors::serving::guard::traffic::Counts;
use mobula_actors::serving::ingress::link::{IN_FLIGHT_MAX, RouterLink};
use mobula_actors::serving::oip::{InferRequest, InferResponse, OipError, Parameter};
use tokio::task::{JoinHandle, JoinSet};

use super::stage::{Stage, soon};

const SECOND: i64 = 1_000_000;

/// A request that allows so many microseconds, if it says so.
fn request(timeout_us: Option<i64>) -> InferRequest {
    let timeout = timeout_us.map(|micros| ("timeout".to_owned(), Parameter::Int(micros)));
    InferRequest {
        parameters: timeout.into_iter().collect(),
        ..InferRequest::default()
    }
}

type Answered = Result<InferResponse, OipError>;

fn ask(link: &Arc<RouterLink>, timeout_us: Option<i64>) -> JoinHandle<Answered> {
    let link = Arc::clone(link);
    tokio::spawn(async move { link.infer(None, request(timeout_us)).await })
}

async fn answer_to(asked: JoinHandle<Answered>) -> Answered {
    soon("the answer", asked).await.unwrap()
}

#[tokio::test]
async fn one_request_more_than_there_is_room_for_is_refused_and_counted() {
    let stage = Stage::up().await;
    let router = stage.start_router().await;
    let link = stage.link();
    let asked: Vec<_> = (0..IN_FLIGHT_MAX).map(|_| ask(&link, None)).collect();
    router.has(IN_FLIGHT_MAX).await;

    let refused = answer_to(ask(&link, None)).await.unwrap_err();
    let limit = IN_FLIGHT_MAX as u64;
    let queued = limit;
    assert_eq!(refused, OipError::Overloaded { queued, limit });
    assert_eq!(refused.status(), 503);
    let shed = Counts {
        shed: 1,
        ..Counts::default()
    };
    assert_eq!(link.counts(), shed);

    router.let_answer(IN_FLIGHT_MAX + 1);
    for asked in asked {
        assert_eq!(
            answer_to(asked).await.unwrap().model_version,
            router.version()
        );
    }
    // There is room again, and the router never heard of the one that was refused.
    answer_to(ask(&link, None)).await.unwrap();
    assert_eq!(router.asked().len(), IN_FLIGHT_MAX + 1);
    assert_eq!(link.counts(), shed);
}

#[tokio::test]
async fn a_router_is_told_what_is_left_of_the_time() {
    let stage = Stage::up().await;
    let link = stage.link();
    let asked = ask(&link, Some(20 * SECOND));
    // Between two looks there is a pause of 50 ms, which is gone when there is a router.
    stage.is_asked_for_a_router(2).await;
    let router = stage.start_router().await;
    router.let_answer(3);
    answer_to(asked).await.unwrap();
    let limit = router.asked()[0].unwrap();
    assert!((1..=20 * SECOND - 50_000).contains(&limit), "{limit} us");

    // A minute at the most; and who says nothing is allowed what the router allows.
    answer_to(ask(&link, Some(3_600 * SECOND))).await.unwrap();
    let limit = router.asked()[1].unwrap();
    assert!((1..=60 * SECOND).contains(&limit), "{limit} us");
    answer_to(ask(&link, None)).await.unwrap();
    assert_eq!(router.asked()[2], None);

    // One that is not answered ends with its time, and is told what it allowed itself.
    let late = answer_to(ask(&link, Some(SECOND / 10))).await.unwrap_err();
    assert_eq!(late, OipError::DeadlineExceeded { limit_ms: 100 });
}

#[tokio::test]
async fn a_request_that_is_lost_with_its_router_is_sent_once_more() {
    let stage = Stage::up().await;
    let first = stage.start_router().await;
    let link = stage.link();
    let asked = ask(&link, Some(20 * SECOND));
    first.has(1).await;
    stage.kill(&first).await;
    let second = stage.start_router().await;
    second.let_answer(1);
    let answer = answer_to(asked).await.unwrap();
    assert_eq!(answer.model_version, second.version());
    assert_eq!((first.asked().len(), second.asked().len()), (1, 1));
    // Within the same time.
    let (before, after) = (first.asked()[0], second.asked()[0]);
    assert!(after < before, "{after:?} us after {before:?} us");
    let retried = Counts {
        retries: 1,
        ..Counts::default()
    };
    assert_eq!(link.counts(), retried);

    // And no more than once.
    let asked = ask(&link, None);
    second.has(2).await;
    stage.kill(&second).await;
    let third = stage.start_router().await;
    third.has(1).await;
    stage.kill(&third).await;
    let fourth = stage.start_router().await;
    fourth.let_answer(1);
    let lost = answer_to(asked).await.unwrap_err();
    assert!(matches!(lost, OipError::ReplicaLost { .. }), "{lost}");
    assert!(fourth.asked().is_empty());
}

#[tokio::test]
async fn no_more_are_sent_again_than_the_budget_allows() {
    const REQUESTS: u64 = 1_000;
    const AT_ONCE: u64 = 50;
    let stage = Stage::up().await;
    let router = stage.start_router().await;
    router.leaves.store(true, Ordering::Relaxed);
    let link = stage.link();
    for _ in 0..REQUESTS / AT_ONCE {
        let mut asked = JoinSet::new();
        for _ in 0..AT_ONCE {
            let link = Arc::clone(&link);
            asked.spawn(async move { link.infer(None, request(None)).await });
        }
        while let Some(answered) = soon("an answer", asked.join_next()).await {
            let lost = answered.unwrap().unwrap_err();
            assert!(matches!(lost, OipError::ReplicaLost { .. }), "{lost}");
        }
    }
    // How many these are depends on the time that it took; the budget's own tests say how.
    let Counts {
        retries,
        retries_refused,
        ..
    } = link.counts();
    assert_eq!(retries + retries_refused, REQUESTS);
    assert_eq!(router.asked().len() as u64, REQUESTS + retries);
}

#[tokio::test]
async fn a_request_whose_caller_leaves_is_called_back() {
    let stage = Stage::up().await;
    let router = stage.start_router().await;
    let link = stage.link();
    let asked = ask(&link, None);
    router.has(1).await;
    asked.abort();
    router.is_called_back_from(1).await;
    router.let_answer(1);
    answer_to(ask(&link, None)).await.unwrap();
    assert_eq!(link.counts(), Counts::default());
}
