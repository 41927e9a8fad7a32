use std::collections::BTreeSet;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::codegen::Service;

use super::super::Berth;
use super::*;
use crate::serving::arm::{Arm, Origin, Routes};
use crate::serving::auth::BearerAuth;
use crate::serving::endpoint_service::EndpointService;
use crate::serving::feed::feed;
use crate::serving::fleet::{BackendFailure, Terms};
use crate::serving::grpc::fixture::{row_for_digits, with_token};
use crate::serving::grpc::oip_routes;
use crate::serving::grpc::proto::ModelInferRequest;
use crate::serving::grpc::proto::grpc_inference_service_client::GrpcInferenceServiceClient;
use crate::serving::guard::traffic::Traffic;
use crate::serving::replica::{Inference, classified};
use crate::serving::replica_settings::Batching;
use crate::serving::rows::Batch;
use crate::serving::shadow::mirror::mirror;
use crate::serving::signature::{BODY_LIMITS_MAX, INPUT, Signature};

const BEARER: &str = "Bearer secret";

/// Answers every row, and counts the batches.
#[derive(Clone, Default)]
struct Counting(Arc<AtomicUsize>);

impl Backend for Counting {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let count = rows.rows.map_or(1, |rows| rows as usize);
        Ok(Inference {
            outputs: classified(vec![0.5; count * 2], vec![1; count]),
            computed_ns: 1,
            memory_percent: None,
            energies: Vec::new(),
        })
    }
}

/// A fleet of so many replicas, and what each has computed.
fn fleet(count: u32, batching: Batching) -> (Fleet<Counting>, Vec<Counting>) {
    let fleet = Fleet::sharing(count, batching, Arc::new(Traffic::default()));
    let backends: Vec<Counting> = (0..count).map(|_| Counting::default()).collect();
    for ((_, berth), backend) in fleet.berths().zip(&backends) {
        berth.open(backend.clone());
    }
    (fleet, backends)
}

fn rows() -> Vec<Row> {
    vec![Row::numbers(vec![0.5, 0.5], BATCH_ROWS_MAX)]
}

fn preferred_of(fleet: &Fleet<Counting>, key: &str) -> Option<u32> {
    let deadline = Deadline::of(Duration::from_secs(1));
    let preferred = fleet.preferred(Affinity::of(key), &rows(), &deadline);
    preferred.map(|replica| replica.number)
}

fn berth(fleet: &Fleet<Counting>, number: u32) -> Arc<Berth<Counting>> {
    let mut berths = fleet.berths();
    berths.find(|(known, _)| *known == number).unwrap().1
}

/// The replica that each of many keys prefers.
fn all_preferred(fleet: &Fleet<Counting>) -> Vec<u32> {
    let keys = (0..1_000).map(|number| format!("session-{number}"));
    keys.map(|key| preferred_of(fleet, &key).unwrap()).collect()
}

#[tokio::test]
async fn keys_spread_over_the_replicas_and_stay_with_theirs() {
    let (fleet, _) = fleet(5, Batching::default());
    let before = all_preferred(&fleet);
    assert_eq!(all_preferred(&fleet), before);
    for number in 1..=5 {
        let count = before.iter().filter(|known| **known == number).count();
        // Seven standard deviations of a binomial count around 200.
        assert!(count.abs_diff(200) < 90, "{number}: {count}");
    }
}

#[tokio::test]
async fn only_the_keys_of_a_replica_that_goes_move_and_they_return_with_it() {
    let (fleet, backends) = fleet(5, Batching::default());
    let before = all_preferred(&fleet);
    berth(&fleet, 2).close();
    let without = all_preferred(&fleet);
    let mut heirs = BTreeSet::new();
    for (before, now) in before.iter().zip(&without) {
        if *before == 2 {
            heirs.insert(*now);
        } else {
            assert_eq!(now, before);
        }
    }
    // They are no burden to a single one.
    assert_eq!(heirs, BTreeSet::from([1, 3, 4, 5]));
    berth(&fleet, 2).open(backends[1].clone());
    assert_eq!(all_preferred(&fleet), before);
    // One more takes its share, and from all.
    let (number, added) = fleet.resize(6).remove(0);
    added.open(Counting::default());
    for (before, now) in before.iter().zip(all_preferred(&fleet)) {
        assert!(now == *before || now == number);
    }
}

#[tokio::test]
async fn a_replica_with_clearly_more_to_do_is_passed_over() {
    let (fleet, _) = fleet(4, Batching::default());
    let number = preferred_of(&fleet, "a").unwrap();
    let lanes = fleet.lanes();
    let set = |rows: usize, others: usize| {
        for lane in &lanes {
            let rows = if lane.number == number { rows } else { others };
            lane.rows_in_flight.store(rows, Ordering::Relaxed);
        }
    };
    // The average is a quarter of it: 11/16 of it are a batch.
    let most = BATCH_ROWS_MAX * 16 / 11;
    set(most, 0);
    assert_eq!(preferred_of(&fleet, "a"), Some(number));
    set(most + 1, 0);
    assert_eq!(preferred_of(&fleet, "a"), None);
    // Where all are busy alike it is none of the busier ones.
    set(1_000, 1_000);
    assert_eq!(preferred_of(&fleet, "a"), Some(number));
}

