//! What the versions of an endpoint take and give, and what follows from that for requests; `of_version` reads it off a version.

mod of_version;

use std::time::Duration;

use super::batcher::BatchAnswer;
use super::feed::{Observation, ObservedRequest, Prediction};
use super::fleet::BATCH_ROWS_MAX;
use super::http::BodyLimits;
use super::oip::{
    Datatype, DecodeError, InferRequest, ModelMetadata, OipError, Tensor, TensorData,
    TensorMetadata,
};
use super::replica::InferError;
use super::rows::{BATCH_BYTES_MAX, Batch, Cell, Row};

#[cfg(test)]
pub(super) use of_version::BATCH_OPERATIONS;
pub(super) use of_version::timely_rows;

/// The input of a version that was trained here: numbers, row by row.
pub const INPUT: &str = "image";
/// The input of a version that was trained on text.
pub const TEXT: &str = "text";
/// Its output: the probability of each byte to come next.
pub const NEXT: &str = "next";
/// The output of a version that was trained to predict numbers.
pub const PREDICTION: &str = "prediction";
/// Its output with the probability of each class.
pub const PROBABILITIES: &str = "probabilities";
/// Its output with the most probable class.
pub const CLASS: &str = "class";

/// What a value takes in a JSON body: a number of 17 digits with sign and exponent, and the white space of a printer that
/// puts each on a line of its own.
const VALUE_TEXT_BYTES: usize = 64;

/// The largest body: a full batch of FP32 as JSON.
const BODY_BYTES_MAX: usize = BATCH_BYTES_MAX / size_of::<f32>() * VALUE_TEXT_BYTES + 64 * 1024;

/// Values of a row of a version that was trained here, at most: a full batch of them then takes half of what a call may hold.
pub const ROW_VALUES_MAX: usize = 8192;

/// The bodies that a server reads before it knows whose they are: the largest that any endpoint takes.
pub const BODY_LIMITS_MAX: BodyLimits = BodyLimits {
    max_bytes: BODY_BYTES_MAX,
    timeout: Duration::from_secs(20),
};

/// Bytes of a text in an input of BYTES, at most. A full batch of the longest then takes half of what a batch may, so that
/// texts of any lengths can be joined.
pub const TEXT_BYTES_MAX: usize = BATCH_BYTES_MAX / (2 * BATCH_ROWS_MAX);

/// What a byte of a text takes in a JSON body, at most: as `\u0000`.
const BYTE_TEXT_BYTES: usize = 6;

/// What a version that was made elsewhere takes and gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// The inputs, with the batch dimension if it has one.
    pub inputs: Vec<TensorMetadata>,
    /// The outputs.
    pub outputs: Vec<TensorMetadata>,
    /// Rows of a request, at most; 0 if the first dimension is no batch.
    pub max_batch_size: u32,
}

/// What all versions of an endpoint take and give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// What computes it, for example `mobula_candle`.
    pub platform: String,
    /// Rows of a request, at most; 0 if the first dimension is no batch.
    pub max_batch_size: u32,
    /// The inputs, with the batch dimension if it has one.
    pub inputs: Vec<TensorMetadata>,
    /// The outputs.
    pub outputs: Vec<TensorMetadata>,
    /// Whether it gives [`PROBABILITIES`] and [`CLASS`] of rows of numbers, which a monitor can watch.
    pub is_classifier: bool,
    /// Whether only finite numbers are taken, and given.
    pub is_finite: bool,
}

impl Signature {
    /// How `version`, which has this signature, differs from an endpoint with the `other`.
    #[must_use]
    pub fn difference(&self, version: u64, other: &Signature) -> String {
        let labels = |signature: &Signature| -> Vec<String> {
            let outputs = signature.outputs.iter();
            outputs.flat_map(|output| output.labels.clone()).collect()
        };
        for (does, mine, others) in [
            ("takes", &self.inputs, &other.inputs),
            ("gives", &self.outputs, &other.outputs),
        ] {
            if listed(mine) != listed(others) {
                let (mine, others) = (listed(mine), listed(others));
                return format!("version {version} {does} {mine}, the endpoint {others}");
            }
        }
        if labels(self) != labels(other) {
            let (mine, others) = (labels(self), labels(other));
            return format!(
                "version {version} calls its classes {mine:?}, the endpoint {others:?}"
            );
        }
        format!(
            "version {version} is of {} with at most {} rows a request, the endpoint of {} with {}",
            self.platform, self.max_batch_size, other.platform, other.max_batch_size
        )
    }

