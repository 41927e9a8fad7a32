//! A head's first start: cluster id, certificate authority, its own certificate, first tokens.
//!
//! Everything lies in the data directory: `head.json`, `cluster_id`, `ca/`, `identity/`, `tokens/`,
//! `raft/`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mobula_net::identity::{ClusterCa, Credentials, Identity, Role, Validity};
use rand::RngCore;
use serde::{Deserialize, Serialize};

use crate::backup;
use crate::error::HeadError;
use crate::raft::Member;

/// How long a head's certificate lives; it is renewed at half of that.
const CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 3600);

/// The Raft id of a group's first member; all later ones are indexes of the log, which are larger.
const FIRST_RAFT_ID: u64 = 1;

/// The file with the head's record of itself.
const RECORD_FILE: &str = "head.json";

/// The file with a token for whoever may join as a worker.
pub const WORKER_TOKEN_FILE: &str = "tokens/worker.token";
/// The file with a token for whoever may use the control API.
pub const CLIENT_TOKEN_FILE: &str = "tokens/client.token";

/// Who this head is.
pub(crate) struct HeadIdentity {
    pub(crate) cluster_id: String,
    pub(crate) ca: Arc<ClusterCa>,
    pub(crate) credentials: Credentials,
    pub(crate) record: HeadRecord,
    data_dir: PathBuf,
}

/// What a head keeps about itself beside its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HeadRecord {
    /// Its id in Raft, for this life of its disk.
    pub(crate) raft_id: u64,
    /// Its name.
    pub(crate) name: String,
    /// Whether it joined a group, instead of beginning one.
    pub(crate) joined: bool,
    /// Whether its log was there once: if it is not any more, the id is used up.
    pub(crate) has_log: bool,
    /// The heads that it knew when it joined.
    pub(crate) heads: Vec<Member>,
}

impl HeadIdentity {
    /// Whether an earlier start left an identity in `data_dir`.
    pub(crate) fn exists(data_dir: &Path) -> bool {
        data_dir.join(RECORD_FILE).exists()
    }

    /// Reads what an earlier start left in `data_dir`, or makes it: a first head of a new cluster.
    pub(crate) fn load_or_create(data_dir: &Path, name: Option<&str>) -> Result<Self, HeadError> {
        if backup::is_unfinished(data_dir) {
            return Err(HeadError::UnfinishedRestore {
                data_dir: data_dir.to_owned(),
            });
        }
        create_private_dir(data_dir)?;
        let record = match read_record(data_dir)? {
            Some(record) => record,
            None => {
                let record = HeadRecord {
                    raft_id: FIRST_RAFT_ID,
                    name: name.unwrap_or("head-1").to_owned(),
                    joined: false,
                    has_log: false,
                    heads: Vec::new(),
                };
                write_record(data_dir, &record)?;
                record
            }
        };
        let cluster_id = load_or_create_cluster_id(data_dir)?;
        let ca = ClusterCa::load_or_create(&data_dir.join("ca"), &cluster_id)
            .map_err(|error| identity_error(&error))?;
        let credentials = load_or_issue_own(&ca, &cluster_id, &record, &identity_dir(data_dir))?;
        Ok(HeadIdentity {
            cluster_id,
            ca: Arc::new(ca),
            credentials,
            record,
            data_dir: data_dir.to_owned(),
        })
    }

    /// Stores what a join has brought. The record comes last: without it there is no identity.
    pub(crate) fn store_joined(
        data_dir: &Path,
        ca: &ClusterCa,
        credentials: &Credentials,
        record: &HeadRecord,
    ) -> Result<(), HeadError> {
        create_private_dir(data_dir)?;
        ca.save(&data_dir.join("ca"))
            .map_err(|error| identity_error(&error))?;
        let dir = identity_dir(data_dir);
        create_private_dir(&dir)?;
        save(credentials, &dir)?;
        store_identity(data_dir, ca.cluster_id(), record)
    }

