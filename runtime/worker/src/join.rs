//! Becoming part of a cluster, and staying part of it.
//!
//! The first start exchanges a token and a certificate request for a certificate, over TLS that is
//! pinned to the CA key hash in the token. Later starts use the stored identity, and renew it at
//! half its life.
//!
//! Invariants:
//! 1. The private key is made here and never leaves this machine.
//! 2. The token is sent only to a head whose CA has the key that the token names.
//! 3. An identity is stored whole (mode 0600) before it is used.
//!
//! Where the leader is, is asked in `leader`.

mod leader;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mobula_net::identity::{CertificateError, Credentials, PrivateKey, Role, Token};
use mobula_net::tcp::{ApiConnectError, ClientTls, connect_channel};
use mobula_wire::control::control_client::ControlClient;
use mobula_wire::control::{JoinReply, JoinRequest};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tonic::Code;
use tonic::transport::Channel;

use crate::error::JoinError;
use crate::options::WorkerOptions;
use crate::paths::write_private;

/// A head that takes longer to answer is as good as absent; another one may be better.
const RPC_TIMEOUT: Duration = Duration::from_secs(10);

/// How often to look for a head at the first start before giving up: some 15 s in all, so that a
/// worker may be started together with its head.
const FIRST_JOIN_ATTEMPTS: u32 = 8;

/// Control APIs that are remembered: those of a group, and of the one before.
const HEADS_MAX: usize = 16;

/// The worker's place in its cluster.
#[derive(Debug, Clone)]
pub(crate) struct Membership {
    pub(crate) credentials: Credentials,
    pub(crate) cluster_id: String,
    /// Where the head takes QUIC connections (`host:port`), as last heard.
    pub(crate) cluster_address: String,
}

/// What is stored beside the credentials.
#[derive(Debug, Serialize, Deserialize)]
struct ClusterFile {
    cluster_id: String,
    cluster_address: String,
    /// The heads' control APIs, as last heard.
    #[serde(default)]
    api_addresses: Vec<String>,
}

/// Everything that joining and renewing need.
#[derive(Debug, Clone)]
pub(crate) struct Joiner {
    name: String,
    /// Control APIs, as last heard; those of the configuration come last. Shared by all clones.
    head_api: Arc<Mutex<Vec<String>>>,
    token: Option<TokenText>,
    identity_dir: PathBuf,
}

/// The token as given; not printed.
#[derive(Clone)]
struct TokenText(String);

impl std::fmt::Debug for TokenText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenText(..)")
    }
}

impl Joiner {
    pub(crate) fn new(options: &WorkerOptions, identity_dir: PathBuf) -> Joiner {
        Joiner {
            name: options.name.clone(),
            head_api: Arc::new(Mutex::new(options.head_api.clone())),
            token: options.token.clone().map(TokenText),
            identity_dir,
        }
    }

    /// Takes in where the heads are now. Those that were known before stay behind them, for the
    /// case that all of these are gone one day.
    pub(crate) fn learn(&self, api_addresses: &[String]) {
        let mut known = self.head_api.lock();
        let before = std::mem::take(&mut *known);
        for address in api_addresses.iter().cloned().chain(before) {
            if known.len() < HEADS_MAX && !known.contains(&address) {
                known.push(address);
            }
        }
    }

    fn head_api(&self) -> Vec<String> {
        self.head_api.lock().clone()
    }

