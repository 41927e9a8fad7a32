//! The output of host processes: where it is, how much is kept, and reading pieces of it.
//!
//! A host's standard output and error go straight into `logs/<job>/<name>-<incarnation>.log`, where
//! the name is the actor's for a process of its own and the host's for a shared one.
//!
//! Invariants:
//! 1. A log keeps its last 64 MiB on disk: what is older is punched out of the file (a hole reads
//!    as zeros), so offsets stay what they were and no line of a running process is lost.
//! 2. At most [`FILES_MAX`] log files are kept; the ones longest unchanged go first.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mobula_core::id::{ActorId, HostId, Incarnation, JobId};
use mobula_wire::session::LogFile;
use rustix::fs::FallocateFlags;

use crate::hosts::action::Key;
use crate::options::ACTORS_MAX;

/// How much of one log is kept on disk, in bytes: hours of ordinary output.
const KEPT_BYTES_MAX: u64 = 64 << 20;

/// Holes begin and end at whole blocks of any common file system.
const BLOCK_BYTES: u64 = 1 << 20;

/// Log files that are kept: about a week of a busy machine, and a directory that lists quickly.
const FILES_MAX: usize = 2_000;

/// The largest piece that is read at once, in bytes: well below the control lane's frame limit.
const PIECE_BYTES_MAX: u32 = 256 << 10;

/// How much of the end of a log goes into an exit reason, in bytes: a panic with its backtrace's
/// first lines, and still small enough to be replicated.
const TAIL_BYTES: u64 = 1_024;

/// Actors whose log is known by name, beyond those found by looking.
const INDEX_MAX: usize = 4 * ACTORS_MAX;

/// All logs of one worker.
#[derive(Debug)]
pub(crate) struct Logs {
    dir: PathBuf,
    hosts: BTreeMap<HostId, PathBuf>,
    actors: BTreeMap<Key, PathBuf>,
}

impl Logs {
    pub(crate) fn new(dir: PathBuf) -> Logs {
        Logs {
            dir,
            hosts: BTreeMap::new(),
            actors: BTreeMap::new(),
        }
    }

    /// Where a new host will write.
    pub(crate) fn assign(
        &mut self,
        host: HostId,
        job: JobId,
        owner: Option<Key>,
        node_incarnation: Incarnation,
    ) -> PathBuf {
        let name = match owner {
            Some((actor, incarnation)) => file_name(actor, incarnation),
            // Host ids begin anew with each agent; the node's incarnation tells them apart.
            None => format!("{host}-{}.log", node_incarnation.0),
        };
        let path = self.dir.join(job.to_string()).join(name);
        self.hosts.insert(host, path.clone());
        path
    }

    /// The actor's output is in the host's log.
    pub(crate) fn link(&mut self, key: Key, host: HostId) {
        if let Some(path) = self.hosts.get(&host) {
            self.actors.insert(key, path.clone());
        }
        if self.actors.len() > INDEX_MAX {
            self.actors.pop_first();
        }
    }

    /// The host writes no more.
    pub(crate) fn close(&mut self, host: HostId) {
        self.hosts.remove(&host);
    }

    /// The last output of a host, on one line.
    pub(crate) fn tail(&self, host: HostId) -> String {
        self.hosts
            .get(&host)
            .map(|path| tail(path))
            .unwrap_or_default()
    }

    /// Up to `limit_bytes` of an actor's output from `offset`; empty at the end, and where there
    /// is no such log.
    pub(crate) fn read(&self, key: Key, offset: u64, limit_bytes: u32) -> Vec<u8> {
        let Some(path) = self.actors.get(&key).cloned().or_else(|| self.find(key)) else {
            return Vec::new();
        };
        let limit = u64::from(limit_bytes.min(PIECE_BYTES_MAX));
        read_piece(&path, offset, limit).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "cannot read a log");
            Vec::new()
        })
    }

    /// Whether a process that runs writes to this actor's log: what is read is not the end then.
    pub(crate) fn is_open(&self, key: Key) -> bool {
        let path = self.actors.get(&key);
        path.is_some_and(|path| self.hosts.values().any(|open| open == path))
    }

    /// The logs of a job, in order of their names.
    pub(crate) fn of_job(&self, job: JobId) -> Vec<LogFile> {
        let dir = self.dir.join(job.to_string());
        let open: BTreeSet<&PathBuf> = self.hosts.values().collect();
        let mut files: Vec<LogFile> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                Some(LogFile {
                    name: path.file_stem()?.to_str()?.to_owned(),
                    size_bytes: fs::metadata(&path).ok()?.len(),
                    is_open: open.contains(&path),
                })
            })
            .collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files
    }

    /// Up to `limit_bytes` of the log `name` of a job from `offset`; empty at the end, and where there
    /// is no such log.
    pub(crate) fn read_named(
        &self,
        job: JobId,
        name: &str,
        offset: u64,
        limit_bytes: u32,
    ) -> Vec<u8> {
        // Names of ours are plain; anything else would lead elsewhere.
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if name.is_empty() || !name.chars().all(is_plain) {
            return Vec::new();
        }
        let path = self.dir.join(job.to_string()).join(format!("{name}.log"));
        let limit = u64::from(limit_bytes.min(PIECE_BYTES_MAX));
        read_piece(&path, offset, limit).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "cannot read a log");
            Vec::new()
        })
    }

    /// A log of an earlier life of this agent.
    fn find(&self, (actor, incarnation): Key) -> Option<PathBuf> {
        let name = file_name(actor, incarnation);
        fs::read_dir(&self.dir)
            .ok()?
            .filter_map(Result::ok)
            .map(|job| job.path().join(&name))
            .find(|path| path.is_file())
    }

    /// Keeps the logs of running hosts within their size.
    pub(crate) fn trim(&self) {
        for path in self.hosts.values() {
            if let Err(error) = trim(path, KEPT_BYTES_MAX) {
                tracing::warn!(path = %path.display(), %error, "cannot trim a log");
            }
        }
    }

    /// Removes the oldest files above the limit, and directories that are empty then.
    pub(crate) fn prune(&self) {
        self.prune_to(FILES_MAX);
    }

    fn prune_to(&self, files_max: usize) {
        let entries = |dir: &Path| {
            fs::read_dir(dir)
                .into_iter()
                .flatten()
                .filter_map(Result::ok)
                .map(|e| e.path())
        };
        let mut files: Vec<(SystemTime, PathBuf)> = entries(&self.dir)
            .flat_map(|job| entries(&job).collect::<Vec<_>>())
            .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
            .collect();
        files.sort();
        let surplus = files.len().saturating_sub(files_max);
        for (_, path) in files.into_iter().take(surplus) {
            let is_in_use = self.hosts.values().any(|used| *used == path);
            if !is_in_use
                && fs::remove_file(&path).is_ok()
                && let Some(job) = path.parent()
            {
                // Fails, as it should, while other logs are in it.
                let _ = fs::remove_dir(job);
            }
        }
    }
}

