//! Inference graphs: endpoints that answer one request together, as one model.
//!
//! * [`spec`]: nodes, where their inputs come from and when they run; what is refused, cycles among it (pure).
//! * [`condition`]: whether a node runs (pure).
//! * [`state`]: graphs as a replicated table (pure).
//! * [`metadata`]: what a graph takes and gives, from the endpoints at its ends.
//! * [`run`]: has the nodes answer, those at once that do not wait for each other.
//!
//! Every ingress answers for all graphs, and asks the endpoints' routers: a graph has no actor of its own.

pub mod condition;
pub mod metadata;
pub mod run;
pub mod spec;
pub mod state;
