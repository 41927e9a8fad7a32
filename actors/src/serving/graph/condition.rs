//! Whether a node runs.

use mobula_core::error::Rejection;
use serde::{Deserialize, Serialize};

use super::spec::Source;
use crate::serving::oip::{Parameter, Parameters, TensorData};

/// The longest text that is compared with, in bytes.
const TEXT_BYTES_MAX: usize = 256;

/// How two values must compare. Append-only: positions are tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Comparison {
    /// The same.
    Equal,
    /// Not the same.
    NotEqual,
    /// Less; of numbers only, like the others below.
    Below,
    /// Less, or the same.
    AtMost,
    /// More.
    Above,
    /// More, or the same.
    AtLeast,
}

/// What is compared with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Constant {
    /// True or false.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
}

/// Of how many elements of a tensor it must be so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Elements {
    /// One at least.
    #[default]
    Any,
    /// Each.
    All,
}

/// What is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operand {
    /// A parameter of the request; one that it does not have compares with nothing.
    Parameter(String),
    /// An output of a node, or an input of the request; of a node that has not run nothing is true.
    Tensor(Source),
}

/// A node runs when this is so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    /// What is looked at.
    pub operand: Operand,
    /// How it must compare.
    pub is: Comparison,
    /// With what.
    pub value: Constant,
    /// Of how many elements.
    pub elements: Elements,
}

/// A condition as a graph's file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConditionFile {
    output: Option<String>,
    parameter: Option<String>,
    is: Comparison,
    value: toml::Value,
    #[serde(default)]
    elements: Elements,
}

impl TryFrom<ConditionFile> for Condition {
    type Error = String;

    fn try_from(file: ConditionFile) -> Result<Self, String> {
        let operand = match (file.output, file.parameter) {
            (Some(output), None) => Operand::Tensor(Source::parse(&output)?),
            (None, Some(parameter)) => Operand::Parameter(parameter),
            _ => return Err("a condition names either an `output` or a `parameter`".to_owned()),
        };
        let value = match file.value {
            toml::Value::Boolean(value) => Constant::Bool(value),
            toml::Value::Integer(value) => Constant::Number(value as f64),
            toml::Value::Float(value) => Constant::Number(value),
            toml::Value::String(value) => Constant::Text(value),
            other => {
                return Err(format!(
                    "a condition compares with a number, a text, true or false, not with {other}"
                ));
            }
        };
        Ok(Condition {
            operand,
            is: file.is,
            value,
            elements: file.elements,
        })
    }
}

