//! `mobula serve`.

mod batch;
mod graph;
mod ingress;
pub(crate) mod route;
mod tokens;

use std::time::Duration;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::device::ComputeDevice;
use mobula_actors::registry;
use mobula_actors::registry::search::Selector;
use mobula_actors::serving::autoscaler::Policy;
use mobula_actors::serving::cache::CacheSetting;
use mobula_actors::serving::client;
use mobula_actors::serving::controller::replica_name;
use mobula_actors::serving::replica_settings::Batching;
use mobula_actors::serving::state::Endpoint;
use mobula_core::clock::Clock;
use mobula_core::id::JobId;
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{CacheArguments, ServeCommand, Target};
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
    /// `cpu` or `cuda`.
    device: ComputeDevice,
    /// Bytes that each replica may use; absent if they are not limited.
    memory_bytes: Option<u64>,
    batching: &'a Batching,
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
    device: ComputeDevice,
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
            replicas: given,
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
            let settings = given.settings();
            // Before there is anything to undo.
            policy.check()?;
            settings.check()?;
            // It begins with one at least, and so shows that it can answer.
            let (floor, _) = policy.bounds(SystemClock.now_ms());
            let replicas = floor.max(1);
            let deployment =
                client::deploy(&cluster, &name, &model, version, replicas, settings).await?;
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
                Ok(endpoint) => print_deployment(&endpoint, &deployment.token, format.json).await,
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
        ServeCommand::Cache(arguments) => cache(&cluster, arguments).await,
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

async fn cache(cluster: &Cluster, arguments: CacheArguments) -> anyhow::Result<()> {
    let endpoint = &arguments.endpoint;
    let setting = (!arguments.off).then(|| CacheSetting {
        bytes: arguments.mib.saturating_mul(1 << 20),
        ttl_ms: arguments.ttl,
    });
    client::set_cache(cluster, endpoint, setting).await?;
    if arguments.format.json {
        return print_json(&json!({
            "endpoint": endpoint,
            "cache_bytes": setting.map(|setting| setting.bytes),
            "ttl_ms": setting.map(|setting| setting.ttl_ms),
        }));
    }
    match setting {
        Some(setting) => println!(
            "{endpoint} keeps answers of up to {} bytes a version, each for {} ms",
            setting.bytes, setting.ttl_ms
        ),
        None => println!("{endpoint} keeps no answers"),
    }
    Ok(())
}

async fn print_deployment(endpoint: &Endpoint, token: &str, json: bool) -> anyhow::Result<()> {
    let url = url(endpoint).context("an endpoint that is ready has an address")?;
    let infer_url = format!("{url}/v2/models/{}/infer", endpoint.name);
    if json {
        return print_json(&DeploymentJson {
            endpoint: &endpoint.name,
            model: &endpoint.model,
            version: endpoint.version,
            digest: &endpoint.digest,
            replicas: endpoint.replicas,
            device: endpoint.settings.device,
            url: &url,
            infer_url: &infer_url,
            token,
        });
    }
    println!("endpoint   {}", endpoint.name);
    println!("model      {}:{}", endpoint.model, endpoint.version);
    println!("url        {url}");
    println!("token      {token}");
    let described_url = format!("{url}/v2/models/{}", endpoint.name);
    println!("\nThe token is shown this once. Ask it:\n");
    match described(&described_url, token).await {
        Ok(Some(request)) => {
            println!("curl -s {infer_url} -H 'Authorization: Bearer {token}' \\");
            println!("  -d '{request}'");
        }
        // A request of many values is nothing to paste.
        Ok(None) => println!("curl -s {described_url} -H 'Authorization: Bearer {token}'"),
        Err(error) => {
            tracing::debug!(%error, "the endpoint does not say what it takes");
            println!("curl -s {described_url} -H 'Authorization: Bearer {token}'");
        }
    }
    Ok(())
}

/// How long the endpoint may take to say what it takes.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(5);

/// A request of zeros for the endpoint whose metadata is at `url`, if it is short enough to be pasted.
async fn described(url: &str, token: &str) -> anyhow::Result<Option<String>> {
    let asked = reqwest::Client::new().get(url).bearer_auth(token);
    let answer = asked.timeout(DESCRIBE_TIMEOUT).send().await?;
    Ok(example_request(&answer.error_for_status()?.json().await?))
}

/// A request of zeros, with one row, and one of each other thing that may have any number.
fn example_request(metadata: &Value) -> Option<String> {
    const PASTED_VALUES_MAX: i64 = 512;
    let mut values = 0i64;
    let mut inputs = Vec::new();
    for input in metadata["inputs"].as_array()? {
        let sizes = input["shape"].as_array()?.iter();
        let shape: Option<Vec<i64>> = sizes
            .map(|size| size.as_i64().map(|size| if size < 0 { 1 } else { size }))
            .collect();
        let shape = shape?;
        let count = shape
            .iter()
            .try_fold(1i64, |count, size| count.checked_mul(*size))?;
        values = values.checked_add(count)?;
        if values > PASTED_VALUES_MAX {
            return None;
        }
        let value = match input["datatype"].as_str()? {
            "BOOL" => Value::Bool(false),
            "BYTES" => Value::from(""),
            _ => Value::from(0),
        };
        let data = vec![value; usize::try_from(count).ok()?];
        inputs.push(json!({
            "name": input["name"],
            "datatype": input["datatype"],
            "shape": shape,
            "data": data,
        }));
    }
    Some(json!({ "inputs": inputs }).to_string())
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
                device: endpoint.settings.device,
                memory_bytes: endpoint.settings.memory_bytes,
                batching: &endpoint.settings.batching,
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
                endpoint.settings.device.to_string(),
                or_dash(url(endpoint)),
                age(endpoint.deployed_ms, SystemClock.now_ms()),
            ]
        })
        .collect();
    print_table(
        &[
            "ENDPOINT", "MODEL", "STATE", "REPLICAS", "DEVICE", "URL", "AGE",
        ],
        &rows,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_a_request_of_what_the_endpoint_takes() {
        let metadata = json!({"inputs": [
            {"name": "image", "datatype": "FP32", "shape": [-1, 64]},
            {"name": "flags", "datatype": "BOOL", "shape": [-1, -1]},
        ]});
        let request: Value = serde_json::from_str(&example_request(&metadata).unwrap()).unwrap();
        assert_eq!(request["inputs"][0]["data"].as_array().unwrap().len(), 64);
        assert_eq!(request["inputs"][0]["shape"], json!([1, 64]));
        assert_eq!(request["inputs"][1]["data"], json!([false]));
        let large =
            json!({"inputs": [{"name": "i", "datatype": "FP32", "shape": [-1, 3, 224, 224]}]});
        assert_eq!(example_request(&large), None);
    }
}
