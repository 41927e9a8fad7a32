use mobula_storage::blob::S3Options;

use super::super::policy::{LoggedFeatures, MILLION};
use super::*;

/// How often a test looks for what becomes of a file.
const LOOKS: u32 = 100;

fn tap() -> Tap {
    let (full, _) = mpsc::channel(FULL_MAX);
    Tap {
        identity: Identity {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: 1,
            incarnation: 9,
        },
        features: Arc::new(vec!["f".to_owned()]),
        state: Arc::default(),
        full,
        has_news: Arc::default(),
    }
}

/// Keeps files for no time at all.
fn policy() -> LogPolicy {
    LogPolicy {
        sample_per_million: MILLION,
        features: LoggedFeatures::All,
        hashed_features: Vec::new(),
        plain_ids: false,
        key: [7; 32],
        roll_rows: 100,
        roll_bytes: 1 << 20,
        roll_ms: 1_000,
        keep_ms: 0,
    }
}

async fn put(blobs: &BlobStore, name: &str) -> String {
    let path = format!("{}/v1/{name}.parquet", folder("digits"));
    blobs.put_if_absent(&path, "rows".into()).await.unwrap();
    path
}

/// Whether a file is deleted within some intervals of sweeps.
async fn is_deleted(blobs: &BlobStore, path: &str) -> bool {
    for _ in 0..LOOKS {
        if blobs.head(path).await.unwrap().is_none() {
            return true;
        }
        tokio::time::sleep(SWEEP_INTERVAL / 20).await;
    }
    false
}

#[tokio::test(start_paused = true)]
async fn files_whose_time_is_over_go_though_nothing_is_written_any_more() {
    let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
    let tap = tap();
    let first = put(&blobs, "first").await;
    let mut tasks = JoinSet::new();
    tasks.spawn(tap.clone().sweep_in_time(blobs.clone()));
    // Nothing says for how long it is kept.
    assert!(!is_deleted(&blobs, &first).await);
    tap.adopt(Some(policy()));
    assert!(is_deleted(&blobs, &first).await);
    // Not only once.
    let second = put(&blobs, "second").await;
    assert!(is_deleted(&blobs, &second).await);
    // Without a policy the rest stays, for good.
    tap.adopt(None);
    let third = put(&blobs, "third").await;
    assert!(!is_deleted(&blobs, &third).await);
}
