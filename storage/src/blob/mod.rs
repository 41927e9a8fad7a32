//! Immutable blobs in a directory or an S3 bucket: what checkpoints and artifacts are made of.
//!
//! Invariants:
//! 1. A name is written by [`BlobStore::put_if_absent`] at most once; [`BlobStore::renew`] exists
//!    for blobs whose name is the hash of their content, where writing again changes nothing.
//! 2. A write that returned is durable, and a reader sees all of it or nothing.
//! 3. Every operation is tried a bounded number of times; the error says what was tried, where,
//!    and whether trying again can help. No error, log line or `Debug` output has a secret in it.
//! 4. `AlreadyExists` may mean that our own first try succeeded and its reply was lost: whoever
//!    needs to know reads back.

mod error;
pub mod fault;
mod open;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{BoxStream, Stream, StreamExt, TryStreamExt};
use mobula_core::storage::StorageLocation;
use object_store::path::Path;
use object_store::{
    GetOptions, MultipartUpload as _, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};

pub use error::{BlobError, BlobErrorKind, BlobOperation};
pub use open::S3Options;

/// How often an operation is tried, and how long to wait between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries in all, the first one included.
    pub attempts: u32,
    /// The wait before the second try; it doubles each time.
    pub delay_initial: Duration,
    /// The longest wait.
    pub delay_max: Duration,
}

impl RetryPolicy {
    /// Five tries within about two seconds of waiting: enough for a dropped connection or a store
    /// that says "slow down" once, short enough that a caller hears of a real outage.
    pub const STANDARD: RetryPolicy = RetryPolicy {
        attempts: 5,
        delay_initial: Duration::from_millis(100),
        delay_max: Duration::from_secs(1),
    };

    /// No waiting, for tests.
    pub const IMMEDIATE: RetryPolicy = RetryPolicy {
        attempts: 3,
        delay_initial: Duration::ZERO,
        delay_max: Duration::ZERO,
    };

    /// The wait after try number `attempt` (from 1). Half of it depends on the name, so that many
    /// writers that failed together do not return together.
    fn delay(&self, attempt: u32, path: &str) -> Duration {
        let doubled = self
            .delay_initial
            .saturating_mul(1 << (attempt - 1).min(16));
        let half = doubled.min(self.delay_max) / 2;
        half + half * (crc32fast::hash(path.as_bytes()) % 1000) / 1000
    }
}

/// What a create did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// The blob is there now, and was not before.
    Created,
    /// The name was taken, perhaps by an earlier try of this very call.
    AlreadyExists,
}

/// A blob, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its name, relative to the store's URL.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// When it was written last, by the store's clock. Milliseconds since the Unix epoch.
    pub modified_ms: u64,
}

impl BlobInfo {
    fn of(meta: &object_store::ObjectMeta) -> Self {
        BlobInfo {
            path: meta.location.to_string(),
            size_bytes: meta.size,
            modified_ms: u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0),
        }
    }
}

/// How large each part of a streamed upload is. S3 takes 5 MiB at least and 10 000 parts at most.
const PART_BYTES: usize = 8 * 1024 * 1024;

/// A place for blobs. Clones share its connections.
#[derive(Clone)]
pub struct BlobStore {
    store: Arc<dyn ObjectStore>,
    url: Arc<str>,
    retry: RetryPolicy,
}

impl std::fmt::Debug for BlobStore {
    // By hand: the library's own text of an open store shows its credentials.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlobStore")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl BlobStore {
    /// Opens `file:///directory` (created where it is missing), `s3://bucket/prefix`, or
    /// `memory://`, a fresh store for tests. Nothing is contacted yet: see [`BlobStore::probe`].
    pub fn open(url: &str, s3: &S3Options) -> Result<Self, BlobError> {
        open::open(url, s3).map(|store| BlobStore::over(store, url, RetryPolicy::STANDARD))
    }

    /// Opens what `location` names, with the secrets of this process's environment.
    pub fn at(location: &StorageLocation) -> Result<Self, BlobError> {
        BlobStore::open(&location.url, &S3Options::of(location))
    }

    /// Wraps a store that is open already, such as a [`fault::FaultStore`]. `url` is what errors
    /// show and must not hold secrets.
    pub fn over(store: Arc<dyn ObjectStore>, url: &str, retry: RetryPolicy) -> Self {
        BlobStore {
            store,
            url: url.into(),
            retry,
        }
    }

    /// The same store behind planned faults, and where those are planned. It tries each operation
    /// as often as `retry` says.
    #[must_use]
    pub fn with_faults(&self, retry: RetryPolicy) -> (fault::FaultStore, Self) {
        let faults = fault::FaultStore::new(Arc::clone(&self.store));
        let through = BlobStore::over(Arc::new(faults.clone()), &self.url, retry);
        (faults, through)
    }

