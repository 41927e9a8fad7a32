//! Where a driver that was started again goes on: at the newest checkpoint, or at the state that a
//! living trainer still holds if that is newer. The bits are the same; only the work to repeat
//! differs.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use mobula_core::Incarnation;

use super::coordinator::Counters;
use super::crew::TrainerLink;
use super::evaluation::{EvaluationSpec, Watch};
use super::job_log::JobLog;
use super::link::ClusterLink;
use super::messages::{Handover, Held, short_digest};
use super::protocol::leader::StateDigest;
use super::saving::Saver;
use super::spec::TrainSpec;
use super::state::{StateError, TrainState};
use super::trace::StepTrace;
use crate::checkpoint::checkpointer::RestoredState;
use crate::checkpoint::ledger::CheckpointError;

mod survivors;

/// The key of the [`History`] in a checkpoint's metadata.
pub const HISTORY_KEY: &str = "history";

/// The key of the [`StepTrace`] in a checkpoint's metadata.
pub const TRACE_KEY: &str = "trace";

/// What happened over all starts of the driver. It is kept with each checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct History {
    /// What happened to trainers.
    pub counters: Counters,
    /// Steps that were taken again because the driver was lost.
    pub lost_steps: u64,
    /// Starts of the driver after which nobody knew how far the one before had come.
    pub unknown_losses: u64,
    /// Checkpoints that were committed.
    pub checkpoints: u64,
    /// Checkpoints that failed verification.
    pub rejected_checkpoints: u64,
    /// Starts of the driver after the first.
    pub driver_restarts: u64,
    /// How long it has trained, in milliseconds.
    pub trained_ms: u64,
    /// The longest that a snapshot stalled training, in microseconds.
    pub snapshot_stall_us: u64,
    /// The mean loss of the last step's batch.
    pub loss_mean: Option<f64>,
    /// What was measured on held-out samples, as far as early stopping needs it.
    pub watch: Watch,
    /// What checkpoints are compared by, as it was measured last, and after how many steps.
    #[serde(default)]
    pub compared: Option<(f64, u64)>,
}

impl History {
    /// What was lost, as far as is known: what a checkpoint is kept for.
    #[must_use]
    pub fn failures(&self, counters: Counters) -> u64 {
        counters.trainers_lost + self.driver_restarts
    }
}

/// Where to go on.
#[derive(Debug)]
pub struct Resumed {
    /// The state.
    pub state: TrainState,
    /// What happened before.
    pub history: History,
    /// The states up to there, as far as a checkpoint has them.
    pub trace: Option<StepTrace>,
}

impl Resumed {
    /// The same at a later `state` of the job, with what a driver has left with it. Refused where that is not enough to
    /// know when the job stops.
    fn continued(
        &self,
        state: TrainState,
        handover: Option<Handover>,
        rule: Option<&EvaluationSpec>,
    ) -> Result<Resumed, String> {
        let (mut history, mut trace) = (self.history, self.trace.clone());
        // Trainers keep it for as long as they live: a checkpoint may know more by now.
        let is_newer =
            |handover: &Handover| (self.state.step + 1..=state.step).contains(&handover.step);
        if let Some(handover) = handover.filter(is_newer) {
            let (known_history, known_trace) = known_of(&handover.metadata);
            if let Some(known) = known_history {
                // What was committed is known of the table.
                let checkpoints = history.checkpoints;
                history = History {
                    checkpoints,
                    ..known
                };
            }
            trace = known_trace.or(trace);
        }
        // Trainers go on, so the state that comes may be further than what was said.
        if rule.is_some_and(|rule| !history.watch.covers(rule, state.step)) {
            return Err(format!(
                "what was measured up to its step {} is not known, and decides when the job stops",
                state.step
            ));
        }
        Ok(Resumed {
            state,
            history,
            trace,
        })
    }
}

/// Why a job cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The checkpoints cannot be read, or a newer driver has taken over.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint verified, but is not this job's.
    #[error("checkpoint of step {step}: {source}")]
    State {
        /// Its step.
        step: u64,
        /// What is wrong with it.
        source: StateError,
    },
}