    /// The model of this name, without its versions, which change.
    #[must_use]
    pub(super) fn metadata(&self, name: &str) -> ModelMetadata {
        ModelMetadata {
            name: name.to_owned(),
            versions: Vec::new(),
            platform: self.platform.clone(),
            max_batch_size: self.max_batch_size,
            inputs: self.inputs.clone(),
            outputs: self.outputs.clone(),
        }
    }

    /// The bodies that an endpoint reads: a full batch as JSON, and what is around it. For rows of 64 values, a thousand
    /// connections can so be made to hold a gigabyte.
    #[must_use]
    pub fn body_limits(&self) -> BodyLimits {
        let text_bytes = |input: &TensorMetadata| {
            let value = match input.datatype {
                Datatype::Bytes => VALUE_TEXT_BYTES + TEXT_BYTES_MAX * BYTE_TEXT_BYTES,
                _ => VALUE_TEXT_BYTES,
            };
            let skipped = usize::from(self.max_batch_size > 0);
            let mut known = input.shape.iter().skip(skipped);
            known.try_fold(value, |bytes, dimension| {
                bytes.checked_mul(usize::try_from(*dimension).ok()?)
            })
        };
        let row = self
            .inputs
            .iter()
            .map(text_bytes)
            .try_fold(0usize, |sum, bytes| sum.checked_add(bytes?));
        let rows = self.max_batch_size.max(1) as usize;
        let full = row.and_then(|row| row.checked_mul(rows));
        let max_bytes = full.and_then(|bytes| bytes.checked_add(64 * 1024));
        BodyLimits {
            max_bytes: max_bytes.map_or(BODY_BYTES_MAX, |bytes| bytes.min(BODY_BYTES_MAX)),
            ..BODY_LIMITS_MAX
        }
    }

    /// The rows of a request that fits the metadata.
    pub(super) fn rows_of(&self, request: InferRequest) -> Result<Vec<Row>, OipError> {
        let mut given = request.inputs;
        let mut cells = Vec::with_capacity(self.inputs.len());
        for input in &self.inputs {
            let at = given.iter().position(|tensor| tensor.name() == input.name);
            let Some(at) = at else {
                return Err(OipError::Failed {
                    reason: format!("the input {:?} is missing", input.name),
                });
            };
            let tensor = given.swap_remove(at);
            let shape = tensor.shape().to_vec();
            let data = tensor.into_data();
            if self.is_finite {
                check_finite(&input.name, &data)?;
            }
            cells.push(Cell { shape, data });
        }
        let rows = match self.max_batch_size {
            0 => None,
            _ => cells.first().and_then(|cell| cell.shape.first().copied()),
        };
        let batch = Batch { rows, cells };
        let size_bytes = batch.size_bytes();
        if size_bytes > BATCH_BYTES_MAX {
            return Err(OipError::InputTooLarge {
                size_bytes: size_bytes as u64,
                limit_bytes: BATCH_BYTES_MAX as u64,
            });
        }
        let misfit = |error: super::rows::RowMisfit| OipError::Failed {
            reason: error.to_string(),
        };
        let mut rows = batch.split().map_err(misfit)?;
        check_texts(&rows)?;
        if self.max_batch_size > 0 {
            let row_bytes = size_bytes.div_ceil(rows.len().max(1)).max(1);
            let fitting = (BATCH_BYTES_MAX / row_bytes).min(self.max_batch_size as usize);
            for row in &mut rows {
                row.batch_rows_max = Some(fitting);
            }
        }
        Ok(rows)
    }

