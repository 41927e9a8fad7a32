//! One endpoint's router, wherever it is.
//!
//! Invariants:
//! 1. A request is handed on as an ordinary call: over mutual TLS, with its deadline, and cancelled when its caller goes
//!    away.
//! 2. At most [`IN_FLIGHT_MAX`] requests of an endpoint are under way here; one more is refused at once, which is counted as its
//!    router counts what it refuses itself.
//! 3. A request that was lost with the router is sent once more, within a budget: inference changes nothing, so twice
//!    is harmless.
//! 4. Where the router is not found a request waits for it, five seconds at the most.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use mobula::metrics::counter;
use mobula::{ActorRef, CallFailure, Cluster, FallibleCall};
use mobula_core::error::CallError;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::serving::about::{TIMEOUT, time_limit};
use crate::serving::asynchronous::Fetched;
use crate::serving::controller::router_name;
use crate::serving::fleet::{DEADLINE_MAX, REQUEST_TIMEOUT, WAKE_TIMEOUT};
use crate::serving::guard::traffic::{Counts, Traffic};
use crate::serving::oip::{
    InferRequest, InferResponse, ModelMetadata, OipError, Parameter, RepositoryEntry,
};
use crate::serving::router::{Described, Router, RouterCalls};
use crate::serving::statistics::ModelStatistics;

/// Requests of one endpoint that are under way at one ingress: as many as a router's mailbox holds.
pub const IN_FLIGHT_MAX: usize = 1024;

/// How long a request waits for a router that is not found: one that is started again is there within a second.
const ROUTER_WAIT: Duration = Duration::from_secs(5);

/// How long one question to a router may take: it only looks at its own memory.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause between two looks for a router.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// How long a request may take that does not say: what its router allows it, and a little for the way.
const CALL_TIMEOUT: Duration = WAKE_TIMEOUT
    .saturating_add(REQUEST_TIMEOUT)
    .saturating_add(Duration::from_secs(1));

/// A router that has answered.
struct Known {
    router: ActorRef<Router>,
    metadata: Arc<ModelMetadata>,
    body_bytes_max: usize,
}

/// The way to one endpoint's router.
pub struct RouterLink {
    cluster: Cluster,
    endpoint: String,
    known: RwLock<Option<Arc<Known>>>,
    /// Held by whoever looks for the router, for all that wait for it.
    looking: tokio::sync::Mutex<()>,
    in_flight: Semaphore,
    /// What was refused here, and sent once more.
    traffic: Traffic,
}

/// Why a router gave no answer.
enum Failure {
    /// It said so.
    Refused(OipError),
    /// It was lost, or is not there.
    Lost(String),
    /// There was no time left.
    Late,
}

impl RouterLink {
    /// The way to the router of `endpoint`, which is looked for when it is first needed.
    #[must_use]
    pub fn new(cluster: Cluster, endpoint: &str) -> Self {
        RouterLink {
            cluster,
            endpoint: endpoint.to_owned(),
            known: RwLock::default(),
            looking: tokio::sync::Mutex::default(),
            in_flight: Semaphore::new(IN_FLIGHT_MAX),
            traffic: Traffic::default(),
        }
    }

    /// What requests must fit.
    pub async fn metadata(&self) -> Result<Arc<ModelMetadata>, OipError> {
        let known = self.router(Instant::now() + ROUTER_WAIT).await?;
        Ok(Arc::clone(&known.metadata))
    }

    /// Bytes of a request's body, as far as the router has said.
    #[must_use]
    pub fn body_bytes_max(&self) -> Option<usize> {
        self.last_known().map(|known| known.body_bytes_max)
    }

