//! What clients and the leader say about retraining. Persisted: positions of variants and fields never change.

use serde::{Deserialize, Serialize};

use super::plan::RetrainPolicy;

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Says what is done about drift at an endpoint, from the next retraining on. Answer: nothing.
    SetPolicy {
        /// The endpoint.
        endpoint: String,
        /// The policy.
        policy: Box<RetrainPolicy>,
    },
    /// From now on nothing is done; a retraining under way goes on if it has its job. Answer: nothing.
    RemovePolicy {
        /// The endpoint.
        endpoint: String,
    },
    /// Begins a retraining that is suggested, whatever the mode and the cooldown say. Answer:
    /// [`Retraining`](super::plan::Retraining).
    Retrain {
        /// The endpoint.
        endpoint: String,
    },
    /// Ends a retraining that is under way. Answer: [`Retraining`](super::plan::Retraining).
    Cancel {
        /// The endpoint.
        endpoint: String,
        /// Why, for people.
        reason: String,
    },
    /// The leader begins a retraining for a drift event. Answer: nothing.
    Begin {
        /// The endpoint.
        endpoint: String,
        /// The event.
        event: u64,
    },
    /// The leader takes the next step. Answer: nothing.
    Advance {
        /// The endpoint.
        endpoint: String,
        /// The retraining.
        number: u64,
        /// The revision that it follows.
        revision: u64,
    },
    /// The leader forgets all of an endpoint that is gone. Answer: nothing.
    Forget {
        /// The endpoint.
        endpoint: String,
    },
}

impl Command {
    /// The endpoint that it is about.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        match self {
            Command::SetPolicy { endpoint, .. }
            | Command::RemovePolicy { endpoint }
            | Command::Retrain { endpoint }
            | Command::Cancel { endpoint, .. }
            | Command::Begin { endpoint, .. }
            | Command::Advance { endpoint, .. }
            | Command::Forget { endpoint } => endpoint,
        }
    }

    /// Whether clients decide this; all else only the leading head does.
    #[must_use]
    pub fn is_for_clients(&self) -> bool {
        matches!(
            self,
            Command::SetPolicy { .. }
                | Command::RemovePolicy { .. }
                | Command::Retrain { .. }
                | Command::Cancel { .. }
        )
    }

    /// What it is about, for the audit log.
    #[must_use]
    pub fn subject(&self) -> String {
        let what = match self {
            Command::SetPolicy { .. } => "retrain policy of",
            Command::RemovePolicy { .. } => "no retrain policy for",
            Command::Retrain { .. } => "retrain",
            Command::Cancel { .. } => "cancel retraining of",
            Command::Begin { .. } => "begin retraining of",
            Command::Advance { .. } => "next step of retraining of",
            Command::Forget { .. } => "forget retrainings of",
        };
        format!("{what} endpoint {}", self.endpoint())
    }
}
