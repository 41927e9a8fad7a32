//! Steps of decoder transformers: the model that jobs train, with AdamW on its flat parameters.

use std::sync::Arc;

use mobula_actors::kernels::Execution;
use mobula_actors::training::data::{Batch, SampleShape, Samples};
use mobula_actors::training::layout::Layout;
use mobula_actors::training::models::ModelSpec;
use mobula_actors::training::parameters::{Parameters, initial_values};
use mobula_actors::training::random::{Purpose, Stream};
use mobula_actors::training::trainable::{Mode, ShardContext, Trainable};
use mobula_benches::results::Results;
use serde_json::{Value, json};

use crate::exchange::{f32_bytes, leave, u32_bytes};
use crate::network::adamw;
use crate::steps::{BATCHES, COMPARED_STEPS, StepResult, report, same_curve, timed};
use crate::{Options, Outcome, thread_counts};

/// Tokens that are told apart, as many as a text of letters has.
const VOCABULARY: usize = 96;

/// What is trained.
#[derive(Debug, Clone, Copy)]
struct Description {
    name: &'static str,
    layers: usize,
    width: usize,
    heads: usize,
    context: usize,
    /// Windows of a batch.
    windows: usize,
}

const DESCRIPTIONS: [Description; 2] = [
    Description {
        name: "transformer, 2 layers of 128, 4 heads, 16 windows of 64",
        layers: 2,
        width: 128,
        heads: 4,
        context: 64,
        windows: 16,
    },
    Description {
        name: "transformer, 4 layers of 256, 8 heads, 8 windows of 128",
        layers: 4,
        width: 256,
        heads: 8,
        context: 128,
        windows: 8,
    },
];

impl Description {
    fn model(&self) -> StepResult<Box<dyn Trainable>> {
        let spec: ModelSpec = serde_json::from_value(json!({ "transformer": {
            "layers": self.layers, "width": self.width, "heads": self.heads,
        }}))?;
        Ok(spec.build(&SampleShape::Tokens {
            context: self.context,
            vocabulary: VOCABULARY,
        })?)
    }

    /// Multiplications and additions of a step: two for each weight and token forward, twice as many backward; and
    /// those of attention, which sees half of the window in the mean.
    fn operations(&self) -> f64 {
        let weights = self.layers * 12 * self.width * self.width + VOCABULARY * self.width;
        let seen = (self.context + 1) as f64 / 2.0;
        let attention = 12.0 * seen * (self.layers * self.width) as f64;
        let tokens = (self.windows * self.context) as f64;
        tokens * (6.0 * weights as f64 + attention)
    }

    /// Windows in which each token follows from the one before it, but for two bits by lot.
    fn batches(&self) -> Vec<Batch> {
        let window = |batch: usize, window: usize| {
            let number = (batch * self.windows + window) as u64;
            let stream = Stream::new(3, Purpose::Initialise, self.name, number);
            let draw = |at: u64| stream.bits(at, 0);
            let first = draw(0) % VOCABULARY as u64;
            let next = move |token: &u64, at: u64| (token * 5 + draw(at) % 4) % VOCABULARY as u64;
            let mut tokens = vec![first];
            for at in 1..=self.context as u64 {
                tokens.extend(tokens.last().map(|token| next(token, at)));
            }
            tokens.into_iter().map(|token| token as u32)
        };
        let batch = |batch| Batch {
            count: self.windows,
            samples: Samples::Tokens {
                windows: (0..self.windows).flat_map(|at| window(batch, at)).collect(),
            },
        };
        (0..BATCHES).map(batch).collect()
    }
}

/// A transformer with its state.
struct Learner {
    model: Box<dyn Trainable>,
    parameters: Parameters,
    flat: Vec<f32>,
    means: Vec<f32>,
    squares: Vec<f32>,
    step: u64,
}

impl Learner {
    fn new(description: &Description) -> StepResult<Self> {
        let model = description.model()?;
        let list = model.parameters();
        let flat = initial_values(&list, 1);
        let parameters = Parameters::new(Arc::new(Layout::of(&list)), &flat)?;
        let zeros = vec![0.0; flat.len()];
        Ok(Learner {
            model,
            parameters,
            flat,
            means: zeros.clone(),
            squares: zeros,
            step: 0,
        })
    }

    /// Forward, backward and AdamW; the mean loss before the update.
    fn step(&mut self, batch: &Batch) -> StepResult<f64> {
        let context = ShardContext {
            seed: 1,
            step: self.step,
            first_sample: 0,
            mode: Mode::Training,
        };
        let output = self
            .model
            .shard_gradients(&self.parameters, batch, &context)?;
        self.step += 1;
        adamw(self.step, batch.count).apply(
            Execution::current(),
            &mut self.flat,
            &mut self.means,
            &mut self.squares,
            output.gradients(),
        );
        self.parameters.load(&self.flat)?;
        Ok(output.loss_sum() / batch.count as f64)
    }
}

pub(crate) fn measure(options: &Options, results: &mut Results) -> Outcome {
    for description in &DESCRIPTIONS {
        let name = description.name;
        if !options.wants(name) {
            continue;
        }
        let batches = description.batches();
        let mut curves: Vec<Vec<f64>> = Vec::new();
        for threads in thread_counts() {
            let execution = Execution::current().with_threads(threads);
            let samples = execution.run(|| {
                let mut learner = Learner::new(description)?;
                timed(options, |turn| learner.step(&batches[turn % BATCHES]))
            })?;
            report(
                results,
                name,
                description.operations(),
                threads.get(),
                &samples,
            );
            if options.exchange.is_some() {
                curves.push(execution.run(|| curve(description, &batches))?);
            }
        }
        if let Some(folder) = &options.exchange {
            same_curve(name, &curves)?;
            let learner = Learner::new(description)?;
            let files = [
                ("params", f32_bytes(&learner.flat)),
                ("samples", u32_bytes(&tokens(&batches))),
            ];
            let document = described(description, &learner.parameters);
            leave(folder, name, document, &curves[0], &files)?;
        }
    }
    Ok(())
}

/// The losses of the first steps from the first values.
fn curve(description: &Description, batches: &[Batch]) -> StepResult<Vec<f64>> {
    let mut learner = Learner::new(description)?;
    (0..COMPARED_STEPS)
        .map(|step| learner.step(&batches[step % BATCHES]))
        .collect()
}

fn tokens(batches: &[Batch]) -> Vec<u32> {
    let windows = batches.iter().map(|batch| match &batch.samples {
        Samples::Tokens { windows } => windows.as_slice(),
        Samples::Classified { .. } | Samples::Measured { .. } => &[],
    });
    windows.flatten().copied().collect()
}

fn described(description: &Description, parameters: &Parameters) -> Value {
    let slots = parameters.layout().slots.iter();
    let slots: Vec<Value> = slots
        .map(|slot| json!({ "name": slot.name, "shape": slot.shape, "offset": slot.offset }))
        .collect();
    json!({
        "transformer": { "layers": description.layers, "heads": description.heads },
        "slots": slots,
        "batch": description.windows,
        "batches": BATCHES,
        "context": description.context,
    })
}
