//! The working directory of each job on this worker, and the files that its submitter shipped.
//!
//! A job's processes on one worker share `work/<job>`. It is scratch space: it is made before the
//! first of them starts, and removed once the last has ended.
//!
//! Invariants:
//! 1. A file is there, whole, read-only and with the hash that the leader named, before any process
//!    of the job starts.
//! 2. No name leads out of the directory: names are checked here again, whatever the leader did.
//! 3. A directory is never removed while a process of its job runs or is being launched.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mobula_core::id::{HostId, JobId};
use mobula_core::spec::{JobFile, Program, check_files};
use mobula_wire::session::StorageLocation;
use tokio::sync::Mutex;

use super::program::Programs;

/// The working directories of one worker.
#[derive(Debug)]
pub(crate) struct JobDirs {
    work_dir: PathBuf,
    /// Held while a directory is filled or removed: one job's files at a time share the disk and
    /// the network anyway.
    jobs: Mutex<BTreeMap<JobId, JobDir>>,
}

#[derive(Debug, Default)]
struct JobDir {
    hosts: BTreeSet<HostId>,
    placed: BTreeMap<JobFile, Stamp>,
}

/// What a file looked like when it was placed: whoever writes to it changes this.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size_bytes: u64,
    changed: (i64, i64),
}

impl JobDirs {
    /// Directories in `work_dir`. What an earlier life of this agent left there is removed: its
    /// processes have ended with it.
    pub(crate) fn new(work_dir: PathBuf) -> JobDirs {
        for entry in fs::read_dir(&work_dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with("job-")) {
                remove(&entry.path());
            }
        }
        JobDirs {
            work_dir,
            jobs: Mutex::default(),
        }
    }

    fn path(&self, job: JobId) -> PathBuf {
        self.work_dir.join(job.to_string())
    }

    /// The job's directory with its files in it, kept until `release` of this host; the error is
    /// for people.
    pub(crate) async fn prepare(
        &self,
        host: HostId,
        job: JobId,
        files: &[JobFile],
        programs: &Programs,
        storage: &StorageLocation,
    ) -> Result<PathBuf, String> {
        check_files(files)?;
        let path = self.path(job);
        let mut jobs = self.jobs.lock().await;
        let dir = jobs.entry(job).or_default();
        dir.hosts.insert(host);
        create_private(&path).map_err(|error| cannot("create", &path, &error))?;
        for file in files {
            let target = path.join(&file.name);
            if dir.placed.contains_key(file) && dir.placed.get(file) == stamp(&target).as_ref() {
                continue;
            }
            let artifact = Program::Artifact {
                blake3: file.blake3.clone(),
                size_bytes: file.size_bytes,
            };
            let source = programs.path(&artifact, storage).await?;
            let placing = (path.clone(), target.clone());
            tokio::task::spawn_blocking(move || place(&source, &placing.0, &placing.1))
                .await
                .map_err(|error| error.to_string())?
                .map_err(|error| cannot("place", &target, &error))?;
            if let Some(stamp) = stamp(&target) {
                dir.placed.insert(file.clone(), stamp);
            }
        }
        Ok(path)
    }

    /// This host needs the directory no more; with the last one it goes.
    pub(crate) async fn release(&self, host: HostId) {
        let mut jobs = self.jobs.lock().await;
        let held = jobs.iter_mut().find(|(_, dir)| dir.hosts.contains(&host));
        if let Some((job, dir)) = held
            && dir.hosts.remove(&host)
            && dir.hosts.is_empty()
        {
            let job = *job;
            jobs.remove(&job);
            let path = self.path(job);
            // Removed under the lock, so that a launch that comes now fills a fresh one.
            let removal = tokio::task::spawn_blocking(move || remove(&path));
            if let Err(error) = removal.await {
                tracing::warn!(%job, %error, "removing a working directory went wrong");
            }
        }
    }
}

fn cannot(what: &str, path: &Path, error: &dyn std::fmt::Display) -> String {
    format!("cannot {what} `{}`: {error}", path.display())
}

