//! A cluster of real processes, each on a machine of its own.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mobula::Cluster;
use mobula_wire::control::{
    CreateTokenRequest, Head, ListHeadsReply, ListHeadsRequest, ListNodesRequest,
};

use super::disk::DiskError;
use super::machine::{Machine, MachineError};
use super::machines::{Isolation, Machines};
use super::node::{Node, NodeError};
use super::router::Router;
use super::scenario::Scenario;

/// How long a cluster may take to be complete.
const COMPLETE_MAX: Duration = Duration::from_secs(90);

/// How often is looked whether it is.
const POLL: Duration = Duration::from_millis(50);

/// The leader is asked for this long: longer than an election, shorter than a fault.
const ASK_MAX: Duration = Duration::from_secs(2);

/// How long the token for a joining head lives, and how often it may be used: a reply may be lost.
const HEAD_TOKEN_MS: u64 = 10 * 60 * 1000;
const HEAD_TOKEN_USES: u32 = 3;

/// Why a cluster did not come up.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A process.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The SDK.
    #[error("{what}: {reason}")]
    Api {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        reason: mobula::Error,
    },
    /// A file of the run.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: io::Error,
    },
    /// Something took too long.
    #[error("{what} did not happen within {} s: {state}", COMPLETE_MAX.as_secs())]
    TooLong {
        /// What was waited for.
        what: &'static str,
        /// How things stand.
        state: String,
    },
}

fn api(what: &'static str) -> impl Fn(mobula::Error) -> ClusterError {
    move |reason| ClusterError::Api { what, reason }
}

/// The cluster of a run.
#[derive(Debug)]
pub struct RealCluster {
    dir: PathBuf,
    // Before the machines: processes end before their networks.
    heads: Vec<Arc<Node>>,
    workers: Vec<Arc<Node>>,
    token: String,
    admin: Cluster,
    router: Option<Router>,
    clients: Machine,
}

impl RealCluster {
    /// Machines and processes for `scenario`, below `dir`. With [`Isolation::Namespaces`] only threads
    /// on the clients' machine reach it; [`run`](super::run) takes care of that.
    pub async fn up(
        scenario: &Scenario,
        isolation: Isolation,
        seed: u64,
        program: &Path,
        dir: &Path,
    ) -> Result<RealCluster, ClusterError> {
        let machines = Machines::make(scenario, isolation, seed, program, dir)?;
        RealCluster::start(machines, scenario, dir).await
    }

    /// Starts every process and waits until the cluster is complete. To be called on a runtime whose
    /// threads are on the clients' machine.
    pub(super) async fn start(
        machines: Machines,
        scenario: &Scenario,
        dir: &Path,
    ) -> Result<RealCluster, ClusterError> {
        let config = write_config(scenario, dir)?;
        let mut heads: Vec<Arc<Node>> = machines.heads.into_iter().map(Arc::new).collect();
        let first = Arc::clone(&heads[0]);
        first.set_arguments(head_arguments(&first, dir, config.as_deref(), None));
        first.start()?;
        first.wait_ready().await?;
        let token = wait_for_token(&first, mobula_head::CLIENT_TOKEN_FILE).await?;
        let worker_token = wait_for_token(&first, mobula_head::WORKER_TOKEN_FILE).await?;
        let admin = connect(&heads, &token).await?;
        let mut cluster = RealCluster {
            dir: dir.to_owned(),
            heads: Vec::new(),
            workers: Vec::new(),
            token,
            admin,
            router: machines.router,
            clients: machines.clients,
        };
        let others = heads.split_off(1);
        cluster.heads = heads;
        for head in others {
            cluster.join_head(&head, config.as_deref()).await?;
            cluster.heads.push(head);
        }
        cluster.wait_for_voters().await?;
        let token_file = dir.join("worker.token");
        write_private(&token_file, &worker_token)?;
        for node in machines.workers {
            let arguments = cluster.worker_arguments(&node, scenario, &token_file)?;
            node.set_arguments(arguments);
            node.start()?;
            cluster.workers.push(Arc::new(node));
        }
        cluster.wait_for_workers().await?;
        Ok(cluster)
    }

    /// The heads.
    #[must_use]
    pub fn heads(&self) -> &[Arc<Node>] {
        &self.heads
    }

