//! Where a program's file is: the `mobula` binary itself, or a user's, fetched by content hash.
//!
//! Invariants:
//! 1. A fetched file is run only after its hash was found to be the one that the leader named.
//! 2. Each is fetched once, however many hosts wait for it.
//! 3. The cache keeps what was used last, at most [`CACHE_FILES_MAX`] programs.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::SystemTime;

use mobula_core::spec::Program;
use mobula_storage::artifact::{ArtifactId, ArtifactStore};
use mobula_storage::blob::{BlobStore, S3Options};
use mobula_storage::digest::Digest;
use mobula_wire::session::StorageLocation;
use tokio::sync::Mutex;

/// Programs that are kept: at some 50 MiB each a few GiB of disk, and more versions than anyone
/// goes back to.
const CACHE_FILES_MAX: usize = 64;

/// The programs of one worker.
#[derive(Debug)]
pub(crate) struct Programs {
    builtin: PathBuf,
    cache_dir: PathBuf,
    /// What this agent has verified; the lock is held while one is fetched, so that the others who
    /// want the same find it there. Different programs at the same moment are rare.
    verified: Mutex<BTreeSet<Digest>>,
}

impl Programs {
    pub(crate) fn new(builtin: PathBuf, cache_dir: PathBuf) -> Programs {
        Programs {
            builtin,
            cache_dir,
            verified: Mutex::new(BTreeSet::new()),
        }
    }

    /// The file to run; the error is for people.
    pub(crate) async fn path(
        &self,
        program: &Program,
        storage: &StorageLocation,
    ) -> Result<PathBuf, String> {
        let (blake3, size_bytes) = match program {
            Program::Builtin => return Ok(self.builtin.clone()),
            Program::Artifact { blake3, size_bytes } => (blake3, *size_bytes),
        };
        let digest: Digest = blake3
            .parse()
            .map_err(|error| format!("bad program: {error}"))?;
        let id = ArtifactId {
            blake3: digest,
            size_bytes,
        };
        let path = self.cache_dir.join(digest.to_string());
        let mut verified = self.verified.lock().await;
        if verified.contains(&digest) && path.is_file() {
            return Ok(path);
        }
        let fetch = async {
            let blobs = BlobStore::open(&storage.url, &S3Options::of(storage))
                .map_err(|error| error.to_string())?;
            // The leader has checked the size when the program was uploaded.
            let artifacts = ArtifactStore::new(blobs, size_bytes);
            artifacts
                .fetch(&id, &path)
                .await
                .map_err(|error| error.to_string())
        };
        fetch
            .await
            .map_err(|reason| format!("cannot fetch program {digest}: {reason}"))?;
        verified.insert(digest);
        self.prune(&mut verified);
        Ok(path)
    }

    /// Removes the programs that were fetched longest ago. A process that runs one keeps it.
    fn prune(&self, verified: &mut BTreeSet<Digest>) {
        let Ok(entries) = std::fs::read_dir(&self.cache_dir) else {
            return;
        };
        let mut files: Vec<(SystemTime, PathBuf)> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        files.sort();
        let surplus = files.len().saturating_sub(CACHE_FILES_MAX);
        for (_, path) in files.into_iter().take(surplus) {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if let Ok(digest) = name.parse::<Digest>() {
                verified.remove(&digest);
            }
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove a cached program");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn an_artifact_is_fetched_verified_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store_dir = dir.path().join("store");
        let storage = StorageLocation {
            url: format!("file://{}", store_dir.display()),
            endpoint: None,
            region: None,
            allow_http: false,
            access_key_env: String::new(),
            secret_key_env: String::new(),
        };
        let source = dir.path().join("program");
        std::fs::write(&source, "#!/bin/sh\nexit 7\n").unwrap();
        let blobs = BlobStore::open(&storage.url, &S3Options::default()).unwrap();
        let id = ArtifactStore::new(blobs, 1 << 20)
            .put_file(&source)
            .await
            .unwrap();

        let programs = Programs::new("/builtin".into(), dir.path().join("cache"));
        let program = Program::Artifact {
            blake3: id.blake3.to_string(),
            size_bytes: id.size_bytes,
        };
        let path = programs.path(&program, &storage).await.unwrap();
        assert_eq!(
            std::fs::read(&path).unwrap(),
            std::fs::read(&source).unwrap()
        );
        assert_ne!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o100,
            0
        );

        // It is kept when the store is gone.
        std::fs::remove_dir_all(&store_dir).unwrap();
        assert_eq!(programs.path(&program, &storage).await.unwrap(), path);
        let missing = Program::Artifact {
            blake3: "ab".repeat(32),
            size_bytes: 3,
        };
        let error = programs.path(&missing, &storage).await.unwrap_err();
        assert!(error.starts_with("cannot fetch program abab"), "{error}");
        assert_eq!(
            programs
                .path(&Program::Builtin, &storage)
                .await
                .unwrap()
                .as_os_str(),
            "/builtin"
        );
    }
}
