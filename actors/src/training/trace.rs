//! The digests of a run's states, step by step: where another run departs from it, these say at which step
//! and in which tensor.
//!
//! Invariants:
//! 1. Its size is bounded: `STATES_MAX` digests of whole states, `TENSOR_DIGESTS_MAX` of single tensors.
//!    A longer run is sampled, always at the same steps, whatever happened to its driver.
//! 2. It is kept with each checkpoint, so a driver that begins again has that of its predecessors. What one that was
//!    killed knew since its last checkpoint is gone where trainers go on from their own state: those steps are not
//!    taken again, so nobody can record them, and [`StepTrace::not_recorded`] says which they are.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mobula_core::codec;
use serde::{Deserialize, Serialize};

use super::layout::Layout;
use super::state::TrainState;
use super::value_bytes::bytes_of;

/// Whole states, at most: 64 KiB.
const STATES_MAX: u64 = 4096;
/// Single tensors, at most: 128 KiB.
const TENSOR_DIGESTS_MAX: u64 = 8192;
/// The longest text of a trace, and some head room.
const TEXT_BYTES_MAX: usize = 512 * 1024;

/// The first sixteen bytes of a BLAKE3.
type Short = [u8; 16];

/// The trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTrace {
    /// The tensors, in the order of their digests: parameters, then each moment, in name order.
    pub tensors: Vec<String>,
    /// Every how many steps the whole state's digest is kept.
    pub states_every: u64,
    /// Every how many steps those of the tensors are.
    pub tensors_every: u64,
    states: BTreeMap<u64, Short>,
    digests: BTreeMap<u64, Vec<Short>>,
}

/// Why a text is no trace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a run's trace cannot be read: {0}")]
pub struct MalformedTrace(String);

/// Where two runs depart from each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// After so many steps the states differ; `equal_until` is the last that is known to be equal.
    pub step: u64,
    /// The last step at which they are known to be equal; `None` if that is not even known of the first.
    pub equal_until: Option<u64>,
    /// The first tensor that differs, in name order within parameters and each moment, and the step at
    /// which its digests were compared.
    pub tensor: Option<(u64, String)>,
}

impl StepTrace {
    /// The trace of a run of `steps` steps before its first.
    #[must_use]
    pub fn new(steps: u64, state: &TrainState, layout: &Layout) -> Self {
        let tensors: Vec<String> = state
            .sections(layout)
            .into_iter()
            .skip(1)
            .map(|(name, _, _)| name)
            .collect();
        let rows_max = (TENSOR_DIGESTS_MAX / tensors.len().max(1) as u64).max(1);
        StepTrace {
            tensors,
            states_every: steps.div_ceil(STATES_MAX).max(1),
            tensors_every: steps.div_ceil(rows_max).max(1),
            states: BTreeMap::new(),
            digests: BTreeMap::new(),
        }
    }

    /// Takes note of a state, if its step is one of those that are kept. `weights_blake3` is its hash, in
    /// hex.
    pub fn record(&mut self, state: &TrainState, layout: &Layout, weights_blake3: &str) {
        let step = state.step;
        if step.is_multiple_of(self.states_every)
            && let Ok(hash) = blake3::Hash::from_hex(weights_blake3)
        {
            self.states.insert(step, short(&hash));
        }
        if step.is_multiple_of(self.tensors_every) {
            self.digests.insert(step, tensor_digests(state, layout));
        }
    }

    /// Forgets what comes after `step`: a driver goes on from there.
    pub fn go_back_to(&mut self, step: u64) {
        self.states.retain(|known, _| *known <= step);
        self.digests.retain(|known, _| *known <= step);
    }

    /// The steps of which the whole state's digest is known.
    #[must_use]
    pub fn known_steps(&self) -> usize {
        self.states.len()
    }

    /// The steps of a run of `steps` steps whose states should be known and are not: the first and the last of each
    /// row of them, in order.
    #[must_use]
    pub fn not_recorded(&self, steps: u64) -> Vec<(u64, u64)> {
        let every = self.states_every.max(1);
        let last = steps - steps % every;
        let mut missing = Vec::new();
        let mut next = every;
        let known = self.states.range(..=last).map(|(step, _)| *step);
        for known in known.filter(|step| *step > 0 && step.is_multiple_of(every)) {
            if known > next {
                missing.push((next, known - every));
            }
            next = known.saturating_add(every);
        }
        if next <= last {
            missing.push((next, last));
        }
        missing
    }

    /// How many states are known of both runs.
    #[must_use]
    pub fn shared_steps(&self, other: &StepTrace) -> usize {
        let is_shared = |step: &&u64| other.states.contains_key(step);
        self.states.keys().filter(is_shared).count()
    }

    /// Where `other` departs from this run; `None` if they are equal wherever both are known.
    #[must_use]
    pub fn first_difference(&self, other: &StepTrace) -> Option<Difference> {
        let mut equal_until = None;
        let mut differs_at = None;
        for (step, digest) in &self.states {
            match other.states.get(step) {
                Some(theirs) if theirs == digest => equal_until = Some(*step),
                Some(_) => {
                    differs_at = Some(*step);
                    break;
                }
                None => {}
            }
        }
        let tensor = self.digests.iter().find_map(|(step, ours)| {
            let theirs = other.digests.get(step)?;
            let index = ours.iter().zip(theirs).position(|(a, b)| a != b)?;
            Some((*step, self.tensors.get(index)?.clone()))
        });
        let step = match (differs_at, &tensor) {
            (Some(step), Some((at, _))) => step.min(*at),
            (Some(step), None) => step,
            (None, Some((at, _))) => *at,
            (None, None) => return None,
        };
        Some(Difference {
            step,
            equal_until: equal_until.filter(|equal| *equal < step),
            tensor,
        })
    }

