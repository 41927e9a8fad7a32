//! Samples in arrays: numbers in some, classes or numbers to predict in others.
//!
//! Invariants:
//! 1. Numbers are read row by row as they are needed, where they lie on this machine's disk; what comes
//!    from the object store is held in memory, or copied to this machine's disk where it is too large for that.
//! 2. The files' bytes are hashed and looked through once, when the data set is loaded; a file that is written to
//!    after that is not read any more.

use super::Digests;
use super::array::Array;
use super::error::DataError;
use super::files::Files;
use super::npy::{self, HEADER_BYTES_MAX as NPY_HEADER_BYTES_MAX, NpySpec};
use super::rows::{Features, Rows};
use super::safetensors::{self, SafetensorsSpec};
use super::scratch::Room;
use super::shape::SampleShape;
use super::table::{checked_label, checked_shape, class_count};

/// What is known of labels and scales from the job.
struct Wanted {
    classes: Option<usize>,
    divisor: f32,
}

/// Samples of `.npy` files.
pub(super) fn load_npy(
    source: &str,
    spec: &NpySpec,
    files: &Files,
    room: &Room,
    digests: &mut Digests,
) -> Result<(SampleShape, Rows), DataError> {
    let mut open = |names: &[String]| -> Result<Vec<Array>, DataError> {
        names
            .iter()
            .map(|name| open_npy(name, files, room, digests))
            .collect()
    };
    let features = open(&spec.features)?;
    let labels = open(&spec.labels)?;
    let targets = open(&spec.targets)?;
    let wanted = Wanted {
        classes: spec.classes,
        divisor: spec.scale.unwrap_or(1.0) as f32,
    };
    rows(source, features, labels, targets, &wanted)
}

