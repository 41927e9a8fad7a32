//! Programs and files on their way to the cluster.
//!
//! Invariants:
//! 1. A file is shipped by the hash of its bytes, once; the head checks the hash.
//! 2. It is never in memory as a whole: the reader waits for the connection.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mobula_wire::control as api;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::cluster::Cluster;
use crate::error::{Error, Result};

/// Bytes of a file in one message.
const CHUNK_BYTES: usize = 512 * 1024;

/// How far the upload of one file has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadProgress {
    /// The file.
    pub path: PathBuf,
    /// Bytes that were handed to the connection.
    pub sent_bytes: u64,
    /// All of it.
    pub size_bytes: u64,
}

/// Who is told.
pub(crate) type Observer = Arc<dyn Fn(&UploadProgress) + Send + Sync>;

/// Uploads a file unless the cluster has it; its digest and size. `kind` says what it is, for errors.
pub(crate) async fn ship(
    cluster: &Cluster,
    kind: &str,
    path: &Path,
    observer: &Observer,
) -> Result<(String, u64)> {
    let what = || format!("{kind} {}", path.display());
    let owned = path.to_owned();
    let (blake3, size_bytes) = tokio::task::spawn_blocking(move || digest(&owned))
        .await
        .map_err(|error| Error::setup(what(), error))?
        .map_err(|error| Error::setup(what(), error))?;
    let asked = blake3.clone();
    let known = cluster
        .control()
        .read("ask for an artifact", |mut api| {
            let request = api::HasArtifactRequest {
                blake3: asked.clone(),
                size_bytes,
            };
            async move { api.has_artifact(request).await }
        })
        .await?;
    if known.present {
        return Ok((blake3, size_bytes));
    }
    // Bounded: the reader waits when the connection is slower than the disk.
    let (chunks, receiver) = mpsc::channel(4);
    let owned = path.to_owned();
    let named = blake3.clone();
    let observer = Arc::clone(observer);
    let reader = tokio::task::spawn_blocking(move || {
        read_chunks(&owned, &named, size_bytes, &chunks, &*observer)
    });
    let sent = cluster
        .control()
        .once("ship an artifact", |mut api| async move {
            api.put_artifact(ReceiverStream::new(receiver)).await
        })
        .await;
    reader
        .await
        .map_err(|error| Error::setup(what(), error))?
        .map_err(|error| Error::setup(what(), error))?;
    let stored = sent?;
    if stored.blake3 != blake3 {
        return Err(Error::setup(
            what(),
            "it changed while it was shipped; submit it again",
        ));
    }
    Ok((blake3, size_bytes))
}

fn digest(path: &Path) -> std::io::Result<(String, u64)> {
    let mut hasher = blake3::Hasher::new();
    let size_bytes = std::io::copy(&mut std::fs::File::open(path)?, &mut hasher)?;
    Ok((hasher.finalize().to_hex().to_string(), size_bytes))
}

fn read_chunks(
    path: &Path,
    blake3: &str,
    size_bytes: u64,
    chunks: &mpsc::Sender<api::ArtifactChunk>,
    observe: &dyn Fn(&UploadProgress),
) -> std::io::Result<()> {
    let mut progress = UploadProgress {
        path: path.to_owned(),
        sent_bytes: 0,
        size_bytes,
    };
    observe(&progress);
    let mut file = std::fs::File::open(path)?;
    let mut name = Some((blake3.to_owned(), size_bytes));
    loop {
        let mut data = Vec::with_capacity(CHUNK_BYTES);
        let read = file
            .by_ref()
            .take(CHUNK_BYTES as u64)
            .read_to_end(&mut data)?;
        // Only the first chunk names the digest and the size.
        let is_first = name.is_some();
        let (blake3, size_bytes) = name.take().unwrap_or_default();
        if read == 0 && !is_first {
            return Ok(());
        }
        let chunk = api::ArtifactChunk {
            blake3,
            size_bytes,
            data,
        };
        if chunks.blocking_send(chunk).is_err() || read == 0 {
            // The head has refused it, and its answer says why; or the file is empty.
            return Ok(());
        }
        progress.sent_bytes += read as u64;
        observe(&progress);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_one_empty_chunk() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("empty");
        std::fs::write(&path, "").unwrap();
        let (sender, mut receiver) = mpsc::channel(8);
        read_chunks(&path, "ab", 0, &sender, &|_| {}).unwrap();
        drop(sender);
        let chunk = receiver.blocking_recv().unwrap();
        assert_eq!((chunk.blake3.as_str(), chunk.data.len()), ("ab", 0));
        assert!(receiver.blocking_recv().is_none());
    }

    #[test]
    fn a_program_is_read_in_chunks_and_named_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        let bytes: Vec<u8> = (0..CHUNK_BYTES + 10).map(|i| i as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let (blake3, size_bytes) = digest(&path).unwrap();
        assert_eq!(blake3, blake3::hash(&bytes).to_hex().to_string());
        let (sender, mut receiver) = mpsc::channel(8);
        let told = std::cell::RefCell::new(Vec::new());
        let observe = |progress: &UploadProgress| {
            assert_eq!((&progress.path, progress.size_bytes), (&path, size_bytes));
            told.borrow_mut().push(progress.sent_bytes);
        };
        read_chunks(&path, &blake3, size_bytes, &sender, &observe).unwrap();
        assert_eq!(
            *told.borrow(),
            [0, CHUNK_BYTES as u64, CHUNK_BYTES as u64 + 10]
        );
        drop(sender);
        let mut chunks = Vec::new();
        while let Some(chunk) = receiver.blocking_recv() {
            chunks.push(chunk);
        }
        let names: Vec<_> = chunks
            .iter()
            .map(|c| (c.blake3.as_str(), c.size_bytes))
            .collect();
        assert_eq!(names, [(blake3.as_str(), bytes.len() as u64), ("", 0)]);
        let joined: Vec<u8> = chunks.into_iter().flat_map(|chunk| chunk.data).collect();
        assert_eq!(joined, bytes);
    }
}
