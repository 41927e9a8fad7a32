//! Backups that are whole, and those that are not.

use std::path::PathBuf;

use mobula_storage::engine::{
    Column, Durability, Engine, MemoryEngine, MemorySnapshot, RocksEngine, RocksOptions, WriteBatch,
};
use mobula_storage::raft_log::{LogPoint, RaftLog};
use mobula_storage::snapshot::{SnapshotExport, SnapshotPlace};
use mobula_storage::tables::state_hash;
use raft::eraftpb::ConfState;

use super::*;

/// A disk of its own for each test.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes bytes into a file of their own.
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn options(&self, name: &str) -> RestoreOptions {
        RestoreOptions {
            data_dir: self.path(name),
            name: "head-1".to_owned(),
            modules: vec![ModuleId(7)],
            now_ms: 5_000,
        }
    }
}

fn tables() -> MemoryEngine {
    let engine = MemoryEngine::new();
    let mut batch = WriteBatch::new();
    for number in 0..200_u8 {
        let key = [number % 2 * 7, 1, number];
        batch.put(Column::State, key, vec![number; usize::from(number)]);
    }
    engine.write(batch, Durability::Synced).unwrap();
    engine
}

fn start() -> BackupStart {
    BackupStart {
        ca: mobula_net::identity::ClusterCa::create("c-1").unwrap(),
        raft_id: 3,
        version: "1.2.3".to_owned(),
        made_ms: 4_000,
    }
}

fn export(engine: &MemoryEngine) -> SnapshotExport<MemorySnapshot> {
    let place = SnapshotPlace {
        applied: LogPoint { index: 99, term: 4 },
        conf_state: ConfState {
            voters: vec![1, 3],
            ..ConfState::default()
        },
    };
    SnapshotExport::new(engine.snapshot(), place)
}

/// A backup in memory.
fn backup_of(engine: &MemoryEngine) -> (Manifest, Vec<u8>) {
    let mut file = BackupFile::begin(Vec::new(), start()).unwrap();
    let mut export = export(engine);
    while let Some(frame) = export.next_frame().unwrap() {
        file.push_frame(&frame).unwrap();
    }
    file.finish().unwrap()
}

#[test]
fn what_is_restored_has_the_hash_of_what_was_backed_up_and_fences_the_old_group() {
    let place = Place::new();
    let engine = tables();
    let (manifest, bytes) = backup_of(&engine);
    assert_eq!((manifest.index, manifest.term, manifest.rows), (99, 4, 200));
    assert_eq!(manifest.modules, BTreeMap::from([(0, 100), (7, 100)]));
    let hash = state_hash(&engine).unwrap();
    assert_eq!(manifest.state_hash, hash.to_hex().as_str());
    let file = place.file("backup", &bytes);
    assert_eq!(verify(&file).unwrap(), manifest);

    let options = place.options("restored");
    let restored = restore(&file, &options).unwrap();
    assert_eq!(restored.manifest, manifest);
    assert!(restored.raft_id > 1 << 40 && restored.term > 1 << 20);
    let engine = RocksEngine::open(options.data_dir.join("raft"), &RocksOptions::small()).unwrap();
    assert_eq!(state_hash(&engine).unwrap(), hash);
    let log = RaftLog::open(engine).unwrap();
    assert_eq!(log.member().unwrap(), Some(restored.raft_id));
    assert_eq!(log.conf_state().voters, [restored.raft_id]);
    let applied = log.applied();
    assert_eq!(
        (applied.index, applied.term),
        (restored.raft_id, restored.term)
    );
    assert_eq!(
        log.hard_state().commit,
        log.last().index,
        "its first entries are committed"
    );
    assert!(log.last().index > applied.index, "and not applied yet");
    let ca = mobula_net::identity::ClusterCa::load(&options.data_dir.join("ca")).unwrap();
    assert_eq!(ca.cluster_id(), "c-1");
    assert!(!is_unfinished(&options.data_dir));
    // Once is enough.
    let again = restore(&file, &options).unwrap_err();
    assert!(matches!(again, RestoreError::NotEmpty { .. }), "{again}");
}

