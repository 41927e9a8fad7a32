//! The plans of sweeps, as they lie in the store for savers to read: what a sweep may be about to delete, and
//! whether it is over.
//!
//! A plan is `gc/<time>-<digest>.json`; the empty blob beside it that ends in `.done`, its mark, says that the sweep is
//! over.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::SAVE_TIME_MAX;
use crate::blob::{BlobError, BlobErrorKind, BlobStore};
use crate::digest::Digest;

/// The longest that a sweep goes on asking for deletions. A save that needs what it deletes waits for it, so it is a
/// part of what a save may take.
pub(super) const SWEEP_TIME_MAX: Duration = Duration::from_secs(10 * 60);

/// When a sweep whose plan was stored so long ago has deleted all that it ever will, though it did not say so: its
/// time, and that of a request that it sent in its last moment.
pub(super) const SWEEP_OVER_AFTER: Duration = Duration::from_secs(15 * 60);

/// How long plans stay at least: whoever saves while a sweep runs finds its plan at the end of the save, also where
/// the clocks of head and store are some minutes apart.
pub(super) const PLANS_KEPT: Duration = Duration::from_secs(90 * 60);

const _: () = assert!(
    PLANS_KEPT.as_secs() >= 2 * SAVE_TIME_MAX.as_secs() + SWEEP_TIME_MAX.as_secs(),
    "a save must find the plan of every sweep that ran at the same time"
);

/// Blobs that one plan names: some 9 MB of text.
pub(super) const PLAN_BLOBS_MAX: usize = 100_000;

/// The largest plan.
pub(super) const PLAN_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The folder of plans.
const PLAN_FOLDER: &str = "gc";

/// Plans and marks that are listed at once: sweeps are minutes apart and store no plan where old ones cannot be
/// removed, so a few dozen are many.
const PLANS_MAX: usize = 100_000;

const PLAN_SUFFIX: &str = ".json";
const MARK_SUFFIX: &str = ".done";

/// What a sweep would delete.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GcPlan {
    /// When it was made. Milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Nothing written after this is touched.
    pub older_than_ms: u64,
    /// Manifests that nobody keeps.
    pub manifests: Vec<String>,
    /// Chunks that no remaining manifest names.
    pub chunks: Vec<String>,
    /// How much that is.
    pub size_bytes: u64,
}

impl GcPlan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.manifests.is_empty() && self.chunks.is_empty()
    }

    /// Its name in the store, and its bytes there. With a `nonce` of its own each sweep finds out whether it was that
    /// one which stored them.
    pub(super) fn stored_as(&self, nonce: u64) -> (String, Bytes) {
        let stored = StoredPlan { plan: self, nonce };
        let bytes =
            serde_json::to_vec_pretty(&stored).expect("a plan holds only strings and numbers");
        let digest = Digest::of(&bytes);
        let path = format!(
            "{PLAN_FOLDER}/{:016}-{digest}{PLAN_SUFFIX}",
            self.created_ms
        );
        (path, bytes.into())
    }
}

/// What is in the store of a plan; savers need no more than the plan.
#[derive(Serialize)]
struct StoredPlan<'a> {
    #[serde(flatten)]
    plan: &'a GcPlan,
    nonce: u64,
}

/// A plan that is in the store, not yet read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Announced {
    /// Its name.
    pub(super) path: String,
    /// When it was stored, by the store's clock. Milliseconds since the Unix epoch.
    pub(super) stored_ms: u64,
    /// Whether the sweep said that it is over.
    pub(super) is_over: bool,
}

/// The name of what says that the sweep of the plan at `plan_path` is over.
pub(super) fn mark_of(plan_path: &str) -> String {
    let stem = plan_path.strip_suffix(PLAN_SUFFIX).unwrap_or(plan_path);
    format!("{stem}{MARK_SUFFIX}")
}

