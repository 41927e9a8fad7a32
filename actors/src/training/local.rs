//! A job in one process, without actors: the oracle whose hash every distributed run must reach.
//!
//! It divides each step among pretended workers and reduces their partials exactly as the actors do, so
//! that "equal for every number of workers" can be tested without a cluster.

use super::model::ModelError;
use super::optimizer::{Optimizer, StepError, StepReport};
use super::parameters::Parameters;
use super::reduction::{ReductionError, ShardFolder, TreeReducer, shard_map};
use super::state::TrainState;
use super::trainable::Evaluation;
use super::workload::{Workload, WorkloadError};

/// Why a local run stopped.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model or the data refuses.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The parameters do not fit the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A partial was refused.
    #[error(transparent)]
    Reduction(#[from] ReductionError),
    /// The update could not be made.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// One job on one machine.
#[derive(Debug)]
pub struct LocalTrainer<'a> {
    workload: &'a Workload,
    optimizer: Optimizer,
    parameters: Parameters,
    state: TrainState,
}

impl<'a> LocalTrainer<'a> {
    /// A job before its first step.
    pub fn new(workload: &'a Workload) -> Result<Self, TrainError> {
        Self::resume(workload, TrainState::initial(workload))
    }

    /// A job at a saved state.
    pub fn resume(workload: &'a Workload, state: TrainState) -> Result<Self, TrainError> {
        Ok(Self {
            optimizer: Optimizer::new(workload.spec(), workload.layout()),
            parameters: workload.parameters(&state.params)?,
            workload,
            state,
        })
    }

    /// Takes one step as `worker_count` workers would. Panics unless `1 <= worker_count <= shards`.
    pub fn step(&mut self, worker_count: u32) -> Result<StepReport, TrainError> {
        let shards = self.workload.spec().virtual_shards;
        let samples = self.workload.shard_size() as u64;
        let mut reducer = TreeReducer::new(shards, samples, self.state.params.len());
        let mut root = None;
        // The last worker reports first: the order of arrival must not matter.
        for range in shard_map(shards, worker_count).into_iter().rev() {
            let mut folder = ShardFolder::new();
            for shard in range {
                let output = self
                    .workload
                    .shard(&self.parameters, self.state.step, shard)?;
                folder.feed(shard, output.loss_sum, samples, output.grads)?;
            }
            for partial in folder.finish() {
                root = reducer.offer(partial)?;
            }
        }
        let root = root.expect("a map covers every shard, so the last partial completes the tree");
        let report = self.optimizer.step(&mut self.state, &root)?;
        self.parameters.load(&self.state.params)?;
        Ok(report)
    }

    /// Takes the steps that are left.
    pub fn run(&mut self, worker_count: u32) -> Result<(), TrainError> {
        while self.state.step < self.workload.spec().steps {
            self.step(worker_count)?;
        }
        Ok(())
    }

    /// The state after the steps taken so far.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// Measures the model at that state on the held-out samples.
    pub fn evaluate(&self) -> Result<Evaluation, TrainError> {
        Ok(self.workload.evaluate(&self.parameters)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::data::Files;
    use crate::training::optimizer::OptimizerSpec;
    use crate::training::spec::TrainSpec;
    use std::process::Command;

    fn workload(spec: &TrainSpec) -> Workload {
        Workload::load(spec, &Files::local()).unwrap()
    }

    fn hash_after(spec: &TrainSpec, workers: impl Fn(u64) -> u32) -> String {
        let workload = workload(spec);
        let mut trainer = LocalTrainer::new(&workload).unwrap();
        for step in 0..spec.steps {
            trainer.step(workers(step)).unwrap();
        }
        trainer.state().weights_blake3()
    }

    #[test]
    fn the_mlp_reaches_95_percent_with_one_hash_for_every_number_of_workers() {
        let spec = TrainSpec::digits_mlp("digits");
        let workload = workload(&spec);
        let mut alone = LocalTrainer::new(&workload).unwrap();
        let start = std::time::Instant::now();
        alone.run(1).unwrap();
        eprintln!("mlp: {:?} a step", start.elapsed() / spec.steps as u32);
        let reached = alone.evaluate().unwrap().metrics["accuracy"];
        eprintln!("mlp: held-out accuracy {reached}");
        assert!(reached >= 0.95, "{reached}");
        let hash = alone.state().weights_blake3();
        assert_eq!(hash_after(&spec, |_| 3), hash);
        assert_eq!(hash_after(&spec, |step| (step % 16) as u32 + 1), hash);
    }

    #[test]
    fn the_cnn_learns_too_and_has_one_hash() {
        let mut spec = TrainSpec::digits_cnn("digits");
        spec.steps = 150;
        let workload = workload(&spec);
        let mut trainer = LocalTrainer::new(&workload).unwrap();
        let start = std::time::Instant::now();
        trainer.run(1).unwrap();
        eprintln!("cnn: {:?} a step", start.elapsed() / spec.steps as u32);
        let reached = trainer.evaluate().unwrap().metrics["accuracy"];
        eprintln!("cnn: held-out accuracy {reached}");
        assert!(reached >= 0.9, "{reached}");
        spec.steps = 20;
        assert_eq!(hash_after(&spec, |_| 1), hash_after(&spec, |_| 5));
    }

    #[test]
    fn a_saved_state_goes_on_to_the_same_hash() {
        let mut spec = TrainSpec::digits_mlp("digits");
        (spec.steps, spec.optimizer) = (30, OptimizerSpec::Sgd { momentum: 0.9 });
        let workload = workload(&spec);
        let whole = hash_after(&spec, |_| 2);
        let mut first = LocalTrainer::new(&workload).unwrap();
        for _ in 0..13 {
            first.step(4).unwrap();
        }
        let saved = TrainState::from_bytes(&first.state().to_bytes()).unwrap();
        let mut second = LocalTrainer::resume(&workload, saved).unwrap();
        second.run(7).unwrap();
        assert_eq!(second.state().weights_blake3(), whole);
    }

    #[test]
    fn a_batch_larger_than_the_data_is_refused() {
        let mut spec = TrainSpec::digits_mlp("digits");
        spec.global_batch = 2048;
        let error = Workload::load(&spec, &Files::local())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("global_batch is 2048: the training part of the data has"),
            "{error}"
        );
    }

    /// Not a test by itself: prints the hash that the next test compares between processes.
    #[test]
    #[ignore = "run in a process of its own by bits_do_not_depend_on_threads"]
    fn prints_hash() {
        let spec = TrainSpec {
            steps: 15,
            ..TrainSpec::digits_cnn("digits")
        };
        println!("hash={}", hash_after(&spec, |_| 1));
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let module = module_path!()
            .split_once("::")
            .expect("a module within a crate")
            .1;
        let hash = |threads: &str| {
            let output = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    &format!("{module}::prints_hash"),
                    "--ignored",
                    "--nocapture",
                ])
                .env("RAYON_NUM_THREADS", threads)
                .output()
                .unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let at = text
                .find("hash=")
                .unwrap_or_else(|| panic!("no hash in {text}"));
            text[at..at + 69].to_owned()
        };
        assert_eq!(hash("1"), hash("2"));
    }
}
