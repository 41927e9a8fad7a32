//! Checkpoints that lie damaged in the store.

use super::*;
use crate::blob::fault::Fault;

#[tokio::test]
async fn a_manifest_without_its_chunks_is_passed_over() {
    let blobs = in_memory();
    let old = saved(&blobs, 1).await.reference;
    let new = saved(&blobs, 2).await;
    for chunk in &new.manifest.chunks {
        blobs.delete(&chunk.path()).await.unwrap();
    }
    let mut hollow = (*new.manifest).clone();
    (hollow.step, hollow.chunks) = (3, Vec::new());
    let bytes = hollow.to_bytes();
    let hollow = ManifestRef {
        path: hollow.path(),
        digest: crate::digest::Digest::of(&bytes),
    };
    blobs.put_if_absent(&hollow.path, bytes).await.unwrap();
    let references = [hollow, new.reference, old];
    let restored = reader(&blobs).load_newest(&references).await.unwrap();
    assert_eq!(restored.checkpoint.bytes, state(1, 400));
    let reasons: Vec<&str> = restored
        .rejected
        .iter()
        .map(|rejected| rejected.reason.as_str())
        .collect();
    assert!(reasons[0].contains("do not add up"), "{reasons:?}");
    assert!(reasons[1].contains("is missing"), "{reasons:?}");
}

/// Invariant 3, bit by bit: every byte of every blob of a checkpoint, one bit flipped.
#[tokio::test]
async fn a_flipped_bit_anywhere_is_detected_and_the_older_checkpoint_is_used() {
    let blobs = in_memory();
    let old = saved(&blobs, 1).await;
    let new = saved(&blobs, 2).await;
    let references = [new.reference.clone(), old.reference];
    let mut paths: Vec<String> = new.manifest.chunks.iter().map(ChunkRef::path).collect();
    paths.push(new.reference.path.clone());
    let mut flips = 0;
    for path in paths {
        let intact = blobs.get(&path, 1 << 20).await.unwrap();
        for at in 0..intact.len() {
            let mut flipped = intact.to_vec();
            flipped[at] ^= 1 << (at % 8);
            blobs.renew(&path, flipped.into()).await.unwrap();
            let restored = reader(&blobs).load_newest(&references).await.unwrap();
            assert_eq!(restored.checkpoint.bytes, state(1, 400), "{path} byte {at}");
            assert!(restored.rejected[0].reason.contains(&path));
            flips += 1;
        }
        blobs.renew(&path, intact).await.unwrap();
    }
    assert!(flips > 1000);
    let restored = reader(&blobs).load_newest(&references).await.unwrap();
    assert_eq!(restored.checkpoint.bytes, state(2, 400));
}

#[tokio::test]
async fn what_is_missing_is_passed_over_and_an_outage_is_not() {
    let (faults, through, direct) = faulty();
    let old = saved(&direct, 1).await.reference;
    let new = saved(&direct, 2).await;
    let references = [new.reference.clone(), old];
    faults.crash_at(0, Fault::BeforeStore);
    let error = reader(&through).load_newest(&references).await.unwrap_err();
    assert!(
        matches!(error, RestoreError::Load(LoadError::Blob(_))),
        "invariant 4: {error}"
    );
    let small = CheckpointReader::new(direct.clone(), 399);
    let error = small.load_newest(&references).await.unwrap_err();
    assert!(
        matches!(error, RestoreError::Load(LoadError::TooLarge { .. })),
        "{error}"
    );
    direct.delete(&new.manifest.chunks[2].path()).await.unwrap();
    let restored = reader(&direct).load_newest(&references).await.unwrap();
    assert_eq!(restored.checkpoint.bytes, state(1, 400));
    assert!(restored.rejected[0].reason.contains("is missing"));
    let error = reader(&direct)
        .load_newest(&references[..1])
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("none of 1 checkpoints"),
        "{error}"
    );
    assert!(reader(&direct).load_newest(&[]).await.is_err());
}

#[tokio::test]
async fn a_damaged_chunk_is_mended_by_the_next_save_of_the_same_bytes() {
    let blobs = in_memory();
    let first = saved(&blobs, 1).await;
    let path = first.manifest.chunks[0].path();
    blobs.renew(&path, "damage".into()).await.unwrap();
    assert!(reader(&blobs).load(&first.reference).await.is_err());
    saved(&blobs, 1).await;
    assert_eq!(loaded(&blobs, &first.reference).await, state(1, 400));
}
