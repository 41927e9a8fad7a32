//! Requests whose callers do not wait, and come back for the answer.
//!
//! * [`results`]: the answers that are kept, within bounds.
//!
//! They are kept by the endpoint's router, so that any door may be asked for them.

pub mod results;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::results::Results;
use super::http::InferenceService;
use super::oip::{InferRequest, InferResponse, OipError, classify};

/// An answer, and the form in which its request wanted it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fetched {
    /// The answer.
    pub response: InferResponse,
    /// Its request, without inputs.
    pub wanted: InferRequest,
}

/// Has a service answer a request, and keeps the answer; the id to fetch it with.
pub async fn submit(
    service: Arc<dyn InferenceService>,
    results: &Results,
    (model, version): (&str, Option<&str>),
    request: InferRequest,
) -> Result<String, OipError> {
    let metadata = service.infer_metadata(model, version).await?;
    let (model, version) = (model.to_owned(), version.map(str::to_owned));
    results.begin(async move {
        let wanted = InferRequest {
            id: request.id.clone(),
            outputs: request.outputs.clone(),
            binary_data_output: request.binary_data_output,
            ..InferRequest::default()
        };
        let mut response = service.infer(&model, version.as_deref(), request).await?;
        response.id.clone_from(&wanted.id);
        classify(&mut response, &wanted, &metadata)?;
        Ok(Fetched { response, wanted })
    })
}
