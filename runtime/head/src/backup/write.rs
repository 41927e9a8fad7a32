//! From what a head sends to a file.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mobula_net::identity::ClusterCa;
use mobula_storage::snapshot::{SnapshotScan, frame_around};

use super::{BackupError, KIND_IDENTITY, KIND_MANIFEST, MAGIC, Manifest, in_stream};

/// What is known of a backup before its first row.
pub struct BackupStart {
    /// The cluster's authority, with its key.
    pub ca: ClusterCa,
    /// The Raft id of the head that sends it.
    pub raft_id: u64,
    /// The version of that head.
    pub version: String,
    /// When, in milliseconds since the Unix epoch.
    pub made_ms: u64,
}

/// Writes a backup, checking each frame on its way.
pub struct BackupFile<W> {
    target: W,
    start: BackupStart,
    hasher: blake3::Hasher,
    scan: SnapshotScan,
    modules: BTreeMap<u8, u64>,
    before_rows_bytes: u64,
}

impl<W: Write> BackupFile<W> {
    /// Begins a backup.
    pub fn begin(target: W, start: BackupStart) -> Result<Self, Unwritten> {
        let identity = [start.ca.key_pem(), start.ca.certificate_pem()].concat();
        let mut file = BackupFile {
            target,
            hasher: blake3::Hasher::new(),
            // The disk is the bound.
            scan: SnapshotScan::new(u64::MAX),
            modules: BTreeMap::new(),
            before_rows_bytes: 0,
            start,
        };
        file.put(MAGIC)?;
        let identity = frame_around(KIND_IDENTITY, identity.as_bytes());
        file.put(&identity)?;
        file.before_rows_bytes = (MAGIC.len() + identity.len()) as u64;
        Ok(file)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Unwritten> {
        self.hasher.update(bytes);
        self.target.write_all(bytes).map_err(Unwritten::Write)
    }

    /// Takes the next frame of the snapshot's stream.
    pub fn push_frame(&mut self, frame: &[u8]) -> Result<(), Unwritten> {
        let modules = &mut self.modules;
        let mut count = |key: &[u8], _: &[u8]| {
            let module = key.first().copied().unwrap_or_default();
            *modules.entry(module).or_default() += 1;
        };
        self.scan.push_frame(frame, &mut count).map_err(|error| {
            let (_, reason) = in_stream(&error, 0);
            Unwritten::Stream(reason)
        })?;
        self.put(frame)
    }

    /// Ends it with its manifest; what it was written to is given back, flushed.
    pub fn finish(mut self) -> Result<(Manifest, W), Unwritten> {
        let place = match self.scan.place() {
            Some(place) if self.scan.is_complete() => place.applied,
            _ => return Err(Unwritten::Stream("it ended too early".to_owned())),
        };
        let (rows, rows_bytes) = self.scan.counts();
        let manifest = Manifest {
            cluster_id: self.start.ca.cluster_id().to_owned(),
            raft_id: self.start.raft_id,
            version: self.start.version.clone(),
            made_ms: self.start.made_ms,
            index: place.index,
            term: place.term,
            rows,
            rows_bytes,
            modules: self.modules.clone(),
            state_hash: self.scan.state_hash().to_hex().to_string(),
            file_hash: self.hasher.finalize().to_hex().to_string(),
        };
        let text = serde_json::to_vec(&manifest).expect("numbers and texts are JSON");
        self.put(&frame_around(KIND_MANIFEST, &text))?;
        self.target.flush().map_err(Unwritten::Write)?;
        Ok((manifest, self.target))
    }
}

/// Why a backup was not written to the end.
#[derive(Debug, thiserror::Error)]
pub enum Unwritten {
    /// Writing failed.
    #[error("the backup cannot be written: {0}; what was written of it is of no use")]
    Write(#[source] io::Error),
    /// What came is no whole stream.
    #[error("what the head sent is damaged ({0}); what was written of it is of no use: try again")]
    Stream(String),
}

/// A file that becomes a backup under its own name only when it is whole; dropped before that, it
/// leaves nothing.
pub struct BackupTarget {
    path: PathBuf,
    beside: PathBuf,
    file: Option<BackupFile<BufWriter<File>>>,
}

impl BackupTarget {
    /// Begins a backup that is to be `path`, where nothing may be.
    pub fn create(path: &Path, start: BackupStart) -> Result<Self, BackupError> {
        if path.symlink_metadata().is_ok() {
            return Err(BackupError::Exists {
                path: path.to_owned(),
            });
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".unfinished-{}", std::process::id()));
        let beside = path.with_file_name(name);
        let opened = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)
            .map_err(|error| BackupError::write(path, error))?;
        let mut target = BackupTarget {
            path: path.to_owned(),
            beside,
            file: None,
        };
        let begun = BackupFile::begin(BufWriter::new(opened), start);
        target.file = Some(begun.map_err(|failed| target.failed(failed))?);
        Ok(target)
    }

    fn failed(&self, failed: Unwritten) -> BackupError {
        match failed {
            Unwritten::Write(error) => BackupError::write(&self.path, error),
            Unwritten::Stream(reason) => BackupError::Stream(reason),
        }
    }

    /// Takes the next frame of the snapshot's stream.
    pub fn push_frame(&mut self, frame: &[u8]) -> Result<(), BackupError> {
        let file = self.file.as_mut().expect("it is there until the end");
        let pushed = file.push_frame(frame);
        pushed.map_err(|failed| self.failed(failed))
    }

    /// Syncs the file, reads it back, and gives it its name.
    pub fn finish(mut self) -> Result<Manifest, BackupError> {
        let file = self.file.take().expect("it is there until the end");
        let (manifest, buffered) = file.finish().map_err(|failed| self.failed(failed))?;
        let failed = |error| BackupError::write(&self.path, error);
        buffered
            .into_inner()
            .map_err(io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all())
            .map_err(failed)?;
        let found = super::verify(&self.beside).map_err(BackupError::ReadBack)?;
        if found != manifest {
            let reason = super::RestoreError::damaged(0, "its manifest is another one");
            return Err(BackupError::ReadBack(reason));
        }
        // Nobody may have made a file of that name meanwhile: a link, unlike a rename, replaces none.
        std::fs::hard_link(&self.beside, &self.path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => BackupError::Exists {
                path: self.path.clone(),
            },
            _ => failed(error),
        })?;
        let directory = self.path.parent().filter(|dir| !dir.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))
            .and_then(|directory| directory.sync_all())
            .map_err(failed)?;
        Ok(manifest)
    }
}

impl Drop for BackupTarget {
    fn drop(&mut self) {
        // It may be gone, or never have been made.
        let _ = std::fs::remove_file(&self.beside);
    }
}
