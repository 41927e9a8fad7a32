//! Has the nodes of a graph answer a request.
//!
//! Invariants:
//! 1. A node begins when what it waits for is settled, beside all others of which that is so.
//! 2. All nodes share the request's deadline: each may take what is left of it. A request that has none ends all the same,
//!    after what waking from zero and one answer take; each of its nodes has what its endpoint allows by itself.
//! 3. The first error ends the request and names its node; what runs then is cancelled.
//! 4. A node whose condition does not hold is skipped, and so is one of which an input has no source that has run.
//! 5. An answer that is asked where it comes from says so of each node: its version, digest and signers. The nodes' endpoints are
//!    asked the same for that, and otherwise not.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use mobula::metrics::{Counter, counter};
use tokio::time::Instant;

use super::condition::Operand;
use super::metadata::{EndpointMetadata, GRAPH_VERSION, derive};
use super::spec::{GraphSpec, Node, Source, Wire};
use crate::serving::about::{TIMEOUT, time_limit};
use crate::serving::access::keyring::now_ms;
use crate::serving::arm::Origin;
use crate::serving::fleet::{DEADLINE_MAX, REQUEST_TIMEOUT, WAKE_TIMEOUT};
use crate::serving::http::ServiceFuture;
use crate::serving::oip::{
    Explanation, InferRequest, InferResponse, ModelMetadata, OipError, Parameter, Tensor,
};
use crate::serving::statistics::{FailureReason, ModelStatistics, RequestTimes};

/// How long a request may take that does not say: as long as one to an endpoint, whose waiting for a first replica counts apart
/// from its answer. Which of the two a node is at, nobody says here.
const WHOLE_TIMEOUT: Duration = WAKE_TIMEOUT.saturating_add(REQUEST_TIMEOUT);

/// What answers for the nodes.
pub trait Endpoints: Send + Sync {
    /// What requests to an endpoint must fit.
    fn metadata<'a>(&'a self, endpoint: &'a str) -> ServiceFuture<'a, Arc<ModelMetadata>>;

    /// Has an endpoint answer.
    fn infer<'a>(
        &'a self,
        endpoint: &'a str,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse>;
}

/// A graph that answers.
pub struct GraphModel {
    name: String,
    spec: GraphSpec,
    statistics: Mutex<ModelStatistics>,
    meters: Option<Meters>,
}

/// How long executions took, as a sum in seconds and their number: the mean of any time is a quotient of two differences.
struct Meters {
    seconds: Counter,
    count: Counter,
}

impl Meters {
    /// Those of a graph; none where the process has no room for them.
    fn of(graph: &str) -> Option<Self> {
        let made = |name| {
            counter(name, &[("graph", graph)])
                .inspect_err(|error| tracing::warn!(%error, "a figure of a graph is not shown"))
                .ok()
        };
        Some(Meters {
            seconds: made("ml_pipeline_executions_duration_seconds")?,
            count: made("ml_pipeline_executions")?,
        })
    }

    fn add(&self, taken: Duration) {
        self.seconds.add(taken.as_secs_f64());
        self.count.increment();
    }
}

/// When a request must be answered.
#[derive(Clone, Copy)]
struct Deadline {
    at: Instant,
    limit: Duration,
    /// Whether the request says so itself.
    is_given: bool,
}

impl Deadline {
    /// That of a request which begins now.
    fn of(request: &InferRequest) -> Result<Self, OipError> {
        let given = time_limit(request)?.map(|limit| limit.min(DEADLINE_MAX));
        let limit = given.unwrap_or(WHOLE_TIMEOUT);
        Ok(Deadline {
            at: Instant::now() + limit,
            limit,
            is_given: given.is_some(),
        })
    }

    /// What is left of it; `None` where nothing is.
    fn left(&self) -> Option<Duration> {
        let left = self.at.saturating_duration_since(Instant::now());
        // In microseconds zero would be for ever.
        (left.as_micros() > 0).then_some(left)
    }
}

/// What became of a node.
enum Settled {
    Ran {
        outputs: Vec<Tensor>,
        version: String,
        /// As far as its endpoint was asked and knows.
        origin: Origin,
        taken: Duration,
    },
    Skipped,
}

impl GraphModel {
    /// The graph of this name.
    #[must_use]
    pub fn new(name: &str, spec: GraphSpec) -> Self {
        GraphModel {
            name: name.to_owned(),
            spec,
            statistics: Mutex::default(),
            meters: Meters::of(name),
        }
    }

