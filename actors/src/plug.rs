//! What this crate plugs into a head.

use std::sync::Arc;

use mobula_core::control::{Controller, Retention, StateModule};

use crate::checkpoint::{CheckpointModule, CheckpointRetention};
use crate::drift::retraining::controller::RetrainingController;
use crate::drift::state::Drift;
use crate::registry::Registry;
use crate::serving::controller::ServingController;
use crate::serving::state::Serving;

/// The replicated modules of the actors.
#[must_use]
pub fn modules() -> Vec<Arc<dyn StateModule>> {
    vec![
        Arc::new(CheckpointModule),
        Arc::new(Registry),
        Arc::new(Serving),
        Arc::new(Drift),
    ]
}

/// The leader-only loops of the actors.
#[must_use]
pub fn controllers() -> Vec<Box<dyn Controller>> {
    vec![Box::new(ServingController), Box::new(RetrainingController)]
}

/// What says which checkpoints in the object store must stay.
#[must_use]
pub fn retention() -> Arc<dyn Retention> {
    Arc::new(CheckpointRetention)
}
