//! Everything that training carries from step to step, as values and as bytes.
//!
//! Invariants:
//! 1. (spec, data, `TrainState`) decides the rest of the job; nothing else is carried over a step.
//! 2. The byte layout is fixed, little-endian and complete: `from_bytes` accepts exactly what `to_bytes`
//!    wrote, and neither trusts a length before comparing it with the bytes that are there.
//!
//! | bytes | field |
//! |---|---|
//! | 8 | magic `MOBTRAIN` |
//! | 4 | version, 1 |
//! | 8 | step |
//! | 32 | fingerprint of the job |
//! | 4 | number of moments |
//! | 8 | values in the parameter vector and in each moment |
//! | 4 each | the parameters, then each moment, as `f32` in sorted name order |

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::flat_vector::FlatVector;
use super::layout::{Layout, ParameterSlot};
use super::validation::PARAMETERS_MAX;
use super::value_bytes::{bytes_of, values_of};
use super::workload::Workload;
use crate::kernels::target::Target;

const MAGIC: &[u8; 8] = b"MOBTRAIN";
const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: usize = 8 + 4 + 8 + 32 + 4 + 8;
/// No optimizer here keeps more than two moments; some head room for later ones.
const MOMENTS_MAX: usize = 4;

/// The state of a job between two steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// The next step to take; also the number of steps taken.
    pub step: u64,
    /// [`Workload::fingerprint`] of the job, so that a state is never restored into another one.
    pub fingerprint: [u8; 32],
    /// The parameters, flat.
    pub params: FlatVector,
    /// The optimizer's moments, each as long as `params`.
    pub moments: Vec<FlatVector>,
}

/// Why bytes are not a training state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Another kind of file.
    #[error("these bytes are no training state: they do not begin with MOBTRAIN")]
    Magic,
    /// A version that this build does not know.
    #[error("training state version {found}, but this build reads version {VERSION} only")]
    Version {
        /// The version found.
        found: u32,
    },
    /// A count above its limit.
    #[error("a training state with {found} {what} is above the limit of {limit}")]
    TooLarge {
        /// What is counted.
        what: &'static str,
        /// The count found.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// Too few or too many bytes.
    #[error("a training state of {expected} bytes came as {found}; it is truncated or has a tail")]
    Length {
        /// Bytes that the header asks for.
        expected: u64,
        /// Bytes given.
        found: u64,
    },
    /// The state of another job.
    #[error(
        "this state belongs to another job: program, data, seed or batch differ (fingerprint {found}, this job {expected})"
    )]
    OtherJob {
        /// Fingerprint of this job, in hex.
        expected: String,
        /// Fingerprint of the state, in hex.
        found: String,
    },
}

impl TrainState {
    /// The state before the first step.
    #[must_use]
    pub fn initial(workload: &Workload) -> Self {
        let params = workload.initial_parameters();
        let moment = |_| FlatVector::from(vec![0.0; params.len()]);
        Self {
            step: 0,
            fingerprint: workload.fingerprint(),
            moments: (0..workload.spec().optimizer.moment_count())
                .map(moment)
                .collect(),
            params: params.into(),
        }
    }

    /// Refuses the state of another job.
    pub fn check_fingerprint(&self, expected: &[u8; 32]) -> Result<(), StateError> {
        if self.fingerprint == *expected {
            return Ok(());
        }
        let hex = |bytes: &[u8; 32]| blake3::Hash::from_bytes(*bytes).to_hex().to_string();
        Err(StateError::OtherJob {
            expected: hex(expected),
            found: hex(&self.fingerprint),
        })
    }

    /// Bytes of the state in its fixed layout.
    pub fn byte_count(&self) -> u64 {
        (HEADER_BYTES + self.params.len() * (1 + self.moments.len()) * 4) as u64
    }