    /// The outputs of a request's rows.
    pub(super) fn outputs_of(&self, version: u64, rows: Vec<Row>) -> Result<Vec<Tensor>, OipError> {
        let size_bytes: usize = rows.iter().map(Row::size_bytes).sum();
        if size_bytes > BATCH_BYTES_MAX {
            // Computed in parts, perhaps; but whoever passes it on has no room for it.
            return Err(OipError::Failed {
                reason: InferError::too_large(size_bytes as u64).to_string(),
            });
        }
        let names = self.outputs.iter().map(|output| output.name.as_str());
        let misfit = |error: DecodeError| OipError::Failed {
            reason: error.to_string(),
        };
        let mut rows = rows;
        if self.max_batch_size == 0 {
            for row in &mut rows {
                row.batch_rows_max = None;
            }
        }
        let tensors = Batch::join(rows).into_tensors(names).map_err(misfit)?;
        if tensors.len() != self.outputs.len() {
            return Err(OipError::Failed {
                reason: format!(
                    "version {version} answered {} of its {} outputs",
                    tensors.len(),
                    self.outputs.len()
                ),
            });
        }
        if let Some((name, index, value)) =
            tensors
                .iter()
                .filter(|_| self.is_finite)
                .find_map(|tensor| {
                    first_not_finite(tensor.data())
                        .map(|(index, value)| (tensor.name(), index, value))
                })
        {
            return Err(OipError::Failed {
                reason: format!(
                    "version {version} answered {value} at index {index} of {name:?}, which is no \
                     number"
                ),
            });
        }
        Ok(tensors)
    }

    /// What a monitor is told of rows that this version answered, if it can make something of them.
    pub(super) fn observation(
        &self,
        version: u64,
        request: ObservedRequest,
        rows: Vec<Row>,
        answer: &BatchAnswer<Row>,
    ) -> Option<Observation> {
        if !self.is_classifier {
            return None;
        }
        let TensorData::Fp32(rows) = Batch::join(rows).cells.into_iter().next()?.data else {
            return None;
        };
        let prediction = |row: &Row| match (&row.cells.first()?.data, &row.cells.get(1)?.data) {
            (TensorData::Fp32(probabilities), TensorData::Int64(class)) => {
                let class = u32::try_from(*class.first()?).ok()?;
                Some(Prediction {
                    class,
                    confidence: *probabilities.get(class as usize)?,
                    energy: row.energy,
                })
            }
            _ => None,
        };
        let predictions: Option<Vec<Prediction>> = answer.outputs.iter().map(prediction).collect();
        Some(Observation::of(version, request, rows, &predictions?))
    }
}

fn first_not_finite(data: &TensorData) -> Option<(usize, f32)> {
    let TensorData::Fp32(values) = data else {
        return None;
    };
    let index = values.iter().position(|value| !value.is_finite())?;
    Some((index, values[index]))
}

fn check_finite(input: &str, data: &TensorData) -> Result<(), OipError> {
    let Some((index, value)) = first_not_finite(data) else {
        return Ok(());
    };
    // Only binary data can hold such values; the answer would be no number either.
    Err(OipError::Decode(DecodeError::Element {
        tensor: input.to_owned(),
        index: index as u64,
        got: value.to_string(),
        datatype: Datatype::Fp32,
    }))
}

/// Refuses texts with which a batch could not be joined.
fn check_texts(rows: &[Row]) -> Result<(), OipError> {
    for (row, cells) in rows.iter().enumerate() {
        let texts = cells.cells.iter().filter_map(|cell| match &cell.data {
            TensorData::Bytes(texts) => Some(texts),
            _ => None,
        });
        let longest = texts.flatten().map(Vec::len).max().unwrap_or(0);
        if longest > TEXT_BYTES_MAX {
            return Err(OipError::RowRefused {
                row: row as u64,
                reason: format!(
                    "a text has {longest} bytes, the limit is {TEXT_BYTES_MAX}: send a shorter one"
                ),
            });
        }
    }
    Ok(())
}

