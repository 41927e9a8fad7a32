//! The model of a replica, without the actor around it.

use super::encoder::{
    CONFIG_FILE, EncoderError, EncoderFiles, EncoderModel, TOKENIZER_FILE, WEIGHTS_FILE,
};
use super::failing_rows;
use super::oip::TensorData;
use super::onnx::{OnnxError, OnnxModel};
use super::replica::InferError;
use super::rows::{Batch, Cell, ROWS_MAX};
use crate::registry::artifact::Artifact;
use crate::registry::imported_file::{ImportedFile, ModelFormat};
use crate::registry::version_file::VersionFileError;
use crate::training::model::Model;

/// Why a version's file is no model.
#[derive(Debug, thiserror::Error)]
pub enum PredictorError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] VersionFileError),
    /// It is not what its format wants.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// The same for an encoder.
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    /// A file is missing.
    #[error("the version has no {0}: register it again")]
    Missing(&'static str),
}

/// What a model answers to a batch.
#[derive(Debug, PartialEq)]
pub(super) struct Answered {
    /// The outputs.
    pub(super) outputs: Batch,
    /// The energy of each row's logits; none of a model whose logits nobody here sees.
    pub(super) energies: Vec<f32>,
}

/// A model that answers batches.
pub(super) enum Predictor {
    /// Trained here, with numbers in and classes out.
    Trained(Box<Model>),
    /// A graph that other tools wrote.
    Onnx(Box<OnnxModel>),
    /// An encoder of texts.
    Encoder(Box<EncoderModel>),
}

impl Predictor {
    /// Builds the model, and has it answer once, so that the first request finds it warm.
    pub(super) fn new(artifact: &Artifact) -> Result<Self, PredictorError> {
        match artifact {
            Artifact::Trained(file) => {
                let model = file.build_model()?;
                let row = vec![0.0; model.shape().feature_count()];
                model.probabilities(&row).map_err(VersionFileError::from)?;
                Ok(Predictor::Trained(Box::new(model)))
            }
            Artifact::Imported(file) => Self::imported(file),
        }
    }

    fn imported(file: &ImportedFile) -> Result<Self, PredictorError> {
        let described = &file.description;
        let bytes = |name| file.file(name).ok_or(PredictorError::Missing(name));
        let (inputs, outputs) = (described.inputs.clone(), described.outputs.clone());
        let max_batch_size = described.max_batch_size;
        match described.format {
            ModelFormat::Onnx => {
                let file = bytes(described.format.file_name())?;
                let model = OnnxModel::prepared(file, move |model| {
                    model.check_described(&inputs, &outputs, max_batch_size)?;
                    model.warm_up()?;
                    Ok(model)
                })?;
                Ok(Predictor::Onnx(Box::new(model)))
            }
            ModelFormat::Encoder => {
                let files = EncoderFiles {
                    config: bytes(CONFIG_FILE)?,
                    weights: bytes(WEIGHTS_FILE)?,
                    tokenizer: bytes(TOKENIZER_FILE)?,
                };
                let model = EncoderModel::prepared(&files, move |model| {
                    model.check_described(&inputs, &outputs, max_batch_size)?;
                    Ok(model)
                })?;
                Ok(Predictor::Encoder(Box::new(model)))
            }
        }
    }

    /// Answers a batch.
    pub(super) fn infer(&self, batch: Batch) -> Result<Answered, InferError> {
        if batch.rows.is_some_and(|rows| rows == 0 || rows > ROWS_MAX) {
            return Err(InferError::Rows {
                rows: batch.rows.unwrap_or_default(),
            });
        }
        let outputs = match self {
            Predictor::Trained(model) => return classify(model, &batch),
            Predictor::Onnx(model) => failing_rows::run(batch, |batch| model.run(batch))?,
            Predictor::Encoder(model) => model.run(batch).map_err(|error| match error {
                EncoderError::Rows(rows) => InferError::RowsRefused(rows),
                error => InferError::Model(error.to_string()),
            })?,
        };
        Ok(Answered {
            outputs,
            energies: Vec::new(),
        })
    }
}

fn classify(model: &Model, batch: &Batch) -> Result<Answered, InferError> {
    let width = model.shape().feature_count();
    let count = batch.rows.unwrap_or_default();
    let values = match batch.cells.as_slice() {
        [
            Cell {
                data: TensorData::Fp32(values),
                ..
            },
        ] if values.len() as u64 == count * width as u64 && count > 0 => values,
        _ => {
            return Err(InferError::RowCount {
                values: batch.cells.iter().map(|cell| cell.data.len() as u64).sum(),
                row_values: width as u64,
            });
        }
    };
    let said = model
        .classify(values)
        .map_err(|error| InferError::Model(error.to_string()))?;
    Ok(Answered {
        outputs: classified(said.probabilities, said.classes),
        energies: said.energies,
    })
}

/// What a classifier answers: the probability of each class, row by row, and the most probable class of each row.
#[must_use]
pub fn classified(probabilities: Vec<f32>, classes: Vec<u32>) -> Batch {
    let rows = classes.len() as u64;
    let width = probabilities.len() as u64 / rows.max(1);
    let classes = classes.into_iter().map(i64::from).collect();
    Batch {
        rows: Some(rows),
        cells: vec![
            Cell {
                shape: vec![rows, width],
                data: TensorData::Fp32(probabilities),
            },
            Cell {
                shape: vec![rows],
                data: TensorData::Int64(classes),
            },
        ],
    }
}

/// The most probable class of each row, as [`classified`] put them down; `None` if this is no such answer.
#[must_use]
pub fn classes_of(outputs: &Batch) -> Option<Vec<u32>> {
    let TensorData::Int64(classes) = &outputs.cells.get(1)?.data else {
        return None;
    };
    let class = |class: &i64| u32::try_from(*class).ok();
    classes.iter().map(class).collect()
}

#[cfg(test)]
mod tests {
    use super::super::rows::Row;
    use super::*;
    use crate::registry::version_file::tests::digits;
    use crate::training::data::Dataset;

    #[test]
    fn it_answers_as_the_model_does_and_refuses_what_is_no_row() {
        let file = digits(20);
        let predictor = Predictor::new(&Artifact::Trained(Box::new(file.clone()))).unwrap();
        let batch = Dataset::digits().unwrap().gather(&[0, 1, 2, 3, 4]).unwrap();
        let images = batch.features().to_vec();
        let join = |images: &[f32], width: usize| {
            let rows = images.chunks(width);
            Batch::join(rows.map(|row| Row::numbers(row.to_vec(), 5)).collect())
        };
        let answer = predictor.infer(join(&images, 64)).unwrap();
        let model = file.build_model().unwrap();
        let expected = classified(
            model.probabilities(&images).unwrap(),
            model.predictions(&images).unwrap(),
        );
        assert_eq!(answer.outputs, expected);
        assert_eq!(answer.energies, model.classify(&images).unwrap().energies);
        for rows in [join(&[], 64), join(&images[1..64], 63), join(&images, 32)] {
            let error = predictor.infer(rows).unwrap_err();
            assert!(error.to_string().contains("rows"), "{error}");
        }
        let many = vec![0.0; (ROWS_MAX as usize + 1) * 64];
        let error = predictor.infer(join(&many, 64)).unwrap_err();
        assert!(error.to_string().contains("1025 rows"), "{error}");
    }
}
