//! Serving: a model version behind the Open Inference Protocol.
//!
//! * `oip`: requests, responses and their bytes, free of any transport.
//! * `batcher`: joins waiting requests into batches, within bounds.
//! * `statistics`: what a model has answered, and how long each part took.
//! * `auth`: bearer tokens.
//! * `compression`: content encodings of HTTP bodies.
//! * `http`: the protocol over HTTP for any [`http::InferenceService`].
//! * `server`: accepts connections for that router, within bounds, and stops in order.

pub mod auth;
pub mod batcher;
mod compression;
pub mod http;
pub mod oip;
pub mod server;
pub mod statistics;
