//! Kept objects: their bytes on the way to the object store and back. Which of them a job keeps, the
//! head knows.
//!
//! Invariant: what comes back has the digests that the head names, chunk by chunk, or is an error.

use std::sync::Arc;

use futures::TryStreamExt;
use mobula_core::kept::{KEPT_BYTES_MAX, KEPT_CHUNK_BYTES, KeptError, KeptObject, KeptValue};
use mobula_storage::checkpoint::{CheckpointReader, CheckpointWriter, ChunkRef};

use super::handle::Object;
use super::payload::Payload;
use super::table::ObjectTable;
use crate::context::HostRuntime;

impl HostRuntime {
    /// Stores a value that is to be kept as `name`. It is read where it is, and counts once the head
    /// has been told of it.
    pub async fn store_kept(&self, name: &str, payload: Payload) -> Result<KeptValue, KeptError> {
        let Payload { format, bytes } = payload;
        let size_bytes = bytes.len() as u64;
        let name = name.to_owned();
        if size_bytes > KEPT_BYTES_MAX {
            return Err(KeptError::TooLarge {
                name,
                size_bytes,
                limit_bytes: KEPT_BYTES_MAX,
            });
        }
        let stored = async {
            let blobs = self.blobs().map_err(|error| error.to_string())?;
            let chunk_bytes = usize::try_from(KEPT_CHUNK_BYTES).expect("a few MiB");
            let writer = CheckpointWriter::new(blobs).with_chunk_bytes(chunk_bytes);
            let chunks = writer.save_chunks(Arc::new(bytes)).await;
            chunks.map_err(|error| error.to_string())
        };
        match stored.await {
            Ok(chunks) => Ok(KeptValue {
                format,
                size_bytes,
                chunks: chunks.iter().map(|chunk| chunk.blake3.into()).collect(),
            }),
            Err(reason) => Err(KeptError::NotStored { name, reason }),
        }
    }

    /// Fetches a kept value into a new object of this process.
    pub async fn fetch_kept(
        &self,
        objects: &Arc<ObjectTable>,
        kept: &KeptObject,
    ) -> Result<Object, KeptError> {
        let KeptObject { name, value, .. } = kept;
        let lost = |reason: String| KeptError::Lost {
            name: name.clone(),
            reason,
        };
        let out_of_reach = |reason: String| KeptError::OutOfReach {
            name: name.clone(),
            reason,
        };
        // Of a head that is newer, or in error: what has not its chunks is not read.
        value.check().map_err(lost)?;
        let blobs = self.blobs();
        let blobs = blobs.map_err(|error| out_of_reach(error.to_string()))?;
        let chunks = value.chunks().map(|(digest, length)| ChunkRef {
            blake3: digest.into(),
            length,
        });
        let parts = CheckpointReader::new(blobs, KEPT_BYTES_MAX).chunks(chunks.collect());
        let parts = parts.map_err(|error| match error.condemns_the_checkpoint() {
            true => lost(error.to_string()),
            false => out_of_reach(error.to_string()),
        });
        objects
            .put_parts(value.format, value.size_bytes, parts)
            .await
    }
}
