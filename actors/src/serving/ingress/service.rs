//! The protocol for all endpoints of the cluster, each of which answers by its name through its router, and for all
//! graphs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use super::doors::{Behind, DoorTable, OpenDoor};
use super::link::RouterLink;
use crate::serving::about::{repository_fixed, server_metadata};
use crate::serving::asynchronous::Fetched;
use crate::serving::auth::Caller;
use crate::serving::graph::metadata::GRAPH_VERSION;
use crate::serving::graph::run::{Endpoints, GraphModel};
use crate::serving::http::{InferenceService, RepositoryChange, ServiceFuture};
use crate::serving::inference_service::no_results;
use crate::serving::oip::{
    InferRequest, InferResponse, ModelMetadata, ModelState, OipError, RepositoryEntry,
    ServerMetadata,
};
use crate::serving::statistics::ModelStatistics;

/// Answers for all endpoints.
pub struct IngressService {
    table: watch::Receiver<Arc<DoorTable>>,
    is_leaving: AtomicBool,
}

impl IngressService {
    /// The service of these endpoints.
    #[must_use]
    pub fn new(table: watch::Receiver<Arc<DoorTable>>) -> Self {
        IngressService {
            table,
            is_leaving: AtomicBool::new(false),
        }
    }

    /// Says from now on that it is not ready, and goes on answering.
    pub fn leave(&self) {
        self.is_leaving.store(true, Ordering::Relaxed);
    }

    fn behind(&self, model: &str) -> Result<Behind<RouterLink>, OipError> {
        let table = Arc::clone(&self.table.borrow());
        table.door(model).map(|door| door.behind().clone())
    }

    /// The way to an endpoint's router.
    fn link(&self, endpoint: &str) -> Result<Arc<RouterLink>, OipError> {
        match self.behind(endpoint)? {
            Behind::Endpoint(link) => Ok(link),
            Behind::Graph(_) => Err(OipError::UnknownModel {
                model: endpoint.to_owned(),
            }),
        }
    }

    async fn graph_ready(&self, graph: &GraphModel) -> Result<(), OipError> {
        graph.metadata(self).await?;
        for node in &graph.spec().nodes {
            let ready = self.link(&node.endpoint)?.ready(None).await;
            ready.map_err(|error| graph.error_of(node, error))?;
        }
        Ok(())
    }

    fn ready(&self) -> Result<(), OipError> {
        let reason = if self.is_leaving.load(Ordering::Relaxed) {
            "this worker leaves: ask another one"
        } else if self.table.borrow().is_known() {
            return Ok(());
        } else {
            "the head has not said yet which endpoints there are"
        };
        Err(OipError::ServerNotReady {
            reason: reason.to_owned(),
        })
    }
}

impl InferenceService for IngressService {
    fn server_metadata(&self) -> ServerMetadata {
        server_metadata()
    }