impl Condition {
    /// The node that it waits for.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        match &self.operand {
            Operand::Parameter(_) => None,
            Operand::Tensor(source) => source.node(),
        }
    }

    /// Refuses what can never be so; `node` has it.
    pub fn check(&self, node: &str) -> Result<(), Rejection> {
        let is_order = !matches!(self.is, Comparison::Equal | Comparison::NotEqual);
        let problem = match &self.value {
            Constant::Number(number) if !number.is_finite() => "a number that is none",
            Constant::Text(text) if text.len() > TEXT_BYTES_MAX => "a text of more than 256 bytes",
            Constant::Text(_) | Constant::Bool(_) if is_order => {
                "the order of something that is no number"
            }
            _ => return Ok(()),
        };
        Err(Rejection::invalid(format!(
            "the condition of node `{node}` looks at {problem}: compare with a finite number, or whether a short text \
             is equal"
        )))
    }

    /// Whether it is so, for a tensor that was looked up.
    #[must_use]
    pub fn holds_for(&self, tensor: &TensorData) -> bool {
        let number = |value: f64| self.compare_number(value);
        match tensor {
            TensorData::Bool(values) => self.of(values, |value| self.compare_bool(*value)),
            TensorData::Uint8(values) => self.of(values, |value| number(f64::from(*value))),
            TensorData::Uint16(values) => self.of(values, |value| number(f64::from(*value))),
            TensorData::Uint32(values) => self.of(values, |value| number(f64::from(*value))),
            // Beyond 2^53 neighbours are one: nobody draws a line between them.
            TensorData::Uint64(values) => self.of(values, |value| number(*value as f64)),
            TensorData::Int8(values) => self.of(values, |value| number(f64::from(*value))),
            TensorData::Int16(values) => self.of(values, |value| number(f64::from(*value))),
            TensorData::Int32(values) => self.of(values, |value| number(f64::from(*value))),
            TensorData::Int64(values) => self.of(values, |value| number(*value as f64)),
            TensorData::Fp16(values) => self.of(values, |value| {
                number(half::f16::from_bits(*value).to_f64())
            }),
            TensorData::Bf16(values) => self.of(values, |value| {
                number(half::bf16::from_bits(*value).to_f64())
            }),
            TensorData::Fp32(values) => self.of(values, |value| number(f64::from(*value))),
            TensorData::Fp64(values) => self.of(values, |value| number(*value)),
            TensorData::Bytes(values) => self.of(values, |value| self.compare_text(value)),
        }
    }

    /// Whether it is so, for the parameters of a request.
    #[must_use]
    pub fn holds_of(&self, name: &str, parameters: &Parameters) -> bool {
        parameters.get(name).is_some_and(|value| match value {
            Parameter::Bool(value) => self.compare_bool(*value),
            Parameter::Int(value) => self.compare_number(*value as f64),
            Parameter::Float(value) => self.compare_number(*value),
            Parameter::String(value) => self.compare_text(value.as_bytes()),
        })
    }

    fn of<T>(&self, values: &[T], is_so: impl Fn(&T) -> bool) -> bool {
        match self.elements {
            Elements::Any => values.iter().any(is_so),
            // Of no elements nothing is said.
            Elements::All => !values.is_empty() && values.iter().all(is_so),
        }
    }

    fn compare_number(&self, value: f64) -> bool {
        let Constant::Number(with) = self.value else {
            return self.is == Comparison::NotEqual;
        };
        match self.is {
            Comparison::Equal => value == with,
            Comparison::NotEqual => value != with,
            Comparison::Below => value < with,
            Comparison::AtMost => value <= with,
            Comparison::Above => value > with,
            Comparison::AtLeast => value >= with,
        }
    }

    fn compare_bool(&self, value: bool) -> bool {
        self.equals(self.value == Constant::Bool(value))
    }

    fn compare_text(&self, value: &[u8]) -> bool {
        self.equals(matches!(&self.value, Constant::Text(text) if text.as_bytes() == value))
    }

    fn equals(&self, is_equal: bool) -> bool {
        match self.is {
            Comparison::Equal => is_equal,
            Comparison::NotEqual => !is_equal,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(is: Comparison, value: Constant, elements: Elements) -> Condition {
        Condition {
            operand: Operand::Parameter("p".into()),
            is,
            value,
            elements,
        }
    }

    #[test]
    fn elements_are_compared_one_by_one() {
        use Comparison::{Above, AtLeast, AtMost, Below, Equal, NotEqual};
        let holds = |is, value: f64, elements| {
            let condition = condition(is, Constant::Number(value), elements);
            condition.holds_for(&TensorData::Fp32(vec![0.2, 0.5, 0.9]))
        };
        assert!(holds(Above, 0.8, Elements::Any));
        assert!(!holds(Above, 0.8, Elements::All));
        assert!(holds(Below, 0.95, Elements::All));
        assert!(!holds(Below, 0.1, Elements::Any));
        assert!(holds(AtLeast, 0.5, Elements::Any) && holds(AtMost, 0.5, Elements::Any));
        assert!(holds(NotEqual, 0.5, Elements::Any) && !holds(NotEqual, 0.5, Elements::All));
        let none = condition(Below, Constant::Number(1.0), Elements::All);
        assert!(!none.holds_for(&TensorData::Fp32(Vec::new())));
        let seven = condition(Equal, Constant::Number(7.0), Elements::Any);
        assert!(seven.holds_for(&TensorData::Int64(vec![1, 7])));
    }

    #[test]
    fn parameters_and_texts_are_compared_and_kinds_do_not_mix() {
        use Comparison::{Equal, NotEqual};
        let gold = |is| condition(is, Constant::Text("gold".into()), Elements::Any);
        let parameters = |value| Parameters::from([("p".to_owned(), value)]);
        let text = |text: &str| parameters(Parameter::String(text.to_owned()));
        assert!(gold(Equal).holds_of("p", &text("gold")));
        assert!(!gold(Equal).holds_of("p", &text("silver")));
        assert!(gold(NotEqual).holds_of("p", &text("silver")));
        // One that is not there compares with nothing.
        assert!(!gold(NotEqual).holds_of("other", &text("silver")));
        assert!(!gold(Equal).holds_of("p", &parameters(Parameter::Int(1))));
        assert!(gold(NotEqual).holds_of("p", &parameters(Parameter::Int(1))));
        assert!(gold(Equal).holds_for(&TensorData::Bytes(vec![b"gold".to_vec()])));
        let yes = condition(Equal, Constant::Bool(true), Elements::All);
        assert!(yes.holds_for(&TensorData::Bool(vec![true, true])));
        assert!(!yes.holds_for(&TensorData::Bool(vec![true, false])));
    }

    #[test]
    fn what_can_never_be_so_is_refused() {
        let refused = |is, value| condition(is, value, Elements::Any).check("n").is_err();
        assert!(refused(Comparison::Below, Constant::Text("a".into())));
        assert!(refused(Comparison::Above, Constant::Bool(true)));
        assert!(refused(Comparison::Equal, Constant::Number(f64::NAN)));
        assert!(refused(Comparison::Equal, Constant::Text("x".repeat(257))));
        assert!(!refused(Comparison::NotEqual, Constant::Text("a".into())));
    }
}
