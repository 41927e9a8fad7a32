//! What is saved is what is loaded, by one or by several, and only once.

use std::sync::Arc;

use bytes::Bytes;
use mobula_core::id::Incarnation;

use super::*;

#[tokio::test]
async fn what_is_saved_is_loaded_with_its_sections_and_metadata() {
    let blobs = in_memory();
    for length in [110, CHUNK * 2, 400] {
        let step = length as u64;
        let bytes = state(step, length);
        let saved = writer(&blobs)
            .save(request(step, None), bytes.clone())
            .await
            .unwrap();
        let loaded = reader(&blobs).load(&saved.handle.reference).await.unwrap();
        assert_eq!(loaded.bytes, bytes);
        assert_eq!(loaded.handle, saved.handle);
        assert_eq!(loaded.section("w").unwrap(), bytes[10..110]);
        assert_eq!(loaded.section("v"), None);
        assert_eq!(loaded.handle.manifest.metadata["seed"], "42");
    }
    let empty = SaveRequest {
        sections: Vec::new(),
        ..request(1, None)
    };
    let saved = writer(&blobs).save(empty, Bytes::new()).await.unwrap();
    assert!(
        reader(&blobs)
            .load(&saved.handle.reference)
            .await
            .unwrap()
            .bytes
            .is_empty()
    );
}

#[tokio::test]
async fn chunks_of_the_parent_and_equal_chunks_are_sent_once() {
    let blobs = in_memory();
    let mut bytes = state(1, CHUNK * 4).to_vec();
    let first = writer(&blobs)
        .save(request(1, None), bytes.clone().into())
        .await
        .unwrap();
    assert_eq!((first.uploaded_bytes, first.reused_bytes), (256, 0));
    bytes[0] ^= 1;
    let second = writer(&blobs)
        .save(request(2, Some(&first.handle)), bytes.clone().into())
        .await
        .unwrap();
    assert_eq!((second.uploaded_bytes, second.reused_bytes), (64, 192));
    assert_eq!(
        second.handle.manifest.parent,
        Some(first.handle.reference.digest)
    );
    assert_eq!(
        reader(&blobs)
            .load(&second.handle.reference)
            .await
            .unwrap()
            .bytes,
        bytes
    );
    let zeros = writer(&blobs)
        .save(request(3, None), vec![0; 640].into())
        .await
        .unwrap();
    assert_eq!((zeros.uploaded_bytes, zeros.reused_bytes), (64, 576));
}

#[tokio::test]
async fn saving_again_finishes_and_another_state_under_the_same_name_is_fenced() {
    let blobs = in_memory();
    let first = saved(&blobs, 5).await;
    assert_eq!(saved(&blobs, 5).await, first);
    let error = writer(&blobs)
        .save(request(5, None), state(6, 400))
        .await
        .unwrap_err();
    assert!(matches!(error, SaveError::Fenced { .. }), "{error}");
    assert_eq!(loaded(&blobs, &first.reference).await, state(5, 400));
    let next = SaveRequest {
        incarnation: Incarnation(4),
        ..request(5, None)
    };
    let next = writer(&blobs).save(next, state(6, 400)).await.unwrap();
    assert_ne!(next.handle.reference.path, first.reference.path);
}

#[tokio::test]
async fn a_request_that_contradicts_itself_writes_nothing() {
    let blobs = in_memory();
    let error = writer(&blobs)
        .save(request(1, None), state(1, 50))
        .await
        .unwrap_err();
    assert!(matches!(error, SaveError::Invalid(_)), "{error}");
    assert_eq!(blobs.list("", 10).await.unwrap(), []);
}

/// Several who hold equal bytes send a share each; who holds others is found out before a byte is sent.
#[tokio::test]
async fn a_save_can_be_shared_and_whoever_holds_other_bits_is_named() {
    let blobs = in_memory();
    let bytes = state(5, CHUNK * 10 + 7);
    let whole: Arc<dyn CheckpointSource> = Arc::new(bytes.clone());
    for parts in [1, 2, 3, 20] {
        let step = 100 + parts as u64;
        let prepared = writer(&blobs)
            .prepare(request(step, None), Arc::clone(&whole))
            .await
            .unwrap();
        for share in split_pieces(prepared.missing(), parts) {
            let held: Arc<dyn CheckpointSource> = Arc::new(bytes.clone());
            writer(&blobs).upload(held, &share).await.unwrap();
        }
        let saved = writer(&blobs).finish(prepared).await.unwrap();
        let loaded = reader(&blobs).load(&saved.handle.reference).await.unwrap();
        assert_eq!(loaded.bytes, bytes, "{parts} parts");
    }
    let store = in_memory();
    let prepared = writer(&store)
        .prepare(request(1, None), whole)
        .await
        .unwrap();
    let mut other = bytes.to_vec();
    other[CHUNK * 3 + 1] ^= 1;
    let wrong = &prepared.missing()[3..4];
    let error = writer(&store)
        .upload(Arc::new(Bytes::from(other)), wrong)
        .await
        .unwrap_err();
    assert!(
        matches!(error, SaveError::Differs { offset: 192, .. }),
        "{error}"
    );
    assert_eq!(store.list("", 100).await.unwrap(), []);
}