/// Finds where a job goes on. `initial` is the state before the first step.
pub async fn resume(
    initial: TrainState,
    spec: &TrainSpec,
    incarnation: Incarnation,
    saver: &mut Saver,
    links: &[ClusterLink],
    log: JobLog,
) -> Result<Resumed, ResumeError> {
    let report = saver.restore(incarnation).await?;
    for (step, reason) in &report.rejected {
        log.line(format_args!(
            "checkpoint of step {step} is rejected: {reason}"
        ));
    }
    let fingerprint = initial.fingerprint;
    let mut resumed = match report.restored {
        Some(restored) => from_checkpoint(&restored, &fingerprint)?,
        None => Resumed {
            state: initial,
            history: History::default(),
            trace: None,
        },
    };
    if resumed.state.step > 0 {
        saver.resume(resumed.history.checkpoints, resumed.state.step);
        log.line(format_args!(
            "restored the checkpoint of step {}: {}",
            resumed.state.step,
            resumed.state.weights_blake3()
        ));
    }
    // A finished job has nothing left that could be lost.
    if resumed.state.step < spec.steps && !resumed.history.watch.stop {
        let rule = spec.evaluation.as_ref();
        ask_witnesses(&mut resumed, rule, links, log).await;
    }
    resumed.history.rejected_checkpoints += report.rejected.len() as u64;
    Ok(resumed)
}

fn from_checkpoint(
    restored: &RestoredState,
    fingerprint: &[u8; 32],
) -> Result<Resumed, ResumeError> {
    let step = restored.checkpoint.step;
    let wrong = |source| ResumeError::State { step, source };
    let state = TrainState::from_bytes(&restored.state).map_err(wrong)?;
    state.check_fingerprint(fingerprint).map_err(wrong)?;
    let (history, trace) = known_of(&restored.metadata);
    Ok(Resumed {
        state,
        history: history.unwrap_or_default(),
        trace,
    })
}

/// What a driver left in `metadata`.
fn known_of(metadata: &BTreeMap<String, String>) -> (Option<History>, Option<StepTrace>) {
    let history = metadata.get(HISTORY_KEY);
    let trace = metadata.get(TRACE_KEY);
    (
        history.and_then(|text| serde_json::from_str(text).ok()),
        trace.and_then(|text| StepTrace::from_text(text).ok()),
    )
}

/// Asks the trainers what they hold, and goes on there if that is further and verifies.
async fn ask_witnesses(
    resumed: &mut Resumed,
    rule: Option<&EvaluationSpec>,
    links: &[ClusterLink],
    log: JobLog,
) {
    let from = resumed.state.step;
    let held = survivors::held(links, from).await;
    let Some(furthest) = held.iter().map(|(_, held)| held.step).max() else {
        resumed.history.unknown_losses += 1;
        log.line(format_args!(
            "no trainer remembers how far the driver before came; going on from step {from}"
        ));
        return;
    };
    if furthest <= from {
        return;
    }
    for slot in candidates(&held, from) {
        let fetched = match fetch(links, &held, slot, resumed).await {
            Ok(state) => {
                let handover = links[slot].handover().await.unwrap_or_default();
                resumed.continued(state, handover, rule)
            }
            Err(reason) => Err(reason),
        };
        match fetched {
            Ok(mut continued) => {
                let step = continued.state.step;
                let lost = furthest.saturating_sub(step);
                continued.history.lost_steps += lost;
                log.line(format_args!(
                    "trainer-{slot} still holds step {step}: going on there, {lost} steps are lost"
                ));
                *resumed = continued;
                return;
            }
            Err(reason) => {
                log.line(format_args!(
                    "the state of trainer-{slot} is not used: {reason}"
                ));
            }
        }
    }
    resumed.history.lost_steps += furthest - from;
    log.line(format_args!("steps {from} to {furthest} are taken again"));
}

/// Who holds a later step than `from`: the furthest first, and of those the ones whose digest most others share.
fn candidates(held: &[(usize, Held)], from: u64) -> Vec<usize> {
    let mut votes: BTreeMap<(u64, &str), usize> = BTreeMap::new();
    for (_, one) in held {
        *votes.entry((one.step, one.digest.as_str())).or_default() += 1;
    }
    let further = held.iter().filter(|(_, one)| one.step > from);
    let mut slots: Vec<_> = further
        .map(|(slot, one)| {
            let votes = votes[&(one.step, one.digest.as_str())];
            (Reverse(one.step), Reverse(votes), *slot)
        })
        .collect();
    slots.sort_unstable();
    slots.into_iter().map(|(_, _, slot)| slot).collect()
}

