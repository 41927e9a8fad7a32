//! One trainer's copy of the model, without the actor around it.
//!
//! Invariants:
//! 1. All replicas apply the same reduced sums in the same order, so all hold the same bits.
//! 2. The state is always one between two steps.
//! 3. Two states are kept at most beside its own: one for a checkpoint, and one for those who join (`kept.rs`).

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::data::Files;
use super::kept::Keeper;
use super::messages::{Held, KeepOrder, TrainerError};
use super::numerics::Probe;
use super::optimizer::{Optimizer, StepReport};
use super::parameters::Parameters;
use super::reduction::Partial;
use super::spec::TrainSpec;
use super::state::TrainState;
use super::workload::Workload;

pub use super::kept::Kept;

/// A copy of the model and optimizer, and the data to train it with.
#[derive(Debug)]
pub struct Replica {
    spec: TrainSpec,
    files: Files,
    loaded: Option<Loaded>,
    /// What shards and updates since it was asked last took: for samples, and for computing.
    spent: Cell<(Duration, Duration)>,
    sweep: Cell<Sweep>,
    /// What is kept for a checkpoint, and for those who join.
    saved: Keeper,
    shared: Keeper,
    /// Which parameter the next update gets wrong.
    #[cfg(test)]
    weak_spot: Option<usize>,
}

/// Which shards were computed.
#[derive(Debug, Clone, Copy, Default)]
struct Sweep {
    step: u64,
    first: u32,
    end: u32,
    /// First and end of those of the step before.
    before: (u32, u32),
}

#[derive(Debug)]
struct Loaded {
    workload: Workload,
    optimizer: Optimizer,
    parameters: Parameters,
    state: TrainState,
}

impl Replica {
    /// A replica without data or state, which reads data from this machine only.
    #[must_use]
    pub fn new(spec: TrainSpec) -> Self {
        Self::reading(spec, Files::local())
    }

    /// A replica without data or state, which reads data from `files`.
    #[must_use]
    pub fn reading(spec: TrainSpec, files: Files) -> Self {
        Replica {
            spec,
            files,
            loaded: None,
            spent: Cell::default(),
            sweep: Cell::default(),
            saved: Keeper::default(),
            shared: Keeper::default(),
            #[cfg(test)]
            weak_spot: None,
        }
    }

    /// A replica with the data of this one, which is left with nothing: whatever still holds this one, say
    /// a thread that waits for its lock, cannot touch what the new one is given.
    #[must_use]
    pub fn successor(&mut self) -> Replica {
        Replica {
            loaded: self.loaded.take(),
            ..Replica::reading(self.spec.clone(), self.files.clone())
        }
    }

    /// What it holds.
    #[must_use]
    pub fn held(&self) -> Option<Held> {
        self.loaded.as_ref().map(Loaded::held)
    }

    /// How many steps its state has taken; none before it is prepared.
    #[must_use]
    pub fn step(&self) -> Option<u64> {
        self.loaded.as_ref().map(|loaded| loaded.state.step)
    }

    /// Values of the model's parameters; none before it is prepared.
    #[must_use]
    pub fn value_count(&self) -> usize {
        let loaded = self.loaded.as_ref();
        loaded.map_or(0, |loaded| loaded.state.params.len())
    }

    /// Loads the data if that is still to do, and takes over `state` (as [`TrainState::to_bytes`]
    /// writes it); without one, the state before the first step.
    pub fn prepare(&mut self, state: Option<&[u8]>) -> Result<Held, TrainerError> {
        let workload = match self.loaded.take() {
            Some(loaded) => loaded.workload,
            None => {
                let device = self.spec.device.open().map_err(unfit)?;
                load(&self.spec, &self.files)?.on(device)
            }
        };
        let state = match state {
            Some(bytes) => TrainState::from_bytes(bytes).map_err(unfit)?,
            None => TrainState::initial(&workload),
        };
        state
            .check_fingerprint(&workload.fingerprint())
            .map_err(unfit)?;
        let loaded = Loaded {
            parameters: workload.parameters(&state.params).map_err(unfit)?,
            optimizer: Optimizer::new(&self.spec, workload.layout()),
            workload,
            state,
        };
        let held = loaded.held();
        self.loaded = Some(loaded);
        Ok(held)
    }

    /// What its machine computes, as [`Workload::probe`] asks.
    pub fn probe(&self) -> Result<Probe, TrainerError> {
        let loaded = self.loaded.as_ref().ok_or(TrainerError::Unprepared)?;
        loaded.workload.probe().map_err(unfit)
    }

    /// Computes one shard's sums from the state as it is, which must be that before `step`.
    pub fn compute(&self, step: u64, shard: u32) -> Result<Partial, TrainerError> {
        let shard_count = self.spec.virtual_shards;
        let loaded = self.loaded.as_ref().ok_or(TrainerError::Unprepared)?;
        if shard >= shard_count || step != loaded.state.step {
            let at = loaded.state.step;
            return Err(unfit(format!(
                "shard {shard} of {shard_count} at step {step} was ordered from a replica at step {at}"
            )));
        }
        let begun = Instant::now();
        let samples = loaded.workload.samples(step, shard);
        let batch = samples.map_err(|error| match error.may_pass() {
            true => TrainerError::Hindered(error.to_string()),
            false => unfit(error),
        })?;
        let fetched = begun.elapsed();
        let output = loaded
            .workload
            .gradients(&loaded.parameters, step, shard, &batch)
            .map_err(unfit)?;
        self.prefetch(&loaded.workload, step, shard);
        let (data, compute) = self.spent.get();
        let computed = begun.elapsed().saturating_sub(fetched);
        self.spent.set((data + fetched, compute + computed));
        let count = loaded.workload.shard_size() as u64;
        Ok(Partial::of_shard(
            shard,
            output.loss_sum,
            count,
            output.grads,
        ))
    }

