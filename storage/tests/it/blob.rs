//! What every blob store must do, over all of them.

use bytes::Bytes;
use futures::TryStreamExt;
use mobula_storage::artifact::ArtifactStore;
use mobula_storage::blob::{BlobErrorKind, BlobStore, PutOutcome, S3Options};

use crate::s3::{BUCKET, S3Server};

async fn conformance(store: &BlobStore) {
    store.probe("first").await.unwrap();
    assert_eq!(
        store.list("", 10).await.unwrap(),
        [],
        "a probe leaves nothing behind"
    );

    // A name is created once, and keeps its first content.
    let create = |path: &'static str, bytes: &'static str| store.put_if_absent(path, bytes.into());
    assert_eq!(create("a/1", "one").await.unwrap(), PutOutcome::Created);
    assert_eq!(
        create("a/1", "two").await.unwrap(),
        PutOutcome::AlreadyExists
    );
    assert_eq!(store.get("a/1", 10).await.unwrap(), "one");
    assert_eq!(create("a/empty", "").await.unwrap(), PutOutcome::Created);
    assert_eq!(store.get("a/empty", 0).await.unwrap(), "");

    // Renewing replaces, and makes it no older.
    let before = store.head("a/1").await.unwrap().unwrap();
    store.renew("a/1", "renewed".into()).await.unwrap();
    let after = store.head("a/1").await.unwrap().unwrap();
    assert_eq!(after.size_bytes, 7);
    assert!(after.modified_ms >= before.modified_ms && before.modified_ms > 1_500_000_000_000);

    // What is not there.
    assert_eq!(store.head("a/none").await.unwrap(), None);
    let error = store.get("a/none", 10).await.unwrap_err();
    assert_eq!(error.kind(), BlobErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains(store.url()));
    store.delete("a/none").await.unwrap();

    // Lists are sorted, whole, and keep to the prefix.
    for path in ["b/2", "b/1", "b/deep/3", "bb/4"] {
        create(path, "x").await.unwrap();
    }
    let paths = |blobs: Vec<mobula_storage::blob::BlobInfo>| -> Vec<String> {
        blobs.into_iter().map(|blob| blob.path).collect()
    };
    assert_eq!(
        paths(store.list("b", 10).await.unwrap()),
        ["b/1", "b/2", "b/deep/3"]
    );
    assert_eq!(store.list("none", 10).await.unwrap(), []);
    assert_eq!(
        store.list("b", 2).await.unwrap_err().kind(),
        BlobErrorKind::TooLarge
    );
    store.delete("b/1").await.unwrap();
    assert_eq!(
        paths(store.list("b", 10).await.unwrap()),
        ["b/2", "b/deep/3"]
    );

    // Large blobs, in one piece and in parts.
    let large: Bytes = (0..9 << 20)
        .map(|at: u32| (at % 251) as u8)
        .collect::<Vec<u8>>()
        .into();
    assert_eq!(
        store.put_if_absent("large", large.clone()).await.unwrap(),
        PutOutcome::Created
    );
    assert_eq!(store.get("large", 16 << 20).await.unwrap(), large);
    assert_eq!(
        store.get("large", 1024).await.unwrap_err().kind(),
        BlobErrorKind::TooLarge
    );
    let parts = [
        large.slice(..BlobStore::part_bytes()),
        large.slice(BlobStore::part_bytes()..),
    ];
    let parts = futures::stream::iter(parts.map(Ok::<_, std::io::Error>));
    store.renew_in_parts("parts", parts).await.unwrap();
    let (info, stream) = store.get_stream("parts").await.unwrap();
    assert_eq!(info.size_bytes, large.len() as u64);
    let read: Vec<Bytes> = stream.try_collect().await.unwrap();
    assert_eq!(read.concat(), large);

    // An upload whose source fails is never visible.
    let broken = futures::stream::iter([
        Ok(large.slice(..BlobStore::part_bytes())),
        Err(std::io::Error::other("the source broke")),
    ]);
    assert!(store.renew_in_parts("broken", broken).await.is_err());
    assert_eq!(store.head("broken").await.unwrap(), None);
}

/// Creators at once: one wins, and everyone reads the winner's bytes. Not for the S3 server of
/// these tests, which looks first and creates then; Amazon's decides in one step.
async fn one_creator_wins(store: &BlobStore) {
    let racers = (0..8_u8).map(|number| async move {
        (
            number,
            store
                .put_if_absent("race", vec![number; 100].into())
                .await
                .unwrap(),
        )
    });
    let outcomes = futures::future::join_all(racers).await;
    let winners: Vec<u8> = outcomes
        .iter()
        .filter(|(_, outcome)| *outcome == PutOutcome::Created)
        .map(|(number, _)| *number)
        .collect();
    assert_eq!(winners.len(), 1);
    assert_eq!(store.get("race", 100).await.unwrap(), vec![winners[0]; 100]);
}

#[tokio::test]
async fn memory_conforms() {
    let store = BlobStore::open("memory://", &S3Options::default()).unwrap();
    conformance(&store).await;
    one_creator_wins(&store).await;
}

#[tokio::test]
async fn a_directory_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}/made/on/demand", dir.path().display());
    let store = BlobStore::open(&url, &S3Options::default()).unwrap();
    conformance(&store).await;
    one_creator_wins(&store).await;
}

#[tokio::test]
async fn an_s3_server_conforms() {
    let server = S3Server::start().await;
    conformance(&server.open("some/prefix")).await;
}

#[tokio::test]
async fn s3_errors_tell_a_wrong_key_a_missing_bucket_and_no_server_apart() {
    let server = S3Server::start().await;
    let wrong_key = S3Options {
        secret_access_key: Some("another".to_owned()),
        ..server.options()
    };
    let url = format!("s3://{BUCKET}/p");
    let kind = async |url: &str, options: &S3Options| {
        let store = BlobStore::open(url, options).unwrap();
        let error = store.get("a", 10).await.unwrap_err();
        assert!(!error.to_string().contains("another"), "{error}");
        assert!(error.to_string().contains(url), "{error}");
        error.kind()
    };
    assert_eq!(
        kind(&url, &wrong_key).await,
        BlobErrorKind::PermissionDenied
    );
    assert_eq!(
        kind("s3://no-such-bucket", &server.options()).await,
        BlobErrorKind::NotFound
    );
    // A port that was free a moment ago, with nobody behind it.
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let nobody = S3Options {
        endpoint: Some(format!("http://{free}")),
        ..server.options()
    };
    assert_eq!(kind(&url, &nobody).await, BlobErrorKind::Unreachable);
}

#[tokio::test]
async fn an_artifact_travels_through_s3() {
    let server = S3Server::start().await;
    let store = ArtifactStore::new(server.open("artifacts-test"), 64 << 20);
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("program");
    let bytes: Vec<u8> = (0..10 << 20).map(|at: u32| (at % 241) as u8).collect();
    std::fs::write(&source, &bytes).unwrap();
    let id = store.put_file(&source).await.unwrap();
    let target = dir.path().join("fetched");
    store.fetch(&id, &target).await.unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), bytes);
}
