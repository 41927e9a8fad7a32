//! `mobula serve`.

mod batch;
mod graph;
mod ingress;
pub(crate) mod route;
mod tokens;

use std::time::Duration;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::registry;
use mobula_actors::registry::search::Selector;
use mobula_actors::serving::autoscaler::Policy;
use mobula_actors::serving::client;
use mobula_actors::serving::controller::replica_name;
use mobula_actors::serving::endpoint_service::INPUT;
use mobula_actors::serving::state::Endpoint;
use mobula_core::clock::Clock;
use mobula_core::id::JobId;
use serde::Serialize;

use crate::args::{ServeCommand, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::models::name::VersionName;
use crate::output::{age, or_dash, print_json, print_table};

/// Replicas of an endpoint if nothing is said: one may be lost.
const REPLICAS: u32 = 2;

/// How long `serve delete` waits for the endpoint's actors to end.
const DELETE_TIMEOUT: Duration = Duration::from_secs(10);

/// An endpoint as `--json` prints it.
#[derive(Serialize)]
struct EndpointJson<'a> {
    endpoint: &'a str,
    model: &'a str,
    version: u64,
    digest: &'a str,
    replicas: u32,
    replicas_running: usize,
    /// `deploying`, `serving` or `deleting`.
    state: &'static str,
    /// Where it answers; absent until it does.
    url: Option<String>,
    deployed_ms: u64,
}

/// A new endpoint as `--json` prints it.
#[derive(Serialize)]
struct DeploymentJson<'a> {
    endpoint: &'a str,
    model: &'a str,
    version: u64,
    digest: &'a str,
    replicas: u32,
    url: &'a str,
    infer_url: &'a str,
    token: &'a str,
}

fn url(endpoint: &Endpoint) -> Option<String> {
    endpoint
        .http_address
        .as_ref()
        .map(|address| format!("http://{address}"))
}

fn state(endpoint: &Endpoint) -> &'static str {
    match endpoint {
        Endpoint { deleting: true, .. } => "deleting",
        Endpoint {
            http_address: Some(_),
            ..
        } => "serving",
        _ => "deploying",
    }
}

pub(crate) async fn run(target: &Target, command: ServeCommand) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    match command {
        ServeCommand::Deploy {
            model,
            endpoint,
            scaling,
            timeout,
            format,
        } => {
            let VersionName { model, selector } = model;
            let version = match selector {
                Selector::Newest => None,
                Selector::Number(version) => Some(version),
                // From then on the endpoint serves that version, whatever becomes of the alias.
                alias => {
                    let view = registry::client::view(&cluster, &model, alias).await?;
                    Some(view.version.version)
                }
            };
            let name = endpoint.unwrap_or_else(|| model.clone());
            let policy = scaling.policy(Policy::between(REPLICAS, REPLICAS));
            // Before there is anything to undo.
            policy.check()?;
            // It begins with one at least, and so shows that it can answer.
            let (floor, _) = policy.bounds(SystemClock.now_ms());
            let replicas = floor.max(1);
            let deployment = client::deploy(&cluster, &name, &model, version, replicas).await?;
            let scaled = client::set_policy(&cluster, &name, policy).await;
            scaled.with_context(|| {
                format!(
                    "{name} is deployed with {replicas} replicas, and its token is {}; say with `mobula serve \
                     scale {name}` how it shall be scaled",
                    deployment.token
                )
            })?;
            let waited =
                client::wait_ready(&cluster, &deployment, Duration::from_millis(timeout)).await?;
            match waited {
                Ok(endpoint) => print_deployment(&endpoint, &deployment.token, format.json),
                // The token exists nowhere else, so that it is not lost with the error.
                Err(error) => {
                    bail!(
                        "{error}; it goes on starting, and its token is {}",
                        deployment.token
                    )
                }
            }
        }
        ServeCommand::Scale(arguments) => crate::scaling::scale(&cluster, arguments).await,
        ServeCommand::Explain(arguments) => crate::scaling::explain(&cluster, arguments).await,
        ServeCommand::Tokens(command) => tokens::run(&cluster, command).await,
        ServeCommand::Route(command) => route::run(&cluster, command).await,
        ServeCommand::Graph(command) => graph::run(&cluster, command).await,
        ServeCommand::Batch(arguments) => batch::run(&cluster, arguments).await,
        ServeCommand::Ingress(format) => ingress::run(&cluster, format).await,
        ServeCommand::List(format) => list(&cluster, format.json).await,
        ServeCommand::Delete { endpoint } => {
            client::delete(&cluster, &endpoint).await?;
            if client::wait_gone(&cluster, &endpoint, DELETE_TIMEOUT).await? {
                println!("{endpoint} is deleted");
            } else {
                println!("{endpoint} is being deleted: see `mobula serve list`");
            }
            Ok(())
        }
    }
}

