//! Creating a blob once: only its content tells a name that somebody else has taken from one that an earlier try of
//! ours took, whose reply was lost.

use bytes::Bytes;

use crate::blob::{BlobError, BlobErrorKind, BlobStore, PutOutcome};

/// How often a blob is created whose name is said to be taken while nothing is found there: an S3 conflict between two
/// of our own tries looks like that.
pub(super) const TRIES: u32 = 3;

/// What there is under the name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Creation {
    /// What was to be there.
    Ours,
    /// Something else.
    Other(Bytes),
    /// The store says that the name is taken, and that nothing is there.
    Undecided,
}

/// Creates `path` with `bytes`, unless it is there; at most `limit_bytes` of what is there are read.
pub(super) async fn create(
    blobs: &BlobStore,
    path: &str,
    bytes: &Bytes,
    limit_bytes: u64,
) -> Result<Creation, BlobError> {
    for _ in 0..TRIES {
        if blobs.put_if_absent(path, bytes.clone()).await? == PutOutcome::Created {
            return Ok(Creation::Ours);
        }
        match blobs.get(path, limit_bytes).await {
            Ok(found) if found == *bytes => return Ok(Creation::Ours),
            Ok(found) => return Ok(Creation::Other(found)),
            Err(error) if error.kind() == BlobErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Creation::Undecided)
}
