//! What a version takes and gives.

use super::{CLASS, INPUT, NEXT, PREDICTION, PROBABILITIES, ROW_VALUES_MAX, Signature, TEXT};
use crate::registry::artifact::Artifact;
use crate::registry::imported_file::ImportedFile;
use crate::registry::version_file::VersionFile;
use crate::serving::fleet::BATCH_ROWS_MAX;
use crate::serving::oip::{Datatype, TensorMetadata};
use crate::training::data::{BYTE_VOCABULARY, SampleShape};

/// What a batch may cost if nobody says how many rows it may have, in floating-point operations: a replica has two seconds for
/// one, so processors that do 20 billion a second are fast enough.
pub(in crate::serving) const BATCH_OPERATIONS: u64 = 40_000_000_000;

impl Signature {
    /// That of a version that was trained here: rows of numbers, and classes with these names.
    #[must_use]
    pub fn classifier(row_values: usize, classes: usize, labels: Vec<String>) -> Self {
        let mut probabilities = numbers(PROBABILITIES, classes);
        probabilities.labels = labels;
        Signature {
            is_classifier: true,
            ..Self::trained(
                numbers(INPUT, row_values),
                vec![probabilities, tensor(CLASS, Datatype::Int64, &[-1])],
            )
        }
    }

    fn trained(input: TensorMetadata, outputs: Vec<TensorMetadata>) -> Self {
        Signature {
            platform: "mobula_candle".to_owned(),
            max_batch_size: BATCH_ROWS_MAX as u32,
            inputs: vec![input],
            outputs,
            is_classifier: false,
            is_finite: true,
        }
    }

    /// That of a version; or what it is trained on, if no endpoint answers for that.
    pub fn of(artifact: &Artifact) -> Result<Self, String> {
        match artifact {
            Artifact::Trained(file) => Self::of_trained(file),
            Artifact::Imported(file) => Ok(Self::of_imported(file)),
        }
    }

    fn of_trained(file: &VersionFile) -> Result<Self, String> {
        let samples = &file.samples;
        let values = samples.feature_count();
        match samples {
            SampleShape::Classified { classes, .. } if values <= ROW_VALUES_MAX => {
                Ok(Self::classifier(values, *classes, file.labels.clone()))
            }
            SampleShape::Measured { targets, .. }
                if values <= ROW_VALUES_MAX && *targets <= ROW_VALUES_MAX =>
            {
                let outputs = vec![numbers(PREDICTION, *targets)];
                Ok(Self::trained(numbers(INPUT, values), outputs))
            }
            SampleShape::Tokens {
                context,
                vocabulary: BYTE_VOCABULARY,
            } => {
                // Two for each weight and token.
                let row_operations = 2 * file.parameters.len() as u64 * *context as u64;
                let outputs = vec![numbers(NEXT, BYTE_VOCABULARY)];
                Ok(Signature {
                    max_batch_size: timely_rows(row_operations),
                    ..Self::trained(tensor(TEXT, Datatype::Bytes, &[-1]), outputs)
                })
            }
            _ => Err(samples.to_string()),
        }
    }

    fn of_imported(file: &ImportedFile) -> Self {
        let described = &file.description;
        Signature {
            platform: described.format.platform().to_owned(),
            max_batch_size: described.max_batch_size,
            inputs: described.inputs.clone(),
            outputs: described.outputs.clone(),
            is_classifier: false,
            is_finite: false,
        }
    }
}

fn tensor(name: &str, datatype: Datatype, shape: &[i64]) -> TensorMetadata {
    TensorMetadata {
        name: name.to_owned(),
        datatype,
        shape: shape.to_vec(),
        labels: Vec::new(),
    }
}

/// So many numbers a row.
fn numbers(name: &str, count: usize) -> TensorMetadata {
    tensor(name, Datatype::Fp32, &[-1, count as i64])
}

/// How many rows of so many floating-point operations each a replica answers in time, by a rule of thumb; at least one.
pub(in crate::serving) fn timely_rows(row_operations: u64) -> u32 {
    let rows = BATCH_OPERATIONS / row_operations.max(1);
    u32::try_from(rows.clamp(1, BATCH_ROWS_MAX as u64)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::version_file::tests::digits;
    use crate::serving::signature::listed;

    fn version(samples: SampleShape, parameters: usize) -> Artifact {
        let mut file = digits(1);
        file.samples = samples;
        file.parameters = vec![0.0; parameters];
        Artifact::Trained(Box::new(file))
    }

    #[test]
    fn each_kind_of_samples_has_its_tensors() {
        let text = |context, vocabulary| SampleShape::Tokens {
            context,
            vocabulary,
        };
        let measured = |values, targets| SampleShape::Measured {
            features: vec![values],
            targets,
        };
        for (samples, parameters, tensors, rows) in [
            (
                SampleShape::Classified {
                    features: vec![8, 8],
                    classes: 10,
                },
                1,
                "image FP32[-1, 64] -> probabilities FP32[-1, 10], class INT64[-1]",
                128,
            ),
            (
                measured(3, 2),
                1,
                "image FP32[-1, 3] -> prediction FP32[-1, 2]",
                128,
            ),
            (
                text(64, 256),
                1000,
                "text BYTES[-1] -> next FP32[-1, 256]",
                128,
            ),
            // A hundred million weights over 50 bytes are ten billion operations.
            (
                text(50, 256),
                100_000_000,
                "text BYTES[-1] -> next FP32[-1, 256]",
                4,
            ),
        ] {
            let signature = Signature::of(&version(samples, parameters)).unwrap();
            let (inputs, outputs) = (&signature.inputs, &signature.outputs);
            let found = format!("{} -> {}", listed(inputs), listed(outputs));
            assert_eq!((found.as_str(), signature.max_batch_size), (tensors, rows));
            assert_eq!(signature.is_classifier, outputs.len() == 2);
        }
        for samples in [
            text(64, 300),
            measured(ROW_VALUES_MAX + 1, 1),
            measured(1, ROW_VALUES_MAX + 1),
        ] {
            Signature::of(&version(samples, 1)).unwrap_err();
        }
    }
}