#[tokio::test]
async fn a_replica_that_would_be_late_is_passed_over() {
    let (fleet, _) = fleet(2, Batching::default());
    let number = preferred_of(&fleet, "a").unwrap();
    let lanes = fleet.lanes();
    let lane = lanes.iter().find(|lane| lane.number == number).unwrap();
    lane.rows_in_flight.store(1, Ordering::Relaxed);
    lane.set_batch_time(Duration::from_millis(400));
    assert_eq!(preferred_of(&fleet, "a"), Some(number));
    lane.set_batch_time(Duration::from_millis(600));
    assert_eq!(preferred_of(&fleet, "a"), None);
}

/// Begins a batch and never ends it.
#[derive(Clone)]
struct Hangs;

impl Backend for Hangs {
    async fn infer(&self, _rows: Batch) -> Result<Inference, BackendFailure> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_overflows_to_the_other_replicas() {
    let batching = Batching {
        queued_requests_max: 2,
        ..Batching::default()
    };
    let fleet = Fleet::sharing(2, batching, Arc::new(Traffic::default()));
    for (_, berth) in fleet.berths() {
        berth.open(Hangs);
    }
    let affinity = Affinity::of("a");
    let preferred = |rows: &[Row]| {
        let deadline = Deadline::of(Duration::from_secs(1));
        let preferred = fleet.preferred(affinity, rows, &deadline);
        preferred.map(|replica| replica.number)
    };
    let number = preferred(&rows()).unwrap();
    let terms = Terms {
        limit: None,
        affinity: Some(affinity),
    };
    let mut asked: Vec<_> = (0..20)
        .map(|_| Box::pin(fleet.infer_on("digits", rows(), terms)))
        .collect();
    let mut queued = BTreeSet::new();
    for asked in &mut asked {
        assert!(futures::poll!(asked).is_pending());
        // What has come last is in its queue, or its batch begins.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        queued.insert(preferred(&rows()));
        if fleet.lanes().iter().all(|lane| lane.queued() == 2) {
            break;
        }
    }
    // It was preferred until it had no room, and the other one has got what came then.
    assert_eq!(queued, BTreeSet::from([None, Some(number)]));
    assert!(fleet.lanes().iter().all(|lane| lane.queued() == 2));
}

/// A request to the endpoint, as HTTP's callers send it.
fn posted(key: Option<&str>) -> Request<Body> {
    let mut request = Request::post("/v2/models/digits/infer").header("authorization", BEARER);
    if let Some(key) = key {
        request = request.header("X-Mobula-Affinity", key);
    }
    let input = json!({"name": INPUT, "datatype": "FP32", "shape": [1, 2], "data": [0.5, 0.5]});
    let body = json!({ "inputs": [input] });
    request.body(Body::from(body.to_string())).unwrap()
}

/// The same, as gRPC's callers send it.
fn called(key: &str) -> tonic::Request<ModelInferRequest> {
    let mut request = with_token(row_for_digits());
    let metadata = request.metadata_mut();
    metadata.insert(AFFINITY, key.parse().unwrap());
    request
}

#[tokio::test]
async fn the_header_keeps_requests_with_one_replica_by_either_protocol() {
    let (fleet, backends) = fleet(4, Batching::default());
    let number = preferred_of(&fleet, "ann").unwrap();
    let (_, origin) = watch::channel(Origin::default());
    let (active, _) = Arm::new(1, origin, fleet, feed().0, JoinSet::new());
    let routes = Routes {
        active: Arc::new(active),
        tried: None,
        compared: None,
        shadowed: None,
    };
    let (_, routes) = watch::channel(Arc::new(routes));
    let signature = Signature::classifier(2, 2, Vec::new());
    let service = EndpointService::new("digits", signature, routes, mirror().0).shared();
    let gate = BearerAuth::with_token("secret");
    let mut http = oip_routes(service, gate, BODY_LIMITS_MAX);
    let mut grpc = GrpcInferenceServiceClient::new(http.clone());
    let computed = || -> Vec<usize> {
        let counts = backends.iter().map(|backend| &backend.0);
        counts.map(|count| count.load(Ordering::Relaxed)).collect()
    };

    for _ in 0..20 {
        let answer = http.call(posted(Some("ann"))).await.unwrap();
        assert_eq!(answer.status(), 200);
        grpc.model_infer(called("ann")).await.unwrap();
    }
    let mut expected = vec![0; 4];
    expected[number as usize - 1] = 40;
    assert_eq!(computed(), expected);

    // Who says nothing is answered by any of them, and an empty key is none.
    for key in [None, Some("")] {
        for _ in 0..20 {
            let answer = http.call(posted(key)).await.unwrap();
            assert_eq!(answer.status(), 200);
        }
    }
    let others = computed().iter().filter(|count| **count > 0).count();
    assert!(others > 1, "{:?}", computed());
}
