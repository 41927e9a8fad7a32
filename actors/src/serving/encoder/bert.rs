//! The network: BERT (Devlin et al., 2018), by the names of Hugging Face's transformers, computed by the kernels of training.
//!
//! The tokens of texts lie one after the other, so nothing is padded, and only attention knows where a text ends.

use super::EncoderError;
use super::config::{Activation, BertConfig};
use super::weights::Weights;
use crate::kernels::affine::PreparedAffine;
use crate::kernels::attention::FullAttention;
use crate::kernels::elementary::Elementary;
use crate::kernels::elementwise::add_to;
use crate::kernels::layer_norm::layer_norm_rows;
use crate::kernels::product::MatrixView;
use crate::kernels::{self, Execution};

/// A dense layer of weights as they lie in the file: outputs × inputs. Several are one layer, whose outputs are beside each other.
fn dense(
    weights: &Weights<'_>,
    names: &[String],
    inputs: usize,
    outputs: usize,
) -> Result<PreparedAffine, EncoderError> {
    let (mut weight, mut bias) = (Vec::new(), Vec::new());
    for name in names {
        weight.extend(weights.get(&format!("{name}.weight"), &[outputs, inputs])?);
        bias.extend(weights.get(&format!("{name}.bias"), &[outputs])?);
    }
    Ok(prepared(&weight, inputs, &bias))
}

/// A dense layer of outputs × inputs.
fn prepared(weight: &[f32], inputs: usize, bias: &[f32]) -> PreparedAffine {
    let weight = MatrixView::row_major(weight, bias.len(), inputs).transposed();
    PreparedAffine::new(Execution::current(), &weight, bias)
}

/// `x · weightᵀ + bias` of rows.
fn forward(layer: &PreparedAffine, rows: &[f32]) -> Vec<f32> {
    layer.forward_rows(Execution::current(), rows, kernels::Activation::Identity)
}

struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl LayerNorm {
    fn load(weights: &Weights<'_>, name: &str, config: &BertConfig) -> Result<Self, EncoderError> {
        let either = |newer: &str, older: &str| {
            let (newer, older) = (format!("{name}.{newer}"), format!("{name}.{older}"));
            weights.get_either(&newer, &older, &[config.hidden_size])
        };
        Ok(LayerNorm {
            weight: either("weight", "gamma")?,
            bias: either("bias", "beta")?,
            eps: config.layer_norm_eps as f32,
        })
    }

    fn forward(&self, rows: &[f32]) -> Vec<f32> {
        layer_norm_rows(
            Execution::current(),
            rows,
            &self.weight,
            &self.bias,
            self.eps,
        )
    }

    /// Of the sum of both.
    fn of_sum(&self, mut rows: Vec<f32>, others: &[f32]) -> Vec<f32> {
        add_to(Execution::current(), &mut rows, others);
        self.forward(&rows)
    }
}

struct Block {
    /// Queries beside keys beside values.
    projected: PreparedAffine,
    attention_output: PreparedAffine,
    attention_norm: LayerNorm,
    wide: PreparedAffine,
    narrow: PreparedAffine,
    norm: LayerNorm,
    activation: Activation,
}

impl Block {
    fn load(
        weights: &Weights<'_>,
        layer: usize,
        config: &BertConfig,
    ) -> Result<Self, EncoderError> {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let named = |part: &str| format!("encoder.layer.{layer}.{part}");
        let linear = |part: &str, inputs, outputs| dense(weights, &[named(part)], inputs, outputs);
        let norm =
            |part: &str| LayerNorm::load(weights, &named(&format!("{part}.LayerNorm")), config);
        let projected =
            ["query", "key", "value"].map(|part| named(&format!("attention.self.{part}")));
        Ok(Block {
            projected: dense(weights, &projected, hidden, hidden)?,
            attention_output: linear("attention.output.dense", hidden, hidden)?,
            attention_norm: norm("attention.output")?,
            wide: linear("intermediate.dense", hidden, wide)?,
            narrow: linear("output.dense", wide, hidden)?,
            norm: norm("output")?,
            activation: config.hidden_act,
        })
    }

    /// Of tokens × hidden.
    fn forward(&self, tokens: &[f32], attention: FullAttention<'_>) -> Vec<f32> {
        let execution = Execution::current();
        let seen = attention.compute(execution, &forward(&self.projected, tokens));
        let attended = forward(&self.attention_output, &seen);
        let attended = self.attention_norm.of_sum(attended, tokens);
        let wide = match self.activation {
            Activation::Relu => {
                self.wide
                    .forward_rows(execution, &attended, kernels::Activation::Relu)
            }
            Activation::Gelu => self.wide_activated(Elementary::GeluErf, &attended),
            Activation::GeluNew => self.wide_activated(Elementary::Gelu, &attended),
        };
        self.norm.of_sum(forward(&self.narrow, &wide), &attended)
    }

    fn wide_activated(&self, function: Elementary, rows: &[f32]) -> Vec<f32> {
        let mut wide = forward(&self.wide, rows);
        function.apply(Execution::current(), &mut wide);
        wide
    }
}

/// What turns the first token into a class.
struct Head {
    pooler: PreparedAffine,
    classifier: PreparedAffine,
}