fn create_private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Copies `source` to `target`, which appears whole and read-only; folders between are made.
fn place(source: &Path, dir: &Path, target: &Path) -> io::Result<()> {
    let parent = target.parent().unwrap_or(dir);
    create_private(parent)?;
    // A link that the job made must not lead the agent elsewhere.
    if !parent.canonicalize()?.starts_with(dir.canonicalize()?) {
        return Err(io::Error::other(
            "a link leads out of the working directory",
        ));
    }
    let temporary = tempfile::NamedTempFile::new_in(parent)?;
    fs::copy(source, temporary.path())?;
    fs::set_permissions(temporary.path(), Permissions::from_mode(0o444))?;
    temporary.persist(target).map_err(|error| error.error)?;
    Ok(())
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::symlink_metadata(path).ok()?;
    metadata.is_file().then(|| Stamp {
        inode: metadata.ino(),
        size_bytes: metadata.len(),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

fn remove(path: &Path) {
    match fs::remove_dir_all(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot remove a working directory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_storage::artifact::ArtifactStore;
    use mobula_storage::blob::{BlobStore, S3Options};

    const JOB: JobId = JobId(3);

    struct Stage {
        dir: tempfile::TempDir,
        storage: StorageLocation,
        programs: Programs,
    }

    impl Stage {
        fn new() -> Stage {
            let dir = tempfile::tempdir().unwrap();
            let storage = StorageLocation {
                url: format!("file://{}", dir.path().join("store").display()),
                endpoint: None,
                region: None,
                allow_http: false,
                access_key_env: String::new(),
                secret_key_env: String::new(),
            };
            let programs = Programs::new("/builtin".into(), dir.path().join("cache"));
            Stage {
                dir,
                storage,
                programs,
            }
        }

        async fn stored(&self, name: &str, text: &str) -> JobFile {
            let source = self.dir.path().join("source");
            fs::write(&source, text).unwrap();
            let blobs = BlobStore::open(&self.storage.url, &S3Options::default()).unwrap();
            let id = ArtifactStore::new(blobs, 1 << 20)
                .put_file(&source)
                .await
                .unwrap();
            JobFile {
                name: name.to_owned(),
                blake3: id.blake3.to_string(),
                size_bytes: id.size_bytes,
            }
        }

        async fn prepare(
            &self,
            dirs: &JobDirs,
            host: u64,
            files: &[JobFile],
        ) -> Result<PathBuf, String> {
            dirs.prepare(HostId(host), JOB, files, &self.programs, &self.storage)
                .await
        }
    }

    #[tokio::test]
    async fn files_are_there_read_only_as_long_as_a_host_is() {
        let stage = Stage::new();
        let work = stage.dir.path().join("work");
        fs::create_dir_all(work.join("job-9/left")).unwrap();
        let dirs = JobDirs::new(work.clone());
        assert!(!work.join("job-9").exists(), "an earlier life's directory");
        let files = [
            stage.stored("data/a.txt", "alpha").await,
            stage.stored("empty", "").await,
        ];
        let path = stage.prepare(&dirs, 1, &files).await.unwrap();
        assert_eq!(path, work.join("job-3"));
        let file = path.join("data/a.txt");
        assert_eq!(fs::read_to_string(&file).unwrap(), "alpha");
        assert_eq!(fs::read(path.join("empty")).unwrap(), b"");
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o444);
        // What a process of the job replaced is put right for the next one.
        fs::remove_file(&file).unwrap();
        fs::write(&file, "wrong").unwrap();
        stage.prepare(&dirs, 2, &files).await.unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "alpha");
        dirs.release(HostId(1)).await;
        assert!(file.exists(), "host 2 is still there");
        dirs.release(HostId(2)).await;
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn nothing_is_placed_outside() {
        let stage = Stage::new();
        let dirs = JobDirs::new(stage.dir.path().join("work"));
        let file = stage.stored("../escape", "x").await;
        let error = stage.prepare(&dirs, 1, &[file]).await.unwrap_err();
        assert!(error.contains("cannot be the name of a file"), "{error}");
        // A link that the job itself made.
        let path = stage.prepare(&dirs, 1, &[]).await.unwrap();
        let outside = stage.dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, path.join("data")).unwrap();
        let file = stage.stored("data/a.txt", "x").await;
        let error = stage.prepare(&dirs, 2, &[file]).await.unwrap_err();
        assert!(error.contains("leads out of"), "{error}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
}
