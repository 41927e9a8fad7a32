//! A decoder transformer: predicts each token of a window from those before it.
//!
//! Learned embeddings of tokens and positions, then blocks of causal attention and a GELU network, each
//! behind a layer norm and added to what came in (Radford et al., 2019), then a last layer norm and a score
//! for each token; the scores' weights are the tokens' embeddings, if tied. A window's loss is the mean over
//! its tokens, in nats.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::super::data::{Batch, SampleShape, Samples};
use super::super::loss::{cross_entropy, cross_entropy_of};
use super::super::model::{ModelError, check_length};
use super::super::parameters::{Initial, Parameter, Parameters, ShardOutput};
use super::super::product::product;
use super::super::trainable::{EvaluationSums, ShardContext, Trainable};
use super::super::validation::{InvalidField, check};
use super::WIDTH_MAX;
use super::head::{most_probable, values_of};
use super::layers::{CausalAttention, Dropout, embed, gelu, layer_norm};
use super::mlp::affine;
use crate::kernels::Activation;

/// Blocks, at most: a bound on the length of a step's graph.
const BLOCKS_MAX: usize = 48;
/// Added to the variance in layer norms.
const EPSILON: f32 = 1e-5;
/// Deviation of embeddings and weights at first, as in GPT-2.
const DEVIATION: f64 = 0.02;
/// Width of the network in a block, in widths of the model.
const EXPANSION: usize = 4;

/// The shape of a transformer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformerSpec {
    /// Blocks.
    pub layers: usize,
    /// Values of a token inside.
    pub width: usize,
    /// Heads of each attention; they divide the width.
    pub heads: usize,
    /// The share of values that is dropped out in training, in [0, 1).
    #[serde(default)]
    pub dropout: f64,
    /// Whether the scores' weights are the tokens' embeddings.
    #[serde(default = "tied")]
    pub tied: bool,
}

fn tied() -> bool {
    true
}

impl TransformerSpec {
    /// Checks the sizes that are known without the data.
    pub(super) fn check(&self) -> Result<(), InvalidField> {
        check(
            "layers",
            self.layers,
            (1..=BLOCKS_MAX).contains(&self.layers),
            format!("a transformer has 1 to {BLOCKS_MAX} layers"),
            "2 learn a small text",
        )?;
        check(
            "width",
            self.width,
            (1..=WIDTH_MAX).contains(&self.width),
            format!("a width is 1 to {WIDTH_MAX}"),
            "64 suits a small text",
        )?;
        check(
            "heads",
            self.heads,
            self.heads >= 1 && self.width.is_multiple_of(self.heads),
            format!("heads divide the width ({}) into equal parts", self.width),
            "give a divisor of the width",
        )?;
        check(
            "dropout",
            self.dropout,
            (0.0..1.0).contains(&self.dropout),
            "it lies in 0 (included) to 1 (excluded)".to_owned(),
            "0.1 is usual, 0 turns it off",
        )
    }
}

/// A decoder transformer.
#[derive(Debug)]
pub(super) struct Transformer {
    spec: TransformerSpec,
    context: usize,
    vocabulary: usize,
}

impl Transformer {
    pub(super) fn new(spec: &TransformerSpec, shape: &SampleShape) -> Result<Self, ModelError> {
        let SampleShape::Tokens {
            context,
            vocabulary,
        } = *shape
        else {
            return Err(ModelError::Shape {
                model: "a transformer",
                wanted: "windows of tokens; give it a `text` data set",
                found: shape.to_string(),
            });
        };
        Ok(Transformer {
            spec: *spec,
            context,
            vocabulary,
        })
    }

    /// What the windows show, and what is to be predicted.
    fn tokens(&self, batch: &Batch) -> Result<(Vec<u32>, Vec<u32>), ModelError> {
        let Samples::Tokens { windows } = &batch.samples else {
            return Err(ModelError::shape("a transformer", "windows of tokens"));
        };
        let length = self.context + 1;
        check_length("the shard's windows", batch.count * length, windows.len())?;
        if let Some(index) = windows
            .iter()
            .position(|token| *token as usize >= self.vocabulary)
        {
            return Err(ModelError::Label {
                label: windows[index],
                index: index / length,
                high: self.vocabulary - 1,
            });
        }
        let pick = |from: usize| {
            let parts = windows.chunks_exact(length);
            parts
                .flat_map(|window| &window[from..from + self.context])
                .copied()
                .collect()
        };
        Ok((pick(0), pick(1)))
    }

