//! Requests, responses and the descriptions of servers and models.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::explain::Explanation;
use super::tensor::{Datatype, Tensor};

/// A value of a `parameters` object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Parameter {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// A string.
    String(String),
}

impl Parameter {
    /// The JSON form.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match self {
            Self::Bool(value) => Value::from(*value),
            Self::Int(value) => Value::from(*value),
            Self::Float(value) => Value::from(*value),
            Self::String(value) => Value::from(value.as_str()),
        }
    }

    /// The value of a JSON scalar; `None` for null, arrays and objects, which the protocol does not have here.
    #[must_use]
    pub fn from_json(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(value) => Some(Self::Bool(*value)),
            Value::Number(value) => value
                .as_i64()
                .map(Self::Int)
                .or_else(|| value.as_f64().map(Self::Float)),
            Value::String(value) => Some(Self::String(value.clone())),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        }
    }
}

/// A `parameters` object, in key order.
pub type Parameters = BTreeMap<String, Parameter>;

/// An output a client asks for by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestedOutput {
    /// The output's name.
    pub name: String,
    /// Whether it is wanted in binary form; `None` follows the request's [`InferRequest::binary_data_output`].
    pub binary_data: Option<bool>,
    /// How many classes are wanted instead of the values; `None` for the values, and never zero.
    pub classes: Option<u64>,
    /// Other parameters.
    pub parameters: Parameters,
}

/// A decoded inference request.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct InferRequest {
    /// The client's name for the request, returned with the response.
    pub id: Option<String>,
    /// Parameters of the request, without those of the binary extension.
    pub parameters: Parameters,
    /// The inputs, in the client's order.
    pub inputs: Vec<Tensor>,
    /// The outputs asked for; empty for all.
    pub outputs: Vec<RequestedOutput>,
    /// Whether outputs that do not say otherwise are wanted in binary form.
    pub binary_data_output: bool,
    /// Who asks, from the transport rather than the body: the same key is always sent to the same version
    /// while a new one is tried.
    pub routing_key: Option<String>,
    /// Whether an [`Explanation`] is wanted, from the transport as well.
    pub explain: bool,
    /// The name of the token that the caller showed, where tokens have names.
    pub token: Option<String>,
    /// The headers that decide where it goes, by their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Whether it is refused where others wait.
    pub low_priority: bool,
}

impl InferRequest {
    /// Whether an output is wanted in binary form: its own wish wins over the request's.
    #[must_use]
    pub fn wants_binary(&self, output: &str) -> bool {
        let requested = self
            .outputs
            .iter()
            .find(|requested| requested.name == output);
        requested
            .and_then(|requested| requested.binary_data)
            .unwrap_or(self.binary_data_output)
    }

    /// The input of a name.
    #[must_use]
    pub fn input(&self, name: &str) -> Option<&Tensor> {
        self.inputs.iter().find(|tensor| tensor.name() == name)
    }
}

/// The answer to an inference request.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct InferResponse {
    /// The model that answered.
    pub model_name: String,
    /// Its version.
    pub model_version: String,
    /// The id of the request, if it had one.
    pub id: Option<String>,
    /// Parameters of the response.
    pub parameters: Parameters,
    /// The outputs.
    pub outputs: Vec<Tensor>,
    /// Where it comes from and where its time went, if that was asked for; goes beside the message.
    pub explanation: Option<Explanation>,
}

/// What a server says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerMetadata {
    /// The product's name.
    pub name: String,
    /// The product's version.
    pub version: String,
    /// The protocol extensions that exist, and no others: clients act on this list.
    pub extensions: Vec<String>,
}

/// One input or output of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorMetadata {
    /// The tensor's name.
    pub name: String,
    /// The element type.
    pub datatype: Datatype,
    /// The dimensions with the batch dimension if the model batches; `-1` is any size.
    pub shape: Vec<i64>,
    /// Of an output, the names of its classes in their order; may be fewer than there are, or none.
    pub labels: Vec<String>,
}

/// What a model takes and gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelMetadata {
    /// The model's name.
    pub name: String,
    /// The versions that can be asked.
    pub versions: Vec<String>,
    /// What executes it, for example `mobula_candle`.
    pub platform: String,
    /// Rows a request may have; `0` when the first dimension is not a batch.
    pub max_batch_size: u32,
    /// The inputs.
    pub inputs: Vec<TensorMetadata>,
    /// The outputs.
    pub outputs: Vec<TensorMetadata>,
}

impl ModelMetadata {
    /// The answer to a metadata request.
    #[must_use]
    pub fn to_metadata_json(&self) -> Value {
        let tensor = |tensor: &TensorMetadata| {
            json!({
                "name": tensor.name,
                "datatype": tensor.datatype.name(),
                "shape": tensor.shape,
            })
        };
        json!({
            "name": self.name,
            "versions": self.versions,
            "platform": self.platform,
            "inputs": self.inputs.iter().map(tensor).collect::<Vec<_>>(),
            "outputs": self.outputs.iter().map(tensor).collect::<Vec<_>>(),
        })
    }

    /// The answer to a configuration request; its `dims` leave the batch dimension out.
    #[must_use]
    pub fn to_config_json(&self) -> Value {
        let batch_dimensions = usize::from(self.max_batch_size > 0);
        let tensor = |tensor: &TensorMetadata| {
            json!({
                "name": tensor.name,
                "data_type": tensor.datatype.config_name(),
                "dims": tensor.shape.get(batch_dimensions..).unwrap_or_default(),
            })
        };
        json!({
            "name": self.name,
            "platform": self.platform,
            "backend": "mobula",
            "max_batch_size": self.max_batch_size,
            "input": self.inputs.iter().map(tensor).collect::<Vec<_>>(),
            "output": self.outputs.iter().map(tensor).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digits(max_batch_size: u32) -> ModelMetadata {
        let tensor = |name: &str, width| TensorMetadata {
            name: name.to_owned(),
            datatype: Datatype::Fp32,
            shape: vec![-1, width],
            labels: Vec::new(),
        };
        ModelMetadata {
            name: "digits".to_owned(),
            versions: vec!["1".to_owned()],
            platform: "mobula_candle".to_owned(),
            max_batch_size,
            inputs: vec![tensor("pixels", 64)],
            outputs: vec![tensor("scores", 10)],
        }
    }

    #[test]
    fn configuration_leaves_the_batch_dimension_out() {
        let metadata = digits(32).to_metadata_json();
        assert_eq!(metadata["inputs"][0]["shape"], json!([-1, 64]));
        assert_eq!(metadata["inputs"][0]["datatype"], "FP32");
        let config = digits(32).to_config_json();
        assert_eq!(config["input"][0]["dims"], json!([64]));
        assert_eq!(config["output"][0]["data_type"], "TYPE_FP32");
        assert_eq!(
            digits(0).to_config_json()["input"][0]["dims"],
            json!([-1, 64])
        );
    }

    #[test]
    fn an_outputs_own_wish_wins() {
        let output = |name: &str, binary_data| RequestedOutput {
            name: name.to_owned(),
            binary_data,
            classes: None,
            parameters: Parameters::new(),
        };
        let request = InferRequest {
            outputs: vec![output("a", Some(false)), output("b", None)],
            binary_data_output: true,
            ..InferRequest::default()
        };
        assert!(!request.wants_binary("a"));
        assert!(request.wants_binary("b"));
    }
}
