//! The networks that come along, and the description by which a job names one.
//!
//! * `mlp`, `cnn`, `transformer`: one file a network; `layers`: what they are made of; `head`: from a
//!   network's outputs to a loss.
//!
//! Invariants:
//! 1. A description that [`ModelSpec::check`] accepts has bounded layers; [`ModelSpec::build`] refuses
//!    samples that the network cannot take, and more than [`PARAMETERS_MAX`] parameters, before anything
//!    is allocated for them.
//! 2. A shard's gradients depend only on (parameters, the shard's samples, its context): products are
//!    fixed-order, the rest are single-threaded elementwise operations.

use std::collections::BTreeSet;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::data::SampleShape;
use super::model::ModelError;
use super::parameters::Parameter;
use super::trainable::{self, Trainable};
use super::validation::{InvalidField, PARAMETERS_MAX, check};

mod cnn;
mod head;
pub(crate) mod layers;
mod mlp;
mod transformer;

#[cfg(test)]
mod gradient_check;

#[cfg(test)]
pub(super) use gradient_check::check_gradients;
use head::Headed;
pub(super) use head::most_probable;
pub use transformer::TransformerSpec;

/// Hidden or convolution layers of a model, at most; also keeps names of one digit in sorted order.
pub const LAYERS_MAX: usize = 8;
/// Units or channels of a layer, at most: one layer pair is then at most 16 Mi parameters.
pub const WIDTH_MAX: usize = 4096;
/// Bytes of a user's own model's configuration: it is part of the job's description, which every
/// trainer's constructor carries through the head's log.
pub const CONFIG_BYTES_MAX: usize = 16 << 10;
/// Characters of a parameter's name, at most.
const PARAMETER_NAME_MAX: usize = 128;

/// Which network to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ModelSpec {
    /// Dense layers with rectifiers between them, over all numbers of a sample.
    Mlp {
        /// Units of each hidden layer.
        hidden: Vec<usize>,
    },
    /// 3×3 convolutions with rectifiers over samples of `[height, width]` or `[height, width,
    /// channels]`, the first at full size, each further one at half the side of the one before; then
    /// one dense layer.
    Cnn {
        /// Channels of each convolution.
        channels: Vec<usize>,
    },
    /// A decoder transformer over windows of tokens.
    Transformer(TransformerSpec),
    /// A model of the job's own program.
    Custom {
        /// The name under which it is registered.
        name: String,
        /// What is handed to its constructor.
        #[serde(default)]
        config: ModelConfig,
    },
}

impl ModelSpec {
    /// Checks the number and width of its layers. Nothing may be computed from a description that was
    /// not checked.
    pub fn check(&self) -> Result<(), InvalidField> {
        let (key, widths, layers_min) = match self {
            ModelSpec::Mlp { hidden } => ("hidden", hidden, 0),
            ModelSpec::Cnn { channels } => ("channels", channels, 1),
            ModelSpec::Transformer(spec) => return spec.check(),
            ModelSpec::Custom { name, config } => return check_custom(name, config),
        };
        check(
            key,
            format!("{widths:?}"),
            (layers_min..=LAYERS_MAX).contains(&widths.len())
                && widths.iter().all(|width| (1..=WIDTH_MAX).contains(width)),
            format!("{layers_min} to {LAYERS_MAX} layers of 1 to {WIDTH_MAX}"),
            "give fewer or narrower layers",
        )
    }

    /// The network for samples of `shape`, both of which were checked.
    pub fn build(&self, shape: &SampleShape) -> Result<Box<dyn Trainable>, ModelError> {
        let model: Box<dyn Trainable> = match self {
            ModelSpec::Mlp { hidden } => Box::new(Headed(mlp::Mlp::new(hidden, shape)?)),
            ModelSpec::Cnn { channels } => Box::new(Headed(cnn::Cnn::new(channels, shape)?)),
            ModelSpec::Transformer(spec) => Box::new(transformer::Transformer::new(spec, shape)?),
            ModelSpec::Custom { name, config } => trainable::construct(name, config, shape)?,
        };
        check_parameters(&model.parameters())?;
        Ok(model)
    }

    /// What kind of network it is, in one word.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            ModelSpec::Mlp { .. } => "mlp",
            ModelSpec::Cnn { .. } => "cnn",
            ModelSpec::Transformer(_) => "transformer",
            ModelSpec::Custom { name, .. } => name,
        }
    }
}

fn check_custom(name: &str, config: &ModelConfig) -> Result<(), InvalidField> {
    check(
        "name",
        name,
        (1..=PARAMETER_NAME_MAX).contains(&name.len()),
        format!("a model's name has 1 to {PARAMETER_NAME_MAX} characters"),
        "give the name under which your program registers the model",
    )?;
    check(
        "config",
        format!("{} bytes", config.0.len()),
        config.0.len() <= CONFIG_BYTES_MAX,
        format!("a model's configuration has at most {CONFIG_BYTES_MAX} bytes"),
        "keep what is large in a file that is shipped with the job",
    )
}

