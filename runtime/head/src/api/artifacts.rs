//! Programs, shipped by content hash: written to a file first, verified, then stored.

use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_wire::control as api;
use mobula_wire::convert::checked_digest;
use tokio::io::AsyncWriteExt;
use tonic::{Status, Streaming};

use super::{rejected, status as make_status};
use crate::context::HeadContext;

/// The largest program that is taken.
const ARTIFACT_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;

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
    let digest = checked_digest(request.blake3).map_err(|rejection| rejected(&rejection))?;
    let present = context.artifacts.contains(&digest).await.map_err(storage_status)?;
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
    let digest = checked_digest(first.blake3.clone()).map_err(|rejection| rejected(&rejection))?;
    let size_bytes = first.size_bytes;
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
    let stored = context.artifacts.put_file(file.path()).await.map_err(storage_status)?;
    if stored.blake3 != digest {
        return Err(rejected(&Rejection::invalid(format!(
            "the program's BLAKE3 is {}, not {digest} as announced: upload it again",
            stored.blake3
        ))));
    }
    Ok(api::PutArtifactReply { blake3: digest, size_bytes })
}

fn disk_status(error: std::io::Error) -> Status {
    let message = format!("the upload cannot be kept on the head's disk: {error}");
    make_status(ErrorCode::Unavailable, "no", message)
}

fn storage_status(error: impl std::fmt::Display) -> Status {
    make_status(ErrorCode::Unavailable, "no", error.to_string())
}
