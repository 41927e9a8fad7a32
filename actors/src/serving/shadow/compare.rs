//! Whether a candidate's answer is the one that the caller got.
//!
//! Pure: tensors in, the first difference out.

use std::fmt;

use half::{bf16, f16};

use super::plan::{Plan, Rule};
use crate::serving::oip::{Tensor, TensorData};

/// The first difference between two answers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// One has an output that the other has not.
    #[error("only one of the answers has an output {output:?}")]
    Missing {
        /// The output.
        output: String,
    },
    /// Their forms differ.
    #[error("{output:?} is {got} instead of {wanted}")]
    Form {
        /// The output.
        output: String,
        /// The candidate's type and shape.
        got: String,
        /// What the caller got.
        wanted: String,
    },
    /// Their values differ.
    #[error("{output:?} at index {index} is {got} instead of {wanted}")]
    Value {
        /// The output.
        output: String,
        /// Where, row-major.
        index: usize,
        /// The candidate's value.
        got: String,
        /// What the caller got.
        wanted: String,
    },
    /// Other values are the largest.
    #[error("in row {row} of {output:?} the largest are at {got:?} instead of {wanted:?}")]
    Order {
        /// The output.
        output: String,
        /// The row.
        row: usize,
        /// The candidate's positions.
        got: Vec<usize>,
        /// Those of what the caller got.
        wanted: Vec<usize>,
    },
}

/// Compares an answer with the one that the caller got.
pub fn compare(plan: &Plan, wanted: &[Tensor], got: &[Tensor]) -> Result<(), Difference> {
    let is_compared = |tensor: &&Tensor| plan.rule_of(tensor.name()) != Rule::Ignore;
    let named = |tensors: &[Tensor], name: &str| tensors.iter().any(|tensor| tensor.name() == name);
    if let Some(more) = got
        .iter()
        .filter(is_compared)
        .find(|tensor| !named(wanted, tensor.name()))
    {
        return Err(Difference::Missing {
            output: more.name().to_owned(),
        });
    }
    for tensor in wanted.iter().filter(is_compared) {
        let output = tensor.name();
        let Some(other) = got.iter().find(|other| other.name() == output) else {
            return Err(Difference::Missing {
                output: output.to_owned(),
            });
        };
        compare_tensor(plan.rule_of(output), tensor, other)?;
    }
    Ok(())
}

fn compare_tensor(rule: Rule, wanted: &Tensor, got: &Tensor) -> Result<(), Difference> {
    if wanted.datatype() != got.datatype() || wanted.shape() != got.shape() {
        let form = |tensor: &Tensor| format!("{}{:?}", tensor.datatype(), tensor.shape());
        return Err(Difference::Form {
            output: wanted.name().to_owned(),
            got: form(got),
            wanted: form(wanted),
        });
    }
    if let Rule::Top(count) = rule {
        return compare_order(count as usize, wanted, got);
    }
    let output = wanted.name();
    match (wanted.data(), got.data()) {
        (TensorData::Fp16(wanted), TensorData::Fp16(got)) => {
            let value = |bits: &u16| f16::from_bits(*bits);
            floats(rule, output, wanted, got, |bits| Float {
                value: value(bits).to_f64(),
                order: ordered(u64::from(*bits), 16),
            })
        }
        (TensorData::Bf16(wanted), TensorData::Bf16(got)) => {
            let value = |bits: &u16| bf16::from_bits(*bits);
            floats(rule, output, wanted, got, |bits| Float {
                value: value(bits).to_f64(),
                order: ordered(u64::from(*bits), 16),
            })
        }
        (TensorData::Fp32(wanted), TensorData::Fp32(got)) => {
            floats(rule, output, wanted, got, |value| Float {
                value: f64::from(*value),
                order: ordered(u64::from(value.to_bits()), 32),
            })
        }
        (TensorData::Fp64(wanted), TensorData::Fp64(got)) => {
            floats(rule, output, wanted, got, |value| Float {
                value: *value,
                order: ordered(value.to_bits(), 64),
            })
        }
        (TensorData::Bool(wanted), TensorData::Bool(got)) => exact(output, wanted, got),
        (TensorData::Uint8(wanted), TensorData::Uint8(got)) => exact(output, wanted, got),
        (TensorData::Uint16(wanted), TensorData::Uint16(got)) => exact(output, wanted, got),
        (TensorData::Uint32(wanted), TensorData::Uint32(got)) => exact(output, wanted, got),
        (TensorData::Uint64(wanted), TensorData::Uint64(got)) => exact(output, wanted, got),
        (TensorData::Int8(wanted), TensorData::Int8(got)) => exact(output, wanted, got),
        (TensorData::Int16(wanted), TensorData::Int16(got)) => exact(output, wanted, got),
        (TensorData::Int32(wanted), TensorData::Int32(got)) => exact(output, wanted, got),
        (TensorData::Int64(wanted), TensorData::Int64(got)) => exact(output, wanted, got),
        (TensorData::Bytes(wanted), TensorData::Bytes(got)) => {
            let is_other = |(wanted, got): (&Vec<u8>, &Vec<u8>)| wanted != got;
            let Some(index) = wanted.iter().zip(got).position(is_other) else {
                return Ok(());
            };
            // What bytes hold is the caller's: a text may be a secret.
            let shown = |bytes: &[u8]| format!("{} bytes with hash {}", bytes.len(), short(bytes));
            Err(differs(
                output,
                index,
                shown(&got[index]),
                shown(&wanted[index]),
            ))
        }
        // Both are of one type, as their names for it are.
        _ => Ok(()),
    }
}