    /// What was refused here, and sent once more.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.traffic.counts()
    }

    /// Describes the endpoint, or one of its versions, as it is now.
    pub async fn describe(&self, version: Option<&str>) -> Result<ModelMetadata, OipError> {
        let version = version.map(str::to_owned);
        let described = self.ask(|router| RouterCalls::describe(router, version));
        described.await.map(|described| described.metadata)
    }

    /// Succeeds when it can answer.
    pub async fn ready(&self, version: Option<&str>) -> Result<(), OipError> {
        let version = version.map(str::to_owned);
        self.ask(|router| RouterCalls::ready(router, version)).await
    }

    /// What a version has answered.
    pub async fn statistics(
        &self,
        version: Option<&str>,
    ) -> Result<(String, ModelStatistics), OipError> {
        let version = version.map(str::to_owned);
        self.ask(|router| RouterCalls::statistics(router, version))
            .await
    }

    /// Its versions.
    pub async fn index(&self) -> Result<Vec<RepositoryEntry>, OipError> {
        self.ask(|router| router.index()).await
    }

    /// Has the router answer a request whose caller comes back for the answer.
    pub async fn submit(
        &self,
        version: Option<&str>,
        request: InferRequest,
    ) -> Result<String, OipError> {
        let version = version.map(str::to_owned);
        self.ask(|router| RouterCalls::submit(router, version, request))
            .await
    }

    /// The answer to such a request; `None` as long as it is under way.
    pub async fn fetch(&self, id: &str) -> Result<Option<Fetched>, OipError> {
        self.ask(|router| RouterCalls::fetch(router, id.to_owned()))
            .await
    }

    /// Has the router answer a request.
    pub async fn infer(
        &self,
        version: Option<&str>,
        mut request: InferRequest,
    ) -> Result<InferResponse, OipError> {
        let _counted = self.in_flight.try_acquire().map_err(|_| self.refuse())?;
        self.traffic.earn_retry();
        let limit = time_limit(&request)?.map(|limit| limit.min(DEADLINE_MAX));
        let until = Instant::now() + limit.unwrap_or(CALL_TIMEOUT);
        let mut is_second = false;
        loop {
            let known = self.router(until.min(Instant::now() + ROUTER_WAIT)).await?;
            if limit.is_some() {
                // What the router may take is what is left, and never nothing: zero would be for ever.
                let left = until.saturating_duration_since(Instant::now()).as_micros();
                let left = i64::try_from(left).unwrap_or(i64::MAX).max(1);
                request
                    .parameters
                    .insert(TIMEOUT.to_owned(), Parameter::Int(left));
            }
            let call =
                RouterCalls::answer(&known.router, version.map(str::to_owned), request.clone());
            let left = until.saturating_duration_since(Instant::now());
            // It is cancelled when nobody waits for the answer any more.
            let answered = call.timeout(left).cancel_on_drop().await;
            let reason = match answered.map_err(Failure::from) {
                Ok(response) => return Ok(response),
                // What the router allowed it is not what the request did.
                Err(Failure::Refused(OipError::DeadlineExceeded { .. }) | Failure::Late) => {
                    return Err(late(limit));
                }
                Err(Failure::Refused(error)) => return Err(error),
                Err(Failure::Lost(reason)) => reason,
            };
            self.forget(&known);
            if is_second || !self.traffic.may_retry() {
                return Err(OipError::ReplicaLost { reason });
            }
            tracing::debug!(
                endpoint = self.endpoint,
                reason,
                "a request is sent once more"
            );
            is_second = true;
        }
    }

    /// Counts a request for which there is no place here.
    fn refuse(&self) -> OipError {
        self.traffic.count(|counts| counts.shed += 1);
        let labels = [("endpoint", &*self.endpoint), ("reason", "queue")];
        match counter("mobula_serving_requests_refused", &labels) {
            Ok(refused) => refused.increment(),
            Err(error) => tracing::debug!(%error, "a refusal is not shown in the metrics"),
        }
        OipError::Overloaded {
            queued: IN_FLIGHT_MAX as u64,
            limit: IN_FLIGHT_MAX as u64,
        }
    }

    /// Asks the router something that changes nothing.
    async fn ask<T: DeserializeOwned + Send + 'static>(
        &self,
        question: impl FnOnce(&ActorRef<Router>) -> FallibleCall<T, OipError>,
    ) -> Result<T, OipError> {
        let known = self.router(Instant::now() + ROUTER_WAIT).await?;
        let asked = question(&known.router).timeout(QUESTION_TIMEOUT);
        match asked.await.map_err(Failure::from) {
            Ok(answer) => Ok(answer),
            Err(Failure::Refused(error)) => Err(error),
            Err(Failure::Late) => Err(self.away("it is late with its answer")),
            Err(Failure::Lost(reason)) => {
                self.forget(&known);
                Err(self.away(&reason))
            }
        }
    }

    fn last_known(&self) -> Option<Arc<Known>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.clone()
    }

    /// Has the next request look for the router again: it may be another one, or elsewhere.
    fn forget(&self, lost: &Arc<Known>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_some_and(|known| Arc::ptr_eq(known, lost)) {
            *known = None;
        }
    }

    /// The router, if it is found in time.
    async fn router(&self, until: Instant) -> Result<Arc<Known>, OipError> {
        if let Some(known) = self.last_known() {
            return Ok(known);
        }
        let mut reason = "it is looked for".to_owned();
        let found = tokio::time::timeout_at(until, async {
            let _alone = self.looking.lock().await;
            loop {
                if let Some(known) = self.last_known() {
                    return known;
                }
                match self.look().await {
                    Ok(known) => {
                        let known = Arc::new(known);
                        let mut place = self.known.write().unwrap_or_else(PoisonError::into_inner);
                        *place = Some(Arc::clone(&known));
                        return known;
                    }
                    Err(error) => reason = error,
                }
                tokio::time::sleep(LOOK_PAUSE).await;
            }
        });
        let found = found.await;
        found.map_err(|_| self.away(&reason))
    }

    async fn look(&self) -> Result<Known, String> {
        let name = router_name(&self.endpoint);
        let found = self.cluster.get_actor::<Router>(&name).await;
        let router = found.map_err(|error| error.to_string())?;
        let described = RouterCalls::describe(&router, None)
            .timeout(QUESTION_TIMEOUT)
            .await;
        let Described {
            metadata,
            body_bytes_max,
        } = described.map_err(|failure| match failure {
            CallFailure::User(error) => error.to_string(),
            CallFailure::System(error) => error.to_string(),
        })?;
        Ok(Known {
            router,
            metadata: Arc::new(metadata),
            body_bytes_max: usize::try_from(body_bytes_max).unwrap_or(usize::MAX),
        })
    }

    fn away(&self, reason: &str) -> OipError {
        OipError::NotReady {
            model: self.endpoint.clone(),
            reason: format!("its router does not answer: {reason}"),
        }
    }
}