    /// The scores of all tokens after each token of windows of `length`: `[windows * length, vocabulary]`.
    fn forward(
        &self,
        parameters: &Parameters,
        tokens: Vec<u32>,
        length: usize,
        context: &ShardContext,
    ) -> Result<Tensor, ModelError> {
        let windows = tokens.len() / length;
        let positions = (0..windows).flat_map(|_| 0..length as u32).collect();
        let table = parameters.tensor("token.weight")?;
        let mut values =
            (embed(table, tokens)? + embed(parameters.tensor("position.weight")?, positions)?)?;
        let drop = |values: &Tensor, layer: &str| {
            Dropout::apply(values, self.spec.dropout, layer, windows, context)
        };
        values = drop(&values, "embedding")?;
        let attention = CausalAttention {
            context: length,
            heads: self.spec.heads,
        };
        for block in 0..self.spec.layers {
            let name = |part: &str| format!("block.{block:02}.{part}");
            let normal = self.norm(parameters, &values, &name("norm.0"))?;
            let projected = dense(parameters, &normal, &name("attention.in"))?;
            let seen = attention.apply(&projected)?;
            let seen = dense(parameters, &seen, &name("attention.out"))?;
            values = (values + drop(&seen, &name("attention"))?)?;
            let normal = self.norm(parameters, &values, &name("norm.1"))?;
            let hidden = gelu(&dense(parameters, &normal, &name("mlp.in"))?)?;
            let hidden = dense(parameters, &hidden, &name("mlp.out"))?;
            values = (values + drop(&hidden, &name("mlp"))?)?;
        }
        let values = self.norm(parameters, &values, "norm")?;
        Ok(match self.spec.tied {
            true => product(&values, &table.t()?)?,
            false => product(&values, parameters.tensor("head.weight")?)?,
        })
    }

    fn norm(
        &self,
        parameters: &Parameters,
        values: &Tensor,
        layer: &str,
    ) -> Result<Tensor, ModelError> {
        let scale = parameters.tensor(&format!("{layer}.scale"))?;
        let shift = parameters.tensor(&format!("{layer}.shift"))?;
        Ok(layer_norm(values, scale, shift, EPSILON)?)
    }
}

fn weight(name: String, inputs: usize, outputs: usize, deviation: f64) -> [Parameter; 2] {
    [
        Parameter::new(
            format!("{name}.weight"),
            &[inputs, outputs],
            Initial::Normal { deviation },
        ),
        Parameter::new(format!("{name}.bias"), &[outputs], Initial::Zeros),
    ]
}

fn norm(name: String, width: usize) -> [Parameter; 2] {
    [
        Parameter::new(format!("{name}.scale"), &[width], Initial::Ones),
        Parameter::new(format!("{name}.shift"), &[width], Initial::Zeros),
    ]
}

impl Trainable for Transformer {
    fn parameters(&self) -> Vec<Parameter> {
        let width = self.spec.width;
        let normal = Initial::Normal {
            deviation: DEVIATION,
        };
        let mut parameters = vec![
            Parameter::new("token.weight", &[self.vocabulary, width], normal),
            Parameter::new("position.weight", &[self.context, width], normal),
        ];
        // What is added to the stream starts smaller the more is added.
        let added = DEVIATION / (2.0 * self.spec.layers as f64).sqrt();
        let inner = EXPANSION * width;
        for block in 0..self.spec.layers {
            let name = |part: &str| format!("block.{block:02}.{part}");
            parameters.extend(norm(name("norm.0"), width));
            parameters.extend(weight(name("attention.in"), width, 3 * width, DEVIATION));
            parameters.extend(weight(name("attention.out"), width, width, added));
            parameters.extend(norm(name("norm.1"), width));
            parameters.extend(weight(name("mlp.in"), width, inner, DEVIATION));
            parameters.extend(weight(name("mlp.out"), inner, width, added));
        }
        parameters.extend(norm("norm".to_owned(), width));
        if !self.spec.tied {
            parameters.push(Parameter::new(
                "head.weight",
                &[width, self.vocabulary],
                normal,
            ));
        }
        parameters
    }

