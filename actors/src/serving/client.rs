//! What the command line and programs ask of serving.

use std::net::SocketAddr;
use std::time::Duration;

use mobula::Cluster;
use mobula_core::control::ModuleId;
use mobula_core::error::ErrorCode;
use mobula_core::id::{ActorId, JobId};
use rand::TryRngCore;
use rand::rngs::OsRng;
use tokio::time::Instant;

use super::access::state::{Access, Command as AccessCommand, Doors};
use super::autoscaler::state::Command as ScalingCommand;
use super::autoscaler::{Policy, Scaling};
use super::cache::CacheSetting;
use super::cache::setting::Command as CacheCommand;
use super::controller::replica_name;
use super::experiment::Experiment;
use super::experiment::command::Command as ExperimentCommand;
use super::graph::spec::GraphSpec;
use super::graph::state::{Command as GraphCommand, Graph};
use super::replica_settings::ReplicaSettings;
use super::rollout::Rollout;
use super::rollout::command::Command as RolloutCommand;
use super::rollout::plan::Progress;
use super::sentinels::state::{Asked, Command as SentinelsCommand};
use super::shadow;
use super::state::{Command, Endpoint, Query, Routing, Steered};
use crate::ask;

/// How long one question to a router may take: it only looks at its own memory.
const READY_TIMEOUT: Duration = Duration::from_secs(2);

/// How often to ask again.
const POLL: Duration = Duration::from_millis(100);

/// A new endpoint, with the token that its callers show. It is kept nowhere else.
#[derive(Debug, Clone)]
pub struct Deployment {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// 256 random bits, in hex.
    pub token: String,
}

/// An endpoint that does not answer in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "endpoint `{endpoint}` is not ready after {waited_ms} ms: {reason}; see `mobula serve list` \
     and `mobula actors list`"
)]
pub struct NotReady {
    /// The endpoint.
    pub endpoint: String,
    /// How long it was waited for.
    pub waited_ms: u64,
    /// What was last seen.
    pub reason: String,
}

/// Serves a version of a model (the newest if `version` is absent) under the name `endpoint`, by replicas that are each given
/// what `settings` say.
pub async fn deploy(
    cluster: &Cluster,
    endpoint: &str,
    model: &str,
    version: Option<u64>,
    replicas: u32,
    settings: ReplicaSettings,
) -> mobula::Result<Deployment> {
    let token = new_token()?;
    let command = Command::Deploy {
        endpoint: endpoint.to_owned(),
        model: model.to_owned(),
        version,
        replicas,
        settings,
        token_hash: *blake3::hash(token.as_bytes()).as_bytes(),
    };
    let answer = ask::apply(cluster, ModuleId::SERVING, "deploy a model", &command).await?;
    Ok(Deployment {
        endpoint: ask::answer(&answer)?,
        token,
    })
}

/// Accepts one more token at an endpoint, for `ttl` and for so many requests a second if these are given. The token:
/// it is kept nowhere else.
pub async fn add_token(
    cluster: &Cluster,
    endpoint: &str,
    name: &str,
    ttl: Option<Duration>,
    per_second: Option<u32>,
) -> mobula::Result<(String, Access)> {
    let token = new_token()?;
    let command = AccessCommand::AddToken {
        endpoint: endpoint.to_owned(),
        name: name.to_owned(),
        hash: *blake3::hash(token.as_bytes()).as_bytes(),
        ttl_ms: ttl.map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
        per_second,
    };
    let access = change_access(cluster, command).await?;
    Ok((token, access))
}

/// Changes who may ask an endpoint, or its rules; what holds then.
pub async fn change_access(cluster: &Cluster, command: AccessCommand) -> mobula::Result<Access> {
    let command = Command::Access(command);
    let what = "change who may ask an endpoint";
    let answer = ask::apply(cluster, ModuleId::SERVING, what, &command).await?;
    ask::answer(&answer)
}

/// Who may ask an endpoint, and its rules.
pub async fn access(cluster: &Cluster, endpoint: &str) -> mobula::Result<Access> {
    let query = Query::Access {
        endpoint: endpoint.to_owned(),
    };
    let what = "look up who may ask an endpoint";
    ask::query(cluster, ModuleId::SERVING, what, &query).await
}

/// What the doors of the cluster must know, if that is something else than at revision `known`.
pub async fn doors(cluster: &Cluster, known: u64) -> mobula::Result<Doors> {
    let query = Query::Doors { known };
    ask::query(cluster, ModuleId::SERVING, "look up the endpoints", &query).await
}

/// Makes a graph; with its callers' token, which is kept nowhere else.
pub async fn create_graph(
    cluster: &Cluster,
    graph: &str,
    spec: GraphSpec,
) -> mobula::Result<(Graph, String)> {
    let token = new_token()?;
    let command = GraphCommand::Create {
        graph: graph.to_owned(),
        spec,
        token_hash: *blake3::hash(token.as_bytes()).as_bytes(),
    };
    Ok((change_graph(cluster, command).await?, token))
}

