//! How a router reaches the versions of its endpoint: what each takes and gives, and its replicas.

use std::sync::Arc;

use mobula::{ActorRef, Cluster, StorageLocation};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::arm::{Arm, Origin, WhenGone};
use super::controller::{monitor_name, replica_name};
use super::feed::feed;
use super::fleet::Fleet;
use super::guard::traffic::Traffic;
use super::replica::Replica;
use super::replica_link::{feed_monitor, follow_origin, keep_open};
use super::rollout::plan::Served;
use super::signature::{ROW_VALUES_MAX, Signature};
use super::state::Endpoint;
use crate::registry::artifact::Artifact;
use crate::registry::version_file::VersionFileError;
use crate::storage::open_blobs;

pub(super) type Replicas = ActorRef<Replica>;

/// Why an endpoint cannot answer with a version.
#[derive(Debug, thiserror::Error)]
pub(super) enum SignatureError {
    #[error("the version's file: {0}")]
    Version(#[from] VersionFileError),
    #[error(
        "version {version} of {model} is trained on {samples}: an endpoint answers for numbers \
         with classes, at most {ROW_VALUES_MAX} numbers a row"
    )]
    Samples {
        model: String,
        version: u64,
        samples: String,
    },
}

impl SignatureError {
    /// Whether another try cannot help.
    fn is_final(&self) -> bool {
        !matches!(self, SignatureError::Version(VersionFileError::Store(_)))
    }
}

/// Whether a version takes and gives what its endpoint does.
pub(super) enum Fit {
    Yes,
    /// It never will, for this reason.
    No(String),
    /// It cannot be looked at now.
    Unknown,
}

/// How the versions of an endpoint are reached.
pub(super) struct Versions {
    pub(super) cluster: Cluster,
    pub(super) storage: StorageLocation,
    pub(super) traffic: Arc<Traffic>,
}

impl Versions {
    pub(super) fn new(cluster: Cluster, storage: StorageLocation) -> Self {
        Versions {
            cluster,
            storage,
            traffic: Arc::default(),
        }
    }

    /// What the endpoint's active version takes and gives.
    pub(super) async fn signature(&self, endpoint: &Endpoint) -> Result<Signature, SignatureError> {
        self.signature_of(&endpoint.model, &active(endpoint)).await
    }

    async fn signature_of(
        &self,
        model: &str,
        served: &Served,
    ) -> Result<Signature, SignatureError> {
        let blobs = open_blobs(&self.storage).map_err(VersionFileError::from)?;
        let artifact = Artifact::load(&blobs, &served.digest, served.size_bytes).await?;
        Signature::of(&artifact).map_err(|samples| SignatureError::Samples {
            model: model.to_owned(),
            version: served.version,
            samples,
        })
    }

    /// Whether a version takes and gives what `wanted` says.
    pub(super) async fn fit(&self, wanted: &Signature, model: &str, served: &Served) -> Fit {
        match self.signature_of(model, served).await {
            Ok(signature) if signature == *wanted => Fit::Yes,
            Ok(other) => Fit::No(other.difference(served.version, wanted)),
            Err(error) if error.is_final() => Fit::No(error.to_string()),
            Err(error) => {
                tracing::warn!(model, %error, "a version cannot be looked at yet");
                Fit::Unknown
            }
        }
    }

    /// An arm that looks for its replicas from now on.
    pub(super) fn arm(&self, endpoint: &Endpoint, version: u64) -> (Arm<Replicas>, WhenGone) {
        self.arm_with(endpoint, version, Arc::clone(&self.traffic))
    }

    /// The same for a shadow, whose requests are no load of the endpoint's.
    pub(super) fn shadow(&self, endpoint: &Endpoint, version: u64) -> (Arm<Replicas>, WhenGone) {
        self.arm_with(endpoint, version, Arc::default())
    }

    fn arm_with(
        &self,
        endpoint: &Endpoint,
        version: u64,
        traffic: Arc<Traffic>,
    ) -> (Arm<Replicas>, WhenGone) {
        let mut tasks = JoinSet::new();
        let fleet = Fleet::sharing(endpoint.replicas, traffic);
        for (number, berth) in fleet.berths() {
            let name = replica_name(&endpoint.name, version, number);
            tasks.spawn(keep_open(self.cluster.clone(), name, berth));
        }
        let (feed, reader) = feed();
        let monitor = monitor_name(&endpoint.name, version);
        tasks.spawn(feed_monitor(self.cluster.clone(), monitor, reader));
        let (learnt, origin) = watch::channel(Origin::default());
        tasks.spawn(follow_origin(
            self.cluster.clone(),
            endpoint.model.clone(),
            version,
            learnt,
        ));
        Arm::new(version, origin, fleet, feed, tasks)
    }

    /// Gives an arm as many replicas as the endpoint shall have.
    pub(super) fn resize(&self, endpoint: &Endpoint, arm: &Arm<Replicas>) {
        for (number, berth) in arm.fleet().resize(endpoint.replicas) {
            let name = replica_name(&endpoint.name, arm.version(), number);
            arm.spawn(keep_open(self.cluster.clone(), name, berth));
        }
    }
}

fn active(endpoint: &Endpoint) -> Served {
    Served {
        version: endpoint.version,
        digest: endpoint.digest.clone(),
        size_bytes: endpoint.size_bytes,
    }
}