    /// The stored identity if it is still good, otherwise a new one.
    pub(crate) async fn membership(&self) -> Result<Membership, JoinError> {
        let stored = self.load()?;
        let token = self.parse_token()?;
        let Some(stored) = stored else {
            return self.join_first(token).await;
        };
        if let Some(token) = &token
            && token.ca_key_hash() != stored.credentials.ca_key_hash()
        {
            return Err(JoinError::OtherCluster {
                address: self.head_api().join(", "),
                expected_by: "the stored identity",
                reason: format!("the token is not of cluster `{}`", stored.cluster_id),
                identity_dir: self.identity_dir.clone(),
            });
        }
        if stored.credentials.not_after() <= SystemTime::now() {
            if token.is_none() {
                return Err(JoinError::Expired {
                    name: self.name.clone(),
                });
            }
            return self.join_first(token).await;
        }
        // Find out now, with a clear error, that the heads are of another cluster. Heads that
        // cannot be reached are no error: they may come back.
        match self.cluster_address(&stored.credentials).await {
            Ok(cluster_address) => {
                let membership = Membership {
                    cluster_address,
                    ..stored
                };
                self.save(&membership)?;
                Ok(membership)
            }
            Err(error @ JoinError::OtherCluster { .. }) => Err(error),
            Err(error) => {
                tracing::warn!(%error, "no head says where it takes connections; going on with the stored address");
                Ok(stored)
            }
        }
    }

    /// A new certificate for a worker whose old one is at half life or older.
    pub(crate) async fn renew(&self, current: &Membership) -> Result<Membership, JoinError> {
        let tls = ClientTls::Mutual(current.credentials.clone());
        // The certificate that is about to end says who asks; a token's uses are for others.
        let refused = match self.join_any(&tls, String::new()).await {
            Err(error @ JoinError::TokenRefused { .. }) => error,
            decided => return decided,
        };
        match self.parse_token()? {
            Some(token) if token.ca_key_hash() == current.credentials.ca_key_hash() => {
                self.join_any(&tls, token.to_text()).await
            }
            _ => Err(refused),
        }
    }

    fn parse_token(&self) -> Result<Option<Token>, JoinError> {
        let Some(TokenText(text)) = &self.token else {
            return Ok(None);
        };
        let token = Token::parse(text).map_err(|error| JoinError::TokenMalformed {
            reason: error.to_string(),
        })?;
        if token.role() != Role::Node {
            return Err(JoinError::TokenOfOtherRole {
                role: token.role().to_string(),
            });
        }
        Ok(Some(token))
    }

