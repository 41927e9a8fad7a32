//! A replica: one copy of a model version that answers batches.
//!
//! Invariants:
//! 1. It answers with the version that it was created for: the file is verified before the first
//!    answer, and a replica that cannot load it does not start.
//! 2. It has no state of its own, so it may be started again anywhere at any time.

use std::time::Instant;

use mobula::{ActorContext, ContextExt};
use mobula_core::id::Incarnation;
use serde::{Deserialize, Serialize};

use crate::registry::version_file::{VersionFile, VersionFileError};
use crate::storage::open_blobs;
use crate::training::model::Model;

/// Rows in one call. The router sends less; this bounds what anybody else may ask for.
pub const ROWS_MAX: usize = 1024;

/// What a model says about rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inference {
    /// The probability of each class, row by row.
    pub probabilities: Vec<f32>,
    /// The most probable class of each row.
    pub classes: Vec<u32>,
    /// How long the model took.
    pub computed_ns: u64,
}

/// Why a replica gave no answer. The same call fails again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum InferError {
    /// The values are not whole rows, or there are too many.
    #[error("{values} values are not 1 to {ROWS_MAX} rows of {row_values}")]
    RowCount {
        /// Values given.
        values: u64,
        /// Values of a row.
        row_values: u64,
    },
    /// The model refused.
    #[error("the model failed: {0}")]
    Model(String),
}

/// Answers for one model version.
pub struct Replica {
    predictor: Predictor,
}

#[mobula::actor(name = "mobula.replica")]
impl Replica {
    /// Loads and verifies the version's file. When the object store is out of reach it fails after
    /// some tries; its supervisor starts it again, with growing pauses.
    pub async fn new(
        ctx: &ActorContext,
        model: String,
        version: u64,
        digest: String,
        size_bytes: u64,
    ) -> Result<Self, VersionFileError> {
        let blobs = open_blobs(ctx.storage())?;
        let file = VersionFile::load(&blobs, &digest, size_bytes).await?;
        let predictor = tokio::task::block_in_place(|| Predictor::new(&file))?;
        tracing::info!(model, version, digest, "a replica is ready");
        Ok(Replica { predictor })
    }

    /// Answers rows, which come one after the other.
    pub fn infer(&self, rows: Vec<f32>) -> Result<Inference, InferError> {
        // Computing must not keep the host's other tasks from running.
        tokio::task::block_in_place(|| self.predictor.infer(&rows))
    }

    /// Answers which start of it runs.
    pub fn ping(&self, ctx: &ActorContext) -> Incarnation {
        ctx.incarnation()
    }

    /// Leaves a node that will be taken away: another replica answers meanwhile.
    #[mobula(notice)]
    async fn leave(&mut self, ctx: &ActorContext, deadline_ms: u64) {
        if let Err(error) = ctx.yield_now().await {
            tracing::warn!(%error, deadline_ms, "a replica could not leave its node early");
        }
    }
}

/// The model of a replica, without the actor around it.
struct Predictor {
    model: Model,
}

impl Predictor {
    fn new(file: &VersionFile) -> Result<Self, VersionFileError> {
        Ok(Predictor {
            model: file.build_model()?,
        })
    }

    fn infer(&self, rows: &[f32]) -> Result<Inference, InferError> {
        let width = self.model.shape().feature_count();
        let count = rows.len() / width;
        if !rows.len().is_multiple_of(width) || count == 0 || count > ROWS_MAX {
            return Err(InferError::RowCount {
                values: rows.len() as u64,
                row_values: width as u64,
            });
        }
        let started = Instant::now();
        let probabilities = self
            .model
            .probabilities(rows)
            .map_err(|error| InferError::Model(error.to_string()))?;
        let classes = probabilities
            .chunks_exact(self.model.shape().output_count())
            .map(most_probable)
            .collect();
        let computed_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Ok(Inference {
            probabilities,
            classes,
            computed_ns,
        })
    }
}

/// The lowest class among the most probable ones, as [`Model::predictions`] has it.
fn most_probable(row: &[f32]) -> u32 {
    let best = (1..row.len()).fold(
        0,
        |best, class| if row[class] > row[best] { class } else { best },
    );
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::version_file::tests::digits;
    use crate::training::data::Dataset;

    #[test]
    fn it_answers_as_the_model_does_and_refuses_what_is_no_row() {
        let file = digits(20);
        let predictor = Predictor::new(&file).unwrap();
        let batch = Dataset::digits().unwrap().gather(&[0, 1, 2, 3, 4]).unwrap();
        let images = batch.features().to_vec();
        let answer = predictor.infer(&images).unwrap();
        let model = file.build_model().unwrap();
        assert_eq!(answer.probabilities, model.probabilities(&images).unwrap());
        assert_eq!(answer.classes, model.predictions(&images).unwrap());
        for rows in [&[][..], &images[1..], &vec![0.0; (ROWS_MAX + 1) * 64]] {
            let error = predictor.infer(rows).unwrap_err();
            assert!(error.to_string().contains("rows of 64"), "{error}");
        }
    }
}
