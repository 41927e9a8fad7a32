//! A head's first start: cluster id, certificate authority, its own certificate, first tokens.
//!
//! Everything lies in the data directory: `cluster_id`, `ca/`, `identity/`, `tokens/`, `raft/`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mobula_net::identity::{ClusterCa, Credentials, Identity, Role, Validity};
use rand::RngCore;

use crate::error::HeadError;

/// How long a head's certificate lives; it is renewed at half of that.
const CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 3600);

/// The file with a token for whoever may join as a worker.
pub const WORKER_TOKEN_FILE: &str = "tokens/worker.token";
/// The file with a token for whoever may use the control API.
pub const CLIENT_TOKEN_FILE: &str = "tokens/client.token";

/// Who this head is.
pub(crate) struct HeadIdentity {
    pub(crate) cluster_id: String,
    pub(crate) ca: Arc<ClusterCa>,
    pub(crate) credentials: Credentials,
    dir: PathBuf,
}

impl HeadIdentity {
    /// Reads what an earlier start left in `data_dir`, or makes it.
    pub(crate) fn load_or_create(data_dir: &Path, raft_id: u64) -> Result<Self, HeadError> {
        create_private_dir(data_dir)?;
        let cluster_id = load_or_create_cluster_id(data_dir)?;
        let ca =
            ClusterCa::load_or_create(&data_dir.join("ca"), &cluster_id).map_err(|source| {
                HeadError::Identity {
                    reason: source.to_string(),
                }
            })?;
        let credentials = load_or_issue_own(&ca, &cluster_id, raft_id, &identity_dir(data_dir))?;
        Ok(HeadIdentity {
            cluster_id,
            ca: Arc::new(ca),
            credentials,
            dir: identity_dir(data_dir),
        })
    }

    /// A new certificate for this head, kept like the one before.
    pub(crate) fn renew(&self) -> Result<Credentials, HeadError> {
        let identity = self.credentials.identity();
        let credentials = issue(&self.ca, identity)?;
        save(&credentials, &self.dir)?;
        Ok(credentials)
    }
}

fn identity_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("identity")
}

/// The key is kept over restarts: peers of the process before then learn at once, by a stateless
/// reset, that it is gone, instead of waiting for a timeout.
fn load_or_issue_own(
    ca: &ClusterCa,
    cluster_id: &str,
    raft_id: u64,
    dir: &Path,
) -> Result<Credentials, HeadError> {
    create_private_dir(dir)?;
    if let Ok(credentials) = Credentials::load(dir)
        && SystemTime::now() < credentials.renew_at()
        && credentials.ca_key_hash() == ca.key_hash()
    {
        return Ok(credentials);
    }
    let identity = Identity::new(cluster_id, Role::Head, format!("head-{raft_id}"), raft_id);
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