/// Changes a graph, or deletes it; as it was then.
pub async fn change_graph(cluster: &Cluster, command: GraphCommand) -> mobula::Result<Graph> {
    let command = Command::Graph(command);
    let answer = ask::apply(cluster, ModuleId::SERVING, "change a graph", &command).await?;
    ask::answer(&answer)
}

/// All graphs, by name.
pub async fn graphs(cluster: &Cluster) -> mobula::Result<Vec<Graph>> {
    ask::query(cluster, ModuleId::SERVING, "list graphs", &Query::Graphs).await
}

/// Where the ingress of a worker shall listen; `None` if it was not told.
pub async fn ingress_address(cluster: &Cluster, node: &str) -> mobula::Result<Option<String>> {
    let query = Query::Ingress {
        node: node.to_owned(),
    };
    let what = "look up where the ingress shall listen";
    ask::query(cluster, ModuleId::SERVING, what, &query).await
}

fn new_token() -> mobula::Result<String> {
    let mut bytes = [0; 32];
    OsRng.try_fill_bytes(&mut bytes).map_err(|error| {
        mobula::Error::User(format!("the system gives no random bytes: {error}"))
    })?;
    Ok(blake3::Hash::from_bytes(bytes).to_hex().to_string())
}

/// All endpoints, by name.
pub async fn list(cluster: &Cluster) -> mobula::Result<Vec<Endpoint>> {
    ask::query(cluster, ModuleId::SERVING, "list endpoints", &Query::List).await
}

/// One endpoint.
pub async fn find(cluster: &Cluster, endpoint: &str) -> mobula::Result<Endpoint> {
    let query = Query::Endpoint {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::SERVING, "look up an endpoint", &query).await
}

/// An endpoint with its newest rollout, and how it is scaled.
pub async fn routing(cluster: &Cluster, endpoint: &str) -> mobula::Result<Routing> {
    let query = Query::Routing {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::SERVING, "look up an endpoint", &query).await
}

/// All that an endpoint's router goes by.
pub(super) async fn steered(cluster: &Cluster, endpoint: &str) -> mobula::Result<Steered> {
    let query = Query::Steered {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::SERVING, "look up an endpoint", &query).await
}

/// The experiments of an endpoint that are kept, oldest first.
pub async fn experiments(cluster: &Cluster, endpoint: &str) -> mobula::Result<Vec<Experiment>> {
    let query = Query::Experiments {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::SERVING, "look up experiments", &query).await
}

/// Changes an experiment; as it is then.
pub async fn experiment(
    cluster: &Cluster,
    command: ExperimentCommand,
) -> mobula::Result<Experiment> {
    let command = Command::Experiment(command);
    let answer = ask::apply(cluster, ModuleId::SERVING, "change an experiment", &command).await?;
    ask::answer(&answer)
}

/// The rollouts of an endpoint that are kept, oldest first.
pub async fn rollouts(cluster: &Cluster, endpoint: &str) -> mobula::Result<Vec<Rollout>> {
    let query = Query::Rollouts {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::SERVING, "look up rollouts", &query).await
}

/// How the candidates of an endpoint's rollouts are shadowed, by the rollout's number.
pub async fn shadows(
    cluster: &Cluster,
    endpoint: &str,
) -> mobula::Result<Vec<(u64, shadow::Plan)>> {
    let query = Query::Shadows {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::SERVING, "look up rollouts", &query).await
}

/// What was counted of the step that an endpoint's newest rollout is at.
pub async fn progress(cluster: &Cluster, endpoint: &str) -> mobula::Result<Option<Progress>> {
    let query = Query::Progress {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::SERVING, "look up rollouts", &query).await
}

/// How far the sentinels are answered of the version beside an endpoint's active one, while there is one and its router
/// has said so.
pub async fn sentinels(cluster: &Cluster, endpoint: &str) -> mobula::Result<Option<Asked>> {
    let query = Query::Sentinels {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::SERVING, "look up sentinels", &query).await
}

/// Says how far they are answered.
pub async fn note_sentinels(cluster: &Cluster, command: SentinelsCommand) -> mobula::Result<()> {
    let command = Command::Sentinels(command);
    ask::apply(cluster, ModuleId::SERVING, "note sentinels", &command).await?;
    Ok(())
}

/// Changes a rollout; as it is then.
pub async fn roll_out(cluster: &Cluster, command: RolloutCommand) -> mobula::Result<Rollout> {
    let command = Command::Rollout(command);
    let answer = ask::apply(cluster, ModuleId::SERVING, "change a rollout", &command).await?;
    ask::answer(&answer)
}

