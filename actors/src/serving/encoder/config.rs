//! The description of the network, as Hugging Face's transformers write it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::EncoderError;

/// The largest description: names of classes may be many.
pub(super) const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Sizes beyond this belong to no encoder that fits into a version's file; with it all products of two fit into 64 bits.
const SIZE_MAX: usize = 1 << 24;

/// What is between the two layers of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Activation {
    /// By the error function.
    #[default]
    Gelu,
    /// By the hyperbolic tangent.
    #[serde(alias = "gelu_pytorch_tanh")]
    GeluNew,
    Relu,
}

fn layer_norm_eps() -> f64 {
    1e-12
}

fn absolute() -> String {
    "absolute".to_owned()
}

/// The sizes of the network, by the names of `config.json`. What is not one of these makes no difference to its answers.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct BertConfig {
    model_type: String,
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) intermediate_size: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) type_vocab_size: usize,
    #[serde(default = "layer_norm_eps")]
    pub(super) layer_norm_eps: f64,
    #[serde(default)]
    pub(super) hidden_act: Activation,
    #[serde(default = "absolute")]
    position_embedding_type: String,
    #[serde(default)]
    is_decoder: bool,
    /// The name of each class, by its number as text.
    #[serde(default)]
    id2label: Option<BTreeMap<String, String>>,
}

impl BertConfig {
    /// Reads a description, and refuses what is no BERT encoder.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, EncoderError> {
        let refused = |reason: String| Err(EncoderError::Config(reason));
        let config: BertConfig = match serde_json::from_slice(bytes) {
            Ok(config) => config,
            Err(error) => return refused(format!("describes no encoder: {error}")),
        };
        if config.model_type != "bert" {
            return refused(format!(
                "describes a model of type {:?}, only \"bert\" is served so: export others as ONNX",
                config.model_type
            ));
        }
        if config.is_decoder {
            return refused(
                "describes a decoder, only encoders are served: export others as ONNX".to_owned(),
            );
        }
        if config.position_embedding_type != "absolute" {
            return refused(format!(
                "wants {:?} positions, only \"absolute\" ones are served so: export the model as ONNX",
                config.position_embedding_type
            ));
        }
        for (name, size) in [
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("num_attention_heads", config.num_attention_heads),
            ("intermediate_size", config.intermediate_size),
            ("max_position_embeddings", config.max_position_embeddings),
            ("type_vocab_size", config.type_vocab_size),
        ] {
            if !(1..=SIZE_MAX).contains(&size) {
                return refused(format!("says {name} = {size}, expected 1 to {SIZE_MAX}"));
            }
        }
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        if !hidden.is_multiple_of(heads) {
            return refused(format!(
                "says hidden_size = {hidden}, which {heads} attention heads do not divide"
            ));
        }
        // As a 32-bit float, which it is computed with.
        let eps = config.layer_norm_eps as f32;
        if !(eps > 0.0 && eps < 1.0) {
            return refused(format!(
                "says layer_norm_eps = {}, expected more than 1e-45 and less than 1",
                config.layer_norm_eps
            ));
        }
        Ok(config)
    }

    /// The names of so many classes, in their order; none if nobody named them.
    pub(super) fn labels(&self, classes: usize) -> Result<Vec<String>, EncoderError> {
        let Some(named) = &self.id2label else {
            return Ok(Vec::new());
        };
        let label = |class: usize| named.get(&class.to_string()).cloned();
        let labels: Option<Vec<String>> = (0..classes).map(label).collect();
        match labels {
            Some(labels) if named.len() == classes => Ok(labels),
            _ => Err(EncoderError::Config(format!(
                "names {} classes in id2label, the classifier has {classes}, numbered from 0",
                named.len()
            ))),
        }
    }
}