/// The plans that are in the store.
pub(super) async fn announced(blobs: &BlobStore) -> Result<Vec<Announced>, BlobError> {
    let stored = blobs.list(PLAN_FOLDER, PLANS_MAX).await?;
    let names: BTreeSet<&str> = stored.iter().map(|blob| blob.path.as_str()).collect();
    let plans = stored
        .iter()
        .filter(|blob| blob.path.ends_with(PLAN_SUFFIX));
    let plans = plans.map(|blob| Announced {
        path: blob.path.clone(),
        stored_ms: blob.modified_ms,
        is_over: names.contains(mark_of(&blob.path).as_str()),
    });
    Ok(plans.collect())
}

/// The names of the plans that were stored before `before_ms`, by the store's clock, and of their marks, in the order in
/// which they are to be removed. A mark goes behind its plan, for a plan without one is taken for that of a sweep
/// under way; one whose plan is gone was left by a removal that broke off.
pub(super) async fn stored_before(
    blobs: &BlobStore,
    before_ms: u64,
) -> Result<Vec<String>, BlobError> {
    let stored = blobs.list(PLAN_FOLDER, PLANS_MAX).await?;
    let with_suffix = |suffix: &'static str| {
        let blobs = stored.iter();
        blobs.filter_map(move |blob| Some((blob.path.strip_suffix(suffix)?, blob.modified_ms)))
    };
    let plans: BTreeMap<&str, u64> = with_suffix(PLAN_SUFFIX).collect();
    let old_plans = plans
        .iter()
        .filter(|(_, stored_ms)| **stored_ms < before_ms)
        .map(|(stem, _)| format!("{stem}{PLAN_SUFFIX}"));
    let old_marks = with_suffix(MARK_SUFFIX)
        // A mark is younger than its plan.
        .filter(|(stem, marked_ms)| *plans.get(stem).unwrap_or(marked_ms) < before_ms)
        .map(|(stem, _)| format!("{stem}{MARK_SUFFIX}"));
    Ok(old_plans.chain(old_marks).collect())
}

/// The chunks that `plan` names; `None` for a plan that cannot be understood, which may name any.
pub(super) async fn chunks_of(
    blobs: &BlobStore,
    plan: &Announced,
) -> Result<Option<BTreeSet<String>>, BlobError> {
    match blobs.get(&plan.path, PLAN_BYTES_MAX).await {
        Ok(bytes) => {
            let plan = serde_json::from_slice::<GcPlan>(&bytes).ok();
            Ok(plan.map(|plan| plan.chunks.into_iter().collect()))
        }
        // Old plans are removed, and what those named is long gone or there to stay.
        Err(error) if error.kind() == BlobErrorKind::NotFound => Ok(Some(BTreeSet::new())),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::S3Options;

    #[tokio::test]
    async fn a_plan_is_found_with_what_it_names_and_whether_it_is_over() {
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        blobs.put_if_absent("gc/owner", "one".into()).await.unwrap();
        assert_eq!(announced(&blobs).await.unwrap(), []);
        let plan = GcPlan {
            created_ms: 5,
            older_than_ms: 3,
            manifests: vec![],
            chunks: vec!["chunks/a".to_owned()],
            size_bytes: 1,
        };
        let (path, bytes) = plan.stored_as(7);
        assert_ne!(plan.stored_as(8).0, path);
        blobs.put_if_absent(&path, bytes).await.unwrap();
        let found = announced(&blobs).await.unwrap();
        assert_eq!((found.len(), found[0].is_over), (1, false));
        let named = chunks_of(&blobs, &found[0]).await.unwrap();
        assert_eq!(named, Some(BTreeSet::from(["chunks/a".to_owned()])));
        let mark = mark_of(&path);
        assert!(mark.ends_with(".done"), "{mark}");
        blobs.put_if_absent(&mark, Bytes::new()).await.unwrap();
        let found = announced(&blobs).await.unwrap();
        assert_eq!((found.len(), found[0].is_over), (1, true));
        blobs
            .renew(&path, "of another version".into())
            .await
            .unwrap();
        assert_eq!(chunks_of(&blobs, &found[0]).await.unwrap(), None);
    }
}
