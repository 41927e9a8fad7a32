//! From the options to a connected cluster.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use mobula::Cluster;

use crate::args::Target;

/// Where a local cluster is kept if nothing else is said.
pub(crate) fn default_local_dir() -> anyhow::Result<PathBuf> {
    let home = std::env::var_os("HOME").context("HOME is not set: give --data-dir or --cluster")?;
    Ok(PathBuf::from(home).join(".mobula/local"))
}

/// After which silence is said what is being waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whether what is to be done needs a head that leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leader {
    Needed,
    NotNeeded,
}

/// Connects to the cluster that the options name.
pub(crate) async fn connect(target: &Target) -> anyhow::Result<Cluster> {
    connect_where(target, Leader::Needed).await
}

/// The same, also while no head leads: for what a head answers by itself.
pub(crate) async fn connect_without_leader(target: &Target) -> anyhow::Result<Cluster> {
    connect_where(target, Leader::NotNeeded).await
}

async fn connect_where(target: &Target, leader: Leader) -> anyhow::Result<Cluster> {
    if let (Some(api), Some(file)) = (&target.api, &target.token_file) {
        let token = std::fs::read_to_string(file)
            .with_context(|| format!("the token file {} cannot be read", file.display()))?;
        return connect_to(*api, token.trim(), leader).await;
    }
    let dir = match &target.cluster {
        Some(dir) => dir.clone(),
        None => default_local_dir()?,
    };
    // SDK programs understand this form of MOBULA_CLUSTER too.
    if let Some(api) = dir.to_str().and_then(|text| text.parse().ok()) {
        let token = std::env::var("MOBULA_TOKEN")
            .context("MOBULA_TOKEN is not set: it must hold a client token of that cluster")?;
        return connect_to(api, token.trim(), leader).await;
    }
    if !dir.join(crate::local::CLUSTER_FILE).exists() {
        bail!(
            "there is no cluster in {}: start one with `mobula local up`, or name one with \
             --cluster DIR or with --api IP:PORT --token-file FILE",
            dir.display()
        );
    }
    let connecting = async {
        match leader {
            Leader::Needed => Cluster::from_data_dir(&dir).await,
            Leader::NotNeeded => Cluster::from_data_dir_without_leader(&dir).await,
        }
    };
    patiently(connecting)
        .await
        .with_context(|| format!("no connection to the cluster in {}", dir.display()))
}

async fn connect_to(api: SocketAddr, token: &str, leader: Leader) -> anyhow::Result<Cluster> {
    let connecting = async {
        match leader {
            Leader::Needed => Cluster::connect(&api.to_string(), token).await,
            Leader::NotNeeded => {
                Cluster::connect_without_leader(vec![api.to_string()], token).await
            }
        }
    };
    patiently(connecting)
        .await
        .with_context(|| format!("no connection to the head at {api}"))
}

/// Says what is being waited for when it takes long: a head may be on its way back.
pub(crate) async fn patiently<T>(connecting: impl Future<Output = T>) -> T {
    tokio::pin!(connecting);
    match tokio::time::timeout(PATIENCE, &mut connecting).await {
        Ok(connected) => connected,
        Err(_) => {
            eprintln!("waiting for the head …");
            connecting.await
        }
    }
}