    /// The workers.
    #[must_use]
    pub fn workers(&self) -> &[Arc<Node>] {
        &self.workers
    }

    /// All of them.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.heads.iter().chain(&self.workers)
    }

    /// The network, where there is one of its own.
    #[must_use]
    pub fn router(&self) -> Option<&Router> {
        self.router.as_ref()
    }

    /// Where the clients are.
    #[must_use]
    pub fn client_address(&self) -> Ipv4Addr {
        self.clients.address()
    }

    /// Where the run keeps everything.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The operator's own connection.
    #[must_use]
    pub fn admin(&self) -> &Cluster {
        &self.admin
    }

    /// A new client with a connection and sessions of its own.
    pub async fn client(&self) -> Result<Cluster, ClusterError> {
        connect(&self.heads, &self.token).await
    }

    /// The heads, as the leader knows them; `None` where none answers in time.
    pub async fn members(&self) -> Option<ListHeadsReply> {
        let asked = self
            .admin
            .control()
            .read("list the heads", |mut api| async move {
                api.list_heads(ListHeadsRequest { by_leader: true }).await
            });
        tokio::time::timeout(ASK_MAX, asked).await.ok()?.ok()
    }

    /// The head that leads, if one is known.
    pub async fn leader(&self) -> Option<Arc<Node>> {
        let members = self.members().await?;
        let name = &members.heads.iter().find(|head| head.leader)?.name;
        self.heads.iter().find(|head| head.name() == name).cloned()
    }

    /// Starts a head on an empty disk and lets it join with a token of its own.
    pub(super) async fn join_head(
        &self,
        head: &Arc<Node>,
        config: Option<&Path>,
    ) -> Result<(), ClusterError> {
        let made = self
            .admin
            .control()
            .mutate("make a token for a head", |mut api, stamp| {
                let request = CreateTokenRequest {
                    stamp: Some(stamp),
                    role: "head".to_owned(),
                    ttl_ms: HEAD_TOKEN_MS,
                    uses: HEAD_TOKEN_USES,
                    principal: None,
                };
                async move { api.create_token(request).await }
            })
            .await
            .map_err(api("a token for a head"))?;
        let file = self.dir.join(format!("{}.token", head.name()));
        write_private(&file, &made.token)?;
        let others = self.heads.iter().filter(|node| node.name() != head.name());
        let join: Vec<SocketAddr> = others.filter_map(|node| node.api_address()).collect();
        let arguments = head_arguments(head, &self.dir, config, Some((&join, &file)));
        head.set_arguments(arguments);
        head.start()?;
        head.wait_ready().await?;
        Ok(())
    }

    /// The configuration that heads are started with, if any.
    pub(super) fn config_file(&self) -> Option<PathBuf> {
        let file = self.dir.join(HEAD_CONFIG);
        file.exists().then_some(file)
    }

    /// Waits until every head votes and was heard of lately.
    pub async fn wait_for_voters(&self) -> Result<(), ClusterError> {
        let patience = Patience::begin();
        loop {
            let members = self.members().await.map(|members| members.heads);
            let is_well = |head: &Head| head.role == "voter" && head.active == Some(true);
            let heads = members.unwrap_or_default();
            if heads.len() == self.heads.len() && heads.iter().all(is_well) {
                return Ok(());
            }
            let shown = |head: &Head| format!("{} {} {:?}", head.name, head.role, head.active);
            let state = match heads.as_slice() {
                [] => "nobody leads".to_owned(),
                heads => heads.iter().map(shown).collect::<Vec<_>>().join(", "),
            };
            patience.wait("a vote for every head", state).await?;
        }
    }

    /// Waits until every worker counts as alive.
    pub async fn wait_for_workers(&self) -> Result<(), ClusterError> {
        let patience = Patience::begin();
        loop {
            let asked = self
                .admin
                .control()
                .read("list nodes", |mut api| async move {
                    api.list_nodes(ListNodesRequest {}).await
                });
            let state = match asked.await {
                Err(error) => error.to_string(),
                Ok(reply) => {
                    let alive = reply.nodes.iter().filter(|node| node.state == "alive");
                    let (alive, count) = (alive.count(), self.workers.len());
                    if alive >= count {
                        return Ok(());
                    }
                    format!("{alive} of {count} workers are alive")
                }
            };
            patience.wait("a session with every worker", state).await?;
        }
    }

    fn worker_arguments(
        &self,
        node: &Node,
        scenario: &Scenario,
        token_file: &Path,
    ) -> Result<Vec<String>, ClusterError> {
        let mut config = scenario.cluster.config.clone();
        let section = config
            .entry("worker")
            .or_insert_with(|| toml::Table::new().into());
        if let Some(section) = section.as_table_mut() {
            section.insert("listen".to_owned(), format!("{}:0", node.address()).into());
        }
        let file = self.dir.join(format!("{}.toml", node.name()));
        write(&file, &config.to_string())?;
        let apis: Vec<String> = self
            .heads
            .iter()
            .filter_map(|head| head.api_address())
            .map(|address| address.to_string())
            .collect();
        let text = |path: PathBuf| path.display().to_string();
        Ok([
            "worker".to_owned(),
            "--config".to_owned(),
            text(file),
            "--name".to_owned(),
            node.name().to_owned(),
            "--data-dir".to_owned(),
            text(node.data_dir()),
            "--head".to_owned(),
            apis.join(","),
            "--join-token-file".to_owned(),
            text(token_file.to_owned()),
            "--cpus".to_owned(),
            scenario.cluster.cpus.to_string(),
            "--notice-file".to_owned(),
            text(self.dir.join(format!("{}.notice", node.name()))),
        ]
        .to_vec())
    }
}

