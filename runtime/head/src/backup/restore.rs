//! From a file to a data directory that a head can start on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use mobula_core::codec;
use mobula_core::control::{Command, ModuleId, Origin};
use mobula_core::id::SessionId;
use mobula_scheduler::Command as SchedulerCommand;
use mobula_storage::engine::{
    Column, Durability, Engine, EngineError, RocksEngine, RocksOptions, WriteBatch,
};
use mobula_storage::raft_log::{LogPoint, RaftLog, RaftLogError};
use mobula_storage::tables::state_hash;
use raft::eraftpb::{ConfState, Entry, HardState};

use super::read::{self, Contents};
use super::{Manifest, RestoreError};
use crate::bootstrap::{self, HeadRecord};
use crate::raft::HeadCommand;

/// There while a restore is under way: a directory with it holds no head's state.
const MARKER_FILE: &str = "restore_unfinished";

/// How far behind the backup's entry the restored log begins. What the old group gave out after the
/// backup (Raft ids, and incarnations of actors and nodes, are indexes) must lie in between: a
/// thousand entries a second for thirty years.
const INDEX_GAP: u64 = 1 << 40;

/// How far above the backup's term the restored group begins: two elections a second for six days.
const TERM_GAP: u64 = 1 << 20;

/// How many ids of each kind are left out, for those that the old group gave out after the backup:
/// they name things in the object store.
const IDS_LEFT_OUT: u64 = 1_000_000;

/// Rows that are written at once.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// What a file system puts into a directory by itself.
const LOST_AND_FOUND: &str = "lost+found";

/// How a backup is restored.
pub struct RestoreOptions {
    /// The directory of the head that is to be: empty, or not there yet.
    pub data_dir: PathBuf,
    /// The head's name.
    pub name: String,
    /// The modules that this binary has, beside the scheduler.
    pub modules: Vec<ModuleId>,
    /// The time, in milliseconds since the Unix epoch.
    pub now_ms: u64,
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What the backup is of.
    pub manifest: Manifest,
    /// The Raft id of the one head of the restored group.
    pub raft_id: u64,
    /// The term in which it begins.
    pub term: u64,
}

/// Whether a restore into `data_dir` broke off.
pub(crate) fn is_unfinished(data_dir: &Path) -> bool {
    data_dir.join(MARKER_FILE).exists()
}

/// Makes the backup in `file` the state of a group of one head, with the identity of the old cluster,
/// in an empty directory.
pub fn restore(file: &Path, options: &RestoreOptions) -> Result<Restored, RestoreError> {
    let data_dir = &options.data_dir;
    check_empty(data_dir)?;
    let contents = read::read(file, &mut |_, _| {})?;
    check_modules(&contents.manifest, &options.modules)?;
    let needed_bytes = contents.manifest.rows_bytes;
    let existed = data_dir.exists();
    let written = write(file, &contents, options);
    if written.is_err() {
        remove_what_was_written(data_dir, existed);
    }
    let raft_id = written.map_err(|failure| failure.typed(data_dir, needed_bytes))?;
    Ok(Restored {
        raft_id,
        term: contents.manifest.term + TERM_GAP,
        manifest: contents.manifest,
    })
}

fn check_empty(data_dir: &Path) -> Result<(), RestoreError> {
    let failed = |source| RestoreError::write(data_dir, source, 0);
    let entries = match fs::read_dir(data_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let found = entry.map_err(failed)?.file_name();
        if found != LOST_AND_FOUND {
            return Err(RestoreError::NotEmpty {
                path: data_dir.to_owned(),
                found: found.to_string_lossy().into_owned(),
            });
        }
    }
    Ok(())
}

fn check_modules(manifest: &Manifest, modules: &[ModuleId]) -> Result<(), RestoreError> {
    let own = [ModuleId::HEADS, ModuleId::SCHEDULER, ModuleId::KEPT];
    let unknown: Vec<u8> = manifest
        .module_ids()
        .filter(|id| !own.contains(id) && !modules.contains(id))
        .map(|id| id.0)
        .collect();
    if unknown.is_empty() {
        return Ok(());
    }
    Err(RestoreError::UnknownModules {
        version: manifest.version.clone(),
        modules: unknown,
        ours: env!("CARGO_PKG_VERSION"),
    })
}

/// The directory was empty, so everything in it is from here.
fn remove_what_was_written(data_dir: &Path, existed: bool) {
    // What cannot be removed is refused by the marker, or by not being empty.
    if !existed {
        let _ = fs::remove_dir_all(data_dir);
        return;
    }
    let entries = fs::read_dir(data_dir).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name() != LOST_AND_FOUND) {
        let path = entry.path();
        let _ = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
    }
}

/// What failed while a restored state was written.
enum Failure {
    File(PathBuf, std::io::Error),
    Engine(EngineError),
    Other(RestoreError),
}

impl Failure {
    fn typed(self, data_dir: &Path, needed_bytes: u64) -> RestoreError {
        match self {
            Failure::File(_, error) if error.kind() == std::io::ErrorKind::StorageFull => {
                RestoreError::write(data_dir, error, needed_bytes)
            }
            Failure::File(path, error) => RestoreError::write(&path, error, needed_bytes),
            Failure::Engine(error) => RestoreError::engine(error, needed_bytes),
            Failure::Other(error) => error,
        }
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Failure::Engine(error)
    }
}

