//! Serving: a model version behind the Open Inference Protocol.
//!
//! The actors, and what decides about them:
//! * [`state`]: endpoints as a replicated table (pure); [`controller`] starts and stops what they
//!   need; [`client`] is what the command line asks.
//! * `gate`: what the policies say before a version is served.
//! * [`rollout`]: how an endpoint goes from one version to another; [`shadow`]: copies of requests that go to it
//!   first; [`experiment`]: which of two is better; [`autoscaler`]: with how many replicas. [`sentinels`]: rows whose answers are
//!   known, which the version beside the active one is asked.
//! * [`router`]: an endpoint's front door. [`steering`] follows which versions answer, `versions` reaches
//!   them, `loading` keeps both from waiting for the store, [`arm`] is one of them, [`fleet`] chooses among its replicas, of which `lane` is one, `replica_link` finds these, [`endpoint_service`] speaks
//!   the protocol, [`feed`] tells the monitor, and `labels` brings it the truth later.
//! * [`cache`]: answers that are given again, for endpoints that ask for it.
//! * [`guard`]: ejection of replicas that fail, second tries within a budget, a limit of the rate.
//! * [`replica`]: one copy of the model, which is a `predictor` on the thread of an `executor`, kept by
//!   `model_cache`; [`replica_settings`]: what it is given; [`onnx`] and [`encoder`]: models that other
//!   tools wrote, and [`limited`]: how long one may take until it is ready; `failing_rows`: which rows of a batch a model
//!   fails on; `memory_use`: what is in use where it runs.
//! * [`signature`]: what versions take and give; [`rows`]: what is joined into batches and taken apart again.
//! * [`graph`]: endpoints that answer one request together, as one model.
//! * [`asynchronous`]: requests whose callers come back for the answer.
//! * [`batch_inference`]: files of requests, answered at low priority.
//! * [`ingress`]: a stable address on every worker for all endpoints. [`access`]: whose tokens open which of them, and
//!   the rules by which requests go to a version.
//!
//! The protocol, for any service:
//! * [`oip`]: requests, responses and their bytes, free of any transport.
//! * [`batcher`]: joins waiting requests into batches, within bounds; [`patience`] says when one more is worth waiting for.
//! * [`statistics`]: what a model has answered, and how long each part took.
//! * [`auth`]: bearer tokens.
//! * `compression`: content encodings of HTTP bodies.
//! * [`http`]: the protocol over HTTP for any [`http::InferenceService`].
//! * [`grpc`]: the same over gRPC.
//! * [`server`]: accepts connections for that router, within bounds, and stops in order.
//! * `failure_log`: what either says in the log about requests without an answer.

mod about;
pub mod access;
pub mod arm;
pub mod asynchronous;
pub mod auth;
pub mod autoscaler;
pub mod batch_inference;
pub mod batcher;
pub mod cache;
pub mod client;
mod compression;
pub mod controller;
pub mod encoder;
pub mod endpoint_service;
mod executor;
pub mod experiment;
mod failing_rows;
mod failure_log;
pub mod feed;
pub mod fleet;
mod gate;
pub mod graph;
pub mod grpc;
pub mod guard;
pub mod http;
mod inference_service;
pub mod ingress;
mod labels;
mod lane;
pub mod limited;
mod loading;
mod memory_use;
mod meters;
mod model_cache;
pub mod oip;
pub mod onnx;
pub mod patience;
mod predictor;
pub mod replica;
mod replica_link;
pub mod replica_settings;
pub mod rollout;
pub mod router;
pub mod rows;
pub mod sentinels;
pub mod server;
pub mod shadow;
pub mod signature;
pub mod state;
pub mod statistics;
pub mod steering;
mod versions;

#[cfg(test)]
pub(crate) mod test_tables;
