//! Saving, loading and sweeping against stores in memory, whole and faulty.

mod damage;
mod faults;
mod overlap;
mod save;
mod sweep;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use mobula_core::id::{Incarnation, JobId};
use object_store::memory::InMemory;

use super::*;
use crate::blob::fault::FaultStore;
use crate::blob::{BlobStore, RetryPolicy, S3Options};

const JOB: JobId = JobId(7);
const CHUNK: usize = 64;

fn in_memory() -> BlobStore {
    BlobStore::open("memory://", &S3Options::default()).unwrap()
}

/// Two views of one store: through faults, and directly.
fn faulty() -> (FaultStore, BlobStore, BlobStore) {
    let direct: Arc<dyn object_store::ObjectStore> = Arc::new(InMemory::new());
    let faults = FaultStore::new(Arc::clone(&direct));
    let through = BlobStore::over(
        Arc::new(faults.clone()),
        "faulty://",
        RetryPolicy::IMMEDIATE,
    );
    (
        faults,
        through,
        BlobStore::over(direct, "direct://", RetryPolicy::IMMEDIATE),
    )
}

/// Bytes that differ from step to step in every chunk.
fn state(step: u64, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&step.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

fn request(step: u64, parent: Option<&CheckpointHandle>) -> SaveRequest {
    SaveRequest {
        job: JOB,
        step,
        incarnation: Incarnation(3),
        parent: parent.cloned(),
        sections: vec![Section {
            name: "w".to_owned(),
            offset: 10,
            length: 100,
        }],
        metadata: BTreeMap::from([("seed".to_owned(), "42".to_owned())]),
    }
}

fn writer(blobs: &BlobStore) -> CheckpointWriter {
    CheckpointWriter::new(blobs.clone()).with_chunk_bytes(CHUNK)
}

fn reader(blobs: &BlobStore) -> CheckpointReader {
    CheckpointReader::new(blobs.clone(), 1 << 20)
}

async fn saved(blobs: &BlobStore, step: u64) -> CheckpointHandle {
    writer(blobs)
        .save(request(step, None), state(step, 400))
        .await
        .unwrap()
        .handle
}

/// The bytes of a checkpoint, which must be whole.
async fn loaded(blobs: &BlobStore, reference: &ManifestRef) -> Bytes {
    reader(blobs).load(reference).await.unwrap().bytes
}
