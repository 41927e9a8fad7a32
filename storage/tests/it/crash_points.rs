//! A save that dies at each of its operations in turn, over real back ends: whatever is in the store then
//! gives a checkpoint that loads.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::StreamExt;
use mobula_core::id::{Incarnation, JobId};
use mobula_storage::blob::fault::Fault;
use mobula_storage::blob::{BlobStore, RetryPolicy, S3Options};
use mobula_storage::checkpoint::{CheckpointReader, CheckpointWriter, SaveError, SaveRequest};

use crate::s3::S3Server;

const CHUNK_BYTES: usize = 64;

/// The most chunks that a checkpoint has here: with one to so many there are 561 points.
const CHUNKS_MAX: usize = 17;

/// How many points are tried at a time.
const AT_A_TIME: usize = 8;

/// How the writer dies: before the store has heard of the operation, before the writer has heard that it
/// was done, or in the middle of it, on a store that keeps half of a write.
const DEATHS: [Fault; 3] = [Fault::BeforeStore, Fault::ReplyLost, Fault::Truncated(7)];

fn state(seed: usize, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

fn request(job: JobId, step: u64, incarnation: u64) -> SaveRequest {
    SaveRequest {
        job,
        step,
        incarnation: Incarnation(incarnation),
        parent: None,
        sections: Vec::new(),
        metadata: BTreeMap::new(),
    }
}

/// One death: a checkpoint of `chunks` chunks, at operation `at`.
#[derive(Clone, Copy)]
struct Point {
    /// Its number, and the job's.
    number: usize,
    chunks: usize,
    at: usize,
    death: Fault,
}

fn points() -> Vec<Point> {
    let mut points = Vec::new();
    for death in DEATHS {
        for chunks in 1..=CHUNKS_MAX {
            // Each chunk is one operation, then it is asked which sweeps there are, and the manifest is the last.
            for at in 0..=chunks + 1 {
                points.push(Point {
                    number: points.len() + 1,
                    chunks,
                    at,
                    death,
                });
            }
        }
    }
    points
}

async fn die_and_recover(direct: &BlobStore, point: Point) {
    let Point {
        number,
        chunks,
        at,
        death,
    } = point;
    let case = format!("{death:?} at operation {at} of {chunks} chunks and a manifest");
    let job = JobId(number as u64);
    let (faults, through) = direct.with_faults(RetryPolicy::IMMEDIATE);
    let writer =
        |blobs: &BlobStore| CheckpointWriter::new(blobs.clone()).with_chunk_bytes(CHUNK_BYTES);
    let reader = CheckpointReader::new(direct.clone(), 1 << 20);
    let old = state(2 * number, 3 * CHUNK_BYTES - 5);
    let new = state(2 * number + 1, chunks * CHUNK_BYTES - 1);
    writer(direct)
        .save(request(job, 1, 1), old.clone())
        .await
        .unwrap();

    faults.crash_at(at as u64, death);
    let outcome = writer(&through).save(request(job, 2, 1), new.clone()).await;
    assert!(
        faults.operations() > at as u64,
        "{case}: it was never reached"
    );
    // A last reply that is lost may be asked for again, by an operation that fails as well.
    let is_manifest = at == chunks + 1;
    let is_torn = matches!(death, Fault::Truncated(_));
    assert_eq!(outcome.is_ok(), is_manifest && is_torn, "{case}");

    let mut references = Vec::new();
    for stored in reader.list(job).await.unwrap() {
        references.push(reader.reference(&stored.name).await.unwrap());
    }
    let restored = reader.load_newest(&references).await.unwrap();
    let is_there = is_manifest && death == Fault::ReplyLost;
    let expected = if is_there { &new } else { &old };
    assert_eq!(restored.checkpoint.bytes, expected, "{case}");
    // Nothing is half visible, but for a manifest that the store itself has torn.
    let rejected = usize::from(is_manifest && is_torn);
    assert_eq!(
        restored.rejected.len(),
        rejected,
        "{case}: {:?}",
        restored.rejected
    );

    let again = writer(direct).save(request(job, 2, 1), new.clone()).await;
    let saved = match again {
        Ok(saved) => saved,
        // Its name is taken by the torn one: a next start of the driver has a name of its own.
        Err(SaveError::Fenced { .. }) if rejected == 1 => writer(direct)
            .save(request(job, 2, 2), new.clone())
            .await
            .unwrap(),
        Err(error) => panic!("{case}: {error}"),
    };
    let loaded = reader.load(&saved.handle.reference).await.unwrap();
    assert_eq!(loaded.bytes, new, "{case}");
}

async fn all_points(blobs: BlobStore) {
    let points = points();
    assert!(points.len() >= 500, "{} points", points.len());
    futures::stream::iter(points)
        .for_each_concurrent(AT_A_TIME, |point| die_and_recover(&blobs, point))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_every_write_boundary_leaves_a_loadable_checkpoint_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}", dir.path().display());
    all_points(BlobStore::open(&url, &S3Options::default()).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_every_write_boundary_leaves_a_loadable_checkpoint_in_s3() {
    let server = S3Server::start().await;
    all_points(server.open("crash-points")).await;
}
