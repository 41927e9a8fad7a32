//! One trainer's copy of the model, without the actor around it.
//!
//! Invariants:
//! 1. All replicas apply the same reduced sums in the same order, so all hold the same bits.
//! 2. An order is either carried out whole or leaves the state at a step boundary.

use super::data::Files;
use super::messages::{Epoch, Held, StepOrder, StepReply, TrainerError};
use super::optimizer::Optimizer;
use super::parameters::Parameters;
use super::reduction::{Partial, ShardFolder};
use super::spec::TrainSpec;
use super::state::TrainState;
use super::workload::Workload;

/// A copy of the model and optimizer, and the data to train it with.
#[derive(Debug)]
pub struct Replica {
    spec: TrainSpec,
    files: Files,
    epoch: Epoch,
    loaded: Option<Loaded>,
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
            epoch: Epoch::default(),
            loaded: None,
        }
    }

    /// What it holds.
    #[must_use]
    pub fn held(&self) -> Option<Held> {
        self.loaded.as_ref().map(|loaded| Held {
            step: loaded.state.step,
            digest: loaded.state.weights_blake3(),
        })
    }

    /// Loads the data if that is still to do, and takes over `state` (as [`TrainState::to_bytes`]
    /// writes it); without one, the state before the first step.
    pub fn prepare(&mut self, epoch: Epoch, state: Option<&[u8]>) -> Result<Held, TrainerError> {
        self.admit(epoch)?;
        let workload = match self.loaded.take() {
            Some(loaded) => loaded.workload,
            None => load(&self.spec, &self.files)?,
        };
        let state = match state {
            Some(bytes) => TrainState::from_bytes(bytes).map_err(unfit)?,
            None => TrainState::initial(&workload),
        };
        state
            .check_fingerprint(&workload.fingerprint())
            .map_err(unfit)?;
        self.loaded = Some(Loaded {
            parameters: workload.parameters(&state.params).map_err(unfit)?,
            optimizer: Optimizer::new(&self.spec, workload.layout()),
            workload,
            state,
        });
        Ok(self.held().expect("it was just loaded"))
    }

    /// Applies the updates it lacks and computes its shards.
    pub fn step(&mut self, order: &StepOrder) -> Result<StepReply, TrainerError> {
        self.admit(order.epoch)?;
        let loaded = self.loaded.as_mut().ok_or(TrainerError::Unprepared)?;
        loaded.catch_up(order.step, &order.updates)?;
        let samples = loaded.workload.shard_size() as u64;
        let mut folder = ShardFolder::new();
        for shard in order.shards.clone() {
            let output = loaded
                .workload
                .shard(&loaded.parameters, loaded.state.step, shard)
                .map_err(unfit)?;
            folder
                .feed(shard, output.loss_sum, samples, output.grads)
                .map_err(unfit)?;
        }
        Ok(StepReply {
            step: order.step,
            digest: loaded.state.weights_blake3(),
            partials: folder.finish(),
            notice_ms: None,
        })
    }

    /// The state as bytes, for another replica.
    pub fn state(&self) -> Result<Vec<u8>, TrainerError> {
        self.loaded
            .as_ref()
            .map(|loaded| loaded.state.to_bytes())
            .ok_or(TrainerError::Unprepared)
    }

    fn admit(&mut self, epoch: Epoch) -> Result<(), TrainerError> {
        if epoch < self.epoch {
            return Err(TrainerError::Stale {
                found: epoch,
                current: self.epoch,
            });
        }
        self.epoch = epoch;
        Ok(())
    }
}

impl Loaded {
    fn catch_up(&mut self, step: u64, updates: &[Partial]) -> Result<(), TrainerError> {
        let first = step.saturating_sub(updates.len() as u64);
        // What an earlier order of the same step has brought is not applied twice.
        let known = self.state.step.saturating_sub(first);
        let Some(new) = usize::try_from(known)
            .ok()
            .and_then(|known| updates.get(known..))
        else {
            return Err(TrainerError::OutOfStep {
                found: self.state.step,
                ordered: step,
            });
        };
        if self.state.step + (new.len() as u64) != step {
            return Err(TrainerError::OutOfStep {
                found: self.state.step,
                ordered: step,
            });
        }
        let applied = new
            .iter()
            .try_for_each(|root| self.optimizer.step(&mut self.state, root).map(drop));
        // Also where one was refused: the model must not stay behind those before it.
        if !new.is_empty() {
            self.parameters.load(&self.state.params).map_err(unfit)?;
        }
        applied.map_err(unfit)
    }
}

/// Loads the job's data and builds its model.
pub fn load(spec: &TrainSpec, files: &Files) -> Result<Workload, TrainerError> {
    Workload::load(spec, files).map_err(unfit)
}

