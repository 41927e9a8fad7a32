//! The program of the tests of replays: a model of its own that keeps the promise of equal bits, or breaks it.
//! `it/replay.rs` submits it, replays, and judges.
//!
//! `MOOD` in the job's environment says how it is: `steady`; `moody`, which computes something else in the job's processes
//! than elsewhere; or `mortal`, which ends other processes than the job's. It prints in all of them.

use mobula::Cluster;
use mobula_actors::trainable;
use mobula_actors::training::data::{Batch, SampleShape};
use mobula_actors::training::job::{JobError, train_spec};
use mobula_actors::training::model::ModelError;
use mobula_actors::training::models::ModelConfig;
use mobula_actors::training::parameters::{Gradients, Initial, Parameter, Parameters, ShardOutput};
use mobula_actors::training::spec::TrainSpec;
use mobula_actors::training::trainable::{EvaluationSums, ShardContext, Trainable};
use serde::Deserialize;

/// Only the job's processes have it.
const MOOD_ENV: &str = "MOOD";

const JOB: &str = r#"
name = "moody"
seed = 7
steps = 6
learning_rate = 0.01
workers = { min = 1, max = 2 }

[model.custom]
name = "mean"
config = { mood = "MOOD" }
"#;

#[derive(Debug, Deserialize)]
struct Config {
    mood: String,
}

/// The mean of all samples.
#[derive(Debug)]
struct Mean {
    inputs: usize,
    mood: String,
}

impl Mean {
    fn build(
        config: &ModelConfig,
        samples: &SampleShape,
    ) -> Result<Box<dyn Trainable>, ModelError> {
        let Config { mood } = config.parse("mean")?;
        Ok(Box::new(Mean {
            inputs: samples.feature_count(),
            mood,
        }))
    }

    /// What is added to the gradient for each unit of error.
    fn weight(&self, step: u64) -> f32 {
        let is_in_the_job = std::env::var_os(MOOD_ENV).is_some();
        match self.mood.as_str() {
            "moody" if is_in_the_job => 2.0,
            "mortal" if !is_in_the_job && step == 3 => std::process::exit(7),
            _ => 1.0,
        }
    }

    /// The errors of all samples, number by number.
    fn errors(&self, parameters: &Parameters, batch: &Batch) -> Result<Vec<f32>, ModelError> {
        let mean = parameters.values("mean")?.to_vec();
        let samples = batch.features().chunks_exact(self.inputs);
        Ok(samples
            .flat_map(|sample| sample.iter().zip(&mean).map(|(x, mean)| mean - x))
            .collect())
    }
}

fn loss(errors: &[f32]) -> f64 {
    errors
        .iter()
        .map(|error| 0.5 * f64::from(error * error))
        .sum()
}

impl Trainable for Mean {
    fn parameters(&self) -> Vec<Parameter> {
        vec![Parameter::new("mean", &[self.inputs], Initial::Zeros)]
    }

    fn shard_gradients(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        context: &ShardContext,
    ) -> Result<ShardOutput, ModelError> {
        println!("the model thinks about step {}", context.step);
        let weight = self.weight(context.step);
        let errors = self.errors(parameters, batch)?;
        let mut gradients = Gradients::zeros(parameters);
        let sums = gradients.of("mean")?;
        for sample in errors.chunks_exact(self.inputs) {
            for (sum, error) in sums.iter_mut().zip(sample) {
                *sum += weight * error;
            }
        }
        gradients.finish(loss(&errors))
    }

    fn evaluate(
        &self,
        parameters: &Parameters,
        batch: &Batch,
    ) -> Result<EvaluationSums, ModelError> {
        let mut sums = EvaluationSums::new(batch.count);
        sums.loss_sum = loss(&self.errors(parameters, batch)?);
        Ok(sums)
    }
}

trainable!("mean", Mean::build);

#[mobula::main]
async fn main(cluster: Cluster) -> Result<(), JobError> {
    let mood = std::env::var(MOOD_ENV).unwrap_or_default();
    let job = JOB.replace("MOOD", &mood);
    train_spec(cluster, TrainSpec::from_toml(&job, "moody_model.rs")?).await?;
    Ok(())
}
