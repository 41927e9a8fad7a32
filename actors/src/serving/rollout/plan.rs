//! What a rollout is. These types are rows of a replicated table: fields and variants are appended,
//! never changed.
//!
//! Invariants:
//! 1. Weights grow from step to step and end with 100 percent, which is the promotion.
//! 2. Everything is bounded: steps, decisions, and the texts of evidence.

use mobula_core::error::Rejection;
use mobula_core::id::Incarnation;
use serde::{Deserialize, Serialize};

use super::trial::Evidence;

/// Steps of a rollout.
pub const STEPS_MAX: usize = 20;

/// Decisions that are kept of a rollout, the newest: more than its steps, and some pauses.
pub const DECISIONS_MAX: usize = 64;

/// The weights of a canary, in percent of the requests.
pub const CANARY_STEPS: [u32; 5] = [1, 5, 25, 50, 100];

/// The weights of a rolling update: its candidate has as large a share of the replicas.
pub const ROLLING_STEPS: [u32; 4] = [25, 50, 75, 100];

/// The largest number of samples that a step may ask for: with ten requests a second, a day.
const MIN_SAMPLES_MAX: u64 = 1_000_000;

/// How long a rollout waits for its candidate's replicas unless it says so, in milliseconds: an hour, in which a cluster
/// that has to be enlarged has made room for them.
pub const REPLICA_WAIT_MS: u64 = 60 * 60 * 1000;

/// How a rollout goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The candidate gets more and more of the requests, each step judged by guardrails.
    Canary,
    /// All replicas of the candidate are started; when all of them answer, it gets all requests.
    BlueGreen,
    /// A canary whose replicas take the place of the stable version's, a quarter of them at a time.
    Rolling,
}

impl Strategy {
    /// The steps of this strategy unless others are given.
    #[must_use]
    pub fn default_steps(self) -> Vec<u32> {
        match self {
            Strategy::Canary => CANARY_STEPS.to_vec(),
            Strategy::BlueGreen => vec![0, 100],
            Strategy::Rolling => ROLLING_STEPS.to_vec(),
        }
    }
}

/// Where a rollout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its steps are judged.
    Running,
    /// It stays at its step; guardrails still roll it back.
    Paused,
    /// The candidate is the endpoint's version.
    Promoted,
    /// A client ended it before it was promoted.
    Aborted,
    /// Guardrails, or a client, returned to the version of before.
    RolledBack,
}

impl Phase {
    /// Whether both versions answer.
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self, Phase::Running | Phase::Paused)
    }
}

/// What has become of the version that a rollout ended with nothing to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cleanup {
    /// Both versions are wanted.
    Waiting,
    /// The router may still have requests with it.
    Draining,
    /// Its actors are being ended.
    Ending,
    /// Nothing of it runs.
    Done,
}

/// One version, as its replicas load it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// The version of the endpoint's model.
    pub version: u64,
    /// BLAKE3 of its file.
    pub digest: String,
    /// Size of that file, in bytes.
    pub size_bytes: u64,
}

/// What a candidate may not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guardrails {
    /// How many more of ten thousand requests may fail than with the stable version.
    pub error_increase_max_bp: u32,
    /// How much longer an answer may take, in percent: in the mean, and at the 95th percentile.
    pub latency_increase_max_percent: u32,
    /// How many of ten thousand rollouts of a version that is no worse may be rolled back.
    pub false_rollback_max_bp: u32,
}

impl Guardrails {
    /// Half a percent more errors, ten percent more latency, one false rollback in a hundred.
    pub const STANDARD: Guardrails = Guardrails {
        error_increase_max_bp: 50,
        latency_increase_max_percent: 10,
        false_rollback_max_bp: 100,
    };
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The rollout began.
    Start,
    /// A step was passed.
    Pass,
    /// A client paused it.
    Pause,
    /// A client resumed it.
    Resume,
    /// The candidate became the endpoint's version.
    Promote,
    /// A client ended it.
    Abort,
    /// The version of before is the endpoint's again.
    RollBack,
}

/// A decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// At which step, counted from 0.
    pub step: u32,
    /// What was done.
    pub action: Action,
    /// The numbers that it rests on; absent if a client decided.
    pub evidence: Option<Evidence>,
}

/// What was counted of a step that is not decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// When it was reported, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The step, counted from 0.
    pub step: u32,
    /// The router that counts.
    pub router: Incarnation,
    /// In numbers.
    pub evidence: Evidence,
}

/// A wait for replicas of the candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The router that waits.
    pub router: Incarnation,
    /// The step that waits, counted from 0.
    pub step: u32,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// When the router last said so, in milliseconds since the Unix epoch.
    pub last_ms: u64,
}

/// A rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// The endpoint.
    pub endpoint: String,
    /// Counted from 1 within its endpoint.
    pub number: u64,
    /// How it goes on.
    pub strategy: Strategy,
    /// The endpoint's version when it began.
    pub stable: Served,
    /// The version that is tried.
    pub candidate: Served,
    /// The candidate's share of the requests at each step, in percent.
    pub steps: Vec<u32>,
    /// The step that it is at, counted from 0.
    pub step: u32,
    /// Where it is.
    pub phase: Phase,
    /// What the candidate may not do.
    pub guardrails: Guardrails,
    /// How many requests each of the compared sides must have answered before a step is passed.
    pub min_samples: u64,
    /// When it began, in milliseconds since the Unix epoch.
    pub started_ms: u64,
    /// The log index of its last change of phase or step: acknowledgements name it.
    pub revision: u64,
    /// What has become of the version that lost.
    pub cleanup: Cleanup,
    /// What was decided, oldest first.
    pub decisions: Vec<Decision>,
    /// How long a step may wait for replicas of the candidate before the rollout is rolled back, in milliseconds; for
    /// ever if 0.
    pub replica_wait_max_ms: u64,
}