fn short(bytes: &[u8]) -> String {
    let hash = blake3::hash(bytes).to_hex();
    hash[..12].to_owned()
}

fn differs(output: &str, index: usize, got: String, wanted: String) -> Difference {
    Difference::Value {
        output: output.to_owned(),
        index,
        got,
        wanted,
    }
}

fn exact<T: PartialEq + fmt::Display>(
    output: &str,
    wanted: &[T],
    got: &[T],
) -> Result<(), Difference> {
    match wanted.iter().zip(got).position(|(one, other)| one != other) {
        None => Ok(()),
        Some(index) => Err(differs(
            output,
            index,
            got[index].to_string(),
            wanted[index].to_string(),
        )),
    }
}

/// A number of any of the types that have fractions.
struct Float {
    value: f64,
    /// Which of the numbers of its type it is, in their order; both zeros are 0.
    order: i128,
}

/// The position of a number among those of its type, from its bits, of which the highest is the sign.
fn ordered(bits: u64, width: u32) -> i128 {
    let sign = 1u64 << (width - 1);
    let magnitude = i128::from(bits & (sign - 1));
    if bits & sign == 0 {
        magnitude
    } else {
        -magnitude
    }
}

fn floats<T>(
    rule: Rule,
    output: &str,
    wanted: &[T],
    got: &[T],
    float: impl Fn(&T) -> Float,
) -> Result<(), Difference> {
    let is_same = |wanted: &Float, got: &Float| {
        if wanted.value.is_nan() || got.value.is_nan() {
            return wanted.value.is_nan() && got.value.is_nan();
        }
        match rule {
            _ if wanted.value == got.value => true,
            Rule::Close { absolute, relative } => {
                // The difference to an infinity is no number that is small.
                (wanted.value - got.value).abs() <= absolute + relative * wanted.value.abs()
                    && wanted.value.is_finite()
            }
            Rule::Ulps(most) => {
                (wanted.order - got.order).abs() <= i128::from(most)
                    && wanted.value.is_finite()
                    && got.value.is_finite()
            }
            Rule::Top(_) | Rule::Ignore => true,
        }
    };
    let pairs = wanted.iter().zip(got);
    for (index, (wanted, got)) in pairs.enumerate() {
        let (wanted, got) = (float(wanted), float(got));
        if !is_same(&wanted, &got) {
            let (wanted, got) = (wanted.value.to_string(), got.value.to_string());
            return Err(differs(output, index, got, wanted));
        }
    }
    Ok(())
}

fn compare_order(count: usize, wanted: &Tensor, got: &Tensor) -> Result<(), Difference> {
    let row_values = wanted.shape().last().copied().unwrap_or(1).max(1);
    let row_values = usize::try_from(row_values).unwrap_or(usize::MAX);
    let (of_wanted, of_got) = (numbers(wanted.data()), numbers(got.data()));
    let rows = of_wanted.chunks(row_values).zip(of_got.chunks(row_values));
    for (row, (one, other)) in rows.enumerate() {
        let (one, other) = (largest(one, count), largest(other, count));
        if one != other {
            return Err(Difference::Order {
                output: wanted.name().to_owned(),
                row,
                got: other,
                wanted: one,
            });
        }
    }
    Ok(())
}