fn print_deployment(endpoint: &Endpoint, token: &str, json: bool) -> anyhow::Result<()> {
    let url = url(endpoint).context("an endpoint that is ready has an address")?;
    let infer_url = format!("{url}/v2/models/{}/infer", endpoint.name);
    if json {
        return print_json(&DeploymentJson {
            endpoint: &endpoint.name,
            model: &endpoint.model,
            version: endpoint.version,
            digest: &endpoint.digest,
            replicas: endpoint.replicas,
            url: &url,
            infer_url: &infer_url,
            token,
        });
    }
    println!("endpoint   {}", endpoint.name);
    println!("model      {}:{}", endpoint.model, endpoint.version);
    println!("url        {url}");
    println!("token      {token}");
    println!("\nThe token is shown this once. Ask it (a blank image):\n");
    println!("curl -s {infer_url} -H 'Authorization: Bearer {token}' \\");
    println!("  -d '{}'", example_request());
    Ok(())
}

/// A request that can be pasted.
fn example_request() -> String {
    let pixels = vec!["0"; 64].join(",");
    format!(
        r#"{{"inputs":[{{"name":"{INPUT}","datatype":"FP32","shape":[1,64],"data":[{pixels}]}}]}}"#
    )
}

async fn list(cluster: &Cluster, json: bool) -> anyhow::Result<()> {
    let endpoints = client::list(cluster).await?;
    let actors = cluster.list_actors(Some(JobId::SYSTEM)).await?;
    let running = |endpoint: &Endpoint| {
        (1..=endpoint.replicas)
            .map(|number| replica_name(&endpoint.name, endpoint.version, number))
            .filter(|name| {
                actors
                    .iter()
                    .any(|actor| actor.state == "running" && actor.name == *name)
            })
            .count()
    };
    if json {
        let endpoints: Vec<EndpointJson<'_>> = endpoints
            .iter()
            .map(|endpoint| EndpointJson {
                endpoint: &endpoint.name,
                model: &endpoint.model,
                version: endpoint.version,
                digest: &endpoint.digest,
                replicas: endpoint.replicas,
                replicas_running: running(endpoint),
                state: state(endpoint),
                url: url(endpoint),
                deployed_ms: endpoint.deployed_ms,
            })
            .collect();
        return print_json(&endpoints);
    }
    let rows: Vec<Vec<String>> = endpoints
        .iter()
        .map(|endpoint| {
            vec![
                endpoint.name.clone(),
                format!("{}:{}", endpoint.model, endpoint.version),
                state(endpoint).to_owned(),
                format!("{}/{}", running(endpoint), endpoint.replicas),
                or_dash(url(endpoint)),
                age(endpoint.deployed_ms, SystemClock.now_ms()),
            ]
        })
        .collect();
    print_table(
        &["ENDPOINT", "MODEL", "STATE", "REPLICAS", "URL", "AGE"],
        &rows,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_a_request() {
        let request: serde_json::Value = serde_json::from_str(&example_request()).unwrap();
        assert_eq!(request["inputs"][0]["data"].as_array().unwrap().len(), 64);
    }
}
