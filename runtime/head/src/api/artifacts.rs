//! Programs, shipped by content hash: written to a file first, verified, then stored.

use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_storage::artifact::{ArtifactId, identify};
use mobula_storage::digest::ParseDigestError;
use mobula_wire::control as api;
use tokio::io::AsyncWriteExt;
use tonic::{Status, Streaming};

use super::{rejected, status as make_status};
use crate::context::HeadContext;

/// The largest program that is taken.
pub(crate) const ARTIFACT_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;

fn only_clients(caller: &Caller) -> Result<(), Status> {
    match caller {
        Caller::Client | Caller::Head => Ok(()),
        Caller::Host { .. } | Caller::Node(_) => Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            "programs are uploaded with a client token",
        ))),
    }
}

pub(super) async fn has(
    context: &HeadContext,
    caller: &Caller,
    request: api::HasArtifactRequest,
) -> Result<api::HasArtifactReply, Status> {
    only_clients(caller)?;
    let id = artifact_id(&request.blake3, request.size_bytes)
        .map_err(|rejection| rejected(&rejection))?;
    let present = context
        .artifacts
        .contains(&id)
        .await
        .map_err(storage_status)?;
    Ok(api::HasArtifactReply { present })
}

pub(super) async fn put(
    context: &HeadContext,
    caller: &Caller,
    mut chunks: Streaming<api::ArtifactChunk>,
) -> Result<api::PutArtifactReply, Status> {
    only_clients(caller)?;
    let first = chunks
        .message()
        .await?
        .ok_or_else(|| rejected(&Rejection::invalid("an artifact needs at least one chunk")))?;
    let announced =
        artifact_id(&first.blake3, first.size_bytes).map_err(|rejection| rejected(&rejection))?;
    let size_bytes = announced.size_bytes;
    if size_bytes > ARTIFACT_BYTES_MAX {
        return Err(rejected(&Rejection::invalid(format!(
            "the program has {size_bytes} bytes, the limit is {ARTIFACT_BYTES_MAX}: strip its \
             debug information"
        ))));
    }
    let file = tempfile::NamedTempFile::new_in(&context.upload_dir).map_err(disk_status)?;
    let mut writer = tokio::fs::File::from_std(file.reopen().map_err(disk_status)?);
    let mut received_bytes = 0;
    let mut next = Some(first);
    while let Some(chunk) = next {
        received_bytes += chunk.data.len() as u64;
        if received_bytes > size_bytes {
            return Err(rejected(&Rejection::invalid(format!(
                "more bytes came than the {size_bytes} that were announced"
            ))));
        }
        writer.write_all(&chunk.data).await.map_err(disk_status)?;
        next = chunks.message().await?;
    }
    writer.flush().await.map_err(disk_status)?;
    // Read once more to be hashed: what is wrong must not get into the store.
    let received = identify(file.path()).await.map_err(storage_status)?;
    if received != announced {
        return Err(rejected(&Rejection::invalid(format!(
            "the program has {} bytes and BLAKE3 {}, not {size_bytes} and {} as announced: upload \
             it again",
            received.size_bytes, received.blake3, announced.blake3
        ))));
    }
    context
        .artifacts
        .put_file(file.path())
        .await
        .map_err(storage_status)?;
    context.metrics.uploaded(size_bytes);
    Ok(api::PutArtifactReply {
        blake3: announced.blake3.to_string(),
        size_bytes,
    })
}

/// The name of an artifact, as a client gives it.
pub(super) fn artifact_id(blake3: &str, size_bytes: u64) -> Result<ArtifactId, Rejection> {
    let blake3 = blake3
        .parse()
        .map_err(|error: ParseDigestError| Rejection::invalid(error.to_string()))?;
    Ok(ArtifactId { blake3, size_bytes })
}

fn disk_status(error: std::io::Error) -> Status {
    let message = format!("the upload cannot be kept on the head's disk: {error}");
    make_status(ErrorCode::Unavailable, "no", message)
}

fn storage_status(error: impl std::fmt::Display) -> Status {
    make_status(ErrorCode::Unavailable, "no", error.to_string())
}