    /// What it is made of.
    #[must_use]
    pub fn spec(&self) -> &GraphSpec {
        &self.spec
    }

    /// What it has answered here.
    #[must_use]
    pub fn statistics(&self) -> ModelStatistics {
        // Counters are whole after every single update, so a panic elsewhere does not spoil them.
        let statistics = self.statistics.lock();
        statistics.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What it takes and gives.
    pub async fn metadata(&self, endpoints: &dyn Endpoints) -> Result<ModelMetadata, OipError> {
        let mut known = EndpointMetadata::new();
        for node in &self.spec.nodes {
            if !known.contains_key(&node.endpoint) {
                let metadata = endpoints.metadata(&node.endpoint).await;
                let metadata = metadata.map_err(|error| self.error_of(node, error))?;
                known.insert(node.endpoint.clone(), metadata);
            }
        }
        derive(&self.name, &self.spec, &known)
    }

    /// Answers a request.
    pub async fn infer(
        &self,
        endpoints: &dyn Endpoints,
        request: InferRequest,
    ) -> Result<InferResponse, OipError> {
        let began = Instant::now();
        let rows = request
            .inputs
            .first()
            .and_then(|input| input.shape().first().copied());
        let answered = self.run(endpoints, &request).await;
        if let Some(meters) = &self.meters {
            meters.add(began.elapsed());
        }
        let mut statistics = self
            .statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &answered {
            Ok(_) => {
                let times = RequestTimes {
                    queue: Duration::ZERO,
                    compute_input: Duration::ZERO,
                    compute_infer: began.elapsed(),
                    compute_output: Duration::ZERO,
                };
                let rows = rows.unwrap_or(1);
                statistics.record_success(rows, times, now_ms());
                statistics.record_execution(rows, times);
            }
            Err(error) => statistics.record_failure(began.elapsed(), FailureReason::of(error)),
        }
        drop(statistics);
        answered
    }

    async fn run(
        &self,
        endpoints: &dyn Endpoints,
        request: &InferRequest,
    ) -> Result<InferResponse, OipError> {
        let began = Instant::now();
        let deadline = Deadline::of(request)?;
        let mut settled: BTreeMap<&str, Settled> = BTreeMap::new();
        let mut waiting: Vec<&Node> = self.spec.nodes.iter().collect();
        let mut running = FuturesUnordered::new();
        loop {
            // In the order of the spec, so that one pass sees all that follows from a skipped node.
            let mut still_waiting = Vec::new();
            for node in waiting {
                let is_due = node
                    .waits_for()
                    .iter()
                    .all(|name| settled.contains_key(name));
                if !is_due {
                    still_waiting.push(node);
                    continue;
                }
                let lookup = Lookup {
                    request,
                    settled: &settled,
                };
                let Some(inputs) = lookup.inputs_of(node) else {
                    settled.insert(&node.name, Settled::Skipped);
                    continue;
                };
                let Some(left) = deadline.left() else {
                    return Err(self.late(&settled, &deadline));
                };
                let asked = ask(request, inputs, deadline.is_given.then_some(left));
                running.push(async move {
                    let began = Instant::now();
                    let answered = endpoints.infer(&node.endpoint, asked).await;
                    (node, answered, began.elapsed())
                });
            }
            waiting = still_waiting;
            let next = tokio::time::timeout_at(deadline.at, running.next()).await;
            let (node, answered, taken) = match next {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(_) => return Err(self.late(&settled, &deadline)),
            };
            let answered = match answered {
                Ok(answered) => answered,
                // It had what was left, so that all of it has passed.
                Err(OipError::DeadlineExceeded { .. }) => {
                    return Err(self.late(&settled, &deadline));
                }
                Err(error) => return Err(self.error_of(node, error)),
            };
            let explained = answered.explanation.unwrap_or_default();
            let ran = Settled::Ran {
                outputs: answered.outputs,
                version: answered.model_version,
                origin: Origin {
                    digest: explained.digest,
                    signers: explained.signers,
                },
                taken,
            };
            settled.insert(&node.name, ran);
        }
        drop(running);
        self.response(request, &settled, began.elapsed())
    }

    fn response(
        &self,
        request: &InferRequest,
        settled: &BTreeMap<&str, Settled>,
        taken: Duration,
    ) -> Result<InferResponse, OipError> {
        let lookup = Lookup { request, settled };
        // One of which no source has run is left out; who asked for it by name is told so.
        let outputs = self
            .spec
            .outputs
            .iter()
            .filter_map(|wire| lookup.wire(wire));
        let explanation = request.explain.then(|| Explanation {
            compute: taken,
            nodes: self
                .spec
                .nodes
                .iter()
                .map(|node| said(node, settled))
                .collect(),
            ..Explanation::default()
        });
        Ok(InferResponse {
            model_name: self.name.clone(),
            model_version: GRAPH_VERSION.to_owned(),
            outputs: outputs.collect(),
            explanation,
            ..InferResponse::default()
        })
    }

    /// The error of a request whose time has passed.
    fn late(&self, settled: &BTreeMap<&str, Settled>, deadline: &Deadline) -> OipError {
        let nodes = self.spec.nodes.iter();
        let late = nodes.filter(|node| !settled.contains_key(node.name.as_str()));
        OipError::NodesLate {
            graph: self.name.clone(),
            nodes: late.map(|node| node.name.clone()).collect(),
            limit_ms: u64::try_from(deadline.limit.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// An error of a node, with its name.
    #[must_use]
    pub fn error_of(&self, node: &Node, error: OipError) -> OipError {
        OipError::Node {
            graph: self.name.clone(),
            node: node.name.clone(),
            error: Box::new(error),
        }
    }
}

/// A node in an explanation. Several are joined by commas, so that none has any in it.
fn said(node: &Node, settled: &BTreeMap<&str, Settled>) -> String {
    let Some(Settled::Ran {
        version,
        origin: Origin { digest, signers },
        taken,
        ..
    }) = settled.get(node.name.as_str())
    else {
        return format!("{}=skipped", node.name);
    };
    let mut from = format!("version {version}");
    if let Some(digest) = digest {
        from += &format!("; digest {digest}");
    }
    if !signers.is_empty() {
        from += &format!("; signed by {}", signers.join(" and "));
    }
    format!("{}={} ({from})", node.name, taken.as_micros())
}

/// The request to a node, which may take so long, or as long as its endpoint allows one that does not say.
fn ask(request: &InferRequest, inputs: Vec<Tensor>, left: Option<Duration>) -> InferRequest {
    let mut parameters = request.parameters.clone();
    if let Some(left) = left {
        let left = Parameter::Int(i64::try_from(left.as_micros()).unwrap_or(i64::MAX));
        parameters.insert(TIMEOUT.to_owned(), left);
    }
    InferRequest {
        id: request.id.clone(),
        parameters,
        inputs,
        routing_key: request.routing_key.clone(),
        explain: request.explain,
        headers: request.headers.clone(),
        low_priority: request.low_priority,
        ..InferRequest::default()
    }
}

/// Finds tensors.
struct Lookup<'a> {
    request: &'a InferRequest,
    settled: &'a BTreeMap<&'a str, Settled>,
}

impl Lookup<'_> {
    fn source(&self, source: &Source) -> Option<&Tensor> {
        match source {
            Source::Request { input } => self.request.input(input),
            Source::Node { node, output } => match self.settled.get(node.as_str())? {
                Settled::Ran { outputs, .. } => outputs.iter().find(|o| o.name() == output),
                Settled::Skipped => None,
            },
        }
    }

    /// The first source of a wire that is there, under the wire's name.
    fn wire(&self, wire: &Wire) -> Option<Tensor> {
        let tensor = wire.sources.iter().find_map(|source| self.source(source))?;
        let (shape, data) = (tensor.shape().to_vec(), tensor.data().clone());
        Some(Tensor::new(&wire.name, shape, data).expect("it had this shape before"))
    }

    /// The inputs of a node that runs; `None` for one that is skipped.
    fn inputs_of(&self, node: &Node) -> Option<Vec<Tensor>> {
        if let Some(condition) = &node.when {
            let holds = match &condition.operand {
                Operand::Parameter(name) => condition.holds_of(name, &self.request.parameters),
                Operand::Tensor(source) => self
                    .source(source)
                    .is_some_and(|tensor| condition.holds_for(tensor.data())),
            };
            if !holds {
                return None;
            }
        }
        node.inputs.iter().map(|wire| self.wire(wire)).collect()
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
