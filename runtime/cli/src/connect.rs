//! From the options to a connected cluster.

use std::path::PathBuf;

use anyhow::{Context, bail};
use mobula::Cluster;

use crate::args::Target;

/// Where a local cluster is kept if nothing else is said.
pub(crate) fn default_local_dir() -> anyhow::Result<PathBuf> {
    let home = std::env::var_os("HOME").context("HOME is not set: give --data-dir or --cluster")?;
    Ok(PathBuf::from(home).join(".mobula/local"))
}

/// Connects to the cluster that the options name.
pub(crate) async fn connect(target: &Target) -> anyhow::Result<Cluster> {
    if let (Some(api), Some(file)) = (&target.api, &target.token_file) {
        let token = std::fs::read_to_string(file)
            .with_context(|| format!("the token file {} cannot be read", file.display()))?;
        return Cluster::connect(&api.to_string(), token.trim())
            .await
            .with_context(|| format!("no connection to the head at {api}"));
    }
    let dir = match &target.cluster {
        Some(dir) => dir.clone(),
        None => default_local_dir()?,
    };
    if !dir.join(crate::local::CLUSTER_FILE).exists() {
        bail!(
            "there is no cluster in {}: start one with `mobula local up`, or name one with \
             --cluster DIR or with --api IP:PORT --token-file FILE",
            dir.display()
        );
    }
    Cluster::from_data_dir(&dir)
        .await
        .with_context(|| format!("no connection to the cluster in {}", dir.display()))
}
