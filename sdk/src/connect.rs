//! The ways into a cluster: from outside with a token, from inside with the process's certificate.
//!
//! Invariants:
//! 1. A process that an agent started uses its own certificate and its own job; it never needs a
//!    token.
//! 2. From outside, calls to actors use a certificate that the token is exchanged for, on first
//!    use.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mobula_host::HostRuntime;
use mobula_host::client::CallClient;
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{Credentials, PrivateKey, Token};
use mobula_net::tcp::ClientTls;
use mobula_wire::control as api;
use mobula_wire::host::HostRole;
use serde::Deserialize;
use tokio::sync::OnceCell;

use crate::cluster::{Cluster, ClusterInner, Place};
use crate::control::{Access, Control};
use crate::embedded::LocalCluster;
use crate::error::{Error, Result};
use crate::task::pool::TaskPools;

/// How long a program inside the cluster goes on without any head: as long as actors must.
const RETRY_WINDOW_INSIDE: Duration = Duration::from_secs(600);

/// How long a person's program waits for a head.
const RETRY_WINDOW_OUTSIDE: Duration = Duration::from_secs(15);

/// The file in a data directory that says where the cluster is.
pub const CLUSTER_FILE: &str = "cluster.json";

/// The file in a data directory that holds the client token.
pub const CLIENT_TOKEN_FILE: &str = "tokens/client.token";

/// What we read of `cluster.json`; there is more in it for people and tools.
#[derive(Deserialize)]
struct ClusterFile {
    #[serde(default)]
    api_addresses: Vec<String>,
}

impl Cluster {
    /// The cluster whose head answers at `address` (`ip:port`), with a client token.
    pub async fn connect(address: &str, token: &str) -> Result<Self> {
        Cluster::connect_to_any(vec![address.to_owned()], token).await
    }

    /// The cluster of which some head answers at one of `addresses`, with a client token.
    pub async fn connect_to_any(addresses: Vec<String>, token: &str) -> Result<Self> {
        let cluster = Cluster::outside(&addresses, token, None)?;
        // A wrong address or token should show here and not at some later operation.
        cluster.status().await?;
        Ok(cluster)
    }

    /// The cluster that keeps its data in `directory`, by the files that it left there.
    pub async fn from_data_dir(directory: &Path) -> Result<Self> {
        let cluster = Cluster::of_data_dir(directory, None)?;
        cluster.status().await?;
        Ok(cluster)
    }

    /// Like [`Cluster::connect_to_any`], also while no head leads: it waits until some head can be
    /// connected to and asks it nothing, so that a token that is not good shows at the first operation.
    /// Without a leader only that works which a head answers by itself: who the heads are, and a
    /// backup of what one of them holds.
    pub async fn connect_without_leader(addresses: Vec<String>, token: &str) -> Result<Self> {
        let cluster = Cluster::outside(&addresses, token, None)?;
        cluster.reach_a_head().await?;
        Ok(cluster)
    }

    /// Like [`Cluster::from_data_dir`], also while no head leads: see
    /// [`Cluster::connect_without_leader`].
    pub async fn from_data_dir_without_leader(directory: &Path) -> Result<Self> {
        let cluster = Cluster::of_data_dir(directory, None)?;
        cluster.reach_a_head().await?;
        Ok(cluster)
    }

    /// Waits for a connection to some head.
    async fn reach_a_head(&self) -> Result<()> {
        self.control()
            .read("connect to a head", |_| {
                std::future::ready(Ok(tonic::Response::new(())))
            })
            .await
    }

    /// A local cluster of this program's own, which ends with the last clone of the value.
    pub async fn embedded() -> Result<Self> {
        let local = LocalCluster::start().await?;
        let directory = local.directory().to_owned();
        let cluster = Cluster::of_data_dir(&directory, Some(local))?;
        cluster.status().await?;
        Ok(cluster)
    }

    /// The cluster of this process, if an agent started it.
    #[must_use]
    pub fn current() -> Option<Cluster> {
        HostRuntime::current().and_then(|runtime| Cluster::of_runtime(&runtime).ok())
    }

    pub(crate) fn of_runtime(runtime: &Arc<HostRuntime>) -> Result<Self> {
        let made = runtime.extension(|| Arc::new(Cluster::inside(Arc::clone(runtime))));
        made.downcast_ref::<Result<Cluster>>()
            .cloned()
            .unwrap_or_else(|| {
                Err(Error::NotInCluster(
                    "the process uses another SDK".to_owned(),
                ))
            })
    }

