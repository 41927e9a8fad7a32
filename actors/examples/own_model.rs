//! A model of your own, trained by Mobula: the same bits, however many workers there are and whoever of
//! them dies.
//!
//! `cargo run --example own_model` trains on a cluster of its own; `mobula submit` runs the same binary on
//! a real one. The model is softmax regression, written without any library, to show all that a model
//! is: parameters, a loss with its gradient, and what is measured.

use mobula::Cluster;
use mobula_actors::kernels::math;
use mobula_actors::trainable;
use mobula_actors::training::data::{Batch, Files, SampleShape, Samples};
use mobula_actors::training::job::{JobError, train_spec};
use mobula_actors::training::local::LocalTrainer;
use mobula_actors::training::model::ModelError;
use mobula_actors::training::models::ModelConfig;
use mobula_actors::training::parameters::{Gradients, Initial, Parameter, Parameters, ShardOutput};
use mobula_actors::training::spec::TrainSpec;
use mobula_actors::training::trainable::{EvaluationSums, ShardContext, Trainable};
use mobula_actors::training::workload::Workload;
use serde::Deserialize;

/// The job: as for a built-in model, but for the model.
const JOB: &str = r#"
name = "own-model"
seed = 7
steps = 120
learning_rate = 0.05
workers = { min = 2, max = 2 }

[model.custom]
name = "softmax-regression"
config = { temperature = 1.5 }
"#;

/// What `config` may say.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    temperature: f32,
}

/// The scores of the classes are linear in the pixels.
#[derive(Debug)]
struct SoftmaxRegression {
    temperature: f32,
    inputs: usize,
    classes: usize,
}

impl SoftmaxRegression {
    fn build(
        config: &ModelConfig,
        samples: &SampleShape,
    ) -> Result<Box<dyn Trainable>, ModelError> {
        let SampleShape::Classified { classes, .. } = samples else {
            return Err(ModelError::shape(
                "softmax regression",
                "samples with classes",
            ));
        };
        let config: Config = config.parse("softmax-regression")?;
        Ok(Box::new(SoftmaxRegression {
            temperature: config.temperature,
            inputs: samples.feature_count(),
            classes: *classes,
        }))
    }

    /// The probability of each class of one sample.
    fn probabilities(
        &self,
        parameters: &Parameters,
        pixels: &[f32],
    ) -> Result<Vec<f32>, ModelError> {
        let mut scores = parameters.values("bias")?.to_vec();
        let rows = parameters.values("weight")?.chunks_exact(self.classes);
        for (pixel, row) in pixels.iter().zip(rows) {
            for (score, weight) in scores.iter_mut().zip(row) {
                *score += pixel * weight;
            }
        }
        let largest = scores.iter().copied().fold(f32::MIN, f32::max);
        // Not the platform's `exp`, whose last bit differs between machines.
        let power = |score: &f32| math::exp(f64::from((score - largest) / self.temperature));
        let powers: Vec<f64> = scores.iter().map(power).collect();
        let total: f64 = powers.iter().sum();
        Ok(powers.iter().map(|power| (power / total) as f32).collect())
    }
}

/// The numbers and classes of a batch.
fn classified(batch: &Batch) -> Result<(&[f32], &[u32]), ModelError> {
    match &batch.samples {
        Samples::Classified { features, labels } => Ok((features, labels)),
        _ => Err(ModelError::shape(
            "softmax regression",
            "samples with classes",
        )),
    }
}

impl Trainable for SoftmaxRegression {
    fn parameters(&self) -> Vec<Parameter> {
        let normal = Initial::Normal { deviation: 0.01 };
        vec![
            Parameter::new("weight", &[self.inputs, self.classes], normal),
            Parameter::new("bias", &[self.classes], Initial::Zeros),
        ]
    }

    fn shard_gradients(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        _context: &ShardContext,
    ) -> Result<ShardOutput, ModelError> {
        let (features, labels) = classified(batch)?;
        let mut loss_sum = 0.0;
        let mut gradients = Gradients::zeros(parameters);
        for (pixels, label) in features.chunks_exact(self.inputs).zip(labels) {
            let mut slopes = self.probabilities(parameters, pixels)?;
            loss_sum -= math::ln(f64::from(slopes[*label as usize].max(f32::MIN_POSITIVE)));
            slopes[*label as usize] -= 1.0;
            for slope in &mut slopes {
                *slope /= self.temperature;
            }
            for (gradient, slope) in gradients.of("bias")?.iter_mut().zip(&slopes) {
                *gradient += slope;
            }
            let rows = gradients.of("weight")?.chunks_exact_mut(self.classes);
            for (pixel, row) in pixels.iter().zip(rows) {
                for (gradient, slope) in row.iter_mut().zip(&slopes) {
                    *gradient += pixel * slope;
                }
            }
        }
        gradients.finish(loss_sum)
    }

    fn evaluate(
        &self,
        parameters: &Parameters,
        batch: &Batch,
    ) -> Result<EvaluationSums, ModelError> {
        let (features, labels) = classified(batch)?;
        let mut sums = EvaluationSums::new(batch.count);
        for (pixels, label) in features.chunks_exact(self.inputs).zip(labels) {
            let probabilities = self.probabilities(parameters, pixels)?;
            let of_label = probabilities[*label as usize];
            sums.loss_sum -= math::ln(f64::from(of_label.max(f32::MIN_POSITIVE)));
            let is_best = probabilities.iter().all(|other| *other <= of_label);
            sums.add("accuracy", f64::from(u8::from(is_best)));
        }
        Ok(sums)
    }
}

trainable!("softmax-regression", SoftmaxRegression::build);

#[mobula::main]
async fn main(cluster: Cluster) -> Result<(), JobError> {
    let spec = TrainSpec::from_toml(JOB, "own_model.rs")?;
    let result = train_spec(cluster, spec.clone()).await?;

    // The same job in this process alone: nothing but arithmetic.
    let workload = Workload::load(&spec, &Files::local())?;
    let mut alone = LocalTrainer::new(&workload).expect("the job fits its data");
    alone
        .run(1)
        .expect("the same steps succeeded on the cluster");
    assert_eq!(alone.state().weights_blake3(), result.weights_blake3);
    println!(
        "a model of our own reached {:.1} % with the bits of one machine",
        result.accuracy.expect("the digits have classes") * 100.0
    );
    Ok(())
}
