//! An endpoint as the Open Inference Protocol sees it: a model, answered by the fleet of its active version
//! and, while one is tried, by that of a candidate. How one request is answered is in `answering`.
//!
//! Invariant: the endpoint's name is the model's name in every answer; the version is the one that answered.

mod answering;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use tokio::sync::watch;

use super::about::{repository_fixed, server_metadata};
use super::access::rates::TokenRates;
use super::access::rules::{Rule, headers_of};
use super::access::state::Access;
use super::arm::{Arm, Asker, Assigned, Routes};
use super::asynchronous::results::Results;
use super::auth::Caller;
use super::fleet::Backend;
use super::http::{InferenceService, RepositoryChange, ServiceFuture};
use super::oip::{
    InferRequest, InferResponse, ModelMetadata, ModelState, OipError, RepositoryEntry,
    ServerMetadata,
};
use super::shadow::mirror::Mirror;
use super::signature::Signature;
use super::statistics::ModelStatistics;

/// Answers the protocol for one endpoint.
pub struct EndpointService<B> {
    signature: Signature,
    /// Without its versions, which change.
    metadata: ModelMetadata,
    routes: watch::Receiver<Arc<Routes<B>>>,
    /// Counts requests without a key.
    keyless: AtomicU64,
    access: watch::Receiver<Arc<Access>>,
    rates: TokenRates,
    results: Results,
    /// Itself, once it is shared: requests whose callers do not wait keep it until they are answered.
    shared: Weak<Self>,
    mirror: Mirror<B>,
}

impl<B: Backend> EndpointService<B> {
    /// The service of the endpoint `name`. What goes to a shadowed candidate is offered to `mirror`.
    #[must_use]
    pub fn new(
        name: &str,
        signature: Signature,
        routes: watch::Receiver<Arc<Routes<B>>>,
        mirror: Mirror<B>,
    ) -> Self {
        EndpointService {
            metadata: signature.metadata(name),
            signature,
            routes,
            keyless: AtomicU64::new(0),
            access: watch::channel(Arc::default()).1,
            rates: TokenRates::default(),
            results: Results::default(),
            shared: Weak::new(),
            mirror,
        }
    }

    /// The same for several users, with which callers need not wait for their answers.
    #[must_use]
    pub fn shared(self) -> Arc<Self> {
        Arc::new_cyclic(|shared| EndpointService {
            shared: Weak::clone(shared),
            ..self
        })
    }

    /// The same with limits of tokens and with rules, which may change.
    #[must_use]
    pub fn with_access(self, access: watch::Receiver<Arc<Access>>) -> Self {
        EndpointService { access, ..self }
    }

    fn routes(&self) -> Arc<Routes<B>> {
        Arc::clone(&self.routes.borrow())
    }

    /// The arm that a question is about: that of the version it names, or the active one.
    fn arm(&self, model: &str, version: Option<&str>) -> Result<Arc<Arm<B>>, OipError> {
        if model != self.metadata.name {
            return Err(OipError::UnknownModel {
                model: model.to_owned(),
            });
        }
        let routes = self.routes();
        let Some(version) = version else {
            return Ok(Arc::clone(&routes.active));
        };
        let found = routes.arm(version).map(Arc::clone);
        found.ok_or_else(|| OipError::UnknownVersion {
            model: model.to_owned(),
            version: version.to_owned(),
            served: routes.versions(),
        })
    }

    fn ready(&self, arm: &Arm<B>) -> Result<(), OipError> {
        // One without replicas gets them with the first request, which must come for that.
        if arm.is_open() || arm.fleet().is_asleep() {
            return Ok(());
        }
        let reason = format!(
            "none of its {} replicas answers yet",
            arm.fleet().replica_count()
        );
        Err(OipError::NotReady {
            model: self.metadata.name.clone(),
            reason,
        })
    }

    /// Who sends a request that names no version.
    fn asker<'a>(&self, request: &'a InferRequest) -> Asker<'a> {
        let key = request.routing_key.as_ref().or(request.id.as_ref());
        match key {
            Some(key) => Asker::Key(key),
            None => Asker::Unknown(self.keyless.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// Where a request goes that names no version: by a rule, with its words, or by weight.
    fn assign(&self, rules: &[Rule], request: &InferRequest) -> (Assigned<B>, Option<String>) {
        let (routes, asker) = (self.routes(), self.asker(request));
        match routes.assign_by_rule(rules, request, asker) {
            Some((assigned, rule)) => (assigned, Some(rule)),
            None => (routes.assign(asker), None),
        }
    }
}

impl<B: Backend> InferenceService for EndpointService<B> {
    fn server_metadata(&self) -> ServerMetadata {
        server_metadata()
    }

    fn server_ready(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {
            let ready = self.ready(&self.routes().active);
            ready.map_err(|error| OipError::ServerNotReady {
                reason: error.to_string(),
            })
        })
    }

    fn model_metadata<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ModelMetadata> {
        Box::pin(async move {
            self.arm(model, version)?;
            Ok(ModelMetadata {
                versions: self.routes().versions(),
                ..self.metadata.clone()
            })
        })
    }

    fn model_ready<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ()> {
        Box::pin(async move {
            let arm = self.arm(model, version)?;
            self.ready(&arm)
        })
    }

    fn model_statistics<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, (String, ModelStatistics)> {
        Box::pin(async move {
            let arm = self.arm(model, version)?;
            let statistics = arm.statistics().clone();
            Ok((arm.version().to_string(), statistics))
        })
    }

    fn repository_index<'a>(
        &'a self,
        _caller: &'a Caller,
    ) -> ServiceFuture<'a, Vec<RepositoryEntry>> {
        Box::pin(async move {
            let routes = self.routes();
            let entry = |arm: &Arc<Arm<B>>| {
                let ready = self.ready(arm);
                RepositoryEntry {
                    name: self.metadata.name.clone(),
                    version: arm.version().to_string(),
                    state: match ready {
                        Ok(()) => ModelState::Ready,
                        Err(_) => ModelState::Unavailable,
                    },
                    reason: ready.err().map_or(String::new(), |error| error.to_string()),
                }
            };
            Ok(routes.arms().map(entry).collect())
        })
    }

    fn change_repository<'a>(
        &'a self,
        model: &'a str,
        change: RepositoryChange,
    ) -> ServiceFuture<'a, ()> {
        let is_endpoint = model == self.metadata.name;
        Box::pin(std::future::ready(Err(repository_fixed(
            model,
            change,
            is_endpoint,
        ))))
    }

    fn results(&self) -> Option<(Arc<dyn InferenceService>, &Results)> {
        Some((self.shared.upgrade()?, &self.results))
    }

    fn routing_headers(&self, _model: &str) -> Vec<String> {
        headers_of(&self.access.borrow().rules)
    }

    fn infer<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse> {
        Box::pin(async move {
            let arm = self.arm(model, version)?;
            let access = Arc::clone(&self.access.borrow());
            if let Some(token) = &request.token {
                let now_ms = arm.fleet().traffic().now_ms();
                self.rates.admit(&access.tokens, token, now_ms)?;
            }
            let (assigned, rule) = match version {
                // Who asks for a version gets it, or the error: such requests are no sample of all.
                Some(_) => (Assigned::uncounted(arm), None),
                None => self.assign(&access.rules, &request),
            };
            let mut response = self.answer(assigned, request).await?;
            if let Some(explanation) = &mut response.explanation {
                explanation.rule = rule;
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
#[path = "endpoint_service_tests.rs"]
mod tests;