    /// The state in its fixed layout.
    ///
    /// # Panics
    /// If a moment's length differs from the parameters'.
    pub fn to_bytes(&self) -> Vec<u8> {
        let value_count = self.params.len() * (1 + self.moments.len());
        let mut bytes = self.header();
        bytes.reserve_exact(value_count * 4);
        for vector in self.vectors() {
            assert_eq!(
                vector.len(),
                self.params.len(),
                "a moment has another length"
            );
            bytes.extend_from_slice(&bytes_of(vector));
        }
        bytes
    }

    /// The length of [`TrainState::to_bytes`].
    pub fn size_bytes(&self) -> u64 {
        let values: usize = self.vectors().map(|vector| vector.len()).sum();
        HEADER_BYTES as u64 + values as u64 * 4
    }

    /// What stands before the values in [`TrainState::to_bytes`].
    pub(super) fn header(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.step.to_le_bytes());
        bytes.extend_from_slice(&self.fingerprint);
        bytes.extend_from_slice(&(self.moments.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.params.len() as u64).to_le_bytes());
        bytes
    }

    /// Parameters and moments for an elementwise update, which must write all of them. Open snapshots keep what was
    /// there.
    pub fn targets(&mut self) -> (Target<'_>, Vec<Target<'_>>) {
        let moments = self.moments.iter_mut().map(FlatVector::target);
        (self.params.target(), moments.collect())
    }

    /// Where each tensor lies in [`TrainState::to_bytes`]: name, offset and length in bytes.
    pub fn sections(&self, layout: &Layout) -> Vec<(String, u64, u64)> {
        let vector_bytes = self.params.len() as u64 * 4;
        let mut sections = vec![("header".to_owned(), 0, HEADER_BYTES as u64)];
        for index in 0..=self.moments.len() {
            let start = HEADER_BYTES as u64 + index as u64 * vector_bytes;
            sections.extend(layout.slots.iter().map(|slot| {
                let offset = start + slot.offset as u64 * 4;
                (
                    tensor_name(index, &slot.name),
                    offset,
                    slot.value_count() as u64 * 4,
                )
            }));
        }
        sections
    }

    /// The shape of each tensor of [`TrainState::sections`], by its name.
    pub fn shapes(&self, layout: &Layout) -> BTreeMap<String, Vec<usize>> {
        (0..=self.moments.len())
            .flat_map(|index| {
                let shape = move |slot: &ParameterSlot| {
                    (tensor_name(index, &slot.name), slot.shape.clone())
                };
                layout.slots.iter().map(shape)
            })
            .collect()
    }

    /// Reads what [`TrainState::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let found = bytes.len() as u64;
        if !bytes.starts_with(MAGIC) {
            return Err(StateError::Magic);
        }
        let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(StateError::Length {
                expected: HEADER_BYTES as u64,
                found,
            });
        };
        let version = u32::from_le_bytes(array(header, 8));
        if version != VERSION {
            return Err(StateError::Version { found: version });
        }
        let moment_count = u64::from(u32::from_le_bytes(array(header, 52)));
        let param_count = u64::from_le_bytes(array(header, 56));
        for (what, found, limit) in [
            ("moments", moment_count, MOMENTS_MAX as u64),
            ("parameters", param_count, PARAMETERS_MAX as u64),
        ] {
            if found > limit {
                return Err(StateError::TooLarge { what, found, limit });
            }
        }
        // Within u64: both counts are bounded above.
        let expected = HEADER_BYTES as u64 + param_count * 4 * (1 + moment_count);
        if found != expected {
            return Err(StateError::Length { expected, found });
        }
        let vector_bytes = param_count as usize * 4;
        let vector = |index: usize| {
            FlatVector::from(values_of(
                &body[index * vector_bytes..(index + 1) * vector_bytes],
            ))
        };
        Ok(Self {
            step: u64::from_le_bytes(array(header, 12)),
            fingerprint: array(header, 20),
            params: vector(0),
            moments: (1..=moment_count as usize).map(vector).collect(),
        })
    }

    /// BLAKE3, in hex, of the weights and the optimizer's state in name order: equal for two runs exactly
    /// if every value has the same bits.
    pub fn weights_blake3(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"mobula.training.weights.v1");
        hasher.update(&(self.params.len() as u64).to_le_bytes());
        hasher.update(&(self.moments.len() as u64).to_le_bytes());
        for vector in self.vectors() {
            hasher.update(&bytes_of(vector));
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The parameters, then each moment.
    pub(super) fn vectors(&self) -> impl Iterator<Item = &FlatVector> {
        std::iter::once(&self.params).chain(&self.moments)
    }
}

