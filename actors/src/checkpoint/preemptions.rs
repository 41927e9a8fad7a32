//! What drivers did about notices that their machines would be taken away: each step of the way, with the numbers
//! it rests on, kept where it outlives the driver.
//!
//! Invariants:
//! 1. A step is recorded once, however often it is said: by the driver's start and its number there.
//! 2. Steps are in the order in which drivers took them; a driver that another one has replaced adds none.
//! 3. A job keeps its newest [`PREEMPTION_STEPS_PER_JOB`]; they go when the job is forgotten.

use std::fmt;

use mobula_core::codec;
use mobula_core::control::{ModuleId, Reader, Table, Txn};
use mobula_core::{Incarnation, JobId, Rejection};
use serde::{Deserialize, Serialize};

use super::command::PAYLOAD_BYTES_MAX;

/// Steps kept of a job: some ten notices, at up to 700 bytes a step 45 KiB.
pub const PREEMPTION_STEPS_PER_JOB: usize = 64;
/// Steps in one command: more than a driver takes for one notice.
pub const STEPS_PER_COMMAND: usize = 16;
/// The longest reason, in bytes.
pub const WHY_BYTES_MAX: usize = 512;
/// The longest name of a node, in bytes.
const NODE_BYTES_MAX: usize = 128;

const STEPS: Table = Table {
    module: ModuleId::CHECKPOINT,
    tag: 4,
};

/// Where a driver stands with its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PreemptionPhase {
    /// Nobody said anything.
    Running,
    /// The machine may be taken away; there is no deadline yet.
    Advised,
    /// It will be.
    Noticed,
    /// Another replica goes on: leave.
    Handoff,
    /// Save together with others, then leave.
    SaveShared,
    /// Save alone, then leave.
    SaveSolo,
    /// No save fits: leave, and repeat what is lost.
    Abandon,
    /// The head was asked to start the driver elsewhere.
    Detached,
    /// The driver is gone.
    Gone,
}

impl fmt::Display for PreemptionPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PreemptionPhase::Running => "RUNNING",
            PreemptionPhase::Advised => "ADVISED",
            PreemptionPhase::Noticed => "NOTICED",
            PreemptionPhase::Handoff => "HANDOFF",
            PreemptionPhase::SaveShared => "SAVE_SHARED",
            PreemptionPhase::SaveSolo => "SAVE_SOLO",
            PreemptionPhase::Abandon => "ABANDON",
            PreemptionPhase::Detached => "DETACHED",
            PreemptionPhase::Gone => "GONE",
        })
    }
}

/// One step, as a driver says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreemptionStep {
    /// The driver's start whose machine it is about.
    pub incarnation: Incarnation,
    /// The step's number in that start, from 1.
    pub number: u32,
    /// That machine.
    pub node: String,
    /// Where the driver was.
    pub from: PreemptionPhase,
    /// Where it is.
    pub to: PreemptionPhase,
    /// When the machine goes, in milliseconds since the Unix epoch, where that is known.
    pub deadline_ms: Option<u64>,
    /// Training steps taken.
    pub trained_steps: u64,
    /// What a save would have taken, in milliseconds, where that was asked.
    pub needed_ms: Option<u64>,
    /// What could be counted on of the time to the deadline, in milliseconds, where that was asked.
    pub usable_ms: Option<u64>,
    /// Why, with the numbers.
    pub why: String,
    /// When, in milliseconds since the Unix epoch, by the driver's clock.
    pub said_ms: u64,
}

impl PreemptionStep {
    fn check(&self) -> Result<(), Rejection> {
        for (what, found, limit) in [
            ("node", self.node.len(), NODE_BYTES_MAX),
            ("reason", self.why.len(), WHY_BYTES_MAX),
        ] {
            if found > limit {
                return Err(Rejection::invalid(format!(
                    "the {what} of a preemption's step has {found} bytes, the limit is {limit}: shorten it"
                )));
            }
        }
        Ok(())
    }

    /// Its place among all of its job.
    #[must_use]
    pub fn key(&self) -> (Incarnation, u32) {
        (self.incarnation, self.number)
    }
}

impl fmt::Display for PreemptionStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}: {}", self.from, self.to, self.why)
    }
}

/// What is recorded of a job, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct JobPreemptions {
    /// The steps.
    pub steps: Vec<PreemptionStep>,
}

impl JobPreemptions {
    /// The steps that a driver which went left open: a new one says how it ended. Answers the last of them.
    #[must_use]
    pub fn unfinished_before(&self, incarnation: Incarnation) -> Option<&PreemptionStep> {
        let is_over = |phase| matches!(phase, PreemptionPhase::Running | PreemptionPhase::Gone);
        let last = self.steps.last()?;
        (last.incarnation < incarnation && !is_over(last.to)).then_some(last)
    }
}

/// Adds what is new of `steps`.
pub(super) fn record(
    txn: &mut dyn Txn,
    job: JobId,
    steps: Vec<PreemptionStep>,
) -> Result<(), Rejection> {
    if steps.len() > STEPS_PER_COMMAND {
        return Err(Rejection::invalid(format!(
            "{} steps of a preemption at once, the limit is {STEPS_PER_COMMAND}: say them one by one",
            steps.len()
        )));
    }
    steps.iter().try_for_each(PreemptionStep::check)?;
    let mut known = load(txn, job);
    for step in steps {
        let is_new = known
            .steps
            .last()
            .is_none_or(|last| last.key() < step.key());
        if is_new {
            known.steps.push(step);
        }
    }
    let surplus = known.steps.len().saturating_sub(PREEMPTION_STEPS_PER_JOB);
    known.steps.drain(..surplus);
    txn.put(STEPS, &job.to_key(), codec::encode_plain(&known));
    Ok(())
}

/// What is recorded of a job.
pub(super) fn load(reader: &dyn Reader, job: JobId) -> JobPreemptions {
    reader
        .get(STEPS, &job.to_key())
        .map(|bytes| {
            codec::decode(&bytes, PAYLOAD_BYTES_MAX).expect("only this module writes these rows")
        })
        .unwrap_or_default()
}

/// Forgets a job's.
pub(super) fn forget(txn: &mut dyn Txn, job: JobId) {
    txn.delete(STEPS, &job.to_key());
}