    /// Notes that the log is there.
    pub(crate) fn note_log(&mut self) -> Result<(), HeadError> {
        if self.record.has_log {
            return Ok(());
        }
        self.record.has_log = true;
        write_record(&self.data_dir, &self.record)
    }

    /// A new certificate for this head, kept like the one before.
    pub(crate) fn renew(&self) -> Result<Credentials, HeadError> {
        let identity = self.credentials.identity();
        let credentials = issue(&self.ca, identity)?;
        save(&credentials, &identity_dir(&self.data_dir))?;
        Ok(credentials)
    }
}

/// Stores who a head is that starts on what was restored. The record comes last: without it there is no
/// identity.
pub(crate) fn store_identity(
    data_dir: &Path,
    cluster_id: &str,
    record: &HeadRecord,
) -> Result<(), HeadError> {
    write_private(&data_dir.join("cluster_id"), cluster_id)?;
    write_record(data_dir, record)
}

fn identity_error(error: &dyn std::fmt::Display) -> HeadError {
    HeadError::Identity {
        reason: error.to_string(),
    }
}

fn read_record(data_dir: &Path) -> Result<Option<HeadRecord>, HeadError> {
    let path = data_dir.join(RECORD_FILE);
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| HeadError::DataDir {
                path,
                source: error.into(),
            }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(HeadError::DataDir { path, source }),
    }
}

fn write_record(data_dir: &Path, record: &HeadRecord) -> Result<(), HeadError> {
    let text = serde_json::to_string_pretty(record).expect("numbers and texts are JSON");
    write_private(&data_dir.join(RECORD_FILE), &text)
}

fn identity_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("identity")
}

/// The key is kept over restarts: peers of the process before then learn at once, by a stateless
/// reset, that it is gone, instead of waiting for a timeout.
fn load_or_issue_own(
    ca: &ClusterCa,
    cluster_id: &str,
    record: &HeadRecord,
    dir: &Path,
) -> Result<Credentials, HeadError> {
    create_private_dir(dir)?;
    if let Ok(credentials) = Credentials::load(dir)
        && SystemTime::now() < credentials.renew_at()
        && credentials.ca_key_hash() == ca.key_hash()
        && credentials.identity().incarnation == record.raft_id
    {
        return Ok(credentials);
    }
    let identity = Identity::new(cluster_id, Role::Head, &record.name, record.raft_id);
    let credentials = issue(ca, &identity)?;
    save(&credentials, dir)?;
    Ok(credentials)
}

fn issue(ca: &ClusterCa, identity: &Identity) -> Result<Credentials, HeadError> {
    ca.issue_with_new_key(identity, Validity::for_ttl(CERTIFICATE_TTL))
        .map_err(|source| HeadError::Identity {
            reason: source.to_string(),
        })
}

fn save(credentials: &Credentials, dir: &Path) -> Result<(), HeadError> {
    credentials.save(dir).map_err(|source| HeadError::Identity {
        reason: source.to_string(),
    })
}

fn load_or_create_cluster_id(data_dir: &Path) -> Result<String, HeadError> {
    let path = data_dir.join("cluster_id");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id = format!("{:016x}", rand::rng().next_u64());
            write_private(&path, &id)?;
            Ok(id)
        }
        Err(source) => Err(HeadError::DataDir { path, source }),
    }
}

/// Creates a directory that only its owner can enter.
pub(crate) fn create_private_dir(path: &Path) -> Result<(), HeadError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| HeadError::DataDir {
            path: path.to_owned(),
            source,
        })
}

/// Writes a file that only its owner can read: beside the path first, then renamed over it.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<(), HeadError> {
    let failed = |source| HeadError::DataDir {
        path: PathBuf::from(path),
        source,
    };
    let beside = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .map_err(failed)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(failed)?;
    fs::rename(&beside, path).map_err(failed)
}
