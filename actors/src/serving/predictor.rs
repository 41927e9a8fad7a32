//! The model of a replica, without the actor around it.

use super::encoder::{
    CONFIG_FILE, EncoderError, EncoderFiles, EncoderModel, TOKENIZER_FILE, WEIGHTS_FILE,
};
use super::failing_rows;
use super::oip::TensorData;
use super::onnx::{OnnxError, OnnxModel};
use super::replica::{InferError, RefusedRow};
use super::rows::{BATCH_BYTES_MAX, Batch, Cell, ROWS_MAX};
use crate::device::{ComputeDevice, DeviceError};
use crate::registry::artifact::Artifact;
use crate::registry::imported_file::{ImportedFile, ModelFormat};
use crate::registry::version_file::VersionFileError;
use crate::training::data::SampleShape;
use crate::training::model::{Model, ModelError};

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
    /// The device that it is to answer on.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Nothing here computes imported models elsewhere.
    #[error("imported models answer on CPUs only, not on {0}")]
    CpuOnly(ComputeDevice),
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
    /// Trained here: classes or numbers for numbers, or what comes after a text.
    Trained(Box<Model>),
    /// A graph that other tools wrote.
    Onnx(Box<OnnxModel>),
    /// An encoder of texts.
    Encoder(Box<EncoderModel>),
}