impl From<CallFailure<OipError>> for Failure {
    fn from(failure: CallFailure<OipError>) -> Self {
        match failure {
            // It leaves its node, or has not found out yet what it answers with.
            CallFailure::User(
                error @ (OipError::ShuttingDown | OipError::ServerNotReady { .. }),
            ) => Failure::Lost(error.to_string()),
            CallFailure::User(error) => Failure::Refused(error),
            CallFailure::System(error) => failure_of(error),
        }
    }
}

fn failure_of(error: mobula::Error) -> Failure {
    match error {
        mobula::Error::Call(CallError::Overloaded { capacity, .. }) => {
            Failure::Refused(OipError::Overloaded {
                queued: u64::from(capacity),
                limit: u64::from(capacity),
            })
        }
        mobula::Error::Call(CallError::DeadlineExceeded { .. }) => Failure::Late,
        error @ (mobula::Error::Encoding { .. } | mobula::Error::Call(CallError::BadCall(_))) => {
            Failure::Refused(OipError::Failed {
                reason: error.to_string(),
            })
        }
        error => Failure::Lost(error.to_string()),
    }
}

fn late(limit: Option<Duration>) -> OipError {
    let millis = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    match limit {
        Some(limit) => OipError::DeadlineExceeded {
            limit_ms: millis(limit),
        },
        None => OipError::ReplicaLost {
            reason: format!("no answer within {} ms", millis(CALL_TIMEOUT)),
        },
    }
}