fn unfit(error: impl std::fmt::Display) -> TrainerError {
    TrainerError::Unfit(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::training::reduction::TreeReducer;

    fn nowhere() -> crate::training::data::DataSpec {
        toml::from_str("[csv]\nfiles = [\"/nowhere.csv\"]\n").unwrap()
    }

    fn spec() -> TrainSpec {
        TrainSpec {
            steps: 4,
            virtual_shards: 4,
            global_batch: 32,
            ..TrainSpec::digits_mlp("a")
        }
    }

    fn order(epoch: u64, step: u64, updates: Vec<Partial>, shards: Range<u32>) -> StepOrder {
        StepOrder {
            epoch: Epoch(epoch),
            step,
            updates,
            shards,
        }
    }

    fn root(spec: &TrainSpec, replies: Vec<StepReply>) -> Partial {
        let grads = replies[0].partials[0].grads.len();
        let mut reducer = TreeReducer::new(spec.virtual_shards, 8, grads);
        let partials = replies.into_iter().flat_map(|reply| reply.partials);
        partials
            .filter_map(|partial| reducer.offer(partial).unwrap())
            .next()
            .unwrap()
    }

    #[test]
    fn two_replicas_stay_equal_and_updates_apply_once() {
        let spec = spec();
        let (mut a, mut b) = (Replica::new(spec.clone()), Replica::new(spec.clone()));
        let held = a.prepare(Epoch(1), None).unwrap();
        assert_eq!(
            b.prepare(Epoch(1), Some(&a.state().unwrap())).unwrap(),
            held
        );
        let mut updates = Vec::new();
        for step in 0..3 {
            let first = a.step(&order(1, step, updates.clone(), 0..1)).unwrap();
            let rest = b.step(&order(1, step, updates.clone(), 1..4)).unwrap();
            assert_eq!(first.digest, rest.digest);
            // Shards that were lost elsewhere come as a second order of the same step.
            let again = a.step(&order(1, step, updates.clone(), 1..4)).unwrap();
            assert_eq!(again.partials, rest.partials);
            updates = vec![root(&spec, vec![first, rest])];
        }
        assert_eq!(a.held().unwrap(), b.held().unwrap());
    }

    #[test]
    fn a_replica_catches_up_over_several_steps_or_says_that_it_cannot() {
        let spec = spec();
        let (mut a, mut b) = (Replica::new(spec.clone()), Replica::new(spec.clone()));
        a.prepare(Epoch(1), None).unwrap();
        b.prepare(Epoch(1), None).unwrap();
        let mut roots: Vec<Partial> = Vec::new();
        for step in 0..3 {
            let update = roots.last().cloned().into_iter().collect();
            roots.push(root(
                &spec,
                vec![a.step(&order(1, step, update, 0..4)).unwrap()],
            ));
        }
        let late = b.step(&order(1, 3, roots[2..].to_vec(), 0..1)).unwrap_err();
        assert_eq!(
            late,
            TrainerError::OutOfStep {
                found: 0,
                ordered: 3
            }
        );
        let b = b.step(&order(1, 3, roots.clone(), 0..1)).unwrap();
        let a = a.step(&order(1, 3, roots[1..].to_vec(), 0..1)).unwrap();
        assert_eq!(a, b);
    }

    #[test]
    fn a_refused_update_leaves_model_and_state_at_the_same_step() {
        let spec = spec();
        let (mut a, mut b) = (Replica::new(spec.clone()), Replica::new(spec.clone()));
        a.prepare(Epoch(1), None).unwrap();
        b.prepare(Epoch(1), None).unwrap();
        let good = root(&spec, vec![a.step(&order(1, 0, vec![], 0..4)).unwrap()]);
        let mut bad = good.clone();
        bad.grads[0] = f32::NAN;
        let error = b
            .step(&order(1, 2, vec![good.clone(), bad], 0..1))
            .unwrap_err();
        assert!(error.to_string().contains("not finite"), "{error}");
        assert_eq!(b.held().unwrap().step, 1);
        let b = b.step(&order(1, 1, vec![], 0..4)).unwrap();
        let a = a.step(&order(1, 1, vec![good], 0..4)).unwrap();
        assert_eq!(a, b);
    }

    #[test]
    fn stale_unprepared_and_unfit_are_told_apart() {
        let mut replica = Replica::new(spec());
        let error = replica.step(&order(5, 0, vec![], 0..1)).unwrap_err();
        assert_eq!(error, TrainerError::Unprepared);
        replica.prepare(Epoch(5), None).unwrap();
        let stale = TrainerError::Stale {
            found: Epoch(4),
            current: Epoch(5),
        };
        assert_eq!(replica.step(&order(4, 0, vec![], 0..1)).unwrap_err(), stale);
        assert_eq!(replica.prepare(Epoch(4), None).unwrap_err(), stale);
        let future = replica.step(&order(5, 2, vec![], 0..1)).unwrap_err();
        assert_eq!(
            future,
            TrainerError::OutOfStep {
                found: 0,
                ordered: 2
            }
        );
        let error = replica.step(&order(5, 0, vec![], 3..5)).unwrap_err();
        assert!(error.to_string().contains("shard 4 of 4"), "{error}");
        let mut other = TrainState::from_bytes(&replica.state().unwrap()).unwrap();
        other.fingerprint[0] ^= 1;
        let error = replica
            .prepare(Epoch(6), Some(&other.to_bytes()))
            .unwrap_err();
        assert!(error.to_string().contains("another job"), "{error}");
        let mut absent = Replica::new(TrainSpec {
            dataset: nowhere(),
            ..spec()
        });
        let error = absent.prepare(Epoch(1), None).unwrap_err();
        assert!(error.to_string().contains("/nowhere.csv"), "{error}");
    }

    #[test]
    fn a_newer_driver_outranks_every_epoch_of_an_older_one() {
        let mut old = Epoch::first_of(7);
        for _ in 0..1 << 20 {
            let next = old.next();
            assert!(next >= old);
            old = next;
        }
        assert!(Epoch::first_of(8) > old);
        assert_eq!(old.driver_incarnation(), 7);
    }
}