impl Predictor {
    /// Builds the model on `device`, and has it answer once, so that the first request finds it warm.
    pub(super) fn new(artifact: &Artifact, device: ComputeDevice) -> Result<Self, PredictorError> {
        match artifact {
            Artifact::Trained(file) => {
                let model = file.build_model_on(device.open()?)?;
                try_out(&model).map_err(VersionFileError::from)?;
                Ok(Predictor::Trained(Box::new(model)))
            }
            Artifact::Imported(_) if device != ComputeDevice::Cpu => {
                Err(PredictorError::CpuOnly(device))
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

    /// Whether it still answers anything: what it did not answer was to blame, and not the device that it is on.
    pub(super) fn is_sound(&self) -> bool {
        match self {
            Predictor::Trained(model) => try_out(model).is_ok(),
            Predictor::Onnx(_) | Predictor::Encoder(_) => true,
        }
    }

    /// Answers a batch.
    pub(super) fn infer(&self, batch: Batch) -> Result<Answered, InferError> {
        if batch.rows.is_some_and(|rows| rows == 0 || rows > ROWS_MAX) {
            return Err(InferError::Rows {
                rows: batch.rows.unwrap_or_default(),
            });
        }
        let answered = self.compute(batch)?;
        match answered.outputs.size_bytes() {
            fits if fits <= BATCH_BYTES_MAX => Ok(answered),
            size_bytes => Err(InferError::too_large(size_bytes as u64)),
        }
    }

    fn compute(&self, batch: Batch) -> Result<Answered, InferError> {
        let outputs = match self {
            Predictor::Trained(model) => return trained(model, &batch),
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

/// Has a model answer one sample of zeros.
fn try_out(model: &Model) -> Result<Vec<f32>, ModelError> {
    match model.shape() {
        SampleShape::Tokens { .. } => model.next_tokens(&[vec![0]]),
        shape => model.outputs(&vec![0.0; shape.feature_count()]),
    }
}

/// What a version that was trained here answers, as its [`Signature`](super::signature::Signature) says.
fn trained(model: &Model, batch: &Batch) -> Result<Answered, InferError> {
    let (width, values) = match model.shape() {
        SampleShape::Classified { .. } => return classify(model, batch),
        SampleShape::Measured { targets, .. } => {
            let predicted = model.outputs(numbers(model, batch)?);
            (*targets, predicted.map_err(failed)?)
        }
        SampleShape::Tokens { vocabulary, .. } => {
            let next = model.next_tokens(&tokens(batch)?);
            (*vocabulary, next.map_err(failed)?)
        }
    };
    let rows = batch.rows.unwrap_or_default();
    let cell = Cell {
        shape: vec![rows, width as u64],
        data: TensorData::Fp32(values),
    };
    Ok(Answered {
        outputs: Batch {
            rows: Some(rows),
            cells: vec![cell],
        },
        energies: Vec::new(),
    })
}

fn failed(error: ModelError) -> InferError {
    InferError::Model(error.to_string())
}

/// The bytes of each text; or all the texts that have none.
fn tokens(batch: &Batch) -> Result<Vec<Vec<u32>>, InferError> {
    let [
        Cell {
            data: TensorData::Bytes(texts),
            ..
        },
    ] = batch.cells.as_slice()
    else {
        return Err(InferError::Model("it takes one text a row".to_owned()));
    };
    let empty = texts.iter().enumerate().filter(|(_, text)| text.is_empty());
    let refused: Vec<RefusedRow> = empty
        .map(|(row, _)| RefusedRow {
            row: row as u64,
            reason: "the text is empty: send one byte at least".to_owned(),
        })
        .collect();
    if !refused.is_empty() {
        return Err(InferError::RowsRefused(refused));
    }
    let tokens = |text: &Vec<u8>| text.iter().copied().map(u32::from).collect();
    Ok(texts.iter().map(tokens).collect())
}

/// The numbers of whole rows.
fn numbers<'a>(model: &Model, batch: &'a Batch) -> Result<&'a [f32], InferError> {
    let width = model.shape().feature_count();
    let count = batch.rows.unwrap_or_default();
    match batch.cells.as_slice() {
        [
            Cell {
                data: TensorData::Fp32(values),
                ..
            },
        ] if values.len() as u64 == count * width as u64 && count > 0 => Ok(values),
        _ => Err(InferError::RowCount {
            values: batch.cells.iter().map(|cell| cell.data.len() as u64).sum(),
            row_values: width as u64,
        }),
    }
}

fn classify(model: &Model, batch: &Batch) -> Result<Answered, InferError> {
    let said = model.classify(numbers(model, batch)?).map_err(failed)?;
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
    use crate::registry::version_file::VersionFile;
    use crate::registry::version_file::tests::digits;
    use crate::training::data::{self, Dataset};
    use crate::training::models::{ModelConfig, ModelSpec, TransformerSpec};
    use crate::training::parameters::{Initial, Parameter, Parameters, ShardOutput};
    use crate::training::trainable::{EvaluationSums, ShardContext, Trainable};

    /// A version of this network, untrained, and the network.
    fn version(model: ModelSpec, samples: SampleShape) -> (VersionFile, Model) {
        let mut file = digits(1);
        let made = Model::new(&model, &samples, 7).unwrap();
        file.parameters = made.flat().to_vec();
        (file.model, file.samples) = (model, samples);
        (file, made)
    }

    fn predictor(model: ModelSpec, samples: SampleShape) -> (Predictor, Model) {
        let (file, made) = version(model, samples);
        let predictor =
            Predictor::new(&Artifact::Trained(Box::new(file)), ComputeDevice::Cpu).unwrap();
        (predictor, made)
    }

    /// A program's own model, which can be trained and answers nothing.
    #[derive(Debug)]
    struct Mute;

    impl Trainable for Mute {
        fn parameters(&self) -> Vec<Parameter> {
            vec![Parameter::new("weight", &[1], Initial::Zeros)]
        }

        fn shard_gradients(
            &self,
            _: &Parameters,
            _: &data::Batch,
            _: &ShardContext,
        ) -> Result<ShardOutput, ModelError> {
            unreachable!("nobody trains it here")
        }

        fn evaluate(&self, _: &Parameters, _: &data::Batch) -> Result<EvaluationSums, ModelError> {
            unreachable!("nobody measures it here")
        }
    }

    crate::trainable!("mute", |_config, _shape| Ok(Box::new(Mute)));

    #[test]
    fn a_version_whose_model_answers_nothing_is_found_before_the_first_request() {
        let classified = SampleShape::Classified {
            features: vec![3],
            classes: 2,
        };
        let tokens = SampleShape::Tokens {
            context: 4,
            vocabulary: 256,
        };
        for samples in [classified, tokens] {
            let model = ModelSpec::Custom {
                name: "mute".to_owned(),
                config: ModelConfig::default(),
            };
            // Its network can be built, with the parameters that it has.
            let (file, _) = version(model, samples);
            assert!(file.build_model().is_ok());
            let made = Predictor::new(&Artifact::Trained(Box::new(file)), ComputeDevice::Cpu);
            let Err(error) = made else {
                panic!("a replica would be ready that answers nothing")
            };
            let words = error.to_string();
            assert!(words.contains("can be trained but not served"), "{words}");
        }
    }

    #[test]
    fn a_convolutional_network_answers_as_the_model_does() {
        let (sides, classes) = ([6, 5, 2], 4);
        let width = sides.iter().product::<usize>();
        let samples = SampleShape::Classified {
            features: sides.to_vec(),
            classes,
        };
        let spec = ModelSpec::Cnn {
            channels: vec![3, 2],
        };
        let (predictor, model) = predictor(spec, samples);
        let pixel = |at: usize| (at * 37 % 101) as f32 / 101.0 - 0.5;
        let images: Vec<f32> = (0..3 * width).map(pixel).collect();
        let rows = images
            .chunks(width)
            .map(|row| Row::numbers(row.to_vec(), 5));
        let answer = predictor.infer(Batch::join(rows.collect())).unwrap();
        let said = model.classify(&images).unwrap();
        // Three images, about which it says different things.
        let (first, others) = said.probabilities.split_at(classes);
        assert_eq!(others.len(), 2 * classes);
        assert_ne!(first, &others[..classes]);
        assert_eq!(answer.energies, said.energies);
        let expected = classified(said.probabilities, said.classes);
        assert_eq!(answer.outputs, expected);
    }

    #[test]
    fn a_version_that_predicts_numbers_answers_with_them() {
        let samples = SampleShape::Measured {
            features: vec![3],
            targets: 2,
        };
        let (predictor, model) = predictor(ModelSpec::Mlp { hidden: vec![5] }, samples);
        let values = [0.5, -1.0, 2.0, 0.25, 0.0, -0.5];
        let rows = values.chunks(3).map(|row| Row::numbers(row.to_vec(), 5));
        let answer = predictor.infer(Batch::join(rows.collect())).unwrap();
        let expected = Cell {
            shape: vec![2, 2],
            data: TensorData::Fp32(model.outputs(&values).unwrap()),
        };
        assert_eq!(answer.outputs.cells, [expected]);
        let short = Batch::join(vec![Row::numbers(vec![1.0, 2.0], 5)]);
        assert!(predictor.infer(short).is_err());
    }

    #[test]
    fn a_version_of_text_says_what_comes_next() {
        let samples = SampleShape::Tokens {
            context: 4,
            vocabulary: 256,
        };
        let spec = TransformerSpec {
            layers: 1,
            width: 8,
            heads: 2,
            dropout: 0.1,
            tied: true,
        };
        let (predictor, model) = predictor(ModelSpec::Transformer(spec), samples);
        let ask = |texts: &[&str]| {
            let data = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
            let rows = texts.len() as u64;
            predictor.infer(Batch {
                rows: Some(rows),
                cells: vec![Cell {
                    shape: vec![rows],
                    data: TensorData::Bytes(data),
                }],
            })
        };
        let answer = ask(&["a", "no more than four", "four"]).unwrap().outputs;
        let TensorData::Fp32(next) = &answer.cells[0].data else {
            panic!("probabilities are FP32")
        };
        assert_eq!(answer.cells[0].shape, [3, 256]);
        let alone = model.next_tokens(&[vec![u32::from(b'a')]]).unwrap();
        assert_eq!(next[..256], alone);
        // It sees the last four bytes.
        assert_eq!(next[256..512], next[512..]);
        for row in next.chunks_exact(256) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
        let Err(InferError::RowsRefused(refused)) = ask(&["a", "", "b"]) else {
            panic!("there is nothing to go on from")
        };
        assert_eq!((refused.len(), refused[0].row), (1, 1));
    }

    #[test]
    fn it_answers_as_the_model_does_and_refuses_what_is_no_row() {
        let file = digits(20);
        let predictor = Predictor::new(
            &Artifact::Trained(Box::new(file.clone())),
            ComputeDevice::Cpu,
        )
        .unwrap();
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