    fn inside(runtime: Arc<HostRuntime>) -> Result<Self> {
        let info = runtime.info();
        let credentials = runtime.credentials().cloned().ok_or_else(|| {
            Error::NotInCluster("this process has no certificate of a cluster".to_owned())
        })?;
        let control = Control::new(Access {
            addresses: parsed(&info.api_addresses)?,
            tls: ClientTls::MutualRenewed(credentials),
            token: None,
            client_name: format!("{} {} on {}", info.job, info.host, info.node_name),
            retry_window: RETRY_WINDOW_INSIDE,
            followed: Some(runtime.api_addresses()),
        })?;
        let job = Some(info.job);
        let holder = match info.role {
            HostRole::Driver {
                actor, incarnation, ..
            } => Some((actor, incarnation)),
            // Many actors share this process: each gets a handle of its own from its context.
            HostRole::Actors => None,
        };
        let inner = ClusterInner {
            control,
            place: Place::Inside(runtime),
            creations: Arc::default(),
            resolutions: Arc::default(),
            tasks: TaskPools::default(),
            embedded: None,
        };
        Ok(Cluster {
            inner: Arc::new(inner),
            job,
            holder,
        })
    }

    fn of_data_dir(directory: &Path, embedded: Option<LocalCluster>) -> Result<Self> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path).map_err(|error| {
                Error::setup(
                    format!("{}", path.display()),
                    format!("{error}; is this the data directory of a running cluster?"),
                )
            })
        };
        let file: ClusterFile = serde_json::from_str(&read(CLUSTER_FILE)?).map_err(|error| {
            Error::setup(format!("{}", directory.join(CLUSTER_FILE).display()), error)
        })?;
        Cluster::outside(
            &file.api_addresses,
            read(CLIENT_TOKEN_FILE)?.trim(),
            embedded,
        )
    }

    fn outside(addresses: &[String], token: &str, embedded: Option<LocalCluster>) -> Result<Self> {
        let parsed_token =
            Token::parse(token).map_err(|error| Error::setup("client token", error))?;
        let control = Control::new(Access {
            addresses: parsed(addresses)?,
            tls: ClientTls::Pinned(parsed_token.ca_key_hash()),
            token: Some(token.to_owned()),
            client_name: format!("client pid {}", std::process::id()),
            retry_window: RETRY_WINDOW_OUTSIDE,
            followed: None,
        })?;
        let place = Place::Outside {
            token: token.to_owned(),
            calls: OnceCell::new(),
        };
        Ok(Cluster {
            inner: Arc::new(ClusterInner {
                control,
                place,
                creations: Arc::default(),
                resolutions: Arc::default(),
                tasks: TaskPools::default(),
                embedded,
            }),
            job: None,
            holder: None,
        })
    }

    pub(crate) async fn join(&self, token: &str) -> Result<CallClient> {
        let failed = |error: &dyn std::fmt::Display| Error::setup("client certificate", error);
        let key = PrivateKey::generate().map_err(|error| failed(&error))?;
        let request = api::JoinRequest {
            token: token.to_owned(),
            csr_pem: key.certificate_request().map_err(|error| failed(&error))?,
            name: format!("client-{}", std::process::id()),
        };
        let reply = self
            .control()
            .read("join as a client", |mut api| {
                let request = request.clone();
                async move { api.join(request).await }
            })
            .await?;
        let credentials = Credentials::new(&reply.certificate_pem, key, &reply.ca_pem)
            .map_err(|error| failed(&error))?;
        let head = self.control().addresses()[0];
        let endpoint = local_ip_towards(head)
            .map_err(|error| error.to_string())
            .and_then(|address| {
                Endpoint::bind_client(address, &credentials).map_err(|error| error.to_string())
            })
            .map_err(|reason| Error::setup("endpoint for calls", reason))?;
        Ok(CallClient::new(endpoint, None))
    }
}

fn parsed(addresses: &[String]) -> Result<Vec<SocketAddr>> {
    addresses
        .iter()
        .map(|text| {
            text.parse().map_err(|_| {
                Error::setup(
                    "control API",
                    format!("`{text}` is not an address (ip:port)"),
                )
            })
        })
        .collect()
}

/// Our own address on the way to `target`, with any free port: actors run where the heads are.
fn local_ip_towards(target: SocketAddr) -> std::io::Result<SocketAddr> {
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let probe = UdpSocket::bind(any)?;
    // Connecting a UDP socket sends nothing; it only makes the system choose a route.
    probe.connect(target)?;
    Ok(SocketAddr::new(probe.local_addr()?.ip(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_directory_without_a_cluster_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = Cluster::of_data_dir(directory.path(), None).unwrap_err();
        assert!(error.to_string().contains("cluster.json"), "{error}");
        assert!(
            error
                .to_string()
                .contains("data directory of a running cluster"),
            "{error}"
        );
        std::fs::write(directory.path().join(CLUSTER_FILE), "{}").unwrap();
        std::fs::create_dir(directory.path().join("tokens")).unwrap();
        std::fs::write(directory.path().join(CLIENT_TOKEN_FILE), "nonsense").unwrap();
        let error = Cluster::of_data_dir(directory.path(), None).unwrap_err();
        assert!(error.to_string().starts_with("client token"), "{error}");
    }

    #[test]
    fn addresses_are_checked() {
        let error = parsed(&["localhost".to_owned()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "control API: `localhost` is not an address (ip:port)"
        );
    }
}
