//! Serving: a model version behind the Open Inference Protocol.
//!
//! The actors, and what decides about them:
//! * [`state`]: endpoints as a replicated table (pure); [`controller`] starts and stops what they
//!   need; [`client`] is what the command line asks.
//! * `gate`: what the policies say before a version is served.
//! * [`rollout`]: how an endpoint goes from one version to another; [`autoscaler`]: with how many replicas.
//! * [`router`]: an endpoint's front door. [`steering`] follows which versions answer, [`arm`] is one of
//!   them, [`fleet`] chooses among its replicas, of which `lane` is one, `replica_link` finds these, [`endpoint_service`] speaks
//!   the protocol, [`feed`] tells the monitor, and `labels` brings it the truth later.
//! * [`guard`]: ejection of replicas that fail, second tries within a budget, a limit of the rate.
//! * [`replica`]: one copy of the model.
//!
//! The protocol, for any service:
//! * [`oip`]: requests, responses and their bytes, free of any transport.
//! * [`batcher`]: joins waiting requests into batches, within bounds.
//! * [`statistics`]: what a model has answered, and how long each part took.
//! * [`auth`]: bearer tokens.
//! * `compression`: content encodings of HTTP bodies.
//! * [`http`]: the protocol over HTTP for any [`http::InferenceService`].
//! * [`grpc`]: the same over gRPC.
//! * [`server`]: accepts connections for that router, within bounds, and stops in order.

pub mod arm;
pub mod auth;
pub mod autoscaler;
pub mod batcher;
pub mod client;
mod compression;
pub mod controller;
pub mod endpoint_service;
pub mod feed;
pub mod fleet;
mod gate;
pub mod grpc;
pub mod guard;
pub mod http;
mod labels;
mod lane;
mod meters;
pub mod oip;
pub mod replica;
mod replica_link;
pub mod rollout;
pub mod router;
pub mod server;
pub mod state;
pub mod statistics;
pub mod steering;

#[cfg(test)]
mod test_tables;
