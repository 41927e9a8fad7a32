//! The network: BERT (Devlin et al., 2018), by the names of Hugging Face's transformers.

use candle_core::{D, Tensor};

use super::EncoderError;
use super::config::{Activation, BertConfig};
use super::weights::Weights;

type Computed = candle_core::Result<Tensor>;

/// `x · weightᵀ + bias`
struct Linear {
    /// As it lies in the file: outputs × inputs.
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn load(
        weights: &Weights<'_>,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<Self, EncoderError> {
        Ok(Linear {
            weight: weights.get(&format!("{name}.weight"), &[outputs, inputs])?,
            bias: weights.get(&format!("{name}.bias"), &[outputs])?,
        })
    }

    /// Of rows: tokens × inputs.
    fn forward(&self, rows: &Tensor) -> Computed {
        rows.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)
    }
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
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
            eps: config.layer_norm_eps,
        })
    }

    fn forward(&self, rows: &Tensor) -> Computed {
        let centred = rows.broadcast_sub(&rows.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let scaled = centred.broadcast_div(&(variance + self.eps)?.sqrt()?)?;
        scaled
            .broadcast_mul(&self.weight)?
            .broadcast_add(&self.bias)
    }
}

/// Rows of equal length, one after the other.
#[derive(Clone, Copy)]
struct Layout {
    rows: usize,
    length: usize,
    heads: usize,
}

struct Block {
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    attended_norm: LayerNorm,
    wide: Linear,
    narrow: Linear,
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
        let linear = |name: &str, inputs, outputs| {
            let name = format!("encoder.layer.{layer}.{name}");
            Linear::load(weights, &name, inputs, outputs)
        };
        let norm = |name: &str| {
            let name = format!("encoder.layer.{layer}.{name}.LayerNorm");
            LayerNorm::load(weights, &name, config)
        };
        Ok(Block {
            query: linear("attention.self.query", hidden, hidden)?,
            key: linear("attention.self.key", hidden, hidden)?,
            value: linear("attention.self.value", hidden, hidden)?,
            attended: linear("attention.output.dense", hidden, hidden)?,
            attended_norm: norm("attention.output")?,
            wide: linear("intermediate.dense", hidden, wide)?,
            narrow: linear("output.dense", wide, hidden)?,
            norm: norm("output")?,
            activation: config.hidden_act,
        })
    }

    /// Of tokens × hidden; `penalty` is added to the scores of each row: 0 for a token, minus infinity for none.
    fn forward(&self, tokens: &Tensor, penalty: &Tensor, layout: Layout) -> Computed {
        let attended = self.attention(tokens, penalty, layout)?;
        let attended = (self.attended.forward(&attended)? + tokens)?;
        let attended = self.attended_norm.forward(&attended)?;
        let wide = self.wide.forward(&attended)?;
        let wide = match self.activation {
            Activation::Gelu => wide.gelu_erf()?,
            Activation::GeluNew => wide.gelu()?,
            Activation::Relu => wide.relu()?,
        };
        self.norm
            .forward(&(self.narrow.forward(&wide)? + attended)?)
    }

    fn attention(&self, tokens: &Tensor, penalty: &Tensor, layout: Layout) -> Computed {
        let Layout {
            rows,
            length,
            heads,
        } = layout;
        let size = tokens.dim(1)? / heads;
        let by_head = |tensor: Tensor| {
            let tensor = tensor.reshape((rows, length, heads, size))?;
            tensor.transpose(1, 2)?.contiguous()
        };
        let query = by_head(self.query.forward(tokens)?)?;
        let key = by_head(self.key.forward(tokens)?)?;
        let value = by_head(self.value.forward(tokens)?)?;
        let scores = (query.matmul(&key.t()?)? * (1.0 / (size as f64).sqrt()))?;
        let mixed = softmax(&scores.broadcast_add(penalty)?)?.matmul(&value)?;
        mixed
            .transpose(1, 2)?
            .reshape((rows * length, heads * size))
    }
}

