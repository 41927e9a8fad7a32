//! Does a decoded request fit a model?

use std::collections::BTreeSet;

use super::error::ValidateError;
use super::message::{InferRequest, ModelMetadata, TensorMetadata};
use super::tensor::Tensor;

/// The longest id of a request, in bytes. It is kept with the answer, and travels with it.
pub const ID_BYTES_MAX: usize = 1024;

/// Checks the id's length, names, datatypes, shapes and the batch size; returns the number of rows, which is 1 for
/// a model that does not batch.
///
/// # Errors
/// [`ValidateError`] names what does not fit, what was expected and what came.
pub fn validate_request(
    request: &InferRequest,
    model: &ModelMetadata,
) -> Result<u64, ValidateError> {
    let id_bytes = request.id.as_ref().map_or(0, String::len);
    if id_bytes > ID_BYTES_MAX {
        return Err(ValidateError::IdTooLong {
            got_bytes: id_bytes as u64,
            limit_bytes: ID_BYTES_MAX as u64,
        });
    }
    let model_name = || model.name.clone();
    let names = |tensors: &[TensorMetadata]| -> Vec<String> {
        tensors.iter().map(|tensor| tensor.name.clone()).collect()
    };
    let mut seen = BTreeSet::new();
    let mut rows: Option<u64> = None;
    for input in &request.inputs {
        if !seen.insert(input.name()) {
            let tensor = input.name().to_owned();
            return Err(ValidateError::Duplicate {
                model: model_name(),
                tensor,
            });
        }
        let Some(expected) = model
            .inputs
            .iter()
            .find(|tensor| tensor.name == input.name())
        else {
            return Err(ValidateError::UnknownInput {
                model: model_name(),
                input: input.name().to_owned(),
                expected: names(&model.inputs),
            });
        };
        check_tensor(input, expected, model)?;
        if model.max_batch_size > 0 {
            let got = input.shape()[0];
            let expected = *rows.get_or_insert(got);
            if expected != got {
                let input = input.name().to_owned();
                return Err(ValidateError::UnequalBatch {
                    model: model_name(),
                    input,
                    expected,
                    got,
                });
            }
        }
    }
    if let Some(missing) = model
        .inputs
        .iter()
        .find(|input| !seen.contains(input.name.as_str()))
    {
        return Err(ValidateError::MissingInput {
            model: model_name(),
            input: missing.name.clone(),
            expected: names(&model.inputs),
        });
    }
    let mut outputs = BTreeSet::new();
    for output in &request.outputs {
        if !model.outputs.iter().any(|known| known.name == output.name) {
            return Err(ValidateError::UnknownOutput {
                model: model_name(),
                output: output.name.clone(),
                expected: names(&model.outputs),
            });
        }
        if !outputs.insert(&output.name) {
            let tensor = output.name.clone();
            return Err(ValidateError::Duplicate {
                model: model_name(),
                tensor,
            });
        }
    }
    Ok(rows.unwrap_or(1))
}

