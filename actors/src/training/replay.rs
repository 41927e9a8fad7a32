//! Making a run once more, in one process, and comparing it step by step with what was recorded of it.
//!
//! The bits do not depend on how many workers there were, so one is enough. A model of a user's own is code that only its
//! program has: [`program`] runs that one, where `role` makes the run; `channel` is what passes between the two.

use serde::{Deserialize, Serialize};

use super::local::{LocalTrainer, TrainError};
use super::record::{RecordError, RunRecord};
use super::state::TrainState;
use super::trace::{Difference, StepTrace};
use super::workload::Workload;

mod channel;
pub mod program;
mod role;

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplayReport {
    /// Steps that were taken.
    pub steps: u64,
    /// Whether the run ended in the same bits; for fewer steps than the run had, whether all states that
    /// could be compared are equal.
    pub equal: bool,
    /// BLAKE3 of weights and optimizer state at the end, here and in the record.
    pub weights_blake3: String,
    /// As recorded.
    pub recorded_weights_blake3: String,
    /// States that were compared.
    pub compared: usize,
    /// Steps whose states could not be compared because they were not recorded: the first and the last of each row of
    /// them.
    pub not_recorded: Vec<(u64, u64)>,
    /// Where the two depart, if they do.
    pub difference: Option<Difference>,
}

/// Why a run cannot be made once more.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// Its record cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The data has changed.
    #[error(
        "`{source_name}` is not what the run was trained on: its hash is {found}, the record says \
         {expected}; put the old file there"
    )]
    OtherData {
        /// The data's name.
        source_name: String,
        /// Its hash.
        found: String,
        /// The record's.
        expected: String,
    },
    /// This binary means something else by the same description.
    #[error(
        "this binary computes another fingerprint for that job ({found}, the record says {expected}): \
         use mobula {version}"
    )]
    OtherProgram {
        /// Ours.
        found: String,
        /// The record's.
        expected: String,
        /// The version that ran.
        version: String,
    },
    /// It began with weights that were not given.
    #[error("the run began with the weights of `{0}`, which were not given")]
    StartMissing(String),
    /// It cannot be trained.
    #[error(transparent)]
    Train(#[from] TrainError),
}

/// Makes `record`'s run again, at most `steps_max` steps of it, with the `workload` of its description.
/// `start` has the parameters that it began with, if it began with others than its own. `progress` hears of
/// each step.
pub fn replay(
    record: &RunRecord,
    workload: &Workload,
    start: Option<TrainState>,
    steps_max: u64,
    mut progress: impl FnMut(u64),
) -> Result<ReplayReport, ReplayError> {
    let recorded = record.trace()?;
    let spec = &record.spec;
    let digest = workload.split().train.digest();
    if *digest != record.data.blake3 {
        return Err(ReplayError::OtherData {
            source_name: record.data.source.clone(),
            found: digest.to_owned(),
            expected: record.data.blake3.clone(),
        });
    }
    let mut initial = TrainState::initial(workload);
    let found = blake3::Hash::from_bytes(initial.fingerprint).to_hex();
    if found.as_str() != record.fingerprint {
        return Err(ReplayError::OtherProgram {
            found: found.to_string(),
            expected: record.fingerprint.clone(),
            version: record.program.version.clone(),
        });
    }
    match (&spec.start_from, start) {
        (Some(_), Some(start)) => initial.params = start.params,
        (Some(from), None) => return Err(ReplayError::StartMissing(from.manifest.clone())),
        (None, _) => {}
    }
    let layout = workload.layout();
    let steps = record.steps.min(steps_max);
    let mut trace = StepTrace::new(spec.steps, &initial, layout);
    let mut trainer = LocalTrainer::resume(workload, initial)?;
    while trainer.state().step < steps {
        trainer.step(1)?;
        let state = trainer.state();
        trace.record(state, layout, &state.weights_blake3());
        progress(state.step);
    }
    let weights_blake3 = trainer.state().weights_blake3();
    let difference = recorded.first_difference(&trace);
    let is_whole = steps == record.steps;
    Ok(ReplayReport {
        steps,
        equal: difference.is_none() && (!is_whole || weights_blake3 == record.weights_blake3),
        weights_blake3,
        recorded_weights_blake3: record.weights_blake3.clone(),
        compared: recorded.shared_steps(&trace),
        not_recorded: recorded.not_recorded(steps),
        difference,
    })
}

