//! Where the worker keeps its files, all below its data directory except, where that path is too
//! long for one, the Unix socket.
//!
//! Invariants:
//! 1. Directories with secrets or sockets are 0700 and belong to the agent's user.
//! 2. One agent a data directory: it holds a lock on it as long as it lives.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::WorkerError;

/// A Unix socket's path may have 107 bytes and a zero; some room is left for a temporary name.
const SOCKET_PATH_BYTES_MAX: usize = 100;

/// The places below one data directory.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    data_dir: PathBuf,
}

impl Paths {
    pub(crate) fn new(data_dir: &Path) -> Result<Paths, WorkerError> {
        fs::create_dir_all(data_dir).map_err(WorkerError::io("create", data_dir))?;
        let data_dir = fs::canonicalize(data_dir).map_err(WorkerError::io("open", data_dir))?;
        let paths = Paths { data_dir };
        for dir in [
            paths.identity(),
            paths.run(),
            paths.logs(),
            paths.artifacts(),
            paths.work(),
            paths.objects(),
        ] {
            private_dir(&dir).map_err(WorkerError::io("create", &dir))?;
        }
        Ok(paths)
    }

    pub(crate) fn identity(&self) -> PathBuf {
        self.data_dir.join("identity")
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.data_dir.join("run")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.data_dir.join("logs")
    }

    pub(crate) fn artifacts(&self) -> PathBuf {
        self.data_dir.join("artifacts")
    }

    /// Working directory of the hosts.
    pub(crate) fn work(&self) -> PathBuf {
        self.data_dir.join("work")
    }

    /// Objects that memory has no room for.
    pub(crate) fn objects(&self) -> PathBuf {
        self.data_dir.join("objects")
    }

    /// Takes the data directory; it is free again when the file is closed.
    pub(crate) fn lock(&self) -> Result<File, WorkerError> {
        let path = self.run().join("agent.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(WorkerError::io("open", &path))?;
        let operation = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        match rustix::fs::flock(&file, operation) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(WorkerError::DataDirInUse {
                path: self.data_dir.clone(),
            }),
            Err(error) => Err(WorkerError::io("lock", path)(error.into())),
        }
    }

    /// Where hosts reach the agent: below the data directory, or in a short private directory when
    /// that path is too long for a socket.
    pub(crate) fn agent_socket(&self) -> Result<PathBuf, WorkerError> {
        self.socket("agent.sock")
    }

    /// Where hosts reach the node's object store.
    pub(crate) fn object_socket(&self) -> Result<PathBuf, WorkerError> {
        self.socket("objects.sock")
    }

    fn socket(&self, name: &str) -> Result<PathBuf, WorkerError> {
        let path = self.run().join(name);
        if path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
            return Ok(path);
        }
        let base = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|dir| dir.is_dir() && dir.as_os_str().len() <= 60)
            .unwrap_or_else(|| PathBuf::from("/tmp"));
        // The lock on the data directory keeps two agents from the same name.
        let hash = fnv1a(self.data_dir.as_os_str().as_encoded_bytes());
        let dir = base.join(format!("mobula-{hash:016x}"));
        private_dir(&dir).map_err(WorkerError::io("create", &dir))?;
        Ok(dir.join(name))
    }
}

/// Creates `dir` with mode 0700; one that exists must belong to this user and to nobody else.
fn private_dir(dir: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let metadata = fs::symlink_metadata(dir)?;
    let is_private = metadata.is_dir()
        && metadata.uid() == rustix::process::geteuid().as_raw()
        && metadata.mode() & 0o077 == 0;
    if is_private {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        "exists and is not a directory that only this user can enter: remove it, or give it mode 0700",
    ))
}

/// Writes `bytes` to a file that only this user can read, whole or not at all.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// FNV-1a: a short name out of a long one, not a defence.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_in_the_same_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path()).unwrap();
        let lock = paths.lock().unwrap();
        let error = paths.lock().unwrap_err();
        assert!(matches!(error, WorkerError::DataDirInUse { .. }), "{error}");
        drop(lock);
        paths.lock().unwrap();
    }

    #[test]
    fn a_long_data_directory_gets_a_short_socket() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(&dir.path().join("d".repeat(120))).unwrap();
        let socket = paths.agent_socket().unwrap();
        assert!(
            socket.as_os_str().len() <= SOCKET_PATH_BYTES_MAX,
            "{socket:?}"
        );
        let mode = fs::metadata(socket.parent().unwrap()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
        fs::remove_dir(socket.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        fs::DirBuilder::new().mode(0o755).create(&open).unwrap();
        assert_eq!(
            private_dir(&open).unwrap_err().kind(),
            io::ErrorKind::PermissionDenied
        );
    }
}
