//! Answers that are given again.

use super::trials::tried;
use super::*;
use crate::serving::cache;

/// Counts its calls, and answers as many as it has permits for.
#[derive(Clone)]
struct Counting {
    calls: Arc<AtomicU64>,
    held: Arc<tokio::sync::Semaphore>,
    fails: Arc<std::sync::atomic::AtomicBool>,
}

impl Backend for Counting {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.held.acquire().await.unwrap().forget();
        if self.fails.swap(false, Ordering::Relaxed) {
            return Err(BackendFailure::Refused("not now".into()));
        }
        Three.infer(rows).await
    }
}

fn counting() -> (EndpointService<Counting>, Counting, Arc<Arm<Counting>>) {
    let (active, _) = arm(4);
    let routes = Routes {
        active: Arc::clone(&active),
        tried: None,
        compared: None,
        shadowed: None,
    };
    let backend = Counting {
        calls: Arc::default(),
        held: Arc::new(tokio::sync::Semaphore::new(0)),
        fails: Arc::default(),
    };
    open(&active, backend.clone());
    active.responses().set(Some(cache::CacheSetting {
        bytes: 1 << 20,
        ttl_ms: 60_000,
    }));
    (service_of(routes), backend, active)
}

#[tokio::test]
async fn equal_requests_are_computed_once_and_said_to_be_known() {
    let (service, backend, active) = counting();
    backend.held.add_permits(10);
    let ask = async |value| {
        let asked = InferRequest {
            explain: true,
            ..request(2, value)
        };
        service.infer("digits", None, asked).await.unwrap()
    };
    let first = ask(0.5).await;
    assert_eq!(first.explanation.as_ref().unwrap().cached, Some(false));
    let again = ask(0.5).await;
    assert_eq!(again.outputs, first.outputs);
    assert_eq!(again.explanation.unwrap().cached, Some(true));
    ask(0.25).await;
    assert_eq!(backend.calls.load(Ordering::Relaxed), 2);
    let json = active.statistics().to_json("digits", "4");
    let stats = &json["model_stats"][0]["inference_stats"];
    assert_eq!(
        (&stats["cache_hit"]["count"], &stats["cache_miss"]["count"]),
        (&1.into(), &2.into())
    );
    assert_eq!(
        (
            &stats["success"]["count"],
            active.statistics().inference_count()
        ),
        (&3.into(), 4)
    );
    // Without a cache it is computed again, and nothing is said about one.
    active.responses().set(None);
    assert_eq!(ask(0.5).await.explanation.unwrap().cached, None);
    assert_eq!(backend.calls.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn who_asks_the_same_meanwhile_waits_and_a_failure_is_not_shared() {
    let (service, backend, _active) = counting();
    backend.fails.store(true, Ordering::Relaxed);
    let asking = (0..8).map(|_| service.infer("digits", None, request(1, 0.5)));
    let answers = futures::future::join_all(asking);
    let releasing = async {
        while backend.calls.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        backend.held.add_permits(2);
    };
    let (answers, ()) = tokio::join!(answers, releasing);
    let failed = answers.iter().filter(|answer| answer.is_err()).count();
    // One fails, one is computed for it, and the others get what that one got.
    assert_eq!((failed, backend.calls.load(Ordering::Relaxed)), (1, 2));
}

#[tokio::test]
async fn what_is_no_answer_is_not_kept() {
    let (service, _, arm) = tried(f32::NAN);
    arm.responses().set(Some(cache::CacheSetting {
        bytes: 1 << 20,
        ttl_ms: 60_000,
    }));
    for _ in 0..2 {
        let asked = service.infer("digits", Some("2"), request(1, 0.5)).await;
        assert_eq!(asked.unwrap_err().status(), 500);
    }
    assert_eq!(arm.responses().size(), (0, 0));
}
