//! From a file to rows: everything is checked on the way.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use mobula_net::identity::ClusterCa;
use mobula_storage::snapshot::{FRAME_LIMIT_BYTES, SnapshotError, SnapshotScan, payload_around};

use super::{KIND_IDENTITY, KIND_MANIFEST, MAGIC, MAGIC_OF_ANY, Manifest, RestoreError, in_stream};

/// Reads all of a backup and checks it; what it is of.
pub fn verify(path: &Path) -> Result<Manifest, RestoreError> {
    read(path, &mut |_, _| {}).map(|contents| contents.manifest)
}

/// What stands in a backup around its rows.
pub(super) struct Contents {
    pub(super) manifest: Manifest,
    pub(super) ca: ClusterCa,
}

/// Reads all of a backup, and shows its rows to `take`. Only when this returns is any of it to be
/// believed.
pub(super) fn read(
    path: &Path,
    take: &mut dyn FnMut(&[u8], &[u8]),
) -> Result<Contents, RestoreError> {
    let unreadable = |source| RestoreError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(unreadable)?;
    let mut source = Hashed {
        inner: BufReader::new(file),
        hasher: blake3::Hasher::new(),
        offset: 0,
    };
    check_magic(path, &mut source)?;
    let ca = read_identity(path, &mut source)?;

    let before_bytes = source.offset;
    let mut modules = std::collections::BTreeMap::<u8, u64>::new();
    let mut scan = SnapshotScan::new(u64::MAX);
    let scanned = scan.read_from(&mut source, &mut |key, value| {
        *modules
            .entry(key.first().copied().unwrap_or_default())
            .or_default() += 1;
        take(key, value);
    });
    scanned.map_err(|error| at(path, error, before_bytes))?;
    let place = scan
        .place()
        .expect("a stream that was read has its header")
        .applied;

    let file_hash = source.hasher.finalize().to_hex().to_string();
    let manifest_at = source.offset;
    let frame = read_frame(path, &mut source)?;
    let payload = payload_around(KIND_MANIFEST, &frame)
        .ok_or_else(|| RestoreError::damaged(manifest_at, "the manifest is not whole"))?;
    let manifest: Manifest = serde_json::from_slice(payload)
        .map_err(|error| RestoreError::damaged(manifest_at, error.to_string()))?;
    let mut rest = [0];
    if source.read(&mut rest).map_err(unreadable)? > 0 {
        return Err(RestoreError::damaged(
            source.offset - 1,
            "something follows the manifest",
        ));
    }
    let (rows, rows_bytes) = scan.counts();
    let found = Manifest {
        cluster_id: ca.cluster_id().to_owned(),
        index: place.index,
        term: place.term,
        rows,
        rows_bytes,
        modules,
        state_hash: scan.state_hash().to_hex().to_string(),
        file_hash,
        ..manifest.clone()
    };
    if found != manifest {
        return Err(RestoreError::damaged(
            manifest_at,
            "the manifest is of other contents than these",
        ));
    }
    Ok(Contents { manifest, ca })
}

fn check_magic(path: &Path, source: &mut Hashed<impl Read>) -> Result<(), RestoreError> {
    let mut magic = [0; MAGIC.len()];
    let not_a_backup = || RestoreError::NotABackup {
        path: path.to_owned(),
    };
    source.read_exact(&mut magic).map_err(|_| not_a_backup())?;
    if magic == *MAGIC {
        return Ok(());
    }
    match magic.strip_prefix(MAGIC_OF_ANY) {
        Some(format) => Err(RestoreError::OtherFormat {
            path: path.to_owned(),
            found: String::from_utf8_lossy(format).trim().to_owned(),
            ours: env!("CARGO_PKG_VERSION"),
        }),
        None => Err(not_a_backup()),
    }
}

fn read_identity(path: &Path, source: &mut Hashed<impl Read>) -> Result<ClusterCa, RestoreError> {
    let at = source.offset;
    let frame = read_frame(path, source)?;
    let payload = payload_around(KIND_IDENTITY, &frame)
        .ok_or_else(|| RestoreError::damaged(at, "the identity is not whole"))?;
    let text = std::str::from_utf8(payload)
        .map_err(|_| RestoreError::damaged(at, "the identity is no text"))?;
    // The key stands first; each reader takes its own kind of block.
    let certificate = text
        .find("-----BEGIN CERTIFICATE-----")
        .map(|start| &text[start..])
        .ok_or_else(|| RestoreError::damaged(at, "the identity has no certificate"))?;
    ClusterCa::from_pem(certificate, text)
        .map_err(|error| RestoreError::Identity(error.to_string()))
}

fn read_frame(path: &Path, source: &mut Hashed<impl Read>) -> Result<Vec<u8>, RestoreError> {
    let before_bytes = source.offset;
    SnapshotScan::new(FRAME_LIMIT_BYTES as u64)
        .read_frame(source)
        .map_err(|error| at(path, error, before_bytes))
}

fn at(path: &Path, error: SnapshotError, before_bytes: u64) -> RestoreError {
    match error {
        SnapshotError::Io(source) => RestoreError::Read {
            path: path.to_owned(),
            source,
        },
        error => {
            let (offset, reason) = in_stream(&error, before_bytes);
            RestoreError::damaged(offset, reason)
        }
    }
}

/// Hashes and counts what passes.
struct Hashed<R> {
    inner: R,
    hasher: blake3::Hasher,
    offset: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.offset += count as u64;
        Ok(count)
    }
}