    fn shard_gradients(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        context: &ShardContext,
    ) -> Result<ShardOutput, ModelError> {
        let (tokens, targets) = self.tokens(batch)?;
        let scores = self.forward(parameters, tokens, self.context, context)?;
        let share = 1.0 / self.context as f64;
        let loss = cross_entropy_of(&scores, &targets, share as f32)?;
        ShardOutput::from_output_gradients(
            parameters,
            &scores,
            loss.loss_sum * share,
            loss.logit_gradients,
        )
    }

    fn evaluate(
        &self,
        parameters: &Parameters,
        batch: &Batch,
    ) -> Result<EvaluationSums, ModelError> {
        let (tokens, targets) = self.tokens(batch)?;
        let scores = self.forward(
            parameters,
            tokens,
            self.context,
            &ShardContext::evaluation(),
        )?;
        let scores = values_of(&scores)?;
        let share = 1.0 / self.context as f64;
        let mut sums = EvaluationSums::new(batch.count);
        sums.loss_sum = cross_entropy(&scores, &targets, self.vocabulary).loss_sum * share;
        let rows = scores.chunks_exact(self.vocabulary).zip(&targets);
        let right = rows
            .filter(|(row, target)| most_probable(row) == **target)
            .count();
        sums.add("accuracy", right as f64 * share);
        sums.add("bits_per_token", sums.loss_sum * std::f64::consts::LOG2_E);
        Ok(sums)
    }

    fn next_scores(
        &self,
        parameters: &Parameters,
        texts: &[Vec<u32>],
    ) -> Result<Vec<f32>, ModelError> {
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        for (index, text) in texts.iter().enumerate() {
            if text.is_empty() || text.len() > self.context {
                return Err(ModelError::Length {
                    what: "a text, in tokens,",
                    expected: self.context,
                    found: text.len(),
                });
            }
            if let Some(token) = text
                .iter()
                .find(|token| **token as usize >= self.vocabulary)
            {
                return Err(ModelError::Label {
                    label: *token,
                    index,
                    high: self.vocabulary - 1,
                });
            }
        }
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        // No token sees what comes after it, so what fills a window up behind its text changes nothing.
        let filled = |text: &Vec<u32>| {
            let fill = std::iter::repeat_n(0, longest - text.len());
            text.iter().copied().chain(fill).collect::<Vec<u32>>()
        };
        let windows = texts.iter().flat_map(filled).collect();
        let scores = self.forward(parameters, windows, longest, &ShardContext::evaluation())?;
        let last = texts
            .iter()
            .enumerate()
            .map(|(window, text)| (window * longest + text.len() - 1) as u32)
            .collect::<Vec<u32>>();
        let last = Tensor::from_vec(last, texts.len(), scores.device())?;
        values_of(&scores.index_select(&last, 0)?)
    }
}

/// A dense layer without an activation.
fn dense(parameters: &Parameters, values: &Tensor, layer: &str) -> Result<Tensor, ModelError> {
    affine(parameters, values, layer, Activation::Identity)
}

#[cfg(test)]
mod tests {
    use super::super::check_gradients;
    use super::*;
    use crate::training::layout::Layout;
    use crate::training::parameters::initial_values;
    use crate::training::trainable::Mode;
    use std::sync::Arc;

    const SPEC: TransformerSpec = TransformerSpec {
        layers: 2,
        width: 8,
        heads: 2,
        dropout: 0.2,
        tied: true,
    };

    fn model(spec: TransformerSpec) -> Transformer {
        let shape = SampleShape::Tokens {
            context: 5,
            vocabulary: 11,
        };
        Transformer::new(&spec, &shape).unwrap()
    }

    fn batch(windows: Vec<u32>) -> Batch {
        Batch {
            count: windows.len() / 6,
            samples: Samples::Tokens { windows },
        }
    }

    fn parameters(model: &Transformer) -> Parameters {
        let list = model.parameters();
        let layout = Arc::new(Layout::of(&list));
        // Larger than at first, so that every part matters.
        let flat: Vec<f32> = initial_values(&list, 3).iter().map(|v| v * 8.0).collect();
        Parameters::new(layout, &flat).unwrap()
    }

