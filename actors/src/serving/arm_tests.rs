use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::super::endpoint_service::EndpointService;
use super::super::feed::feed;
use super::super::fleet::BackendFailure;
use super::super::http::InferenceService;
use super::super::oip::{InferResponse, Tensor, TensorData};
use super::super::replica::{Inference, classified};
use super::super::rows::Batch;
use super::super::shadow::mirror::mirror;
use super::super::signature::{INPUT, Signature};
use super::*;

/// How long anything that is waited for may take, in turns of all tasks.
const TURNS_MAX: usize = 10_000;

/// Computes as many batches as it has permits for, and counts those that it has begun.
#[derive(Clone)]
struct Gated {
    begun: Arc<AtomicUsize>,
    permits: Arc<Semaphore>,
}

impl Backend for Gated {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.permits.acquire().await.unwrap().forget();
        let count = rows.rows.unwrap() as usize;
        Ok(Inference {
            outputs: classified(vec![0.5; count * 2], vec![1; count]),
            computed_ns: 1,
            memory_percent: None,
            energies: Vec::new(),
        })
    }
}

/// An endpoint with one replica.
struct Served {
    service: Arc<EndpointService<Gated>>,
    arm: Arc<Arm<Gated>>,
    backend: Gated,
}

impl Served {
    fn up() -> Self {
        let (_, origin) = watch::channel(Origin::default());
        let (arm, _) = Arm::new(1, origin, Fleet::new(1), feed().0, JoinSet::new());
        let arm = Arc::new(arm);
        let backend = Gated {
            begun: Arc::default(),
            permits: Arc::new(Semaphore::new(0)),
        };
        let (_, berth) = arm.fleet().berths().next().unwrap();
        berth.open(backend.clone());
        let routes = Routes {
            active: Arc::clone(&arm),
            tried: None,
            compared: None,
            shadowed: None,
        };
        let (_, routes) = watch::channel(Arc::new(routes));
        let signature = Signature::classifier(2, 2, Vec::new());
        let service = EndpointService::new("digits", signature, routes, mirror().0);
        Served {
            service: service.shared(),
            arm,
            backend,
        }
    }

    /// Asks it, at low priority or as everybody.
    fn ask(&self, low_priority: bool) -> JoinHandle<Result<InferResponse, OipError>> {
        let data = TensorData::Fp32(vec![0.5; 2]);
        let request = InferRequest {
            inputs: vec![Tensor::new(INPUT, vec![1, 2], data).unwrap()],
            low_priority,
            ..InferRequest::default()
        };
        let service = Arc::clone(&self.service);
        tokio::spawn(async move { service.infer("digits", None, request).await })
    }

    /// Waits until so many batches were begun, and so many requests wait for the next one.
    async fn has(&self, begun: usize, waiting: usize) {
        let found = || {
            let begun = self.backend.begun.load(Ordering::Relaxed);
            (begun, self.arm.fleet().pending_count())
        };
        for _ in 0..TURNS_MAX {
            if found() == (begun, waiting) {
                return;
            }
            tokio::task::yield_now().await;
        }
        panic!("{:?}, not {:?}", found(), (begun, waiting));
    }
}

#[tokio::test(start_paused = true)]
async fn what_may_wait_is_refused_while_others_do_and_taken_afterwards() {
    let served = Served::up();
    let mut asked = vec![served.ask(false)];
    served.has(1, 0).await;
    // Others wait, but not many.
    asked.extend((1..LOW_PRIORITY_QUEUED_MAX).map(|_| served.ask(false)));
    served.has(1, LOW_PRIORITY_QUEUED_MAX - 1).await;
    asked.push(served.ask(true));
    served.has(1, LOW_PRIORITY_QUEUED_MAX).await;

    let refused = served.ask(true).await.unwrap().unwrap_err();
    let limit = LOW_PRIORITY_QUEUED_MAX as u64;
    let queued = limit;
    assert_eq!(refused, OipError::Overloaded { queued, limit });
    assert_eq!(refused.status(), 503);
    served.has(1, LOW_PRIORITY_QUEUED_MAX).await;
    // Nobody else is refused for that.
    asked.push(served.ask(false));
    served.has(1, LOW_PRIORITY_QUEUED_MAX + 1).await;

    served.backend.permits.add_permits(100);
    for asked in asked {
        asked.await.unwrap().unwrap();
    }
    let taken = served.ask(true).await.unwrap().unwrap();
    assert_eq!(taken.model_version, "1");
}

#[tokio::test(start_paused = true)]
async fn more_may_wait_where_more_replicas_answer() {
    let served = Served::up();
    let (_, second) = served.arm.fleet().resize(2).remove(0);
    second.open(served.backend.clone());
    let limit = 2 * LOW_PRIORITY_QUEUED_MAX;
    // Each computes one.
    let mut asked = vec![served.ask(false)];
    served.has(1, 0).await;
    asked.push(served.ask(false));
    served.has(2, 0).await;
    asked.extend((1..limit).map(|_| served.ask(false)));
    served.has(2, limit - 1).await;
    asked.push(served.ask(true));
    served.has(2, limit).await;
    let refused = served.ask(true).await.unwrap().unwrap_err();
    let (queued, limit) = (limit as u64, limit as u64);
    assert_eq!(refused, OipError::Overloaded { queued, limit });
    served.backend.permits.add_permits(100);
    for asked in asked {
        asked.await.unwrap().unwrap();
    }
}