/// The positions of the largest values, the largest first; of equal ones the first.
fn largest(values: &[f64], count: usize) -> Vec<usize> {
    let mut positions: Vec<usize> = (0..values.len()).collect();
    positions.sort_by(|one, other| values[*other].total_cmp(&values[*one]));
    positions.truncate(count);
    positions
}

/// The values as numbers, as far as their order goes; those of bytes are their lengths' order in no sense, so
/// they are none.
fn numbers(data: &TensorData) -> Vec<f64> {
    match data {
        TensorData::Bool(values) => values
            .iter()
            .map(|value| f64::from(u8::from(*value)))
            .collect(),
        TensorData::Uint8(values) => values.iter().map(|value| f64::from(*value)).collect(),
        TensorData::Uint16(values) => values.iter().map(|value| f64::from(*value)).collect(),
        TensorData::Uint32(values) => values.iter().map(|value| f64::from(*value)).collect(),
        TensorData::Uint64(values) => values.iter().map(|value| *value as f64).collect(),
        TensorData::Int8(values) => values.iter().map(|value| f64::from(*value)).collect(),
        TensorData::Int16(values) => values.iter().map(|value| f64::from(*value)).collect(),
        TensorData::Int32(values) => values.iter().map(|value| f64::from(*value)).collect(),
        TensorData::Int64(values) => values.iter().map(|value| *value as f64).collect(),
        TensorData::Fp16(values) => {
            let value = |bits: &u16| f16::from_bits(*bits).to_f64();
            values.iter().map(value).collect()
        }
        TensorData::Bf16(values) => {
            let value = |bits: &u16| bf16::from_bits(*bits).to_f64();
            values.iter().map(value).collect()
        }
        TensorData::Fp32(values) => values.iter().map(|value| f64::from(*value)).collect(),
        TensorData::Fp64(values) => values.clone(),
        TensorData::Bytes(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[u64], data: TensorData) -> Tensor {
        Tensor::new(name, shape.to_vec(), data).unwrap()
    }

    fn plan(rule: Rule) -> Plan {
        Plan {
            percent: 100,
            samples: 1,
            mismatch_max_bp: 0,
            rule,
            outputs: Vec::new(),
        }
    }

    const CLOSE: Rule = Rule::Close {
        absolute: 1e-6,
        relative: 1e-3,
    };

    /// Whether two tensors of these data are the same by a rule.
    fn same(rule: Rule, wanted: TensorData, got: TensorData) -> bool {
        let shape = [wanted.len() as u64];
        let (wanted, got) = (tensor("y", &shape, wanted), tensor("y", &shape, got));
        compare(&plan(rule), &[wanted], &[got]).is_ok()
    }

    #[test]
    fn numbers_with_fractions_are_compared_with_tolerance_and_others_exactly() {
        use TensorData::{Bool, Bytes, Fp32, Fp64, Int64, Uint8};
        let next = |value: f32, steps: u32| f32::from_bits(value.to_bits() + steps);
        for (rule, wanted, got, expected) in [
            (CLOSE, Fp32(vec![1.0]), Fp32(vec![1.000_9]), true),
            (CLOSE, Fp32(vec![1.0]), Fp32(vec![1.002]), false),
            (CLOSE, Fp32(vec![0.0]), Fp32(vec![9e-7]), true),
            (CLOSE, Fp32(vec![0.0]), Fp32(vec![2e-6]), false),
            (CLOSE, Fp64(vec![-5.0]), Fp64(vec![-5.004]), true),
            (
                CLOSE,
                Fp32(vec![f32::INFINITY]),
                Fp32(vec![f32::INFINITY]),
                true,
            ),
            (CLOSE, Fp32(vec![f32::INFINITY]), Fp32(vec![1.0]), false),
            (CLOSE, Fp32(vec![1.0]), Fp32(vec![f32::INFINITY]), false),
            (CLOSE, Fp32(vec![f32::NAN]), Fp32(vec![f32::NAN]), true),
            (CLOSE, Fp32(vec![1.0]), Fp32(vec![f32::NAN]), false),
            (
                Rule::Ulps(2),
                Fp32(vec![1.0]),
                Fp32(vec![next(1.0, 2)]),
                true,
            ),
            (
                Rule::Ulps(2),
                Fp32(vec![1.0]),
                Fp32(vec![next(1.0, 3)]),
                false,
            ),
            // Across zero: the smallest numbers of both signs are two apart.
            (
                Rule::Ulps(2),
                Fp32(vec![f32::from_bits(1)]),
                Fp32(vec![-f32::from_bits(1)]),
                true,
            ),
            (Rule::Ulps(0), Fp64(vec![0.0]), Fp64(vec![-0.0]), true),
            (
                Rule::Ulps(u32::MAX),
                Fp32(vec![f32::MAX]),
                Fp32(vec![f32::INFINITY]),
                false,
            ),
            (CLOSE, Int64(vec![1_000_000]), Int64(vec![1_000_001]), false),
            (Rule::Ulps(9), Uint8(vec![3]), Uint8(vec![4]), false),
            (CLOSE, Bool(vec![true]), Bool(vec![true]), true),
            (
                CLOSE,
                Bytes(vec![b"a".to_vec()]),
                Bytes(vec![b"b".to_vec()]),
                false,
            ),
            (Rule::Ignore, Fp32(vec![1.0]), Fp32(vec![9.0]), true),
        ] {
            let said = format!("{rule:?} {wanted:?} {got:?}");
            assert_eq!(same(rule, wanted, got), expected, "{said}");
        }
    }

    #[test]
    fn numbers_of_half_precision_are_compared_in_their_own_steps() {
        let (one, next) = (
            f16::from_f32(1.0).to_bits(),
            f16::from_f32(1.0).to_bits() + 1,
        );
        let of = |bits| TensorData::Fp16(vec![bits]);
        assert!(same(Rule::Ulps(1), of(one), of(next)));
        assert!(same(CLOSE, of(one), of(next)));
        assert!(!same(Rule::Ulps(0), of(one), of(next)));
        let one = bf16::from_f32(1.0).to_bits();
        let of = |bits| TensorData::Bf16(vec![bits]);
        assert!(same(Rule::Ulps(1), of(one), of(one + 1)));
        // A step of theirs is 1/128.
        assert!(!same(CLOSE, of(one), of(one + 1)));
    }

    #[test]
    fn the_largest_agree_though_the_values_differ() {
        let scores = |values: &[f32]| tensor("scores", &[2, 3], TensorData::Fp32(values.to_vec()));
        let wanted = [scores(&[0.1, 0.7, 0.2, 0.5, 0.3, 0.2])];
        let other = [scores(&[0.2, 0.5, 0.3, 0.9, 0.05, 0.04])];
        let swapped = [scores(&[0.3, 0.5, 0.2, 0.9, 0.05, 0.04])];
        let top = |count| plan(Rule::Top(count));
        assert_eq!(compare(&top(1), &wanted, &other), Ok(()));
        assert_eq!(compare(&top(3), &wanted, &other), Ok(()));
        assert_eq!(compare(&top(1), &wanted, &swapped), Ok(()));
        let difference = compare(&top(2), &wanted, &swapped).unwrap_err();
        assert_eq!(
            difference.to_string(),
            "in row 0 of \"scores\" the largest are at [1, 0] instead of [1, 2]"
        );
    }

    #[test]
    fn forms_and_names_are_compared_and_what_is_ignored_is_not() {
        let class = || tensor("class", &[2], TensorData::Int64(vec![1, 2]));
        let scores = |shape: &[u64]| tensor("scores", shape, TensorData::Fp32(vec![0.5; 2]));
        let said = |plan: &Plan, wanted: &[Tensor], got: &[Tensor]| {
            compare(plan, wanted, got).unwrap_err().to_string()
        };
        let close = plan(CLOSE);
        // In whatever order they come.
        assert_eq!(
            compare(&close, &[class(), scores(&[2])], &[scores(&[2]), class()]),
            Ok(())
        );
        assert!(said(&close, &[class()], &[class(), scores(&[2])]).contains("\"scores\""));
        assert!(said(&close, &[class(), scores(&[2])], &[class()]).contains("\"scores\""));
        assert_eq!(
            said(&close, &[scores(&[2, 1])], &[scores(&[1, 2])]),
            "\"scores\" is FP32[1, 2] instead of FP32[2, 1]"
        );
        let secret = |text: &str| [tensor("text", &[1], TensorData::Bytes(vec![text.into()]))];
        let hidden = said(&close, &secret("password"), &secret("hunter2"));
        assert!(
            hidden.contains("8 bytes with hash") && !hidden.contains("password"),
            "{hidden}"
        );
        let mut ignoring = plan(CLOSE);
        ignoring.outputs = vec![("scores".into(), Rule::Ignore)];
        assert_eq!(
            compare(&ignoring, &[class(), scores(&[2])], &[class()]),
            Ok(())
        );
    }
}
