//! Asking before the first step whether the job may train on its data. A driver that was started again asks
//! again: what was approved may have been withdrawn.

use mobula::Cluster;
use mobula_core::JobId;
use mobula_storage::checkpoint::ManifestName;

use super::job::JobError;
use super::spec::TrainSpec;
use super::workload::Workload;
use crate::registry::policy::client::may_train;
use crate::registry::policy::data::{DataSet, FILES_MAX};

/// Asks the policies of the cluster, which write down what they said.
pub(super) async fn ask(
    cluster: &Cluster,
    job: JobId,
    spec: &TrainSpec,
    workload: &Workload,
) -> Result<(), JobError> {
    let train = &workload.split().train;
    let mut files = train.file_digests().to_vec();
    if files.len() > FILES_MAX {
        files.clear();
    }
    let data = DataSet {
        digest: train.digest().to_owned(),
        files,
    };
    let start = spec.start_from.as_ref();
    let parent = start.and_then(|from| ManifestName::parse(&from.manifest));
    let parent = parent.map(|manifest| manifest.job);
    let decision = may_train(cluster, job, data, parent).await?;
    decision
        .refusal()
        .map_or(Ok(()), |why| Err(JobError::Forbidden(why)))
}