/// Samples of `.safetensors` files.
pub(super) fn load_safetensors(
    source: &str,
    spec: &SafetensorsSpec,
    files: &Files,
    room: &Room,
    digests: &mut Digests,
) -> Result<(SampleShape, Rows), DataError> {
    let (mut features, mut labels, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for file in &spec.files {
        let bytes = files.open(file, room)?;
        digests.add(file, &bytes)?;
        let size_bytes = bytes.size_bytes();
        let mut start = vec![0; size_bytes.min(8) as usize];
        bytes.read_at(file, &mut start, 0)?;
        let header_bytes = safetensors::header_bytes(file, &start)?.min(size_bytes);
        let mut header = vec![0; header_bytes as usize];
        bytes.read_at(file, &mut header, 0)?;
        let array = |name: &str| -> Result<Array, DataError> {
            Ok(Array {
                file: format!("{file} ({name})"),
                bytes: bytes.clone(),
                place: safetensors::place(file, &header, size_bytes, name)?,
            })
        };
        features.push(array(&spec.features)?);
        if let Some(name) = &spec.labels {
            labels.push(array(name)?);
        }
        if let Some(name) = &spec.targets {
            targets.push(array(name)?);
        }
    }
    let wanted = Wanted {
        classes: spec.classes,
        divisor: spec.scale.unwrap_or(1.0) as f32,
    };
    rows(source, features, labels, targets, &wanted)
}

fn open_npy(
    name: &str,
    files: &Files,
    room: &Room,
    digests: &mut Digests,
) -> Result<Array, DataError> {
    let bytes = files.open(name, room)?;
    digests.add(name, &bytes)?;
    let size_bytes = bytes.size_bytes();
    let mut start = vec![0; size_bytes.min(NPY_HEADER_BYTES_MAX as u64 + 12) as usize];
    bytes.read_at(name, &mut start, 0)?;
    Ok(Array {
        file: name.to_owned(),
        place: npy::place(name, &start, size_bytes)?,
        bytes,
    })
}

fn misfit(file: &str, reason: String) -> DataError {
    DataError::Misfit {
        file: file.to_owned(),
        reason,
    }
}

/// The samples of arrays that belong together by their order.
fn rows(
    source: &str,
    features: Vec<Array>,
    labels: Vec<Array>,
    targets: Vec<Array>,
    wanted: &Wanted,
) -> Result<(SampleShape, Rows), DataError> {
    let Some(first) = features.first() else {
        return Err(misfit(
            source,
            "it has no array of numbers; name at least one".to_owned(),
        ));
    };
    let shape = match first.place.shape.get(1..) {
        Some([]) => vec![1],
        Some(shape) => shape.to_vec(),
        None => {
            return Err(misfit(
                &first.file,
                "it holds a single number where [samples, …] are needed".to_owned(),
            ));
        }
    };
    for array in &features {
        if array.place.shape.get(1..) != first.place.shape.get(1..) {
            return Err(misfit(
                &array.file,
                format!(
                    "its samples are {:?} and those of {} are {:?}; all must be alike",
                    &array.place.shape[1..],
                    first.file,
                    &first.place.shape[1..]
                ),
            ));
        }
        array.check_finite()?;
    }
    let to_predict = match (labels.is_empty(), targets.is_empty()) {
        (false, true) => &labels,
        (true, false) => &targets,
        _ => {
            return Err(misfit(
                source,
                "samples have either labels or targets; name one of them".to_owned(),
            ));
        }
    };
    check_counts(source, &features, to_predict)?;
    let values = Features::arrays(features, wanted.divisor);
    if targets.is_empty() {
        let mut classes = Vec::new();
        for array in &labels {
            push_labels(array, wanted.classes, &mut classes)?;
        }
        let shape = SampleShape::Classified {
            features: shape,
            classes: wanted.classes.unwrap_or_else(|| class_count(&classes)),
        };
        let rows = Rows::Classified {
            features: values,
            labels: classes,
        };
        return checked_shape(source, shape).map(|shape| (shape, rows));
    }
    let width = targets[0].place.width().unwrap_or(0);
    let mut numbers = Vec::new();
    for array in &targets {
        if array.place.width() != Some(width) {
            return Err(misfit(
                &array.file,
                format!("it has other than {width} numbers to predict for a sample"),
            ));
        }
        array.check_finite()?;
        numbers.extend(array.numbers()?);
    }
    let shape = SampleShape::Measured {
        features: shape,
        targets: width,
    };
    let rows = Rows::Measured {
        features: values,
        targets: Features::Memory(numbers),
    };
    checked_shape(source, shape).map(|shape| (shape, rows))
}

fn check_counts(source: &str, features: &[Array], to_predict: &[Array]) -> Result<(), DataError> {
    if features.len() != to_predict.len() {
        return Err(misfit(
            source,
            format!(
                "{} arrays of numbers and {} of what to predict; name as many, in the same order",
                features.len(),
                to_predict.len()
            ),
        ));
    }
    for (numbers, predicted) in features.iter().zip(to_predict) {
        if numbers.place.rows() != predicted.place.rows() {
            return Err(misfit(
                &predicted.file,
                format!(
                    "it is about {} samples, and {} holds {}",
                    predicted.place.rows(),
                    numbers.file,
                    numbers.place.rows()
                ),
            ));
        }
    }
    Ok(())
}

fn push_labels(
    array: &Array,
    classes: Option<usize>,
    labels: &mut Vec<u32>,
) -> Result<(), DataError> {
    if array.place.width() != Some(1) {
        return Err(misfit(
            &array.file,
            format!(
                "labels are one number a sample, and these are {:?}",
                array.place.shape
            ),
        ));
    }
    let Some(numbers) = array.whole_numbers()? else {
        return Err(misfit(
            &array.file,
            "labels are whole numbers, and these are not; convert them with .astype('<i8')"
                .to_owned(),
        ));
    };
    for (row, label) in numbers.into_iter().enumerate() {
        labels.push(checked_label(&array.file, row + 1, label, classes)?);
    }
    Ok(())
}
