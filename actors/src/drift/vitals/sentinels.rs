//! Sentinels: known rows whose answers are known, put to every replica now and then.
//!
//! They find what statistics of the traffic cannot: a replica that answers wrongly though its file is right, as a
//! machine with bad memory does. The rows are some of the version's reference rows, and the answers those that its file
//! has for them. Replicas are asked past the router's queues, so that the answer names the replica, and neither the monitor
//! nor the autoscaler takes sentinels for traffic. The active version's are put by its monitor (`keeper`), those of a
//! rollout's candidate and of an experiment's treatment by the endpoint's router (`serving::sentinels`).

use std::fmt;
use std::time::Duration;

use mobula_core::id::NodeId;
use serde::{Deserialize, Serialize};

use crate::registry::artifact::Artifact;
use crate::registry::version_file::VersionFile;
use crate::serving::oip::TensorData;
use crate::serving::rows::{Batch, Cell};

/// Sentinels of a version: one small batch a replica.
pub const SENTINELS_MAX: usize = 8;

/// How often the sentinels are put to each replica: 8 rows, which is nothing beside traffic.
pub(crate) const SENTINEL_INTERVAL: Duration = Duration::from_secs(30);

/// The pause after a round that a replica did not answer.
pub(crate) const SENTINEL_PAUSE: Duration = Duration::from_secs(5);

/// How long a replica may take for the sentinels.
pub(crate) const SENTINEL_TIMEOUT: Duration = Duration::from_secs(5);

/// The rows and what is right to say about them; none by default.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Sentinels {
    rows: Vec<f32>,
    classes: Vec<u32>,
}

/// A sentinel that was answered otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// The replica's number, from 1.
    pub replica: u32,
    /// Which sentinel, from 0.
    pub sentinel: u32,
    /// The class that its version predicts.
    pub expected: u32,
    /// The class that was answered; absent if there were too few answers.
    pub answered: Option<u32>,
}

impl Mismatch {
    /// In words, with the node on which the replica runs if that is known: it is the machine that computes wrongly.
    #[must_use]
    pub fn sentence(&self, node: Option<NodeId>) -> String {
        let Mismatch {
            replica,
            sentinel,
            expected,
            answered,
        } = self;
        let place = node.map_or_else(String::new, |node| format!(" on {node}"));
        let answer =
            answered.map_or_else(|| "nothing".to_owned(), |class| format!("class {class}"));
        format!(
            "replica {replica}{place} answered sentinel {sentinel} with {answer} instead of class {expected}"
        )
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.sentence(None))
    }
}

/// What came of sentinels since the monitor started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SentinelStatus {
    /// Rows that the version has for this; none if its file has no reference.
    pub sentinels: u64,
    /// Rounds, of one question to each replica.
    pub rounds: u64,
    /// Questions that were answered as expected.
    pub right: u64,
    /// Questions that were answered otherwise.
    pub wrong: u64,
    /// Questions without an answer: the replica was starting, busy or gone.
    pub unanswered: u64,
    /// Replicas whose last answer was wrong.
    pub replicas_wrong: u64,
    /// The last answer that was wrong.
    pub last_wrong: Option<Mismatch>,
}

impl Sentinels {
    /// Those of a version: reference rows, evenly spread.
    #[must_use]
    pub fn of(file: &VersionFile) -> Self {
        let data = &file.reference;
        let columns = data.columns.iter().map(Vec::len).min().unwrap_or(0);
        let known = columns.min(data.predictions.len());
        let count = known.min(SENTINELS_MAX);
        let chosen: Vec<usize> = (0..count).map(|index| index * known / count).collect();
        Sentinels {
            rows: chosen
                .iter()
                .flat_map(|row| data.columns.iter().map(|column| column[*row]))
                .collect(),
            classes: chosen.iter().map(|row| data.predictions[*row]).collect(),
        }
    }

    /// Those of a version of any kind: none of one that was made elsewhere, for which nobody wrote down answers.
    #[must_use]
    pub fn of_artifact(artifact: &Artifact) -> Self {
        match artifact {
            Artifact::Trained(file) => Self::of(file),
            Artifact::Imported(_) => Self::default(),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.classes.len()
    }

    /// Their rows, one after the other.
    #[must_use]
    pub fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// Their rows, as a replica takes them.
    #[must_use]
    pub fn batch(&self) -> Batch {
        let rows = self.classes.len() as u64;
        let width = self.rows.len() as u64 / rows.max(1);
        Batch {
            rows: Some(rows),
            cells: vec![Cell {
                shape: vec![rows, width],
                data: TensorData::Fp32(self.rows.clone()),
            }],
        }
    }

    /// The first answer of a replica that is not the expected one.
    #[must_use]
    pub fn mismatch(&self, replica: u32, answered: &[u32]) -> Option<Mismatch> {
        let at = (0..self.classes.len())
            .find(|index| answered.get(*index) != Some(&self.classes[*index]))?;
        Some(Mismatch {
            replica,
            sentinel: at as u32,
            expected: self.classes[at],
            answered: answered.get(at).copied(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::version_file::tests::digits;

    #[test]
    fn a_version_answers_its_own_sentinels_and_another_does_not() {
        let file = digits(50);
        let sentinels = Sentinels::of(&file);
        assert_eq!((sentinels.count(), sentinels.rows().len()), (8, 8 * 64));
        let model = file.build_model().unwrap();
        let answers = model.predictions(sentinels.rows()).unwrap();
        assert_eq!(sentinels.mismatch(1, &answers), None);

        // A replica with damaged weights.
        let mut damaged = digits(50);
        for parameter in &mut damaged.parameters {
            *parameter = -*parameter;
        }
        let model = damaged.build_model().unwrap();
        let answers = model.predictions(sentinels.rows()).unwrap();
        let found = sentinels.mismatch(2, &answers).unwrap();
        assert_eq!(found.replica, 2);
        let (placed, bare) = (found.sentence(Some(NodeId(3))), found.to_string());
        assert!(placed.starts_with("replica 2 on node-3 answered sentinel "));
        assert_eq!(placed.replace(" on node-3", ""), bare);
        assert_ne!(found.answered, Some(found.expected));
    }

    #[test]
    fn answers_that_are_missing_are_wrong_and_no_reference_is_no_sentinel() {
        let sentinels = Sentinels::of(&digits(3));
        assert_eq!(sentinels.count(), 3);
        let found = sentinels.mismatch(1, &sentinels.classes[..2]).unwrap();
        assert_eq!((found.sentinel, found.answered), (2, None));
        let mut bare = digits(3);
        bare.reference.columns.clear();
        assert_eq!(Sentinels::of(&bare).count(), 0);
    }
}
