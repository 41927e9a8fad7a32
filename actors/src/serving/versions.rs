//! How a router reaches the versions of its endpoint: what each takes and gives, and its replicas.
//!
//! Invariant: a router that answers does not wait for the store. What another version takes and gives is looked at
//! beside its loop; only one that starts waits, as it cannot answer without.

use std::sync::Arc;

use mobula::{ActorRef, Cluster, StorageLocation};
use mobula_storage::blob::{BlobError, BlobStore};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::arm::{Arm, Origin, WhenGone};
use super::controller::{monitor_name, replica_name};
use super::feed::feed;
use super::fleet::Fleet;
use super::guard::traffic::Traffic;
use super::loading::Loading;
use super::replica::Replica;
use super::replica_link::{feed_monitor, follow_origin, keep_open};
use super::rollout::plan::Served;
use super::signature::{ROW_VALUES_MAX, Signature};
use super::state::Endpoint;
use crate::drift::vitals::sentinels::Sentinels;
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
    /// It does, and has these sentinels.
    Yes(Arc<Sentinels>),
    /// It never will, for this reason.
    No(String),
    /// It is being looked at, or cannot be now.
    Unknown,
}

/// What a version takes and gives, and what it has to answer to known rows.
type Found = (Signature, Sentinels);

/// Looks at the version of this number.
type Looking = Loading<u64, Result<Found, SignatureError>>;

/// How the versions of an endpoint are reached.
pub(super) struct Versions {
    pub(super) cluster: Cluster,
    pub(super) storage: StorageLocation,
    pub(super) traffic: Arc<Traffic>,
    looking: Looking,
}

impl Versions {
    pub(super) fn new(cluster: Cluster, storage: StorageLocation) -> Self {
        Versions {
            cluster,
            storage,
            traffic: Arc::default(),
            looking: Loading::new(),
        }
    }

    /// What the endpoint's active version takes and gives.
    pub(super) async fn signature(&self, endpoint: &Endpoint) -> Result<Signature, SignatureError> {
        let opened = open_blobs(&self.storage);
        let found = read(opened, &endpoint.model, &active(endpoint)).await;
        found.map(|(signature, _)| signature)
    }

    /// Whether a version takes and gives what `wanted` says, if that is known by now: its file is loaded beside the
    /// caller, who asks again.
    pub(super) fn fit(&mut self, wanted: &Signature, endpoint: &Endpoint, served: &Served) -> Fit {
        let names = (&*endpoint.name, &*endpoint.model);
        let open = || open_blobs(&self.storage);
        let Some(found) = looked_at(&mut self.looking, names, served, open) else {
            return Fit::Unknown;
        };
        match found {
            Ok((signature, sentinels)) if signature == *wanted => Fit::Yes(Arc::new(sentinels)),
            Ok((other, _)) => Fit::No(other.difference(served.version, wanted)),
            Err(error) if error.is_final() => Fit::No(error.to_string()),
            Err(error) => {
                let (endpoint, model) = names;
                tracing::warn!(endpoint, model, %error, "a version cannot be looked at yet");
                Fit::Unknown
            }
        }
    }

    /// Drops what is being looked at: no other version is wanted.
    pub(super) fn forget(&mut self) {
        self.looking.forget();
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
        let batching = endpoint.settings.batching.clone();
        let fleet = Fleet::sharing(endpoint.replicas, batching, traffic);
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

/// What was found of a version, if its file was loaded by now.
fn looked_at(
    looking: &mut Looking,
    (endpoint, model): (&str, &str),
    served: &Served,
    open: impl FnOnce() -> Result<BlobStore, BlobError>,
) -> Option<Result<Found, SignatureError>> {
    looking.hear(endpoint, served.version, || {
        let (opened, model, served) = (open(), model.to_owned(), served.clone());
        async move { read(opened, &model, &served).await }
    })
}

async fn read(
    opened: Result<BlobStore, BlobError>,
    model: &str,
    served: &Served,
) -> Result<Found, SignatureError> {
    let blobs = opened.map_err(VersionFileError::from)?;
    let artifact = Artifact::load(&blobs, &served.digest, served.size_bytes).await?;
    let signature = Signature::of(&artifact).map_err(|samples| SignatureError::Samples {
        model: model.to_owned(),
        version: served.version,
        samples,
    })?;
    Ok((signature, Sentinels::of_artifact(&artifact)))
}

fn active(endpoint: &Endpoint) -> Served {
    Served {
        version: endpoint.version,
        digest: endpoint.digest.clone(),
        size_bytes: endpoint.size_bytes,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mobula_storage::blob::fault::Fault;
    use mobula_storage::blob::{RetryPolicy, S3Options};

    use super::*;
    use crate::registry::version_file::tests::digits;
    use crate::serving::loading::tests::loaded;

    /// Looks at a version while its file does not come.
    const LOOKS: u32 = 100;

    #[tokio::test(start_paused = true)]
    async fn a_version_whose_file_does_not_come_does_not_hold_who_looks_at_it() {
        let hangs = Duration::from_secs(3_600);
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        let (faults, blobs) = blobs.with_faults(RetryPolicy::IMMEDIATE);
        let file = digits(50);
        let stored = file.store(&blobs).await.unwrap();
        let served = Served {
            version: 2,
            digest: stored.digest,
            size_bytes: stored.size_bytes,
        };
        faults.reset();
        faults.stand(Some(Fault::Stalled(hangs)));
        let open = || Ok(blobs.clone());
        let mut looking = Loading::new();
        let mut look = || looked_at(&mut looking, ("digits", "digits"), &served, open);
        for _ in 0..LOOKS {
            assert!(look().is_none());
            tokio::task::yield_now().await;
        }
        assert_eq!(faults.operations(), 1, "it is asked once at a time");
        tokio::time::advance(2 * hangs).await;
        let found = loaded(look).await.unwrap();
        let sentinels = Sentinels::of(&file);
        let wanted = Signature::of(&Artifact::Trained(Box::new(file))).unwrap();
        assert_eq!(found, (wanted, sentinels));
    }
}