    /// The trace as text, for a checkpoint's metadata.
    #[must_use]
    pub fn to_text(&self) -> String {
        STANDARD.encode(codec::encode_plain(self))
    }

    /// Reads what [`StepTrace::to_text`] wrote.
    pub fn from_text(text: &str) -> Result<Self, MalformedTrace> {
        let bytes = STANDARD
            .decode(text)
            .map_err(|error| MalformedTrace(error.to_string()))?;
        codec::decode(&bytes, TEXT_BYTES_MAX).map_err(|error| MalformedTrace(error.to_string()))
    }
}

/// The digest of each tensor, in the order of [`StepTrace::tensors`].
fn tensor_digests(state: &TrainState, layout: &Layout) -> Vec<Short> {
    let mut digests = Vec::new();
    for vector in state.vectors() {
        for slot in &layout.slots {
            digests.push(short(&blake3::hash(&bytes_of(&vector[slot.range()]))));
        }
    }
    digests
}

fn short(hash: &blake3::Hash) -> Short {
    let mut short = Short::default();
    short.copy_from_slice(&hash.as_bytes()[..16]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::spec::TrainSpec;
    use crate::training::workload::Workload;

    fn run(steps: u64, change: impl Fn(&mut TrainState)) -> StepTrace {
        let workload = Workload::of(&TrainSpec::digits_mlp("a"));
        let layout = workload.layout();
        let mut state = TrainState::initial(&workload);
        let mut trace = StepTrace::new(steps, &state, layout);
        for step in 1..=steps {
            state.step = step;
            state.params[0] += 1.0;
            change(&mut state);
            trace.record(&state, layout, &state.weights_blake3());
        }
        trace
    }

    #[test]
    fn equal_runs_have_equal_traces_and_others_are_told_by_step_and_tensor() {
        let trace = run(20, |_| {});
        assert_eq!(trace.known_steps(), 20);
        assert_eq!(trace.first_difference(&run(20, |_| {})), None);
        let other = run(20, |state| {
            if state.step == 13 {
                state.moments[1][200] = 1e-9;
            }
        });
        let difference = trace.first_difference(&other).unwrap();
        assert_eq!((difference.step, difference.equal_until), (13, Some(12)));
        assert_eq!(
            difference.tensor,
            Some((13, "moments.1.dense.0.weight".to_owned()))
        );
        let from_the_start = run(20, |state| state.params[1] = 9.0);
        let difference = trace.first_difference(&from_the_start).unwrap();
        assert_eq!((difference.step, difference.equal_until), (1, None));
    }

    #[test]
    fn steps_that_a_driver_took_along_are_told() {
        let trace = run(20, |_| {});
        assert_eq!(trace.not_recorded(20), []);
        // Checkpoints after steps 4 and 12; its successors went on from what trainers held after 7 and 17.
        let mut with_gaps = trace.clone();
        let is_gone = |step: &u64| (5..=7).contains(step) || (13..=17).contains(step);
        with_gaps.states.retain(|step, _| !is_gone(step));
        assert_eq!(with_gaps.not_recorded(20), [(5, 7), (13, 17)]);
        assert_eq!(trace.first_difference(&with_gaps), None);
        // As far as the run went, which is further than what is known of it.
        with_gaps.go_back_to(12);
        assert_eq!(with_gaps.not_recorded(14), [(5, 7), (13, 14)]);
        assert_eq!(with_gaps.not_recorded(6), [(5, 6)]);
        with_gaps.go_back_to(0);
        assert_eq!(with_gaps.not_recorded(3), [(1, 3)]);
        assert_eq!(with_gaps.not_recorded(0), []);
        // Of a sampled run only the samples are missed.
        let mut sampled = StepTrace {
            states_every: 5,
            ..trace
        };
        sampled.states.retain(|step, _| step.is_multiple_of(5));
        assert_eq!(sampled.not_recorded(23), []);
        sampled.states.remove(&10);
        assert_eq!(sampled.not_recorded(23), [(10, 10)]);
        sampled.go_back_to(0);
        assert_eq!(sampled.not_recorded(23), [(5, 20)]);
    }

    #[test]
    fn a_trace_is_bounded_and_survives_the_way_through_a_checkpoint() {
        let workload = Workload::of(&TrainSpec::digits_mlp("a"));
        let layout = workload.layout();
        let state = TrainState::initial(&workload);
        for steps in [1, 300, 4096, 4097, 1 << 40] {
            let trace = StepTrace::new(steps, &state, layout);
            assert!(steps / trace.states_every <= STATES_MAX, "{steps}");
            let tensors = trace.tensors.len() as u64;
            assert!(
                steps / trace.tensors_every * tensors <= TENSOR_DIGESTS_MAX,
                "{steps}"
            );
        }
        let mut trace = run(30, |_| {});
        let mut read = StepTrace::from_text(&trace.to_text()).unwrap();
        assert_eq!(read, trace);
        read.go_back_to(10);
        assert_eq!(read.known_steps(), 10);
        assert_eq!(
            trace.first_difference(&read),
            None,
            "as far as both are known"
        );
        trace.go_back_to(0);
        assert_eq!(trace.known_steps(), 0);
        assert!(StepTrace::from_text("no trace").is_err());
        assert!(StepTrace::from_text("AAAA").is_err());
    }
}
