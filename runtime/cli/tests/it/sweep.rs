//! The leader's sweep of a real object store, with the table that says what stays.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mobula::{Cluster, JobHandle};
use mobula_actors::checkpoint::state::{CheckpointCommand, CheckpointRef};
use mobula_core::clock::Clock;
use mobula_core::control::ModuleId;
use mobula_core::id::{Incarnation, JobId, SessionId};
use mobula_core::kept::{KeptCommand, KeptValue};
use mobula_core::object::Format;
use mobula_head::SweepOptions;
use mobula_storage::blob::{BlobStore, S3Options};
use mobula_storage::checkpoint::{CheckpointWriter, SaveRequest, manifest_path};
use mobula_wire::control as api;

use crate::in_process::InProcessHead;
use crate::support::LIMIT;

const CHUNK_BYTES: usize = 16;
const DRIVER: Incarnation = Incarnation(1);

/// How old something must be, and how much older all of it is after the jump.
const AGE_MIN: Duration = Duration::from_secs(30 * 60);
const JUMP_MS: u64 = 45 * 60 * 1000;

/// The machine's time, and what the test adds to it.
#[derive(Default)]
struct ShiftedClock {
    ahead_ms: AtomicU64,
}

impl Clock for ShiftedClock {
    fn now_ms(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        u64::try_from(now.as_millis()).unwrap() + self.ahead_ms.load(Ordering::SeqCst)
    }
}

/// A state that shares its first chunk with those of all steps.
fn state(step: u64) -> bytes::Bytes {
    let mut bytes = vec![7; CHUNK_BYTES];
    bytes.extend(format!("{step:016}").as_bytes());
    bytes.into()
}

struct World {
    head: InProcessHead,
    blobs: BlobStore,
    job: JobId,
}

impl World {
    /// Stores a checkpoint, and has it committed where `is_committed`.
    async fn save(&self, step: u64, is_committed: bool) {
        let request = SaveRequest {
            job: self.job,
            step,
            incarnation: DRIVER,
            parent: None,
            sections: Vec::new(),
            metadata: BTreeMap::new(),
        };
        let writer = CheckpointWriter::new(self.blobs.clone()).with_chunk_bytes(CHUNK_BYTES);
        let saved = writer.save(request, state(step)).await.unwrap();
        if !is_committed {
            return;
        }
        let command = CheckpointCommand::Committed {
            job: self.job,
            checkpoint: CheckpointRef {
                step,
                incarnation: DRIVER,
                manifest_path: saved.handle.reference.path.clone(),
                manifest_digest: saved.handle.reference.digest.to_string(),
                size_bytes: 32,
                weights_blake3: None,
                metric: None,
            },
        };
        let outcome = self
            .head
            .raft()
            .propose(
                SessionId::INTERNAL,
                0,
                ModuleId::CHECKPOINT,
                command.encode(),
            )
            .await
            .unwrap();
        outcome.result.unwrap();
    }

    /// Stores a value that fits in one chunk, and has it kept where there is a name; its blob.
    async fn keep(&self, bytes: &[u8], name: Option<&str>) -> String {
        let bytes = bytes::Bytes::copy_from_slice(bytes);
        let size_bytes = bytes.len() as u64;
        let writer = CheckpointWriter::new(self.blobs.clone());
        let chunks = writer.save_chunks(Arc::new(bytes)).await.unwrap();
        if let Some(name) = name {
            let command = KeptCommand::Keep {
                job: self.job,
                holder: None,
                name: name.to_owned(),
                value: KeptValue {
                    format: Format::Encoded,
                    size_bytes,
                    chunks: chunks.iter().map(|chunk| chunk.blake3.into()).collect(),
                },
            };
            let raft = self.head.raft();
            let proposed = raft.propose(SessionId::INTERNAL, 0, ModuleId::KEPT, command.encode());
            proposed.await.unwrap().result.unwrap();
        }
        chunks[0].path()
    }