    const CONTEXT: ShardContext = ShardContext {
        seed: 5,
        step: 2,
        first_sample: 40,
        mode: Mode::Training,
    };

    #[test]
    fn gradients_match_differences_of_the_loss() {
        let windows = batch((0..24).map(|index| index * 7 % 11).collect());
        for tied in [true, false] {
            check_gradients(&model(TransformerSpec { tied, ..SPEC }), &windows);
        }
    }

    #[test]
    fn no_token_sees_those_after_it() {
        let model = model(SPEC);
        let parameters = parameters(&model);
        let scores = |tokens: [u32; 5]| {
            let context = ShardContext::evaluation();
            let scores = model.forward(&parameters, tokens.to_vec(), 5, &context);
            values_of(&scores.unwrap()).unwrap()
        };
        let (first, second) = (scores([1, 2, 3, 4, 5]), scores([1, 2, 3, 9, 10]));
        assert_eq!(first[..33], second[..33]);
        assert_ne!(first[33..], second[33..]);
    }

    #[test]
    fn what_comes_after_a_text_does_not_depend_on_the_texts_beside_it() {
        let model = model(SPEC);
        let parameters = parameters(&model);
        let texts: Vec<Vec<u32>> = vec![vec![3], vec![1, 2, 3, 4, 5], vec![7, 7], vec![10, 0, 4]];
        let bits = |values: Vec<f32>| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let together = bits(model.next_scores(&parameters, &texts).unwrap());
        for (text, found) in texts.iter().zip(together.chunks_exact(11)) {
            let alone = model.next_scores(&parameters, std::slice::from_ref(text));
            assert_eq!(bits(alone.unwrap()), found, "{text:?}");
            // The last row of all that training computes for that text.
            let context = ShardContext::evaluation();
            let scores = model.forward(&parameters, text.clone(), text.len(), &context);
            let scores = values_of(&scores.unwrap()).unwrap();
            assert_eq!(
                bits(scores[scores.len() - 11..].to_vec()),
                found,
                "{text:?}"
            );
        }
        assert!(model.next_scores(&parameters, &[]).unwrap().is_empty());
        for (text, words) in [
            (vec![], "has 0 values"),
            (vec![0; 6], "has 6 values where 5"),
            (vec![11], "label 11"),
        ] {
            let error = model
                .next_scores(&parameters, &[vec![1], text])
                .unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_sample_drops_the_same_values_wherever_it_is_computed() {
        let model = model(SPEC);
        let parameters = parameters(&model);
        let windows: Vec<u32> = (0..18).map(|index| index * 5 % 11).collect();
        let loss = |windows: &[u32], first_sample| {
            let context = ShardContext {
                first_sample,
                ..CONTEXT
            };
            let output = model.shard_gradients(&parameters, &batch(windows.to_vec()), &context);
            output.unwrap().loss_sum()
        };
        let together = loss(&windows, 40);
        let apart: f64 = (0..3)
            .map(|i| loss(&windows[i * 6..][..6], 40 + i as u64))
            .sum();
        assert!((together - apart).abs() < 1e-9, "{together} {apart}");
        assert_ne!(loss(&windows, 40), loss(&windows, 41));
        let other_step = ShardContext { step: 3, ..CONTEXT };
        let output = model.shard_gradients(&parameters, &batch(windows.clone()), &other_step);
        assert_ne!(output.unwrap().loss_sum(), together);
    }

    #[test]
    fn tokens_and_windows_that_do_not_exist_are_refused() {
        let model = model(SPEC);
        let parameters = parameters(&model);
        let error = |batch: Batch| {
            let output = model.shard_gradients(&parameters, &batch, &CONTEXT);
            output.unwrap_err().to_string()
        };
        let high = error(batch(vec![0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 11]));
        assert!(
            high.contains("label 11 of sample 1 is outside 0 to 10"),
            "{high}"
        );
        let short = error(Batch {
            count: 2,
            ..batch(vec![0; 6])
        });
        assert!(short.contains("has 6 values where 12"), "{short}");
    }
}