#[cfg(test)]
mod tests {
    use mobula_core::JobId;

    use super::*;
    use crate::training::spec::TrainSpec;

    /// A run of some steps as it is recorded, with `change` made to its states on the way.
    fn recorded(steps: u64, change: impl Fn(&mut TrainState)) -> (RunRecord, Workload) {
        let spec = TrainSpec {
            steps,
            ..TrainSpec::digits_mlp("a")
        };
        let workload = Workload::of(&spec);
        let layout = workload.layout();
        let mut state = TrainState::initial(&workload);
        let mut trace = StepTrace::new(steps, &state, layout);
        while state.step < steps {
            let mut trainer = LocalTrainer::resume(&workload, state).unwrap();
            trainer.step(3).unwrap();
            state = trainer.state().clone();
            change(&mut state);
            trace.record(&state, layout, &state.weights_blake3());
        }
        let weights = state.weights_blake3();
        let record = RunRecord::new(
            JobId(3),
            &spec,
            &state.fingerprint,
            workload.split().train.digest(),
            &trace,
            steps,
            &weights,
        );
        (record, workload)
    }

    #[test]
    fn a_run_that_was_as_it_is_recorded_is_equal() {
        let (record, workload) = recorded(8, |_| {});
        let mut heard = 0;
        let report = replay(&record, &workload, None, u64::MAX, |_| heard += 1).unwrap();
        assert!(report.equal, "{report:?}");
        assert_eq!((report.steps, report.compared, heard), (8, 8, 8));
        assert_eq!(report.not_recorded, []);
        let part = replay(&record, &workload, None, 3, |_| {}).unwrap();
        assert!(part.equal && part.compared == 3, "{part:?}");
    }

    #[test]
    fn steps_that_were_not_recorded_are_named() {
        let (mut record, workload) = recorded(8, |_| {});
        let mut trace = record.trace().unwrap();
        trace.go_back_to(5);
        record.trace = trace.to_text();
        let report = replay(&record, &workload, None, u64::MAX, |_| {}).unwrap();
        assert!(report.equal, "its end is known: {report:?}");
        assert_eq!((report.compared, report.not_recorded), (5, vec![(6, 8)]));
        let part = replay(&record, &workload, None, 5, |_| {}).unwrap();
        assert_eq!(part.not_recorded, []);
    }

    #[test]
    fn the_first_step_and_tensor_that_differ_are_named() {
        let (record, workload) = recorded(8, |state| {
            if state.step == 5 {
                // One bit of one value.
                let value = &mut state.params[100];
                *value = f32::from_bits(value.to_bits() ^ 1);
            }
        });
        let report = replay(&record, &workload, None, u64::MAX, |_| {}).unwrap();
        assert!(!report.equal);
        let difference = report.difference.unwrap();
        assert_eq!((difference.step, difference.equal_until), (5, Some(4)));
        let (step, tensor) = difference.tensor.unwrap();
        assert_eq!(step, 5);
        let slots = &workload.layout().slots;
        let slot = slots.iter().find(|slot| slot.range().contains(&100));
        assert_eq!(tensor, format!("params.{}", slot.unwrap().name));
    }

    #[test]
    fn other_data_and_another_program_are_said() {
        let (mut record, workload) = recorded(1, |_| {});
        let fingerprint = std::mem::replace(&mut record.fingerprint, "other".into());
        let error = replay(&record, &workload, None, 1, |_| {}).unwrap_err();
        assert!(matches!(error, ReplayError::OtherProgram { .. }), "{error}");
        record.fingerprint = fingerprint;
        record.data.blake3 = "other".into();
        let error = replay(&record, &workload, None, 1, |_| {}).unwrap_err();
        assert!(matches!(error, ReplayError::OtherData { .. }), "{error}");
    }
}
