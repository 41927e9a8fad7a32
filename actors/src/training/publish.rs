//! What a finished job leaves: a model version, stored by its digest and registered if asked for.

use mobula::Cluster;
use mobula_core::{ErrorCode, JobId};
use mobula_storage::blob::BlobError;

use super::data::SampleShape;
use super::model::Model;
use super::record::RunRecord;
use super::reference::{population, reference_sample};
use super::spec::TrainSpec;
use super::state::TrainState;
use super::trainable::Evaluation;
use super::workload::{Workload, WorkloadError};
use crate::checkpoint::state::CheckpointRef;
use crate::registry::client::{PublishError, publish};
use crate::registry::provenance::{CheckpointOrigin, Code, Parent};
use crate::registry::version_file::Provenance;
use crate::registry::{VersionFile, VersionFileError, provenance};
use crate::storage::open_blobs;

/// Rows of the training data that a version keeps for drift detection: what sentinels and confidences take, about 260 KB
/// for the digits. Of more rows it keeps sketches as well.
const REFERENCE_ROWS_MAX: usize = 1000;

/// A version that is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// BLAKE3 of its file, in hex, which is also its name.
    pub digest: String,
    /// Its size.
    pub size_bytes: u64,
    /// The version that the registry gave it, if it was registered.
    pub version: Option<u64>,
}

/// Why a version was not stored. Trying again is safe.
#[derive(Debug, thiserror::Error)]
pub enum PublishVersionError {
    /// The object store cannot be opened.
    #[error(transparent)]
    Store(#[from] BlobError),
    /// The file was not stored.
    #[error(transparent)]
    File(#[from] VersionFileError),
    /// It was not registered.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl PublishVersionError {
    /// Whether the same may succeed later without anybody changing the job.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            // Also a full disk or a refused key: somebody can mend it while the job waits.
            PublishVersionError::Store(_)
            | PublishVersionError::File(VersionFileError::Store(_))
            | PublishVersionError::Publish(PublishError::File(VersionFileError::Store(_))) => true,
            PublishVersionError::Publish(PublishError::Register(error)) => {
                // Registering the same version again is the same version.
                matches!(
                    error.code(),
                    Some(
                        ErrorCode::Unavailable
                            | ErrorCode::DeadlineExceeded
                            | ErrorCode::Overloaded
                            | ErrorCode::SessionExpired
                    )
                )
            }
            _ => false,
        }
    }
}

/// Describes the model of a finished job, and measures it on the samples that it never saw.
pub fn describe(
    workload: &Workload,
    job: JobId,
    state: &TrainState,
) -> Result<(VersionFile, Evaluation), WorkloadError> {
    let (spec, train) = (workload.spec(), &workload.split().train);
    let evaluation = workload.evaluate(&workload.parameters(&state.params)?)?;
    let model = Model::from_flat(&spec.model, train.shape(), &state.params)?;
    let mut metrics = evaluation.metrics.clone();
    metrics.insert("loss".to_owned(), evaluation.loss);
    let labels = match train.shape() {
        SampleShape::Classified { classes, .. } => *classes,
        _ => 0,
    };
    let reference = reference_sample(&model, train, REFERENCE_ROWS_MAX, spec.seed)?;
    let file = VersionFile {
        model_name: spec.register.clone().unwrap_or_else(|| spec.name.clone()),
        model: spec.model.clone(),
        samples: train.shape().clone(),
        parameters: state.params.to_vec(),
        labels: (0..labels).map(|class| class.to_string()).collect(),
        population: population(train, &reference, spec.seed)?,
        reference,
        provenance: Provenance {
            job: job.0,
            steps: state.step,
            weights_blake3: state.weights_blake3(),
            dataset_blake3: train.digest().to_owned(),
            metrics,
        },
    };
    Ok((file, evaluation))
}

/// Where the version of a run comes from, as its record and its last checkpoint say.
#[must_use]
pub fn origin(
    record: &RunRecord,
    record_digest: &str,
    checkpoint: Option<&CheckpointRef>,
) -> provenance::Provenance {
    let environment = &record.environment;
    let facts = [
        ("cpu_model", environment.cpu_model.clone()),
        ("isa", environment.isa.join(" ")),
        ("os", environment.os.clone()),
    ];
    let parent = match &record.spec.start_from {
        None => Parent::Seed,
        Some(from) => Parent::Checkpoint(CheckpointOrigin {
            manifest: from.manifest.clone(),
            digest: from.digest.clone(),
        }),
    };
    provenance::Provenance {
        // Of the file, which whoever stores it knows.
        sha256: None,
        code: record.program.blake3.as_ref().map(|blake3| Code {
            reference: format!("mobula {}", record.program.version),
            blake3: blake3.clone(),
        }),
        environment: facts
            .into_iter()
            .filter(|(_, fact)| !fact.is_empty())
            .map(|(name, fact)| (name.to_owned(), fact))
            .collect(),
        seed: Some(record.spec.seed),
        parent: Some(parent),
        checkpoint: checkpoint.map(|checkpoint| CheckpointOrigin {
            manifest: checkpoint.manifest_path.clone(),
            digest: checkpoint.manifest_digest.clone(),
        }),
        run_record: Some(record_digest.to_owned()),
    }
}

/// Stores the version, and registers it if the job asks for that.
pub async fn publish_version(
    cluster: &Cluster,
    spec: &TrainSpec,
    file: &VersionFile,
    origin: &provenance::Provenance,
) -> Result<Published, PublishVersionError> {
    if spec.register.is_some() {
        let training_json =
            serde_json::to_string(spec).expect("plain numbers and strings always encode");
        let registered = publish(cluster, file, training_json, origin.clone()).await?;
        return Ok(Published {
            digest: registered.description.digest,
            size_bytes: registered.description.size_bytes,
            version: Some(registered.version),
        });
    }
    let location = cluster
        .storage()
        .expect("a job's driver is a process of the cluster");
    let stored = file.store(&open_blobs(location)?).await?;
    Ok(Published {
        digest: stored.digest,
        size_bytes: stored.size_bytes,
        version: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::data::Files;
    use crate::training::replica::load;

    #[test]
    fn a_description_can_be_built_again_and_says_where_it_came_from() {
        let spec = TrainSpec {
            register: Some("digits".into()),
            ..TrainSpec::digits_mlp("job")
        };
        let workload = load(&spec, &Files::local()).unwrap();
        let state = TrainState::initial(&workload);
        let (file, evaluation) = describe(&workload, JobId(4), &state).unwrap();
        let read = VersionFile::from_bytes(&file.to_bytes()).unwrap();
        assert_eq!(
            (read.model_name.as_str(), read.provenance.job),
            ("digits", 4)
        );
        assert_eq!(read.provenance.weights_blake3, state.weights_blake3());
        assert_eq!(
            read.provenance.metrics["accuracy"],
            evaluation.metrics["accuracy"]
        );
        let reference = read.build_reference().unwrap();
        assert_eq!(reference.rows(), REFERENCE_ROWS_MAX);
        let trained = workload.split().train.len() as u64;
        assert_eq!(reference.population().unwrap().rows(), trained);
        assert_eq!(read.build_model().unwrap().flat(), state.params.to_vec());
    }
}