fn check_tensor(
    input: &Tensor,
    expected: &TensorMetadata,
    model: &ModelMetadata,
) -> Result<(), ValidateError> {
    if input.datatype() != expected.datatype {
        return Err(ValidateError::Datatype {
            model: model.name.clone(),
            input: input.name().to_owned(),
            expected: expected.datatype,
            got: input.datatype(),
        });
    }
    let fits =
        |(got, expected): (&u64, &i64)| *expected < 0 || i64::try_from(*got) == Ok(*expected);
    let same_rank = input.shape().len() == expected.shape.len();
    // A batching model has a batch dimension in its metadata, so an equal rank is at least one.
    let has_batch = model.max_batch_size == 0 || !expected.shape.is_empty();
    if !same_rank || !has_batch || !input.shape().iter().zip(&expected.shape).all(fits) {
        return Err(ValidateError::Shape {
            model: model.name.clone(),
            input: input.name().to_owned(),
            expected: expected.shape.clone(),
            got: input.shape().to_vec(),
        });
    }
    if model.max_batch_size > 0 {
        let got = input.shape()[0];
        if !(1..=u64::from(model.max_batch_size)).contains(&got) {
            return Err(ValidateError::BatchSize {
                model: model.name.clone(),
                input: input.name().to_owned(),
                max_batch_size: model.max_batch_size,
                got,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::message::{Parameters, RequestedOutput};
    use super::super::tensor::{Datatype, TensorData};
    use super::*;

    fn model(max_batch_size: u32) -> ModelMetadata {
        let tensor = |name: &str, shape: &[i64]| TensorMetadata {
            name: name.to_owned(),
            datatype: Datatype::Fp32,
            shape: shape.to_vec(),
            labels: Vec::new(),
        };
        ModelMetadata {
            name: "m".to_owned(),
            versions: vec!["1".to_owned()],
            platform: "test".to_owned(),
            max_batch_size,
            inputs: vec![tensor("a", &[-1, 3]), tensor("b", &[-1, 1])],
            outputs: vec![tensor("y", &[-1, 1])],
        }
    }

    fn tensor(name: &str, shape: &[u64]) -> Tensor {
        let count = shape.iter().product::<u64>() as usize;
        Tensor::new(name, shape.to_vec(), TensorData::Fp32(vec![0.0; count])).unwrap()
    }

    fn check(max_batch_size: u32, inputs: Vec<Tensor>, outputs: &[&str]) -> Result<u64, String> {
        let output = |name: &&str| RequestedOutput {
            name: (*name).to_owned(),
            binary_data: None,
            classes: None,
            parameters: Parameters::new(),
        };
        let outputs = outputs.iter().map(output).collect();
        let request = InferRequest {
            inputs,
            outputs,
            ..InferRequest::default()
        };
        validate_request(&request, &model(max_batch_size)).map_err(|error| error.to_string())
    }

    #[test]
    fn fitting_requests_give_their_rows() {
        assert_eq!(
            check(8, vec![tensor("b", &[5, 1]), tensor("a", &[5, 3])], &["y"]),
            Ok(5)
        );
        // Without batching the first dimension is like any other.
        assert_eq!(
            check(0, vec![tensor("a", &[5, 3]), tensor("b", &[2, 1])], &[]),
            Ok(1)
        );
    }

    #[test]
    fn an_id_is_bounded() {
        let checked = |bytes: usize| {
            let request = InferRequest {
                id: Some("i".repeat(bytes)),
                inputs: vec![tensor("a", &[1, 3]), tensor("b", &[1, 1])],
                ..InferRequest::default()
            };
            validate_request(&request, &model(8)).map_err(|error| error.to_string())
        };
        assert_eq!(checked(ID_BYTES_MAX), Ok(1));
        let refused = "the request's id has 1025 bytes, the limit is 1024: send a shorter one";
        assert_eq!(checked(ID_BYTES_MAX + 1).unwrap_err(), refused);
    }

    #[test]
    fn misfits_are_named() {
        let b = || tensor("b", &[2, 1]);
        let a = |shape: &[u64]| tensor("a", shape);
        let wrong_type = Tensor::new("a", vec![1, 3], TensorData::Fp64(vec![0.0; 3])).unwrap();
        for (inputs, outputs, expected) in [
            (
                vec![b()],
                &[][..],
                "model \"m\": input \"a\" is missing, expected [\"a\", \"b\"]",
            ),
            (
                vec![tensor("c", &[1])],
                &[],
                "model \"m\": unexpected input \"c\", expected [\"a\", \"b\"]",
            ),
            (
                vec![b(), b()],
                &[],
                "model \"m\": tensor \"b\" is given twice",
            ),
            (
                vec![wrong_type],
                &[],
                "model \"m\": input \"a\" has datatype FP64, expected FP32",
            ),
            (
                vec![a(&[2, 4])],
                &[],
                "model \"m\": input \"a\" has shape [2, 4], expected [-1, 3] (-1 is any size)",
            ),
            (
                vec![a(&[6])],
                &[],
                "model \"m\": input \"a\" has shape [6], expected [-1, 3] (-1 is any size)",
            ),
            (
                vec![a(&[9, 3])],
                &[],
                "model \"m\": input \"a\" has batch size 9, expected 1 to 8",
            ),
            (
                vec![a(&[0, 3])],
                &[],
                "model \"m\": input \"a\" has batch size 0, expected 1 to 8",
            ),
            (
                vec![a(&[3, 3]), b()],
                &[],
                "model \"m\": input \"b\" has batch size 2, expected 3 as in the other inputs",
            ),
            (
                vec![a(&[2, 3]), b()],
                &["z"],
                "model \"m\": unexpected output \"z\", expected one of [\"y\"]",
            ),
            (
                vec![a(&[2, 3]), b()],
                &["y", "y"],
                "model \"m\": tensor \"y\" is given twice",
            ),
        ] {
            assert_eq!(check(8, inputs, outputs).unwrap_err(), expected);
        }
    }
}
