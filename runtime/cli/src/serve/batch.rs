//! `mobula serve batch`.

use std::time::{Duration, Instant};

use anyhow::Context;
use mobula::Cluster;
use mobula_actors::serving::access::state::Command;
use mobula_actors::serving::batch_inference::run::{Batch, Locate, Progress, run as run_batch};
use mobula_actors::serving::client;
use serde::Serialize;

use crate::args::ServeBatchArguments;
use crate::output::print_json;

/// How often is said how far it is.
const SAY_INTERVAL: Duration = Duration::from_secs(10);

/// How long the token of a run is taken, should the run be killed before it can revoke it. A longer run is started again
/// and goes on.
const TOKEN_TTL: Duration = Duration::from_secs(24 * 3600);

/// A run as `--json` prints it.
#[derive(Serialize)]
struct BatchJson {
    rows: u64,
    answered_before: u64,
    answered: u64,
    failed: u64,
    refused: u64,
}

/// Where an endpoint answers: what was given, or what the head says now.
struct Server<'a> {
    cluster: &'a Cluster,
    endpoint: &'a str,
    url: Option<String>,
}

impl Locate for Server<'_> {
    async fn locate(&self) -> Result<String, String> {
        if let Some(url) = &self.url {
            return Ok(url.trim_end_matches('/').to_owned());
        }
        let found = client::find(self.cluster, self.endpoint).await;
        let endpoint = found.map_err(|error| error.to_string())?;
        let address = endpoint.http_address;
        address
            .map(|address| format!("http://{address}"))
            .ok_or_else(|| "its router has not started yet".to_owned())
    }
}

pub(super) async fn run(cluster: &Cluster, arguments: ServeBatchArguments) -> anyhow::Result<()> {
    let ServeBatchArguments {
        endpoint,
        input,
        output,
        url,
        token_file,
        in_flight,
        format,
    } = arguments;
    let server = Server {
        cluster,
        endpoint: &endpoint,
        url,
    };
    if server.url.is_none() {
        // One that is no endpoint would be looked for in vain.
        client::find(cluster, &endpoint).await.with_context(|| {
            format!("if `{endpoint}` is a graph, name an ingress with --url (see `mobula serve ingress`)")
        })?;
    }
    let (token, made) = match token_file {
        Some(file) => {
            let token = std::fs::read_to_string(&file)
                .with_context(|| format!("the token file {} cannot be read", file.display()))?;
            (token.trim().to_owned(), None)
        }
        None => {
            let name = format!("batch-{:08x}", rand::random::<u32>());
            let made = client::add_token(cluster, &endpoint, &name, Some(TOKEN_TTL), None).await?;
            (made.0, Some(name))
        }
    };
    let batch = Batch {
        endpoint: endpoint.clone(),
        token,
        input,
        output,
        in_flight: usize::from(in_flight),
    };
    let mut said = Instant::now();
    let watch = |progress: Progress| {
        if said.elapsed() >= SAY_INTERVAL {
            said = Instant::now();
            eprintln!("{}", described(progress));
        }
    };
    let ended = tokio::select! {
        ended = run_batch(&batch, &server, watch) => ended.map_err(anyhow::Error::from),
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.context("no signal can be waited for")
                .and_then(|()| Err(anyhow::anyhow!("interrupted: start the same command again to go on")))
        }
    };
    if let Some(name) = made {
        let revoke = Command::RevokeToken { endpoint, name };
        let revoked = client::change_access(cluster, revoke).await;
        // It ends by itself, and what became of the rows is more important.
        if let Err(error) = revoked {
            eprintln!("the run's token could not be revoked, it ends in a day: {error}");
        }
    }
    let progress = ended?;
    if format.json {
        return print_json(&BatchJson {
            rows: progress.before + progress.answered,
            answered_before: progress.before,
            answered: progress.answered,
            failed: progress.failed,
            refused: progress.refused,
        });
    }
    println!("{}", described(progress));
    Ok(())
}

fn described(progress: Progress) -> String {
    let Progress {
        before,
        answered,
        failed,
        refused,
    } = progress;
    format!(
        "{answered} rows answered, of which {failed} say why they have no answer; {before} were answered before; the \
         endpoint had no room {refused} times"
    )
}
