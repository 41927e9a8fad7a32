//! The classification extension: instead of an output's numbers, the largest of them with their places and names.
//!
//! A class is the text `value:index`, with `:label` where the model names its classes: what Triton writes, to the digit.

use std::cmp::Ordering;
use std::fmt::Display;

use super::error::EncodeError;
use super::message::{InferRequest, InferResponse, ModelMetadata};
use super::tensor::{Tensor, TensorData};

/// Replaces the outputs of which the request wants classes. Each row of a batch has its own.
///
/// # Errors
/// [`EncodeError::NoClasses`] when an output is not of numbers.
pub fn classify(
    response: &mut InferResponse,
    request: &InferRequest,
    model: &ModelMetadata,
) -> Result<(), EncodeError> {
    for requested in &request.outputs {
        let (Some(count), Some(output)) = (
            requested.classes,
            response
                .outputs
                .iter_mut()
                .find(|output| output.name() == requested.name),
        ) else {
            continue;
        };
        let described = model
            .outputs
            .iter()
            .find(|described| described.name == requested.name);
        let labels = described.map_or(&[][..], |described| &described.labels);
        let rows = (model.max_batch_size > 0)
            .then(|| output.shape().first().copied())
            .flatten();
        *output = classes(output, rows, count, labels)?;
    }
    Ok(())
}

fn classes(
    output: &Tensor,
    rows: Option<u64>,
    count: u64,
    labels: &[String],
) -> Result<Tensor, EncodeError> {
    let values = output.data().len();
    let row_values = values / rows.map_or(1, |rows| (rows as usize).max(1));
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(row_values);
    let mut texts = Vec::with_capacity(count * rows.unwrap_or(1) as usize);
    for first in (0..values).step_by(row_values.max(1)) {
        let ordered =
            ordered(output.data(), first, row_values).ok_or_else(|| EncodeError::NoClasses {
                tensor: output.name().to_owned(),
                datatype: output.datatype(),
            })?;
        for (index, value) in ordered.into_iter().take(count) {
            let label = labels.get(index).map(|label| format!(":{label}"));
            let text = format!("{value}:{index}{}", label.unwrap_or_default());
            texts.push(text.into_bytes());
        }
    }
    let shape = rows.into_iter().chain([count as u64]).collect();
    let tensor = Tensor::new(output.name(), shape, TensorData::Bytes(texts));
    Ok(tensor.expect("each row has as many classes as the shape says"))
}

/// The values of a row with their places, the largest first and equal ones in their order; `None` where values have no
/// order or no text.
fn ordered(data: &TensorData, first: usize, count: usize) -> Option<Vec<(usize, String)>> {
    let row = first..first + count;
    Some(match data {
        TensorData::Uint8(values) => whole(&values[row]),
        TensorData::Uint16(values) => whole(&values[row]),
        TensorData::Uint32(values) => whole(&values[row]),
        TensorData::Uint64(values) => whole(&values[row]),
        TensorData::Int8(values) => whole(&values[row]),
        TensorData::Int16(values) => whole(&values[row]),
        TensorData::Int32(values) => whole(&values[row]),
        TensorData::Int64(values) => whole(&values[row]),
        TensorData::Fp32(values) => fractions(&values[row]),
        TensorData::Fp64(values) => fractions(&values[row]),
        TensorData::Bool(_) | TensorData::Fp16(_) | TensorData::Bf16(_) | TensorData::Bytes(_) => {
            return None;
        }
    })
}

fn whole<T: Copy + Ord + Display>(row: &[T]) -> Vec<(usize, String)> {
    sorted(row, |a, b| b.cmp(&a), |value| value.to_string())
}

fn fractions<T: Copy + Into<f64> + Display>(row: &[T]) -> Vec<(usize, String)> {
    let order = |a: T, b: T| descending(a.into(), b.into());
    sorted(row, order, |value| format!("{value:.6}"))
}

/// The larger one first, and what is no number behind all numbers: a total order, which sorting needs. Both zeros are equal.
fn descending(a: f64, b: f64) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        // The sum makes the negative zero the other one, and changes nothing else.
        (false, false) => (b + 0.0).total_cmp(&(a + 0.0)),
        (a_is_none, b_is_none) => a_is_none.cmp(&b_is_none),
    }
}