    /// Has samples read ahead once the last shard of a step was computed, as far as the step before tells
    /// which is the last: the next one is likely to ask for the same.
    fn prefetch(&self, workload: &Workload, step: u64, shard: u32) {
        let mut sweep = self.sweep.get();
        if sweep.step != step {
            let before = (sweep.first, sweep.end);
            sweep = Sweep {
                step,
                first: shard,
                end: shard,
                before,
            };
        }
        sweep.first = sweep.first.min(shard);
        sweep.end = sweep.end.max(shard + 1);
        self.sweep.set(sweep);
        if shard + 1 == sweep.before.1 {
            workload.prefetch(step + 1, sweep.before.0..sweep.before.1);
        }
    }

    /// How long it waited for samples, and how long it computed gradients, updates and digests of the state, since this was
    /// asked last.
    pub fn take_spent(&self) -> (Duration, Duration) {
        self.spent.take()
    }

    /// Updates the state with the sums of a whole step. When this fails the state is as before; if the update makes it
    /// useless, there is none any more.
    pub fn apply(&mut self, root: &Partial) -> Result<(StepReport, Held), TrainerError> {
        let begun = Instant::now();
        let loaded = self.loaded.as_mut().ok_or(TrainerError::Unprepared)?;
        let report = match loaded.optimizer.step(&mut loaded.state, root) {
            Ok(report) => report,
            Err(error) => {
                if error.spoils_state() {
                    // A driver that is started anew must not find it here and go on from it.
                    self.loaded = None;
                }
                return Err(unfit(error));
            }
        };
        #[cfg(test)]
        if let Some(spot) = self.weak_spot.take() {
            let value = &mut loaded.state.params[spot];
            *value = f32::from_bits(value.to_bits() ^ 1);
        }
        loaded
            .parameters
            .load(&loaded.state.params)
            .map_err(unfit)?;
        let held = loaded.held();
        let (data, compute) = self.spent.get();
        self.spent.set((data, compute + begun.elapsed()));
        self.keep_if_wanted();
        Ok((report, held))
    }

    /// Keeps the state as it is or will be after `step` for a checkpoint, and no other. Answers whether it can: it cannot
    /// where that step is over, or a later order came first.
    pub fn keep(&mut self, order: KeepOrder, step: u64) -> bool {
        let state = self.loaded.as_ref().map(|loaded| &loaded.state);
        self.saved.keep(order, step, state)
    }

    /// What there is for a checkpoint of the state after `step`.
    #[must_use]
    pub fn kept(&self, step: u64) -> Kept {
        self.saved.kept(step)
    }

    /// Keeps no more for a checkpoint what was asked for by `order` or before it, nor what still comes of that.
    pub fn release(&mut self, order: KeepOrder) {
        self.saved.end(order);
    }

    /// As [`Replica::keep`], for those who join.
    pub fn share(&mut self, order: KeepOrder, step: u64) -> bool {
        let state = self.loaded.as_ref().map(|loaded| &loaded.state);
        self.shared.keep(order, step, state)
    }

    /// As [`Replica::kept`], for those who join.
    #[must_use]
    pub fn shared(&self, step: u64) -> Kept {
        self.shared.kept(step)
    }

    /// Keeps no more for those who join what was asked for by `order` or before it, nor what still comes of that.
    pub fn unshare(&mut self, order: KeepOrder) {
        self.shared.end(order);
    }

    fn keep_if_wanted(&mut self) {
        let Some(loaded) = &self.loaded else { return };
        self.saved.look(&loaded.state);
        self.shared.look(&loaded.state);
    }

    /// Has the next update change a bit of one parameter, as a broken machine would.
    #[cfg(test)]
    pub(super) fn spoil_next_update(&mut self, parameter: usize) {
        self.weak_spot = Some(parameter);
    }

    /// The state as bytes, for another replica.
    pub fn state(&self) -> Result<Vec<u8>, TrainerError> {
        self.loaded
            .as_ref()
            .map(|loaded| loaded.state.to_bytes())
            .ok_or(TrainerError::Unprepared)
    }
}

impl Loaded {
    fn held(&self) -> Held {
        Held {
            step: self.state.step,
            digest: self.state.weights_blake3(),
        }
    }
}

/// Loads the job's data and builds its model.
pub fn load(spec: &TrainSpec, files: &Files) -> Result<Workload, TrainerError> {
    Workload::load(spec, files).map_err(|error| match error.may_pass() {
        true => TrainerError::Hindered(error.to_string()),
        false => unfit(error),
    })
}

fn unfit(error: impl std::fmt::Display) -> TrainerError {
    TrainerError::Unfit(error.to_string())
}

#[cfg(test)]
#[path = "replica_tests.rs"]
mod tests;