/// Changes how an endpoint is scaled; as it is then.
pub async fn scale(cluster: &Cluster, command: ScalingCommand) -> mobula::Result<Scaling> {
    let command = Command::Scaling(command);
    let answer = ask::apply(cluster, ModuleId::SERVING, "scale an endpoint", &command).await?;
    ask::answer(&answer)
}

/// Scales an endpoint by another policy from now on.
pub async fn set_policy(
    cluster: &Cluster,
    endpoint: &str,
    policy: Policy,
) -> mobula::Result<Scaling> {
    let endpoint = endpoint.to_owned();
    scale(cluster, ScalingCommand::SetPolicy { endpoint, policy }).await
}

/// Stops serving. Its actors end soon after.
pub async fn delete(cluster: &Cluster, endpoint: &str) -> mobula::Result<()> {
    let command = Command::Delete {
        endpoint: endpoint.to_owned(),
    };
    ask::apply(cluster, ModuleId::SERVING, "delete an endpoint", &command)
        .await
        .map(drop)
}

/// Waits until a deleted endpoint is gone with all of its actors; false if it is not in time.
pub async fn wait_gone(
    cluster: &Cluster,
    endpoint: &str,
    timeout: Duration,
) -> mobula::Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        match find(cluster, endpoint).await {
            Err(error) if error.code() == Some(ErrorCode::NotFound) => return Ok(true),
            Err(error) => return Err(error),
            Ok(_) if Instant::now() >= deadline => return Ok(false),
            Ok(_) => tokio::time::sleep(POLL).await,
        }
    }
}

/// Waits until an endpoint answers requests.
pub async fn wait_ready(
    cluster: &Cluster,
    deployment: &Deployment,
    timeout: Duration,
) -> mobula::Result<Result<Endpoint, NotReady>> {
    let name = &deployment.endpoint.name;
    let http = reqwest::Client::builder()
        .timeout(READY_TIMEOUT)
        .build()
        .map_err(|error| mobula::Error::User(format!("no HTTP client: {error}")))?;
    let deadline = Instant::now() + timeout;
    loop {
        let endpoint = find(cluster, name).await?;
        let reason = match endpoint
            .http_address
            .as_deref()
            .map(str::parse::<SocketAddr>)
        {
            None => "its router has not started yet".to_owned(),
            Some(Err(_)) => "its router has no usable address".to_owned(),
            Some(Ok(address)) => match is_ready(&http, address, deployment).await {
                Ok(()) => return Ok(Ok(endpoint)),
                Err(reason) => reason,
            },
        };
        if Instant::now() >= deadline {
            let waited_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            let reason = match what_replicas_lack(cluster, &endpoint).await {
                Some(lack) => format!("{reason}; {lack}"),
                None => reason,
            };
            return Ok(Err(NotReady {
                endpoint: name.clone(),
                waited_ms,
                reason,
            }));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Why the first replica that does not run does not; nothing if all do, or the head does not say.
async fn what_replicas_lack(cluster: &Cluster, endpoint: &Endpoint) -> Option<String> {
    let actors = cluster.list_actors(Some(JobId::SYSTEM)).await.ok()?;
    let mut replicas = (1..=endpoint.replicas)
        .map(|number| replica_name(&endpoint.name, endpoint.version, number))
        .filter_map(|name| actors.iter().rfind(|actor| actor.name == name));
    let replica = replicas.find(|replica| replica.state != "running")?;
    let (id, state) = (ActorId(replica.id), &replica.state);
    Some(match &replica.exit_reason {
        None => {
            format!("its replica {id} is {state}: `mobula explain {id}` says what it waits for")
        }
        Some(reason) => format!(
            "its replica {id} is {state}, and its last start came to this: {reason} (`mobula explain {id}`)"
        ),
    })
}

async fn is_ready(
    http: &reqwest::Client,
    address: SocketAddr,
    deployment: &Deployment,
) -> Result<(), String> {
    let url = format!(
        "http://{address}/v2/models/{}/ready",
        deployment.endpoint.name
    );
    let asked = http.get(url).bearer_auth(&deployment.token).send().await;
    let response = asked.map_err(|error| format!("its router at {address}: {error}"))?;
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    let body = response.text().await.unwrap_or_default();
    Err(format!("its router says {status}: {body}"))
}

/// Has an endpoint keep answers, or none.
pub async fn set_cache(
    cluster: &Cluster,
    endpoint: &str,
    setting: Option<CacheSetting>,
) -> mobula::Result<()> {
    let command = Command::Cache(CacheCommand::Set {
        endpoint: endpoint.to_owned(),
        setting,
    });
    let operation = "set a cache";
    ask::apply(cluster, ModuleId::SERVING, operation, &command).await?;
    Ok(())
}