fn sorted<T: Copy>(
    row: &[T],
    order: impl Fn(T, T) -> Ordering,
    text: impl Fn(T) -> String,
) -> Vec<(usize, String)> {
    let mut places: Vec<usize> = (0..row.len()).collect();
    places.sort_by(|a, b| order(row[*a], row[*b]));
    let named = places.into_iter().map(|place| (place, text(row[place])));
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::super::message::{Parameters, RequestedOutput, TensorMetadata};
    use super::super::tensor::Datatype;
    use super::*;

    fn answered(
        data: TensorData,
        shape: Vec<u64>,
        max_batch_size: u32,
        classes: u64,
    ) -> Result<Tensor, EncodeError> {
        let model = ModelMetadata {
            name: "m".to_owned(),
            versions: vec!["1".to_owned()],
            platform: "test".to_owned(),
            max_batch_size,
            inputs: Vec::new(),
            outputs: vec![TensorMetadata {
                name: "y".to_owned(),
                datatype: data.datatype(),
                shape: vec![-1; shape.len()],
                labels: vec!["cat".to_owned(), "dog".to_owned()],
            }],
        };
        let request = InferRequest {
            outputs: vec![RequestedOutput {
                name: "y".to_owned(),
                binary_data: None,
                classes: Some(classes),
                parameters: Parameters::new(),
            }],
            ..InferRequest::default()
        };
        let mut response = InferResponse {
            outputs: vec![Tensor::new("y", shape, data).unwrap()],
            ..InferResponse::default()
        };
        classify(&mut response, &request, &model)?;
        Ok(response.outputs.remove(0))
    }

    fn texts(tensor: &Tensor) -> Vec<&str> {
        let TensorData::Bytes(texts) = tensor.data() else {
            panic!("{tensor:?}")
        };
        let read = |text: &Vec<u8>| str::from_utf8(text).unwrap().to_owned().leak() as &str;
        texts.iter().map(read).collect()
    }

    #[test]
    fn the_largest_come_first_row_by_row_with_names_where_there_are_some() {
        let scores = TensorData::Fp32(vec![0.25, 0.5, 0.125, 3.0, 3.0, 4.0]);
        let best = answered(scores.clone(), vec![2, 3], 4, 2).unwrap();
        assert_eq!(best.shape(), [2, 2]);
        assert_eq!(
            texts(&best),
            [
                "0.500000:1:dog",
                "0.250000:0:cat",
                "4.000000:2",
                "3.000000:0:cat"
            ]
        );
        // More than there are is all of them; a model that does not batch has one row.
        let all = answered(scores, vec![2, 3], 0, 99).unwrap();
        assert_eq!(all.shape(), [6]);
        assert_eq!(texts(&all)[0], "4.000000:5");
        let whole = answered(TensorData::Int64(vec![-1, 7]), vec![2], 0, 1).unwrap();
        assert_eq!(texts(&whole), ["7:1:dog"]);
        let none = answered(TensorData::Fp32(vec![]), vec![0, 3], 4, 2).unwrap();
        assert_eq!(texts(&none), [""; 0]);
    }

    #[test]
    fn values_that_are_no_numbers_come_last_whatever_their_number() {
        // More than a sort does by insertion, in an order in which each number meets some that are none.
        let values: Vec<f64> = (0i32..64)
            .map(|place| match place % 8 {
                0 | 5 => f64::NAN,
                2 => -f64::NAN,
                3 => -0.0,
                4 => 0.0,
                7 if place > 32 => f64::INFINITY,
                _ => f64::from(place * 37 % 11 - 5),
            })
            .collect();
        let mut places: Vec<usize> = (0..64).filter(|place| !values[*place].is_nan()).collect();
        // No two numbers are without an order, and this sort keeps that of equal ones.
        places.sort_by(|a, b| values[*b].partial_cmp(&values[*a]).unwrap());
        places.extend((0..64).filter(|place| values[*place].is_nan()));
        let best = answered(TensorData::Fp64(values.clone()), vec![64], 0, 64).unwrap();
        let found: Vec<usize> = texts(&best)
            .iter()
            .map(|text| text.split(':').nth(1).unwrap().parse().unwrap())
            .collect();
        assert_eq!(found, places);
        let narrow = values.iter().map(|value| *value as f32).collect();
        let best = answered(TensorData::Fp32(narrow), vec![64], 0, 64).unwrap();
        let again: Vec<&str> = texts(&best)
            .into_iter()
            .map(|text| text.split(':').nth(1).unwrap())
            .collect();
        let places: Vec<String> = places.iter().map(usize::to_string).collect();
        assert_eq!(again, places);
        assert!(texts(&best)[63].starts_with("NaN:"), "{:?}", texts(&best));
    }

    #[test]
    fn what_is_no_number_has_no_classes() {
        let error = answered(TensorData::Bool(vec![true]), vec![1], 0, 1).unwrap_err();
        assert_eq!(
            error,
            EncodeError::NoClasses {
                tensor: "y".to_owned(),
                datatype: Datatype::Bool
            }
        );
        assert!(error.to_string().contains("BOOL"), "{error}");
    }
}
