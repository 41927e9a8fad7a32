//! Why training cannot go on.

use crate::training::optimizer::StepError;

/// Why training cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoordinatorError {
    /// A newer driver leads the trainers.
    #[error("a newer driver (incarnation {0}) leads the trainers; this one stops")]
    Fenced(u64),
    /// A trainer cannot do what the job asks.
    #[error("trainer-{slot} on {node}: {reason}")]
    Unfit {
        /// Which trainer.
        slot: usize,
        /// Where it runs.
        node: String,
        /// What it said.
        reason: String,
    },
    /// The update could not be made.
    #[error("{0}")]
    Update(String),
    /// Most trainers agree on other bits than this coordinator.
    #[error(
        "step {step}: most of {count} trainers agree on other parameters than this coordinator, \
         which has {ours}: its copy is damaged; start again from a checkpoint"
    )]
    Outvoted {
        /// The step.
        step: u64,
        /// How many said what they have.
        count: usize,
        /// Our digest.
        ours: String,
    },
}

impl CoordinatorError {
    /// Whether another start of the driver would come to the same.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            CoordinatorError::Unfit { .. } | CoordinatorError::Update(_)
        )
    }
}

impl From<StepError> for CoordinatorError {
    fn from(error: StepError) -> Self {
        CoordinatorError::Update(error.to_string())
    }
}
