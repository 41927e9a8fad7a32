//! `mobula head`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use mobula_core::config::{Config, SweepConfig};
use mobula_head::{Head, HeadOptions, JoinOptions, SweepOptions};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{HeadArguments, HeadCommand, Target};
use crate::backup;
use crate::clock::SystemClock;
use crate::heads;

/// Reads a configuration file, or takes the defaults.
pub(crate) fn read_config(path: Option<&Path>) -> anyhow::Result<Config> {
    let Some(path) = path else {
        return Ok(Config::default());
    };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("the configuration {} cannot be read", path.display()))?;
    Ok(Config::from_toml(&text, &path.display().to_string())?)
}

/// Log lines go to standard error; `RUST_LOG` says which.
pub(crate) fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}

/// Writes `value` so that a reader sees all of it or nothing.
pub(crate) fn write_whole(path: &Path, value: &serde_json::Value) -> anyhow::Result<()> {
    let beside = path.with_extension("new");
    std::fs::write(&beside, serde_json::to_string_pretty(value)?)
        .and_then(|()| std::fs::rename(&beside, path))
        .with_context(|| format!("{} cannot be written", path.display()))
}

fn sweep_options(config: &SweepConfig) -> Option<SweepOptions> {
    let minutes = |count: u64| Duration::from_secs(count.saturating_mul(60));
    (config.interval_minutes > 0).then(|| SweepOptions {
        interval: minutes(config.interval_minutes),
        age_min: minutes(config.age_minutes),
        retention: mobula_actors::retention(),
    })
}

pub(crate) async fn run(target: &Target, mut arguments: HeadArguments) -> anyhow::Result<()> {
    match arguments.command.take() {
        Some(HeadCommand::Backup {
            file,
            local,
            format,
        }) => backup::backup(target, &file, local, format).await,
        Some(HeadCommand::Restore {
            file,
            data_dir,
            name,
            check: _,
            format,
        }) => backup::restore(&file, data_dir, name, format),
        Some(HeadCommand::Group(command)) => heads::run(target, command).await,
        None => serve(arguments).await,
    }
}

/// How to join, at the first start; the token is read from a file only, for arguments are seen by
/// every user of the machine.
fn join_options(
    addresses: &[String],
    token_file: Option<&Path>,
) -> anyhow::Result<Option<JoinOptions>> {
    if addresses.is_empty() {
        return Ok(None);
    }
    let addresses = addresses
        .iter()
        .map(|text| {
            text.parse()
                .with_context(|| format!("head.join names `{text}`: expected ip:port"))
        })
        .collect::<anyhow::Result<_>>()?;
    let file = token_file.context(
        "a group is joined with a token: make one with `mobula head add`, put it into a file and \
         name that with --join-token-file",
    )?;
    // At later starts the file may be gone: the identity is there then.
    let token = match std::fs::read_to_string(file) {
        Ok(text) => text.trim().to_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("the token file {} cannot be read", file.display()));
        }
    };
    Ok(Some(JoinOptions { addresses, token }))
}

async fn serve(arguments: HeadArguments) -> anyhow::Result<()> {
    start_logging();
    let mut config = read_config(arguments.config.as_deref())?;
    if let Some(dir) = &arguments.data_dir {
        config.head.data_dir = dir.display().to_string();
    }
    if let Some(address) = arguments.api_listen {
        config.head.api_listen = address.to_string();
    }
    if let Some(address) = arguments.cluster_listen {
        config.head.cluster_listen = address.to_string();
    }
    if let Some(url) = arguments.storage_url {
        config.storage.url = url;
    }
    if arguments.name.is_some() {
        config.head.name = arguments.name;
    }
    if !arguments.join.is_empty() {
        config.head.join = arguments.join.iter().map(ToString::to_string).collect();
    }
    let token_file =
        arguments
            .join_token_file
            .or(config.head.join_token_file.clone().map(PathBuf::from));
    let mut options = HeadOptions::from_config(&config, Arc::new(SystemClock))?;
    options.join = join_options(&config.head.join, token_file.as_deref())?;
    options.wants_to_vote = !arguments.learner;
    options.modules = mobula_actors::modules();
    options.controllers = mobula_actors::controllers();
    options.sweep = sweep_options(&config.storage.sweep);
    let head = Head::start(options).await?;
    if let Some(path) = &arguments.ready_file {
        let ready = json!({
            "pid": std::process::id(),
            "cluster_id": head.cluster_id(),
            "raft_id": head.raft_id(),
            "api_address": head.api_address().to_string(),
            "cluster_address": head.cluster_address().to_string(),
        });
        write_whole(path, &ready)?;
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    head.run(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await?;
    Ok(())
}