impl Head {
    /// That of the file, if it has one.
    fn load(weights: &Weights<'_>, config: &BertConfig) -> Result<Option<Self>, EncoderError> {
        let hidden = config.hidden_size;
        let Some(shape) = weights.shape_of("classifier.weight") else {
            return Ok(None);
        };
        let classes = shape.first().copied().unwrap_or(0);
        if classes == 0 {
            return Err(EncoderError::Tensor {
                name: "classifier.weight".to_owned(),
                reason: format!("has the shape {shape:?}, which is of no class"),
            });
        }
        let weight = weights.exact("classifier.weight", &[classes, hidden])?;
        let bias = weights.exact("classifier.bias", &[classes])?;
        Ok(Some(Head {
            pooler: dense(weights, &["pooler.dense".to_owned()], hidden, hidden)?,
            classifier: prepared(&weight, hidden, &bias),
        }))
    }

    /// Of rows × hidden.
    fn forward(&self, first: &[f32]) -> Vec<f32> {
        let mut pooled = forward(&self.pooler, first);
        Elementary::Tanh.apply(Execution::current(), &mut pooled);
        forward(&self.classifier, &pooled)
    }
}

/// A table of embeddings: a row for each number.
struct EmbeddingTable {
    values: Vec<f32>,
    width: usize,
}

impl EmbeddingTable {
    fn load(
        weights: &Weights<'_>,
        name: &str,
        rows: usize,
        width: usize,
    ) -> Result<Self, EncoderError> {
        let tensor = format!("embeddings.{name}_embeddings.weight");
        Ok(EmbeddingTable {
            values: weights.get(&tensor, &[rows, width])?,
            width,
        })
    }

    /// # Panics
    /// If there is no such row: tokenizers were checked against the tables, and lengths against the positions.
    fn row(&self, number: usize) -> &[f32] {
        &self.values[number * self.width..][..self.width]
    }
}

/// The tokens of texts, one text after the other.
#[derive(Default)]
pub(super) struct Texts {
    /// The number of each token.
    pub(super) ids: Vec<u32>,
    /// Which of the parts of its text each belongs to.
    pub(super) type_ids: Vec<u32>,
    /// How many tokens each text has; at least one.
    pub(super) lengths: Vec<usize>,
}

/// What the network gives for texts.
pub(super) struct Encoded {
    /// Texts × hidden.
    pub(super) embeddings: Vec<f32>,
    /// Texts × classes, if there is a head.
    pub(super) logits: Option<Vec<f32>>,
}

/// The network with its weights.
pub(super) struct Bert {
    words: EmbeddingTable,
    positions: EmbeddingTable,
    types: EmbeddingTable,
    norm: LayerNorm,
    blocks: Vec<Block>,
    head: Option<Head>,
    heads: usize,
}

impl Bert {
    pub(super) fn load(weights: &Weights<'_>, config: &BertConfig) -> Result<Self, EncoderError> {
        let table = |name, rows| EmbeddingTable::load(weights, name, rows, config.hidden_size);
        let layers = 0..config.num_hidden_layers;
        let blocks: Result<_, _> = layers
            .map(|layer| Block::load(weights, layer, config))
            .collect();
        Ok(Bert {
            words: table("word", config.vocab_size)?,
            positions: table("position", config.max_position_embeddings)?,
            types: table("token_type", config.type_vocab_size)?,
            norm: LayerNorm::load(weights, "embeddings.LayerNorm", config)?,
            blocks: blocks?,
            head: Head::load(weights, config)?,
            heads: config.num_attention_heads,
        })
    }

    /// The classes of its head, if it has one.
    pub(super) fn classes(&self) -> Option<usize> {
        self.head.as_ref().map(|head| head.classifier.outputs())
    }

    /// Computes texts. The bits of one do not depend on the others.
    ///
    /// # Panics
    /// If a text has no token, or the parts of the texts do not fit each other or the network.
    pub(super) fn encode(&self, texts: &Texts) -> Encoded {
        assert!(
            texts.lengths.iter().all(|length| *length > 0),
            "texts have tokens"
        );
        assert_eq!(
            texts.ids.len(),
            texts.type_ids.len(),
            "a type for each token"
        );
        let hidden = self.words.width;
        let attention = FullAttention {
            lengths: &texts.lengths,
            heads: self.heads,
            size: hidden / self.heads,
        };
        let mut computed = self.norm.forward(&self.embedded(texts));
        for block in &self.blocks {
            computed = block.forward(&computed, attention);
        }
        let mut embeddings = Vec::with_capacity(texts.lengths.len() * hidden);
        let mut first = Vec::with_capacity(embeddings.capacity());
        let mut rest = computed.as_slice();
        for length in &texts.lengths {
            let (text, behind) = rest.split_at(length * hidden);
            first.extend_from_slice(&text[..hidden]);
            embeddings.extend(mean(text, hidden));
            rest = behind;
        }
        Encoded {
            embeddings,
            logits: self.head.as_ref().map(|head| head.forward(&first)),
        }
    }

    /// The sum of the embeddings of each token, tokens × hidden.
    fn embedded(&self, texts: &Texts) -> Vec<f32> {
        let mut embedded = Vec::with_capacity(texts.ids.len() * self.words.width);
        let positions = texts.lengths.iter().flat_map(|length| 0..*length);
        for ((id, type_id), position) in texts.ids.iter().zip(&texts.type_ids).zip(positions) {
            let word = self.words.row(*id as usize);
            let kind = self.types.row(*type_id as usize);
            let place = self.positions.row(position);
            let sums = word.iter().zip(kind).zip(place);
            embedded.extend(sums.map(|((word, kind), place)| word + kind + place));
        }
        embedded
    }
}

/// The mean of rows.
fn mean(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    for row in rows.chunks_exact(width) {
        add_to(Execution::current(), &mut sums, row);
    }
    let count = (rows.len() / width) as f32;
    sums.iter_mut().for_each(|sum| *sum /= count);
    sums
}
