use super::fault::{Fault, FaultStore};
use super::*;

fn faulty() -> (FaultStore, BlobStore) {
    let faults = FaultStore::new(Arc::new(object_store::memory::InMemory::new()));
    let store = BlobStore::over(Arc::new(faults.clone()), "test://", RetryPolicy::IMMEDIATE);
    (faults, store)
}

#[tokio::test]
async fn a_short_outage_is_ridden_out() {
    let (faults, store) = faulty();
    faults.plan(0, Fault::BeforeStore);
    faults.plan(1, Fault::BeforeStore);
    assert_eq!(
        store.put_if_absent("a", "1".into()).await.unwrap(),
        PutOutcome::Created
    );
    faults.plan(3, Fault::BeforeStore);
    assert_eq!(store.get("a", 10).await.unwrap(), "1");
}

#[tokio::test]
async fn a_long_outage_is_a_typed_error_with_url_and_operation() {
    let (faults, store) = faulty();
    faults.crash_at(0, Fault::BeforeStore);
    let error = store.put_if_absent("a/b", "1".into()).await.unwrap_err();
    assert_eq!(error.kind(), BlobErrorKind::Unreachable);
    assert!(error.retry_may_help());
    let text = error.to_string();
    assert!(
        text.starts_with("cannot create `a/b` in test://: "),
        "{text}"
    );
    assert!(text.contains("tried 3 times"), "{text}");
    assert_eq!(faults.operations(), 3, "the number of tries is bounded");
}

#[tokio::test]
async fn a_lost_reply_shows_as_already_exists() {
    let (faults, store) = faulty();
    faults.plan(0, Fault::ReplyLost);
    let outcome = store.put_if_absent("a", "1".into()).await.unwrap();
    assert_eq!(
        outcome,
        PutOutcome::AlreadyExists,
        "invariant 4: the caller reads back"
    );
    assert_eq!(store.get("a", 10).await.unwrap(), "1");
}

#[tokio::test]
async fn what_is_not_found_or_too_large_is_not_tried_again() {
    let (faults, store) = faulty();
    let error = store.get("a", 10).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.retry_may_help()),
        (BlobErrorKind::NotFound, false)
    );
    assert_eq!(faults.operations(), 1);
    store.put_if_absent("a", "0123456789".into()).await.unwrap();
    assert_eq!(
        store.get("a", 9).await.unwrap_err().kind(),
        BlobErrorKind::TooLarge
    );
    assert_eq!(
        store.list("", 0).await.unwrap_err().kind(),
        BlobErrorKind::TooLarge
    );
    assert_eq!(
        store.get("../a", 9).await.unwrap_err().kind(),
        BlobErrorKind::InvalidName
    );
}

#[tokio::test]
async fn more_blobs_than_one_list_holds_come_in_pages() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("file://{}", directory.path().display());
    let on_disk = BlobStore::open(&url, &S3Options::default()).unwrap();
    let (faults, in_memory) = faulty();
    for store in [on_disk, in_memory] {
        for number in (0..25).rev() {
            let path = format!("a/v{}/{number}", number % 3);
            store.put_if_absent(&path, "1".into()).await.unwrap();
        }
        store.put_if_absent("ab/1", "1".into()).await.unwrap();
        let (mut blobs, mut sizes) = (Vec::<BlobInfo>::new(), Vec::new());
        while sizes.last().is_none_or(|size| *size == 10) {
            // One broken connection for each page: a page is tried again as a whole.
            faults.plan(faults.operations(), Fault::BeforeStore);
            let after = blobs.last().map(|blob| blob.path.clone());
            let page = store.list_after("a", after.as_deref(), 10).await.unwrap();
            sizes.push(page.len());
            blobs.extend(page);
        }
        assert_eq!(sizes, [10, 10, 5]);
        assert_eq!(blobs, store.list("a", 25).await.unwrap());
        assert_eq!(
            store.list("a", 24).await.unwrap_err().kind(),
            BlobErrorKind::TooLarge
        );
        assert_eq!(store.list_after("none", None, 10).await.unwrap(), []);
    }
}

#[test]
fn urls_that_cannot_work_say_why() {
    let cases = [
        ("/just/a/path", "file:///directory"),
        ("file://relative", "three slashes"),
        ("ftp://x", "`ftp` is not known"),
        ("s3://", "no bucket"),
    ];
    for (url, expect) in cases {
        let error = BlobStore::open(url, &S3Options::default()).unwrap_err();
        assert_eq!(error.kind(), BlobErrorKind::InvalidName, "{url}");
        assert!(error.to_string().contains(expect), "{url}: {error}");
    }
}

#[test]
fn a_file_in_the_way_of_the_directory_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let url = format!("file://{}/inside", file.path().display());
    let error = BlobStore::open(&url, &S3Options::default()).unwrap_err();
    assert_eq!(error.kind(), BlobErrorKind::Failed, "{error}");
}

#[test]
fn secrets_are_in_no_text() {
    let options = S3Options {
        secret_access_key: Some("hunter2".to_owned()),
        session_token: Some("hunter3".to_owned()),
        ..S3Options::default()
    };
    assert!(!format!("{options:?}").contains("hunter"));
    let error = BlobStore::open("s3://key:hunter2@bucket/prefix", &options).unwrap_err();
    assert!(!error.to_string().contains("hunter"), "{error}");
    let half = BlobStore::open("s3://bucket/prefix", &options).unwrap_err();
    assert_eq!(
        half.kind(),
        BlobErrorKind::InvalidOptions,
        "a secret without its key"
    );
    assert!(!half.to_string().contains("hunter"), "{half}");
    let options = S3Options {
        access_key_id: Some("key".to_owned()),
        ..options
    };
    let store = BlobStore::open("s3://bucket/prefix", &options).unwrap();
    assert!(!format!("{store:?}").contains("hunter"), "{store:?}");
}

#[test]
fn waits_grow_up_to_their_bound() {
    let policy = RetryPolicy::STANDARD;
    for attempt in 1..=40 {
        let delay = policy.delay(attempt, "chunks/x");
        assert!(
            delay <= policy.delay_max && delay >= policy.delay_initial / 2,
            "{delay:?}"
        );
    }
}