    async fn join_first(&self, token: Option<Token>) -> Result<Membership, JoinError> {
        let Some(token) = token else {
            return Err(JoinError::TokenAbsent {
                name: self.name.clone(),
            });
        };
        let tls = ClientTls::Pinned(token.ca_key_hash());
        let mut delay = Duration::from_millis(100);
        for _ in 1..FIRST_JOIN_ATTEMPTS {
            match self.join_any(&tls, token.to_text()).await {
                Err(error @ JoinError::HeadUnreachable { .. }) => {
                    tracing::info!(%error, "trying again");
                }
                decided => return decided,
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(Duration::from_secs(4));
        }
        self.join_any(&tls, token.to_text()).await
    }

    /// Joins through the first head that answers.
    async fn join_any(&self, tls: &ClientTls, token: String) -> Result<Membership, JoinError> {
        let key = PrivateKey::generate().map_err(|error| self.unusable(&error))?;
        let csr_pem = key
            .certificate_request()
            .map_err(|error| self.unusable(&error))?;
        let mut last = None;
        for address in &self.head_api() {
            let reply = async {
                let mut client = self.connect(address, tls).await?;
                let mut request = tonic::Request::new(JoinRequest {
                    token: token.clone(),
                    csr_pem: csr_pem.clone(),
                    name: self.name.clone(),
                });
                request.set_timeout(RPC_TIMEOUT);
                client
                    .join(request)
                    .await
                    .map_err(|status| self.refusal(address, &status))
            };
            match reply.await {
                Ok(reply) => return self.accept(key, reply.into_inner()),
                Err(error @ JoinError::HeadUnreachable { .. }) => last = Some(error),
                // What one head decides, the others would decide too.
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| self.unreachable("no address is given")))
    }

    fn accept(&self, key: PrivateKey, reply: JoinReply) -> Result<Membership, JoinError> {
        let credentials = Credentials::new(&reply.certificate_pem, key, &reply.ca_pem)
            .map_err(|error| self.unusable(&error))?;
        let heads: Vec<String> = reply
            .heads
            .into_iter()
            .map(|head| head.api_address)
            .collect();
        self.learn(&heads);
        let membership = Membership {
            credentials,
            cluster_id: reply.cluster_id,
            cluster_address: reply.cluster_address,
        };
        self.save(&membership)?;
        tracing::info!(
            identity = %membership.credentials.identity(),
            cluster_address = %membership.cluster_address,
            "joined"
        );
        Ok(membership)
    }

    async fn connect(
        &self,
        address: &str,
        tls: &ClientTls,
    ) -> Result<ControlClient<Channel>, JoinError> {
        let resolved = resolve(address)
            .await
            .map_err(|reason| self.unreachable(&reason))?;
        let channel =
            connect_channel(resolved, tls.clone())
                .await
                .map_err(|error| match error {
                    ApiConnectError::WrongPeer { .. } => JoinError::OtherCluster {
                        address: address.to_owned(),
                        expected_by: match tls {
                            ClientTls::Pinned(_) => "the token",
                            ClientTls::Mutual(_) | ClientTls::MutualRenewed(_) => {
                                "the stored identity"
                            }
                        },
                        reason: error.to_string(),
                        identity_dir: self.identity_dir.clone(),
                    },
                    _ => self.unreachable(&error.to_string()),
                })?;
        Ok(ControlClient::new(channel))
    }

    fn refusal(&self, address: &str, status: &tonic::Status) -> JoinError {
        let reason = status.message().to_owned();
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => JoinError::TokenRefused { reason },
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
                self.unreachable(&format!("{address}: {reason}"))
            }
            _ => JoinError::Refused {
                name: self.name.clone(),
                reason,
            },
        }
    }

    fn unreachable(&self, reason: &str) -> JoinError {
        JoinError::HeadUnreachable {
            addresses: self.head_api().join(", "),
            reason: reason.to_owned(),
        }
    }

    fn unusable(&self, reason: &dyn std::fmt::Display) -> JoinError {
        JoinError::IdentityUnusable {
            identity_dir: self.identity_dir.clone(),
            reason: reason.to_string(),
        }
    }

    fn cluster_file(&self) -> PathBuf {
        self.identity_dir.join("cluster.json")
    }

    fn load(&self) -> Result<Option<Membership>, JoinError> {
        let credentials = match Credentials::load(&self.identity_dir) {
            Ok(credentials) => credentials,
            Err(CertificateError::File(error)) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(self.unusable(&error)),
        };
        let stored = credentials.identity().id.clone();
        if stored != self.name {
            return Err(JoinError::OtherName {
                name: self.name.clone(),
                stored,
                identity_dir: self.identity_dir.clone(),
            });
        }
        let ClusterFile {
            cluster_id,
            cluster_address,
            api_addresses,
        } = read_json(&self.cluster_file()).map_err(|error| self.unusable(&error))?;
        // What was asked for at this start comes first; then what was heard before.
        self.learn(&[self.head_api(), api_addresses].concat());
        Ok(Some(Membership {
            credentials,
            cluster_id,
            cluster_address,
        }))
    }

    fn save(&self, membership: &Membership) -> Result<(), JoinError> {
        let file = ClusterFile {
            cluster_id: membership.cluster_id.clone(),
            cluster_address: membership.cluster_address.clone(),
            api_addresses: self.head_api(),
        };
        let text = serde_json::to_vec_pretty(&file).expect("strings are JSON");
        // The credentials come last: only with them is there an identity at all.
        write_private(&self.cluster_file(), &text).map_err(|error| self.unusable(&error))?;
        membership
            .credentials
            .save(&self.identity_dir)
            .map_err(|error| self.unusable(&error))
    }
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, String> {
    let text = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// The first address that `host:port` stands for.
pub(crate) async fn resolve(address: &str) -> Result<SocketAddr, String> {
    let mut found = tokio::net::lookup_host(address)
        .await
        .map_err(|error| format!("`{address}` cannot be resolved: {error}"))?;
    found
        .next()
        .ok_or_else(|| format!("`{address}` stands for no address"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_net::identity::{ClusterCa, Identity, Validity};

    fn joiner(dir: &Path, token: Option<String>) -> Joiner {
        let mut options = WorkerOptions::new("w-1", dir, vec!["127.0.0.1:1".into()]);
        options.token = token;
        Joiner::new(&options, dir.to_path_buf())
    }

    fn store(dir: &Path, name: &str, ttl: Duration) {
        let ca = ClusterCa::create("c-1").unwrap();
        let identity = Identity::new("c-1", Role::Node, name, 1);
        let validity = Validity {
            not_before: SystemTime::now() - Duration::from_secs(7200),
            not_after: SystemTime::now() - Duration::from_secs(3600) + ttl,
        };
        let membership = Membership {
            credentials: ca.issue_with_new_key(&identity, validity).unwrap(),
            cluster_id: "c-1".into(),
            cluster_address: "127.0.0.1:2".into(),
        };
        joiner(dir, None).save(&membership).unwrap();
    }

    #[tokio::test]
    async fn a_first_start_needs_a_worker_token() {
        let dir = tempfile::tempdir().unwrap();
        let error = joiner(dir.path(), None).membership().await.unwrap_err();
        assert!(matches!(error, JoinError::TokenAbsent { .. }), "{error}");
        let error = joiner(dir.path(), Some("x".into()))
            .membership()
            .await
            .unwrap_err();
        assert!(matches!(error, JoinError::TokenMalformed { .. }), "{error}");
        let hash = ClusterCa::create("c-1").unwrap().key_hash();
        let token = Token::generate(Role::Client, hash).to_text();
        let error = joiner(dir.path(), Some(token))
            .membership()
            .await
            .unwrap_err();
        assert!(
            matches!(error, JoinError::TokenOfOtherRole { .. }),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_stored_identity_is_enough_while_no_head_answers() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path(), "w-1", Duration::from_secs(7200));
        let membership = joiner(dir.path(), None).membership().await.unwrap();
        assert_eq!(membership.cluster_address, "127.0.0.1:2");
        assert_eq!(membership.credentials.identity().id, "w-1");
    }

    #[test]
    fn heads_that_were_heard_of_come_first_and_none_is_forgotten_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let joiner = joiner(dir.path(), None);
        let clone = joiner.clone();
        joiner.learn(&["10.0.0.2:1".into(), "10.0.0.3:1".into()]);
        assert_eq!(
            clone.head_api(),
            ["10.0.0.2:1", "10.0.0.3:1", "127.0.0.1:1"]
        );
        for number in 0..100 {
            joiner.learn(&[format!("10.0.1.{number}:1")]);
        }
        assert_eq!(joiner.head_api().len(), HEADS_MAX);
        assert_eq!(joiner.head_api()[0], "10.0.1.99:1");
    }

    #[tokio::test]
    async fn a_stored_identity_of_another_name_cluster_or_time_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path(), "w-2", Duration::from_secs(7200));
        let error = joiner(dir.path(), None).membership().await.unwrap_err();
        assert!(matches!(error, JoinError::OtherName { .. }), "{error}");

        store(dir.path(), "w-1", Duration::from_secs(7200));
        let other = ClusterCa::create("c-2").unwrap().key_hash();
        let token = Token::generate(Role::Node, other).to_text();
        let error = joiner(dir.path(), Some(token))
            .membership()
            .await
            .unwrap_err();
        assert!(matches!(error, JoinError::OtherCluster { .. }), "{error}");

        store(dir.path(), "w-1", Duration::ZERO);
        let error = joiner(dir.path(), None).membership().await.unwrap_err();
        assert!(matches!(error, JoinError::Expired { .. }), "{error}");
    }
}