/// What the tensor of a parameter is called among the parameters (0), or in a moment (from 1 on).
pub(super) fn tensor_name(index: usize, parameter: &str) -> String {
    match index {
        0 => format!("params.{parameter}"),
        _ => format!("moments.{}.{parameter}", index - 1),
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N]
        .try_into()
        .expect("the slice has the array's length")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn workload() -> Workload {
        let spec = crate::training::spec::TrainSpec::digits_mlp("a");
        Workload::load(&spec, &crate::training::data::Files::local()).unwrap()
    }

    fn state() -> TrainState {
        let mut state = TrainState::initial(&workload());
        (state.step, state.moments[1][3]) = (77, f32::MIN_POSITIVE);
        state
    }

    #[test]
    fn bytes_round_trip_and_the_hash_sees_every_value() {
        let state = state();
        assert_eq!(TrainState::from_bytes(&state.to_bytes()).unwrap(), state);
        let hash = state.weights_blake3();
        let mut other = state.clone();
        other.step = 78;
        assert_eq!(other.weights_blake3(), hash);
        other.moments[0][5] = -0.0;
        assert_ne!(other.weights_blake3(), hash);
        let empty = TrainState {
            params: FlatVector::default(),
            moments: vec![FlatVector::default(); 2],
            ..state
        };
        assert_eq!(TrainState::from_bytes(&empty.to_bytes()).unwrap(), empty);
    }

    #[test]
    fn sections_cover_every_byte_once() {
        let state = state();
        let workload = workload();
        let mut end = 0;
        for (name, offset, length) in state.sections(workload.layout()) {
            assert_eq!(offset, end, "{name}");
            end += length;
        }
        assert_eq!(end, state.to_bytes().len() as u64);
        assert_eq!(end, state.size_bytes());
    }

    #[test]
    fn damaged_bytes_are_refused() {
        let bytes = state().to_bytes();
        let with = |at: usize, value: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            TrainState::from_bytes(&bytes).unwrap_err()
        };
        assert_eq!(with(0, 0), StateError::Magic);
        assert_eq!(with(8, 2), StateError::Version { found: 2 });
        assert!(matches!(
            with(52, 5),
            StateError::TooLarge {
                what: "moments",
                ..
            }
        ));
        assert!(matches!(
            with(63, 255),
            StateError::TooLarge {
                what: "parameters",
                ..
            }
        ));
        assert!(matches!(with(56, 1), StateError::Length { .. }));
        let tail = [&bytes[..], &[0]].concat();
        assert!(matches!(
            TrainState::from_bytes(&tail),
            Err(StateError::Length { .. })
        ));
        for length in [0, 7, 8, 20, HEADER_BYTES, bytes.len() - 1] {
            assert!(TrainState::from_bytes(&bytes[..length]).is_err());
        }
        let error = state().check_fingerprint(&[0; 32]).unwrap_err().to_string();
        assert!(
            error.contains("another job") && error.contains("00000000"),
            "{error}"
        );
        state().check_fingerprint(&state().fingerprint).unwrap();
    }

    proptest! {
        #[test]
        fn arbitrary_headers_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = TrainState::from_bytes(&bytes);
            let prefix = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
            let length = prefix.len().min(bytes.len());
            bytes[..length].copy_from_slice(&prefix[..length]);
            let _ = TrainState::from_bytes(&bytes);
        }
    }
}