    /// Waits until exactly these chunks are left.
    async fn until_chunks(&self, expected: &[&String]) {
        let expected: BTreeSet<String> = expected.iter().copied().cloned().collect();
        let left = async {
            loop {
                let chunks = self.names("chunks").await;
                if chunks == expected {
                    return;
                }
                assert!(chunks.is_superset(&expected), "too much went: {chunks:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT, left).await.unwrap();
    }

    async fn names(&self, folder: &str) -> BTreeSet<String> {
        let blobs = self.blobs.list(folder, 1000).await.unwrap();
        blobs.into_iter().map(|blob| blob.path).collect()
    }

    /// Waits until the manifests of exactly these steps and their chunks are left.
    async fn until_left(&self, steps: impl IntoIterator<Item = u64>) {
        let expected: BTreeSet<String> = steps
            .into_iter()
            .map(|step| manifest_path(self.job, step, DRIVER))
            .collect();
        let left = async {
            loop {
                let manifests = self.names("manifest").await;
                let chunks = self.names("chunks").await;
                // One chunk of its own for each, and the one that all share.
                if manifests == expected && chunks.len() == expected.len() + 1 {
                    return;
                }
                assert!(
                    manifests.is_superset(&expected),
                    "one too many was removed: {manifests:?}"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT, left).await.unwrap();
    }
}

/// A head that sweeps, and a job.
async fn start(clock: &Arc<ShiftedClock>) -> (World, Cluster, JobHandle) {
    let head = InProcessHead::start(clock.clone(), |options| {
        options.modules = mobula_actors::modules();
        options.sweep = Some(SweepOptions {
            interval: Duration::from_millis(50),
            age_min: AGE_MIN,
            retention: mobula_actors::retention(),
        });
    })
    .await;
    let cluster = head.client().await;
    // There is no worker: it waits, which is as good as running.
    let submitted = cluster.new_job("training").submit().await.unwrap();
    let url = format!("file://{}", head.dir().join("store").display());
    let world = World {
        blobs: BlobStore::open(&url, &S3Options::default()).unwrap(),
        job: submitted.id(),
        head,
    };
    (world, cluster, submitted)
}

async fn sweep_report(cluster: &Cluster) -> api::Sweep {
    let status = cluster
        .control()
        .read("read the status", |mut client| async move {
            client.status(api::StatusRequest {}).await
        });
    status.await.unwrap().sweep.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_removes_what_the_table_has_forgotten_and_nothing_else() {
    let clock = Arc::new(ShiftedClock::default());
    let (world, cluster, submitted) = start(&clock).await;
    for step in 1..=25 {
        world.save(step, true).await;
    }
    // On its way: stored, and not committed yet.
    world.save(26, false).await;
    let before = sweep_report(&cluster).await.last_ms;
    let again = async {
        while sweep_report(&cluster).await.last_ms == before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, again).await.unwrap();
    assert_eq!(
        world.names("manifest").await.len(),
        26,
        "all of it is young"
    );

    clock.ahead_ms.store(JUMP_MS, Ordering::SeqCst);
    // The table keeps 20 of a job.
    world.until_left(6..=26).await;

    submitted.stop().await.unwrap();
    // Of one that has ended it keeps 2, and nobody is left to commit the last one.
    world.until_left(24..=25).await;
    let reported = async {
        loop {
            let report = sweep_report(&cluster).await;
            if report.checkpoints_kept == 2 && report.problem.is_empty() {
                return report;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let report = tokio::time::timeout(LIMIT, reported).await.unwrap();
    assert_eq!(report.blobs_deleted, 48, "24 manifests and a chunk of each");
    world.head.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_job_keeps_stays_until_it_is_dropped_or_the_job_is_over() {
    let clock = Arc::new(ShiftedClock::default());
    let (world, cluster, submitted) = start(&clock).await;
    let kept = world.keep(b"kept", Some("a")).await;
    let dropped = world.keep(b"dropped", Some("b")).await;
    let orphan = world.keep(b"stored, and nobody told the head", None).await;
    world.until_chunks(&[&kept, &dropped, &orphan]).await;
    clock.ahead_ms.store(JUMP_MS, Ordering::SeqCst);
    world.until_chunks(&[&kept, &dropped]).await;
    let in_job = cluster.in_job(world.job);
    assert!(in_job.drop_kept("b").await.unwrap());
    world.until_chunks(&[&kept]).await;
    submitted.stop().await.unwrap();
    world.until_chunks(&[]).await;
    world.head.stop().await;
}
