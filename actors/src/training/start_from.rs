//! Beginning a job with the weights of another job's checkpoint.
//!
//! The checkpoint is named by its manifest's digest, so the weights are part of what the job is: its
//! fingerprint covers them, and a restart needs the checkpoint only as long as the job has none of its own.
//! Only the parameters are taken over: the optimizer begins anew, at step 0.

use std::time::Duration;

use bytes::Bytes;
use mobula_storage::blob::BlobError;
use mobula_storage::checkpoint::{CheckpointReader, LoadError, ManifestName, ManifestRef};
use mobula_storage::digest::Digest;
use serde::{Deserialize, Serialize};

use super::job_log::JobLog;
use super::state::{StateError, TrainState};
use super::validation::InvalidField;
use crate::checkpoint::checkpointer::RESTORE_BYTES_MAX;

/// Pauses between attempts while the store is out of reach.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// The `[start_from]` part of a training job, as `mobula checkpoints restore` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartFrom {
    /// The manifest's name in the object store.
    pub manifest: String,
    /// BLAKE3 of the manifest, in hex.
    pub digest: String,
}

/// Why a job cannot begin with those weights.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store cannot be opened.
    #[error("start_from: {0}")]
    Store(#[from] BlobError),
    /// The checkpoint is not there, or is damaged.
    #[error(
        "start_from: {0}; was it pruned or swept? `mobula checkpoints list` shows what there is"
    )]
    Load(#[from] LoadError),
    /// It is no training state.
    #[error("start_from: {0}")]
    State(#[from] StateError),
    /// It is of another model.
    #[error(
        "start_from: that checkpoint has {found} parameters and this model {expected}: give both jobs \
         the same [model]"
    )]
    OtherModel {
        /// Its parameters.
        found: usize,
        /// The model's.
        expected: usize,
    },
}

impl StartFrom {
    /// Checks that it can name a checkpoint.
    pub fn validate(&self) -> Result<(), InvalidField> {
        let next = "take both lines from `mobula checkpoints restore`";
        if ManifestName::parse(&self.manifest).is_none() {
            return Err(InvalidField {
                key: "manifest",
                found: self.manifest.clone(),
                reason: "a manifest is called manifest/job-12/000000000300-4.json".to_owned(),
                next,
            });
        }
        match self.digest.parse::<Digest>() {
            Ok(_) => Ok(()),
            Err(error) => Err(InvalidField {
                key: "digest",
                found: self.digest.clone(),
                reason: error.to_string(),
                next,
            }),
        }
    }

    /// Gives `initial` the checkpoint's parameters. Waits while the store is out of reach, and says so.
    pub async fn load(
        &self,
        initial: &mut TrainState,
        open: impl Fn() -> Result<mobula_storage::blob::BlobStore, BlobError>,
        log: JobLog,
    ) -> Result<(), StartError> {
        let step = take_over(&self.fetch(open, log).await?, initial)?;
        log.line(format_args!(
            "starting from the weights of {} after step {step}",
            self.manifest
        ));
        Ok(())
    }

    /// The checkpoint's bytes, verified; the description must have been checked. Waits while the store is out of reach,
    /// and says so.
    pub(super) async fn fetch(
        &self,
        open: impl Fn() -> Result<mobula_storage::blob::BlobStore, BlobError>,
        log: JobLog,
    ) -> Result<Bytes, StartError> {
        let reference = ManifestRef {
            path: self.manifest.clone(),
            digest: self.digest.parse().expect("the description was checked"),
        };
        let mut pause = PAUSE_FIRST;
        loop {
            let reader = CheckpointReader::new(open()?, RESTORE_BYTES_MAX);
            match reader.load(&reference).await {
                Ok(checkpoint) => return Ok(checkpoint.bytes),
                Err(LoadError::Blob(error)) => log.line(format_args!(
                    "the weights to start from cannot be read: {error}; waiting, next attempt in {} ms",
                    pause.as_millis()
                )),
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// Gives `initial` the parameters of the checkpoint with these bytes; the step after which it was taken.
pub(super) fn take_over(bytes: &[u8], initial: &mut TrainState) -> Result<u64, StartError> {
    let state = TrainState::from_bytes(bytes)?;
    let (found, expected) = (state.params.len(), initial.params.len());
    if found != expected {
        return Err(StartError::OtherModel { found, expected });
    }
    initial.params = state.params;
    Ok(state.step)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use mobula_core::{Incarnation, JobId};
    use mobula_storage::blob::{BlobStore, S3Options};
    use mobula_storage::checkpoint::{CheckpointWriter, SaveRequest};

    use super::*;
    use crate::training::models::ModelSpec;
    use crate::training::snapshot::StateSnapshot;
    use crate::training::spec::TrainSpec;
    use crate::training::workload::Workload;

    async fn saved(blobs: &BlobStore, state: &TrainState) -> StartFrom {
        let request = SaveRequest {
            job: JobId(12),
            step: state.step,
            incarnation: Incarnation(3),
            parent: None,
            sections: Vec::new(),
            metadata: BTreeMap::new(),
        };
        let saved = CheckpointWriter::new(blobs.clone())
            .save_from(request, Arc::new(StateSnapshot::of(state)))
            .await
            .unwrap();
        StartFrom {
            manifest: saved.handle.reference.path.clone(),
            digest: saved.handle.reference.digest.to_string(),
        }
    }

    #[tokio::test]
    async fn the_parameters_are_taken_over_and_nothing_else() {
        let spec = TrainSpec::digits_mlp("a");
        let mut other = TrainState::initial(&Workload::of(&spec));
        (other.step, other.params[3], other.moments[0][1]) = (300, 0.25, 9.0);
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        let from = saved(&blobs, &other).await;
        from.validate().unwrap();
        let open = || Ok(blobs.clone());
        let mut initial = TrainState::initial(&Workload::of(&spec));
        from.load(&mut initial, open, JobLog::Silent).await.unwrap();
        assert_eq!(initial.params, other.params);
        assert_eq!((initial.step, initial.moments[0][1]), (0, 0.0));

        let mut wide = spec.clone();
        wide.model = ModelSpec::Mlp { hidden: vec![7] };
        let mut wide = TrainState::initial(&Workload::of(&wide));
        let error = from
            .load(&mut wide, open, JobLog::Silent)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("the same [model]"), "{error}");
        blobs.delete(&from.manifest).await.unwrap();
        let error = from
            .load(&mut initial, open, JobLog::Silent)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("is missing"), "{error}");
    }

    #[test]
    fn what_names_no_checkpoint_is_refused_and_what_does_is_part_of_the_job() {
        let good = StartFrom {
            manifest: "manifest/job-12/000000000300-4.json".to_owned(),
            digest: Digest::of(b"m").to_string(),
        };
        good.validate().unwrap();
        let bad = StartFrom {
            manifest: "job-12".to_owned(),
            ..good.clone()
        };
        assert_eq!(bad.validate().unwrap_err().key, "manifest");
        let bad = StartFrom {
            digest: "12".to_owned(),
            ..good.clone()
        };
        assert_eq!(bad.validate().unwrap_err().key, "digest");
        let plain = TrainSpec::digits_mlp("a");
        let started = TrainSpec {
            start_from: Some(good),
            ..plain.clone()
        };
        assert_ne!(plain.fingerprint("d"), started.fingerprint("d"));
    }
}
