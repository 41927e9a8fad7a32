//! What a replica keeps of its state while it goes on: for a checkpoint, and for trainers that join.
//!
//! Invariants:
//! 1. What is kept is the state after the very step that was asked for, one at most.
//! 2. An order that comes after a later one, or after its own end, keeps nothing and ends nothing.

use std::sync::Arc;

use super::messages::KeepOrder;
use super::snapshot::StateSnapshot;
use super::state::TrainState;

/// What there is of the state after some step, which may have been asked for.
#[derive(Debug, Clone)]
pub enum Kept {
    /// The state.
    Here(Arc<StateSnapshot>),
    /// Nothing yet: it was asked for, and that step is still to come.
    Coming,
    /// Nothing: it was not asked for, or too late, or is kept no more.
    Never,
}

/// Keeps one state.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    /// The newest order of which it knows.
    newest: KeepOrder,
    /// The step after which the state is to be kept, and that state once it is there.
    wanted_step: Option<u64>,
    kept: Option<(u64, Arc<StateSnapshot>)>,
}

impl Keeper {
    /// Keeps the state as it is or will be after `step`, and no other. Answers whether it can: it cannot where `state`,
    /// as it is now, is one after a later step, or absent, nor where `order` comes too late.
    pub(super) fn keep(&mut self, order: KeepOrder, step: u64, state: Option<&TrainState>) -> bool {
        if order <= self.newest {
            return false;
        }
        self.newest = order;
        self.kept = None;
        let state = state.filter(|state| state.step <= step);
        self.wanted_step = state.map(|_| step);
        if let Some(state) = state {
            self.look(state);
        }
        state.is_some()
    }

    /// Looks whether the state is the one to keep.
    pub(super) fn look(&mut self, state: &TrainState) {
        if self.wanted_step == Some(state.step) {
            self.wanted_step = None;
            self.kept = Some((state.step, Arc::new(StateSnapshot::of(state))));
        }
    }

    /// What there is of the state after `step`.
    pub(super) fn kept(&self, step: u64) -> Kept {
        match &self.kept {
            Some((kept, state)) if *kept == step => Kept::Here(Arc::clone(state)),
            _ if self.wanted_step == Some(step) => Kept::Coming,
            _ => Kept::Never,
        }
    }

    /// Keeps no more what was asked for by `order` or before it, nor what still comes of that.
    pub(super) fn end(&mut self, order: KeepOrder) {
        if order >= self.newest {
            self.newest = order;
            (self.wanted_step, self.kept) = (None, None);
        }
    }
}