fn file_name(actor: ActorId, incarnation: Incarnation) -> String {
    format!("{actor}-{}.log", incarnation.0)
}

/// Opens a log to be written by a host; only this user can read it.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

fn tail(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let size = fs::metadata(path)?.len();
        read_piece(path, size.saturating_sub(TAIL_BYTES), TAIL_BYTES)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.trim().is_empty())
        .collect();
    // The first line is likely cut off; three whole ones say more than one and a half.
    let from = lines.len().saturating_sub(3);
    lines[from..].join(" | ")
}

fn read_piece(path: &Path, offset: u64, limit_bytes: u64) -> io::Result<Vec<u8>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(limit_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn trim(path: &Path, kept_bytes_max: u64) -> io::Result<()> {
    let file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    let on_disk_bytes = metadata.blocks() * 512;
    if on_disk_bytes <= kept_bytes_max + BLOCK_BYTES {
        return Ok(());
    }
    let hole_bytes = metadata.len().saturating_sub(kept_bytes_max) / BLOCK_BYTES * BLOCK_BYTES;
    if hole_bytes == 0 {
        return Ok(());
    }
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(&file, mode, 0, hole_bytes) {
        Ok(()) => Ok(()),
        // A file system without holes: the bound matters more than old output.
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(0),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const KEY: Key = (ActorId(3), Incarnation(7));

    #[test]
    fn pieces_are_read_by_actor_also_after_a_restart_of_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let mut logs = Logs::new(dir.path().to_path_buf());
        let path = logs.assign(HostId(1), JobId(2), Some(KEY), Incarnation(9));
        assert!(path.ends_with("job-2/actor-3-7.log"), "{path:?}");
        create(&path)
            .unwrap()
            .write_all(b"one\ntwo\n\nthree\nfour\n")
            .unwrap();
        logs.link(KEY, HostId(1));
        assert_eq!(logs.read(KEY, 4, 3), b"two");
        assert_eq!(logs.read(KEY, 1000, 3), b"");
        assert_eq!(logs.tail(HostId(1)), "two | three | four");
        assert!(logs.is_open(KEY));
        let listed = LogFile {
            name: "actor-3-7".into(),
            size_bytes: 20,
            is_open: true,
        };
        assert_eq!(logs.of_job(JobId(2)), [listed]);
        assert_eq!(logs.of_job(JobId(1)), []);
        assert_eq!(logs.read_named(JobId(2), "actor-3-7", 4, 3), b"two");
        assert_eq!(logs.read_named(JobId(1), "../job-2/actor-3-7", 4, 3), b"");
        logs.close(HostId(1));
        assert!(!logs.is_open(KEY));
        let reborn = Logs::new(dir.path().to_path_buf());
        assert_eq!(reborn.read(KEY, 0, 3), b"one");
        assert_eq!(reborn.read((ActorId(4), Incarnation(7)), 0, 3), b"");
    }

    #[test]
    fn a_large_log_keeps_its_end_and_its_offsets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let mut file = create(&path).unwrap();
        file.write_all(&vec![b'a'; 8 << 20]).unwrap();
        file.write_all(b"the end").unwrap();
        trim(&path, 2 << 20).unwrap();
        // Appended after the trim, as a running host does.
        file.write_all(b", and on").unwrap();
        let size = fs::metadata(&path).unwrap().len();
        assert_eq!(
            read_piece(&path, size - 15, 100).unwrap(),
            b"the end, and on"
        );
        assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 4 << 20);
    }

    #[test]
    fn the_oldest_files_are_pruned_but_not_those_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let mut logs = Logs::new(dir.path().to_path_buf());
        let used = logs.assign(HostId(1), JobId(1), Some(KEY), Incarnation(9));
        create(&used).unwrap();
        for number in 0..5u64 {
            let path = dir.path().join("job-2").join(format!("{number}.log"));
            let file = create(&path).unwrap();
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number + 10);
            file.set_modified(time).unwrap();
        }
        File::options()
            .write(true)
            .open(&used)
            .unwrap()
            .set_modified(SystemTime::UNIX_EPOCH)
            .unwrap();
        logs.prune_to(2);
        let left: Vec<_> = fs::read_dir(dir.path().join("job-2"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(left.contains(&"4.log".to_owned()) && left.contains(&"3.log".to_owned()));
        assert!(used.exists());
    }
}