impl From<RaftLogError> for Failure {
    fn from(error: RaftLogError) -> Self {
        match error {
            RaftLogError::Engine(error) => Failure::Engine(error),
            error => Failure::Other(RestoreError::Store(error.to_string())),
        }
    }
}

fn identity(error: &dyn std::fmt::Display) -> Failure {
    Failure::Other(RestoreError::Identity(error.to_string()))
}

/// Writes everything; the Raft id of the head.
fn write(file: &Path, contents: &Contents, options: &RestoreOptions) -> Result<u64, Failure> {
    let data_dir = &options.data_dir;
    let marker = data_dir.join(MARKER_FILE);
    let made = |path: &Path| {
        let path = path.to_owned();
        move |error| Failure::File(path, error)
    };
    bootstrap::create_private_dir(data_dir).map_err(of_bootstrap)?;
    File::create(&marker)
        .and_then(|marker| marker.sync_all())
        .map_err(made(&marker))?;

    let raft_id = write_store(file, &contents.manifest, options)?;

    contents
        .ca
        .save(&data_dir.join("ca"))
        .map_err(|error| identity(&error))?;
    let record = HeadRecord {
        raft_id,
        name: options.name.clone(),
        joined: false,
        has_log: true,
        heads: Vec::new(),
    };
    bootstrap::store_identity(data_dir, contents.ca.cluster_id(), &record).map_err(of_bootstrap)?;
    fs::remove_file(&marker)
        .and_then(|()| File::open(data_dir)?.sync_all())
        .map_err(made(data_dir))?;
    Ok(raft_id)
}

fn of_bootstrap(error: crate::HeadError) -> Failure {
    match error {
        crate::HeadError::DataDir { path, source } => Failure::File(path, source),
        error => identity(&error),
    }
}

fn write_store(file: &Path, manifest: &Manifest, options: &RestoreOptions) -> Result<u64, Failure> {
    let engine = RocksEngine::open(options.data_dir.join("raft"), &RocksOptions::small())?;
    write_rows(file, &engine)?;
    let found = state_hash(&engine)?.to_hex().to_string();
    if found != manifest.state_hash {
        return Err(Failure::Other(RestoreError::HashDiffers {
            path: options.data_dir.clone(),
            expected: manifest.state_hash.clone(),
            found,
        }));
    }
    let log = RaftLog::open(engine)?;
    // Raft ids are indexes of the log, and this one is nobody's: no entry has it.
    let start = LogPoint {
        index: manifest.index + INDEX_GAP,
        term: manifest.term + TERM_GAP,
    };
    let raft_id = start.index;
    log.bind_member(raft_id)?;
    let members = ConfState {
        voters: vec![raft_id],
        ..ConfState::default()
    };
    let entries = first_entries(start, options.now_ms);
    let mut write = log.begin();
    write.reset_to(start, &members);
    write.append(&entries)?;
    write.set_hard_state(&HardState {
        term: start.term,
        vote: 0,
        commit: start.index + entries.len() as u64,
    });
    log.commit(write, Durability::Synced)?;
    Ok(raft_id)
}

fn write_rows(file: &Path, engine: &RocksEngine) -> Result<(), Failure> {
    let mut batch = WriteBatch::new();
    let mut failed = None;
    let flush = |batch: &mut WriteBatch| engine.write(std::mem::take(batch), Durability::Buffered);
    let again = read::read(file, &mut |key, value| {
        if failed.is_some() {
            return;
        }
        batch.put(Column::State, key, value);
        if batch.size_bytes() >= BATCH_BYTES {
            failed = flush(&mut batch).err();
        }
    });
    // What cannot be written says more than what was read meanwhile.
    if let Some(error) = failed {
        return Err(error.into());
    }
    again.map_err(Failure::Other)?;
    Ok(flush(&mut batch)?)
}

/// The restore has one record in the audit log, of whoever could read the file.
fn origin(module: ModuleId) -> Option<Origin> {
    (module == ModuleId::HEADS).then(|| Origin {
        principal: "whoever had the backup".to_owned(),
        call: "Restore".to_owned(),
    })
}

/// What a restored group does before anything else: the heads of before are members no more, and
/// what may have been given out since the backup is left out.
fn first_entries(start: LogPoint, now_ms: u64) -> Vec<Entry> {
    let commands = [
        (ModuleId::HEADS, HeadCommand::Restored.encode()),
        (
            ModuleId::SCHEDULER,
            SchedulerCommand::Restored {
                ids_left_out: IDS_LEFT_OUT,
            }
            .encode(),
        ),
    ];
    let indexes = start.index + 1..;
    indexes
        .zip(commands)
        .map(|(index, (module, payload))| {
            let command = Command {
                session: SessionId::INTERNAL,
                seq: 0,
                now_ms,
                module,
                payload,
                origin: origin(module),
            };
            Entry {
                index,
                term: start.term,
                data: codec::encode_plain(&command),
                ..Entry::default()
            }
        })
        .collect()
}