    /// The URL it was opened with.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Checks that the store can be written, read and deleted, and that it refuses to create a
    /// name twice: fencing rests on that. For use at the start of whatever needs the store.
    pub async fn probe(&self, unique_name: &str) -> Result<(), BlobError> {
        let path = format!("probe/{unique_name}");
        self.put_if_absent(&path, Bytes::from_static(b"mobula"))
            .await?;
        let second = self
            .put_if_absent(&path, Bytes::from_static(b"mobula"))
            .await?;
        self.get(&path, 64).await?;
        self.delete(&path).await?;
        match second {
            PutOutcome::AlreadyExists => Ok(()),
            PutOutcome::Created => Err(self.error(
                BlobOperation::Create,
                &path,
                BlobErrorKind::Unsupported,
                "the store created one name twice: it ignores `If-None-Match: *`; use a store with \
                 conditional writes"
                    .to_owned(),
                1,
            )),
        }
    }

    /// Creates a blob under a free name.
    pub async fn put_if_absent(&self, path: &str, bytes: Bytes) -> Result<PutOutcome, BlobError> {
        let result = self
            .put(BlobOperation::Create, path, bytes, PutMode::Create)
            .await;
        match result {
            Ok(()) => Ok(PutOutcome::Created),
            Err(error) if error.kind() == BlobErrorKind::AlreadyExists => {
                Ok(PutOutcome::AlreadyExists)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes a blob whose name is the hash of `bytes`, whether it is there or not. That makes it
    /// young again, which keeps a sweep away, and mends it where it was damaged.
    pub async fn renew(&self, path: &str, bytes: Bytes) -> Result<(), BlobError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let written = self
                .put(
                    BlobOperation::Write,
                    path,
                    bytes.clone(),
                    PutMode::Overwrite,
                )
                .await;
            match written {
                // No such write asks for a free name: S3 says so of two writes at the same time.
                Err(error)
                    if error.kind() == BlobErrorKind::AlreadyExists
                        && attempts < self.retry.attempts =>
                {
                    tokio::time::sleep(self.retry.delay(attempts, path)).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn put(
        &self,
        operation: BlobOperation,
        path: &str,
        bytes: Bytes,
        mode: PutMode,
    ) -> Result<(), BlobError> {
        let location = self.location(operation, path)?;
        self.retrying(operation, path, || async {
            let options = PutOptions {
                mode: mode.clone(),
                ..PutOptions::default()
            };
            let payload = PutPayload::from(bytes.clone());
            self.store
                .put_opts(&location, payload, options)
                .await
                .map(drop)
        })
        .await
    }

    /// Writes a large blob from `parts`, each but the last of exactly [`BlobStore::part_bytes`].
    /// Only for names that are the hash of the content. Parts are not retried here. An error among
    /// the parts leaves nothing behind, even as the last item.
    pub async fn renew_in_parts<S, E>(&self, path: &str, mut parts: S) -> Result<(), StreamError<E>>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
    {
        let operation = BlobOperation::Write;
        let location = self.location(operation, path).map_err(StreamError::Blob)?;
        let fault = |error| StreamError::Blob(self.classify(operation, path, &error, 1));
        let mut upload = self.store.put_multipart(&location).await.map_err(fault)?;
        let uploaded = async {
            while let Some(part) = parts.try_next().await.map_err(StreamError::Source)? {
                upload
                    .put_part(PutPayload::from(part))
                    .await
                    .map_err(fault)?;
            }
            upload.complete().await.map(drop).map_err(fault)
        }
        .await;
        if uploaded.is_err() {
            // A courtesy to the store; an unfinished upload is never visible, and the first error
            // is the one to report.
            let _ = upload.abort().await;
        }
        uploaded
    }

    /// The size of the parts of [`BlobStore::renew_in_parts`].
    #[must_use]
    pub const fn part_bytes() -> usize {
        PART_BYTES
    }

    /// The bytes of a blob, which may be at most `limit_bytes` long.
    pub async fn get(&self, path: &str, limit_bytes: u64) -> Result<Bytes, BlobError> {
        let operation = BlobOperation::Read;
        let location = self.location(operation, path)?;
        let read = self.retrying(operation, path, || async {
            let result = self
                .store
                .get_opts(&location, GetOptions::default())
                .await?;
            if result.meta.size > limit_bytes {
                return Ok(Err(result.meta.size));
            }
            result.bytes().await.map(Ok)
        });
        read.await?.map_err(|size_bytes| {
            let reason = format!("it has {size_bytes} bytes, the limit here is {limit_bytes}");
            self.error(operation, path, BlobErrorKind::TooLarge, reason, 1)
        })
    }

    /// A blob as it arrives: for those that are too large for memory. A broken connection ends the
    /// stream with an error.
    pub async fn get_stream(
        &self,
        path: &str,
    ) -> Result<(BlobInfo, BoxStream<'static, Result<Bytes, BlobError>>), BlobError> {
        let operation = BlobOperation::Read;
        let location = self.location(operation, path)?;
        let result = self
            .retrying(operation, path, || {
                self.store.get_opts(&location, GetOptions::default())
            })
            .await?;
        let info = BlobInfo::of(&result.meta);
        let (this, path) = (self.clone(), path.to_owned());
        let stream = result
            .into_stream()
            .map_err(move |error| this.classify(operation, &path, &error, 1))
            .boxed();
        Ok((info, stream))
    }

    /// What is known of a blob; `None` when it is not there.
    pub async fn head(&self, path: &str) -> Result<Option<BlobInfo>, BlobError> {
        let operation = BlobOperation::Head;
        let location = self.location(operation, path)?;
        match self
            .retrying(operation, path, || self.store.head(&location))
            .await
        {
            Ok(meta) => Ok(Some(BlobInfo::of(&meta))),
            Err(error) if error.kind() == BlobErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All blobs under `prefix` (a whole number of path segments), sorted by name; more than
    /// `limit` are an error, so that nobody acts on half a list: see [`BlobStore::list_after`].
    pub async fn list(&self, prefix: &str, limit: usize) -> Result<Vec<BlobInfo>, BlobError> {
        let operation = BlobOperation::List;
        let location = self.location(operation, prefix)?;
        let mut blobs = self
            .retrying(operation, prefix, || async {
                let mut blobs = Vec::new();
                let mut stream = self.store.list(Some(&location));
                while let Some(meta) = stream.try_next().await? {
                    if blobs.len() > limit {
                        break;
                    }
                    blobs.push(BlobInfo::of(&meta));
                }
                Ok(blobs)
            })
            .await?;
        if blobs.len() > limit {
            let reason = format!("there are more than {limit} blobs, the limit here");
            return Err(self.error(operation, prefix, BlobErrorKind::TooLarge, reason, 1));
        }
        blobs.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(blobs)
    }

    /// The first `limit` blobs under `prefix` whose names come after `after`, sorted by name: a page, and
    /// fewer than `limit` are the last one. No more than these are in memory, but the store names all
    /// that follow for each page: pages should be large.
    pub async fn list_after(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<BlobInfo>, BlobError> {
        let operation = BlobOperation::List;
        let location = self.location(operation, prefix)?;
        let after = after
            .map(|after| self.location(operation, after))
            .transpose()?;
        self.retrying(operation, prefix, || async {
            let mut stream = match &after {
                Some(after) => self.store.list_with_offset(Some(&location), after),
                None => self.store.list(Some(&location)),
            };
            let mut first = BTreeMap::new();
            while let Some(meta) = stream.try_next().await? {
                // Not every S3 server knows where to begin; a page must not come again.
                if after.as_ref().is_some_and(|after| meta.location <= *after) {
                    continue;
                }
                // A directory lists in no order: what comes late may be among the first.
                let blob = BlobInfo::of(&meta);
                first.insert(blob.path.clone(), blob);
                if first.len() > limit {
                    first.pop_last();
                }
            }
            Ok(first.into_values().collect())
        })
        .await
    }

    /// Removes a blob; one that is not there is fine.
    pub async fn delete(&self, path: &str) -> Result<(), BlobError> {
        let operation = BlobOperation::Delete;
        let location = self.location(operation, path)?;
        match self
            .retrying(operation, path, || self.store.delete(&location))
            .await
        {
            Err(error) if error.kind() != BlobErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn location(&self, operation: BlobOperation, path: &str) -> Result<Path, BlobError> {
        Path::parse(path).map_err(|error| {
            self.error(
                operation,
                path,
                BlobErrorKind::InvalidName,
                error.to_string(),
                0,
            )
        })
    }

    async fn retrying<T, F, Fut>(
        &self,
        operation: BlobOperation,
        path: &str,
        mut attempt: F,
    ) -> Result<T, BlobError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = object_store::Result<T>>,
    {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let error = match attempt().await {
                Ok(value) => return Ok(value),
                Err(error) => self.classify(operation, path, &error, attempts),
            };
            if !error.retry_may_help() || attempts >= self.retry.attempts {
                return Err(error);
            }
            tracing::debug!(%error, attempts, "a blob operation is tried again");
            tokio::time::sleep(self.retry.delay(attempts, path)).await;
        }
    }

    fn classify(
        &self,
        operation: BlobOperation,
        path: &str,
        error: &object_store::Error,
        attempts: u32,
    ) -> BlobError {
        self.error(
            operation,
            path,
            error::kind_of(error),
            error.to_string(),
            attempts,
        )
    }

    fn error(
        &self,
        operation: BlobOperation,
        path: &str,
        kind: BlobErrorKind,
        reason: String,
        attempts: u32,
    ) -> BlobError {
        BlobError::new(operation, &self.url, path, kind, reason, attempts)
    }
}

/// Why a streamed upload ended early.
#[derive(Debug, thiserror::Error)]
pub enum StreamError<E> {
    /// The store failed.
    #[error(transparent)]
    Blob(BlobError),
    /// Whoever supplies the parts failed.
    #[error("the data for the upload could not be read: {0}")]
    Source(E),
}
