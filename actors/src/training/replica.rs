//! One trainer's copy of the model, without the actor around it.
//!
//! Invariants:
//! 1. All replicas apply the same reduced sums in the same order, so all hold the same bits.
//! 2. The state is always one between two steps.
//! 3. What is kept for a checkpoint is the state after the very step that was asked for, one at most.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::data::Files;
use super::messages::{Held, TrainerError};
use super::numerics::Probe;
use super::optimizer::{Optimizer, StepReport};
use super::parameters::Parameters;
use super::reduction::Partial;
use super::snapshot::StateSnapshot;
use super::spec::TrainSpec;
use super::state::TrainState;
use super::workload::Workload;

/// A copy of the model and optimizer, and the data to train it with.
#[derive(Debug)]
pub struct Replica {
    spec: TrainSpec,
    files: Files,
    loaded: Option<Loaded>,
    /// What shards and updates since it was asked last took: for samples, and for computing.
    spent: Cell<(Duration, Duration)>,
    sweep: Cell<Sweep>,
    /// The step after which the state is to be kept for a checkpoint, and that state once it is there.
    wanted_step: Option<u64>,
    kept: Option<(u64, Arc<StateSnapshot>)>,
    /// Which parameter the next update gets wrong.
    #[cfg(test)]
    weak_spot: Option<usize>,
}

/// What a replica has of the state after some step, which it may have been asked to keep.
#[derive(Debug, Clone)]
pub enum Kept {
    /// The state.
    Here(Arc<StateSnapshot>),
    /// Nothing yet: it was asked to keep it, and that step is still to come.
    Coming,
    /// Nothing: it was not asked, or too late, or keeps it no more.
    Never,
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
            wanted_step: None,
            kept: None,
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

    /// Keeps the state as it is or will be after `step`, and no other. Answers whether it can: it cannot where that
    /// step is over.
    pub fn keep(&mut self, step: u64) -> bool {
        self.kept = None;
        let at = self.step();
        self.wanted_step = at.is_some_and(|at| at <= step).then_some(step);
        self.keep_if_wanted();
        at.is_some_and(|at| at <= step)
    }

    /// What there is of the state after `step`.
    #[must_use]
    pub fn kept(&self, step: u64) -> Kept {
        match &self.kept {
            Some((kept, state)) if *kept == step => Kept::Here(Arc::clone(state)),
            _ if self.wanted_step == Some(step) => Kept::Coming,
            _ => Kept::Never,
        }
    }

    /// Keeps the state after `step` no more.
    pub fn release(&mut self, step: u64) {
        self.kept.take_if(|(kept, _)| *kept == step);
        self.wanted_step.take_if(|wanted| *wanted == step);
    }