const HEAD_CONFIG: &str = "head.toml";

fn write_config(scenario: &Scenario, dir: &Path) -> Result<Option<PathBuf>, ClusterError> {
    if scenario.cluster.config.is_empty() {
        return Ok(None);
    }
    let file = dir.join(HEAD_CONFIG);
    write(&file, &scenario.cluster.config.to_string())?;
    Ok(Some(file))
}

fn head_arguments(
    node: &Node,
    dir: &Path,
    config: Option<&Path>,
    join: Option<(&[SocketAddr], &Path)>,
) -> Vec<String> {
    let mut arguments = vec!["head".to_owned()];
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    if let Some(config) = config {
        option("--config", config.display().to_string());
    }
    option("--name", node.name().to_owned());
    option("--data-dir", node.data_dir().display().to_string());
    let store = dir.join("store");
    option("--storage-url", format!("file://{}", store.display()));
    if let Some((addresses, token_file)) = join {
        for address in addresses {
            option("--join", address.to_string());
        }
        option("--join-token-file", token_file.display().to_string());
    }
    arguments
}

async fn connect(heads: &[Arc<Node>], token: &str) -> Result<Cluster, ClusterError> {
    let addresses = heads.iter().filter_map(|head| head.api_address());
    let addresses = addresses.map(|address| address.to_string()).collect();
    Cluster::connect_to_any(addresses, token)
        .await
        .map_err(api("a connection to the heads"))
}

/// The first leader makes tokens once it leads, and renames them into place.
async fn wait_for_token(head: &Node, file: &'static str) -> Result<String, ClusterError> {
    let patience = Patience::begin();
    loop {
        if let Some(token) = head.read(file) {
            return Ok(token.trim().to_owned());
        }
        patience.wait(file, head.last_lines()).await?;
    }
}

/// How long something may still take.
struct Patience(Instant);

impl Patience {
    fn begin() -> Self {
        Patience(Instant::now() + COMPLETE_MAX)
    }

    /// Waits a moment before the next look, unless it is too late for one.
    async fn wait(&self, what: &'static str, state: String) -> Result<(), ClusterError> {
        if Instant::now() >= self.0 {
            return Err(ClusterError::TooLong { what, state });
        }
        tokio::time::sleep(POLL).await;
        Ok(())
    }
}

fn write(file: &Path, text: &str) -> Result<(), ClusterError> {
    std::fs::write(file, text).map_err(|reason| ClusterError::File {
        path: file.to_owned(),
        reason,
    })
}

/// A file that only its owner reads.
fn write_private(file: &Path, text: &str) -> Result<(), ClusterError> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    options
        .open(file)
        .and_then(|mut open| open.write_all(text.as_bytes()))
        .map_err(|reason| ClusterError::File {
            path: file.to_owned(),
            reason,
        })
}
