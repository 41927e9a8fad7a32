//! What members say to each other, and to their shells.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::leader::StateDigest;
use super::plan::MemberId;
use crate::training::reduction::{Partial, Subtree};

/// Sums on their way to a bucket's owner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Contribution {
    /// Who sends.
    pub from: MemberId,
    /// The step.
    pub step: u64,
    /// The sender's state before that step.
    pub digest: StateDigest,
    /// The bucket.
    pub bucket: u32,
    /// The sums of some subtrees, the bucket's values only.
    pub partials: Vec<Partial>,
}

impl Contribution {
    /// Which sums these are.
    #[must_use]
    pub fn content(&self) -> Content {
        Content {
            step: self.step,
            bucket: self.bucket,
            subtrees: self.partials.iter().map(|sums| sums.subtree).collect(),
        }
    }
}

/// Which sums a contribution holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// The step.
    pub step: u64,
    /// The bucket.
    pub bucket: u32,
    /// Whose sums.
    pub subtrees: Vec<Subtree>,
}

/// A question for the sum of a bucket over all shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Who asks.
    pub from: MemberId,
    /// The step.
    pub step: u64,
    /// Its state before that step.
    pub digest: StateDigest,
    /// The bucket.
    pub bucket: u32,
    /// Whether the answer may not wait for the sum: who was not answered before wants a sign of life first.
    pub at_once: bool,
}

/// Why a member does not take a sum, or does not give one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The step is over for so long that its sums are gone.
    #[error("the step is over: this member stands at step {at}")]
    Late {
        /// Where it stands.
        at: u64,
    },
    /// The step is too far ahead.
    #[error("the step is too far ahead: this member stands at step {at}")]
    Early {
        /// Where it stands.
        at: u64,
    },
    /// The states before the step differ.
    #[error("this member holds other bits before that step")]
    Dissent {
        /// What it holds.
        mine: StateDigest,
    },
    /// Not a sum of this job's shards, or too many questions.
    #[error("it does not fit this job, or too many wait")]
    Misfit,
    /// The sum is not there yet. Says no more than that the member lives: it is to be asked again.
    #[error("the sum is not there yet")]
    NotYet,
}

/// What a member should know of another, from its answers or its silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// A call to it failed.
    Unreachable {
        /// Which member.
        peer: MemberId,
    },
    /// It holds other bits.
    Dissent {
        /// The step before which the states differ.
        step: u64,
        /// Which member.
        peer: MemberId,
    },
    /// Its shards take much longer than a step usually does.
    Slow {
        /// Which member.
        peer: MemberId,
        /// The step that waits for them.
        step: u64,
    },
    /// This member is too far behind to catch up with sums: it needs a state.
    Behind {
        /// Where another member stands.
        at: u64,
    },
    /// A call to it was answered, after one that had failed.
    Reached {
        /// Which member.
        peer: MemberId,
    },
}

/// What a member's shell has to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Compute a shard, after those that were ordered before, then call [`Member::computed`](super::member::Member::computed).
    Compute {
        /// The step.
        step: u64,
        /// The shard.
        shard: u32,
    },
    /// Send sums, then call [`Member::contributed`](super::member::Member::contributed).
    Contribute {
        /// The owner.
        to: MemberId,
        /// What to send.
        contribution: Contribution,
    },
    /// Ask for a sum, then call [`Member::answered`](super::member::Member::answered).
    Ask {
        /// The owner.
        to: MemberId,
        /// The question.
        ask: Ask,
    },
    /// Answer a question that waited.
    Answer {
        /// Which one: what [`Member::ask`](super::member::Member::ask) was given.
        token: u64,
        /// The answer.
        answer: Result<Arc<Partial>, Refusal>,
    },
    /// Update the state with the sums of the whole step, then call [`Member::applied`](super::member::Member::applied).
    Apply {
        /// The sums.
        root: Arc<Partial>,
    },
    /// Tell the leader.
    Report(Report),
}
