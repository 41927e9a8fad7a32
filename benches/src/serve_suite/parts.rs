//! Where the time of a request goes: in the router alone, and in an endpoint of processes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mobula_actors::serving::arm::{Arm, Origin, Routes};
use mobula_actors::serving::endpoint_service::EndpointService;
use mobula_actors::serving::feed::feed;
use mobula_actors::serving::fleet::{Backend, BackendFailure, Fleet};
use mobula_actors::serving::http::InferenceService;
use mobula_actors::serving::oip::{InferRequest, Tensor, TensorData};
use mobula_actors::serving::replica::{Inference, classified};
use mobula_actors::serving::rows::Batch;
use mobula_actors::serving::shadow::mirror::mirror;
use mobula_actors::serving::signature::{INPUT, Signature};
use mobula_benches::results::Results;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::Outcome;
use crate::load::Connection;
use crate::target::Target;

/// Values of a row of the model without a computation.
const WIDTH: usize = 16;

/// What an answer says about its time, by part.
const TIMES: &str = "x-mobula-times-us";

/// A replica in this process that computes nothing.
#[derive(Clone)]
struct Nothing;

impl Backend for Nothing {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        let probabilities: Vec<f32> = rows
            .cells
            .into_iter()
            .flat_map(|cell| match cell.data {
                TensorData::Fp32(values) => values,
                _ => Vec::new(),
            })
            .collect();
        let classes = vec![0; probabilities.len() / WIDTH];
        Ok(Inference {
            outputs: classified(probabilities, classes),
            computed_ns: 0,
            memory_percent: None,
            energies: Vec::new(),
        })
    }
}

/// What the router and its batcher add, without sockets: one request at a time to a model that computes nothing.
pub(crate) async fn in_process(length: Duration, results: &mut Results) -> Outcome {
    let (feed, _reader) = feed();
    let (_learnt, origin) = watch::channel(Origin::default());
    let (arm, _gone) = Arm::new(1, origin, Fleet::new(1), feed, JoinSet::new());
    for (_, berth) in arm.fleet().berths() {
        berth.open(Nothing);
    }
    let routes = Routes {
        active: Arc::new(arm),
        tried: None,
        compared: None,
        shadowed: None,
    };
    let (_routes, receiver) = watch::channel(Arc::new(routes));
    let signature = Signature::classifier(WIDTH, WIDTH, Vec::new());
    let (mirror, _copies) = mirror();
    let service = EndpointService::new("nothing", signature, receiver, mirror);
    let input = Tensor::new(
        INPUT,
        vec![1, WIDTH as u64],
        TensorData::Fp32(vec![0.5; WIDTH]),
    )?;
    let request = InferRequest {
        inputs: vec![input],
        ..InferRequest::default()
    };
    let mut latencies = histogram()?;
    let start = Instant::now();
    while start.elapsed() < length {
        let began = Instant::now();
        service.infer("nothing", None, request.clone()).await?;
        latencies.saturating_record(u64::try_from(began.elapsed().as_nanos())?);
    }
    let per_second = latencies.len() as f64 / start.elapsed().as_secs_f64();
    let name = "in process: router and batcher, a model that computes nothing";
    results.rate(name, per_second, &latencies);
    Ok(())
}

/// What an endpoint's answers say about their time, one request at a time, and what is left of the caller's.
pub(crate) async fn of_an_endpoint(
    length: Duration,
    results: &mut Results,
    target: &Target,
) -> Outcome {
    let mut parts: BTreeMap<String, Histogram<u64>> = BTreeMap::new();
    let mut rest = histogram()?;
    let mut connection = Connection::open(target).await?;
    let start = Instant::now();
    while start.elapsed() < length {
        let began = Instant::now();
        let answer = connection.ask(&target.explained).await?;
        let whole_us = u64::try_from(began.elapsed().as_micros())?;
        let times = answer.header(TIMES).ok_or("an answer without its times")?;
        let mut told_us = 0;
        for part in times.split(", ") {
            let (name, microseconds) = part.split_once('=').ok_or("a part without a time")?;
            let microseconds: u64 = microseconds.parse()?;
            told_us += microseconds;
            if !parts.contains_key(name) {
                parts.insert(name.to_owned(), histogram()?);
            }
            let part = parts.get_mut(name).ok_or("the part that was just added")?;
            part.saturating_record(microseconds);
        }
        rest.saturating_record(whole_us.saturating_sub(told_us));
    }
    parts.insert("the rest: sockets, HTTP, token".to_owned(), rest);
    for (part, times) in &parts {
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let name = format!("digits, one caller, {part}, {name}");
            results.figure(&name, times.value_at_quantile(share) as f64, "µs");
        }
    }
    Ok(())
}

fn histogram() -> Outcome<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}
