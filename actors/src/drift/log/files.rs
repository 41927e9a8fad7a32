//! The files of a prediction log in the object store, however many there are.
//!
//! Invariants:
//! 1. They are listed a page at a time, by name: memory is bounded by a page.
//! 2. A file is deleted for its age alone, so that a part of the list is enough to delete by.

use bytes::Bytes;
use mobula_storage::blob::{BlobError, BlobErrorKind, BlobInfo, BlobStore};

use super::folder;

/// Files in a page: with those of ten minutes those of more than a year, some 20 MB. The store names all files that follow
/// for each page, so that small pages would take it longer.
const PAGE_FILES: usize = 100_000;

/// Lists the files of an endpoint.
#[derive(Debug)]
pub struct Pages<'a> {
    blobs: &'a BlobStore,
    folder: String,
    page_files: usize,
    after: Option<String>,
    has_more: bool,
}

impl<'a> Pages<'a> {
    /// Those of all versions of an endpoint.
    #[must_use]
    pub fn of(blobs: &'a BlobStore, endpoint: &str) -> Self {
        Self::with_page(blobs, endpoint, PAGE_FILES)
    }

    fn with_page(blobs: &'a BlobStore, endpoint: &str, page_files: usize) -> Self {
        Pages {
            blobs,
            folder: folder(endpoint),
            page_files,
            after: None,
            has_more: true,
        }
    }

    /// The next files, by name; nothing after the last.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn next_page(&mut self) -> Result<Option<Vec<BlobInfo>>, BlobError> {
        if !self.has_more {
            return Ok(None);
        }
        let page = self
            .blobs
            .list_after(&self.folder, self.after.as_deref(), self.page_files)
            .await?;
        self.has_more = page.len() == self.page_files;
        if let Some(last) = page.last() {
            self.after = Some(last.path.clone());
        }
        Ok((!page.is_empty()).then_some(page))
    }
}

/// What is in a file that was listed; nothing if its time was over since.
///
/// # Errors
/// The store cannot be read, or the file has more than `limit_bytes`.
pub async fn read(
    blobs: &BlobStore,
    file: &BlobInfo,
    limit_bytes: u64,
) -> Result<Option<Bytes>, BlobError> {
    match blobs.get(&file.path, limit_bytes).await {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == BlobErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Deletes files whose time is over, those of other versions as well; how many.
///
/// # Errors
/// The store cannot be listed. A file that cannot be deleted stays until the next time.
pub(super) async fn sweep(
    mut pages: Pages<'_>,
    keep_ms: u64,
    now_ms: u64,
) -> Result<u64, BlobError> {
    let mut deleted = 0;
    while let Some(page) = pages.next_page().await? {
        for file in &page {
            if now_ms.saturating_sub(file.modified_ms) < keep_ms {
                continue;
            }
            match pages.blobs.delete(&file.path).await {
                Ok(()) => deleted += 1,
                Err(error) => {
                    tracing::warn!(path = file.path, %error, "an old file of the prediction log stays");
                }
            }
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mobula_storage::blob::S3Options;

    use super::*;

    const PAGE: usize = 10;

    async fn put(blobs: &BlobStore, path: &str) -> u64 {
        blobs.put_if_absent(path, "rows".into()).await.unwrap();
        blobs.head(path).await.unwrap().unwrap().modified_ms
    }

    async fn count(blobs: &BlobStore) -> usize {
        let (mut pages, mut count) = (Pages::with_page(blobs, "digits", PAGE), 0);
        while let Some(page) = pages.next_page().await.unwrap() {
            assert!(page.len() <= PAGE, "{}", page.len());
            count += page.len();
        }
        count
    }

    #[tokio::test]
    async fn more_files_than_a_page_are_listed_and_the_old_ones_deleted() {
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        assert_eq!(count(&blobs).await, 0);
        let (mut old_ms, mut other) = (0, Vec::new());
        for number in 0..25 {
            let version = 9 + number % 3;
            let path = format!("predictions/digits/v{version}/{number}.parquet");
            old_ms = put(&blobs, &path).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        for number in 25..40 {
            let version = 9 + number % 3;
            put(
                &blobs,
                &format!("predictions/digits/v{version}/{number}.parquet"),
            )
            .await;
            let path = format!("predictions/digits2/v1/{number}.parquet");
            put(&blobs, &path).await;
            other.push(path);
        }
        assert_eq!(count(&blobs).await, 40);

        let sweep_at = |now_ms| sweep(Pages::with_page(&blobs, "digits", PAGE), 60_000, now_ms);
        assert_eq!(sweep_at(old_ms).await.unwrap(), 0);
        assert_eq!(sweep_at(old_ms + 60_000).await.unwrap(), 25);
        assert_eq!(count(&blobs).await, 15);
        assert_eq!(sweep_at(old_ms + 600_000).await.unwrap(), 15);
        assert_eq!(count(&blobs).await, 0);
        // What is another endpoint's is left alone.
        let left = blobs.list("predictions", 100).await.unwrap();
        let left: Vec<&String> = left.iter().map(|file| &file.path).collect();
        assert_eq!(left, other.iter().collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_file_that_is_gone_since_it_was_listed_has_nothing_in_it() {
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        put(&blobs, "predictions/digits/v1/1.parquet").await;
        let mut pages = Pages::of(&blobs, "digits");
        let page = pages.next_page().await.unwrap().unwrap();
        assert_eq!(pages.next_page().await.unwrap(), None);
        let content = read(&blobs, &page[0], 10).await.unwrap().unwrap();
        assert_eq!(content, "rows");
        let error = read(&blobs, &page[0], 3).await.unwrap_err();
        assert_eq!(error.kind(), BlobErrorKind::TooLarge);
        blobs.delete(&page[0].path).await.unwrap();
        assert_eq!(read(&blobs, &page[0], 10).await.unwrap(), None);
    }
}
