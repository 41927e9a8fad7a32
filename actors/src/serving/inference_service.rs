//! What a server of the protocol answers with, whichever transport asks: the protocol's calls as a trait.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::asynchronous::results::Results;
use super::asynchronous::{Fetched, submit};
use super::auth::Caller;
use super::oip::{
    DecodeError, InferRequest, InferResponse, ModelMetadata, OipError, RepositoryEntry,
    ServerMetadata,
};
use super::statistics::ModelStatistics;

/// What a request's body may take. Every connection may be made to hold as much, so the model decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyLimits {
    /// Bytes, before and after inflating; above them a request is answered with 413.
    pub max_bytes: usize,
    /// From the request's head to the body's last byte; past it a request is answered with 408. A client that stalls
    /// would keep one of the server's connections for ever.
    pub timeout: Duration,
}

/// A future a service returns; boxed, so that services can be trait objects.
pub type ServiceFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, OipError>> + Send + 'a>>;

/// What answers the protocol's calls. A version of `None` leaves the choice to the service.
pub trait InferenceService: Send + Sync + 'static {
    /// The server's name, version and the extensions that exist.
    fn server_metadata(&self) -> ServerMetadata;

    /// Succeeds when requests can be served; otherwise says what is awaited.
    fn server_ready(&self) -> ServiceFuture<'_, ()>;

    /// Describes a model.
    fn model_metadata<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ModelMetadata>;

    /// What requests to a model must fit; its versions need not be there. This is on the path of every inference.
    fn infer_metadata<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, Arc<ModelMetadata>> {
        Box::pin(async move { self.model_metadata(model, version).await.map(Arc::new) })
    }

    /// Succeeds when the model can answer; otherwise says what is awaited.
    fn model_ready<'a>(&'a self, model: &'a str, version: Option<&'a str>)
    -> ServiceFuture<'a, ()>;

    /// Counts of a model, with the version they belong to.
    fn model_statistics<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, (String, ModelStatistics)>;

    /// Answers a request that fits the model's metadata. The response may hold more outputs than were asked for.
    fn infer<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse>;

    /// Itself, and where it keeps answers whose callers come back for them; `None` where it keeps none.
    fn results(&self) -> Option<(Arc<dyn InferenceService>, &Results)> {
        None
    }

    /// Has a request answered whose caller comes back for the answer; the id to fetch it with.
    fn submit<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, String> {
        Box::pin(async move {
            let (shared, results) = self.results().ok_or_else(no_results)?;
            submit(shared, results, (model, version), request).await
        })
    }

    /// The answer to such a request; `None` as long as it is under way.
    fn fetch<'a>(&'a self, model: &'a str, id: &'a str) -> ServiceFuture<'a, Option<Fetched>> {
        Box::pin(async move {
            self.infer_metadata(model, None).await?;
            let (_, results) = self.results().ok_or_else(no_results)?;
            results.fetch(id)
        })
    }

    /// Every version of every model that the caller may ask, in the order of their names.
    fn repository_index<'a>(
        &'a self,
        caller: &'a Caller,
    ) -> ServiceFuture<'a, Vec<RepositoryEntry>>;

    /// The headers of a model's requests that decide where these go, in lower case. Asked after its metadata.
    fn routing_headers(&self, model: &str) -> Vec<String> {
        let _ = model;
        Vec::new()
    }

    /// Bytes of a request to a model, before and after inflating; `None` for the limit of the server. Asked after its
    /// metadata.
    fn body_bytes_max(&self, model: &str) -> Option<usize> {
        let _ = model;
        None
    }

    /// Loads a model or takes it away. A service whose models come and go by other ways refuses and names them.
    fn change_repository<'a>(
        &'a self,
        model: &'a str,
        change: RepositoryChange,
    ) -> ServiceFuture<'a, ()>;
}

/// The refusal of a service that keeps no answers.
pub(super) fn no_results() -> OipError {
    OipError::Decode(DecodeError::Unsupported {
        feature: "Prefer: respond-async for this model".to_owned(),
    })
}

/// What a client wants of a model in the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepositoryChange {
    /// Answer with it.
    Load,
    /// Answer with it no more.
    Unload,
}