#[test]
fn a_backup_that_is_cut_or_changed_anywhere_is_refused_and_nothing_is_written() {
    let place = Place::new();
    let (_, bytes) = backup_of(&tables());
    let options = place.options("restored");
    let refused = |what: &str, bytes: &[u8]| {
        let file = place.file("damaged", bytes);
        let error = restore(&file, &options).unwrap_err();
        assert!(!options.data_dir.exists(), "{what}: {error}");
        error
    };
    // Each part of the file, and its ends.
    let mut places: Vec<usize> = (0..bytes.len()).step_by(97).collect();
    places.extend([0, 14, 15, 16, 17, 20, bytes.len() - 1]);
    for at in places {
        let cut = refused(&format!("cut at {at}"), &bytes[..at]);
        assert!(
            matches!(
                cut,
                RestoreError::Damaged { .. } | RestoreError::NotABackup { .. }
            ),
            "cut at {at}: {cut}"
        );
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        refused(&format!("changed at {at}"), &changed);
    }
    let longer = refused("longer", &[bytes.as_slice(), b"x"].concat());
    assert!(
        longer.to_string().contains("follows the manifest"),
        "{longer}"
    );
    let other = refused(
        "of another format",
        &[b"mobula backup 2\n", &bytes[16..]].concat(),
    );
    assert!(other.to_string().contains("format `2`"), "{other}");
    let foreign = refused("something else", b"PK\x03\x04 and so on, for some bytes");
    assert!(
        matches!(foreign, RestoreError::NotABackup { .. }),
        "{foreign}"
    );
    // The rows of one backup with the manifest of another one.
    let engine = tables();
    let mut batch = WriteBatch::new();
    batch.delete(Column::State, [0, 1, 0]);
    engine.write(batch, Durability::Synced).unwrap();
    let (_, others) = backup_of(&engine);
    let manifest_at = |bytes: &[u8]| {
        let start = bytes.windows(12).rposition(|part| part == b"{\"cluster_id");
        start.unwrap() - 5
    };
    let mixed = [
        &bytes[..manifest_at(&bytes)],
        &others[manifest_at(&others)..],
    ]
    .concat();
    let mixed = refused("mixed", &mixed);
    assert!(mixed.to_string().contains("of other contents"), "{mixed}");
}

#[test]
fn a_directory_that_holds_something_and_modules_that_nobody_knows_are_refused() {
    let place = Place::new();
    let (_, bytes) = backup_of(&tables());
    let file = place.file("backup", &bytes);
    let mut options = place.options("restored");
    options.modules.clear();
    let unknown = restore(&file, &options).unwrap_err();
    assert!(unknown.to_string().contains("modules [7]"), "{unknown}");
    std::fs::create_dir(&options.data_dir).unwrap();
    let kept = options.data_dir.join("head.json");
    std::fs::write(&kept, "{}").unwrap();
    let full = restore(&file, &options).unwrap_err();
    assert!(full.to_string().contains("`head.json`"), "{full}");
    assert!(kept.exists());
}

#[test]
fn a_restore_that_broke_off_is_no_head() {
    let place = Place::new();
    let dir = place.path("head");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("restore_unfinished"), "").unwrap();
    let refused = crate::bootstrap::HeadIdentity::load_or_create(&dir, None)
        .err()
        .unwrap();
    assert!(refused.to_string().contains("restore again"), "{refused}");
}

#[test]
fn a_file_gets_its_name_when_it_is_whole_and_replaces_none() {
    let place = Place::new();
    let engine = tables();
    let path = place.path("backup");
    let frames = || {
        let mut export = export(&engine);
        std::iter::from_fn(move || export.next_frame().unwrap())
    };
    // One that breaks off, and one in which a frame was damaged on the way.
    let mut target = BackupTarget::create(&path, start()).unwrap();
    target.push_frame(&frames().next().unwrap()).unwrap();
    let early = target.finish().unwrap_err();
    assert!(matches!(early, BackupError::Stream(_)), "{early}");
    let mut target = BackupTarget::create(&path, start()).unwrap();
    let mut damaged = frames().next().unwrap();
    damaged[7] ^= 1;
    let error = target.push_frame(&damaged).unwrap_err();
    assert!(matches!(error, BackupError::Stream(_)), "{error}");
    drop(target);
    assert_eq!(std::fs::read_dir(place.0.path()).unwrap().count(), 0);

    let mut target = BackupTarget::create(&path, start()).unwrap();
    for frame in frames() {
        target.push_frame(&frame).unwrap();
    }
    let manifest = target.finish().unwrap();
    assert_eq!(verify(&path).unwrap(), manifest);
    let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(place.0.path()).unwrap().count(), 1);
    let exists = BackupTarget::create(&path, start()).err().unwrap();
    assert!(matches!(exists, BackupError::Exists { .. }), "{exists}");
}
