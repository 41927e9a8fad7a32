//! The classification extension: instead of an output's numbers, the largest of them with their places and names.
//!
//! A class is the text `value:index`, with `:label` where the model names its classes: what Triton writes, to the digit.

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
    fn sorted<T: PartialOrd + Copy>(row: &[T], text: impl Fn(T) -> String) -> Vec<(usize, String)> {
        let mut places: Vec<usize> = (0..row.len()).collect();
        // What is no number is equal to all, so it stays where it is.
        places.sort_by(|a, b| {
            let order = row[*b].partial_cmp(&row[*a]);
            order.unwrap_or(std::cmp::Ordering::Equal)
        });
        let named = places.into_iter().map(|place| (place, text(row[place])));
        named.collect()
    }
    let row = first..first + count;
    Some(match data {
        TensorData::Uint8(values) => sorted(&values[row], |value| value.to_string()),
        TensorData::Uint16(values) => sorted(&values[row], |value| value.to_string()),
        TensorData::Uint32(values) => sorted(&values[row], |value| value.to_string()),
        TensorData::Uint64(values) => sorted(&values[row], |value| value.to_string()),
        TensorData::Int8(values) => sorted(&values[row], |value| value.to_string()),
        TensorData::Int16(values) => sorted(&values[row], |value| value.to_string()),
        TensorData::Int32(values) => sorted(&values[row], |value| value.to_string()),
        TensorData::Int64(values) => sorted(&values[row], |value| value.to_string()),
        TensorData::Fp32(values) => sorted(&values[row], |value| format!("{value:.6}")),
        TensorData::Fp64(values) => sorted(&values[row], |value| format!("{value:.6}")),
        TensorData::Bool(_) | TensorData::Fp16(_) | TensorData::Bf16(_) | TensorData::Bytes(_) => {
            return None;
        }
    })
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
