//! Checkpoints through real back ends.

use std::collections::BTreeMap;

use bytes::Bytes;
use mobula_core::id::{Incarnation, JobId};
use mobula_storage::blob::{BlobStore, S3Options};
use mobula_storage::checkpoint::{
    CheckpointHandle, CheckpointReader, CheckpointWriter, Kept, SaveError, SaveRequest, Section,
    Sweeper,
};

use crate::s3::S3Server;

fn state(step: u64) -> Bytes {
    let mut bytes = vec![0; 300_000];
    blake3::Hasher::new()
        .update(&step.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

fn request(step: u64, parent: Option<&CheckpointHandle>) -> SaveRequest {
    SaveRequest {
        job: JobId(1),
        step,
        incarnation: Incarnation(2),
        parent: parent.cloned(),
        sections: vec![Section {
            name: "weights".to_owned(),
            offset: 0,
            length: 300_000,
        }],
        metadata: BTreeMap::new(),
    }
}

async fn save_restore_and_sweep(blobs: BlobStore) {
    let writer = CheckpointWriter::new(blobs.clone()).with_chunk_bytes(64 * 1024);
    let reader = CheckpointReader::new(blobs.clone(), 1 << 20);
    let first = writer
        .save(request(1, None), state(1))
        .await
        .unwrap()
        .handle;
    let second = writer
        .save(request(2, Some(&first)), state(2))
        .await
        .unwrap()
        .handle;
    let again = writer
        .save(request(2, Some(&first)), state(2))
        .await
        .unwrap()
        .handle;
    assert_eq!(again, second, "saving again changes nothing");
    let fenced = writer.save(request(2, Some(&first)), state(3)).await;
    assert!(matches!(fenced, Err(SaveError::Fenced { .. })));
    let references = [second.reference.clone(), first.reference.clone()];
    let restored = reader.load_newest(&references).await.unwrap();
    assert_eq!(restored.checkpoint.section("weights").unwrap(), state(2));
    let steps: Vec<u64> = reader
        .list(JobId(1))
        .await
        .unwrap()
        .iter()
        .map(|stored| stored.name.step)
        .collect();
    assert_eq!(steps, [2, 1]);

    let mut damaged = state(2).slice(..64 * 1024).to_vec();
    damaged[77] ^= 4;
    blobs
        .renew(&second.manifest.chunks[0].path(), damaged.into())
        .await
        .unwrap();
    let restored = reader.load_newest(&references).await.unwrap();
    assert_eq!(restored.checkpoint.bytes, state(1));
    assert_eq!(restored.rejected.len(), 1);

    let year_2100_ms = 4_102_444_800_000;
    let sweeper = Sweeper::new(blobs.clone());
    let stored = sweeper.list().await.unwrap();
    let kept = Kept {
        committed: references[1..].to_vec(),
        ..Kept::default()
    };
    let plan = sweeper
        .plan(&stored, &kept, year_2100_ms, 0, 1000)
        .await
        .unwrap();
    let report = sweeper.sweep(&plan).await.unwrap();
    // What the fenced save left behind goes too: five chunks of each, and one manifest.
    assert_eq!(report.deleted, 11);
    assert_eq!(reader.load(&first.reference).await.unwrap().bytes, state(1));
}

#[tokio::test]
async fn checkpoints_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}", dir.path().display());
    save_restore_and_sweep(BlobStore::open(&url, &S3Options::default()).unwrap()).await;
}

#[tokio::test]
async fn checkpoints_in_s3() {
    let server = S3Server::start().await;
    save_restore_and_sweep(server.open("checkpoints")).await;
}