/// Refuses parameters that cannot be laid out, or too many of them.
fn check_parameters(parameters: &[Parameter]) -> Result<(), ModelError> {
    let mut names = BTreeSet::new();
    let mut total = 0usize;
    for parameter in parameters {
        let bad = |reason: String| ModelError::Parameter {
            name: parameter.name.clone(),
            reason,
        };
        if !(1..=PARAMETER_NAME_MAX).contains(&parameter.name.len()) {
            return Err(bad(format!("a name has 1 to {PARAMETER_NAME_MAX} bytes")));
        }
        if !names.insert(parameter.name.as_str()) {
            return Err(bad("two parameters have that name".to_owned()));
        }
        let values = parameter
            .shape
            .iter()
            .try_fold(1usize, |product, side| product.checked_mul(*side))
            .filter(|values| *values > 0);
        total = values
            .and_then(|values| total.checked_add(values))
            .filter(|total| *total <= PARAMETERS_MAX)
            .ok_or_else(|| {
                bad(format!(
                    "with its shape {:?} the model has no or more than {PARAMETERS_MAX} values; \
                     give fewer or narrower layers",
                    parameter.shape
                ))
            })?;
    }
    if parameters.is_empty() {
        return Err(ModelError::Parameter {
            name: "-".to_owned(),
            reason: "a model needs at least one parameter".to_owned(),
        });
    }
    Ok(())
}

/// What a user's own model is told: any TOML or JSON value, kept as JSON with sorted keys so that equal
/// configurations have equal fingerprints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelConfig(String);

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig("{}".to_owned())
    }
}

impl ModelConfig {
    /// The configuration with the values of `config`.
    pub fn of(config: &impl Serialize) -> Result<Self, serde_json::Error> {
        Ok(Self::from_value(serde_json::to_value(config)?))
    }

    fn from_value(value: Value) -> Self {
        ModelConfig(sorted(value).to_string())
    }

    /// The JSON text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The values, as the model wants them; `model` is its name, for the error.
    pub fn parse<T: DeserializeOwned>(&self, model: &str) -> Result<T, ModelError> {
        serde_json::from_str(&self.0).map_err(|error| ModelError::Config {
            model: model.to_owned(),
            reason: error.to_string(),
        })
    }
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().map(|(k, v)| (k, sorted(v))).collect())
        }
        plain => plain,
    }
}

impl Serialize for ModelConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return serializer.serialize_str(&self.0);
        }
        let value: Value = serde_json::from_str(&self.0).map_err(serde::ser::Error::custom)?;
        value.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ModelConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return Ok(Self::from_value(Value::deserialize(deserializer)?));
        }
        let text = String::deserialize(deserializer)?;
        serde_json::from_str::<Value>(&text).map_err(D::Error::custom)?;
        Ok(ModelConfig(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::codec;

    #[test]
    fn a_configuration_is_the_same_in_toml_json_and_binary() {
        let text = "[custom]\nname = \"mine\"\n[custom.config]\nzeta = 1\nalpha = [2.5, 3]\n";
        let spec: ModelSpec = toml::from_str(text).unwrap();
        let ModelSpec::Custom { config, .. } = &spec else {
            panic!("{spec:?}")
        };
        assert_eq!(config.as_str(), "{\"alpha\":[2.5,3],\"zeta\":1}");
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<ModelSpec>(&json).unwrap(), spec);
        let bytes = codec::encode_plain(&spec);
        assert_eq!(codec::decode::<ModelSpec>(&bytes, 1024).unwrap(), spec);
        let none: ModelSpec = toml::from_str("[custom]\nname = \"mine\"\n").unwrap();
        let ModelSpec::Custom { config, .. } = &none else {
            panic!("{none:?}")
        };
        let error = config.parse::<(u32, u32)>("mine").unwrap_err().to_string();
        assert!(error.starts_with("the configuration of mine"), "{error}");
    }

    #[test]
    fn what_cannot_be_built_says_why() {
        let digits = SampleShape::Classified {
            features: vec![8, 8],
            classes: 10,
        };
        let unknown = ModelSpec::Custom {
            name: "nobody".into(),
            config: ModelConfig::default(),
        };
        let error = unknown.build(&digits).unwrap_err().to_string();
        assert!(error.contains("no model is called nobody"), "{error}");
        let flat = SampleShape::Classified {
            features: vec![64],
            classes: 10,
        };
        let cnn = ModelSpec::Cnn { channels: vec![4] };
        let error = cnn.build(&flat).unwrap_err().to_string();
        assert!(error.contains("[height, width]"), "{error}");
        let text = SampleShape::Tokens {
            context: 8,
            vocabulary: 256,
        };
        let mlp = ModelSpec::Mlp { hidden: vec![4] };
        let error = mlp.build(&text).unwrap_err().to_string();
        assert!(error.contains("windows of 8 tokens"), "{error}");
        let wide = SampleShape::Classified {
            features: vec![1 << 20],
            classes: 10,
        };
        let mlp = ModelSpec::Mlp { hidden: vec![4096] };
        let error = mlp.build(&wide).unwrap_err().to_string();
        assert!(error.contains("more than 67108864 values"), "{error}");
    }
}