    fn server_ready(&self) -> ServiceFuture<'_, ()> {
        Box::pin(std::future::ready(self.ready()))
    }

    fn model_metadata<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ModelMetadata> {
        Box::pin(async move {
            match self.behind(model)? {
                Behind::Endpoint(link) => link.describe(version).await,
                Behind::Graph(graph) => {
                    check_version(model, version)?;
                    graph.metadata(self).await
                }
            }
        })
    }

    fn infer_metadata<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, Arc<ModelMetadata>> {
        Box::pin(async move {
            match self.behind(model)? {
                // All versions of an endpoint take and give the same; which there are, its router knows.
                Behind::Endpoint(link) => link.metadata().await,
                Behind::Graph(graph) => {
                    check_version(model, version)?;
                    graph.metadata(self).await.map(Arc::new)
                }
            }
        })
    }

    fn model_ready<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ()> {
        Box::pin(async move {
            match self.behind(model)? {
                Behind::Endpoint(link) => link.ready(version).await,
                Behind::Graph(graph) => {
                    check_version(model, version)?;
                    self.graph_ready(&graph).await
                }
            }
        })
    }

    fn model_statistics<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, (String, ModelStatistics)> {
        Box::pin(async move {
            match self.behind(model)? {
                Behind::Endpoint(link) => link.statistics(version).await,
                Behind::Graph(graph) => {
                    check_version(model, version)?;
                    Ok((GRAPH_VERSION.to_owned(), graph.statistics()))
                }
            }
        })
    }

    fn infer<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse> {
        Box::pin(async move {
            match self.behind(model)? {
                Behind::Endpoint(link) => link.infer(version, request).await,
                Behind::Graph(graph) => {
                    check_version(model, version)?;
                    if let Some(token) = &request.token {
                        let table = Arc::clone(&self.table.borrow());
                        table.door(model)?.take(token)?;
                    }
                    graph.infer(self, request).await
                }
            }
        })
    }

    fn submit<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, String> {
        Box::pin(async move {
            match self.behind(model)? {
                Behind::Endpoint(link) => link.submit(version, request).await,
                // It runs here, and an answer would be known at this door only.
                Behind::Graph(_) => Err(no_results()),
            }
        })
    }

    fn fetch<'a>(&'a self, model: &'a str, id: &'a str) -> ServiceFuture<'a, Option<Fetched>> {
        Box::pin(async move {
            match self.behind(model)? {
                Behind::Endpoint(link) => link.fetch(id).await,
                Behind::Graph(_) => Err(no_results()),
            }
        })
    }

    fn repository_index<'a>(
        &'a self,
        caller: &'a Caller,
    ) -> ServiceFuture<'a, Vec<RepositoryEntry>> {
        Box::pin(async move {
            let Some(model) = &caller.model else {
                return Err(OipError::Unauthorized);
            };
            let graph = match self.behind(model)? {
                Behind::Endpoint(link) => return link.index().await,
                Behind::Graph(graph) => graph,
            };
            let reason = self.graph_ready(&graph).await.err();
            Ok(vec![RepositoryEntry {
                name: model.to_string(),
                version: GRAPH_VERSION.to_owned(),
                state: match reason {
                    None => ModelState::Ready,
                    Some(_) => ModelState::Unavailable,
                },
                reason: reason.map_or_else(String::new, |error| error.to_string()),
            }])
        })
    }

    fn routing_headers(&self, model: &str) -> Vec<String> {
        let table = Arc::clone(&self.table.borrow());
        let headers = |endpoint: &str| {
            let door = table.door(endpoint);
            door.map_or_else(|_| Vec::new(), |door| door.headers().to_vec())
        };
        match table.door(model).map(OpenDoor::behind) {
            Ok(Behind::Graph(graph)) => {
                let nodes = graph.spec().nodes.iter();
                nodes.flat_map(|node| headers(&node.endpoint)).collect()
            }
            _ => headers(model),
        }
    }

    fn body_bytes_max(&self, model: &str) -> Option<usize> {
        match self.behind(model).ok()? {
            Behind::Endpoint(link) => link.body_bytes_max(),
            // A request feeds some of its endpoints, so all of them together take as much.
            Behind::Graph(graph) => {
                let nodes = graph.spec().nodes.iter();
                let known = nodes.map(|node| self.link(&node.endpoint).ok()?.body_bytes_max());
                known.sum()
            }
        }
    }

    fn change_repository<'a>(
        &'a self,
        model: &'a str,
        change: RepositoryChange,
    ) -> ServiceFuture<'a, ()> {
        let error = match (self.behind(model), change) {
            (Ok(Behind::Graph(_)), RepositoryChange::Load) => OipError::RepositoryFixed {
                instead: format!("`mobula serve graph change {model}` makes another graph of it"),
            },
            (Ok(Behind::Graph(_)), RepositoryChange::Unload) => OipError::RepositoryFixed {
                instead: format!("`mobula serve graph delete {model}` takes it away"),
            },
            (behind, change) => repository_fixed(model, change, behind.is_ok()),
        };
        Box::pin(std::future::ready(Err(error)))
    }
}

impl Endpoints for IngressService {
    fn metadata<'a>(&'a self, endpoint: &'a str) -> ServiceFuture<'a, Arc<ModelMetadata>> {
        Box::pin(async move { self.link(endpoint)?.metadata().await })
    }

    fn infer<'a>(
        &'a self,
        endpoint: &'a str,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse> {
        Box::pin(async move { self.link(endpoint)?.infer(None, request).await })
    }
}

/// A graph has one version.
fn check_version(graph: &str, version: Option<&str>) -> Result<(), OipError> {
    match version {
        None | Some(GRAPH_VERSION) => Ok(()),
        Some(version) => Err(OipError::UnknownVersion {
            model: graph.to_owned(),
            version: version.to_owned(),
            served: vec![GRAPH_VERSION.to_owned()],
        }),
    }
}