/// Over the last dimension, of which one value at least is finite.
fn softmax(scores: &Tensor) -> Computed {
    let largest = scores.max_keepdim(D::Minus1)?;
    let powers = scores.broadcast_sub(&largest)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

/// What turns the first token into a class.
struct Head {
    pooler: Linear,
    classifier: Linear,
    classes: usize,
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
        let classifier = Linear {
            weight: weights.exact("classifier.weight", &[classes, hidden])?,
            bias: weights.exact("classifier.bias", &[classes])?,
        };
        let pooler = Linear::load(weights, "pooler.dense", hidden, hidden)?;
        Ok(Some(Head {
            pooler,
            classifier,
            classes,
        }))
    }

    /// Of rows × hidden.
    fn forward(&self, first: &Tensor) -> Computed {
        let pooled = self.pooler.forward(first)?.tanh()?;
        self.classifier.forward(&pooled)
    }
}

/// The tokens of rows that are computed at once, each padded to the same length.
pub(super) struct Padded {
    /// Numbers of tokens, row by row; 0 where there is none.
    pub(super) ids: Vec<u32>,
    /// Which of the parts of a text each belongs to.
    pub(super) type_ids: Vec<u32>,
    /// How many tokens each row has; at least one.
    pub(super) counts: Vec<usize>,
    /// The length.
    pub(super) length: usize,
}

/// What the network gives for rows.
pub(super) struct Encoded {
    /// Rows × hidden.
    pub(super) embeddings: Vec<f32>,
    /// Rows × classes, if there is a head.
    pub(super) logits: Option<Vec<f32>>,
}

/// The network with its weights.
pub(super) struct Bert {
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    norm: LayerNorm,
    blocks: Vec<Block>,
    head: Option<Head>,
    heads: usize,
}

impl Bert {
    pub(super) fn load(weights: &Weights<'_>, config: &BertConfig) -> Result<Self, EncoderError> {
        let table = |name: &str, rows: usize| {
            let name = format!("embeddings.{name}_embeddings.weight");
            weights.get(&name, &[rows, config.hidden_size])
        };
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
        self.head.as_ref().map(|head| head.classes)
    }

    /// Computes rows. What a row is padded with and which rows are beside it changes its answer only by the rounding of sums.
    pub(super) fn encode(&self, padded: &Padded) -> candle_core::Result<Encoded> {
        let device = self.words.device();
        let (rows, length) = (padded.counts.len(), padded.length);
        let tokens = |ids: &[u32]| Tensor::from_slice(ids, rows * length, device);
        let masked = |token: f32, none: f32| {
            let mut mask = vec![none; rows * length];
            for (row, count) in mask.chunks_exact_mut(length).zip(&padded.counts) {
                row[..*count].fill(token);
            }
            mask
        };
        let penalty = masked(0.0, f32::NEG_INFINITY);
        let penalty = Tensor::from_vec(penalty, (rows, 1, 1, length), device)?;
        let is_token = Tensor::from_vec(masked(1.0, 0.0), (rows, length, 1), device)?;
        let counts: Vec<f32> = padded.counts.iter().map(|count| *count as f32).collect();
        let counts = Tensor::from_vec(counts, (rows, 1), device)?;

        let words = self.words.index_select(&tokens(&padded.ids)?, 0)?;
        let types = self.types.index_select(&tokens(&padded.type_ids)?, 0)?;
        let hidden = words.dim(1)?;
        let embedded = (words + types)?.reshape((rows, length, hidden))?;
        let embedded = embedded.broadcast_add(&self.positions.narrow(0, 0, length)?)?;
        let mut computed = self
            .norm
            .forward(&embedded.reshape((rows * length, hidden))?)?;
        let layout = Layout {
            rows,
            length,
            heads: self.heads,
        };
        for block in &self.blocks {
            computed = block.forward(&computed, &penalty, layout)?;
        }
        let computed = computed.reshape((rows, length, hidden))?;
        let first = computed.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        let sums = computed.broadcast_mul(&is_token)?.sum(1)?;
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let logits = self.head.as_ref().map(|head| head.forward(&first));
        Ok(Encoded {
            embeddings: values(&sums.broadcast_div(&counts)?)?,
            logits: logits.transpose()?.as_ref().map(values).transpose()?,
        })
    }
}
