//! What a job computes: its model on its data, shard by shard. The engine around it knows neither.
//!
//! Invariants:
//! 1. A shard's sums depend on (job, data, parameters, step, shard) and on nothing else.
//! 2. Held-out samples are measured in their order, in batches of a fixed size.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::Device;

use super::data::{Batch, DataError, Dataset, Files, Prefetch, Split};
use super::layout::Layout;
use super::model::ModelError;
use super::numerics::Probe;
use super::parameters::{Parameters, ShardOutput, initial_values};
use super::permutation::DataOrder;
use super::spec::TrainSpec;
use super::trainable::{Evaluation, EvaluationSums, Mode, ShardContext, Trainable};
use super::validation::InvalidField;
use super::value_bytes::bytes_of;

/// Samples measured at once: bounds the memory of an evaluation. It decides the order of additions, so
/// it never changes.
const EVALUATION_BATCH: usize = 64;

/// Why a job's work cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The job does not fit its data.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// The model cannot be built, or refuses the samples.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A shard that the job does not have.
    #[error("shard {shard} of {shard_count} was ordered")]
    Shard {
        /// The shard asked for.
        shard: u32,
        /// How many there are.
        shard_count: u32,
    },
}

impl WorkloadError {
    /// Whether the same may succeed later without anybody changing job or data.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, WorkloadError::Data(error) if error.may_pass())
    }
}

/// A job's model and data.
#[derive(Debug)]
pub struct Workload {
    spec: TrainSpec,
    model: Box<dyn Trainable>,
    layout: Arc<Layout>,
    split: Split,
    order: DataOrder,
    /// Only for samples that are read from a file each time.
    prefetch: Option<Prefetch>,
    /// What this machine computes, once it was asked.
    probe: OnceLock<Probe>,
    /// What parameters are on, and with them whatever is computed.
    device: Device,
}

#[cfg(test)]
impl Workload {
    /// The work of a job whose data is here.
    pub(crate) fn of(spec: &TrainSpec) -> Self {
        Workload::load(spec, &Files::local()).unwrap()
    }
}

impl Workload {
    /// Loads the data and builds the model; both must fit the job. It is computed on the CPU, also where the job asks
    /// its trainers for another device, until [`Workload::on`] says otherwise.
    pub fn load(spec: &TrainSpec, files: &Files) -> Result<Self, WorkloadError> {
        spec.validate()?;
        let data = Dataset::load(&spec.dataset, files)?;
        let split = data.split(spec.seed, spec.held_out_fraction);
        spec.validate_sample_count(split.train.len())?;
        let model = spec.model.build(data.shape())?;
        let order = DataOrder {
            seed: spec.seed,
            sample_count: split.train.len() as u64,
            global_batch: spec.global_batch,
            virtual_shards: u64::from(spec.virtual_shards),
        };
        Ok(Workload {
            layout: Arc::new(Layout::of(&model.parameters())),
            spec: spec.clone(),
            model,
            prefetch: split
                .train
                .is_read_late()
                .then(|| Prefetch::new(split.train.clone(), order)),
            split,
            order,
            probe: OnceLock::new(),
            device: Device::Cpu,
        })
    }

    /// The same work on another device.
    #[must_use]
    pub fn on(self, device: Device) -> Self {
        Workload {
            device,
            probe: OnceLock::new(),
            ..self
        }
    }

    /// The job.
    #[must_use]
    pub fn spec(&self) -> &TrainSpec {
        &self.spec
    }

    /// Where each parameter lies.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The data, in its two parts.
    #[must_use]
    pub fn split(&self) -> &Split {
        &self.split
    }

    /// Samples in a shard.
    #[must_use]
    pub fn shard_size(&self) -> usize {
        self.order.shard_size()
    }

    /// [`TrainSpec::fingerprint`] with this data.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        self.spec.fingerprint(self.split.train.digest())
    }

    /// The parameters before the first step, flat.
    #[must_use]
    pub fn initial_parameters(&self) -> Vec<f32> {
        initial_values(&self.model.parameters(), self.spec.seed)
    }

    /// Parameters with these values, for [`Workload::shard`].
    pub fn parameters(&self, flat: &[f32]) -> Result<Parameters, ModelError> {
        Parameters::on(self.device.clone(), Arc::clone(&self.layout), flat)
    }

    /// The sums of one virtual shard of one step.
    pub fn shard(
        &self,
        parameters: &Parameters,
        step: u64,
        shard: u32,
    ) -> Result<ShardOutput, WorkloadError> {
        let batch = self.samples(step, shard)?;
        self.gradients(parameters, step, shard, &batch)
    }

    /// The samples of one virtual shard of one step.
    pub fn samples(&self, step: u64, shard: u32) -> Result<Batch, WorkloadError> {
        let shard_count = self.spec.virtual_shards;
        if shard >= shard_count {
            return Err(WorkloadError::Shard { shard, shard_count });
        }
        let ready = self.prefetch.as_ref();
        match ready.and_then(|prefetch| prefetch.take(step, shard)) {
            Some(batch) => Ok(batch),
            None => Ok(self.split.train.gather(&self.order.shard(step, shard))?),
        }
    }

    /// The sums of one virtual shard of one step, whose samples are `batch`.
    pub fn gradients(
        &self,
        parameters: &Parameters,
        step: u64,
        shard: u32,
        batch: &Batch,
    ) -> Result<ShardOutput, WorkloadError> {
        let context = ShardContext {
            seed: self.spec.seed,
            step,
            first_sample: step * self.order.global_batch
                + u64::from(shard) * self.shard_size() as u64,
            mode: Mode::Training,
        };
        Ok(self.model.shard_gradients(parameters, batch, &context)?)
    }

    /// What this machine computes: of the first shard, from the parameters that training begins with. It takes a
    /// shard's time, once.
    pub fn probe(&self) -> Result<Probe, WorkloadError> {
        if let Some(probe) = self.probe.get() {
            return Ok(*probe);
        }
        let parameters = self.parameters(&self.initial_parameters())?;
        let sums = self.shard(&parameters, 0, 0)?;
        let probe = Probe::of(sums.loss_sum, &bytes_of(&sums.grads));
        Ok(*self.probe.get_or_init(|| probe))
    }

    /// Reads the samples of these shards of a step beside whatever is computed meanwhile, if that is worth
    /// it. Only a hint: [`Workload::shard`] reads what was not read yet.
    pub fn prefetch(&self, step: u64, shards: Range<u32>) {
        if let Some(prefetch) = &self.prefetch {
            prefetch.ask(step, shards);
        }
    }

    /// Measures the model on the held-out samples.
    pub fn evaluate(&self, parameters: &Parameters) -> Result<Evaluation, WorkloadError> {
        let held_out = &self.split.held_out;
        let indices: Vec<usize> = (0..held_out.len()).collect();
        let mut total = EvaluationSums::new(0);
        for batch in indices.chunks(EVALUATION_BATCH) {
            let batch = held_out.gather(batch)?;
            total.join(&self.model.evaluate(parameters, &batch)?);
        }
        Ok(total.means())
    }
}