/// Tensors without their labels.
pub(super) fn listed(tensors: &[TensorMetadata]) -> String {
    let one = |t: &TensorMetadata| format!("{} {}{:?}", t.name, t.datatype, t.shape);
    tensors.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(max_batch_size: u32) -> Signature {
        let tensor = |name: &str, shape: &[i64]| TensorMetadata {
            name: name.to_owned(),
            datatype: Datatype::Fp32,
            shape: shape.to_vec(),
            labels: Vec::new(),
        };
        Signature {
            platform: "onnx".into(),
            max_batch_size,
            inputs: vec![tensor("a", &[-1, 2]), tensor("b", &[-1, -1])],
            outputs: vec![tensor("y", &[-1, 1])],
            is_classifier: false,
            is_finite: false,
        }
    }

    fn request(tensors: Vec<(&str, Vec<u64>)>) -> InferRequest {
        let tensor = |(name, shape): (&str, Vec<u64>)| {
            let count: u64 = shape.iter().product();
            let data = (0..count).map(|value| value as f32).collect();
            Tensor::new(name, shape, TensorData::Fp32(data)).unwrap()
        };
        InferRequest {
            inputs: tensors.into_iter().map(tensor).collect(),
            ..InferRequest::default()
        }
    }

    #[test]
    fn rows_have_the_models_order_and_no_more_bytes_than_a_batch_takes() {
        let given = || request(vec![("b", vec![3, 5]), ("a", vec![3, 2])]);
        let rows = open(8).rows_of(given()).unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[1].cells[0].data, TensorData::Fp32(vec![2.0, 3.0]));
        assert_eq!(
            (&rows[1].cells[1].shape, rows[1].batch_rows_max),
            (&vec![5], Some(8))
        );
        // A request of a model that does not batch is one row.
        let rows = open(0).rows_of(given()).unwrap();
        assert_eq!((rows.len(), rows[0].batch_rows_max), (1, None));
        assert_eq!(rows[0].cells[1].shape, [3, 5]);

        let wide = request(vec![("a", vec![1, 2]), ("b", vec![1, 300_000])]);
        assert_eq!(open(8).rows_of(wide).unwrap()[0].batch_rows_max, Some(3));
        let too_wide = request(vec![("a", vec![1, 2]), ("b", vec![1, 1 << 20])]);
        let error = open(8).rows_of(too_wide).unwrap_err();
        assert_eq!(error.status(), 413);
        assert!(error.to_string().contains("4194304"), "{error}");
    }

    #[test]
    fn bodies_are_as_large_as_a_full_batch_and_bounded_where_that_is_not_known() {
        let digits = Signature::classifier(64, 10, Vec::new());
        assert_eq!(digits.body_limits().max_bytes, 128 * 64 * 64 + 64 * 1024);
        assert_eq!(open(8).body_limits().max_bytes, BODY_BYTES_MAX);
    }

    #[test]
    fn texts_of_any_lengths_fit_into_a_batch_and_longer_ones_are_refused() {
        let reader = Signature {
            inputs: vec![TensorMetadata {
                name: "text".into(),
                datatype: Datatype::Bytes,
                shape: vec![-1],
                labels: Vec::new(),
            }],
            ..open(128)
        };
        let ask = |texts: Vec<Vec<u8>>| {
            let shape = vec![texts.len() as u64];
            let tensor = Tensor::new("text", shape, TensorData::Bytes(texts)).unwrap();
            reader.rows_of(InferRequest {
                inputs: vec![tensor],
                ..InferRequest::default()
            })
        };
        let rows = ask(vec![vec![b'a'; TEXT_BYTES_MAX]; 128]).unwrap();
        assert_eq!((rows.len(), rows[0].batch_rows_max), (128, Some(128)));
        assert!(Batch::join(rows).size_bytes() <= BATCH_BYTES_MAX);
        let error = ask(vec![Vec::new(), vec![b'a'; TEXT_BYTES_MAX + 1]]).unwrap_err();
        assert!(
            matches!(error, OipError::RowRefused { row: 1, .. }),
            "{error}"
        );
        assert!(
            error
                .to_string()
                .contains("16385 bytes, the limit is 16384"),
            "{error}"
        );
        // A full batch of control characters, which JSON spells the longest.
        let body = 128 * (TEXT_BYTES_MAX * 6 + 64) + 64 * 1024;
        assert_eq!(reader.body_limits().max_bytes, body);
    }

    #[test]
    fn a_difference_is_named() {
        let digits = Signature::classifier(64, 10, vec!["zero".into()]);
        for (other, expected) in [
            (
                Signature::classifier(32, 10, Vec::new()),
                "takes image FP32[-1, 32], the endpoint",
            ),
            (
                Signature::classifier(64, 9, Vec::new()),
                "gives probabilities FP32[-1, 9]",
            ),
            (
                Signature::classifier(64, 10, Vec::new()),
                "calls its classes []",
            ),
            (
                Signature {
                    max_batch_size: 3,
                    ..digits.clone()
                },
                "at most 3 rows",
            ),
        ] {
            let said = other.difference(7, &digits);
            assert!(
                said.starts_with("version 7 ") && said.contains(expected),
                "{said}"
            );
        }
    }
}
