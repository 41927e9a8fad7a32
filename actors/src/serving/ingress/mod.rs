//! The ingress: a stable address on every worker that is told to have one, at which all endpoints of the cluster
//! answer by their names.
//!
//! * [`plan`]: which workers shall have one, and the actor on each (pure).
//! * [`actor`]: listens on one worker, and leaves it in order.
//! * [`doors`]: which endpoints there are and whose tokens open them, as last heard from the head.
//! * [`service`]: the protocol for all of them.
//! * [`link`]: one endpoint's router, wherever it is: requests go there as ordinary calls.

pub mod actor;
pub mod doors;
pub mod link;
pub mod plan;
pub mod service;