impl Rollout {
    /// The candidate's share of the requests now, in percent.
    #[must_use]
    pub fn weight_percent(&self) -> u32 {
        match self.phase {
            Phase::Running | Phase::Paused => self.steps[self.step as usize],
            Phase::Promoted => 100,
            Phase::Aborted | Phase::RolledBack => 0,
        }
    }

    /// How many replicas the stable version and the candidate shall have while the rollout is open, of an
    /// endpoint with so many. Neither has none: both have requests.
    #[must_use]
    pub fn replica_counts(&self, replicas: u32) -> (u32, u32) {
        match self.strategy {
            Strategy::Canary | Strategy::BlueGreen => (replicas, replicas),
            Strategy::Rolling => {
                let replaced = u64::from(replicas) * u64::from(self.weight_percent());
                let candidate = (replaced.div_ceil(100) as u32).max(1);
                let stable = replicas - (replaced / 100) as u32;
                (stable, candidate)
            }
        }
    }

    /// What keys are hashed with: another one for each rollout, so that not the same users are always
    /// the first to meet a new version.
    #[must_use]
    pub fn seed(&self) -> String {
        format!("{}/{}/", self.endpoint, self.number)
    }

    /// How many steps are judged: all but the last, which is the promotion.
    #[must_use]
    pub fn judged_steps(&self) -> u32 {
        (self.steps.len() as u32).saturating_sub(1).max(1)
    }

    /// The version that answers nothing any more, once the rollout is over.
    #[must_use]
    pub fn retiring(&self) -> Option<&Served> {
        match self.phase {
            Phase::Running | Phase::Paused => None,
            Phase::Promoted => Some(&self.stable),
            Phase::Aborted | Phase::RolledBack => Some(&self.candidate),
        }
    }

    pub(super) fn decided(&mut self, at_ms: u64, action: Action, evidence: Option<Evidence>) {
        let step = self.step;
        self.decisions.push(Decision {
            at_ms,
            step,
            action,
            evidence,
        });
        let excess = self.decisions.len().saturating_sub(DECISIONS_MAX);
        self.decisions.drain(..excess);
    }
}

/// Refuses what cannot be steps, guardrails or samples of a rollout.
pub(super) fn check(
    steps: &[u32],
    guardrails: &Guardrails,
    min_samples: u64,
) -> Result<(), Rejection> {
    let ascends = steps.windows(2).all(|pair| pair[0] < pair[1]);
    if steps.len() < 2 || steps.len() > STEPS_MAX || !ascends || steps.last() != Some(&100) {
        let shown: Vec<String> = steps.iter().take(STEPS_MAX).map(u32::to_string).collect();
        return Err(Rejection::invalid(format!(
            "steps `{}` are not possible (`--steps`): give 2 to {STEPS_MAX} growing percentages, of which the \
             last is 100",
            shown.join(",")
        )));
    }
    for (what, value, (min, max)) in [
        (
            "basis points as an increase of errors (`--max-error-increase-bp`)",
            guardrails.error_increase_max_bp,
            (0, 10_000),
        ),
        (
            "percent as an increase of latency (`--max-latency-increase`)",
            guardrails.latency_increase_max_percent,
            (0, 100_000),
        ),
        (
            "basis points as a chance of a false rollback",
            guardrails.false_rollback_max_bp,
            (1, 5_000),
        ),
    ] {
        if !(min..=max).contains(&value) {
            return Err(Rejection::invalid(format!(
                "guardrails are out of range: {value} {what}; give {min} to {max}"
            )));
        }
    }
    if !(1..=MIN_SAMPLES_MAX).contains(&min_samples) {
        return Err(Rejection::invalid(format!(
            "{min_samples} samples a step are not possible (`--min-samples`): ask for 1 to {MIN_SAMPLES_MAX}"
        )));
    }
    Ok(())
}

#[cfg(test)]
pub(in crate::serving) mod tests {
    use super::*;

    /// A rollout of version 2 of the digits beside version 1, as it begins.
    pub(in crate::serving) fn begun(strategy: Strategy, steps: &[u32]) -> Rollout {
        let served = |version| Served {
            version,
            digest: "d".repeat(64),
            size_bytes: 1,
        };
        Rollout {
            endpoint: "digits".into(),
            number: 1,
            strategy,
            stable: served(1),
            candidate: served(2),
            steps: steps.to_vec(),
            step: 0,
            phase: Phase::Running,
            guardrails: Guardrails::STANDARD,
            min_samples: 10,
            started_ms: 0,
            revision: 1,
            cleanup: Cleanup::Waiting,
            decisions: Vec::new(),
            replica_wait_max_ms: REPLICA_WAIT_MS,
        }
    }

    #[test]
    fn a_rolling_update_replaces_replicas_and_never_has_many_more_than_before() {
        let mut rollout = begun(Strategy::Rolling, &Strategy::Rolling.default_steps());
        let mut counts = |replicas| {
            [0, 1, 2].map(|step| {
                rollout.step = step;
                rollout.replica_counts(replicas)
            })
        };
        assert_eq!(counts(1), [(1, 1), (1, 1), (1, 1)]);
        assert_eq!(counts(2), [(2, 1), (1, 1), (1, 2)]);
        assert_eq!(counts(8), [(6, 2), (4, 4), (2, 6)]);
        for replicas in 1..=64 {
            for (stable, candidate) in counts(replicas) {
                assert!(stable > 0 && candidate > 0);
                assert!((replicas..=replicas + 1).contains(&(stable + candidate)));
            }
        }
        rollout.strategy = Strategy::Canary;
        assert_eq!(rollout.replica_counts(8), (8, 8));
    }
}