/// The state of trainer `slot`, if the others that know it do not say that it is wrong. The trainers go on
/// meanwhile, so it may be further than it said.
async fn fetch(
    links: &[ClusterLink],
    held: &[(usize, Held)],
    slot: usize,
    resumed: &Resumed,
) -> Result<TrainState, String> {
    let size_bytes = resumed.state.byte_count();
    let bytes = links[slot].state(size_bytes).await;
    let bytes = bytes.map_err(|error| error.to_string())?;
    let state = TrainState::from_bytes(&bytes).map_err(|error| error.to_string())?;
    state
        .check_fingerprint(&resumed.state.fingerprint)
        .map_err(|error| error.to_string())?;
    let (step, digest) = (state.step, state.weights_blake3());
    let others = held.iter().filter(|(other, _)| *other != slot);
    let asked = others.map(|(other, _)| links[*other].digest_before(step));
    let answers = futures::future::join_all(asked).await;
    let said: Vec<StateDigest> = answers.into_iter().filter_map(|it| it.ok()?).collect();
    let equal = said
        .iter()
        .filter(|it| **it == short_digest(&digest))
        .count();
    if 2 * equal >= said.len() {
        return Ok(state);
    }
    Err(format!(
        "it came with hash {digest} at step {step}, and {} of {} others have another one",
        said.len() - equal,
        said.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::state::CheckpointRef;

    #[test]
    fn a_checkpoint_brings_state_and_history_and_not_those_of_another_job() {
        let spec = TrainSpec::digits_mlp("a");
        let files = crate::training::data::Files::local();
        let workload = crate::training::workload::Workload::load(&spec, &files).unwrap();
        let mut state = TrainState::initial(&workload);
        state.step = 40;
        let history = History {
            lost_steps: 3,
            checkpoints: 2,
            ..History::default()
        };
        let text = serde_json::to_string(&history).unwrap();
        let restored = RestoredState {
            checkpoint: CheckpointRef {
                step: 40,
                incarnation: Incarnation(1),
                manifest_path: "m".into(),
                manifest_digest: "d".into(),
                size_bytes: 1,
                weights_blake3: None,
                metric: None,
            },
            state: state.to_bytes().into(),
            metadata: BTreeMap::from([(HISTORY_KEY.to_owned(), text)]),
        };
        let resumed = from_checkpoint(&restored, &state.fingerprint).unwrap();
        assert_eq!((resumed.state, resumed.history), (state, history));
        let error = from_checkpoint(&restored, &[0; 32])
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("checkpoint of step 40: this state belongs"),
            "{error}"
        );
    }

    #[test]
    fn what_a_driver_left_with_a_trainer_is_known_where_it_is_newer_and_decides_whether_to_go_on() {
        let spec = TrainSpec::digits_mlp("a");
        let files = crate::training::data::Files::local();
        let workload = crate::training::workload::Workload::load(&spec, &files).unwrap();
        let at = |step| TrainState {
            step,
            ..TrainState::initial(&workload)
        };
        let measured = |step, checkpoints| History {
            watch: Watch {
                step,
                ..Watch::default()
            },
            checkpoints,
            ..History::default()
        };
        let handover = |step, history: &History| Handover {
            step,
            metadata: BTreeMap::from([(
                HISTORY_KEY.to_owned(),
                serde_json::to_string(history).unwrap(),
            )]),
        };
        let rule: EvaluationSpec =
            toml::from_str("every_steps = 10\n[early_stop]\npatience = 2\n").unwrap();
        let resumed = Resumed {
            state: at(12),
            history: measured(10, 3),
            trace: None,
        };
        let go_on = |step, handover| resumed.continued(at(step), handover, Some(&rule));
        assert!(go_on(20, None).is_ok(), "it can be measured there");
        let refused = go_on(34, None).unwrap_err();
        assert!(refused.contains("up to its step 34"), "{refused}");
        let left = handover(32, &measured(30, 7));
        let gone_on = go_on(34, Some(left.clone())).unwrap();
        assert_eq!((gone_on.state.step, gone_on.history), (34, measured(30, 3)));
        assert!(
            go_on(41, Some(left.clone())).is_err(),
            "step 40 was not measured"
        );
        assert!(go_on(31, Some(left)).is_err(), "of a later time");
        let old = handover(11, &measured(10, 9));
        assert_eq!(go_on(15, Some(old)).unwrap().history, measured(10, 3));
    }

    #[test]
    fn the_furthest_step_is_asked_for_first_and_of_it_the_digest_that_most_hold() {
        let held = |slot, step, digest: &str| {
            (
                slot,
                Held {
                    step,
                    digest: digest.into(),
                },
            )
        };
        let all = [
            held(0, 9, "x"),
            held(1, 9, "y"),
            held(2, 8, "y"),
            held(3, 9, "y"),
        ];
        assert_eq!(candidates(&all, 7), [1, 3, 0, 2]);
        assert_eq!(candidates(&all, 8), [1, 3, 0]);
        assert!(candidates(&all, 9).is_empty());
    }
}