    fn keep_if_wanted(&mut self) {
        let Some(loaded) = &self.loaded else { return };
        if self.wanted_step == Some(loaded.state.step) {
            self.wanted_step = None;
            let state = Arc::new(StateSnapshot::of(&loaded.state));
            self.kept = Some((loaded.state.step, state));
        }
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
mod tests {
    use mobula_storage::checkpoint::CheckpointSource;

    use super::*;
    use crate::device::ComputeDevice;
    use crate::training::optimizer::OptimizerSpec;
    use crate::training::reduction::TreeReducer;

    fn spec() -> TrainSpec {
        TrainSpec {
            steps: 4,
            virtual_shards: 4,
            global_batch: 32,
            ..TrainSpec::digits_mlp("a")
        }
    }

    fn root(replica: &Replica) -> Partial {
        let step = replica.held().unwrap().step;
        let first = replica.compute(step, 0).unwrap();
        let mut reducer = TreeReducer::new(4, 8, first.grads.len());
        reducer.offer(first).unwrap();
        (1..4)
            .rev()
            .filter_map(|shard| {
                let sums = replica.compute(step, shard).unwrap();
                reducer.offer(sums).unwrap()
            })
            .next()
            .unwrap()
    }

    /// Also in a program with the feature, on a machine without a GPU.
    #[test]
    fn a_replica_without_the_device_that_the_job_asks_for_says_what_to_do() {
        let spec = TrainSpec {
            device: ComputeDevice::Cuda,
            ..spec()
        };
        if ComputeDevice::Cuda.open().is_ok() {
            return;
        }
        let mut replica = Replica::new(spec);
        let error = replica.prepare(None).unwrap_err().to_string();
        assert!(error.contains("leave the device out"), "{error}");
        assert_eq!(replica.held(), None);
    }

    #[test]
    fn replicas_with_equal_sums_stay_equal() {
        let spec = spec();
        let (mut a, mut b) = (Replica::new(spec.clone()), Replica::new(spec));
        let held = a.prepare(None).unwrap();
        assert_eq!(b.prepare(Some(&a.state().unwrap())).unwrap(), held);
        for step in 0..3 {
            assert_eq!(a.compute(step, 2), b.compute(step, 2));
            let sums = root(&a);
            let [(ours, held), (theirs, also_held)] =
                [&mut a, &mut b].map(|r| r.apply(&sums).unwrap());
            assert_eq!(held, also_held);
            assert_eq!((ours.step, ours.loss_mean), (theirs.step, theirs.loss_mean));
            assert_eq!(ours.gradient_norm, theirs.gradient_norm);
        }
        assert_eq!(a.held(), b.held());
    }

    #[test]
    fn the_state_after_one_step_is_kept_while_others_are_taken() {
        let mut replica = Replica::new(spec());
        assert!(!replica.keep(0), "there is none yet");
        replica.prepare(None).unwrap();
        assert!(replica.keep(2));
        assert!(matches!(replica.kept(2), Kept::Coming));
        let mut after = Vec::new();
        for _ in 0..3 {
            let sums = root(&replica);
            replica.apply(&sums).unwrap();
            after.push(replica.state().unwrap());
        }
        let Kept::Here(kept) = replica.kept(2) else {
            panic!("it was asked for in time");
        };
        assert_eq!(kept.read(0..kept.length_bytes()), after[1]);
        assert!(matches!(replica.kept(1), Kept::Never));
        assert!(!replica.keep(2), "that step is over");
        assert!(matches!(replica.kept(2), Kept::Never));
        assert!(replica.keep(3), "it is there now");
        assert!(matches!(replica.kept(3), Kept::Here(_)));
        replica.release(2);
        assert!(
            matches!(replica.kept(3), Kept::Here(_)),
            "another one was meant"
        );
        replica.release(3);
        assert!(matches!(replica.kept(3), Kept::Never));
    }

    #[test]
    fn a_refused_update_leaves_model_and_state_at_the_same_step() {
        let mut replica = Replica::new(spec());
        replica.prepare(None).unwrap();
        let good = root(&replica);
        let mut bad = good.clone();
        bad.grads[0] = f32::NAN;
        let before = (replica.held(), replica.compute(0, 1));
        let error = replica.apply(&bad).unwrap_err();
        assert!(error.to_string().contains("not finite"), "{error}");
        assert_eq!((replica.held(), replica.compute(0, 1)), before);
        assert_eq!(replica.apply(&good).unwrap().1.step, 1);
    }

    #[test]
    fn a_state_that_an_update_has_made_useless_is_held_no_more() {
        // As no job may have it: one step is enough then.
        let mut replica = Replica::new(spec());
        replica.prepare(None).unwrap();
        let loaded = replica.loaded.as_mut().unwrap();
        let rates = TrainSpec {
            learning_rate: 1e30,
            clip_norm: None,
            optimizer: OptimizerSpec::Sgd { momentum: 0.0 },
            ..spec()
        };
        loaded.optimizer = Optimizer::new(&rates, loaded.workload.layout());
        loaded.state.moments.truncate(1);
        let mut sums = root(&replica);
        sums.grads.fill(1e12);
        let error = replica.apply(&sums).unwrap_err().to_string();
        assert!(
            error.contains("after its update dense.0.bias is not finite"),
            "{error}"
        );
        assert_eq!(replica.held(), None);
        assert_eq!(replica.state().unwrap_err(), TrainerError::Unprepared);
    }

    #[test]
    fn an_update_is_counted_among_what_was_computed() {
        let mut replica = Replica::new(spec());
        replica.prepare(None).unwrap();
        let sums = root(&replica);
        let (_, shards) = replica.take_spent();
        assert!(shards > Duration::ZERO);
        assert_eq!(replica.take_spent(), (Duration::ZERO, Duration::ZERO));
        let (report, _) = replica.apply(&sums).unwrap();
        let (data, compute) = replica.take_spent();
        assert_eq!(data, Duration::ZERO, "no samples were fetched");
        assert!(compute >= report.took && report.took > Duration::ZERO);
    }

    #[test]
    fn unprepared_and_unfit_are_told_apart() {
        let mut replica = Replica::new(spec());
        assert_eq!(replica.compute(0, 0).unwrap_err(), TrainerError::Unprepared);
        replica.prepare(None).unwrap();
        for (step, shard, expected) in [(2, 0, "at step 2"), (0, 4, "shard 4 of 4")] {
            let error = replica.compute(step, shard).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let mut other = TrainState::from_bytes(&replica.state().unwrap()).unwrap();
        other.fingerprint[0] ^= 1;
        let error = replica.prepare(Some(&other.to_bytes())).unwrap_err();
        assert!(error.to_string().contains("another job"), "{error}");
        let mut absent = Replica::new(TrainSpec {
            dataset: toml::from_str("[csv]\nfiles = [\"/nowhere.csv\"]\n").unwrap(),
            ..spec()
        });
        let error = absent.prepare(None).unwrap_err();
        assert!(error.to_string().contains("/nowhere.csv"), "{error}");
    }
}
